"""The queue of a worker that is no more is taken over whole, once, and before anything is
delivered.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path

import pytest

from relay.queue.api_state import DomainSettings, PendingCall, Webhook
from relay.queue.entry import State
from relay.queue.sqlite import adopt
from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import EventFilter, EventPage, QueueFilter, SpoolError
from tests.fakes.queued import (
    BOUNCED,
    CONTENT,
    DEFERRED,
    NOW,
    content_of,
    event,
    new_message,
    opened,
    settled,
)

LATER = NOW + timedelta(hours=1)


def adopting(path: Path) -> AbstractAsyncContextManager[SqliteStore]:
    """The queue of a relay that adopts all it finds."""
    return opened(path, adopting=orphans(path, "worker-", present=()))


async def left_behind(path: Path, work: Callable[[SqliteStore], Awaitable[None]]) -> None:
    """A queue in which something was done, and whose owner has gone."""
    async with opened(path) as store:
        await work(store)


async def listed(store: SqliteStore) -> list[str]:
    return [item.queue_id for item in await store.list_messages(QueueFilter(), now=NOW)]


async def test_mail_of_an_adopted_queue_is_delivered(tmp_path: Path) -> None:
    large = b"Subject: x\r\n\r\n" + b"y" * 300_000

    async def work(store: SqliteStore) -> None:
        await store.accept(new_message(queue_id="S1"))
        await store.accept(new_message(queue_id="S2", content=large))
        await store.accept(new_message(queue_id="S3", state=State.HELD))

    await left_behind(tmp_path / "worker-1", work)
    await left_behind(tmp_path / "worker-2", lambda store: store.accept(new_message(queue_id="T1")))
    await left_behind(tmp_path, lambda store: store.accept(new_message(queue_id="A1")))
    async with adopting(tmp_path) as store:
        assert await listed(store) == ["A1", "S1", "S2", "S3", "T1"]
        assert (await store.counts())[State.HELD] == 1
        claimed = await store.claim_due(now=NOW, limit=10)
        assert {entry.message.queue_id for entry in claimed} == {"A1", "S1", "S2", "T1"}
        assert await content_of(store, "S1") == CONTENT
        assert await content_of(store, "S2") == large
        assert not list(tmp_path.glob("worker-*"))
        assert not list(tmp_path.glob("adopting-*"))


async def test_result_of_an_earlier_attempt_is_adopted(tmp_path: Path) -> None:
    async def work(store: SqliteStore) -> None:
        await store.accept(new_message("b@one.example", "c@two.example", queue_id="S1"))
        entries = {entry.domain: entry for entry in await store.claim_due(now=NOW, limit=10)}
        await store.record(settled(entries["one.example"], DEFERRED, wait=timedelta(minutes=30)))
        await store.record(settled(entries["two.example"], BOUNCED))

    await left_behind(tmp_path / "worker-3", work)
    async with adopting(tmp_path) as store:
        assert await store.claim_due(now=NOW, limit=10) == []
        [entry] = await store.claim_due(now=LATER, limit=10)
        [recipient] = entry.recipients
        assert (recipient.address, recipient.state, recipient.attempts) == (
            "b@one.example",
            State.DEFERRED,
            1,
        )
        assert recipient.last is not None
        assert recipient.last.code == 450


async def test_events_the_log_has_are_kept_and_those_it_has_not_come_as_new_ones(
    tmp_path: Path,
) -> None:
    async def work(store: SqliteStore, name: str = "S") -> None:
        events = tuple(event("accepted", f"{name}1", number=number) for number in range(4))
        await store.accept(new_message(queue_id=f"{name}1", events=events))
        await store.log_written(2)

    await left_behind(tmp_path / "worker-1", work)
    await left_behind(tmp_path, lambda store: work(store, "A"))
    async with adopting(tmp_path) as store:
        mark = await store.log_mark()
        unwritten = [one.event.id for one in await store.events_after(mark)]
        assert unwritten == ["A1.accepted.2", "A1.accepted.3", "S1.accepted.2", "S1.accepted.3"]
        everything = [one.event.id for one in await store.find_events(EventFilter())]
        assert everything[:4] == [
            "S1.accepted.0",
            "S1.accepted.1",
            "A1.accepted.0",
            "A1.accepted.1",
        ]
        assert sorted(everything[4:]) == unwritten
        # Page by page it is the same, and none has the number that means the beginning.
        numbers, after = [], 0
        while page := await store.find_events(EventFilter(), EventPage(after, 1)):
            after = page[-1].seq
            numbers.append(after)
        assert len(numbers) == 8
        assert 0 not in numbers
        assert await store.purge_events(before=LATER) == 4, "all that the log has"


async def test_pending_webhook_calls_and_unread_events_are_adopted(tmp_path: Path) -> None:
    call = PendingCall("http://127.0.0.1:9/", '{"event":"accepted"}', LATER, attempts=2)

    async def work(store: SqliteStore) -> None:
        await store.accept(new_message(queue_id="S1", events=(event("accepted", "S1"),)))
        await store.api_state.set_webhook("example.com", "accepted", ["http://127.0.0.1:9/"])
        for name in ("S2", "S3"):
            await store.accept(new_message(queue_id=name, events=(event("accepted", name),)))
        await store.api_state.add_calls([call], seen=2)
        await store.log_written(3)

    await left_behind(tmp_path / "worker-1", work)
    async with adopting(tmp_path) as store:
        [owed] = await store.api_state.calls_due(now=LATER, limit=9)
        assert (owed.url, owed.line, owed.due, owed.attempts) == (call.url, call.line, LATER, 2)
        assert [one.event.queue_id for one in await store.events_after(0)] == ["S3"]
        assert len(await store.find_events(EventFilter())) == 3


@pytest.mark.parametrize("seen", [0, 1])
async def test_events_that_no_webhook_waits_for_are_not_told_as_new(
    tmp_path: Path, seen: int
) -> None:
    async def work(store: SqliteStore) -> None:
        await store.accept(new_message(queue_id="S1", events=(event("accepted", "S1"),)))
        if seen:
            await store.api_state.add_calls([], seen=seen)
        else:
            await store.accept(new_message(queue_id="S0", events=(event("accepted", "S0"),)))
        await store.accept(new_message(queue_id="S2", events=(event("accepted", "S2"),)))
        await store.log_written(9)

    await left_behind(tmp_path / "worker-1", work)
    async with adopting(tmp_path) as store:
        assert await store.events_after(0) == []


async def test_webhooks_and_settings_of_the_first_worker_stay_in_force(tmp_path: Path) -> None:
    async def first(store: SqliteStore) -> None:
        await store.api_state.set_webhook("example.com", "delivered", ["http://127.0.0.1:9/new"])

    async def other(store: SqliteStore) -> None:
        await store.api_state.set_webhook("example.com", "delivered", ["http://127.0.0.1:9/old"])
        await store.api_state.set_webhook("example.com", "accepted", ["http://127.0.0.1:9/removed"])
        await store.api_state.set_domain_settings("example.com", DomainSettings(require_tls=False))

    await left_behind(tmp_path, first)
    await left_behind(tmp_path / "worker-1", other)
    async with adopting(tmp_path) as store:
        assert await store.api_state.webhooks() == [
            Webhook("example.com", "delivered", ("http://127.0.0.1:9/new",))
        ]
        assert await store.api_state.domain_settings() == {}


@pytest.mark.parametrize("crash", ["before the commit", "after the commit"])
async def test_a_crash_on_the_way_neither_loses_nor_doubles(
    tmp_path: Path, crash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"x" * 300_000
    stray = new_message(queue_id="S1", content=large)
    await left_behind(tmp_path / "worker-1", lambda store: store.accept(stray))

    class Crash(BaseException):
        pass

    def die(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        if crash == "before the commit":
            patched.setattr(adopt, "_copy_events", die)
        else:
            patched.setattr("shutil.rmtree", die)
        with pytest.raises(SpoolError):
            await adopting(tmp_path).__aenter__()
    if crash == "before the commit":
        async with opened(tmp_path) as store:
            assert await listed(store) == []
    # A new queue of that name, meanwhile, has nothing to do with the old one.
    await left_behind(tmp_path / "worker-1", lambda store: store.accept(new_message(queue_id="T1")))
    for _ in range(2):
        async with adopting(tmp_path) as store:
            assert await listed(store) == ["S1", "T1"]
            assert await content_of(store, "S1") == large


async def test_remains_of_an_adopted_queue_after_a_crash_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its large content has a second name there, and would keep its room for ever."""
    stray = new_message(queue_id="S1", content=b"x" * 300_000)
    await left_behind(tmp_path / "worker-1", lambda store: store.accept(stray))

    def begin_to_remove(path: Path) -> None:
        (path / "queue.db").unlink()
        raise OSError(errno.EIO, "the power is cut")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", begin_to_remove)
        with pytest.raises(SpoolError):
            await adopting(tmp_path).__aenter__()
    assert list(tmp_path.glob("adopting-*"))
    async with adopting(tmp_path) as store:
        assert await listed(store) == ["S1"]
        assert not list(tmp_path.glob("adopting-*"))
        assert (tmp_path / "content" / "S1").stat().st_nlink == 1


async def test_queue_in_use_is_not_adopted(tmp_path: Path) -> None:
    async with opened(tmp_path / "worker-1"):
        with pytest.raises(SpoolError, match="uses this queue already"):
            await adopting(tmp_path).__aenter__()


async def test_worker_that_still_exists_keeps_its_queue(tmp_path: Path) -> None:
    await left_behind(tmp_path / "worker-1", lambda store: store.accept(new_message(queue_id="S1")))
    await left_behind(tmp_path / "worker-2", lambda store: store.accept(new_message(queue_id="T1")))
    assert [path.name for path in orphans(tmp_path, "worker-", present={"worker-1"})] == [
        "worker-2"
    ]
    shutil.rmtree(tmp_path / "worker-2")
    assert orphans(tmp_path, "worker-", present={"worker-1"}) == []
