"""Messages go from one queue in a directory to another, all of them, once, as they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from relay.admin.webhook_calls import calls_about
from relay.queue import move, move_directory
from relay.queue.api_state import PendingCall
from relay.queue.engine import WORKER_SPOOL
from relay.queue.entry import State
from relay.queue.move import MoveResult, MovingQueue, export_queue, import_queue
from relay.queue.sqlite.move import SqliteMove
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import QueueFilter, SpoolError
from tests.fakes.moved import EVERY_KIND, LARGE, fill, seen
from tests.fakes.queued import NOW, claim_all, content_of, event, new_message, opened, queue_ids

LATER = NOW + timedelta(hours=1)
LONG = os.environ.get("RELAY_LONG") == "1"


def nothing_about(*_: object) -> list[PendingCall]:
    return []


async def exported(spool: Path, directory: Path) -> MoveResult:
    queue = await SqliteMove.open(spool, workers=WORKER_SPOOL, make=False)
    try:
        return await export_queue(
            queue,
            directory,
            about=lambda webhooks, events: calls_about(webhooks, events, now=NOW),
            progress=lambda count: None,
        )
    finally:
        await queue.close()


async def imported(spool: Path, directory: Path) -> MoveResult:
    queue = await SqliteMove.open(spool, workers=WORKER_SPOOL, make=True)
    try:
        return await import_queue(queue, directory, progress=lambda count: None)
    finally:
        await queue.close()


async def filled(spool: Path) -> None:
    async with opened(spool) as store:
        await fill(store)


async def test_message_of_every_kind_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    async with opened(tmp_path / "a") as store:
        before = await seen(store)
    assert set(before) == set(EVERY_KIND)
    here, there = tmp_path / "a", tmp_path / "b"
    for _ in range(2):
        result = await exported(here, tmp_path / "files")
        assert (result.moved, result.left, result.reasons) == (len(EVERY_KIND), 0, [])
        assert len(list((tmp_path / "files").glob("*.message"))) == len(EVERY_KIND)
        async with opened(here) as store:
            assert await queue_ids(store) == []
            assert not list((here / "content").iterdir())
        result = await imported(there, tmp_path / "files")
        assert (result.moved, result.left, result.reasons) == (len(EVERY_KIND), 0, [])
        assert list((tmp_path / "files").iterdir()) == []
        here, there = there, here
    async with opened(here) as store:
        assert await seen(store) == before
        claimed = {entry.message.queue_id for entry in await claim_all(store)}
        assert claimed == {"ready", "large", "partly"} - {"partly"}


async def test_pending_report_is_sent_where_it_came_to(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    await imported(tmp_path / "b", tmp_path / "files")
    async with opened(tmp_path / "b") as store:
        assert await store.pending_reports(now=LATER, pending_since=LATER) == ["pending"]
        pending = await store.pending_report("pending")
        assert pending is not None
        await store.report(pending, [])
        assert await store.pending_reports(now=LATER, pending_since=LATER) == []


async def test_calls_that_webhooks_wait_for_go_along(tmp_path: Path) -> None:
    async with opened(tmp_path / "a") as store:
        await store.api_state.set_webhook("example.com", "accepted", ["http://127.0.0.1:9/"])
        owed = PendingCall("http://127.0.0.1:9/", '{"event":"accepted"}', LATER, attempts=2)
        await store.api_state.add_calls([owed], seen=0)
        # Nobody has looked at this event yet.
        await store.accept(new_message(queue_id="q1", events=(event("accepted", "q1"),)))
    await exported(tmp_path / "a", tmp_path / "files")
    async with opened(tmp_path / "a") as store:
        assert await store.api_state.next_call_due() is None
        assert await store.api_state.calls_seen() == 1
    await imported(tmp_path / "b", tmp_path / "files")
    async with opened(tmp_path / "b") as store:
        calls = await store.api_state.calls_due(now=LATER, limit=9)
        assert [(one.url, one.attempts) for one in calls] == [
            ("http://127.0.0.1:9/", 0),
            ("http://127.0.0.1:9/", 2),
        ]
    assert list((tmp_path / "files").iterdir()) == []


async def test_messages_of_further_workers_are_exported_too(tmp_path: Path) -> None:
    for name in ("a", "a/worker-1", "a/worker-2"):
        async with opened(tmp_path / name) as store:
            await store.accept(new_message(queue_id=f"of-{name.replace('/', '-')}"))
    assert (await exported(tmp_path / "a", tmp_path / "files")).moved == 3


class Crash(BaseException):
    """The process is killed."""


class Dying:
    """A queue, or a step of the move, that dies at the N-th call of all."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Crash

    def before(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **named: object) -> object:
            self.step()
            return function(*args, **named)

        return call


STEPS = (
    (move, "give_name"),
    (move, "sync_directory"),
    (move_directory, "sync_directory"),
    (move_directory, "_other_name"),
)


@pytest.mark.parametrize("at", range(1, 33) if LONG else (1, 2, 4, 7, 9, 10, 13, 20, 32))
async def test_export_killed_at_any_step_and_run_again_loses_and_doubles_nothing(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(move, "_BATCH", 3)
    await filled(tmp_path / "a")
    dying = Dying(at)
    with monkeypatch.context() as patched:
        for module, name in STEPS:
            patched.setattr(module, name, dying.before(getattr(module, name)))
        for name in ("take", "remove"):
            patched.setattr(SqliteMove, name, dying.before(getattr(SqliteMove, name)))
        with pytest.raises(Crash):
            await exported(tmp_path / "a", tmp_path / "files")
    async with opened(tmp_path / "a") as store:
        # A relay that is started meanwhile delivers nothing that is on its way.
        claimed = {entry.message.queue_id for entry in await claim_all(store)}
        files = {path.stem for path in (tmp_path / "files").glob("*.message")}
        assert not claimed & files
        assert set(await queue_ids(store)) | files == set(EVERY_KIND)
        assert not set(await store.pending_reports(now=LATER, pending_since=LATER)) & files
    result = await exported(tmp_path / "a", tmp_path / "files")
    assert result.left == 0
    assert {path.stem for path in (tmp_path / "files").glob("*.message")} == set(EVERY_KIND)
    assert (await imported(tmp_path / "b", tmp_path / "files")).moved == len(EVERY_KIND)


@pytest.mark.parametrize("at", range(1, 12) if LONG else (1, 2, 4, 6, 11))
async def test_import_killed_at_any_step_and_run_again_loses_and_doubles_nothing(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(move, "_BATCH", 3)
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    dying = Dying(at)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", dying.before(Path.unlink))
        patched.setattr(SqliteMove, "add", dying.before(SqliteMove.add))
        with pytest.raises(Crash):
            await imported(tmp_path / "b", tmp_path / "files")
    # What has come is delivered before the file is gone, and does not come again.
    async with opened(tmp_path / "b") as store:
        there = set(await queue_ids(store))
        await store.change(QueueFilter(), verb="remove", now=NOW)
    result = await imported(tmp_path / "b", tmp_path / "files")
    assert result.left == 0
    async with opened(tmp_path / "b") as store:
        again = set(await queue_ids(store)) - {"pending"}
        assert not there & again
        assert there | again >= set(EVERY_KIND) - {"pending"}


async def half_exported(spool: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that ends before the first message leaves the queue."""
    with monkeypatch.context() as patched:
        patched.setattr(SqliteMove, "remove", Dying(1).before(SqliteMove.remove))
        with pytest.raises(Crash):
            await exported(spool, files)


async def test_half_moved_message_is_taken_back_by_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path / "a")
    async with opened(tmp_path / "a") as store:
        before = await seen(store)
    await half_exported(tmp_path / "a", tmp_path / "files", monkeypatch)
    result = await imported(tmp_path / "a", tmp_path / "files")
    assert (result.moved, result.left) == (len(EVERY_KIND), 0)
    async with opened(tmp_path / "a") as store:
        assert await seen(store) == before
        assert (await store.leaving()) == (0, None)


async def test_operator_cannot_release_what_is_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path / "a")
    await half_exported(tmp_path / "a", tmp_path / "files", monkeypatch)
    async with opened(tmp_path / "a") as store:
        for verb in ("release", "retry", "remove"):
            assert (await store.change(QueueFilter(), verb=verb, now=NOW)).changed == 0


async def test_export_to_another_directory_names_the_one_that_messages_are_on_their_way_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path / "a")
    await half_exported(tmp_path / "a", tmp_path / "files", monkeypatch)
    result = await exported(tmp_path / "a", tmp_path / "others")
    assert (result.moved, result.left) == (0, len(EVERY_KIND))
    assert str(tmp_path / "files") in result.reasons[0]
    # The directory is known by what is in it, wherever it is now.
    (tmp_path / "files").rename(tmp_path / "renamed")
    assert (await exported(tmp_path / "a", tmp_path / "renamed")).moved == len(EVERY_KIND)


async def test_file_of_a_message_that_came_and_left_is_not_taken_in_again(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    copies = {path.name: path.read_bytes() for path in (tmp_path / "files").glob("*.message")}
    await imported(tmp_path / "b", tmp_path / "files")
    await exported(tmp_path / "b", tmp_path / "others")
    for name, octets in copies.items():
        (tmp_path / "files" / name).write_bytes(octets)
    assert (await imported(tmp_path / "b", tmp_path / "files")).left == 0
    async with opened(tmp_path / "b") as store:
        assert await queue_ids(store) == []
    # It comes back in the files of its own last move.
    await imported(tmp_path / "b", tmp_path / "others")
    async with opened(tmp_path / "b") as store:
        assert len(await queue_ids(store)) == len(EVERY_KIND)


@pytest.mark.parametrize("content", [b"Subject: other\r\n\r\nother\r\n", LARGE])
async def test_other_message_of_the_same_id_is_kept_and_so_is_the_file(
    tmp_path: Path, content: bytes
) -> None:
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    async with opened(tmp_path / "b") as store:
        await store.accept(new_message(queue_id="ready", content=content))
    result = await imported(tmp_path / "b", tmp_path / "files")
    assert (result.moved, result.left) == (len(EVERY_KIND) - 1, 1)
    assert "another message of the queue is called ready" in result.reasons[0]
    assert (tmp_path / "files" / "ready.message").exists()
    async with opened(tmp_path / "b") as store:
        assert await content_of(store, "ready") == content
    # An export into the same directory does not write over it.
    result = await exported(tmp_path / "b", tmp_path / "files")
    assert (result.moved, result.left) == (len(EVERY_KIND) - 1, 1)
    assert "is there already, and is of another message" in result.reasons[0]


def cut(octets: bytes) -> bytes:
    return octets[: len(octets) // 2]


def turned(octets: bytes) -> bytes:
    return octets.replace(b"body", b"bodi")


def appended(octets: bytes) -> bytes:
    return octets + b"x"


def emptied(octets: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, turned, appended, emptied])
async def test_damaged_file_is_named_and_left_and_the_others_come(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    path = tmp_path / "files" / "ready.message"
    path.write_bytes(damage(path.read_bytes()))
    result = await imported(tmp_path / "b", tmp_path / "files")
    assert (result.moved, result.left) == (len(EVERY_KIND) - 1, 1)
    assert str(path) in result.reasons[0]
    assert path.exists()


async def test_message_with_damaged_rows_stays_and_is_named(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    async with opened(tmp_path / "a") as store:
        await _edit(store, "UPDATE recipient SET data = '[' WHERE queue_id = 'ready'")
    (tmp_path / "a" / "content" / "large").unlink()
    result = await exported(tmp_path / "a", tmp_path / "files")
    assert (result.moved, result.left) == (len(EVERY_KIND) - 2, 2)
    assert [reason.partition(":")[0] for reason in result.reasons] == ["large", "ready"]


async def _edit(store: SqliteStore, statement: str) -> None:
    from relay.queue.request import Request

    request = Request(function=lambda db: db.execute(statement) and None)
    store.writer.submit(request)
    await request.future


async def test_queue_in_use_is_not_moved_and_its_user_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path / "a"):
        for attempt in (exported, imported):
            (tmp_path / "files").mkdir(exist_ok=True)
            with pytest.raises(SpoolError, match=r"process \d+ uses this queue"):
                await attempt(tmp_path / "a", tmp_path / "files")


async def test_second_move_of_a_directory_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    await filled(tmp_path / "b")
    with move_directory.held_to_write(tmp_path / "files"):
        with pytest.raises(SpoolError, match="another process moves messages there"):
            await exported(tmp_path / "a", tmp_path / "files")
        with pytest.raises(SpoolError, match="another process moves messages there"):
            await imported(tmp_path / "b", tmp_path / "files")


async def test_directory_that_gets_full_takes_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path / "a")
    queue = await SqliteMove.open(tmp_path / "a", workers=WORKER_SPOOL, make=False)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fdatasync", full)
        with pytest.raises(OSError, match="No space left"):
            await _export_only(queue, tmp_path / "files")
    await queue.close()
    assert not list((tmp_path / "files").glob("*.tmp"))
    async with opened(tmp_path / "a") as store:
        assert (await store.leaving()) == (0, None)
        assert {one.message.queue_id for one in await claim_all(store)} >= {"ready", "large"}


async def _export_only(queue: MovingQueue, directory: Path) -> None:
    await export_queue(queue, directory, about=nothing_about, progress=lambda count: None)


async def test_held_message_stays_held(tmp_path: Path) -> None:
    await filled(tmp_path / "a")
    await exported(tmp_path / "a", tmp_path / "files")
    await imported(tmp_path / "b", tmp_path / "files")
    async with opened(tmp_path / "b") as store:
        assert (await store.counts())[State.HELD] == 1
        await store.change(QueueFilter(state=State.HELD), verb="release", now=NOW)
        assert "held" in {one.message.queue_id for one in await claim_all(store)}
