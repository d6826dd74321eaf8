"""The operator's list and verbs."""

from __future__ import annotations

from datetime import timedelta

import pytest

from relay.mail.event import Event
from relay.queue.destinations import DestinationTally
from relay.queue.entry import QueuedMessage, QueuedRecipient, State
from relay.queue.rows import micros
from relay.queue.store import QueueFilter, SpoolError, Store
from tests.fakes.queued import (
    ALL,
    DEFERRED,
    DELIVERED,
    NOW,
    content_of,
    event,
    new_message,
    settled,
    some_messages,
)


async def claimed(store: Store) -> list[str]:
    return sorted(entry.message.queue_id for entry in await store.claim_due(now=NOW, limit=1000))


async def states(store: Store) -> list[State]:
    listed = await store.list_messages(ALL, now=NOW)
    return [one.state for item in listed for one in item.recipients]


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


async def test_queue_is_listed_in_pages_by_arrival(store, narrow_windows):
    ids = [f"q{number:03}" for number in range(50)]
    for queue_id in ids:
        await store.accept(new_message(queue_id=queue_id))
    found: list[str] = []
    while page := await store.list_messages(
        ALL, now=NOW, after=found[-1] if found else "", limit=13
    ):
        found += [item.queue_id for item in page]
    assert found == ids


@pytest.mark.parametrize(("wanted", "found"), FILTERS)
async def test_filter_finds_the_messages_that_match(store, wanted, found):
    await some_messages(store)
    assert [item.queue_id for item in await store.list_messages(wanted, now=NOW)] == found


@pytest.mark.parametrize(("wanted", "found"), FILTERS)
async def test_verb_changes_the_messages_that_a_list_shows_and_no_other(store, wanted, found):
    await some_messages(store)
    await store.change(wanted, verb="remove", now=NOW)
    left = await store.list_messages(ALL, now=NOW)
    expected = {"q0", "q1", "q2", "q3"} - set(found)
    if wanted.domain and "q1" in found:
        expected.add("q1")  # its other recipient stays
    assert {item.queue_id for item in left} == expected


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


async def test_retry_makes_deferred_mail_due_at_once(store):
    await store.accept(new_message())
    [entry] = await store.claim_due(now=NOW, limit=10)
    await store.record(settled(entry, DEFERRED, wait=timedelta(hours=4)))
    assert await claimed(store) == []
    assert (await store.change(ALL, verb="retry", now=NOW)).changed == 1
    [entry] = await store.claim_due(now=NOW, limit=10)
    assert entry.recipients[0].attempts == 1


async def test_retry_does_not_release_held_mail(store):
    await store.accept(new_message(state=State.HELD))
    assert (await store.change(ALL, verb="retry", now=NOW)).changed == 0
    assert await states(store) == [State.HELD]


async def test_removed_mail_is_gone_and_its_events_stay(store):
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
    assert [stored.event.id for stored in await store.events_after(0)] == [told[0].id]
    assert (await store.change(ALL, verb="remove", now=NOW, event_of=tell)).changed == 1
    assert await states(store) == []
    assert [stored.event.id for stored in await store.events_after(0)] == [each.id for each in told]
    with pytest.raises(SpoolError):
        await content_of(store, queue_id)


async def test_verb_does_not_change_a_recipient_in_a_final_state(store):
    await store.accept(new_message("a@one.example", "b@one.example"))
    [entry] = await store.claim_due(now=NOW, limit=10)
    await store.record(settled(entry, DELIVERED, DEFERRED))
    for verb in ("hold", "release", "retry", "remove"):
        assert (
            await store.change(QueueFilter(state=State.DELIVERED), verb=verb, now=NOW)
        ).changed == 0


@pytest.mark.parametrize("verb", ["hold", "remove", "retry"])
async def test_verb_does_not_change_a_recipient_that_is_being_tried(store, verb):
    """Whether the next hop has taken it is not known yet: it can be neither kept back nor taken
    back.
    """
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


async def test_removed_recipient_leaves_those_of_its_message_that_are_tried_or_held(store):
    await store.accept(new_message("a@one.example", "b@two.example", "c@three.example"))
    [entry] = await store.claim_due(now=NOW, limit=1)
    held = "three.example" if entry.domain != "three.example" else "two.example"
    await store.change(QueueFilter(domain=held), verb="hold", now=NOW)
    deferred = QueueFilter(state=State.QUEUED)
    assert (await store.change(deferred, verb="remove", now=NOW)).changed == 1
    assert sorted(await states(store)) == [State.HELD, State.QUEUED, State.REMOVED]
    await store.record(settled(entry, DELIVERED))
    assert sorted(await states(store)) == [State.DELIVERED, State.HELD, State.REMOVED]
    assert (await store.change(ALL, verb="remove", now=NOW)).changed == 1
    assert await states(store) == []


async def test_unknown_verb_is_refused(store):
    with pytest.raises(SpoolError):
        await store.change(ALL, verb="explode", now=NOW)


async def test_queue_is_counted_by_destination(store, monkeypatch):
    for engine in ("sqlite", "postgres"):
        monkeypatch.setattr(f"relay.queue.{engine}.destinations._WINDOW", 2)
    await some_messages(store)
    for entry in await store.claim_due(now=NOW, limit=100):
        if entry.domain == "one.example":
            await store.record(settled(entry, DEFERRED))
    tally, after = DestinationTally(), ""
    while after is not None:
        parts, after = await store.count_destinations(after)
        tally.add(parts)
    one, two, three = tally.destinations
    assert (one.domain, one.deferred, one.total, one.oldest) == ("one.example", 2, 2, "q0")
    assert one.last is not None
    assert one.last[1:] == (450, "4.2.1", "mailbox busy", "mx.example.net")
    assert one.due == micros(NOW + timedelta(minutes=5))
    assert (two.domain, two.queued, two.trying, two.last) == ("two.example", 2, 2, None)
    assert (three.domain, three.held) == ("three.example", 1)
