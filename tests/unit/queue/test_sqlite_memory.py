"""The memory in the store: durable, one for all workers, nothing of two lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from relay.mail.memory import DomainMemory, HostMemory, KeptAlarm, Less, Run, Shown
from relay.queue.memory import Change, from_row, to_row
from relay.queue.sqlite.memory import MemoryToRead, SqliteMemory
from relay.queue.sqlite.policies import MIGRATIONS, POLICIES, SqlitePolicyCache
from relay.queue.sqlite.schema import migrate
from relay.queue.store import SpoolError

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def memory(domain: str = "example.net", *, last: datetime = NOW, messages: int = 3) -> DomainMemory:
    return DomainMemory(
        domain,
        NOW - HOUR,
        last,
        Run(messages, NOW - HOUR),
        Run(0, NOW),
        {
            "mx1.example.net": HostMemory(Shown.VERIFIED, NOW),
            "mx2.example.net": HostMemory(Shown.VERIFIED, NOW, Less(Shown.NONE, NOW - HOUR)),
        },
        (
            KeptAlarm("mx2.example.net", Shown.VERIFIED, Shown.NONE, False, NOW - HOUR, NOW),
            KeptAlarm("mx1.example.net", Shown.ENCRYPTED, Shown.NONE, True, None, NOW),
        ),
    )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteMemory]:
    store = await SqliteMemory.open(tmp_path)
    yield store
    await store.close()


async def keep(store: SqliteMemory, *memories: DomainMemory) -> None:
    changes: dict[str, Change] = {one.domain: partial(_instead, one) for one in memories}
    await store.change(changes)


def _instead(memory: DomainMemory, _: DomainMemory | None) -> DomainMemory:
    return memory


def test_a_row_says_all_there_is() -> None:
    assert from_row("example.net", to_row(memory())) == memory()


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"first":"x"}', "null"])
def test_invalid_row_names_the_command_that_forgets_it(text: str) -> None:
    with pytest.raises(SpoolError, match=r"relay memory forget example\.net"):
        from_row("example.net", text)


async def test_memory_is_there_after_a_restart(tmp_path: Path) -> None:
    store = await SqliteMemory.open(tmp_path)
    assert await store.memory("example.net") is None
    await keep(store, memory())
    await store.close()
    again = await SqliteMemory.open(tmp_path)
    assert await again.memory("example.net") == memory()
    await again.close()


async def test_change_is_told_what_is_kept_and_says_what_is_kept_then(store: SqliteMemory) -> None:
    told: list[DomainMemory | None] = []

    def more(before: DomainMemory | None) -> DomainMemory:
        told.append(before)
        return replace(before or memory(), last=NOW + HOUR)

    assert await store.change({"example.net": more}) == {"example.net": memory(last=NOW + HOUR)}
    await store.change({"example.net": more})
    assert told == [None, memory(last=NOW + HOUR)]


async def test_change_to_nothing_forgets(store: SqliteMemory) -> None:
    await keep(store, memory())
    assert await store.change({"example.net": lambda _: None}) == {"example.net": None}
    assert await store.page() == []


async def test_change_that_fails_changes_nothing(store: SqliteMemory) -> None:
    def fails(_: DomainMemory | None) -> DomainMemory:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.change({"a.example": lambda _: memory("a.example"), "b.example": fails})
    assert await store.page() == []
    await keep(store, memory())  # and the next one is not in its way


async def test_sightings_of_workers_at_the_same_moment_are_all_kept(tmp_path: Path) -> None:
    workers = [await SqliteMemory.open(tmp_path) for _ in range(4)]
    await keep(workers[0], memory(messages=0))

    def one_more(before: DomainMemory | None) -> DomainMemory:
        assert before is not None
        return replace(before, in_tls=replace(before.in_tls, messages=before.in_tls.messages + 1))

    changes = [worker.change({"example.net": one_more}) for worker in workers for _ in range(25)]
    await asyncio.gather(*changes)
    found = await workers[0].memory("example.net")
    assert found is not None
    assert found.in_tls.messages == 100
    await asyncio.gather(*(worker.close() for worker in workers))


async def test_memories_are_listed_by_domain_in_pages(store: SqliteMemory) -> None:
    await keep(store, *(memory(name) for name in ("c.example", "a.example", "b.example")))
    assert [one.domain for one in await store.page(limit=2)] == ["a.example", "b.example"]
    assert [one.domain for one in await store.page(after="b.example")] == ["c.example"]


async def test_old_memories_are_purged_and_beyond_the_most_the_oldest(store: SqliteMemory) -> None:
    names = ("a.example", "b.example", "c.example", "d.example")
    await keep(store, *(memory(name, last=NOW + n * HOUR) for n, name in enumerate(names)))
    assert await store.purge(seen_before=NOW, most=10) == 1
    assert await store.purge(seen_before=NOW, most=2) == 1
    assert [one.domain for one in await store.page()] == ["c.example", "d.example"]
    assert await store.purge(seen_before=NOW, most=2) == 0


async def test_domain_is_forgotten_whatever_its_row_says(store: SqliteMemory) -> None:
    await keep(store, memory())
    await store._on_thread(lambda db: db.execute("UPDATE memory SET data = 'x'"))
    with pytest.raises(SpoolError, match=r"relay memory forget example\.net"):
        await store.memory("example.net")
    assert await store.forget("example.net")
    assert not await store.forget("example.net")
    assert await store.memory("example.net") is None


async def test_policies_of_an_older_relay_are_kept_beside_it(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / POLICIES, isolation_level=None)
    db.execute("PRAGMA application_id = 1380735312")
    migrate(db, MIGRATIONS[:1])
    db.execute("INSERT INTO policy VALUES ('example.net', '1', 'text', 0, 0)")
    db.close()
    looking = MemoryToRead(tmp_path / POLICIES)
    assert await looking.page() == []
    assert await looking.memory("example.net") is None
    store, cache = await SqliteMemory.open(tmp_path), await SqlitePolicyCache.open(tmp_path)
    await keep(store, memory())
    assert await cache.policy("example.net") is not None
    assert await looking.memory("example.net") == memory()
    for each in (store, cache, looking):
        await each.close()


async def test_reading_the_memory_changes_nothing(tmp_path: Path) -> None:
    looking = MemoryToRead(tmp_path / POLICIES)
    assert await looking.page() == []
    assert not list(tmp_path.iterdir())
    store = await SqliteMemory.open(tmp_path)
    await keep(store, memory())
    before = (tmp_path / POLICIES).read_bytes()
    assert await looking.page() == [memory()]
    assert await looking.change({"example.net": lambda _: None}) == {}
    assert not await looking.forget("example.net")
    assert await looking.purge(seen_before=NOW + HOUR, most=0) == 0
    assert (tmp_path / POLICIES).read_bytes() == before
    await store.close()
    await looking.close()
