"""What the system tests share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rigs.sandbox import Sandbox, open_sandbox


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """DNS, mail hosts and a relay, for one test; the test starts the relay with what it wants."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        async with open_sandbox(Path(directory)) as opened:
            yield opened
