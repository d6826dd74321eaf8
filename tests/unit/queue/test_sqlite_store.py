"""What the SQLite store promises about messages: taken in, claimed, settled, read, gone."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from relay.admin.operations import item_as_json, page_as_json
from relay.mail.outcome import Deferred
from relay.queue.entry import Entry, State
from relay.queue.handoff import HandOffLimits
from relay.queue.sqlite import SqliteStore, disk
from relay.queue.store import CHUNK_BYTES, EventFilter, NewMessage, QueueFilter, SpoolError
from tests.fakes.queued import (
    BOUNCED,
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

NO_HANDOFF = HandOffLimits(entries=0)
MINUTE = timedelta(minutes=1)
WAIT = timedelta(minutes=5)


# By memory and by disk an entry is claimed alike; so most tests run both ways.
@pytest.fixture(params=["by memory", "by disk"])
async def store(request, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    limits = HandOffLimits() if request.param == "by memory" else NO_HANDOFF
    async with opened(tmp_path / "spool", limits=limits) as store:
        yield store


async def claim_all(store: SqliteStore, *, now=NOW, **options) -> list[Entry]:
    entries: list[Entry] = []
    while more := await store.claim_due(now=now, limit=100, **options):
        entries += more
    return entries


async def queue_ids(store: SqliteStore, **wanted) -> list[str]:
    return [item.queue_id for item in await store.list_messages(QueueFilter(**wanted), now=NOW)]


def rows_of(directory: Path) -> dict[str, int]:
    """How many rows each table has."""
    with contextlib.closing(
        sqlite3.connect(f"file:{directory / 'spool' / 'queue.db'}?mode=ro", uri=True)
    ) as db:
        tables = ("message", "recipient", "event")
        return {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables
        }


def files_of(directory: Path) -> set[str]:
    """The messages whose content lies in a file."""
    return set(os.listdir(directory / "spool" / "content"))


async def files_become(directory: Path, wanted: set[str]) -> None:
    """Files are removed on a thread of their own."""
    async with asyncio.timeout(5):
        while files_of(directory) != wanted:
            await asyncio.sleep(0.01)


# Taking in.


async def test_a_message_accepted_is_claimed_as_it_was_given(store):
    new = new_message("b@example.net", "c@example.net")
    await store.accept(new)
    [entry] = await claim_all(store)
    assert entry.message == new.message
    assert [one.address for one in entry.recipients] == ["b@example.net", "c@example.net"]
    assert entry.settings == new.recipients[0].settings
    assert entry.total == 2
    assert await content_of(store, new.message.queue_id) == CONTENT


async def test_small_content_is_at_hand_when_it_was_just_accepted(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(content=b"x" * 65536))
        await store.accept(new_message(content=b"x" * 65537))
        await store.accept(new_message(content=b"x" * (CHUNK_BYTES + 1)))
        assert [len(entry.content or b"") for entry in await claim_all(store)] == [65536, 0, 0]


async def test_each_domain_of_a_message_is_an_entry_of_its_own(store):
    await store.accept(new_message("a@one.example", "b@two.example", "c@one.example"))
    entries = await claim_all(store)
    by_domain = {entry.domain: [one.index for one in entry.recipients] for entry in entries}
    assert by_domain == {"one.example": [0, 2], "two.example": [1]}
    assert {entry.total for entry in entries} == {3}


@pytest.mark.parametrize(
    "size", [0, 1, 65536, 65537, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]
)
async def test_content_comes_back_whole_whatever_its_size(store, size):
    content = os.urandom(size)
    new = new_message(content=content)
    await store.accept(new)
    pieces = [piece async for piece in store.read_content(new.message.queue_id)]
    assert b"".join(pieces) == content
    assert all(0 < len(piece) <= CHUNK_BYTES for piece in pieces)


async def test_content_staged_before_and_the_rest_come_back_in_order(store):
    pieces = [os.urandom(CHUNK_BYTES) for _ in range(3)]
    new = new_message(content=b"the rest", staged_bytes=3 * CHUNK_BYTES)
    for number, piece in enumerate(pieces):
        await store.stage(new.message.queue_id, number * CHUNK_BYTES, piece)
    await store.accept(new)
    assert await content_of(store, new.message.queue_id) == b"".join(pieces) + b"the rest"


@pytest.mark.parametrize("staged", [0, CHUNK_BYTES])
async def test_a_message_whose_staged_content_is_not_there_is_refused(store, tmp_path, staged):
    new = new_message(content=b"the rest", staged_bytes=2 * CHUNK_BYTES)
    if staged:
        await store.stage(new.message.queue_id, 0, b"x" * staged)
    with pytest.raises(SpoolError, match=f"before octet {2 * CHUNK_BYTES}"):
        await store.accept(new)
    assert await queue_ids(store) == []
    await files_become(tmp_path, set())


async def test_pieces_out_of_order_are_refused(store):
    await store.stage("q", 0, b"x" * 100)
    with pytest.raises(SpoolError, match="before octet 50"):
        await store.stage("q", 50, b"x")
    with pytest.raises(SpoolError, match="another message has this queue id"):
        await store.stage("q", 0, b"x")


async def test_a_piece_larger_than_agreed_is_refused(store):
    with pytest.raises(SpoolError):
        await store.stage("q", 0, b"x" * (CHUNK_BYTES + 1))


async def test_what_is_discarded_leaves_nothing(store, tmp_path):
    await store.stage("q", 0, b"x" * CHUNK_BYTES)
    assert files_of(tmp_path) == {"q"}
    await store.discard("q")
    await files_become(tmp_path, set())


async def test_discarding_an_accepted_message_does_it_no_harm(store):
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


async def test_pieces_without_a_message_are_gone_after_a_start(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for number in range(50):
            await store.stage(f"never-accepted-{number}", 0, b"x")
        new = new_message(content=b"the rest", staged_bytes=CHUNK_BYTES)
        await store.stage(new.message.queue_id, 0, b"x" * CHUNK_BYTES)
        await store.accept(new)
    async with opened(tmp_path / "spool") as store:
        assert files_of(tmp_path) == {new.message.queue_id}
        assert len(await content_of(store, new.message.queue_id)) == CHUNK_BYTES + len(b"the rest")


async def test_large_content_leaves_with_its_message(store, tmp_path):
    content = b"x" * (CHUNK_BYTES + 1)
    for queue_id in ("delivered", "partly", "removed", "stays"):
        recipients = ["b@one.example"] + ["c@two.example"] * (queue_id == "partly")
        await store.accept(new_message(*recipients, queue_id=queue_id, content=content))
    entries = {(one.message.queue_id, one.domain): one for one in await claim_all(store)}
    await store.record(settled(entries["delivered", "one.example"], DELIVERED))
    await store.record(settled(entries["partly", "one.example"], DELIVERED))
    await files_become(tmp_path, {"partly", "removed", "stays"})
    await store.record(settled(entries["partly", "two.example"], DELIVERED))
    await store.release(entries["removed", "one.example"], due=NOW)
    await store.change(QueueFilter(queue_ids=frozenset({"removed"})), verb="remove", now=NOW)
    await files_become(tmp_path, {"stays"})
    assert await content_of(store, "stays") == content


async def test_a_message_that_could_not_be_committed_leaves_no_file(store, tmp_path):
    bad = new_message(sender="\udce9@example.com", content=b"x" * (CHUNK_BYTES + 1))
    with pytest.raises(SpoolError):
        await store.accept(bad)
    await files_become(tmp_path, set())


async def test_large_mail_refused_in_trouble_leaves_no_file_when_that_is_over(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(disk, "_BUSY_WAIT_MS", 50)
    async with opened(tmp_path / "spool") as store:
        content = b"x" * (CHUNK_BYTES + 1)
        other = sqlite3.connect(tmp_path / "spool" / "queue.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with pytest.raises(SpoolError, match="locked"):
                await store.accept(new_message(content=content))
        assert len(files_of(tmp_path)) == 3, "who can say that they were not committed?"
        other.close()
        await store.accept(new_message())
        await files_become(tmp_path, set())


async def test_a_file_that_cannot_be_removed_is_removed_with_the_next(
    store, tmp_path, monkeypatch, caplog
):
    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for queue_id in ("q1", "q2"):
        await store.stage(queue_id, 0, b"x" * CHUNK_BYTES)
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", read_only)
        await store.discard("q1")
        async with asyncio.timeout(5):
            while "q1: could not remove its content yet" not in caplog.text:
                await asyncio.sleep(0.01)
    await store.discard("q2")
    await files_become(tmp_path, set())


async def test_what_leaves_in_a_part_of_a_commit_that_is_undone_keeps_its_file(store, tmp_path):
    content = b"x" * (CHUNK_BYTES + 1)
    await store.accept(new_message(queue_id="q1", content=content))
    [entry] = await claim_all(store)
    with pytest.raises(SpoolError):
        await store.record(settled(entry, DELIVERED), events=[event("delivered", "q1", "\udce9")])
    await store.accept(new_message(queue_id="q2"))
    assert await content_of(store, "q1") == content


async def test_a_queue_id_taken_twice_is_refused_and_the_others_in_the_batch_are_not(store):
    first = new_message()
    await store.accept(first)
    good = [new_message() for _ in range(20)]
    results = await asyncio.gather(
        *(store.accept(new) for new in [*good[:10], first, *good[10:]]), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [SpoolError]
    assert await queue_ids(store) == sorted(new.message.queue_id for new in [first, *good])
    assert len(await claim_all(store)) == 21


async def test_what_cannot_be_stored_is_refused_alone(store):
    surrogate = new_message(sender="\udce9@example.com")
    results = await asyncio.gather(
        store.accept(new_message()),
        store.accept(surrogate),
        store.accept(new_message()),
        return_exceptions=True,
    )
    assert [type(result) for result in results if result is not None] == [SpoolError]
    assert len(await claim_all(store)) == 2


async def test_a_client_that_goes_away_does_not_undo_a_message(store):
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


async def test_a_result_is_recorded_though_nobody_waits_for_it(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    recording = asyncio.create_task(store.record(settled(entry, DELIVERED)))
    await asyncio.sleep(0)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    await store.accept(new_message())
    assert await queue_ids(store) != [entry.message.queue_id]
    assert len(await queue_ids(store)) == 1


async def test_a_message_for_later_is_due_later(store):
    await store.accept(new_message(due=NOW + MINUTE))
    assert await claim_all(store) == []
    assert await store.next_due() == NOW + MINUTE
    assert len(await claim_all(store, now=NOW + MINUTE)) == 1


async def test_a_message_that_is_held_from_the_start_waits_for_the_operator(store):
    await store.accept(new_message(state=State.HELD))
    assert await claim_all(store, now=NOW + timedelta(days=9)) == []
    assert await store.next_due() is None
    await store.change(QueueFilter(), verb="release", now=NOW)
    [entry] = await claim_all(store)
    assert entry.recipients[0].state is State.QUEUED


# Settling.


async def test_a_message_leaves_with_its_last_recipient_and_its_events_stay(store, tmp_path):
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
    assert rows_of(tmp_path) == {"message": 0, "recipient": 0, "event": 2}
    assert sum((await store.counts()).values()) == 0
    with pytest.raises(SpoolError):
        await content_of(store, queue_id)


async def test_recipients_of_one_domain_may_end_differently(store):
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


async def test_a_deferred_recipient_remembers_its_last_attempt(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    settlement = settled(entry, DEFERRED)
    await store.record(settlement)
    assert await claim_all(store, now=NOW + WAIT - timedelta(microseconds=1)) == []
    [entry] = await claim_all(store, now=NOW + WAIT)
    assert entry.recipients == (settlement.changes[0].recipient,)


async def test_a_settlement_without_a_claim_changes_nothing(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.record(settled(entry, DEFERRED))
    for again in (settled(entry, DELIVERED), settled(entry, DEFERRED)):
        with pytest.raises(SpoolError, match="not claimed"):
            await store.record(again, events=[event("delivered", entry.message.queue_id)])
    assert await store.find_events(EventFilter()) == []
    assert len(await queue_ids(store)) == 1


async def test_a_settlement_of_some_recipients_never_takes_the_message_from_the_others(store):
    await store.accept(new_message("a@one.example", "b@two.example"))
    [one, _] = await claim_all(store)
    wrong = Entry(one.message, one.recipients, total=1)
    with pytest.raises(SpoolError):
        await store.record(settled(wrong, DELIVERED))
    assert len(await queue_ids(store)) == 1


async def test_a_dsn_is_accepted_with_the_result_it_tells_of(store):
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


async def test_a_dsn_that_cannot_be_stored_undoes_the_result_too(store):
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


async def test_states_are_counted(store):
    await store.accept(new_message("a@one.example", "b@two.example", "c@three.example"))
    await store.accept(new_message(state=State.HELD))
    assert await store.counts() == {State.QUEUED: 3, State.DEFERRED: 0, State.HELD: 1}
    first, *_ = await claim_all(store)
    await store.record(settled(first, DEFERRED))
    assert await store.counts() == {State.QUEUED: 2, State.DEFERRED: 1, State.HELD: 1}
    await store.change(QueueFilter(state=State.DEFERRED), verb="hold", now=NOW)
    assert await store.counts() == {State.QUEUED: 2, State.DEFERRED: 0, State.HELD: 2}


async def test_states_are_counted_after_a_start_as_before(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for number in range(10):
            await store.accept(new_message(f"b@example{number}.net"))
        for entry in (await claim_all(store))[:6]:
            await store.record(settled(entry, DEFERRED if entry.domain < "example3" else DELIVERED))
        before = await store.counts()
    async with opened(tmp_path / "spool") as store:
        assert await store.counts() == before


# Claims.


async def test_an_entry_is_claimed_once(store):
    for _ in range(30):
        await store.accept(new_message())
    claims = await asyncio.gather(*(store.claim_due(now=NOW, limit=7) for _ in range(10)))
    claimed = [entry.message.queue_id for entries in claims for entry in entries]
    assert len(claimed) == len(set(claimed)) == 30


async def test_a_claim_given_back_is_due_when_it_was_said(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.release(entry, due=NOW + MINUTE)
    assert await store.next_due() == NOW + MINUTE
    assert await claim_all(store) == []
    [again] = await claim_all(store, now=NOW + MINUTE)
    assert again.message == entry.message
    assert again.recipients[0].attempts == 0


async def test_a_claim_is_given_back_once(store):
    await store.accept(new_message())
    [entry] = await claim_all(store)
    await store.release(entry, due=NOW)
    with pytest.raises(SpoolError):
        await store.release(entry, due=NOW)


async def test_what_was_claimed_when_the_relay_died_is_due_at_once(store, tmp_path):
    await store.accept(new_message())
    await store.accept(new_message("z@zz.example"))
    claimed = await claim_all(store)
    await store.record(settled(claimed[1], DEFERRED, at=NOW + MINUTE))
    await store.close()
    async with opened(tmp_path / "spool") as again:
        [entry] = await claim_all(again)
        assert entry.message.queue_id == claimed[0].message.queue_id
        assert entry.recipients[0].attempts == 0


async def test_what_waits_in_memory_when_the_relay_stops_is_due_after_the_start(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for _ in range(5):
            await store.accept(new_message())
    async with opened(tmp_path / "spool") as store:
        assert len(await claim_all(store)) == 5


async def test_a_claim_whose_caller_went_away_is_due_again(store):
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
    async with asyncio.timeout(5):
        found = await claim_all(store)
        while len(found) < 5:
            found += await claim_all(store)
            await asyncio.sleep(0.01)
    assert len({entry.message.queue_id for entry in found}) == 5


async def test_a_claim_is_given_back_when_its_caller_goes_away_at_the_last_moment(
    tmp_path, monkeypatch
):
    """It is committed, and all that is left is to look when the next one is due."""
    async with opened(tmp_path / "spool", limits=NO_HANDOFF) as store:
        await store.accept(new_message())
        looking = asyncio.Event()

        async def look(skip):
            looking.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as slow:
            slow.setattr(store._reader, "next_due", look)
            claiming = asyncio.create_task(store.claim_due(now=NOW, limit=10))
            await looking.wait()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
        async with asyncio.timeout(5):
            await store.wait_for_work()
            while not await store.claim_due(now=NOW, limit=10):
                await store.wait_for_work()


async def test_a_clock_that_was_ahead_does_not_delay_mail_for_ever(tmp_path):
    ahead = NOW + timedelta(days=30)
    async with opened(tmp_path / "spool", now=ahead) as store:
        await store.accept(new_message(arrived=ahead))
        await store.accept(new_message("z@zz.example", arrived=ahead))
        first, second = await claim_all(store, now=ahead)
        await store.record(settled(first, DEFERRED, at=ahead))
        await store.record(settled(second, DEFERRED, at=NOW))
    async with opened(tmp_path / "spool", now=NOW, max_wait=timedelta(hours=4)) as store:
        [entry] = await claim_all(store, now=NOW)
        assert entry.message == first.message
        assert await store.next_due() == NOW + WAIT


async def test_a_dead_domain_with_many_queued_does_not_keep_another_waiting(store):
    for _ in range(300):
        await store.accept(new_message("x@dead.example"))
    await store.accept(new_message("y@alive.example"))
    entries = await store.claim_due(now=NOW, limit=10)
    assert "alive.example" in {entry.domain for entry in entries}


async def test_every_domain_has_its_turn_though_there_are_more_than_are_claimed_at_once(store):
    for number in range(60):
        for _ in range(5):
            await store.accept(new_message(f"x@d{number}.example"))
    seen: Counter[str] = Counter()
    for _ in range(12):
        entries = await store.claim_due(now=NOW, limit=10)
        seen.update(entry.domain for entry in entries)
    assert set(seen) == {f"d{number}.example" for number in range(60)}


async def test_a_domain_that_always_has_more_keeps_its_turn_and_no_more(tmp_path):
    """A cursor that stopped at the last domain looked at, not served, would pass some by for ever."""
    async with opened(tmp_path / "spool", limits=NO_HANDOFF) as store:
        for number in range(15):
            for _ in range(20):
                await store.accept(new_message(f"x@d{number:02}.example"))
        seen: Counter[str] = Counter()
        for _ in range(6):
            seen.update(entry.domain for entry in await store.claim_due(now=NOW, limit=20))
        assert sum(seen.values()) == 120
        assert len(seen) == 15
        assert max(seen.values()) - min(seen.values()) <= 2


async def test_a_claim_is_filled_from_one_domain_when_no_other_has_mail(store):
    for _ in range(50):
        await store.accept(new_message("x@big.example"))
    await store.accept(new_message("y@small.example"))
    assert len(await store.claim_due(now=NOW, limit=40)) == 40


async def test_no_domain_gets_more_than_its_limit_in_one_claim(store):
    for _ in range(20):
        await store.accept(new_message("x@big.example"))
        await store.accept(new_message("y@small.example"))
    entries = await store.claim_due(now=NOW, limit=30, limit_per_domain=3)
    assert Counter(entry.domain for entry in entries) == {"big.example": 3, "small.example": 3}


async def test_a_domain_to_be_skipped_is_not_claimed_and_not_due(store):
    await store.accept(new_message("x@dead.example"))
    await store.accept(new_message("y@alive.example", due=NOW + MINUTE))
    assert await claim_all(store, skip={"dead.example"}) == []
    assert await store.next_due(skip={"dead.example"}) == NOW + MINUTE
    assert await store.next_due(skip={"dead.example", "alive.example"}) is None
    due = await store.next_due()
    assert due is not None
    assert due <= NOW
    assert [entry.domain for entry in await claim_all(store)] == ["dead.example"]


@pytest.mark.parametrize("limits", [NO_HANDOFF, HandOffLimits(), HandOffLimits(entries=40)])
async def test_a_claim_of_some_domains_passes_thousands_of_others(tmp_path, limits):
    async with opened(tmp_path / "spool", limits=limits) as store:
        for number in range(60):
            await store.accept(new_message(f"x@dead{number:02}.example"))
        for _ in range(3):
            await store.accept(new_message("y@well.example"))
        await store.accept(new_message("y@fine.example"))
        only = ("absent.example", "fine.example", "well.example")
        first = await store.claim_due(now=NOW, limit=10, limit_per_domain=2, only=only)
        assert sorted(entry.domain for entry in first) == ["fine.example"] + ["well.example"] * 2
        again = await store.claim_due(now=NOW, limit=10, skip={"fine.example"}, only=only)
        assert [entry.domain for entry in again] == ["well.example"]
        assert await store.claim_due(now=NOW, limit=10, only=only) == []
        assert len(await claim_all(store)) == 60


async def test_a_message_to_a_thousand_domains_does_not_keep_the_next_message_waiting(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(*(f"x@d{number}.example" for number in range(1000))))
        await store.accept(new_message("y@well.example"))
        claimed = [entry.domain for entry in await store.claim_due(now=NOW, limit=50)]
        assert len(claimed) == 50
        assert "well.example" in claimed


async def test_mail_that_somebody_sent_is_claimed_before_a_thousand_reports(tmp_path):
    async with opened(tmp_path / "spool") as store:
        for number in range(300):
            await store.accept(new_message(f"x@forged{number}.example", origin="dsn"))
        await store.accept(new_message("y@well.example"))
        assert "well.example" in [entry.domain for entry in await store.claim_due(now=NOW, limit=2)]
        assert len(await claim_all(store)) == 299


async def test_a_domain_without_a_name_is_served_like_any_other(store):
    """`postmaster` alone is an address (RFC 5321 §4.1.1.3)."""
    await store.accept(new_message("postmaster"))
    await store.accept(new_message())
    assert len(await claim_all(store)) == 2


async def test_nothing_is_claimed_when_nothing_is_wanted(store):
    await store.accept(new_message())
    assert await store.claim_due(now=NOW, limit=0) == []


async def test_a_full_handoff_leaves_the_rest_to_the_disk_and_nothing_waits_for_ever(tmp_path):
    limits = HandOffLimits(entries=10, entries_per_domain=4)
    async with opened(tmp_path / "spool", limits=limits) as store:
        for number in range(100):
            await store.accept(new_message(f"x@d{number % 5}.example"))
        claimed = await claim_all(store)
        assert len({entry.message.queue_id for entry in claimed}) == 100


async def test_the_disk_has_its_share_while_new_mail_keeps_coming(tmp_path):
    async with opened(tmp_path / "spool", limits=HandOffLimits(entries=1000)) as store:
        await store.accept(new_message("x@old.example", due=NOW + MINUTE))
        for _ in range(20):
            await store.accept(new_message("x@new.example"))
        entries = await store.claim_due(now=NOW + MINUTE, limit=2)
        assert {entry.domain for entry in entries} == {"old.example", "new.example"}


async def test_skipped_domains_do_not_fill_the_handoff(tmp_path):
    limits = HandOffLimits(entries=10, entries_per_domain=8)
    async with opened(tmp_path / "spool", limits=limits) as store:
        for _ in range(8):
            await store.accept(new_message("x@dead.example"))
        assert await claim_all(store, skip={"dead.example"}) == []
        for _ in range(10):
            await store.accept(new_message("y@alive.example"))
        at_hand = [
            entry for entry in await claim_all(store, skip={"dead.example"}) if entry.content
        ]
        assert len(at_hand) == 8, "the hand-off is still full of dead.example"
        assert len(await claim_all(store)) == 8


async def test_work_is_announced(store):
    async def announced() -> None:
        await asyncio.wait_for(store.wait_for_work(), 5)

    await store.accept(new_message())
    await announced()
    [entry] = await claim_all(store)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(store.wait_for_work(), 0.05)
    await store.release(entry, due=NOW)
    await announced()
    await store.change(QueueFilter(), verb="hold", now=NOW)
    await announced()


async def test_a_first_attempt_that_comes_soon_shortens_what_next_due_said(store):
    await store.accept(new_message(due=NOW + timedelta(hours=1)))
    assert await store.next_due() == NOW + timedelta(hours=1)
    await store.accept(new_message("y@alive.example", due=NOW + MINUTE))
    assert await store.next_due() == NOW + MINUTE


# Damage.


async def damage(directory: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(directory / "spool" / "queue.db")) as db, db:
        db.execute(statement, values)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE message SET data = x'00ff' WHERE queue_id = ?",
        "UPDATE message SET data = '[1,' WHERE queue_id = ?",
        "UPDATE message SET arrived = 'yesterday' WHERE queue_id = ?",
        "UPDATE recipient SET data = '{}' WHERE queue_id = ?",
        "UPDATE recipient SET state = 99 WHERE queue_id = ?",
        "DELETE FROM message WHERE queue_id = ?",
    ],
)
async def test_a_damaged_message_is_set_aside_and_the_others_go_on(tmp_path, caplog, statement):
    async with opened(tmp_path / "spool") as store:
        for number in range(3):
            await store.accept(new_message(queue_id=f"q{number}"))
    await damage(tmp_path, statement, "q1")
    for _ in range(2):
        async with opened(tmp_path / "spool") as store:
            claimed = await claim_all(store)
            assert [entry.message.queue_id for entry in claimed] == ["q0", "q2"]
            assert await store.next_due() is None
            listed = await store.list_messages(QueueFilter(), now=NOW)
            items = [await store.find_message(item.queue_id) for item in listed]
            assert page_as_json(listed) == [item_as_json(item) for item in items if item]
            assert [item.queue_id for item in listed if item.queue_id == "q1"] == (
                [] if "DELETE" in statement else ["q1"]
            )
    assert "q1: set aside, it is damaged" in caplog.text


async def test_a_damaged_message_can_be_removed_by_the_operator(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(queue_id="q1"))
    await damage(tmp_path, "UPDATE recipient SET data = '{}'")
    async with opened(tmp_path / "spool") as store:
        assert await claim_all(store) == []
        assert (
            await store.change(QueueFilter(queue_ids=frozenset({"q1"})), verb="remove", now=NOW)
        ).changed == 1
        assert await queue_ids(store) == []


async def test_a_message_whose_file_is_gone_waits_until_the_file_is_back(tmp_path, caplog):
    content = b"x" * (CHUNK_BYTES + 1)
    file, kept = tmp_path / "spool" / "content" / "q1", tmp_path / "kept"
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(queue_id="q1", content=content))
    file.rename(kept)
    async with opened(tmp_path / "spool") as store:
        assert await claim_all(store) == []
        assert await queue_ids(store) == ["q1"]
        assert f"q1: set aside, it is damaged: its content, {file}, is gone" in caplog.text
        kept.rename(file)
        await store.change(QueueFilter(), verb="retry", now=NOW)
        assert len(await claim_all(store)) == 1
        assert await content_of(store, "q1") == content


async def test_content_that_is_not_whole_is_not_given_out_as_if_it_were(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(queue_id="q1", content=b"x" * (3 * CHUNK_BYTES)))
        await store.accept(new_message(queue_id="q2"))
        await store.accept(new_message(queue_id="q3", content=b"x" * (3 * CHUNK_BYTES)))
    (tmp_path / "spool" / "content" / "q1").unlink()
    os.truncate(tmp_path / "spool" / "content" / "q3", 2 * CHUNK_BYTES)
    await damage(tmp_path, "UPDATE message SET content = NULL WHERE queue_id = 'q2'")
    async with opened(tmp_path / "spool") as store:
        for queue_id in ("q1", "q2", "q3"):
            with pytest.raises(SpoolError, match=queue_id):
                await content_of(store, queue_id)


# Header.


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
async def test_the_header_section_is_read_up_to_its_empty_line_and_no_further_than_its_limit(
    store, content, header
):
    new = new_message(content=content)
    await store.accept(new)
    assert await store.read_header(new.message.queue_id) == header


async def test_a_header_longer_than_a_piece_is_found_to_its_end(store):
    header = b"A: " + b"x" * (CHUNK_BYTES - 5) + b"\r\n\r\n"
    new = new_message(content=header + b"body" * 100_000)
    await store.accept(new)
    assert await store.read_header(new.message.queue_id, limit_bytes=2 * CHUNK_BYTES) == header


# The directory.


async def test_the_queue_is_readable_by_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        async with opened(tmp_path / "spool") as store:
            await store.accept(new_message())
            await store.accept(new_message(queue_id="q1", content=b"x" * (CHUNK_BYTES + 1)))
            paths = [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(before)
    assert modes.pop("spool") == modes.pop("content") == 0o700
    assert {"queue.db", "queue.db-wal", "lock", "ballast", "q1"} <= set(modes)
    assert set(modes.values()) == {0o600}


async def test_a_stopped_queue_is_one_database_without_a_log_beside_it(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message())
    names = sorted(path.name for path in (tmp_path / "spool").iterdir())
    assert names == ["ballast", "content", "lock", "queue.db"]


async def test_after_close_nothing_is_promised(tmp_path):
    async with opened(tmp_path / "spool") as store:
        pass
    with pytest.raises(SpoolError):
        await store.accept(new_message())
    with pytest.raises(SpoolError):
        await store.list_messages(QueueFilter(), now=NOW)
    await store.close()


async def test_what_was_begun_before_close_is_finished(tmp_path):
    async with opened(tmp_path / "spool") as store:
        accepting = [asyncio.create_task(store.accept(new_message())) for _ in range(200)]
        await asyncio.sleep(0)
    await asyncio.gather(*accepting)
    async with opened(tmp_path / "spool") as store:
        assert len(await claim_all(store)) == 200


async def test_many_at_once_lose_nothing_and_invent_nothing(store):
    """Acceptors, deliveries with all outcomes, and an operator, all at the same time."""
    accepted: set[str] = set()
    done: set[str] = set()

    async def client(number: int) -> None:
        for step in range(15):
            new = new_message(f"x@d{(number + step) % 7}.example", "y@other.example")
            await store.accept(new)
            accepted.add(new.message.queue_id)

    async def deliver() -> None:
        now = NOW
        while len(done) < 300:
            now += MINUTE
            for number, entry in enumerate(await store.claim_due(now=now, limit=9)):
                outcome = (DELIVERED, Deferred("4.4.1", 0, ""), BOUNCED, DELIVERED)[number % 4]
                await store.record(
                    settled(entry, outcome, at=now, wait=MINUTE),
                    events=[event("e", entry.message.queue_id, number=number)],
                )
            await asyncio.sleep(0)
            if len(accepted) == 300:
                done.update(accepted - set(await queue_ids(store)))

    async def operate() -> None:
        while len(done) < 300:
            for verb in ("hold", "release", "retry"):
                await store.change(QueueFilter(domain="d3.example"), verb=verb, now=NOW)
                await asyncio.sleep(0.005)
        await store.change(QueueFilter(), verb="release", now=NOW)

    async with asyncio.timeout(60):
        await asyncio.gather(
            *(client(number) for number in range(20)), deliver(), deliver(), operate()
        )
    assert done == accepted
    assert sum((await store.counts()).values()) == 0
