"""What the SQLite store does beyond `tests/contract/store`: files of content, the hand-off, damaged
rows.
"""

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
from relay.queue.api_state import DomainSettings
from relay.queue.entry import State
from relay.queue.handoff import HandOffLimits
from relay.queue.request import Request
from relay.queue.sqlite import commit, disk
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import CHUNK_BYTES, QueueFilter, SpoolError
from tests.fakes.queued import (
    BOUNCED,
    DELIVERED,
    NOW,
    claim_all,
    content_of,
    event,
    new_message,
    opened,
    queue_ids,
    settled,
)
from tests.fakes.waiting import patient

NO_HANDOFF = HandOffLimits(entries=0)
MINUTE = timedelta(minutes=1)


# By memory and by disk an entry is claimed alike; so most tests run both ways.
@pytest.fixture(params=["by memory", "by disk"])
async def store(request, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    limits = HandOffLimits() if request.param == "by memory" else NO_HANDOFF
    async with opened(tmp_path / "spool", limits=limits) as store:
        yield store


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
    async with asyncio.timeout(patient(5)):
        while files_of(directory) != wanted:
            await asyncio.sleep(0.01)


# Taking in.


async def test_small_content_is_at_hand_when_it_was_just_accepted(tmp_path):
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(content=b"x" * 65536))
        await store.accept(new_message(content=b"x" * 65537))
        await store.accept(new_message(content=b"x" * (CHUNK_BYTES + 1)))
        assert [len(entry.content or b"") for entry in await claim_all(store)] == [65536, 0, 0]


@pytest.mark.parametrize("staged", [0, CHUNK_BYTES])
async def test_a_message_whose_staged_content_is_not_there_is_refused(store, tmp_path, staged):
    new = new_message(content=b"the rest", staged_bytes=2 * CHUNK_BYTES)
    if staged:
        await store.stage(new.message.queue_id, 0, b"x" * staged)
    with pytest.raises(SpoolError, match=f"before octet {2 * CHUNK_BYTES}"):
        await store.accept(new)
    assert await queue_ids(store) == []
    await files_become(tmp_path, set())


async def test_discarded_content_leaves_no_file(store, tmp_path):
    await store.stage("q", 0, b"x" * CHUNK_BYTES)
    assert files_of(tmp_path) == {"q"}
    await store.discard("q")
    await files_become(tmp_path, set())


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


async def test_removal_of_small_and_large_messages_in_one_step_leaves_no_file(store, tmp_path):
    large = b"x" * (CHUNK_BYTES + 1)
    for number in range(6):
        await store.accept(new_message(content=large if number % 2 else b"small"))
    assert len(files_of(tmp_path)) == 3
    assert (await store.change(QueueFilter(), verb="remove", now=NOW)).changed == 6
    await files_become(tmp_path, set())
    assert await store.counts() == {State.QUEUED: 0, State.DEFERRED: 0, State.HELD: 0}


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
        async with asyncio.timeout(patient(5)):
            while "q1: could not remove its content yet" not in caplog.text:
                await asyncio.sleep(0.01)
    await store.discard("q2")
    await files_become(tmp_path, set())


async def test_message_whose_removal_is_rolled_back_keeps_its_file(store, tmp_path):
    content = b"x" * (CHUNK_BYTES + 1)
    await store.accept(new_message(queue_id="q1", content=content))
    [entry] = await claim_all(store)
    with pytest.raises(SpoolError):
        await store.record(settled(entry, DELIVERED), events=[event("delivered", "q1", "\udce9")])
    await store.accept(new_message(queue_id="q2"))
    assert await content_of(store, "q1") == content


async def test_message_that_cannot_be_stored_is_refused_alone(store):
    surrogate = new_message(sender="\udce9@example.com")
    results = await asyncio.gather(
        store.accept(new_message()),
        store.accept(surrogate),
        store.accept(new_message()),
        return_exceptions=True,
    )
    assert [type(result) for result in results if result is not None] == [SpoolError]
    assert len(await claim_all(store)) == 2


async def test_change_that_fails_is_undone_alone(store):
    """A transaction is written at once, and again one by one where something in it fails."""
    settings = DomainSettings(require_tls=True)
    change = store.api_state.set_domain_settings
    results = await asyncio.gather(
        store.accept(new_message(queue_id="q1", events=(event("accepted", "q1"),))),
        change("one.example", settings),
        change("\udce9.example", settings),
        change("two.example", settings),
        return_exceptions=True,
    )
    assert [type(result) for result in results if isinstance(result, Exception)] == [SpoolError]
    assert set(await store.api_state.domain_settings()) == {"one.example", "two.example"}
    assert [one.seq for one in await store.events_after(0)] == [1]
    assert len(await claim_all(store)) == 1


# Claims.


async def test_message_leaves_no_row_behind_and_its_events_stay(store, tmp_path):
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
            slow.setattr(store, "next_stored", look)
            claiming = asyncio.create_task(store.claim_due(now=NOW, limit=10))
            await looking.wait()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
        async with asyncio.timeout(patient(5)):
            await store.wait_for_work()
            while not await store.claim_due(now=NOW, limit=10):
                await store.wait_for_work()


async def test_a_domain_that_always_has_more_keeps_its_turn_and_no_more(tmp_path):
    """A cursor at the last domain that was seen, not served, would pass over some for ever."""
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


@pytest.mark.parametrize("limits", [NO_HANDOFF, HandOffLimits(), HandOffLimits(entries=40)])
async def test_a_claim_of_some_domains_passes_thousands_of_others(tmp_path, limits):
    async with opened(tmp_path / "spool", limits=limits) as store:
        for number in range(60):
            await store.accept(new_message(f"x@dead{number:02}.example"))
        for _ in range(3):
            await store.accept(new_message("y@well.example"))
        await store.accept(new_message("y@fine.example"))
        only = ("absent.example", "fine.example", "well.example")
        store.limit_domains(lambda domain: 2)
        first = await store.claim_due(now=NOW, limit=10, only=only)
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


async def test_closed_store_refuses_requests(tmp_path):
    async with opened(tmp_path / "spool") as store:
        pass
    with pytest.raises(SpoolError):
        await store.accept(new_message())
    with pytest.raises(SpoolError):
        await store.list_messages(QueueFilter(), now=NOW)
    await store.close()


async def test_request_begun_before_close_is_finished(tmp_path):
    async with opened(tmp_path / "spool") as store:
        accepting = [asyncio.create_task(store.accept(new_message())) for _ in range(200)]
        await asyncio.sleep(0)
    await asyncio.gather(*accepting)
    async with opened(tmp_path / "spool") as store:
        assert len(await claim_all(store)) == 200


# Commits.


def count_commits(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each commit has from now on."""
    commits: list[int] = []
    write = store.writer._commit

    def counted(batch: list[Request]) -> None:
        commits.append(len(batch))
        write(batch)

    monkeypatch.setattr(store.writer, "_commit", counted)
    return commits


async def recording(store: SqliteStore) -> asyncio.Task[bool]:
    """The result of an attempt, handed to the store."""
    await store.accept(new_message())
    [entry] = await claim_all(store)
    task = asyncio.create_task(store.record(settled(entry, DELIVERED)))
    await asyncio.sleep(0.05)
    return task


@pytest.fixture
def patient_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results wait for the next message, however long that takes."""
    monkeypatch.setattr(commit, "_RESULTS_SECONDS", 3600.0)


@pytest.mark.usefixtures("patient_results")
async def test_result_shares_the_commit_of_the_next_message(tmp_path, monkeypatch):
    async with opened(tmp_path / "spool") as store:
        result = await recording(store)
        commits = count_commits(store, monkeypatch)
        assert not result.done()
        await store.accept(new_message())
        assert result.done()
        assert commits == [2]
        assert len(await queue_ids(store)) == 1


@pytest.mark.usefixtures("patient_results")
async def test_operators_request_does_not_wait_behind_a_result(tmp_path):
    async with opened(tmp_path / "spool") as store:
        result = await recording(store)
        async with asyncio.timeout(30):
            await store.api_state.set_webhook("example.com", "delivered", [])
        assert result.done()


@pytest.mark.usefixtures("patient_results")
async def test_result_that_waits_is_written_when_the_queue_closes(tmp_path):
    async with opened(tmp_path / "spool") as store:
        result = await recording(store)
        assert not result.done()
    assert result.done()
    async with opened(tmp_path / "spool") as store:
        assert await queue_ids(store) == []


async def test_result_is_committed_though_no_message_comes(tmp_path):
    async with opened(tmp_path / "spool") as store:
        result = await recording(store)
        async with asyncio.timeout(30):
            await result
        assert await queue_ids(store) == []
