"""What the fault tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.rigs.sink import Sink, sink


@pytest.fixture
def mx() -> Iterator[Sink]:
    """The host that takes the mail."""
    with sink() as running:
        yield running


@pytest.fixture
def long_form() -> bool:
    """`make torture` runs every value of a sweep, everything else a few that lie apart."""
    return os.environ.get("RELAY_LONG") == "1"
