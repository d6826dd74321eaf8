"""What the tests of the HTTP interface share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.http import Rig, http_rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with http_rig(tmp_path) as made:
        yield made
