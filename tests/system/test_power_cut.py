"""What `accept` returned from is on the disk after a power cut, too.

A run is recorded, and replayed on a disk that keeps what was synced and, of all else, what it likes
(`tests.rigs.power`). Whatever was said before the cut has to be true of what is found: that is the
one test that sees a sync that is missing, too early, or of the wrong file. RELAY_LONG=1 cuts the
power hundreds of times a recording.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest

from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import EventFilter, EventPage, QueueFilter, SpoolError
from tests.fakes.queued import NOW, content_of, event, new_message, opened
from tests.rigs.acceptor import Told, command, expect_kept
from tests.rigs.power import Cut, History

ROOT = Path(__file__).resolve().parents[2]
VERSION_1 = ROOT / "tests" / "unit" / "queue" / "fixtures" / "version1.sql"
LONG = os.environ.get("RELAY_LONG") == "1"
CUTS = 300 if LONG else 12
FEWER_CUTS = 100 if LONG else 12
SEEDS = range(2) if LONG else range(1)

pytestmark = [pytest.mark.needs("strace"), pytest.mark.torture, pytest.mark.timeout(1800)]


def begun(tmp_path: Path) -> History:
    """A disk with a place for a queue."""
    (tmp_path / "disk").mkdir()
    return History(tmp_path / "disk")


def run(history: History, *options: str, inject: str = "") -> Told:
    return Told().hear(
        history.run(*command(history.base / "spool", *options), cwd=ROOT, inject=inject)
    )


def found(cuts: Iterable[Cut], tmp_path: Path) -> Iterable[tuple[Cut, Path]]:
    """What each cut leaves, for as long as it is looked at."""
    for cut in cuts:
        target = tmp_path / "found"
        cut.lay(target)
        try:
            yield cut, target
        finally:
            shutil.rmtree(target)


async def expect_kept_at(
    history: History, moments: Sequence[int], tmp_path: Path, *, deaf: str | None = None
) -> None:
    for seed in SEEDS if deaf is None else range(1):
        for cut, target in found(history.cuts(moments, deaf=deaf, seed=seed), tmp_path):
            try:
                await expect_kept(
                    target / "spool",
                    Told().hear(cut.said),
                    refused_stay_out=False,
                    synchronous="OFF",
                )
            except (AssertionError, SpoolError) as exc:
                exc.add_note(f"cut at {cut.moment} with {cut.seed}")
                raise


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., History]:
    """A run on an empty disk; recorded once for all tests that cut its power."""

    @cache
    def record(*options: str) -> History:
        history = begun(tmp_path_factory.mktemp("recorded"))
        assert run(history, *options).ended
        return history

    return record


LOADS = [
    ["--count", "100", "--lanes", "5"],
    ["--count", "60", "--lanes", "4", "--deliver"],
    ["--count", "15", "--lanes", "3", "--large"],
    ["--count", "15", "--lanes", "3", "--large", "--deliver"],
]


@pytest.mark.parametrize("options", LOADS, ids=" ".join)
async def test_accepted_mail_survives_a_power_cut_at_any_moment(tmp_path, recorded, options):
    history = recorded(*options)
    await expect_kept_at(history, history.moments(CUTS, random.Random(1)), tmp_path)


@pytest.mark.parametrize(
    ("deaf", "options"),
    [
        ("/spool/queue.db-wal", LOADS[0]),
        ("/spool/queue.db", LOADS[1]),
        ("/spool/content/.*", LOADS[2]),
        ("/spool/content", LOADS[2]),
        ("/spool", LOADS[0]),
        ("", LOADS[0]),
    ],
    ids=[
        "the log's",
        "the database's",
        "a content's",
        "its name's",
        "the database's name's",
        "the queue's name's",
    ],
)
async def test_replay_detects_each_sync_that_the_disk_ignores(tmp_path, recorded, deaf, options):
    """Otherwise the test before is blind."""
    history = recorded(*options)
    assert any(re.fullmatch(deaf, label) for label in history.syncs)
    with pytest.raises((AssertionError, SpoolError, FileNotFoundError)):
        await expect_kept_at(history, history.moments(100, random.Random(1)), tmp_path, deaf=deaf)


async def test_replay_detects_writes_without_a_sync(tmp_path, recorded):
    history = recorded(*LOADS[0], "--unsynced")
    with pytest.raises(AssertionError, match="accepted and lost"):
        await expect_kept_at(history, history.moments(100, random.Random(1)), tmp_path)


# strace counts the calls of each thread apart.
KILLS = [
    f"{call}:signal=KILL:when={when}"
    for call, most in (("fdatasync", 30), ("unlink", 4), ("fsync", 4), ("pwrite64", 200))
    for when in (
        range(1, most + 1, 1 + most // 10) if LONG else (most,) if call == "unlink" else ()
    )
]


@pytest.mark.parametrize("inject", KILLS)
async def test_a_start_after_a_kill_survives_a_power_cut(tmp_path, inject):
    """What the killed process had not synced is seen by the next, and may be gone after the cut."""
    history = begun(tmp_path)
    assert not run(history, *LOADS[3], inject=inject).ended
    assert run(history, "--count", "3", "--large").ended
    await expect_kept_at(history, history.moments(FEWER_CUTS, random.Random(1), run=1), tmp_path)


@pytest.mark.parametrize("when", range(1, 9) if LONG else (6,))
async def test_content_stays_until_the_removal_of_its_message_is_durable(tmp_path, when):
    """Killed before the sync of the result (the 6th), that is: the next start reads it all the
    same.
    """
    history = begun(tmp_path)
    [queue_id] = run(history, "--count", "1", "--large").accepted
    run(history, "--count", "0", "--deliver", inject=f"fdatasync:signal=KILL:when={when}")
    shutil.copytree(history.base / "spool", tmp_path / "copy")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy" / "queue.db")) as db:
        left = not db.execute("SELECT count(*) FROM message").fetchone()[0]
    assert LONG or (left and (tmp_path / "copy" / "content" / queue_id).exists()), (
        "another sync was meant"
    )
    assert run(history, "--count", "0").ended
    await expect_kept_at(history, [history.last_time("open\n")] * FEWER_CUTS, tmp_path)


@pytest.mark.parametrize(
    ("options", "when"),
    [(options, when) for options in (LOADS[0], LOADS[2]) for when in range(1, 11)]
    if LONG
    else [(LOADS[0], 2), (LOADS[2], 4)],
)
async def test_a_sync_that_failed_is_not_trusted_afterwards(tmp_path, options, when):
    """What it was to write the system counts as written, and no later sync writes it.

    The second is that of the log's name: SQLite overlooks its failure, and we sync it again.
    """
    history = begun(tmp_path)
    assert run(history, "--count", "0").ended
    told = run(history, *options, inject=f"fdatasync:error=EIO:when={when}")
    assert told.refused or not told.opened or when == 2, "the failure was not felt"
    await expect_kept_at(history, history.moments(FEWER_CUTS, random.Random(1), run=1), tmp_path)


# What a start has to do with older queues and with other workers'.

Kept = dict[str, tuple[object, ...]]


async def all_of(spool: Path) -> tuple[Kept, list[str]]:
    """Every message, with its content, and the ids of all events."""
    adopting = orphans(spool, "worker-", present=())
    store = await SqliteStore.open(spool, synchronous="OFF", adopting=adopting)
    try:
        kept: Kept = {}
        for item in await store.list_messages(QueueFilter(), now=NOW, limit=999):
            queue_id = item.queue_id
            states = tuple((one.address, one.state) for one in item.recipients)
            kept[queue_id] = item.reverse_path, states, await content_of(store, queue_id)
        events = [
            one.event.id for one in await store.find_events(EventFilter(), EventPage(limit=999))
        ]
        left_over = [
            path.name for path in spool.iterdir() if path.is_dir() and path.name != "content"
        ]
        assert left_over == [], "the queue of a worker that was taken over is still there"
        return kept, sorted(events)
    finally:
        await store.close()


def lay_version_1(directory: Path) -> None:
    """A queue of the first version of the tables, with content in them that is to move to files."""
    directory.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(directory / "queue.db")) as db:
        db.executescript(VERSION_1.read_text())


async def expect_all_at(
    history: History,
    before: Path,
    tmp_path: Path,
    *,
    cuts: int = FEWER_CUTS,
    deaf: str | None = None,
) -> None:
    """After a cut the queue has what a start makes of it without one."""
    shutil.copytree(before, tmp_path / "whole")
    expected = await all_of(tmp_path / "whole" / "spool")
    assert expected[0]
    for seed in SEEDS if deaf is None else range(1):
        moments = history.moments(cuts if deaf is None else 200, random.Random(seed))
        for cut, target in found(history.cuts(moments, deaf=deaf, seed=seed), tmp_path):
            try:
                assert await all_of(target / "spool") == expected
            except (AssertionError, SpoolError) as exc:
                exc.add_note(f"cut at {cut.moment} with {cut.seed}")
                raise


async def test_a_migration_survives_a_power_cut_at_any_moment(tmp_path):
    lay_version_1(tmp_path / "disk" / "spool")
    before = shutil.copytree(tmp_path / "disk", tmp_path / "before")
    history = History(tmp_path / "disk")
    assert run(history, "--count", "0").ended
    assert "/spool/content/1KLARGE" in history.syncs
    await expect_all_at(history, before, tmp_path, cuts=CUTS)


async def lay_strays(disk: Path) -> None:
    """A worker's queue, that of one that is no more, and that of one that was so before its last
    update.
    """

    async def fill(path: Path, name: str) -> None:
        async with opened(path) as store:
            for number, size in enumerate((100, 600_000, 2000, 300_000)):
                queue_id = f"{name}{number}"
                content = queue_id.encode() * (size // 2)
                accepted = event("accepted", queue_id)
                await store.accept(
                    new_message(queue_id=queue_id, content=content, events=(accepted,))
                )
            await store.log_written(2)

    await fill(disk / "spool", "A")
    await fill(disk / "spool" / "worker-1", "B")
    lay_version_1(disk / "spool" / "worker-2")


@pytest.mark.parametrize(
    "inject",
    [
        "",
        *(
            f"{call}:signal=KILL:when={when}"
            for call, most in (("fdatasync", 14), ("fsync", 7), ("unlinkat", 10))
            for when in (range(1, most + 1) if LONG else (7,) if call == "unlinkat" else ())
        ),
    ],
)
async def test_taking_over_a_workers_queue_survives_a_power_cut_at_any_moment(tmp_path, inject):
    """Also where a start that was killed had begun with it; and each sync is missed where it is
    ignored.
    """
    await lay_strays(tmp_path / "disk")
    before = shutil.copytree(tmp_path / "disk", tmp_path / "before")
    history = History(tmp_path / "disk")
    assert run(history, "--adopt", "--count", "0", inject=inject).ended or inject
    if inject:
        run(history, "--adopt", "--count", "0")
    await expect_all_at(history, before, tmp_path)
    for deaf in ("/spool", "/spool/content") if not inject else ():
        shutil.rmtree(tmp_path / "whole")
        with pytest.raises((AssertionError, SpoolError)):
            await expect_all_at(history, before, tmp_path, deaf=deaf)
