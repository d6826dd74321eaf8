"""How the SQLite store stands on its disk: who may open it, what it refuses, what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.queue.entry import State
from relay.queue.handoff import HandOffLimits
from relay.queue.request import Request
from relay.queue.sqlite import commit as writing
from relay.queue.sqlite import disk as on_disk
from relay.queue.sqlite import disk_space
from relay.queue.sqlite.reader import StoppedQueue
from relay.queue.sqlite.schema import MIGRATIONS, migrate, version_of
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import CHUNK_BYTES, EventFilter, QueueFilter, QueueFull, SpoolError
from tests.fakes import queued
from tests.fakes.queued import DEFERRED, DELIVERED, NOW, content_of, event, new_message, settled
from tests.fakes.waiting import patient

FIXTURE = Path(__file__).parent / "fixtures" / "version1.sql"
NO_WAIT = timedelta(0)


def opened(directory: Path, **options: Any) -> AbstractAsyncContextManager[SqliteStore]:
    """A store that syncs what it commits."""
    return queued.opened(directory, **{"synchronous": "FULL"} | options)


async def on_the_writer(store: SqliteStore, function):
    """Run a function of the connection that writes, in a transaction of its own."""
    call = Request(function=function)
    store.writer.submit(call)
    return await call.future


async def ids(store: SqliteStore) -> list[str]:
    return [item.queue_id for item in await store.list_messages(QueueFilter(), now=NOW)]


# One relay a directory.


async def test_a_second_relay_on_the_same_queue_is_refused_and_told_who_has_it(tmp_path):
    async with opened(tmp_path / "spool") as store:
        with pytest.raises(SpoolError, match=f"process {os.getpid()} uses this queue already"):
            await SqliteStore.open(tmp_path / "spool", lock_wait=NO_WAIT)
        await store.accept(new_message())
    async with opened(tmp_path / "spool", lock_wait=NO_WAIT) as store:
        assert len(await ids(store)) == 1


async def test_the_lock_of_a_relay_that_was_killed_is_no_obstacle(tmp_path):
    script = (
        "import asyncio, os, sys; from pathlib import Path; from relay.queue.sqlite.store import"
        " SqliteStore\n"
        "async def main():\n"
        "    await SqliteStore.open(Path(sys.argv[1])); os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "spool")], check=False)
    assert done.returncode == -9
    async with opened(tmp_path / "spool", lock_wait=NO_WAIT) as store:
        await store.accept(new_message())


async def test_a_directory_that_cannot_be_made_is_said_to_be_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="Not a directory"):
        await SqliteStore.open(tmp_path / "file" / "spool")


# Durable or not at all.


async def test_every_commit_is_synced_and_the_store_has_made_sure_of_it(tmp_path):
    async with opened(tmp_path / "spool") as store:
        pragmas = await on_the_writer(
            store,
            lambda db: [
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("synchronous", "journal_mode", "wal_autocheckpoint")
            ],
        )
    assert pragmas == [2, "wal", 0]


async def test_a_library_that_does_not_take_the_setting_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "_SYNCHRONOUS_NUMBER", {"FULL": 3})
    with pytest.raises(SpoolError, match="synchronous=FULL"):
        await SqliteStore.open(tmp_path / "spool")


async def test_the_reader_cannot_write(tmp_path):
    async with opened(tmp_path / "spool") as store:
        with pytest.raises(SpoolError, match="readonly"):
            await store.ask(lambda db: db.execute("DELETE FROM message"))


# What is found at the start.


async def test_a_queue_of_version_1_is_taken_over(tmp_path):
    (tmp_path / "spool").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "spool" / "queue.db")) as db:
        db.executescript(FIXTURE.read_text())
    async with opened(tmp_path / "spool") as store:
        assert await ids(store) == ["1KHELD", "1KLARGE", "1KPARTLY", "1KQUEUED"]
        assert await store.counts() == {State.QUEUED: 2, State.DEFERRED: 1, State.HELD: 1}
        due = await store.claim_due(now=NOW, limit=10)
        assert sorted(entry.message.queue_id for entry in due) == ["1KLARGE", "1KQUEUED"]
        assert await content_of(store, "1KLARGE") == b"Subject: large\r\n\r\nxxxthe rest\r\n"
        [later] = await store.claim_due(now=NOW + timedelta(hours=1), limit=10)
        assert later.recipients[0].last is not None
        assert later.recipients[0].last.message == "mailbox busy"
        await store.record(settled(later, DELIVERED))
        assert await ids(store) == ["1KHELD", "1KLARGE", "1KQUEUED"]
        assert len(await store.find_events(EventFilter())) == 5
        assert await store.log_mark() == 3


@pytest.fixture
def db():
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as opened_db:
        yield opened_db


def test_migrations_are_made_one_after_the_other_and_once(db):
    more = [
        *MIGRATIONS,
        ["ALTER TABLE message ADD COLUMN colour TEXT"],
        ["UPDATE message SET colour = 'red'"],
    ]
    migrate(db, MIGRATIONS)
    migrate(db, more)
    migrate(db, more)
    assert version_of(db) == len(more)
    db.execute("SELECT colour FROM message")


def test_a_migration_that_fails_leaves_the_version_before_it(db):
    broken = [*MIGRATIONS, ["CREATE TABLE half (x)", "NONSENSE"]]
    with pytest.raises(sqlite3.OperationalError):
        migrate(db, broken)
    assert version_of(db) == len(MIGRATIONS)
    assert not db.in_transaction
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)


async def edit(directory: Path, *statements: str) -> None:
    with contextlib.closing(
        sqlite3.connect(directory / "spool" / "queue.db", isolation_level=None)
    ) as db:
        for statement in statements:
            db.execute(statement)


async def test_a_queue_of_a_newer_relay_is_refused_and_left_alone(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message())
    await edit(tmp_path, "PRAGMA user_version = 99")
    with pytest.raises(SpoolError, match="newer relay"):
        await SqliteStore.open(tmp_path / "spool")
    with pytest.raises(SpoolError, match="another version"):
        await StoppedQueue.open(tmp_path / "spool")
    await edit(tmp_path, f"PRAGMA user_version = {len(MIGRATIONS)}")
    async with opened(tmp_path / "spool") as store:
        assert len(await ids(store)) == 1


async def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path):
    (tmp_path / "spool").mkdir()
    await edit(tmp_path, "CREATE TABLE bookmarks (url)")
    before = (tmp_path / "spool" / "queue.db").read_bytes()
    with pytest.raises(SpoolError, match="another program"):
        await SqliteStore.open(tmp_path / "spool")
    assert (tmp_path / "spool" / "queue.db").read_bytes() == before


def spoil(path: Path, start: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(4096))


@pytest.mark.parametrize("start", [0, 100, 4096, 5 * 4096])
async def test_a_damaged_database_stops_the_relay_and_is_never_made_anew(tmp_path, start):
    async with opened(tmp_path / "spool") as store:
        for _ in range(20):
            await store.accept(new_message(content=b"x" * 3000))
    path = tmp_path / "spool" / "queue.db"
    spoil(path, start)
    before = path.read_bytes()
    with pytest.raises(SpoolError):
        await SqliteStore.open(tmp_path / "spool")
    assert path.read_bytes() == before


async def test_a_database_of_garbage_stops_the_relay(tmp_path):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "queue.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(SpoolError, match="not a database"):
        await SqliteStore.open(tmp_path / "spool")


async def test_a_log_whose_database_is_gone_stops_the_relay(tmp_path):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "queue.db-wal").write_bytes(b"mail")
    with pytest.raises(SpoolError, match="restore it"):
        await SqliteStore.open(tmp_path / "spool")
    assert not (tmp_path / "spool" / "queue.db").exists()


async def test_the_check_at_the_start_takes_no_longer_than_it_may(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await asyncio.gather(*(store.accept(new_message(content=b"x" * 2000)) for _ in range(3000)))
    db = on_disk.open_reader(tmp_path / "spool" / "queue.db")
    on_disk.check_quickly(db, largest_bytes=1 << 30, within=timedelta(0))
    on_disk.check_quickly(db, largest_bytes=1, within=timedelta(seconds=9))
    assert db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
    db.close()


# A full disk.


async def fill(store: SqliteStore) -> None:
    """Let the database grow no further."""
    await on_the_writer(store, lambda db: db.execute("PRAGMA max_page_count = 1").fetchone())


async def fill_up_and_stay_full(store: SqliteStore, monkeypatch) -> None:
    """The same, for every connection to come."""
    opening = on_disk.open_writer

    def open_full(*args, **options):
        db = opening(*args, **options)
        db.execute("PRAGMA max_page_count = 1")
        return db

    monkeypatch.setattr(writing, "open_writer", open_full)
    await fill(store)


async def test_on_a_full_disk_new_mail_is_refused_and_mail_still_leaves(tmp_path, monkeypatch):
    async with opened(tmp_path / "spool", limits=HandOffLimits()) as store:
        for _ in range(20):
            await store.accept(new_message(content=b"x" * 20_000))
        entries = await store.claim_due(now=NOW, limit=100)
        with monkeypatch.context() as full:
            await fill_up_and_stay_full(store, full)
            for entry in entries[:10]:
                with pytest.raises(QueueFull):
                    await store.accept(new_message(content=b"x" * 250_000))
                await store.record(settled(entry, DELIVERED))
            await store.record(settled(entries[10], DEFERRED))
            assert len(await ids(store)) == 10
            assert len(await store.claim_due(now=NOW + timedelta(hours=1), limit=100)) == 1
        # Without a restart.
        monkeypatch.setattr(disk_space, "_FULL_PAUSE_SECONDS", 0)
        await on_the_writer(
            store, lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone()
        )
        async with asyncio.timeout(patient(5)):
            while True:
                with contextlib.suppress(QueueFull):
                    await store.accept(new_message(content=b"x" * 250_000))
                    break
                await asyncio.sleep(0.05)
        assert len(await ids(store)) == 11


async def test_a_report_that_needs_room_is_our_own_mail_and_goes_with_what_leaves(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(content=b"x" * 50_000))
        [entry] = await store.claim_due(now=NOW, limit=1)
        await fill(store)
        dsn = new_message("a@example.com", sender="", content=b"small report")
        await store.record(settled(entry, DELIVERED), reports=[dsn])
        assert await ids(store) == [dsn.message.queue_id]


async def test_no_new_mail_is_taken_below_the_reserve_and_nothing_else_is_refused(
    tmp_path, monkeypatch
):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(content=b"x" * 250_000))
        monkeypatch.setattr(store.spool, "free_bytes", lambda: store.spool.reserve_bytes - 1)
        store.writer.disk_space.ample_until = 0.0
        with pytest.raises(QueueFull):
            await store.accept(new_message())
        with pytest.raises(QueueFull):
            await store.stage("q", 0, b"x")
        [entry] = await store.claim_due(now=NOW, limit=1)
        await store.record(settled(entry, DELIVERED), events=[event("delivered", "q")])
        # The file does not shrink, and now has room inside it.
        await store.accept(new_message())


async def test_the_ballast_is_given_up_when_it_is_needed_and_laid_down_again(tmp_path, monkeypatch):
    async with opened(tmp_path / "spool") as store:
        ballast = tmp_path / "spool" / "ballast"
        spool = store.spool
        full_size = ballast.stat().st_size
        assert full_size == spool.ballast_bytes
        assert ballast.stat().st_blocks * 512 >= full_size, "a hole holds no room"
        await fill(store)
        with pytest.raises(QueueFull):
            await store.accept(new_message(content=b"x" * 250_000))
        assert ballast.stat().st_size == 0
        with monkeypatch.context() as full:
            full.setattr(spool, "free_bytes", lambda: full_size)
            spool.lay_ballast()
            assert ballast.stat().st_size == 0
        spool.lay_ballast()
        assert ballast.stat().st_size == full_size


async def test_one_failing_disk_is_one_line_in_the_log_and_its_recovery_another(tmp_path, caplog):
    async with opened(tmp_path / "spool") as store:
        for _ in range(3):
            await fill(store)
            store.writer.disk_space.full_until = 0.0
            with pytest.raises(QueueFull):
                await store.accept(new_message(content=b"x" * 250_000))
        store.writer.disk_space.full_until = 0.0
        await store.accept(new_message())
    failed = [record for record in caplog.records if "failed" in record.message]
    assert 1 <= len(failed) <= 3
    assert "works again" in caplog.text


# Others at the database.


async def test_a_database_locked_by_another_program_is_a_delay_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "_BUSY_WAIT_MS", 50)
    async with opened(tmp_path / "spool") as store:
        other = sqlite3.connect(tmp_path / "spool" / "queue.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SpoolError, match="locked") as refused:
            await store.accept(new_message())
        assert not isinstance(refused.value, QueueFull)
        other.execute("ROLLBACK")
        other.close()
        await store.accept(new_message())
        assert len(await store.claim_due(now=NOW, limit=10)) == 1


async def test_the_event_loop_is_free_while_the_disk_is_slow(tmp_path):
    has_written = threading.Event()
    async with opened(tmp_path / "spool") as store:
        slow = asyncio.create_task(on_the_writer(store, lambda db: has_written.wait(patient(10))))
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert not slow.done()
        has_written.set()
        await slow


async def test_a_mistake_of_our_own_fails_its_request_and_not_the_store(tmp_path):
    async with opened(tmp_path / "spool") as store:
        with pytest.raises(SpoolError):
            await on_the_writer(store, lambda db: 1 // 0)
        with pytest.raises(SpoolError):
            await on_the_writer(store, lambda db: db.execute("INSERT INTO message VALUES (1)"))
        await store.accept(new_message())


# The write-ahead log.


async def test_the_write_ahead_log_stays_small_under_a_stream_and_goes_when_idle(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(writing, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(on_disk, "_LARGEST_BALLAST", 2 << 20)
    async with opened(tmp_path / "spool", synchronous="OFF") as store:
        largest = 0
        for _ in range(150):
            await asyncio.gather(
                *(store.accept(new_message(content=b"x" * 20_000)) for _ in range(10))
            )
            for entry in await store.claim_due(now=NOW, limit=100):
                await store.record(settled(entry, DELIVERED))
            largest = max(largest, store.spool.wal_bytes())
        assert largest < 8 << 20
        async with asyncio.timeout(patient(5)):
            while store.spool.wal_bytes():
                await asyncio.sleep(0.05)


async def test_the_write_ahead_log_stays_small_under_a_long_removal(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "_LARGEST_BALLAST", 2 << 20)
    async with opened(tmp_path / "spool", synchronous="OFF") as store:
        for _ in range(8):
            many = (new_message(content=b"x" * 3000) for _ in range(500))
            await asyncio.gather(*map(store.accept, many))
        async with asyncio.timeout(patient(10)):
            while store.spool.wal_bytes():
                await asyncio.sleep(0.05)
        largest = removed = 0
        after: str | None = ""
        while after is not None:
            step = await store.change(QueueFilter(), verb="remove", now=NOW, after=after)
            largest = max(largest, store.spool.wal_bytes())
            removed, after = removed + step.changed, step.until
        assert removed == 4000
        assert largest < 10 << 20


async def test_content_is_read_in_pieces_and_holds_nothing_back(tmp_path):
    """A message half read does not keep the log from being folded back."""
    async with opened(tmp_path / "spool", synchronous="OFF") as store:
        new = new_message(content=b"x" * (4 * CHUNK_BYTES))
        await store.accept(new)
        pieces = store.read_content(new.message.queue_id)
        await anext(pieces)
        await store.accept(new_message())
        busy = await on_the_writer(store, lambda db: None)
        assert busy is None
        await asyncio.sleep(0)
        folded = asyncio.get_running_loop().create_future()

        def checkpoint(db):
            db.execute("COMMIT")
            found = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            db.execute("BEGIN IMMEDIATE")
            db.execute("SAVEPOINT one")
            return found

        store.writer.submit(Request(function=checkpoint, future=folded))
        _, frames, done = await folded
        assert frames == done
        assert [len(piece) async for piece in pieces] == [CHUNK_BYTES] * 3


async def test_a_commit_that_fails_takes_no_number_of_the_events(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(events=(event("accepted", "first"),)))
        await fill(store)
        large = replace(event("accepted", "refused"), line="x" * 250_000)
        with pytest.raises(QueueFull):
            await store.accept(new_message(events=(large,)))
        store.writer.disk_space.full_until = 0.0
        await store.accept(new_message(events=(event("accepted", "second"),)))
        stored = await store.events_after(0)
        assert [(one.seq, one.event.queue_id) for one in stored] == [(1, "first"), (2, "second")]
        assert stored == await store.find_events(EventFilter())
