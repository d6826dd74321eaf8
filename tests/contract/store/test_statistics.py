"""Statistics: the counts of an event commit with it, outlive it, are found by domain and time."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from relay.mail.event import Counted, Event, EventResult, Protection
from relay.queue.statistics import CountFilter, ExceptionPage, added_up
from relay.queue.store import EventFilter, SpoolError
from relay.report import deliverylog
from tests.fakes.queued import BOUNCED, DEFERRED, NOW, event, new_message, settled

HOUR = timedelta(hours=1)
DAY = CountFilter(NOW - HOUR, NOW + 24 * HOUR)
RULE = "require_tls: true (message), skip_verification: false (domain b.example)"


def _event(
    number: int,
    *,
    at=NOW,
    sender: str = "a.example",
    recipient: str = "b.example",
    result: EventResult = EventResult.DELIVERED,
    protection: str = Protection.VERIFIED,
    exception: str = "",
) -> Event:
    counted = Counted(
        sender, recipient, result, protection, RULE, exception and "reason", 1, exception
    )
    return replace(event("delivered", "q", number=number, at=at), counted=(counted,))


async def _write(store, *events: Event) -> None:
    await store.accept(new_message(events=events))


async def test_counts_of_a_period_are_added_up(store):
    await _write(store, *(_event(n, at=NOW + n * HOUR) for n in range(4)))
    await _write(store, _event(9, protection=Protection.CLEAR, exception="in clear"))
    [verified, clear] = added_up([await store.count_mail(DAY)])
    assert (verified.protection, verified.number) == ("verified", 4)
    assert (verified.first, verified.last) == (NOW, NOW + 3 * HOUR)
    assert (clear.protection, clear.reason, clear.number) == ("clear", "reason", 1)
    later = replace(DAY, begin=NOW + 2 * HOUR, end=NOW + 3 * HOUR)
    assert [one.number for one in await store.count_mail(later)] == [1]


@pytest.mark.parametrize(
    ("sender", "recipient", "number"),
    [
        ("", "", 4),
        ("a.example", "", 3),
        ("", "b.example", 2),
        ("a.example", "b.example", 1),
        ("<>", "", 1),
        ("nobody.example", "", 0),
    ],
)
async def test_counts_are_found_by_the_domains(store, sender, recipient, number):
    pairs = [("a.example", "b.example"), ("a.example", "c.example"), ("a.example", "d.example")]
    pairs.append(("<>", "b.example"))
    await _write(store, *(_event(n, sender=s, recipient=r) for n, (s, r) in enumerate(pairs)))
    wanted = replace(DAY, sender_domain=sender, recipient_domain=recipient)
    found = await store.count_mail(wanted)
    assert sum(one.number for one in found) == number
    assert {one.policy for one in found} <= {RULE, RULE.replace(" b.example", "")}


async def test_counts_by_the_hour_are_those_of_all_mail(store):
    events = [_event(n, at=NOW + n // 2 * HOUR, recipient=f"{n}.example") for n in range(4)]
    await _write(store, *events)
    found = await store.count_hours(CountFilter(NOW - HOUR, NOW + HOUR))
    assert found == [(NOW, "delivered", "verified", 2)]
    one = CountFilter(NOW - HOUR, NOW + 3 * HOUR, recipient_domain="3.example")
    assert await store.count_hours(one) == [(NOW + HOUR, "delivered", "verified", 1)]


async def test_exceptions_are_listed_by_time_in_pages(store):
    await _write(
        store,
        *(_event(n, at=NOW + (9 - n) * HOUR, exception=f"sentence {n}") for n in range(5)),
        _event(7),
    )
    first = await store.find_exceptions(DAY, ExceptionPage(limit=3))
    rest = await store.find_exceptions(DAY, ExceptionPage(first[-1][:2], limit=3))
    assert [one.sentence for one in first + rest] == [f"sentence {n}" for n in (4, 3, 2, 1, 0)]
    assert first[0].queue_id == "q"
    newest = await store.find_exceptions(DAY, ExceptionPage(limit=2, newest=True))
    assert [one.sentence for one in newest] == ["sentence 0", "sentence 1"]
    nobody = replace(DAY, recipient_domain="c.example")
    assert await store.find_exceptions(nobody) == []


async def test_statistics_outlive_the_events_and_a_start(engine):
    async with engine.opened() as store:
        await _write(store, _event(1, exception="in clear"), event("accepted", "q2"))
        await store.log_written(2)
        await store.purge_events(before=NOW + 365 * 24 * HOUR)
        assert len(await store.find_events(EventFilter())) <= 1  # an engine may keep the newest
    async with engine.opened() as store:
        await _write(store, _event(2))
        assert sum(one.number for one in await store.count_mail(DAY)) == 2
        assert len(await store.find_exceptions(DAY)) == 1


async def test_statistics_that_are_old_are_purged(store):
    await _write(store, *(_event(n, at=NOW + n * HOUR, exception="why") for n in range(3)))
    assert await store.purge_statistics(before=NOW + 2 * HOUR) > 0
    [left] = await store.count_mail(DAY)
    assert left.first == NOW + 2 * HOUR
    assert len(await store.find_exceptions(DAY)) == 1
    assert await store.purge_statistics(before=NOW + 2 * HOUR) == 0


async def test_commit_that_fails_counts_nothing(store):
    taken = new_message(queue_id="taken", events=(_event(1),))
    await store.accept(taken)
    with pytest.raises(SpoolError):
        await store.accept(taken)
    assert sum(one.number for one in await store.count_mail(DAY)) == 1


async def test_results_are_counted_with_the_commit_that_records_them(store):
    new = new_message("b@one.example", "c@two.example", "d@two.example")
    await store.accept(replace(new, events=(deliverylog.accepted(new.message, new.recipients),)))
    for entry in await store.claim_due(now=NOW, limit=10):
        outcome = BOUNCED if entry.domain == "one.example" else DEFERRED
        settlement = settled(entry, outcome)
        events = [deliverylog.settled(entry, one, now=NOW) for one in settlement.changes]
        await store.record(settlement, events=events)
    found = {(one.result, one.reason): one.number for one in await store.count_mail(DAY)}
    assert found == {("accepted", ""): 3, ("deferred", "refused"): 2, ("failed", "refused"): 1}
    [exception] = await store.find_exceptions(DAY)
    assert exception.sentence == "not sent: 550 5.1.1 no such user"
