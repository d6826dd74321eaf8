"""What the system tests share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.rigs.postgres import Postgres, postgres
from tests.rigs.sandbox import Sandbox, open_sandbox


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """DNS, mail hosts and a relay, for one test; the test starts the relay with what it wants."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        async with open_sandbox(Path(directory)) as opened:
            yield opened


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[Postgres]:
    """One server for the tests of a file."""
    with postgres() as server:
        yield server


@pytest.fixture
def server(postgres_server: Postgres) -> Postgres:
    """The server, without the tables of the test before."""
    postgres_server.drop_queue()
    return postgres_server
