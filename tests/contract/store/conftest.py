"""Every engine of the queue, and the settings in which one works differently."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol, cast

import pytest

from relay.queue.handoff import HandOffLimits
from relay.queue.postgres import NodeOptions, PostgresStore, Server, parse_url
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import Store
from tests.fakes.memory_store import MemoryStore
from tests.fakes.queued import NOW
from tests.rigs.postgres import Postgres, postgres


class Engine(Protocol):
    """Opens one queue, again and again."""

    async def open(self, *, now: datetime, max_wait: timedelta) -> Store: ...

    @contextlib.asynccontextmanager
    async def opened(
        self, *, now: datetime = NOW, max_wait: timedelta = timedelta(days=1)
    ) -> AsyncIterator[Store]:
        """The queue as it was left; closed at the end."""
        store = await self.open(now=now, max_wait=max_wait)
        try:
            yield store
        finally:
            await store.close()


@dataclass
class SqliteEngine(Engine):
    """Without syncs, which no test of these promises waits for."""

    directory: Path
    limits: HandOffLimits

    async def open(self, *, now: datetime, max_wait: timedelta) -> Store:
        return await SqliteStore.open(
            self.directory, now=now, max_wait=max_wait, limits=self.limits, synchronous="OFF"
        )


@dataclass
class MemoryEngine(Engine):
    """The store of the tests of receiving and delivering; see there for what it does not have."""

    store: MemoryStore | None = None

    async def open(self, *, now: datetime, max_wait: timedelta) -> Store:
        self.store = MemoryStore(now=now, max_wait=max_wait, after=self.store)
        return cast(Store, self.store)


@dataclass
class PostgresEngine(Engine):
    """A node with tables of its own: those of the test before are dropped."""

    url: str
    limits: HandOffLimits

    async def open(self, *, now: datetime, max_wait: timedelta) -> Store:
        server = Server(parse_url(self.url), name="relay", password=lambda: None)
        options = NodeOptions("mx-a")
        return await PostgresStore.open(
            server, options, now=now, max_wait=max_wait, limits=self.limits
        )


LIMITS = {
    "SQLite": HandOffLimits(),
    "SQLite without hand-off": HandOffLimits(entries=0),
    "PostgreSQL": HandOffLimits(),
    "PostgreSQL without hand-off": HandOffLimits(entries=0),
}

ENGINES = [
    pytest.param(name, marks=pytest.mark.needs("postgresql")) if "Postgre" in name else name
    for name in LIMITS
]

IN_MEMORY = {"test_claims", "test_messages", "test_pending_reports", "test_tls_sessions"}
"""The modules whose tests the store in memory passes, too."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kept_engine" in metafunc.fixturenames:
        metafunc.parametrize("kept_engine", ENGINES, indirect=True, scope="module")
    if "engine" in metafunc.fixturenames:
        has_memory = metafunc.module.__name__.rpartition(".")[2] in IN_MEMORY
        metafunc.parametrize("engine", ENGINES + ["memory"] * has_memory, indirect=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """One server for all tests."""
    with postgres() as server:
        yield server


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    name = request.param
    if name == "memory":
        return MemoryEngine()
    if name.startswith("SQLite"):
        return SqliteEngine(tmp_path / "spool", LIMITS[name])
    server: Postgres = request.getfixturevalue("server")
    server.drop_queue()
    return PostgresEngine(server.url(), LIMITS[name])


@pytest.fixture(scope="module")
def kept_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A queue for the tests of a file that only read: the first of them fills it."""
    name: str = request.param
    if name.startswith("SQLite"):
        return SqliteEngine(tmp_path_factory.mktemp("kept") / "spool", LIMITS[name])
    server: Postgres = request.getfixturevalue("server")
    database = f"kept_{list(LIMITS).index(name)}"
    server.sql(f"DROP DATABASE IF EXISTS {database}")
    server.sql(f"CREATE DATABASE {database}")
    return PostgresEngine(server.url(database), LIMITS[name])


@pytest.fixture
async def store(engine: Engine) -> AsyncIterator[Store]:
    async with engine.opened() as store:
        yield store


@pytest.fixture
def narrow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that goes through its table in windows has many of them."""
    for engine in ("sqlite", "postgres"):
        monkeypatch.setattr(f"relay.queue.{engine}.messages._WINDOW", 7)
        monkeypatch.setattr(f"relay.queue.{engine}.events._WINDOW", 2)
