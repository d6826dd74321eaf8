"""How a message is taken in, kept, settled and removed."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest

from relay.queue.entry import Entry, State, Terms
from relay.queue.store import (
    CHUNK_BYTES,
    STAGE_BYTES,
    EventFilter,
    NewMessage,
    QueueFilter,
    SpoolError,
)
from relay.report import deliverylog
from tests.fakes import mail
from tests.fakes.queued import (
    BOUNCED,
    CONTENT,
    DEFERRED,
    DELIVERED,
    MINUTE,
    NOW,
    WAIT,
    claim_all,
    content_of,
    event,
    new_message,
    queue_ids,
    settled,
)


def _message(queue_id: str, sender: str, **terms) -> NewMessage:
    one = mail.entry(reverse_path=sender)
    message = replace(one.message, queue_id=queue_id, terms=Terms(**terms))
    return NewMessage(
        message,
        one.recipients,
        mail.CONTENT,
        events=(deliverylog.accepted(message, one.recipients),),
    )


async def test_accepted_message_is_claimed_as_it_was_given(store):
    new = new_message("b@example.net", "c@example.net")
    await store.accept(new)
    [entry] = await claim_all(store)
    assert entry.message == new.message
    assert [one.address for one in entry.recipients] == ["b@example.net", "c@example.net"]
    assert entry.settings == new.recipients[0].settings
    assert entry.total == 2
    assert await content_of(store, new.message.queue_id) == CONTENT


async def test_message_is_one_entry_for_each_domain(store):
    await store.accept(new_message("a@one.example", "b@two.example", "c@one.example"))
    entries = await claim_all(store)
    by_domain = {entry.domain: [one.index for one in entry.recipients] for entry in entries}
    assert by_domain == {"one.example": [0, 2], "two.example": [1]}
    assert {entry.total for entry in entries} == {3}


@pytest.mark.parametrize(
    "size", [0, 1, 65536, 65537, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, STAGE_BYTES + 1]
)
async def test_content_of_any_size_is_read_back_whole(store, size):
    content = os.urandom(size)
    new = new_message(content=content)
    await store.accept(new)
    pieces = [piece async for piece in store.read_content(new.message.queue_id)]
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)


@pytest.mark.parametrize("size", [5, CHUNK_BYTES, CHUNK_BYTES + 7, STAGE_BYTES])
async def test_staged_content_and_the_rest_are_read_back_in_order(store, size):
    pieces = [os.urandom(size) for _ in range(3)]
    new = new_message(content=b"the rest", staged_bytes=3 * size)
    for number, piece in enumerate(pieces):
        await store.stage(new.message.queue_id, number * size, piece)
    await store.accept(new)
    found = [piece async for piece in store.read_content(new.message.queue_id)]
    assert b"".join(found) == b"".join(pieces) + b"the rest"
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in found)


async def test_piece_out_of_order_is_refused(store):
    await store.stage("q", 0, b"x" * 100)
    with pytest.raises(SpoolError, match="before octet 50"):
        await store.stage("q", 50, b"x")
    with pytest.raises(SpoolError, match="another message has this queue id"):
        await store.stage("q", 0, b"x")


async def test_piece_of_more_than_stage_bytes_is_refused(store):
    with pytest.raises(SpoolError):
        await store.stage("q", 0, b"x" * (STAGE_BYTES + 1))


async def test_discard_of_an_accepted_message_does_not_harm_it(store):
    new = new_message(content=b"the rest", staged_bytes=CHUNK_BYTES)
    queue_id = new.message.queue_id
    await store.stage(queue_id, 0, b"x" * CHUNK_BYTES)
    accepting = asyncio.create_task(store.accept(new))
    await asyncio.sleep(0)
    accepting.cancel()
    await store.discard(queue_id)
    while not await queue_ids(store):
        await asyncio.sleep(0.01)
    await store.discard(queue_id)
    await store.stage("another", 0, b"x")
    assert len(await content_of(store, queue_id)) == CHUNK_BYTES + len(b"the rest")


async def test_queue_id_in_use_is_refused_and_other_messages_of_the_commit_are_not(store):
    first = new_message()
    await store.accept(first)
    good = [new_message() for _ in range(20)]
    results = await asyncio.gather(
        *(store.accept(new) for new in [*good[:10], first, *good[10:]]), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [SpoolError]
    assert await queue_ids(store) == sorted(new.message.queue_id for new in [first, *good])
    assert len(await claim_all(store)) == 21


async def test_message_is_kept_when_its_client_goes_away(store):
    """RFC 1047: when in doubt, keep it."""
    accepting = [asyncio.create_task(store.accept(new_message())) for _ in range(50)]
    await asyncio.sleep(0)
    for task in accepting[::2]:
        task.cancel()
    results = await asyncio.gather(*accepting, return_exceptions=True)
    assert any(isinstance(result, asyncio.CancelledError) for result in results)
    await store.accept(new_message())
    assert len(await queue_ids(store)) == 51
    assert len(await claim_all(store)) == 51


async def test_result_is_recorded_when_the_attempt_is_cancelled(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    recording = asyncio.create_task(store.record(settled(entry, DELIVERED)))
    await asyncio.sleep(0)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    await store.accept(new_message())
    assert await queue_ids(store) != [entry.message.queue_id]
    assert len(await queue_ids(store)) == 1


async def test_message_for_later_is_due_later(store):
    await store.accept(new_message(due=NOW + MINUTE))
    assert await claim_all(store) == []
    assert await store.next_due() == NOW + MINUTE
    assert len(await claim_all(store, now=NOW + MINUTE)) == 1


async def test_message_accepted_as_held_waits_for_the_operator(store):
    await store.accept(new_message(state=State.HELD))
    assert await claim_all(store, now=NOW + timedelta(days=9)) == []
    assert await store.next_due() is None
    await store.change(QueueFilter(), verb="release", now=NOW)
    [entry] = await claim_all(store)
    assert entry.recipients[0].state is State.QUEUED


async def test_message_is_removed_with_its_last_recipient_and_its_events_stay(store):
    new = new_message("a@one.example", "b@two.example", content=b"x" * 200_000)
    queue_id = new.message.queue_id
    await store.accept(new)
    first, second = await claim_all(store)
    await store.record(
        settled(first, DELIVERED), events=[event("delivered", queue_id, "a@one.example")]
    )
    [item] = await store.list_messages(QueueFilter(), now=NOW)
    assert [one.state for one in item.recipients] == [State.DELIVERED, State.QUEUED]
    await store.record(
        settled(second, BOUNCED), events=[event("failed", queue_id, "b@two.example")]
    )
    assert await queue_ids(store) == []
    assert len(await store.find_events(EventFilter())) == 2
    assert sum((await store.counts()).values()) == 0
    with pytest.raises(SpoolError):
        await content_of(store, queue_id)


async def test_recipients_of_one_domain_may_have_different_results(store):
    await store.accept(new_message("a@one.example", "b@one.example", "c@one.example"))
    [entry] = await claim_all(store)
    await store.record(settled(entry, DELIVERED, DEFERRED, BOUNCED))
    [item] = await store.list_messages(QueueFilter(), now=NOW)
    assert [one.state for one in item.recipients] == [
        State.DELIVERED,
        State.DEFERRED,
        State.BOUNCED,
    ]
    [entry] = await claim_all(store, now=NOW + WAIT)
    assert [one.index for one in entry.recipients] == [1]
    await store.record(settled(entry, DELIVERED))
    assert await queue_ids(store) == []


async def test_deferred_recipient_keeps_its_last_attempt(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    settlement = settled(entry, DEFERRED)
    await store.record(settlement)
    assert await claim_all(store, now=NOW + WAIT - timedelta(microseconds=1)) == []
    [entry] = await claim_all(store, now=NOW + WAIT)
    assert entry.recipients == (settlement.changes[0].recipient,)


async def test_result_without_a_claim_changes_nothing(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.record(settled(entry, DEFERRED))
    for again in (settled(entry, DELIVERED), settled(entry, DEFERRED)):
        with pytest.raises(SpoolError, match="not claimed"):
            await store.record(again, events=[event("delivered", entry.message.queue_id)])
    assert await store.find_events(EventFilter()) == []
    assert len(await queue_ids(store)) == 1


async def test_result_for_some_recipients_never_removes_the_message_of_the_others(store):
    await store.accept(new_message("a@one.example", "b@two.example"))
    [one, _] = await claim_all(store)
    wrong = Entry(one.message, one.recipients, total=1)
    with pytest.raises(SpoolError):
        await store.record(settled(wrong, DELIVERED))
    assert len(await queue_ids(store)) == 1


async def test_dsn_is_accepted_in_the_commit_of_its_result(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    dsn = new_message("a@example.com", sender="", content=b"report")
    told = event("accepted", dsn.message.queue_id)
    report = NewMessage(dsn.message, dsn.recipients, dsn.content, events=(told,))
    await store.record(settled(entry, BOUNCED), reports=[report], events=[event("failed", "x")])
    [entry] = await claim_all(store)
    assert entry.message == dsn.message
    assert Counter(one.event.name for one in await store.find_events(EventFilter())) == {
        "accepted": 1,
        "failed": 1,
    }


async def test_dsn_that_cannot_be_stored_undoes_the_result(store):
    taken = new_message()
    await store.accept(taken)
    await store.accept(new_message("z@zz.example"))
    one, two = await claim_all(store)
    with pytest.raises(SpoolError):
        await store.record(settled(one, BOUNCED), reports=[taken], events=[event("failed", "x")])
    assert len(await queue_ids(store)) == 2
    assert await store.find_events(EventFilter()) == []
    await store.record(settled(one, BOUNCED))
    await store.record(settled(two, BOUNCED))
    assert await queue_ids(store) == []


async def test_recipients_are_counted_by_state(store):
    await store.accept(new_message("a@one.example", "b@two.example", "c@three.example"))
    await store.accept(new_message(state=State.HELD))
    assert await store.counts() == {State.QUEUED: 3, State.DEFERRED: 0, State.HELD: 1}
    first, *_ = await claim_all(store)
    await store.record(settled(first, DEFERRED))
    assert await store.counts() == {State.QUEUED: 2, State.DEFERRED: 1, State.HELD: 1}
    await store.change(QueueFilter(state=State.DEFERRED), verb="hold", now=NOW)
    assert await store.counts() == {State.QUEUED: 2, State.DEFERRED: 0, State.HELD: 2}


async def test_recipients_are_counted_after_a_start_as_before(engine):
    async with engine.opened() as store:
        for number in range(10):
            await store.accept(new_message(f"b@example{number}.net"))
        for entry in (await claim_all(store))[:6]:
            await store.record(settled(entry, DEFERRED if entry.domain < "example3" else DELIVERED))
        before = await store.counts()
    async with engine.opened() as store:
        assert await store.counts() == before


@pytest.mark.parametrize(
    ("content", "header"),
    [
        (CONTENT, CONTENT[:-6]),
        (b"\r\nno header\r\n", b"\r\n"),
        (b"Subject: no body\r\n", b"Subject: no body\r\n"),
        (b"", b""),
        (b"A: " + b"x" * 600_000 + b"\r\n\r\nbody", (b"A: " + b"x" * 600_000)[:CHUNK_BYTES]),
        (
            b"A: " + b"x" * (CHUNK_BYTES - 6) + b"\r\n\r\nbody",
            b"A: " + b"x" * (CHUNK_BYTES - 6) + b"\r\n\r",
        ),
    ],
)
async def test_header_is_read_up_to_its_empty_line_within_the_limit(store, content, header):
    new = new_message(content=content)
    await store.accept(new)
    assert await store.read_header(new.message.queue_id) == header


async def test_header_longer_than_a_piece_is_read_to_its_end(store):
    header = b"A: " + b"x" * (CHUNK_BYTES - 5) + b"\r\n\r\n"
    new = new_message(content=header + b"body" * 100_000)
    await store.accept(new)
    assert await store.read_header(new.message.queue_id, limit_bytes=2 * CHUNK_BYTES) == header


async def test_message_in_test_mode_leaves_its_event_and_nothing_else(store):
    new = _message("Q1", "a@a.example", is_test=True)
    done = tuple(
        type(one)(0, one.address, one.domain, one.settings, state=State.DELIVERED)
        for one in new.recipients
    )
    await store.accept(NewMessage(new.message, done, CONTENT, events=new.events))
    assert await store.claim_due(now=mail.ARRIVED, limit=10) == []
    assert await store.list_messages(QueueFilter(), now=mail.ARRIVED) == []
    assert len(await store.events_after(0)) == 1
    assert set((await store.counts()).values()) == {0}


async def test_large_dsn_is_accepted_in_the_commit_of_its_result(store):
    """A bounce may have all of the message in it (RET=FULL, RFC 3461)."""
    await store.accept(new_message())
    [entry] = await claim_all(store)
    report = new_message(sender="", content=b"Subject: x\r\n\r\n" + b"y" * 200_000, origin="dsn")
    await store.record(settled(entry, BOUNCED), reports=[report])
    assert len(await content_of(store, report.message.queue_id)) == 200_014
