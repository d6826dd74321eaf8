"""What is due is claimed once, fairly over the domains."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import timedelta

import pytest

from relay.mail.outcome import Deferred
from relay.queue.store import QueueFilter, SpoolError
from tests.fakes.queued import (
    BOUNCED,
    DEFERRED,
    DELIVERED,
    MINUTE,
    NOW,
    WAIT,
    claim_all,
    event,
    new_message,
    queue_ids,
    settled,
)
from tests.fakes.waiting import patient


async def test_entry_is_claimed_once(store):
    for _ in range(30):
        await store.accept(new_message())
    claims = await asyncio.gather(*(store.claim_due(now=NOW, limit=7) for _ in range(10)))
    claimed = [entry.message.queue_id for entries in claims for entry in entries]
    assert len(claimed) == len(set(claimed)) == 30


async def test_released_entry_is_due_at_the_given_time(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.release(entry, due=NOW + MINUTE)
    assert await store.next_due() == NOW + MINUTE
    assert await claim_all(store) == []
    [again] = await claim_all(store, now=NOW + MINUTE)
    assert again.message == entry.message
    assert again.recipients[0].attempts == 0


async def test_claim_is_released_once(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.release(entry, due=NOW)
    with pytest.raises(SpoolError):
        await store.release(entry, due=NOW)


async def test_entry_claimed_before_a_crash_is_due_at_once(store, engine):
    await store.accept(new_message())
    await store.accept(new_message("z@zz.example"))
    claimed = await claim_all(store)
    await store.record(settled(claimed[1], DEFERRED, at=NOW + MINUTE))
    await store.close()
    async with engine.opened() as again:
        [entry] = await claim_all(again)
        assert entry.message.queue_id == claimed[0].message.queue_id
        assert entry.recipients[0].attempts == 0


async def test_entry_not_yet_claimed_when_the_relay_stops_is_due_after_the_start(engine):
    async with engine.opened() as store:
        for _ in range(5):
            await store.accept(new_message())
    async with engine.opened() as store:
        assert len(await claim_all(store)) == 5


async def test_claim_of_a_cancelled_caller_is_due_again(store):
    for _ in range(5):
        await store.accept(new_message())
    for turns in range(12):
        claiming = asyncio.create_task(store.claim_due(now=NOW, limit=100))
        for _ in range(turns):
            await asyncio.sleep(0)
        claiming.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            for entry in await claiming:
                await store.release(entry, due=NOW)
        await store.counts()
    async with asyncio.timeout(patient(5)):
        found = await claim_all(store)
        while len(found) < 5:
            found += await claim_all(store)
            await asyncio.sleep(0.01)
    assert len({entry.message.queue_id for entry in found}) == 5


async def test_mail_deferred_by_a_clock_that_was_ahead_is_due_after_a_start(engine):
    ahead = NOW + timedelta(days=30)
    async with engine.opened(now=ahead) as store:
        await store.accept(new_message(arrived=ahead))
        await store.accept(new_message("z@zz.example", arrived=ahead))
        first, second = await claim_all(store, now=ahead)
        await store.record(settled(first, DEFERRED, at=ahead))
        await store.record(settled(second, DEFERRED, at=NOW))
    async with engine.opened(now=NOW, max_wait=timedelta(hours=4)) as store:
        [entry] = await claim_all(store, now=NOW)
        assert entry.message == first.message
        assert await store.next_due() == NOW + WAIT


async def test_dead_domain_with_many_messages_does_not_delay_another(store):
    for _ in range(300):
        await store.accept(new_message("x@dead.example"))
    await store.accept(new_message("y@alive.example"))
    entries = await store.claim_due(now=NOW, limit=10)
    assert "alive.example" in {entry.domain for entry in entries}


async def test_every_domain_has_its_turn_when_there_are_more_than_one_claim_takes(store):
    for number in range(60):
        for _ in range(5):
            await store.accept(new_message(f"x@d{number}.example"))
    seen: Counter[str] = Counter()
    for _ in range(12):
        entries = await store.claim_due(now=NOW, limit=10)
        seen.update(entry.domain for entry in entries)
    assert set(seen) == {f"d{number}.example" for number in range(60)}


async def test_claim_is_filled_from_one_domain_when_no_other_has_mail(store):
    for _ in range(50):
        await store.accept(new_message("x@big.example"))
    await store.accept(new_message("y@small.example"))
    assert len(await store.claim_due(now=NOW, limit=40)) == 40


async def test_claim_has_no_more_of_a_domain_than_its_limit(store):
    for _ in range(20):
        await store.accept(new_message("x@big.example"))
        await store.accept(new_message("y@small.example"))
    store.limit_domains(lambda domain: 3)
    entries = await store.claim_due(now=NOW, limit=30)
    assert Counter(entry.domain for entry in entries) == {"big.example": 3, "small.example": 3}


async def test_skipped_domain_is_not_claimed_and_not_due(store):
    await store.accept(new_message("x@dead.example"))
    await store.accept(new_message("y@alive.example", due=NOW + MINUTE))
    assert await claim_all(store, skip={"dead.example"}) == []
    assert await store.next_due(skip={"dead.example"}) == NOW + MINUTE
    assert await store.next_due(skip={"dead.example", "alive.example"}) is None
    due = await store.next_due()
    assert due is not None
    assert due <= NOW
    assert [entry.domain for entry in await claim_all(store)] == ["dead.example"]


async def test_claim_of_some_domains_takes_no_other(store):
    for domain in ("a.example", "b.example", "c.example"):
        await store.accept(new_message(f"x@{domain}"))
    some = await store.claim_due(now=NOW, limit=10, only=["c.example", "a.example"])
    assert sorted(entry.domain for entry in some) == ["a.example", "c.example"]
    assert await store.claim_due(now=NOW, limit=10, only=["a.example"]) == []
    assert [entry.domain for entry in await claim_all(store)] == ["b.example"]


async def test_claim_of_some_domains_takes_what_is_new_where_that_is_asked_for(store):
    await store.accept(new_message(*(f"x@many{n}.example" for n in range(30))))
    for domain in ("a.example", "b.example"):
        await store.accept(new_message(f"x@{domain}"))
    some = await store.claim_due(now=NOW, limit=40, only=["a.example"], with_new=True)
    # An engine without hand-off knows of nothing that is new.
    assert [entry.domain for entry in some] in (["a.example", "b.example"], ["a.example"])
    assert await store.claim_due(now=NOW, limit=40, only=["a.example"], with_new=True) == []
    assert len(await claim_all(store)) == 32 - len(some)


async def test_recipient_without_domain_is_served_like_any_other(store):
    """`postmaster` alone is an address (RFC 5321 §4.1.1.3)."""
    await store.accept(new_message("postmaster"))
    await store.accept(new_message())
    assert len(await claim_all(store)) == 2


async def test_claim_of_no_entries_takes_none(store):
    await store.accept(new_message())
    assert await store.claim_due(now=NOW, limit=0) == []


async def test_wait_for_work_returns_after_accept_release_and_change(store):
    async def announced() -> None:
        await asyncio.wait_for(store.wait_for_work(), patient(5))

    await store.accept(new_message())
    await announced()
    [entry] = await claim_all(store)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.wait_for_work(), 0.05)
    await store.release(entry, due=NOW)
    await announced()
    await store.change(QueueFilter(), verb="hold", now=NOW)
    await announced()


async def test_next_due_is_earlier_after_a_message_that_is_due_earlier(store):
    await store.accept(new_message(due=NOW + timedelta(hours=1)))
    assert await store.next_due() == NOW + timedelta(hours=1)
    await store.accept(new_message("y@alive.example", due=NOW + MINUTE))
    assert await store.next_due() == NOW + MINUTE


async def test_clients_deliveries_and_operator_at_once_lose_nothing_and_invent_nothing(store):
    """Acceptors, deliveries with all outcomes, and an operator, all at the same time."""
    accepted: set[str] = set()
    done: set[str] = set()

    async def client(number: int) -> None:
        for step in range(5):
            new = new_message(f"x@d{(number + step) % 7}.example", "y@other.example")
            await store.accept(new)
            accepted.add(new.message.queue_id)

    async def deliver() -> None:
        now = NOW
        while len(done) < 100:
            now += MINUTE
            for number, entry in enumerate(await store.claim_due(now=now, limit=9)):
                outcome = (DELIVERED, Deferred("4.4.1", 0, ""), BOUNCED, DELIVERED)[number % 4]
                await store.record(
                    settled(entry, outcome, at=now, wait=MINUTE),
                    events=[event("e", entry.message.queue_id, number=number)],
                )
            await asyncio.sleep(0)
            if len(accepted) == 100:
                done.update(accepted - set(await queue_ids(store)))

    async def operate() -> None:
        while len(done) < 100:
            for verb in ("hold", "release", "retry"):
                await store.change(QueueFilter(domain="d3.example"), verb=verb, now=NOW)
                await asyncio.sleep(0.005)
        await store.change(QueueFilter(), verb="release", now=NOW)

    await asyncio.gather(*(client(number) for number in range(20)), deliver(), deliver(), operate())
    assert done == accepted
    assert sum((await store.counts()).values()) == 0
