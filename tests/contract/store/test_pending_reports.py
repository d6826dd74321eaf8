"""What the sender is to be told is kept until it is reported: decided in the commits themselves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from relay.mail.outcome import Bounced, Deferred, Delivered, HopSession
from relay.queue.entry import Entry, State
from relay.queue.retry import RetrySchedule, jitter_of
from relay.queue.settle import ReportKind, reports_about, settle
from relay.queue.store import PendingReport, QueueFilter, SpoolError, Store
from tests.fakes.queued import (
    BOUNCED,
    DEFERRED,
    DELIVERED,
    NOW,
    REPORT_WINDOW,
    entries_of,
    holding,
    new_message,
    settled,
)

LONG_AGO = NOW - timedelta(minutes=5)


def reported(pending: PendingReport | None) -> list[tuple[str, State]]:
    assert pending is not None
    return [(change.recipient.address, change.recipient.state) for change in pending.changes]


async def due_reports(store: Store, **when) -> list[str]:
    return await store.pending_reports(**{"now": NOW, "pending_since": LONG_AGO} | when)


async def is_listed(store: Store) -> bool:
    return bool(await store.list_messages(QueueFilter(), now=NOW))


async def test_report_is_due_with_the_last_result(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    assert await store.record(holding(one, BOUNCED)) is False
    assert await due_reports(store) == []
    assert await store.record(holding(two, BOUNCED)) is True
    pending = await store.pending_report(one.message.queue_id)
    assert reported(pending) == [("a@one.example", State.BOUNCED), ("b@two.example", State.BOUNCED)]


@pytest.mark.parametrize("outcome", [BOUNCED, DEFERRED])
async def test_one_of_many_results_at_the_same_moment_makes_the_report_due(store, outcome):
    for _ in range(5):
        entries = await entries_of(store, *(f"b@d{number}.example" for number in range(20)))
        answers = await asyncio.gather(
            *(store.record(holding(entry, outcome)) for entry in entries)
        )
        assert answers.count(True) == 1


@pytest.mark.parametrize("outcome", [BOUNCED, DEFERRED])
@pytest.mark.parametrize(
    "apart", [timedelta(0), REPORT_WINDOW, REPORT_WINDOW + timedelta(seconds=1)]
)
async def test_report_waits_for_attempts_within_its_window_only(store, apart, outcome):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(settled(one, DEFERRED, wait=timedelta(hours=1)))
    await store.record(settled(two, DEFERRED, wait=timedelta(hours=1) + apart))
    later = NOW + timedelta(hours=1)
    [again] = [e for e in await store.claim_due(now=later, limit=9) if e.domain == one.domain]
    is_alone = apart > REPORT_WINDOW
    assert await store.record(holding(again, outcome, at=later)) is is_alone
    when = {"now": later, "pending_since": later - timedelta(minutes=5)}
    assert await due_reports(store, **when) == [one.message.queue_id] * is_alone
    for entry in await store.claim_due(now=later + apart, limit=9):
        await store.release(entry, due=later + apart)  # claimed or not
    assert await due_reports(store, **when) == [one.message.queue_id] * is_alone


async def test_report_does_not_wait_for_a_later_attempt_for_a_delayed_recipient(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    again = NOW + timedelta(minutes=5)
    [of_one] = await store.claim_due(now=again, limit=9)
    assert of_one.domain == "one.example"
    assert await store.record(holding(two, DEFERRED, at=again)) is True


async def test_delay_and_failure_are_pending_apart(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    await store.record(holding(two, BOUNCED))
    pending = await store.pending_report(one.message.queue_id)
    assert pending is not None
    assert [change.recipient.address for change in pending.delayed] == ["a@one.example"]
    assert [change.recipient.address for change in pending.done] == ["b@two.example"]
    await store.report(pending, [])
    item = await store.find_message(one.message.queue_id)
    assert item is not None
    assert item.recipients[0].delay_notified


@pytest.mark.parametrize(("then", "heard"), [(BOUNCED, [State.BOUNCED]), (DELIVERED, [])])
async def test_delay_that_is_over_is_not_reported(store, then, heard):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    [again] = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    result = holding(again, then)
    await store.record(result if heard else replace(result, pending=()))
    pending = await store.pending_report(one.message.queue_id)
    assert [state for _, state in reported(pending)] == heard
    assert pending is not None
    await store.report(pending, [])
    assert await store.pending_report(one.message.queue_id) is None


async def test_failure_during_the_report_of_its_delay_stays_pending(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    await store.record(settled(two, DELIVERED))
    being_told = await store.pending_report(one.message.queue_id)
    assert being_told is not None
    [again] = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    assert await store.record(holding(again, BOUNCED)) is True
    await store.report(being_told, [new_message("a@example.com", sender="")])
    assert reported(await store.pending_report(one.message.queue_id)) == [
        ("a@one.example", State.BOUNCED)
    ]
    assert await store.read_header(one.message.queue_id)


async def test_message_with_a_pending_report_is_removed_after_the_report(store):
    """The operator has parted them, so that one of them is owed a word of when all of them end at
    once.
    """
    [entry] = await entries_of(store, "a@one.example", "b@one.example")
    part = replace(entry, recipients=entry.recipients[:1])
    rest = replace(entry, recipients=entry.recipients[1:])
    await store.record(holding(part, DEFERRED))
    await store.release(rest, due=NOW)
    whole = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    assert [len(one.recipients) for one in whole] == [2]
    assert await store.record(settled(whole[0], BOUNCED)) is True
    pending = await store.pending_report(entry.message.queue_id)
    assert reported(pending) == []
    assert pending is not None
    await store.report(pending, [])
    assert not await is_listed(store)
    assert await due_reports(store, pending_since=NOW + timedelta(days=9)) == []


async def test_message_removed_by_the_operator_stays_until_its_report_is_sent(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(holding(two, DEFERRED))
    await store.change(QueueFilter(), verb="remove", now=NOW)
    assert await due_reports(store) == [one.message.queue_id]
    pending = await store.pending_report(one.message.queue_id)
    assert reported(pending) == [("a@one.example", State.BOUNCED)]
    assert pending is not None
    await store.report(pending, [])
    assert not await is_listed(store)


@pytest.mark.parametrize("last", [DELIVERED, DEFERRED])
async def test_result_without_a_report_makes_the_pending_report_due(store, last):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    assert await store.record(settled(two, last)) is True


async def test_no_report_is_due_where_none_is_pending(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    assert [await store.record(settled(entry, DELIVERED)) for entry in (one, two)] == [False, False]
    assert not await is_listed(store)


async def test_message_stays_until_its_report_is_sent(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(settled(two, DELIVERED))
    assert await is_listed(store)
    assert await store.read_header(one.message.queue_id)
    pending = await store.pending_report(one.message.queue_id)
    assert pending is not None
    dsn = new_message("a@example.com", sender="")
    await store.report(pending, [dsn])
    assert [e.message for e in await store.claim_due(now=NOW, limit=9)] == [dsn.message]
    [listed] = await store.list_messages(QueueFilter(), now=NOW)
    assert listed.queue_id == dsn.message.queue_id


async def test_pending_report_is_sent_once(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(settled(two, DEFERRED))
    pending = await store.pending_report(one.message.queue_id)
    assert pending is not None
    await store.report(pending, [])
    with pytest.raises(SpoolError):
        await store.report(pending, [new_message("a@example.com", sender="")])
    assert await store.claim_due(now=NOW, limit=9) == []
    assert await store.pending_report(one.message.queue_id) is None


async def test_pending_report_survives_a_restart_unchanged(engine):
    bounce = Bounced(
        "5.1.1",
        550,
        "no such user\nreally",
        "mx.one.example refused",
        hosts=("mx2.one.example: busy",),
        session=HopSession("mx.one.example", "192.0.2.1", tls=False),
    )
    async with engine.opened() as store:
        one, two, three = await entries_of(
            store, "a@one.example", "b@two.example", "c@three.example"
        )
        bounced, relayed = holding(one, bounce), holding(two, Delivered("2.0.0", 250, "OK"))
        deferred = holding(
            three, Deferred("4.2.1", 450, "busy", hosts=("mx2.three.example: busy",))
        )
        for settlement in (bounced, relayed, deferred):
            await store.record(settlement)
    async with engine.opened() as store:
        assert await due_reports(store) == [one.message.queue_id]
        pending = await store.pending_report(one.message.queue_id)
    assert pending == PendingReport(
        one.message, (*bounced.pending, *relayed.pending), deferred.pending
    )


async def test_report_does_not_wait_for_an_attempt_that_was_put_off(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.release(two, due=NOW + timedelta(hours=1))
    assert await due_reports(store) == [one.message.queue_id]


async def test_report_pending_for_too_long_does_not_wait_for_an_attempt(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    assert await due_reports(store, pending_since=NOW) == [one.message.queue_id]


async def test_report_pending_since_a_clock_that_was_ahead_is_due(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    before = NOW - timedelta(days=30)
    assert await due_reports(store, now=before, pending_since=before) == [one.message.queue_id]


@pytest.mark.parametrize("verb", ["hold", "remove"])
async def test_report_does_not_wait_for_a_held_or_removed_recipient(store, verb):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.release(two, due=NOW)
    await store.record(holding(one, BOUNCED))
    assert await due_reports(store) == []
    await store.change(QueueFilter(domain="two.example"), verb=verb, now=NOW)
    assert await due_reports(store) == [one.message.queue_id]
    assert reported(await store.pending_report(one.message.queue_id)) == [
        ("a@one.example", State.BOUNCED)
    ]


@pytest.mark.parametrize("seconds", [(1, 1, 1), (1, 30, 200), (100, 240, 0)])
async def test_message_without_success_gets_one_delay_notice_and_one_bounce(store, seconds):
    """Five days in three domains, whose attempts take as long as they take."""
    schedule, domains = RetrySchedule(), ("one.example", "two.example", "three.example")
    new = new_message(*(f"b@{domain}" for domain in domains))
    await store.accept(new)
    takes = {domain: timedelta(seconds=wait) for domain, wait in zip(domains, seconds, strict=True)}
    under_way: list[tuple[datetime, Entry]] = []
    heard: list[tuple[timedelta, ReportKind, int]] = []
    now = NOW
    while await is_listed(store):
        under_way += [(now + takes[e.domain], e) for e in await store.claim_due(now=now, limit=9)]
        due = await store.next_due()
        if not under_way or (due is not None and due < min(at for at, _ in under_way)):
            assert due is not None
            now = due
            continue
        now, entry = min(under_way, key=lambda one: one[0])
        under_way.remove((now, entry))
        settlement = settle(
            entry, dict.fromkeys(range(3), DEFERRED), schedule=schedule, now=now, has_others=True,
            jitter=jitter_of(entry.message.queue_id, entry.recipients[0].attempts),
        )  # fmt: skip
        if await store.record(settlement):
            pending = await store.pending_report(entry.message.queue_id)
            assert pending is not None
            reports = reports_about(pending.message, pending.changes, schedule=schedule, now=now)
            heard += [(now - NOW, report.kind, len(report.changes)) for report in reports]
            await store.report(pending, [])
    slowest = max(takes.values())
    assert [(kind, of) for _, kind, of in heard] == [
        (ReportKind.DELAYED, 3),
        (ReportKind.FAILED, 3),
    ]
    assert timedelta(hours=4) <= heard[0][0] <= timedelta(hours=4) + slowest
    assert timedelta(days=5) <= heard[1][0] <= timedelta(days=5) + slowest
