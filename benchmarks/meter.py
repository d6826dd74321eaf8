"""What a side costs, read from /proc: CPU seconds and memory of a process and its descendants.

CPU is utime + stime of every process and of its children that ended, so even a short-lived process
is counted. Memory is the sum of proportional set sizes (PSS), so that shared memory is counted
once; it is sampled, and the highest sum is kept. `perf` counts syncs, where it is installed and
allowed: it costs very little.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "PeakMemory",
    "Syncs",
    "counted_syncs",
    "cpu_parts",
    "cpu_seconds",
    "memory_bytes",
    "peak_memory",
    "tree",
]

_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE_SECONDS = 0.2


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (fields := _stat(int(path.name))):
            children[int(fields[1])].append(int(path.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def cpu_seconds(root: int) -> float:
    """CPU seconds used by a process and all below it, until now."""
    ticks = sum(sum(map(int, fields[11:15])) for pid in tree(root) if (fields := _stat(pid)))
    return ticks / _TICKS


def cpu_parts(pid: int) -> tuple[float, float]:
    """CPU seconds of one process, its own and the kernel's for it, with those of its children that
    ended.
    """
    user, kernel, ended_user, ended_kernel = map(int, _stat(pid)[11:15])
    return (user + ended_user) / _TICKS, (kernel + ended_kernel) / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name; empty for one that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def memory_bytes(root: int) -> int:
    """The PSS of a process and all below it."""
    total = 0
    for pid in tree(root):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


class PeakMemory:
    """The highest sum so far."""

    def __init__(self) -> None:
        self.peak = 0

    def watch(self, root: int, over: threading.Event) -> None:
        while True:
            began = time.monotonic()
            self.peak = max(self.peak, memory_bytes(root))
            # With a thousand processes a sample is expensive: it may use a twentieth of a core.
            if over.wait(max(_SAMPLE_SECONDS, 20 * (time.monotonic() - began))):
                return


@contextlib.contextmanager
def peak_memory(root: int) -> Iterator[PeakMemory]:
    """Sample the memory while the body of the `with` runs."""
    memory, over = PeakMemory(), threading.Event()
    thread = threading.Thread(target=memory.watch, args=(root, over))
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


class Syncs:
    """The number of syncs; None where it cannot be measured."""

    count: int | None = None


@contextlib.contextmanager
def counted_syncs(root: int) -> Iterator[Syncs]:
    """Count fsync and fdatasync of a process and all below it, and of those they fork."""
    events = "syscalls:sys_enter_fsync,syscalls:sys_enter_fdatasync"
    pids = ",".join(map(str, tree(root)))
    syncs = Syncs()
    try:
        process = subprocess.Popen(
            ["perf", "stat", "-x", ";", "-e", events, "-p", pids], stderr=subprocess.PIPE, text=True
        )
    except OSError:
        yield syncs
        return
    try:
        yield syncs
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        counts = [line.split(";")[0] for line in said.splitlines() if "sys_enter" in line]
        if counts and all(count.isdigit() for count in counts):
            syncs.count = sum(map(int, counts))
