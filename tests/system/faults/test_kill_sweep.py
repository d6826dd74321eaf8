"""kill -9 at the N-th system call: the relay loses no message that it answered with 250.

Each round attaches to a running relay, sends it mail, kills it at its N-th call of a kind,
starts it again on the same queue and compares the ledger with what arrived. The next round uses
the restarted relay.

    pwrite64, fdatasync          while receiving and delivering: each page and sync of each commit
    pwrite64 to the database     during a checkpoint of the write-ahead log
    write, read, writev          while delivering: every step of the dialogue with the next hop

Other rounds kill at random moments, under load that does not wait for the relay to be back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from relay.mail.address import domain_of
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.queue_id import new_queue_id
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage
from tests.fakes.queue import DEFAULTS
from tests.fakes.waiting import patient
from tests.rigs.ledger import LARGE, Ledger, check_agreement, check_log, listed, tokens
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process, workers_of
from tests.rigs.sink import Sink, sink
from tests.rigs.strace import strace

pytestmark = [pytest.mark.needs("strace"), pytest.mark.torture]

PER_DESTINATION = 3
QUICK: dict[str, Any] = {
    "delivery": {"concurrency_per_destination": PER_DESTINATION},
    "queue": {"retry": ["1s"]},
}


@dataclass
class Sweep:
    """What came of some rounds. `died`: those in which the N-th call was reached."""

    rounds: int = 0
    died: int = 0
    accepted: int = 0
    duplicates: int = 0

    def say(self, what: str) -> None:
        sys.stderr.write(
            f"\n{what}: {self.rounds} rounds, {self.died} killed; {self.accepted} messages"
            " answered 250,"
            f" 0 lost, {self.duplicates} came twice\n"
        )


@contextlib.contextmanager
def relay_and_sink(
    directory: Path, program: Sequence[str] = ("relay",)
) -> Iterator[tuple[Relay, Sink]]:
    with sink() as mx, relay_process(directory, routes=mx.route, program=program, **QUICK) as relay:
        yield relay, mx


def one_round(
    relay: Relay,
    mx: Sink,
    sweep: Sweep,
    *,
    call: str,
    nth: int,
    only: Path | None = None,
    seconds: float = 20,
) -> None:
    """Hand in mail, die at the N-th call, start again, and see that nothing is missing."""
    ledger = Ledger()
    before = len(mx.contents)
    with strace(relay.pid, calls=call, inject=f"signal=KILL:when={nth}", only=only) as tracer:
        ledger.stream(relay, tokens(8), clients=2)
        deadline = time.monotonic() + (
            3 if only else 0.3
        )  # the log is folded back when nothing waits
        while tracer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        died = tracer.poll() is not None
    if died:
        begin_again(relay)
    ledger.settle(relay, mx, seconds=seconds)
    sweep.rounds += 1
    sweep.died += died
    sweep.accepted += len(ledger.accepted)
    twice = ledger.duplicates(mx)
    # What was being delivered at the kill may come again: an attempt for each place there is.
    assert twice <= PER_DESTINATION, (
        f"{call} {nth}: {twice} of {len(mx.contents) - before} came twice"
    )
    sweep.duplicates += twice


def begin_again(relay: Relay) -> None:
    assert relay.process is not None
    relay.process.wait(timeout=patient(10))
    relay.start()


def has_arrived(ledger: Ledger, mx: Sink) -> bool:
    return ledger.accepted <= set(mx.tokens(ledger.accepted))


def died_before(tracer: subprocess.Popen[bytes], it_is_over: Callable[[], bool]) -> bool:
    """Whether the relay died before that, or just after."""
    wait_until(lambda: tracer.poll() is not None or it_is_over(), what="a kill, or the end")
    time.sleep(0.1)
    return tracer.poll() is not None


def test_kill_9_at_the_nth_storage_call_loses_nothing(tmp_path: Path, long_form: bool) -> None:
    sweep = Sweep()
    writes = range(1, 61) if long_form else (1, 4, 19, 53)
    syncs = range(1, 17) if long_form else (1, 6)
    with relay_and_sink(tmp_path) as (relay, mx):
        for call, values in (("pwrite64", writes), ("fdatasync", syncs)):
            for nth in values:
                one_round(relay, mx, sweep, call=call, nth=nth)
        wait_until(lambda: listed(relay) == [], seconds=30, what="an empty queue")
        assert check_log(relay) >= sweep.accepted
    sweep.say("kill -9 at the N-th storage call")
    assert sweep.died >= sweep.rounds * 0.7, "the kills come too late to mean anything"


def test_kill_9_during_a_checkpoint_of_the_log_loses_nothing(
    tmp_path: Path, long_form: bool
) -> None:
    sweep = Sweep()
    with relay_and_sink(tmp_path) as (relay, mx):
        for nth in range(1, 21) if long_form else (2,):
            one_round(relay, mx, sweep, call="pwrite64", nth=nth, only=tmp_path / "spool/queue.db")
        for nth in range(1, 4) if long_form else (1,):
            one_round(relay, mx, sweep, call="fdatasync", nth=nth, only=tmp_path / "spool/queue.db")
        wait_until(lambda: listed(relay) == [], seconds=30, what="an empty queue")
    sweep.say("kill -9 while the write-ahead log is folded back")
    assert sweep.died


def test_kill_9_at_the_nth_network_call_of_a_delivery_loses_nothing(
    tmp_path: Path, long_form: bool
) -> None:
    sweep = Sweep()
    rounds = [
        (call, nth)
        for call in ("write", "read")
        for nth in (range(1, 61) if long_form else (2, 9, 25))
    ]
    with relay_and_sink(tmp_path) as (relay, mx):
        for call, nth in rounds:
            ledger = Ledger()
            mx.gate.clear()
            ledger.stream(relay, tokens(16), clients=4)
            with strace(relay.pid, calls=call, inject=f"signal=KILL:when={nth}") as tracer:
                mx.gate.set()
                died = died_before(tracer, partial(has_arrived, ledger, mx))
            if died:
                begin_again(relay)
            assert len(ledger.accepted) == 16
            ledger.settle(relay, mx, seconds=20)
            twice = ledger.duplicates(mx)
            assert twice <= PER_DESTINATION, f"{call} {nth}: {twice} came twice"
            sweep.rounds += 1
            sweep.died += died
            sweep.accepted += 16
            sweep.duplicates += twice
        wait_until(lambda: listed(relay) == [], seconds=30, what="an empty queue")
        assert check_log(relay) >= sweep.accepted
    sweep.say("kill -9 at the N-th network call of a delivery")
    assert sweep.died >= sweep.rounds * 0.6, "the kills come too late to mean anything"


def test_sweep_detects_a_relay_that_answers_before_it_commits(tmp_path: Path) -> None:
    """If it did not, it would be blind."""
    broken = ("tests.rigs.broken_relay", "reply-first")
    with relay_and_sink(tmp_path, broken) as (relay, mx):

        def sweep() -> None:
            for nth in range(1, 6):
                one_round(relay, mx, Sweep(), call="fdatasync", nth=nth, seconds=4)

        with pytest.raises(AssertionError, match="answered 250 and lost"):
            sweep()


# --- at moments of chance -------------------------------------------------------------------------

CROWD: dict[str, Any] = {
    "clients": 2,
    "recipient": ("b@dest.example", "nobody@dest.example"),  # one is taken, one is refused for good
    "tenth": LARGE,
}


@pytest.mark.timeout(3000)
def test_kill_9_at_any_moment_under_load_loses_nothing(tmp_path: Path, long_form: bool) -> None:
    """One worker or the whole relay; the long form also kills a relay with a single worker."""
    for workers, whom in ((2, ["one", "all"]), (1, ["all", "all"]))[: 2 if long_form else 1]:
        sweep = Sweep()
        for number in range(20 if long_form else 1):
            rounds = whom * (5 if long_form else 1)
            killed_under_load(tmp_path / f"{workers}-{number}", sweep, rounds, workers=workers)
        sweep.say(f"kill -9 at any moment under load, workers: {workers}")


def killed_under_load(directory: Path, sweep: Sweep, whom: Sequence[str], *, workers: int) -> None:
    """Kill while a crowd hands in and mail goes out; then let all of it arrive, and hold it against
    the log.

    What comes twice was being delivered at a kill: an attempt for each place there is.
    """
    directory.mkdir()
    ledger = Ledger()
    with sink() as mx, relay_process(directory, routes=mx.route, start=False, **QUICK) as relay:
        mx.unknown = frozenset({"nobody@dest.example"})
        relay.config["workers"] = workers
        start_whole(relay)
        ledger.stream(relay, tokens(20), **CROWD)
        ledger.settle(relay, mx)
        before = files_open(relay)
        with ledger.crowd(relay, **CROWD):
            for each in whom:
                time.sleep(random.uniform(0.05, 1.2))
                kill_and_wait(relay, each)
        everything_is_told(relay, ledger, mx)
        # Messages and reports have a destination each.
        twice = (ledger.duplicates(mx), reports_twice(ledger, mx))
        assert max(twice) <= len(whom) * PER_DESTINATION, f"{twice} came twice in {len(whom)} kills"
        is_clean(relay, before)
        assert relay.stop() == 0
    shutil.rmtree(directory)
    sweep.rounds += len(whom)
    sweep.died += len(whom)
    sweep.accepted += len(ledger.accepted)
    sweep.duplicates += sum(twice)


def start_whole(relay: Relay) -> None:
    """Start, and wait for all its workers."""
    said = relay.directory / "stderr"
    before = relay.stderr.count(" ready: ") if said.exists() else 0
    relay.start()
    wait_until(lambda: relay.stderr.count(" ready: ") > before, what="all workers")


def kill_and_wait(relay: Relay, whom: str) -> None:
    """Kill; return when it is whole again."""
    if whom == "all":
        relay.kill_all()
        start_whole(relay)
        return
    before = workers_of(relay)
    os.kill(victim := random.choice(before), signal.SIGKILL)
    wait_until(
        lambda: victim not in (now := workers_of(relay)) and len(now) == len(before),
        what="a new worker",
    )


def everything_is_told(relay: Relay, ledger: Ledger, mx: Sink) -> None:
    """All has arrived or is reported, nothing is left, and log and next hop agree."""
    assert len(ledger.accepted) > 20, "no load to speak of"
    ledger.settle(relay, mx)
    wait_until(lambda: listed(relay) == [], seconds=60, what="an empty queue")
    ledger.check_refused(mx)
    assert set(mx.reported(ledger.accepted)) == ledger.accepted, "a failure that nobody was told of"
    assert check_agreement(relay, mx) >= 2 * len(ledger.accepted)


def reports_twice(ledger: Ledger, mx: Sink) -> int:
    told = mx.reported(set(ledger.codes))
    return len(told) - len(set(told))


def is_clean(relay: Relay, files_before: int) -> None:
    """Nothing of what was lies about: no content, no long log, no open file."""
    spool = relay.directory / "spool"

    def stray() -> list[Path]:
        return [path for content in spool.rglob("content") for path in content.iterdir()]

    def long_logs() -> list[Path]:
        return [log for log in spool.rglob("queue.db-wal") if log.stat().st_size > 1024 * 1024]

    wait_until(lambda: not stray() and not long_logs(), seconds=10, what="a clean queue directory")
    # Some more connections to the next hop and to the database, and none for each message.
    assert files_open(relay) <= files_before + 10


def files_open(relay: Relay) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in workers_of(relay) or [relay.pid])


# --- start ----------------------------------------------------------------------------------------


async def filled(directory: Path, known: list[str]) -> None:
    """A queue with a message for each token, as a crash left it: claimed, with a log to recover."""
    store = await SqliteStore.open(directory)
    for token in known:
        now = datetime.now(UTC)
        content = f"Subject: {token}\r\n\r\nbody\r\n".encode()
        message = QueuedMessage(
            new_queue_id(now), "a@client.example", now, len(content), MessageSummary()
        )
        recipient = QueuedRecipient(0, "b@dest.example", domain_of("b@dest.example"), DEFAULTS)
        await store.accept(NewMessage(message, (recipient,), content))
    await asyncio.to_thread(shutil.copytree, directory, directory.with_name("crashed"))
    await store.close()


def test_kill_9_during_the_start_does_not_hinder_the_next(tmp_path: Path, long_form: bool) -> None:
    """Recovery, migration, laying the ballast: each may be cut short, and is done over."""
    known = tokens(5)
    asyncio.run(filled(tmp_path / "clean", known))
    fresh = [("pwrite64", nth) for nth in (range(1, 41) if long_form else (2, 11))]
    calls = [*fresh, *(("fdatasync", nth) for nth in (range(1, 11) if long_form else (3,)))]
    died = 0
    for template in ("crashed", None):
        for number, (call, nth) in enumerate(calls):
            directory = tmp_path / f"{template}{number}"
            directory.mkdir()
            if template:
                shutil.copytree(tmp_path / template, directory / "spool")
            # -D: the tracer is the child, so that the relay's process is the relay.
            wrapper = ("strace", "-D", "-f", "-o", "/dev/null", "-e", f"trace={call}")
            inject = ("-e", f"inject={call}:signal=KILL:when={nth}")
            with (
                sink() as mx,
                relay_process(directory, routes=mx.route, start=False, **QUICK) as relay,
            ):
                relay.wrapper = (*wrapper, *inject)
                with contextlib.suppress(AssertionError):
                    relay.start()
                assert relay.process is not None
                with contextlib.suppress(Exception):
                    relay.process.wait(timeout=1.5)
                died += relay.process.poll() is not None
                if relay.process.poll() is None:
                    relay.kill()
                relay.wrapper = ()
                relay.start()
                if template:
                    ledger = Ledger(dict.fromkeys(known, 250))
                    ledger.settle(relay, mx)
                else:
                    ledger = Ledger()
                    ledger.hand_in(relay, tokens(1))
                    ledger.settle(relay, mx)
                assert relay.stop() == 0
            shutil.rmtree(directory)
    sys.stderr.write(
        f"\nkill -9 during the start: {2 * len(calls)} rounds, {died} killed, 0 lost\n"
    )
    assert died >= len(calls)
