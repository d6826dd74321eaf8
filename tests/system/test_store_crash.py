"""What `accept` returned from is on the disk, whatever happens to the process or to the disk.

A process accepts messages and prints each id after `accept` returned; it is killed at random
moments and at the N-th write or sync, and its syncs are made to fail. Afterwards every id it
printed has to be there, whole. RELAY_LONG=1 goes through every N.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rigs.acceptor import Told, command, expect_kept

ROOT = Path(__file__).resolve().parents[2]
LONG = os.environ.get("RELAY_LONG") == "1"
STRACE = ["strace", "-f", "-qq", "-o"]

pytestmark = pytest.mark.timeout(600)


def run(*words: str) -> Told:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return Told().hear(done.stdout)


@pytest.mark.parametrize(
    "options", [["--lanes", "20"], ["--lanes", "10", "--deliver"], ["--lanes", "4", "--large"]]
)
async def test_accepted_mail_survives_kill_9_at_any_moment(tmp_path, options):
    for _ in range(30 if LONG else 4):
        with subprocess.Popen(
            command(tmp_path / "spool", "--count", "100000", *options),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            time.sleep(random.uniform(0.01, 0.4))
            child.kill()
            told = Told().hear(child.stdout.read())
        await expect_kept(tmp_path / "spool", told)
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "spool" / "queue.db").unlink()
            (tmp_path / "spool" / "queue.db-wal").unlink()


def killed_at(spool: Path, call: str, when: int, *options: str) -> Told:
    trace = [
        *STRACE,
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=KILL:when={when}",
    ]
    told = run(*trace, *command(spool, "--count", "60", "--lanes", "3", "--deliver", *options))
    assert not told.ended, "the kill came too late to mean anything"
    return told


@pytest.mark.needs("strace")
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
@pytest.mark.parametrize("when", range(1, 61) if LONG else (1, 3, 6, 8, 13, 30, 45))
async def test_accepted_mail_survives_kill_9_at_the_nth_call(tmp_path, call, when):
    told = killed_at(tmp_path / "spool", call, when)
    await expect_kept(tmp_path / "spool", told)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("call", ["fdatasync", "fsync", "write", "unlink"])
@pytest.mark.parametrize("when", range(1, 13) if LONG else (2, 5, 9))
async def test_large_mail_survives_kill_9_at_the_nth_call(tmp_path, call, when):
    told = killed_at(tmp_path / "spool", call, when, "--large")
    await expect_kept(tmp_path / "spool", told)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("when", range(1, 61) if LONG else (2, 20, 47))
async def test_a_start_that_was_killed_is_finished_by_the_next(tmp_path, when):
    """Recovery of the log, of claims and of pieces without a message."""
    with subprocess.Popen(
        command(tmp_path / "spool", "--count", "100000", "--lanes", "8", "--large"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        time.sleep(0.2)
        child.kill()
        told = Told().hear(child.stdout.read())
    calls = "pwrite64,fdatasync,ftruncate,unlink,openat"
    trace = [
        *STRACE,
        "/dev/null",
        "-P",
        str(tmp_path / "spool"),
        "-P",
        str(tmp_path / "spool" / "queue.db"),
    ]
    trace += ["-P", str(tmp_path / "spool" / "queue.db-wal"), "-e", f"trace={calls}"]
    run(
        *trace,
        "-e",
        f"inject={calls}:signal=KILL:when={when}",
        *command(tmp_path / "spool", "--count", "0"),
    )
    await expect_kept(tmp_path / "spool", told)


@pytest.mark.needs("strace")
@pytest.mark.parametrize("when", range(1, 41) if LONG else (4, 14, 20, 25))
async def test_a_sync_that_fails_once_refuses_its_messages_and_the_next_are_taken(tmp_path, when):
    trace = [
        *STRACE,
        "/dev/null",
        "-e",
        "trace=fdatasync",
        "-e",
        f"inject=fdatasync:error=EIO:when={when}",
    ]
    told = run(*trace, *command(tmp_path / "spool", "--count", "150", "--lanes", "3"))
    assert told.ended == told.opened
    if told.opened:
        assert len(told.refused) <= 3, "a fault that had passed was still felt"
        assert told.refused or when < 14, (
            "the fault was not felt"
        )  # SQLite may do without a directory's sync
        assert len(told.accepted) + len(told.refused) == 150
        assert set(told.reasons) <= {"SpoolError"}
    await expect_kept(tmp_path / "spool", told)


@pytest.mark.needs("strace")
async def test_no_mail_is_accepted_while_every_sync_fails(tmp_path):
    """And what was refused does not come back from the log after the relay has been killed."""
    trace = [
        *STRACE,
        "/dev/null",
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:error=EIO:when=50+",
    ]
    told = run(*trace, *command(tmp_path / "spool", "--count", "200", "--lanes", "3"))
    assert told.ended
    assert len(told.refused) > 20
    await expect_kept(tmp_path / "spool", told)


# The order of sync and answer. Killing the process cannot show it: what was written outlives the
# process without any sync. So the calls are read.

_CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed)(.*)")
_CONTENT = re.compile(r"/content(?:/(\w+))?[\">]")


def unsynced_answers(trace: str) -> Iterator[str]:
    """Answers that were given while something written for them was not synced yet.

    The log, or the message's file, or the name of that file; the file has to be synced before the
    log is written to, or a commit could tell of what is not there.
    """
    dirty: set[str] = set()
    syncs = 0
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        thread, call, rest = found.groups()
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest
            continue
        rest = begun.pop(thread, "") + rest
        content = _CONTENT.search(rest)
        if call == "openat" and content and "O_CREAT" in rest:
            dirty |= {content[1], "names"}
        elif call == "pwrite64" and "queue.db-wal" in rest:
            if dirty - {"log"}:
                yield f"{line} with {dirty}"
            dirty.add("log")
        elif call in ("fdatasync", "fsync") and rest.rstrip().endswith("= 0"):
            dirty.discard((content[1] or "names") if content else "log")
            syncs += 1
        elif call == "write" and '"ok ' in rest:
            if dirty or not syncs:
                yield f"{line} with {dirty}"
            syncs = 0


def traced_answers(tmp_path: Path, *options: str) -> tuple[Told, list[str]]:
    trace = tmp_path / "trace"
    calls = ["-y", "-e", "trace=pwrite64,fdatasync,fsync,write,openat", "-e", "signal=none"]
    told = run(*STRACE, str(trace), *calls, *command(tmp_path / "spool", "--count", "40", *options))
    assert len(told.accepted) == 40
    return told, list(unsynced_answers(trace.read_text()))


@pytest.mark.needs("strace")
@pytest.mark.parametrize("options", [[], ["--large"]])
def test_a_sync_lies_between_the_last_write_and_every_answer(tmp_path, options):
    _, wrong = traced_answers(tmp_path, *options)
    assert wrong == []


@pytest.mark.needs("strace")
def test_sync_check_detects_answers_without_a_sync(tmp_path):
    told, wrong = traced_answers(tmp_path, "--unsynced")
    assert len(wrong) == len(told.accepted)


@pytest.mark.needs("strace")
def test_messages_that_arrive_together_share_a_sync(tmp_path):
    trace = tmp_path / "trace"
    told = run(
        *STRACE,
        str(trace),
        "-e",
        "trace=fdatasync",
        *command(tmp_path / "spool", "--count", "400", "--lanes", "40"),
    )
    assert len(told.accepted) == 400
    syncs = len(re.findall(r"fdatasync", trace.read_text()))
    assert syncs < 150


def test_a_termination_signal_is_no_crash(tmp_path):
    """The store has no handler for the signal: lock and log are as after any other end."""
    with subprocess.Popen(
        command(tmp_path / "spool", "--count", "100000"), cwd=ROOT, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)
    assert run(*command(tmp_path / "spool", "--count", "1")).ended
