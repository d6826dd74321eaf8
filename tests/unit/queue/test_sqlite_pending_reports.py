"""What is owed to the sender of a message is kept until it is told: decided in the commits themselves."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from relay.mail.outcome import Bounced, Deferred, Delivered, HopSession, Outcome
from relay.queue.entry import Entry, State
from relay.queue.retry import RetrySchedule, jitter_of
from relay.queue.settle import ReportKind, Settlement, reports_about, settle
from relay.queue.sqlite import SqliteStore
from relay.queue.sqlite.disk import DATABASE
from relay.queue.sqlite.schema import MIGRATIONS
from relay.queue.store import PendingReport, QueueFilter, SpoolError
from tests.fakes.queued import BOUNCED, DEFERRED, DELIVERED, NOW, new_message, opened, settled

LONG_AGO = NOW - timedelta(minutes=5)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path, now=NOW, synchronous="OFF")
    yield opened
    await opened.close()


async def entries_of(store: SqliteStore, *recipients: str) -> list[Entry]:
    await store.accept(new_message(*recipients))
    return await store.claim_due(now=NOW, limit=100)


COMPANY = timedelta(minutes=4)


def holding(entry: Entry, outcome: Outcome, *, at: datetime = NOW) -> Settlement:
    """An attempt whose results, a deferral too, are reported later."""
    settlement = settled(entry, outcome, at=at)
    changes = tuple(
        change
        if change.recipient.state.is_final
        else replace(change, recipient=replace(change.recipient, delay_notified=True))
        for change in settlement.changes
    )
    return replace(settlement, changes=changes, pending=changes, report_after=at + COMPANY)


def told(debt: PendingReport | None) -> list[tuple[str, State]]:
    assert debt is not None
    return [(change.recipient.address, change.recipient.state) for change in debt.changes]


async def owing(store: SqliteStore, **when) -> list[str]:
    return await store.pending_reports(**{"now": NOW, "pending_since": LONG_AGO} | when)


async def is_listed(store: SqliteStore) -> bool:
    return bool(await store.list_messages(QueueFilter(), now=NOW))


async def test_the_last_entry_to_settle_is_the_one_that_reports(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    assert await store.record(holding(one, BOUNCED)) is False
    assert await owing(store) == []
    assert await store.record(holding(two, BOUNCED)) is True
    debt = await store.pending_report(one.message.queue_id)
    assert told(debt) == [("a@one.example", State.BOUNCED), ("b@two.example", State.BOUNCED)]


@pytest.mark.parametrize("outcome", [BOUNCED, DEFERRED])
async def test_of_entries_that_settle_at_the_same_moment_exactly_one_reports(store, outcome):
    for _ in range(5):
        entries = await entries_of(store, *(f"b@d{number}.example" for number in range(20)))
        answers = await asyncio.gather(
            *(store.record(holding(entry, outcome)) for entry in entries)
        )
        assert answers.count(True) == 1


@pytest.mark.parametrize("outcome", [BOUNCED, DEFERRED])
@pytest.mark.parametrize("apart", [timedelta(0), COMPANY, COMPANY + timedelta(seconds=1)])
async def test_a_report_waits_for_what_is_due_soon_and_for_nothing_else(store, apart, outcome):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(settled(one, DEFERRED, wait=timedelta(hours=1)))
    await store.record(settled(two, DEFERRED, wait=timedelta(hours=1) + apart))
    later = NOW + timedelta(hours=1)
    [again] = [e for e in await store.claim_due(now=later, limit=9) if e.domain == one.domain]
    is_alone = apart > COMPANY
    assert await store.record(holding(again, outcome, at=later)) is is_alone
    when = {"now": later, "pending_since": later - timedelta(minutes=5)}
    assert await owing(store, **when) == [one.message.queue_id] * is_alone
    for entry in await store.claim_due(now=later + apart, limit=9):
        await store.release(entry, due=later + apart)  # claimed or not
    assert await owing(store, **when) == [one.message.queue_id] * is_alone


async def test_who_is_delayed_is_not_waited_for_himself(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    again = NOW + timedelta(minutes=5)
    [of_one] = await store.claim_due(now=again, limit=9)
    assert of_one.domain == "one.example"
    assert await store.record(holding(two, DEFERRED, at=again)) is True


async def test_a_delay_and_a_failure_are_kept_apart(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    await store.record(holding(two, BOUNCED))
    debt = await store.pending_report(one.message.queue_id)
    assert debt is not None
    assert [change.recipient.address for change in debt.delayed] == ["a@one.example"]
    assert [change.recipient.address for change in debt.done] == ["b@two.example"]
    await store.report(debt, [])
    item = await store.find_message(one.message.queue_id)
    assert item is not None
    assert item.recipients[0].delay_notified


@pytest.mark.parametrize(("then", "heard"), [(BOUNCED, [State.BOUNCED]), (DELIVERED, [])])
async def test_a_delay_that_is_over_is_not_told(store, then, heard):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    [again] = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    result = holding(again, then)
    await store.record(result if heard else replace(result, pending=()))
    debt = await store.pending_report(one.message.queue_id)
    assert [state for _, state in told(debt)] == heard
    assert debt is not None
    await store.report(debt, [])
    assert await store.pending_report(one.message.queue_id) is None


async def test_what_fails_while_its_delay_is_being_told_is_told_then(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, DEFERRED))
    await store.record(settled(two, DELIVERED))
    being_told = await store.pending_report(one.message.queue_id)
    assert being_told is not None
    [again] = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    assert await store.record(holding(again, BOUNCED)) is True
    await store.report(being_told, [new_message("a@example.com", sender="")])
    assert told(await store.pending_report(one.message.queue_id)) == [
        ("a@one.example", State.BOUNCED)
    ]
    assert await store.read_header(one.message.queue_id)


async def test_a_message_whose_recipients_are_done_together_leaves_with_its_debts(store):
    """The operator has parted them, so that one of them is owed a word of when all of them end at once."""
    [entry] = await entries_of(store, "a@one.example", "b@one.example")
    part = replace(entry, recipients=entry.recipients[:1])
    rest = replace(entry, recipients=entry.recipients[1:])
    await store.record(holding(part, DEFERRED))
    await store.release(rest, due=NOW)
    whole = await store.claim_due(now=NOW + timedelta(minutes=5), limit=9)
    assert [len(one.recipients) for one in whole] == [2]
    assert await store.record(settled(whole[0], BOUNCED)) is True
    debt = await store.pending_report(entry.message.queue_id)
    assert told(debt) == []
    assert debt is not None
    await store.report(debt, [])
    assert not await is_listed(store)
    assert await owing(store, pending_since=NOW + timedelta(days=9)) == []


async def test_a_message_that_is_removed_stays_until_its_sender_is_told(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(holding(two, DEFERRED))
    await store.change(QueueFilter(), verb="remove", now=NOW)
    assert await owing(store) == [one.message.queue_id]
    debt = await store.pending_report(one.message.queue_id)
    assert told(debt) == [("a@one.example", State.BOUNCED)]
    assert debt is not None
    await store.report(debt, [])
    assert not await is_listed(store)


@pytest.mark.parametrize("last", [DELIVERED, DEFERRED])
async def test_who_owes_nothing_itself_reports_for_the_others(store, last):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    assert await store.record(settled(two, last)) is True


async def test_where_nothing_is_owed_nobody_reports(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    assert [await store.record(settled(entry, DELIVERED)) for entry in (one, two)] == [False, False]
    assert not await is_listed(store)


async def test_a_message_stays_until_its_sender_is_told_and_leaves_then(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(settled(two, DELIVERED))
    assert await is_listed(store)
    assert await store.read_header(one.message.queue_id)
    debt = await store.pending_report(one.message.queue_id)
    assert debt is not None
    dsn = new_message("a@example.com", sender="")
    await store.report(debt, [dsn])
    assert [e.message for e in await store.claim_due(now=NOW, limit=9)] == [dsn.message]
    [listed] = await store.list_messages(QueueFilter(), now=NOW)
    assert listed.queue_id == dsn.message.queue_id


async def test_a_debt_is_paid_once(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(settled(two, DEFERRED))
    debt = await store.pending_report(one.message.queue_id)
    assert debt is not None
    await store.report(debt, [])
    with pytest.raises(SpoolError):
        await store.report(debt, [new_message("a@example.com", sender="")])
    assert await store.claim_due(now=NOW, limit=9) == []
    assert await store.pending_report(one.message.queue_id) is None


async def test_a_debt_survives_and_is_as_it_was(tmp_path):
    said = Bounced(
        "5.1.1", 550, "no such user\nreally", "mx.one.example refused", hosts=("mx2.one.example: busy",),
        session=HopSession("mx.one.example", "192.0.2.1", tls=False),
    )  # fmt: skip
    store = await SqliteStore.open(tmp_path, now=NOW)
    one, two, three = await entries_of(store, "a@one.example", "b@two.example", "c@three.example")
    bounced, relayed = holding(one, said), holding(two, Delivered("2.0.0", 250, "OK"))
    deferred = holding(three, Deferred("4.2.1", 450, "busy", hosts=("mx2.three.example: busy",)))
    for settlement in (bounced, relayed, deferred):
        await store.record(settlement)
    await store.close()
    store = await SqliteStore.open(tmp_path, now=NOW)
    assert await owing(store) == [one.message.queue_id]
    debt = await store.pending_report(one.message.queue_id)
    await store.close()
    assert debt == PendingReport(
        one.message, (*bounced.pending, *relayed.pending), deferred.pending
    )


async def test_an_attempt_put_off_is_not_waited_for(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.release(two, due=NOW + timedelta(hours=1))
    assert await owing(store) == [one.message.queue_id]


async def test_a_first_attempt_that_takes_long_is_not_waited_for(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    assert await owing(store, pending_since=NOW) == [one.message.queue_id]


async def test_what_a_clock_ahead_held_has_waited_long_enough(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    before = NOW - timedelta(days=30)
    assert await owing(store, now=before, pending_since=before) == [one.message.queue_id]


@pytest.mark.parametrize("verb", ["hold", "remove"])
async def test_a_recipient_the_operator_took_out_is_not_waited_for(store, verb):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.release(two, due=NOW)
    await store.record(holding(one, BOUNCED))
    assert await owing(store) == []
    await store.change(QueueFilter(domain="two.example"), verb=verb, now=NOW)
    assert await owing(store) == [one.message.queue_id]
    assert told(await store.pending_report(one.message.queue_id)) == [
        ("a@one.example", State.BOUNCED)
    ]


async def test_what_an_older_relay_owed_is_still_owed(tmp_path):
    async with opened(tmp_path) as store:
        one, _ = await entries_of(store, "a@one.example", "b@two.example")
        await store.record(holding(one, BOUNCED))
    db = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
    db.execute("ALTER TABLE owed RENAME TO newer")
    db.execute(str(MIGRATIONS[1][0]))
    db.execute("INSERT INTO owed SELECT queue_id, idx, since, data FROM newer")
    db.execute("DROP TABLE newer")
    db.execute("PRAGMA user_version = 4")
    db.close()
    async with opened(tmp_path) as store:
        assert await owing(store) == []
        [two] = await store.claim_due(now=NOW, limit=9)
        assert await store.record(holding(two, BOUNCED)) is True
        states = [("a@one.example", State.BOUNCED), ("b@two.example", State.BOUNCED)]
        assert told(await store.pending_report(two.message.queue_id)) == states


@pytest.mark.parametrize("seconds", [(1, 1, 1), (1, 30, 200), (100, 240, 0)])
async def test_a_life_without_success_is_one_delay_notice_and_one_bounce(store, seconds):
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
            debt = await store.pending_report(entry.message.queue_id)
            assert debt is not None
            reports = reports_about(debt.message, debt.changes, schedule=schedule, now=now)
            heard += [(now - NOW, report.kind, len(report.changes)) for report in reports]
            await store.report(debt, [])
    slowest = max(takes.values())
    assert [(kind, of) for _, kind, of in heard] == [
        (ReportKind.DELAYED, 3),
        (ReportKind.FAILED, 3),
    ]
    assert timedelta(hours=4) <= heard[0][0] <= timedelta(hours=4) + slowest
    assert timedelta(days=5) <= heard[1][0] <= timedelta(days=5) + slowest
