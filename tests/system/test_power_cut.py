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
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from relay.queue.entry import State
from relay.queue.sqlite import SqliteStore
from relay.queue.store import EventFilter, QueueFilter, SpoolError
from tests.fakes.queued import NOW, content_of
from tests.rigs.acceptor import Told, command, expect_kept
from tests.rigs.power import Cut, History

ROOT = Path(__file__).resolve().parents[2]
VERSION_1 = ROOT / "tests" / "unit" / "queue" / "fixtures" / "version1.sql"
LONG = os.environ.get("RELAY_LONG") == "1"
CUTS = 600 if LONG else 30
SEEDS = range(5) if LONG else range(1)

pytestmark = [pytest.mark.needs("strace"), pytest.mark.torture, pytest.mark.timeout(1800)]


def begun(tmp_path: Path) -> History:
    """A disk with a place for a queue."""
    (tmp_path / "disk").mkdir()
    return History(tmp_path / "disk")


def run(history: History, *options: str, inject: str = "") -> Told:
    return Told().hear(history.run(*command(history.base / "spool", *options), cwd=ROOT, inject=inject))


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
                    target / "spool", Told().hear(cut.said), refused_stay_out=False, synchronous="OFF"
                )
            except (AssertionError, SpoolError) as exc:
                exc.add_note(f"cut at {cut.moment} with {cut.seed}")
                raise


LOADS = [
    ["--count", "100", "--lanes", "5"],
    ["--count", "60", "--lanes", "4", "--deliver"],
    ["--count", "15", "--lanes", "3", "--large"],
    ["--count", "15", "--lanes", "3", "--large", "--deliver"],
]


@pytest.mark.parametrize("options", LOADS, ids=" ".join)
async def test_what_was_accepted_survives_a_power_cut_at_any_moment(tmp_path, options):
    history = begun(tmp_path)
    assert run(history, *options).ended
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
async def test_each_sync_is_missed_where_the_disk_does_not_listen_to_it(tmp_path, deaf, options):
    """Otherwise the test before is blind."""
    history = begun(tmp_path)
    assert run(history, *options).ended
    assert any(re.fullmatch(deaf, label) for label in history.syncs)
    with pytest.raises((AssertionError, SpoolError, FileNotFoundError)):
        await expect_kept_at(history, history.moments(100, random.Random(1)), tmp_path, deaf=deaf)


async def test_what_is_not_synced_at_all_is_lost(tmp_path):
    history = begun(tmp_path)
    assert run(history, *LOADS[0], "--unsynced").ended
    with pytest.raises(AssertionError, match="accepted and lost"):
        await expect_kept_at(history, history.moments(100, random.Random(1)), tmp_path)


@pytest.mark.parametrize(
    "inject",
    [
        f"{call}:signal=KILL:when={when}"
        for call, most in (("fdatasync", 40), ("fsync", 10), ("pwrite64", 200), ("unlink", 8))
        for when in (range(1, most + 1) if LONG else (1, most // 2))
    ],
)
async def test_a_start_after_a_crash_survives_a_power_cut(tmp_path, inject):
    """What the killed process had not synced is seen by the next, and may be gone after the cut."""
    history = begun(tmp_path)
    options = ["--count", "15", "--lanes", "3", "--large", "--deliver"]
    assert not run(history, *options, inject=inject).ended
    assert run(history, "--count", "3", "--large").ended
    await expect_kept_at(history, history.moments(CUTS, random.Random(1), run=1), tmp_path)
