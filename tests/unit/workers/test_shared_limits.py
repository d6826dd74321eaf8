"""The limits of next hops in memory that processes share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from relay.deliver.hop_limits import HopLimits
from relay.route.next_hop import NextHop, Rate
from relay.workers.shared_limits import LimitsOfWorker, SharedLimits
from tests.fakes.waiting import idle_seconds, patient

HOP = NextHop("m365", (("mx.example",),), max_connections=10, rate=Rate(300, 60))


def forked(do: Callable[..., None], *arguments: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            do(*arguments)
        finally:
            os._exit(0)
    return pid


def limits_of(table: LimitsOfWorker) -> HopLimits:
    limits = HopLimits(table, clock=time.monotonic)
    limits.waiting = lambda name: 100
    return limits


def begun_until(limits: HopLimits, until: float) -> int:
    """How many messages begin before a time, of which there are always more."""
    begun = 0
    while time.monotonic() < until:
        holder = f"Q{begun}", "b.example"
        if limits.begin(HOP, holder):
            begun += 1
            limits.end(HOP, holder)
            limits.is_over(holder)
        else:
            time.sleep(0.005)
    return begun


def test_processes_begin_no_more_messages_together_than_the_rate_says():
    shared = SharedLimits(3)
    reading, writing = os.pipe()

    seconds = min(patient(2), 20)
    until = time.monotonic() + seconds  # the same for all, however late a process comes to run

    def work(number: int) -> None:
        os.write(writing, bytes([begun_until(limits_of(shared.of_worker(number)), until)]))

    workers = [forked(work, number) for number in range(3)]
    for pid in workers:
        os.waitpid(pid, 0)
    counts = list(os.read(reading, 3))
    assert 12 <= sum(counts) <= 5 + 5 * seconds
    assert min(counts) >= 3


def test_processes_have_no_more_connections_together_than_the_limit():
    shared = SharedLimits(2)
    hop = NextHop("provider", (("mx.example",),), max_connections=10)
    reading, writing = os.pipe()

    def work(number: int) -> None:
        limits = limits_of(shared.of_worker(number))
        had, until = 0, time.monotonic() + 1
        while time.monotonic() < until:
            if limits.begin(hop, (f"Q{had}", "b.example")):
                had += 1
            time.sleep(0.001)
        os.write(writing, bytes([had]))

    for pid in [forked(work, number) for number in range(2)]:
        os.waitpid(pid, 0)
    assert sum(os.read(reading, 2)) == 10


def test_process_killed_with_the_lock_and_connections_loses_neither():
    shared = SharedLimits(2)
    reading, writing = os.pipe()

    def work() -> None:
        table = shared.of_worker(1)
        limits = limits_of(table)
        for number in range(10):
            limits.begin(
                NextHop("provider", (("mx.example",),), max_connections=10), (f"Q{number}", "")
            )
        with table.locked("provider"):
            os.write(writing, b"x")
            time.sleep(60)

    pid = forked(work)
    os.read(reading, 1)
    hop = NextHop("provider", (("mx.example",),), max_connections=10)
    limits = limits_of(shared.of_worker(0))
    began = idle_seconds()
    assert not limits.begin(hop, ("Q", "b.example"))
    assert idle_seconds() - began < 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    shared.clear(1)  # as the supervisor does
    assert limits.begin(hop, ("Q", "b.example"))


def test_names_have_rows_of_their_own_and_the_same_in_each_process():
    shared = SharedLimits(2)
    one, other = shared.of_worker(0), shared.of_worker(1)
    names = [f"hop{number}" for number in range(500)]
    for number, name in enumerate(names):
        one.cells(name)[0] = float(number)
    assert [other.cells(name)[0] for name in reversed(names)] == list(range(499, -1, -1))
