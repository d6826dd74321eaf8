"""What is owed to the sender of a message is kept until it is told: decided in the commits themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from relay.mail.outcome import Bounced, Delivered, HopSession, Outcome
from relay.queue.entry import Entry, State
from relay.queue.settle import Settlement
from relay.queue.sqlite import SqliteStore
from relay.queue.store import QueueFilter, SpoolError
from tests.fakes.queued import BOUNCED, DEFERRED, DELIVERED, NOW, new_message, settled

LONG_AGO = NOW - timedelta(minutes=5)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path, now=NOW, synchronous="OFF")
    yield opened
    await opened.close()


async def entries_of(store: SqliteStore, *recipients: str) -> list[Entry]:
    await store.accept(new_message(*recipients))
    return await store.claim_due(now=NOW, limit=100)


def holding(entry: Entry, outcome: Outcome) -> Settlement:
    """An attempt whose final results are reported later."""
    settlement = settled(entry, outcome)
    final = tuple(change for change in settlement.changes if change.recipient.state.is_final)
    return replace(settlement, held=final)


async def owing(store: SqliteStore, **when) -> list[str]:
    return await store.owing(**{"now": NOW, "held_before": LONG_AGO} | when)


async def is_listed(store: SqliteStore) -> bool:
    return bool(await store.list_messages(QueueFilter(), now=NOW))


async def test_the_last_entry_to_settle_is_the_one_that_reports(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    assert await store.record(holding(one, BOUNCED)) is False
    assert await owing(store) == []
    assert await store.record(holding(two, BOUNCED)) is True
    debt = await store.debt(one.message.queue_id)
    assert debt is not None
    assert [change.recipient.address for change in debt.changes] == ["a@one.example", "b@two.example"]


async def test_of_entries_that_settle_at_the_same_moment_exactly_one_reports(store):
    for _ in range(5):
        entries = await entries_of(store, *(f"b@d{number}.example" for number in range(20)))
        told = await asyncio.gather(*(store.record(holding(entry, BOUNCED)) for entry in entries))
        assert told.count(True) == 1


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
    debt = await store.debt(one.message.queue_id)
    assert debt is not None
    dsn = new_message("a@example.com", sender="")
    await store.report(debt, [dsn])
    assert [e.message for e in await store.claim_due(now=NOW, limit=9)] == [dsn.message]
    assert [i.message for i in await store.list_messages(QueueFilter(), now=NOW)] == [dsn.message]


async def test_a_debt_is_paid_once(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.record(settled(two, DEFERRED))
    debt = await store.debt(one.message.queue_id)
    assert debt is not None
    await store.report(debt, [])
    with pytest.raises(SpoolError):
        await store.report(debt, [new_message("a@example.com", sender="")])
    assert await store.claim_due(now=NOW, limit=9) == []
    assert await store.debt(one.message.queue_id) is None


async def test_a_debt_survives_and_is_as_it_was(tmp_path):
    said = Bounced(
        "5.1.1", 550, "no such user\nreally", "mx.one.example refused", hosts=("mx2.one.example: busy",),
        session=HopSession("mx.one.example", "192.0.2.1", tls=False, certificate_verified=False),
    )  # fmt: skip
    store = await SqliteStore.open(tmp_path, now=NOW)
    one, two, three = await entries_of(store, "a@one.example", "b@two.example", "c@three.example")
    bounced, relayed = holding(one, said), holding(two, Delivered("2.0.0", 250, "OK"))
    await store.record(bounced)
    await store.record(relayed)
    await store.record(settled(three, DEFERRED))
    await store.close()
    store = await SqliteStore.open(tmp_path, now=NOW)
    assert await owing(store) == [one.message.queue_id]
    debt = await store.debt(one.message.queue_id)
    await store.close()
    assert debt is not None
    assert debt.message == one.message
    assert debt.changes == (*bounced.held, *relayed.held)


async def test_an_attempt_put_off_is_not_waited_for(store):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    await store.release(two, due=NOW + timedelta(hours=1))
    assert await owing(store) == [one.message.queue_id]


async def test_a_first_attempt_that_takes_long_is_not_waited_for(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    assert await owing(store, held_before=NOW) == [one.message.queue_id]


async def test_what_a_clock_ahead_held_has_waited_long_enough(store):
    one, _ = await entries_of(store, "a@one.example", "b@two.example")
    await store.record(holding(one, BOUNCED))
    before = NOW - timedelta(days=30)
    assert await owing(store, now=before, held_before=before) == [one.message.queue_id]


@pytest.mark.parametrize("verb", ["hold", "remove"])
async def test_a_recipient_the_operator_took_out_is_not_waited_for(store, verb):
    one, two = await entries_of(store, "a@one.example", "b@two.example")
    await store.release(two, due=NOW)
    await store.record(holding(one, BOUNCED))
    assert await owing(store) == []
    await store.change(QueueFilter(domain="two.example"), verb=verb, now=NOW)
    assert await owing(store) == [one.message.queue_id]
    debt = await store.debt(one.message.queue_id)
    assert debt is not None
    assert [change.recipient.state for change in debt.changes] == [State.BOUNCED]
