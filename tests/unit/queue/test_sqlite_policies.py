"""Policies in the store: durable, one for all workers, and whole whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.queue.policies import StoredPolicy
from relay.queue.sqlite.policies import POLICIES, PoliciesToRead, SqlitePolicyCache
from relay.queue.store import SpoolError

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[3]


def policy(
    domain: str = "example.net", id: str = "1", *, due: timedelta = timedelta()
) -> StoredPolicy:
    return StoredPolicy(domain, id, f"version: STSv1 {id}\r\n".encode(), NOW, NOW + due)


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[SqlitePolicyCache]:
    cache = await SqlitePolicyCache.open(tmp_path)
    yield cache
    await cache.close()


async def test_a_policy_is_there_after_a_restart(tmp_path: Path) -> None:
    cache = await SqlitePolicyCache.open(tmp_path)
    assert await cache.policy("example.net") is None
    await cache.keep(policy())
    await cache.close()
    again = await SqlitePolicyCache.open(tmp_path)
    assert await again.policy("example.net") == policy()
    await again.close()


async def test_a_policy_takes_the_place_of_the_one_before(cache: SqlitePolicyCache) -> None:
    await cache.keep(policy(id="1"))
    await cache.keep(policy(id="2"))
    assert await cache.policies() == [policy(id="2")]


async def test_a_policy_can_be_forgotten(cache: SqlitePolicyCache) -> None:
    await cache.keep(policy())
    assert await cache.forget("example.net")
    assert not await cache.forget("example.net")
    assert await cache.policy("example.net") is None


async def test_a_policy_that_was_fetched_meanwhile_is_not_touched(cache: SqlitePolicyCache) -> None:
    before, after = policy(id="1"), replace(policy(id="2"), fetched=NOW + timedelta(hours=1))
    await cache.keep(after)
    await cache.refresh_later(before, NOW + timedelta(days=1))
    assert not await cache.forget("example.net", fetched=before.fetched)
    assert await cache.policy("example.net") == after
    await cache.refresh_later(after, NOW + timedelta(days=1))
    assert await cache.policy("example.net") == replace(after, refresh_at=NOW + timedelta(days=1))
    assert await cache.forget("example.net", fetched=after.fetched)


async def test_policies_are_listed_by_domain_in_pages(cache: SqlitePolicyCache) -> None:
    for name in ("c.example", "a.example", "b.example"):
        await cache.keep(policy(name))
    first = await cache.policies(limit=2)
    assert [one.domain for one in first] == ["a.example", "b.example"]
    assert [one.domain for one in await cache.policies(after="b.example")] == ["c.example"]


async def test_policies_due_for_a_refresh_are_found_in_order(cache: SqlitePolicyCache) -> None:
    hour = timedelta(hours=1)
    for name, due in (("later", 3 * hour), ("now", hour), ("first", 0 * hour)):
        await cache.keep(policy(f"{name}.example", due=due))
    due_now = await cache.refresh_due(now=NOW + hour, limit=10)
    assert [one.domain for one in due_now] == ["first.example", "now.example"]
    assert len(await cache.refresh_due(now=NOW + hour, limit=1)) == 1


async def test_policy_kept_by_one_worker_is_there_for_the_others(tmp_path: Path) -> None:
    one, other = await asyncio.gather(*(SqlitePolicyCache.open(tmp_path) for _ in range(2)))
    await one.keep(policy())
    assert await other.policy("example.net") == policy()
    await other.forget("example.net")
    assert await one.policy("example.net") is None
    await asyncio.gather(one.close(), other.close())


async def test_workers_that_start_at_the_same_moment_make_the_tables_once(tmp_path: Path) -> None:
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        workers = await asyncio.gather(*(SqlitePolicyCache.open(directory) for _ in range(4)))
        await asyncio.gather(*(worker.close() for worker in workers))


async def test_workers_that_write_at_the_same_moment_wait_for_each_other(tmp_path: Path) -> None:
    workers = [await SqlitePolicyCache.open(tmp_path) for _ in range(4)]
    await asyncio.gather(
        *(
            worker.keep(policy(f"{number}-{each}.example"))
            for number, worker in enumerate(workers)
            for each in range(25)
        )
    )
    assert len(await workers[0].policies()) == 100
    await asyncio.gather(*(worker.close() for worker in workers))


async def test_a_commit_is_synced_and_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    cache = await SqlitePolicyCache.open(tmp_path)
    settings = await cache._on_thread(
        lambda db: [
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")
        ]
    )
    assert settings == [3, "delete"]
    assert (tmp_path / POLICIES).stat().st_mode & 0o777 == 0o600
    await cache.close()


async def test_reading_the_policies_changes_nothing(tmp_path: Path) -> None:
    looking = PoliciesToRead(tmp_path / POLICIES)
    await looking.keep(policy())
    assert await looking.policy("example.net") is None
    assert not list(tmp_path.iterdir())

    cache = await SqlitePolicyCache.open(tmp_path)
    await cache.keep(policy())
    before = (tmp_path / POLICIES).read_bytes()
    assert await looking.policy("example.net") == policy()
    await looking.keep(policy(id="2"))
    assert not await looking.forget("example.net")
    assert await looking.policies() == [policy()]
    assert (tmp_path / POLICIES).read_bytes() == before
    await cache.close()
    await looking.close()


@pytest.mark.parametrize("content", [b"not a database" * 100, None])
async def test_a_file_that_holds_no_policies_is_not_taken(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / POLICIES
    if content is not None:
        path.write_bytes(content)
    else:
        db = sqlite3.connect(path)
        db.execute("PRAGMA application_id = 1")
        db.close()
    before = path.read_bytes()
    with pytest.raises(SpoolError, match=POLICIES):
        await SqlitePolicyCache.open(tmp_path)
    assert path.read_bytes() == before


async def test_a_full_disk_is_an_error_of_the_store(cache: SqlitePolicyCache) -> None:
    await cache.keep(policy())
    pages = await cache._on_thread(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    await cache._on_thread(lambda db: db.execute(f"PRAGMA max_page_count = {pages}"))

    async def keep_many() -> None:  # there may be some free pages
        for number in range(20):
            await cache.keep(replace(policy(f"large{number}.example"), body=b"x" * 60_000))

    with pytest.raises(SpoolError, match="full"):
        await keep_many()
    assert await cache.policy("example.net") == policy()


WRITER = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from relay.queue.policies import StoredPolicy
from relay.queue.sqlite.policies import SqlitePolicyCache

async def main():
    cache = await SqlitePolicyCache.open(Path(sys.argv[1]))
    number = int(sys.argv[2])
    at = datetime(2030, 1, 31, 12, tzinfo=UTC)
    while True:
        number += 1
        await cache.keep(StoredPolicy("example.net", str(number), b"%d " % number * 2000, at, at))
        print(number, flush=True)

asyncio.run(main())
"""


def test_a_kill_while_a_policy_is_written_leaves_the_old_or_the_new_one_whole(
    tmp_path: Path,
) -> None:
    draw, kept = random.Random(7), 0
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(kept)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert writer.stdout is not None
        said = int(writer.stdout.readline())
        time.sleep(draw.uniform(0, 0.03))
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().splitlines()
        writer.wait()
        writer.stdout.close()
        said = int(rest[-1]) if rest else said

        found = asyncio.run(_found(tmp_path))
        kept = int(found.id)
        assert kept in (said, said + 1)  # what was said to be kept is, and at most one more
        assert found.body == f"{kept} ".encode() * 2000


async def _found(directory: Path) -> StoredPolicy:
    cache = await SqlitePolicyCache.open(directory)
    try:
        found = await cache.policy("example.net")
        assert found is not None
        return found
    finally:
        await cache.close()
