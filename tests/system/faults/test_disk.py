"""When the disk under the queue fails: mail is refused for now, what was taken is delivered.

Nobody has to restart the relay for it.
"""

from __future__ import annotations

import contextlib
import shutil
import smtplib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import LARGE, Ledger, check_agreement, check_log, listed, tokens
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink
from tests.rigs.strace import strace

MIB = 1024 * 1024
HUNDRED_KB = ("y" * 76 + "\r\n") * 1300
QUICK: dict[str, Any] = {"queue": {"path": "disk/spool", "retry": ["1s"]}}

tmpfs = pytest.mark.needs("root", "mount")
traced = pytest.mark.needs("strace")


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@contextlib.contextmanager
def relay_at(directory: Path, mx: Sink, **more: Any) -> Iterator[Relay]:
    (directory / "disk").mkdir(exist_ok=True)
    with relay_process(directory, routes=mx.route, **QUICK, **more) as relay:
        yield relay


def flows_again(relay: Relay, mx: Sink) -> None:
    """New mail is taken and delivered within the time, without a restart."""

    def one() -> bool:
        ledger = Ledger()
        ledger.hand_in(relay, tokens(1))
        if not ledger.accepted:
            time.sleep(0.2)
            return False
        ledger.settle(relay, mx, seconds=10)
        return True

    wait_until(one, seconds=10, what="mail that flows again")
    assert relay.process is not None
    assert relay.process.poll() is None


def only_temporary(ledger: Ledger) -> None:
    """Every refusal says "later"."""
    assert ledger.refused, "nothing was refused"
    codes = {ledger.codes[token] for token in ledger.refused}
    assert all(400 <= code < 500 for code in codes), {
        ledger.texts[token] for token in ledger.refused
    }
    assert not ledger.accepted & ledger.refused


@tmpfs
@pytest.mark.parametrize("who", ["our own mail", "a stranger's file"])
def test_relay_refuses_mail_temporarily_on_a_full_disk_and_delivers_its_queue(
    tmp_path: Path, mx: Sink, who: str
) -> None:
    with mounted(tmp_path / "disk", "size=8m") as disk, relay_at(tmp_path, mx) as relay:
        mx.gate.clear()
        ledger = Ledger()
        if who != "our own mail":
            ledger.stream(relay, tokens(10), body=HUNDRED_KB)
            with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
                filler.write(b"x" * 9 * MIB)
        ledger.stream(relay, tokens(120), body=HUNDRED_KB)
        only_temporary(ledger)
        assert len(ledger.accepted) >= 10
        assert len(listed(relay)) == len(ledger.accepted)
        mx.gate.set()
        ledger.settle(relay, mx)  # mail leaves, though the disk may still be full
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        (disk / "filler").unlink(missing_ok=True)
        flows_again(relay, mx)
        ledger.check_refused(mx)
        assert check_log(relay) >= len(ledger.accepted)
    sys.stderr.write(
        f"\nfull disk ({who}): {len(ledger.accepted)} taken, {len(ledger.refused)} refused\n"
    )


def _take_all_inodes(disk: Path) -> None:
    with contextlib.suppress(OSError):
        for number in range(100):
            (disk / f"filler{number}").touch()


@tmpfs
def test_mail_flows_without_free_inodes_and_a_failed_start_says_why(
    tmp_path: Path, mx: Sink
) -> None:
    with (
        mounted(tmp_path / "disk", "size=16m,nr_inodes=12") as disk,
        relay_at(tmp_path, mx) as relay,
    ):
        _take_all_inodes(disk)
        ledger = Ledger()
        ledger.stream(relay, tokens(12))
        assert len(ledger.accepted) + len(ledger.refused) == 12
        assert all(code < 500 for code in ledger.codes.values())
        ledger.settle(relay, mx)
        assert relay.stop() == 0
        _take_all_inodes(disk)
        with pytest.raises(AssertionError, match="ended at its start"):
            relay.start()
        assert "Traceback" not in relay.stderr
        for filler in disk.glob("filler*"):
            filler.unlink()
        relay.start()
        flows_again(relay, mx)
        ledger.check_refused(mx)


@pytest.mark.needs("prlimit")
def test_relay_refuses_mail_temporarily_at_a_limit_on_file_sizes(tmp_path: Path, mx: Sink) -> None:
    with relay_at(tmp_path, mx) as relay:
        mx.gate.clear()
        ledger = Ledger()
        ledger.stream(relay, tokens(5), body=HUNDRED_KB)
        limit = (tmp_path / "disk/spool/queue.db-wal").stat().st_size + 200_000
        subprocess.run(
            ["prlimit", "--pid", str(relay.pid), f"--fsize={limit}:unlimited"], check=True
        )
        ledger.stream(relay, tokens(30), body=HUNDRED_KB)
        only_temporary(ledger)
        subprocess.run(
            ["prlimit", "--pid", str(relay.pid), "--fsize=unlimited:unlimited"], check=True
        )
        mx.gate.set()
        ledger.settle(relay, mx)
        flows_again(relay, mx)
        ledger.check_refused(mx)


@contextlib.contextmanager
def read_only(relay: Relay, directory: Path) -> Iterator[None]:
    """The file system goes read-only under the relay, and is read-write again at the end.

    `mount -o remount,ro` is refused while a file is open for writing, as the database is. So a
    read-only mount of the directory itself goes on top of it: no file can be made, removed or
    opened for writing. And to what was open before, writing fails by strace.
    """
    view = relay.directory / "view"
    view.mkdir()
    subprocess.run(["mount", "--bind", str(directory), str(view)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
        with strace(relay.pid, calls="pwrite64,ftruncate,fallocate", inject="error=EROFS"):
            subprocess.run(["mount", "--bind", str(view), str(directory)], check=True)
            try:
                yield
            finally:
                subprocess.run(["umount", "-l", str(directory)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(view)], check=True)


@tmpfs
@traced
def test_relay_refuses_mail_temporarily_on_a_read_only_file_system(
    tmp_path: Path, mx: Sink
) -> None:
    spool = tmp_path / "disk/spool"
    with mounted(tmp_path / "disk", "size=256m"), relay_at(tmp_path, mx) as relay:
        ledger = Ledger()
        with ledger.crowd(relay, clients=4, tenth=LARGE):
            wait_until(lambda: len(ledger.accepted) > 50, what="the stream")
            with read_only(relay, spool):
                time.sleep(0.3)  # what was just being committed
                taken = ledger.accepted
                time.sleep(0.7)
                assert ledger.accepted == taken, "answered 250 though nothing could be written"
            began = time.monotonic()
            wait_until(
                lambda: len(ledger.accepted) > len(taken) + 20,
                seconds=5,
                what="mail that flows again",
            )
            seconds = time.monotonic() - began
        only_temporary(ledger)
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        ledger.check_refused(mx)
        assert ledger.duplicates(mx) == 0, "a result in hand was forgotten"
        assert check_agreement(relay, mx) >= len(ledger.accepted)
        assert relay.process is not None
        assert relay.process.poll() is None
        wait_until(
            lambda: not list((spool / "content").iterdir()),
            seconds=5,
            what="the end of the last file",
        )
    sys.stderr.write(
        f"\nread-only: {len(ledger.accepted)} taken, {len(ledger.refused)} refused;"
        f" mail flowed again after {seconds:.1f} s\n"
    )


# --- failing calls --------------------------------------------------------------------------------


@traced
@pytest.mark.parametrize(
    ("call", "error"),
    [("fdatasync", "error=EIO:when=1"), ("fdatasync", "error=EIO"), ("pwrite64", "error=EROFS")],
    ids=["one sync fails", "every sync fails", "a read-only file system"],
)
def test_message_that_could_not_be_written_is_not_answered_250(
    tmp_path: Path, mx: Sink, call: str, error: str
) -> None:
    with relay_at(tmp_path, mx) as relay:
        flows_again(relay, mx)
        ledger = Ledger()
        with strace(relay.pid, calls=call, inject=error):
            ledger.hand_in(relay, tokens(3))
        assert ledger.refused
        only_temporary(ledger)
        if "when" not in error:
            assert not ledger.accepted
        # A restart must not make true what was refused: its frames may lie in the log.
        relay.kill()
        relay.start()
        flows_again(relay, mx)
        ledger.settle(relay, mx)
        time.sleep(0.5)
        ledger.check_refused(mx)


@traced
def test_relay_recovers_from_failing_syncs_without_a_restart(tmp_path: Path, mx: Sink) -> None:
    with relay_at(tmp_path, mx) as relay:
        mx.gate.clear()
        ledger = Ledger()
        ledger.stream(relay, tokens(6))
        with strace(relay.pid, calls="fdatasync", inject="error=EIO"):
            mx.gate.set()  # deliveries end while no result can be written down
            ledger.stream(relay, tokens(6))
            only_temporary(ledger)
            time.sleep(1)
        ledger.settle(relay, mx)
        flows_again(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        ledger.check_refused(mx)
        assert ledger.duplicates(mx) == 0, "a result in hand was forgotten"
        assert check_log(relay) >= len(ledger.accepted)


@traced
def test_slow_sync_delays_only_the_client_that_waits_for_it(tmp_path: Path, mx: Sink) -> None:
    with relay_at(tmp_path, mx) as relay:
        ledger = Ledger()
        other = smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20))
        other.ehlo("client.example")
        with (
            strace(relay.pid, calls="fdatasync", inject="delay_enter=2000000"),
            helper(ledger, relay),
        ):
            time.sleep(0.3)
            assert not ledger.accepted, "answered before the sync"
            longest = max(_seconds_for_noop(other) for _ in range(20))
            assert not ledger.accepted, "answered before the sync"
        other.close()
        assert len(ledger.accepted) == 1
        ledger.settle(relay, mx)
        assert longest < 0.5, f"NOOP took {longest:.3f} s"
        sys.stderr.write(
            f"\nslow sync (2 s): the slowest of 20 NOOP elsewhere took {longest * 1000:.1f} ms\n"
        )


@contextlib.contextmanager
def helper(ledger: Ledger, relay: Relay) -> Iterator[None]:
    """Hands in one message beside the test."""
    import threading

    thread = threading.Thread(target=ledger.hand_in, args=(relay, tokens(1)))
    thread.start()
    yield
    thread.join(timeout=patient(60))


def _seconds_for_noop(client: smtplib.SMTP) -> float:
    began = time.monotonic()
    assert client.noop()[0] == 250
    time.sleep(0.02)
    return time.monotonic() - began - 0.02


@pytest.mark.parametrize("is_long", [False, True])
def test_a_database_locked_by_another_program_is_a_delay(
    tmp_path: Path, mx: Sink, is_long: bool
) -> None:
    """Within SQLite's patience of 5 s the client waits; beyond it is told to come again."""
    with relay_at(tmp_path, mx) as relay:
        flows_again(relay, mx)
        other = sqlite3.connect(tmp_path / "disk/spool/queue.db", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        ledger = Ledger()
        with helper(ledger, relay):
            if is_long:
                wait_until(lambda: any(ledger.codes.values()), what="the reply")
            else:
                time.sleep(1)
            other.execute("ROLLBACK")
            other.close()
        assert bool(ledger.accepted) is not is_long, ledger.texts
        assert all(code < 500 for code in ledger.codes.values())
        ledger.settle(relay, mx)
        flows_again(relay, mx)
        ledger.check_refused(mx)


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path, mx: Sink) -> Iterator[tuple[Relay, Ledger]]:
    """A relay that has stopped with 30 messages in its queue."""
    (tmp_path / "disk").mkdir()
    nobody = {"*": {"host": "[127.0.0.31]", "port": 9}}
    with relay_process(tmp_path, routes=nobody, **QUICK) as relay:
        ledger = Ledger()
        ledger.stream(relay, tokens(30))
        relay.stop()
        relay.config["routes"] = mx.route
        yield relay, ledger


def test_a_damaged_database_is_not_started_on_nor_made_anew(
    stopped: tuple[Relay, Ledger], tmp_path: Path, mx: Sink
) -> None:
    relay, ledger = stopped
    database = tmp_path / "disk/spool/queue.db"
    shutil.copy(database, tmp_path / "copy.db")
    with database.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xa5" * 12 * 4096)
    damaged = database.read_bytes()
    with pytest.raises(AssertionError, match=r"damaged|malformed"):
        relay.start()
    assert "Traceback" not in relay.stderr
    assert database.read_bytes() == damaged
    shutil.copy(tmp_path / "copy.db", database)
    relay.start()
    ledger.settle(relay, mx)


def test_one_damaged_message_is_set_aside_and_listed_and_the_others_go(
    stopped: tuple[Relay, Ledger], tmp_path: Path, mx: Sink
) -> None:
    relay, ledger = stopped
    token, *_ = sorted(ledger.accepted)
    queue_id = ledger.texts.pop(token).split()[-1]
    del ledger.codes[token]
    with contextlib.closing(sqlite3.connect(tmp_path / "disk/spool/queue.db")) as db, db:
        db.execute("UPDATE recipient SET data = '{garbage' WHERE queue_id = ?", (queue_id,))
    relay.start()
    ledger.settle(relay, mx)
    wait_until(lambda: len(listed(relay)) == 1, what="all the others' delivery")
    [left] = listed(relay)
    assert left["queue-id"] == queue_id
    assert mx.tokens({token}) == []
    assert "set aside" in relay.stderr
    flows_again(relay, mx)
