"""What a message costs with 1, 2, 4 and 8 workers, and how many syncs the disk can do at a time.

    python -m benchmarks.workers [--messages N] [--share S] [--directory D]

4 KiB over 20 standing sessions for each worker. On a machine with fewer cores than workers the
rates say nothing, and neither do they on a busy one. The shares of CPU do: what the workers cost
for a message, what of it is the kernel's, what the supervisor takes, and how many messages share a
sync. The second table is the disk's limit: as many threads as workers append 4 KiB and sync, each
to a file of its own.

With `--share 0.06` each worker may use so much of a core, and no more (the kernel's CPU quotas):
eight such workers need half a core, so that the rates say how they grow with the workers, as far as
the kernel, the disk and what the workers share allow it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.hops import NextHop, next_hop
from benchmarks.meter import counted_syncs, cpu_parts, memory_bytes, tree
from benchmarks.report import median, rounded, table
from benchmarks.scenarios import SCENARIOS, Scenario
from benchmarks.sides import Side, relay_side

__all__: list[str] = []

_WORKERS = (1, 2, 4, 8)
_ROUNDS = 3
_SYNC_SECONDS = 2.0
_PERIOD = 10_000
_RECORD = b"z" * 4096


@dataclass(frozen=True)
class _Cost:
    """Of one run; CPU is in seconds for 1,000 messages."""

    rate: float
    workers_user: float
    workers_kernel: float
    supervisor: float
    syncs: float


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=6000)
    parser.add_argument("--share", type=float, help="of a core, for each worker")
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="on the disk to be measured"
    )
    wanted = parser.parse_args()
    scenario = replace(SCENARIOS[0], messages=wanted.messages)
    rows, syncs = [], []
    for count in _WORKERS:
        with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=wanted.directory) as path:
            directory = Path(path)
            directory.chmod(0o755)
            more = replace(scenario, sessions=20 * count)
            if wanted.share:
                more = replace(more, messages=count * wanted.messages // _WORKERS[-1])
            rows.append(_row(directory, count, more, wanted.share))
            print("  ".join(rows[-1]), flush=True)
            syncs.append([str(count), f"{_syncs_a_second(directory, count):.0f}"])
    head = ["workers", "copies/s", "CPU s/1000", "of it kernel", "supervisor", "syncs/1000", "MiB"]
    print(f"{table(head, rows)}\n\n{table(['syncs at a time', 'a second'], syncs)}")


def _row(directory: Path, count: int, scenario: Scenario, share: float | None) -> list[str]:
    with contextlib.ExitStack() as stack:
        hop = stack.enter_context(next_hop(directory, scenario))
        side = stack.enter_context(relay_side(directory / "relay", scenario, hop, workers=count))
        if share:
            pids = tree(side.root)
            for pid in pids[1:] or pids:
                stack.enter_context(_limited(pid, share))
        _cost(side, hop, scenario)  # warms up
        costs = [_cost(side, hop, scenario) for _ in range(_ROUNDS)]
        memory = memory_bytes(side.root) / 2**20
    kernel = median(one.workers_kernel for one in costs)
    return [
        str(count),
        rounded(median(one.rate for one in costs)),
        f"{median(one.workers_user + one.workers_kernel for one in costs):.2f}",
        f"{kernel:.2f}",
        f"{median(one.supervisor for one in costs):.3f}",
        rounded(median(one.syncs for one in costs)),
        f"{memory:.0f}",
    ]


def _cost(side: Side, hop: NextHop, scenario: Scenario) -> _Cost:
    pids = tree(side.root)
    workers = pids[1:] or pids
    before = [cpu_parts(pid) for pid in workers]
    above = sum(cpu_parts(side.root)) if workers is not pids else 0.0
    with counted_syncs(side.root) as syncs:
        seconds, _ = hop.send(scenario, [side.port], scenario.messages)
        time.sleep(1.0)  # the last results are written down
    after = [cpu_parts(pid) for pid in workers]
    if workers is not pids:
        above = sum(cpu_parts(side.root)) - above
    user, kernel = (
        sum(late[part] - early[part] for early, late in zip(before, after, strict=True))
        for part in (0, 1)
    )
    each = 1000 / scenario.messages
    return _Cost(
        scenario.messages / seconds,
        user * each,
        kernel * each,
        above * each,
        float("nan") if syncs.count is None else syncs.count * each,
    )


@contextlib.contextmanager
def _limited(pid: int, share: float) -> Iterator[None]:
    """Give a process so much of a core, and no more; it comes before the other processes.

    The period is short: a process that has used up its part waits for 10 ms at most.
    """
    old = Path("/sys/fs/cgroup/cpu")
    group = (old if old.is_dir() else old.parent) / f"relay-bench-{pid}"
    group.mkdir()
    quota = max(round(share * _PERIOD), 1000)
    settings: dict[str, int | str]
    if old.is_dir():
        settings = {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": quota, "cpu.shares": 100_000}
    else:
        settings = {"cpu.max": f"{quota} {_PERIOD}", "cpu.weight": 10_000}
    try:
        for name, value in settings.items():
            (group / name).write_text(str(value))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def _syncs_a_second(directory: Path, count: int) -> float:
    done = [0] * count
    over = time.monotonic() + _SYNC_SECONDS

    def write(number: int) -> None:
        with (directory / f"sync-{number}").open("wb", buffering=0) as file:
            while time.monotonic() < over:
                file.write(_RECORD)
                os.fdatasync(file.fileno())
                done[number] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / _SYNC_SECONDS


if __name__ == "__main__":
    main()
