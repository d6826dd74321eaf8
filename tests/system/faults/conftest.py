"""What the fault tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def long_form() -> bool:
    """`make torture` runs every value of a sweep, everything else a few that lie apart."""
    return os.environ.get("RELAY_LONG") == "1"
