"""Every engine of the queue, and the settings in which one works differently."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

import pytest

from relay.queue.handoff import HandOffLimits
from relay.queue.sqlite import SqliteStore
from relay.queue.store import Store
from tests.fakes.memory_store import MemoryStore
from tests.fakes.queued import NOW


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
    store: MemoryStore | None = None

    async def open(self, *, now: datetime, max_wait: timedelta) -> Store:
        self.store = MemoryStore(now=now, max_wait=max_wait, after=self.store)
        return self.store


ENGINES = {
    "SQLite": HandOffLimits(),
    "SQLite without hand-off": HandOffLimits(entries=0),
    "memory": None,
}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    limits = ENGINES[request.param]
    return MemoryEngine() if limits is None else SqliteEngine(tmp_path / "spool", limits)


@pytest.fixture
async def store(engine: Engine) -> AsyncIterator[Store]:
    async with engine.opened() as store:
        yield store


@pytest.fixture
def narrow_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that goes through its table in windows has many of them."""
    monkeypatch.setattr("relay.queue.sqlite.messages._WINDOW", 7)
    monkeypatch.setattr("relay.queue.sqlite.events._WINDOW", 2)
