"""Events: in the order of their commits, found by filters, purged when the log holds them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import timedelta

import pytest

from relay.queue.entry import Terms
from relay.queue.store import EventFilter, EventPage, NewMessage
from relay.report import deliverylog
from tests.fakes import mail
from tests.fakes.queued import MINUTE, NOW, event, new_message

DAY = timedelta(days=1)


def _message(queue_id: str, sender: str, **terms) -> NewMessage:
    one = mail.entry(reverse_path=sender)
    message = replace(one.message, queue_id=queue_id, terms=Terms(**terms))
    return NewMessage(
        message,
        one.recipients,
        mail.CONTENT,
        events=(deliverylog.accepted(message, one.recipients),),
    )


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


async def test_commit_that_fails_leaves_no_gap_and_no_event(store):
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


async def test_event_numbers_go_on_after_events_were_purged_and_a_start(engine):
    async with engine.opened() as store:
        for number in range(5):
            await store.accept(new_message(events=(event("accepted", f"q{number}"),)))
        await store.log_written(5)
        assert await store.purge_events(before=NOW + 2 * DAY)
    async with engine.opened() as store:
        assert await store.log_mark() == 5
        await store.accept(new_message(events=(event("accepted", "next"),)))
        assert [one.seq for one in await store.events_after(5)] == [6]


async def test_event_that_the_log_does_not_hold_is_not_purged(store):
    for number in range(6):
        at = NOW + number * DAY
        await store.accept(new_message(events=(event("accepted", f"q{number}", at=at),)))
    await store.log_written(3)
    assert await store.purge_events(before=NOW + 7 * DAY) == 3
    left = [one.event.queue_id for one in await store.events_after(0)]
    assert left == ["q3", "q4", "q5"]


async def test_event_that_is_not_older_is_not_purged(store):
    for number in range(6):
        at = NOW + number * DAY
        await store.accept(new_message(events=(event("accepted", f"q{number}", at=at),)))
    await store.log_written(6)
    assert await store.purge_events(before=NOW + 2 * DAY) == 2
    assert [one.event.queue_id for one in await store.find_events(EventFilter())] == [
        "q2",
        "q3",
        "q4",
        "q5",
    ]


async def test_log_mark_never_goes_back_and_survives_a_restart(engine):
    async with engine.opened() as store:
        assert await store.log_mark() == 0
        await store.log_written(7)
        await store.log_written(3)
        assert await store.log_mark() == 7
    async with engine.opened() as store:
        assert await store.log_mark() == 7


@pytest.fixture
async def with_events(kept_engine):
    """A queue that has EVENTS, and that no test changes."""
    async with kept_engine.opened() as store:
        if not await store.events_after(0):
            for number, (name, queue_id, recipient, sender, minute) in enumerate(EVENTS):
                one = event(name, queue_id, recipient, at=NOW + minute * MINUTE, number=number)
                one = type(one)(
                    one.id, one.at, one.name, one.queue_id, sender, one.recipient, one.line
                )
                await store.accept(new_message(events=(one,)))
        yield store


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
async def test_events_are_found_in_pages_in_both_directions(
    with_events, narrow_windows, wanted, found, ascending, limit
):
    store = with_events
    got: list[int] = []
    while page := await store.find_events(
        wanted, EventPage(got[-1] if got else 0, limit, ascending)
    ):
        assert len(page) <= limit
        got += [stored.seq for stored in page]
    expected = [number + 1 for number in found]
    assert got == (expected if ascending else expected[::-1])


async def test_events_are_found_by_sender_domain_and_by_fields(store):
    await store.accept(_message("Q1", "a@A.example", tags=("news",)))
    await store.accept(_message("Q2", "a@sub.a.example", tags=("news",)))
    await store.accept(_message("Q3", "a@b.example"))

    async def found(**wanted):
        return [one.event.queue_id for one in await store.find_events(EventFilter(**wanted))]

    assert await found(sender_domain="a.example") == ["Q1"]
    assert await found(fields=(("tag", "news"),)) == ["Q1", "Q2"]
    assert await found(fields=(("tag", "news"), ("severity", "permanent"))) == []
    assert await found(fields=(("message-id", "x"),)) == []


async def test_events_are_found_by_protection_policy_source_and_text(store):
    line = {
        "envelope": {"targets": "b@example.net,C@two.example"},
        "message": {"headers": {"subject": "Invoice 17", "message-id": "m1@x"}},
        "policy": {"require-tls-source": "message", "skip-verification-source": "default"},
    }
    cases = [
        ("accepted", None),
        ("delivered", {"tls": True, "certificate-verified": True}),
        ("delivered", {"tls": True, "certificate-verified": False}),
        ("delivered", {"tls": False, "certificate-verified": False}),
        ("failed", {"tls": True, "certificate-verified": True}),
        ("delivered", {"tls": None}),
    ]
    for number, (name, status) in enumerate(cases):
        told = line if status is None else {**line, "delivery-status": status}
        made = replace(event(name, f"q{number}"), line=json.dumps(told))
        await store.accept(replace(new_message(queue_id=f"q{number}"), events=(made,)))

    async def found(**wanted) -> list[str]:
        fields = tuple((name.replace("_", "-"), value) for name, value in wanted.items())
        return [one.event.queue_id for one in await store.find_events(EventFilter(fields=fields))]

    assert await found(protection="verified") == ["q1"]
    assert await found(protection="encrypted") == ["q2"]
    assert await found(protection="clear") == ["q3"]
    assert await found(protection="not-sent") == ["q4", "q5"]
    assert (
        len(await found(policy_source="default")) == len(await found(policy_source="message")) == 6
    )
    assert await found(policy_source="destination") == []
    for text in ("invoice", "M1@X", "c@TWO.example", "A@example.com"):
        assert len(await found(text=text)) == 6
    assert await found(text="Q3", protection="clear") == ["q3"]
    assert await found(text="headers") == []
    wanted = EventFilter(recipient_domain="TWO.example")
    assert len(await store.find_events(wanted)) == 6
    assert await store.find_events(EventFilter(recipient_domain="wo.example")) == []


async def test_event_of_an_operator_is_kept_like_any_other(store):
    made = event("operator", "q1")
    await store.write_event(made)
    [stored] = await store.events_after(0)
    assert replace(stored.event, line=made.line) == made
    assert stored.event.line.startswith(made.line[:-1])
