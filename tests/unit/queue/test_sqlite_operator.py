"""What the operator asks of the SQLite store: the queue in pages, the verbs, the events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.mail.event import Event
from relay.queue.entry import QueuedMessage, QueuedRecipient, State
from relay.queue.handoff import HandOffLimits
from relay.queue.sqlite import SqliteStore, StoppedQueue
from relay.queue.sqlite import reader as reading
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    ListedMessage,
    NewMessage,
    QueueFilter,
    SearchTooLong,
    SpoolError,
    more_follows,
)
from tests.fakes.queued import (
    CONTENT,
    DEFERRED,
    DELIVERED,
    NOW,
    content_of,
    event,
    new_message,
    opened,
    settled,
)

MINUTE = timedelta(minutes=1)
ALL = QueueFilter()


@pytest.fixture(params=["by memory", "by disk"])
async def store(request, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    limits = HandOffLimits() if request.param == "by memory" else HandOffLimits(entries=0)
    async with opened(tmp_path / "spool", limits=limits) as store:
        yield store


async def claimed(store: SqliteStore, *, now=NOW) -> list[str]:
    return sorted(entry.message.queue_id for entry in await store.claim_due(now=now, limit=1000))


async def states(store: SqliteStore, wanted: QueueFilter = ALL) -> list[State]:
    listed = await store.list_messages(wanted, now=NOW)
    return [one.state for item in listed for one in item.recipients]


# The queue in pages.


async def test_the_queue_is_listed_in_pages_by_arrival(store, monkeypatch):
    monkeypatch.setattr(reading, "_WINDOW", 7)
    ids = [f"q{number:03}" for number in range(50)]
    for queue_id in ids:
        await store.accept(new_message(queue_id=queue_id))
    found: list[str] = []
    while page := await store.list_messages(
        ALL, now=NOW, after=found[-1] if found else "", limit=13
    ):
        found += [item.queue_id for item in page]
    assert found == ids


FILTERS = [
    (QueueFilter(), ["q0", "q1", "q2", "q3"]),
    (QueueFilter(queue_ids=frozenset({"q1", "q3", "unknown"})), ["q1", "q3"]),
    (QueueFilter(domain="two.example"), ["q1", "q2"]),
    (QueueFilter(domain="TWO.example"), ["q1", "q2"]),
    (QueueFilter(sender="other@example.com"), ["q2"]),
    (QueueFilter(sender="Other@Example.com"), ["q2"]),
    (QueueFilter(sender="<Other@EXAMPLE.com.>"), ["q2"]),
    (QueueFilter(domain="two.example."), ["q1", "q2"]),
    (QueueFilter(sender="<>"), ["q3"]),
    (QueueFilter(older_than=timedelta(hours=2)), ["q0"]),
    (QueueFilter(older_than=timedelta(hours=1)), ["q0", "q1"]),
    (QueueFilter(state=State.HELD), ["q3"]),
    (QueueFilter(state=State.QUEUED, domain="two.example"), ["q1", "q2"]),
    (QueueFilter(state=State.HELD, domain="two.example"), []),
    (QueueFilter(domain="two.example", sender="other@example.com"), ["q2"]),
    (QueueFilter(domain="two' OR '1'='1"), []),
]


async def some_messages(store: SqliteStore) -> None:
    hour = timedelta(hours=1)
    await store.accept(new_message("a@one.example", queue_id="q0", arrived=NOW - 3 * hour))
    await store.accept(
        new_message("a@one.example", "b@two.example", queue_id="q1", arrived=NOW - hour)
    )
    await store.accept(new_message("b@two.example", queue_id="q2", sender="other@example.com"))
    await store.accept(new_message("c@three.example", queue_id="q3", sender="", state=State.HELD))


@pytest.mark.parametrize(("wanted", "found"), FILTERS)
async def test_the_operator_finds_what_is_meant(store, wanted, found):
    await some_messages(store)
    assert [item.queue_id for item in await store.list_messages(wanted, now=NOW)] == found


@pytest.mark.parametrize(("wanted", "found"), FILTERS)
async def test_a_verb_touches_what_a_list_shows_and_nothing_else(store, wanted, found):
    await some_messages(store)
    await store.change(wanted, verb="remove", now=NOW)
    left = await store.list_messages(ALL, now=NOW)
    expected = {"q0", "q1", "q2", "q3"} - set(found)
    if wanted.domain and "q1" in found:
        expected.add("q1")  # its other recipient stays
    assert {item.queue_id for item in left} == expected


# The verbs.


async def test_held_mail_is_not_claimed_until_it_is_released(store):
    await store.accept(new_message("a@one.example", "b@two.example"))
    assert (
        await store.change(QueueFilter(domain="one.example"), verb="hold", now=NOW)
    ).changed == 1
    assert await states(store) == [State.HELD, State.QUEUED]
    [entry] = await store.claim_due(now=NOW, limit=10)
    assert entry.domain == "two.example"
    assert (
        await store.change(QueueFilter(domain="one.example"), verb="release", now=NOW)
    ).changed == 1
    [entry] = await store.claim_due(now=NOW, limit=10)
    assert entry.domain == "one.example"
    assert entry.recipients[0].state is State.QUEUED


async def test_deferred_mail_is_deferred_again_after_a_hold(store):
    await store.accept(new_message())
    [entry] = await store.claim_due(now=NOW, limit=10)
    await store.record(settled(entry, DEFERRED))
    await store.change(ALL, verb="hold", now=NOW)
    [item] = await store.list_messages(ALL, now=NOW)
    assert item.recipients[0].due is None
    await store.change(ALL, verb="release", now=NOW)
    assert await states(store) == [State.DEFERRED]


async def test_a_retry_makes_deferred_mail_due_at_once(store):
    await store.accept(new_message())
    [entry] = await store.claim_due(now=NOW, limit=10)
    await store.record(settled(entry, DEFERRED, wait=timedelta(hours=4)))
    assert await claimed(store) == []
    assert (await store.change(ALL, verb="retry", now=NOW)).changed == 1
    [entry] = await store.claim_due(now=NOW, limit=10)
    assert entry.recipients[0].attempts == 1


async def test_a_retry_does_not_release_what_is_held(store):
    await store.accept(new_message(state=State.HELD))
    assert (await store.change(ALL, verb="retry", now=NOW)).changed == 0
    assert await states(store) == [State.HELD]


async def test_mail_removed_by_the_operator_is_gone_and_its_events_tell(store):
    new = new_message("a@one.example", "b@two.example", content=b"x" * 300_000)
    queue_id = new.message.queue_id
    await store.accept(new)
    told = [
        event("failed", queue_id, "a@one.example"),
        event("failed", queue_id, "b@two.example", number=1),
    ]

    def tell(message: QueuedMessage, recipient: QueuedRecipient) -> Event:
        assert message == new.message
        return told[recipient.index]

    one = QueueFilter(domain="one.example")
    assert (await store.change(one, verb="remove", now=NOW, event_of=tell)).changed == 1
    assert await states(store) == [State.REMOVED, State.QUEUED]
    assert [stored.event for stored in await store.events_after(0)] == told[:1]
    assert (await store.change(ALL, verb="remove", now=NOW, event_of=tell)).changed == 1
    assert await states(store) == []
    assert [stored.event for stored in await store.events_after(0)] == told
    with pytest.raises(SpoolError):
        await content_of(store, queue_id)


async def test_a_recipient_that_is_done_is_touched_by_no_verb(store):
    await store.accept(new_message("a@one.example", "b@one.example"))
    [entry] = await store.claim_due(now=NOW, limit=10)
    await store.record(settled(entry, DELIVERED, DEFERRED))
    for verb in ("hold", "release", "retry", "remove"):
        assert (
            await store.change(QueueFilter(state=State.DELIVERED), verb=verb, now=NOW)
        ).changed == 0


@pytest.mark.parametrize("verb", ["hold", "remove", "retry"])
async def test_what_is_being_delivered_at_this_moment_is_left_to_its_attempt(store, verb):
    """Whether the next hop has taken it is not known yet: it can be neither kept back nor taken back."""
    new = new_message()
    queue_id = new.message.queue_id
    await store.accept(new)
    [entry] = await store.claim_due(now=NOW, limit=10)
    change = await store.change(
        ALL, verb=verb, now=NOW, event_of=lambda *_: event("failed", queue_id)
    )
    assert change.changed == 0
    assert await store.events_after(0) == []
    await store.record(settled(entry, DELIVERED))
    assert await states(store) == []


async def test_what_waits_for_its_attempt_in_memory_is_within_the_operators_reach(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for _ in range(30):
            await store.accept(new_message("x@dead.example"))
        assert (
            await store.change(QueueFilter(domain="dead.example"), verb="hold", now=NOW)
        ).changed == 30
        assert await claimed(store) == []


async def test_an_unknown_verb_is_refused(store):
    with pytest.raises(SpoolError):
        await store.change(ALL, verb="explode", now=NOW)


async def test_a_verb_goes_through_a_long_queue_in_stretches(store, monkeypatch):
    monkeypatch.setattr("relay.queue.sqlite.store._STRETCH", 7)
    monkeypatch.setattr("relay.queue.sqlite.reader._WINDOW", 11)
    for _ in range(50):
        await store.accept(new_message("a@one.example", "b@two.example"))
    assert sum(await stretches(store, QueueFilter(domain="two.example"), "hold")) == 50
    assert await store.counts() == {State.QUEUED: 50, State.DEFERRED: 0, State.HELD: 50}
    assert await stretches(store, ALL, "remove") == [14] * 7 + [2]
    assert await states(store) == []


async def test_neither_a_page_nor_a_stretch_holds_many_messages_that_have_many_recipients(
    store, monkeypatch
):
    monkeypatch.setattr("relay.queue.sqlite.reader.PAGE_RECIPIENTS", 25)
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


# Events.


async def test_events_have_the_order_of_their_commits(store):
    names = [f"e{number}" for number in range(100)]
    for name in names:
        await store.accept(new_message(events=(event(name, "q"),)))
    stored = await store.events_after(0)
    assert [one.event.name for one in stored] == names
    numbers = [one.seq for one in stored]
    assert numbers == sorted(set(numbers))
    assert await store.events_after(numbers[59], limit=10) == stored[60:70]
    assert await store.events_after(numbers[-1]) == []


async def test_events_from_memory_are_those_on_disk(store, tmp_path):
    async def client(number: int) -> None:
        for step in range(20):
            queue_id = f"q{number:02}{step:02}"
            await store.accept(
                new_message(queue_id=queue_id, events=(event("accepted", queue_id),))
            )

    await asyncio.gather(*(client(number) for number in range(10)))
    by_memory = await store.events_after(0)
    by_disk = await store.find_events(EventFilter(), limit=1000)
    assert by_memory == by_disk
    assert len(by_disk) == 200


async def test_a_batch_that_fails_leaves_no_gap_and_no_event(store):
    taken = new_message(queue_id="taken")
    await store.accept(taken)
    again = NewMessage(taken.message, taken.recipients, b"", events=(event("accepted", "taken"),))
    good = [new_message(queue_id=f"q{n}", events=(event("accepted", f"q{n}"),)) for n in range(4)]
    await asyncio.gather(
        *(store.accept(new) for new in [*good[:2], again, *good[2:]]), return_exceptions=True
    )
    stored = await store.events_after(0)
    assert [one.event.queue_id for one in stored] == ["q0", "q1", "q2", "q3"]
    assert stored == await store.find_events(EventFilter())
    assert [one.seq for one in stored] == [1, 2, 3, 4]


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


async def test_numbers_go_on_after_a_start_though_all_events_were_forgotten(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for number in range(5):
            await store.accept(new_message(events=(event("accepted", f"q{number}"),)))
        await store.log_written(5)
        assert await store.purge_events(before=NOW + MINUTE) == 4
    async with opened(tmp_path / "spool") as store:
        assert await store.log_mark() == 5
        await store.accept(new_message(events=(event("accepted", "next"),)))
        assert [one.seq for one in await store.events_after(5)] == [6]


async def test_what_the_log_does_not_hold_is_not_forgotten(store):
    for number in range(6):
        at = NOW + number * MINUTE
        await store.accept(new_message(events=(event("accepted", f"q{number}", at=at),)))
    await store.log_written(3)
    assert await store.purge_events(before=NOW + timedelta(days=7)) == 3
    left = [one.event.queue_id for one in await store.events_after(0)]
    assert left == ["q3", "q4", "q5"]


async def test_only_what_is_older_is_forgotten(store):
    for number in range(6):
        at = NOW + number * MINUTE
        await store.accept(new_message(events=(event("accepted", f"q{number}", at=at),)))
    await store.log_written(6)
    assert await store.purge_events(before=NOW + 2 * MINUTE) == 2
    assert [one.event.queue_id for one in await store.find_events(EventFilter())] == [
        "q2",
        "q3",
        "q4",
        "q5",
    ]


async def test_the_mark_of_the_log_never_goes_back_and_outlives_the_relay(tmp_path):
    async with opened(tmp_path / "spool") as store:
        assert await store.log_mark() == 0
        await store.log_written(7)
        await store.log_written(3)
        assert await store.log_mark() == 7
    async with opened(tmp_path / "spool") as store:
        assert await store.log_mark() == 7


EVENTS = [
    # name, queue id, recipient, sender, minute
    ("accepted", "q1", "", "a@example.com", 0),
    ("delivered", "q1", "b@example.net", "a@example.com", 1),
    ("accepted", "q2", "", "c@example.com", 2),
    ("failed", "q2", "b@example.net", "c@example.com", 3),
    ("failed", "q2", "d@example.net", "c@example.com", 4),
    ("delivered", "q3", "Eve@bücher.example", "", 5),
    ("failed", "q3", "eve@XN--BCHER-KVA.example", "f@bücher.example", 6),
]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (EventFilter(), [0, 1, 2, 3, 4, 5, 6]),
        (EventFilter(names=frozenset({"delivered", "failed"})), [1, 3, 4, 5, 6]),
        (EventFilter(recipient="b@example.net"), [1, 3]),
        (EventFilter(recipient="B@Example.NET."), [1, 3]),
        (EventFilter(recipient="<b@example.net>"), [1, 3]),
        (EventFilter(recipient="EVE@BÜCHER.example"), [5, 6]),
        (EventFilter(recipient="eve@xn--bcher-kva.example"), [5, 6]),
        (EventFilter(recipient="b@example.net", names=frozenset({"failed"})), [3]),
        (EventFilter(sender="<>"), [5]),
        (EventFilter(sender="C@example.COM"), [2, 3, 4]),
        (EventFilter(sender="f@xn--bcher-kva.example"), [6]),
        (EventFilter(sender_domain="xn--bcher-kva.example"), [6]),
        (EventFilter(sender="a@example.com"), [0, 1]),
        (EventFilter(queue_id="q2"), [2, 3, 4]),
        (EventFilter(queue_id="q2", recipient="d@example.net"), [4]),
        (EventFilter(begin=NOW + 2 * MINUTE), [2, 3, 4, 5, 6]),
        (EventFilter(end=NOW + 2 * MINUTE), [0, 1, 2]),
        (EventFilter(begin=NOW + MINUTE, end=NOW + 3 * MINUTE), [1, 2, 3]),
        (EventFilter(begin=NOW + 30 * MINUTE), []),
        (EventFilter(end=NOW - MINUTE), []),
        (EventFilter(sender="nobody@example.com"), []),
    ],
)
@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 300])
async def test_events_are_found_page_by_page_either_way(
    tmp_path, monkeypatch, wanted, found, ascending, limit
):
    monkeypatch.setattr(reading, "_EVENT_WINDOW", 2)
    async with opened(tmp_path / "spool") as store:
        for number, (name, queue_id, recipient, sender, minute) in enumerate(EVENTS):
            one = event(name, queue_id, recipient, at=NOW + minute * MINUTE, number=number)
            one = type(one)(one.id, one.at, one.name, one.queue_id, sender, one.recipient, one.line)
            await store.accept(new_message(events=(one,)))
        got: list[int] = []
        while page := await store.find_events(
            wanted, after=got[-1] if got else 0, limit=limit, ascending=ascending
        ):
            assert len(page) <= limit
            got += [stored.seq for stored in page]
        expected = [number + 1 for number in found]
        assert got == (expected if ascending else expected[::-1])


async def test_a_long_search_ends_its_page_with_what_it_has_and_never_with_nothing(
    store, monkeypatch
):
    """An empty page would say that there is no more."""
    monkeypatch.setattr(reading, "_EVENT_WINDOW", 2)
    await store.accept(
        new_message(events=tuple(event("accepted", f"q{n % 5}", number=n) for n in range(20)))
    )
    at_once = timedelta(0)
    page = await store.find_events(EventFilter(), patience=at_once)
    assert [stored.seq for stored in page] == [1, 2]
    page = await store.find_events(EventFilter(), after=page[-1].seq, patience=at_once)
    assert [stored.seq for stored in page] == [3, 4]
    assert await store.find_events(EventFilter(), after=20, patience=at_once) == []
    fields = (("subject", "nothing"),)
    with pytest.raises(SearchTooLong):
        await store.find_events(EventFilter(fields=fields), patience=at_once)
    assert await store.find_events(EventFilter(fields=fields), patience=MINUTE) == []


async def test_a_question_is_answered_while_many_search(store, monkeypatch):
    """Of all searches one window waits at a time."""
    monkeypatch.setattr(reading, "_EVENT_WINDOW", 1)
    await store.accept(
        new_message(events=tuple(event("accepted", "q1", number=n) for n in range(100)))
    )
    looked, look = [], reading._events_within

    def seen(*args: Any) -> Any:
        looked.append(args)
        return look(*args)

    monkeypatch.setattr(reading, "_events_within", seen)
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
        assert (
            len(await stopped.find_events(EventFilter())) == len(await stopped.events_after(0)) == 1
        )
        assert await stopped.log_mark() == 0
    after = {path: path.stat() for path in (tmp_path / "spool").iterdir()}
    assert {path: (found.st_mtime_ns, found.st_size) for path, found in before.items()} == {
        path: (found.st_mtime_ns, found.st_size) for path, found in after.items()
    }


async def test_a_running_relay_is_not_read_behind_its_back(tmp_path):
    async with opened(tmp_path / "spool"):
        with pytest.raises(SpoolError, match=r"process \d+ uses this queue"):
            await StoppedQueue.open(tmp_path / "spool")


async def test_a_queue_that_is_not_there_is_not_made_by_looking(tmp_path):
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
