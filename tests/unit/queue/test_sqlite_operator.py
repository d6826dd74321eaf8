"""How the SQLite store searches: in windows, within steps, and the queue of a relay that does not
run.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.mail.event import Event
from relay.queue.change_steps import WantedStep
from relay.queue.conditions import event_conditions
from relay.queue.entry import Entry, QueuedMessage, QueuedRecipient, State
from relay.queue.handoff import HandOffLimits
from relay.queue.sqlite import events as reading
from relay.queue.sqlite import messages
from relay.queue.sqlite.reader import StoppedQueue
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    EventPage,
    ListedMessage,
    QueueFilter,
    SearchTooLong,
    SpoolError,
    more_follows,
)
from tests.fakes.queued import (
    CONTENT,
    DELIVERED,
    NOW,
    content_of,
    event,
    new_message,
    opened,
    settled,
    some_messages,
)

MINUTE = timedelta(minutes=1)
ALL = QueueFilter()


@pytest.fixture(params=["by memory", "by disk"])
async def store(request, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    limits = HandOffLimits() if request.param == "by memory" else HandOffLimits(entries=0)
    async with opened(tmp_path / "spool", limits=limits) as store:
        yield store


async def claimed(store: SqliteStore) -> list[str]:
    return sorted(entry.message.queue_id for entry in await store.claim_due(now=NOW, limit=1000))


async def states(store: SqliteStore) -> list[State]:
    listed = await store.list_messages(ALL, now=NOW)
    return [one.state for item in listed for one in item.recipients]


# The verbs.


async def test_operator_can_change_mail_that_waits_in_memory(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for _ in range(30):
            await store.accept(new_message("x@dead.example"))
        assert (
            await store.change(QueueFilter(domain="dead.example"), verb="hold", now=NOW)
        ).changed == 30
        assert await claimed(store) == []


async def test_a_verb_goes_through_a_long_queue_in_stretches(store, monkeypatch):
    monkeypatch.setattr("relay.queue.change_steps._STEP", 7)
    monkeypatch.setattr("relay.queue.sqlite.messages._WINDOW", 11)
    for _ in range(50):
        await store.accept(new_message("a@one.example", "b@two.example"))
    assert sum(await stretches(store, QueueFilter(domain="two.example"), "hold")) == 50
    assert await store.counts() == {State.QUEUED: 50, State.DEFERRED: 0, State.HELD: 50}
    assert await stretches(store, ALL, "remove") == [14] * 7 + [2]
    assert await states(store) == []


async def test_verb_finds_its_next_stretch_while_one_is_written(store, monkeypatch):
    monkeypatch.setattr("relay.queue.change_steps._STEP", 10)
    for _ in range(25):
        await store.accept(new_message())
    searches: list[str] = []
    find = store.find_change

    async def noted(step: WantedStep, limit: int) -> Any:
        searches.append(step.after)
        return await find(step, limit)

    monkeypatch.setattr(store, "find_change", noted)
    first = await store.change(ALL, verb="hold", now=NOW)
    assert searches == ["", first.until]
    second = await store.change(ALL, verb="hold", now=NOW, after=first.until)
    third = await store.change(ALL, verb="hold", now=NOW, after=second.until)
    assert [one.changed for one in (first, second, third)] == [10, 10, 5]
    assert searches == ["", first.until, second.until]


async def test_recipient_delivered_after_its_stretch_was_found_is_not_removed(store, monkeypatch):
    monkeypatch.setattr("relay.queue.change_steps._STEP", 10)
    for number in range(20):
        await store.accept(new_message(queue_id=f"q{number:02}"))
    first = await store.change(ALL, verb="remove", now=NOW, event_of=_told)
    [entry] = [one for one in await store.claim_due(now=NOW, limit=100) if _id(one) == "q15"]
    await store.record(settled(entry, DELIVERED))
    second = await store.change(ALL, verb="remove", now=NOW, after=first.until, event_of=_told)
    assert (first.changed, second.changed) == (10, 0)  # the others are being tried
    assert len(await store.find_events(EventFilter())) == 10


async def test_stretch_that_nobody_asks_for_does_not_keep_the_queue_open(tmp_path, monkeypatch):
    monkeypatch.setattr("relay.queue.change_steps._STEP", 1)
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message())
        await store.accept(new_message())
        assert (await store.change(ALL, verb="hold", now=NOW)).until
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "next step of a verb"]


def _told(message: QueuedMessage, recipient: QueuedRecipient) -> Event:
    return event("failed", message.queue_id, recipient.address)


def _id(entry: Entry) -> str:
    return entry.message.queue_id


async def test_neither_a_page_nor_a_stretch_holds_many_messages_that_have_many_recipients(
    store, monkeypatch
):
    monkeypatch.setattr("relay.queue.answers.PAGE_RECIPIENTS", 25)
    monkeypatch.setattr("relay.queue.store.PAGE_RECIPIENTS", 25)
    for _ in range(6):
        await store.accept(new_message(*(f"{n}@one.example" for n in range(10))))
    found: list[ListedMessage] = []
    while more_follows(page := await store.list_messages(ALL, now=NOW, after=last_id(found)), 1000):
        assert len(page) == 3
        found += page
    assert len(found) == 6
    assert await stretches(store, QueueFilter(sender="a@example.com"), "hold") == [30, 30, 0]


def last_id(items: list[ListedMessage]) -> str:
    return items[-1].queue_id if items else ""


async def stretches(store: SqliteStore, wanted: QueueFilter, verb: str) -> list[int]:
    """How many recipients each stretch of a verb changes."""
    changed: list[int] = []
    after: str | None = ""
    while after is not None:
        stretch = await store.change(wanted, verb=verb, now=NOW, after=after)
        changed.append(stretch.changed)
        after = stretch.until
    return changed


async def test_count_of_a_long_queue_sorts_no_recipients_in_memory(store):
    def steps(db: sqlite3.Connection) -> list[str]:
        asked: list[str] = []
        db.set_trace_callback(asked.append)
        messages.count_states(db)
        db.set_trace_callback(None)
        return [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {asked[0]}")]

    assert await store.ask(steps) == ["SCAN recipient"]


async def test_message_of_a_kilobyte_takes_less_than_two_of_the_disk(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await asyncio.gather(*(store.accept(new_message(content=b"z" * 1000)) for _ in range(1000)))
    assert (tmp_path / "spool" / "queue.db").stat().st_size < 1000 * 2000


# Events.


async def test_events_from_memory_are_those_on_disk(store, tmp_path):
    async def client(number: int) -> None:
        for step in range(20):
            queue_id = f"q{number:02}{step:02}"
            await store.accept(
                new_message(queue_id=queue_id, events=(event("accepted", queue_id),))
            )

    await asyncio.gather(*(client(number) for number in range(10)))
    by_memory = await store.events_after(0)
    by_disk = await store.find_events(EventFilter(), EventPage(limit=1000))
    assert by_memory == by_disk
    assert len(by_disk) == 200


async def test_an_event_that_cannot_be_stored_is_refused_alone_and_takes_no_number(store):
    good = [new_message(queue_id=f"q{n}", events=(event("accepted", f"q{n}"),)) for n in range(4)]
    bad = new_message(
        queue_id="bad", events=(event("accepted", "bad"), event("accepted", "bad", "\udce9"))
    )
    results = await asyncio.gather(
        *(store.accept(new) for new in [*good[:2], bad, *good[2:]]), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [SpoolError]
    stored = await store.events_after(0)
    assert [(one.seq, one.event.queue_id) for one in stored] == [(n + 1, f"q{n}") for n in range(4)]
    assert stored == await store.find_events(EventFilter())


async def test_a_long_search_ends_its_page_with_what_it_has_and_never_with_nothing(
    store, monkeypatch
):
    """An empty page would say that there is no more."""
    monkeypatch.setattr(reading, "_WINDOW", 2)
    await store.accept(
        new_message(events=tuple(event("accepted", f"q{n % 5}", number=n) for n in range(20)))
    )
    at_once = timedelta(0)
    page = await store.find_events(EventFilter(), EventPage(patience=at_once))
    assert [stored.seq for stored in page] == [1, 2]
    page = await store.find_events(EventFilter(), EventPage(page[-1].seq, patience=at_once))
    assert [stored.seq for stored in page] == [3, 4]
    assert await store.find_events(EventFilter(), EventPage(20, patience=at_once)) == []
    fields = (("subject", "nothing"),)
    with pytest.raises(SearchTooLong):
        await store.find_events(EventFilter(fields=fields), EventPage(patience=at_once))
    assert await store.find_events(EventFilter(fields=fields), EventPage(patience=MINUTE)) == []


async def test_a_question_is_answered_while_many_search(store, monkeypatch):
    """Of all searches one window waits at a time."""
    monkeypatch.setattr(reading, "_WINDOW", 1)
    await store.accept(
        new_message(events=tuple(event("accepted", "q1", number=n) for n in range(100)))
    )
    looked, look = [], event_conditions

    def seen(*args: Any) -> Any:
        looked.append(args)
        return look(*args)

    monkeypatch.setattr(reading, "event_conditions", seen)
    wanted = EventFilter(sender="nobody@example.com")
    searches = [asyncio.create_task(store.find_events(wanted)) for _ in range(20)]
    while not looked:
        await asyncio.sleep(0.001)
    before = len(looked)
    assert await store.pending_report("q1") is None
    assert len(looked) - before < 5
    assert await asyncio.gather(*searches) == [[]] * 20


# A relay that does not run.


async def test_the_queue_of_a_stopped_relay_is_read_without_a_trace(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await some_messages(store)
        big = new_message(
            queue_id="q4", content=b"x" * (2 * CHUNK_BYTES), events=(event("accepted", "q4"),)
        )
        await store.accept(big)
    before = {path: path.stat() for path in (tmp_path / "spool").iterdir()}
    async with await StoppedQueue.open(tmp_path / "spool") as stopped:
        listed = await stopped.list_messages(ALL, now=NOW)
        assert [item.queue_id for item in listed] == ["q0", "q1", "q2", "q3", "q4"]
        assert await stopped.counts() == {State.QUEUED: 5, State.DEFERRED: 0, State.HELD: 1}
        assert await content_of(stopped, "q0") == CONTENT
        assert len(await content_of(stopped, "q4")) == 2 * CHUNK_BYTES
        assert (await stopped.read_header("q0")).endswith(b"\r\n\r\n")
        assert len(await stopped.find_events(EventFilter())) == 1
    after = {path: path.stat() for path in (tmp_path / "spool").iterdir()}
    assert {path: (found.st_mtime_ns, found.st_size) for path, found in before.items()} == {
        path: (found.st_mtime_ns, found.st_size) for path, found in after.items()
    }


async def test_files_of_a_running_relay_are_not_read_directly(tmp_path):
    async with opened(tmp_path / "spool"):
        with pytest.raises(SpoolError, match=r"process \d+ uses this queue"):
            await StoppedQueue.open(tmp_path / "spool")


async def test_reading_a_missing_queue_does_not_create_it(tmp_path):
    with pytest.raises(SpoolError):
        await StoppedQueue.open(tmp_path / "spool")
    assert list(tmp_path.iterdir()) == []


async def test_a_relay_waits_for_a_command_that_reads(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message())
    stopped = await StoppedQueue.open(tmp_path / "spool")
    starting = asyncio.create_task(SqliteStore.open(tmp_path / "spool", now=NOW))
    await asyncio.sleep(0.2)
    assert not starting.done()
    await stopped.close()
    store = await starting
    assert len(await claimed(store)) == 1
    await store.close()
