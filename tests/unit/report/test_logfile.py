"""The delivery log's file: nothing missing, every line whole, and mail never waits for it."""

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.mail.event import Event
from relay.report.deliverylog import DeliveryLog
from relay.report.deliverylog.file import OUTPUTS
from tests.fakes.waiting import patient, until

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
FAST = timedelta(milliseconds=50)


@dataclass(frozen=True)
class Stored:
    seq: int
    event: Event


class Journal:
    """A store's events, as data."""

    def __init__(self):
        self.events = []
        self.mark = 0
        self.broken = False

    def commit(self, count=1, *, filler=""):
        new = []
        for _ in range(count):
            seq = len(self.events) + 1
            line = json.dumps(
                {"event": "accepted", "id": f"{seq}", "filler": filler}, separators=(",", ":")
            )
            stored = Stored(seq, Event(f"{seq}", NOON, "accepted", "Q", "a", "b", line))
            self.events.append(stored)
            new.append(stored)
        return new

    async def events_after(self, seq, *, limit=1000):
        if self.broken:
            raise RuntimeError("the store is away")
        return self.events[seq : seq + limit]

    async def log_written(self, seq):
        self.mark = seq

    async def log_mark(self):
        return self.mark


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log" / "delivery.log"


@contextlib.asynccontextmanager
async def following(path, journal, *, grace=20):
    log = DeliveryLog(path, journal, look_every=timedelta(milliseconds=5), sync_every=FAST)
    task = asyncio.create_task(log.run())
    try:
        yield log
    finally:
        await log.close(grace=timedelta(seconds=grace))
        await asyncio.wait_for(task, patient(20))


def ids(path):
    """The ids in the file; every line has to be whole, but for one that is just being written."""
    lines = path.read_text("ascii").split("\n")[:-1] if path.exists() else []
    return [int(json.loads(line)["id"]) for line in lines]


async def test_committed_event_is_appended_and_then_marked_as_written(path, journal):
    async with following(path, journal):
        journal.commit(3)
        await until(lambda: ids(path) == [1, 2, 3])
        await until(lambda: journal.mark == 3)
    assert path.stat().st_mode & 0o777 == 0o640


async def test_waiting_events_are_written_without_a_pause_between_batches(path, journal):
    journal.commit(10_000)
    log = DeliveryLog(path, journal, look_every=timedelta(hours=1))
    task = asyncio.create_task(log.run())
    await until(lambda: len(ids(path)) == 10_000)
    await log.close()
    await task
    assert ids(path) == list(range(1, 10_001))


async def test_log_goes_on_from_the_mark_after_a_crash_and_no_line_is_missing(path, journal):
    journal.commit(10)
    journal.mark = 4  # 5 and 6 were appended, and never synced
    path.parent.mkdir()
    path.write_text("".join(f"{stored.event.line}\n" for stored in journal.events[:6]))
    async with following(path, journal):
        await until(lambda: 10 in ids(path))
    assert ids(path) == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10]


async def test_a_line_torn_by_a_crash_is_written_again_whole(path, journal):
    journal.commit(2)
    journal.mark = 1
    path.parent.mkdir()
    path.write_text(f"{journal.events[0].event.line}\n{journal.events[1].event.line[:-9]}")
    async with following(path, journal):
        await until(lambda: path.read_text().count("\n") == 2)
    assert ids(path) == [1, 2]


@pytest.mark.parametrize("foreign", ["a note by hand", '{"other": "json"}'])
async def test_last_line_of_another_program_is_not_removed(path, journal, foreign):
    path.parent.mkdir()
    path.write_text(foreign)
    async with following(path, journal):
        journal.commit()
        await until(lambda: path.read_text().count("\n") == 2)
    assert path.read_text() == f"{foreign}\n{journal.events[0].event.line}\n"


async def test_a_renamed_file_is_left_and_a_new_one_begun(path, journal):
    old = path.with_suffix(".1")
    async with following(path, journal):
        journal.commit(3)
        await until(lambda: ids(path) == [1, 2, 3])
        path.rename(old)
        journal.commit(2)
        await until(lambda: ids(path) == [4, 5])
    assert ids(old) == [1, 2, 3]


async def test_sighup_begins_a_new_file_although_no_line_is_to_be_written(path, journal):
    async with following(path, journal) as log:
        journal.commit()
        await until(path.exists)
        path.rename(path.with_suffix(".1"))
        log.reopen()
        await until(path.exists)


async def test_a_removed_file_comes_back(path, journal):
    async with following(path, journal):
        journal.commit()
        await until(lambda: ids(path) == [1])
        path.unlink()
        journal.commit()
        await until(lambda: ids(path) == [2])


async def test_file_that_another_program_truncates_has_no_hole(path, journal):
    async with following(path, journal):
        journal.commit(100)
        await until(lambda: len(ids(path)) == 100)
        os.truncate(path, 0)
        journal.commit(2)
        await until(lambda: ids(path) == [101, 102])


async def test_lines_that_a_full_disk_delayed_are_written_when_there_is_room(
    path, journal, monkeypatch, caplog
):
    """Half of each write fits at first: the half is taken back."""
    really = os.write
    full = True

    def write(fd, data):
        if full and len(data) > 100:
            really(fd, bytes(data[:77]))
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(fd, data)

    monkeypatch.setattr(os, "write", write)
    caplog.set_level(logging.INFO)
    async with following(path, journal) as log:
        journal.commit(5)
        await until(lambda: log.is_in_trouble)
        assert path.read_bytes() == b""
        assert journal.mark == 0
        journal.commit(5)
        full = False
        log.reopen()
        await until(lambda: len(ids(path)) == 10)
        await until(lambda: journal.mark == 10)
        assert not log.is_in_trouble
    assert ids(path) == list(range(1, 11))
    assert [record.levelname for record in caplog.records if "delivery log" in record.message] == [
        "WARNING",
        "INFO",
    ]


async def test_trouble_is_reported_once_for_all_tries(path, journal, caplog):
    path.mkdir(parents=True)  # where the file should be
    async with following(path, journal) as log:
        for _ in range(5):
            journal.commit()
            log.reopen()
            await asyncio.sleep(0.02)
        path.rmdir()
        log.reopen()
        await until(lambda: ids(path) == [1, 2, 3, 4, 5])
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_a_store_that_is_away_for_a_while_loses_no_line(path, journal):
    journal.broken = True
    async with following(path, journal) as log:
        journal.commit(3)
        await until(lambda: log.is_in_trouble)
        journal.broken = False
        log.reopen()
        await until(lambda: ids(path) == [1, 2, 3])


async def test_lines_since_the_last_good_sync_are_written_again_after_a_failed_one(
    path, journal, monkeypatch
):
    really, failing = os.fdatasync, False

    def fdatasync(fd):
        nonlocal failing
        if failing:
            failing = False
            raise OSError(errno.EIO, "Input/output error")
        really(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log = DeliveryLog(
        path, journal, look_every=timedelta(milliseconds=5), sync_every=timedelta(milliseconds=400)
    )
    task = asyncio.create_task(log.run())
    journal.commit(2)
    await until(lambda: journal.mark == 2)
    journal.commit(2)
    await until(lambda: ids(path) == [1, 2, 3, 4])
    failing = True
    await until(lambda: log.is_in_trouble)
    assert journal.mark == 2
    log.reopen()
    await until(lambda: journal.mark == 4)
    assert ids(path) == [1, 2, 3, 4, 3, 4]
    await log.close()
    await task


async def test_unwritable_file_does_not_prevent_a_stop(path, journal):
    path.mkdir(parents=True)
    async with asyncio.timeout(patient(20)):
        async with following(path, journal, grace=1) as log:
            journal.commit()
            await until(lambda: log.is_in_trouble)


async def test_on_closing_all_that_is_committed_is_written_and_marked(path, journal):
    log = DeliveryLog(path, journal, sync_every=timedelta(hours=1))
    task = asyncio.create_task(log.run())
    await asyncio.sleep(0)
    journal.commit(1500)
    await log.close()
    await task
    assert len(ids(path)) == journal.mark == 1500


async def test_cancelled_log_still_writes_pending_lines_on_closing(path, journal):
    log = DeliveryLog(path, journal)
    task = asyncio.create_task(log.run())
    await asyncio.sleep(0.01)
    task.cancel()
    journal.commit(3)
    await log.close()
    assert len(ids(path)) == journal.mark == 3


async def test_two_workers_share_a_file_and_every_line_stays_whole(path):
    one, other = Journal(), Journal()
    async with following(path, one), following(path, other):
        for _ in range(30):
            one.commit(20, filler="x" * 3000)
            other.commit(20, filler="y" * 3000)
            await asyncio.sleep(0.003)
        await until(lambda: one.mark == other.mark == 600)
    assert sorted(ids(path)) == sorted([*range(1, 601), *range(1, 601)])


async def test_a_lock_held_by_another_is_waited_for_and_mail_is_not_held_up(path, journal):
    path.parent.mkdir()
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        async with following(path, journal):
            journal.commit()
            await asyncio.sleep(0.1)
            assert ids(path) == []
            fcntl.flock(other, fcntl.LOCK_UN)
            await until(lambda: ids(path) == [1])


async def test_log_is_written_to_a_device(journal):
    async with following(Path("/dev/null"), journal):
        journal.commit(3)
        await until(lambda: journal.mark == 3)


async def test_standard_output_that_cannot_be_opened_by_its_name_is_written(journal, monkeypatch):
    ours, theirs = socket.socketpair()  # the journal's, or a pipe of an engine's
    with ours, theirs:
        monkeypatch.setitem(OUTPUTS, "/dev/stdout", ours.fileno())
        async with following(Path("/dev/stdout"), journal):
            journal.commit(2)
            await until(lambda: journal.mark == 2)
        lines = theirs.recv(10_000).decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1", "2"]


async def test_full_device_leaves_no_event_marked_as_written(journal):
    async with following(Path("/dev/full"), journal, grace=1) as log:
        journal.commit(3)
        await until(lambda: log.is_in_trouble)
    assert journal.mark == 0


class Lost:
    """Events of a lost node, as data."""

    def __init__(self, journal):
        self.journal = journal
        self.written = []

    async def lost_events(self, *, limit=1000):
        done = self.written[-1][1] if self.written else 0
        return 7, [] if self.journal is None else self.journal.events[done : done + limit]

    async def lost_written(self, node, seq):
        self.written.append((node, seq))


async def test_events_of_a_lost_node_are_appended_and_marked_once_they_are_synced(path, journal):
    other = Journal()
    other.commit(2500, filler="of the lost node")
    lost = Lost(other)
    log = DeliveryLog(
        path,
        journal,
        lost=lost,
        look_every=timedelta(milliseconds=5),
        look_for_lost_every=timedelta(milliseconds=5),
    )
    task = asyncio.create_task(log.run())
    await until(lambda: lost.written == [(7, 1000), (7, 2000), (7, 2500)])
    journal.commit(1)
    await until(lambda: len(ids(path)) == 2501)
    await log.close()
    await task
    assert ids(path) == [*range(1, 2501), 1]
