"""`make bench`: runs every scenario on both sides in turn (A B A B) and writes a report.

    python -m benchmarks [quick|nodes] [--only NAME …] [--rounds N] [--minutes M] [--smoke]
    [--directory D] [--save]

A scenario begins only while time is left. The first round of each is metered (syncs, memory) and
warms up; the rates and the CPU are of the others, with nothing attached. `--smoke` runs a few
messages of the cheap scenarios: it shows that everything works, and says nothing about speed.

`nodes` is a measurement of its own (`benchmarks.nodes`), without Postfix.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import report
from benchmarks.hops import next_hop
from benchmarks.run import Result, run
from benchmarks.scenarios import SCENARIOS, Scenario
from benchmarks.sides import start_sides

_SMOKE_MESSAGES = 60
_TMPFS = "tmpfs"
_NODES_MINUTES = 6.0


def main() -> None:
    """Read the arguments, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "length",
        nargs="?",
        choices=["quick", "nodes"],
        help="quick: the main scenarios, in some 4 minutes; nodes: several on one PostgreSQL",
    )
    parser.add_argument("--only", action="append", choices=[one.name for one in SCENARIOS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=13)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", action="append", help="nodes: standing, series or full")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        help="nodes: divide the numbers of messages by this, on a machine that has little time",
    )
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results and the README's table"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="on the disk to be measured"
    )
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process stays behind
    if _file_system(wanted.directory) == _TMPFS:
        parser.error(f"{wanted.directory} is in memory: name a directory on a disk")
    deadline = time.monotonic() + 60 * wanted.minutes
    if wanted.length == "nodes":
        _nodes(wanted)
        return
    results: list[Result] = []
    loads: list[float] = []
    for scenario in _chosen(wanted):
        if time.monotonic() > deadline:
            print(f"no time is left for {scenario.name}")
            continue
        rounds = 1 if wanted.smoke else wanted.rounds
        loads.append(_others_load())
        results += measure(scenario, wanted.directory, rounds, deadline)
    print(report.tables(results))
    if wanted.save and not wanted.length:
        report.save(results, loads)


def _nodes(wanted: argparse.Namespace) -> None:
    """Several nodes with one queue, and a relay with its queue in a directory."""
    from benchmarks import nodes

    load = _others_load()
    rounds, shrink = (1, 200) if wanted.smoke else (wanted.rounds, wanted.shrink)
    # The last round of each part may still take a while.
    until = time.monotonic() + 60 * min(wanted.minutes, _NODES_MINUTES)
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=wanted.directory) as path:
        directory = Path(path)
        directory.chmod(0o755)
        found = nodes.measure_nodes(
            directory,
            parts=wanted.part or nodes.PARTS,
            rounds=rounds,
            shrink=shrink,
            is_smoke=wanted.smoke,
            until=until,
        )
    print(f"{nodes.about(load)}\n\n{nodes.table(found)}")


def _chosen(wanted: argparse.Namespace) -> Iterator[Scenario]:
    for scenario in SCENARIOS:
        if wanted.only and scenario.name not in wanted.only:
            continue
        if wanted.length == "quick" and not scenario.quick:
            continue
        if wanted.smoke:
            if scenario.cheap:
                yield replace(scenario, messages=_SMOKE_MESSAGES)
        else:
            yield scenario


def measure(scenario: Scenario, parent: Path, rounds: int, deadline: float) -> list[Result]:
    """Both sides, one after the other, as often as there are rounds."""
    results = []
    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-", dir=parent))
        )
        directory.chmod(0o755)
        hop = stack.enter_context(next_hop(directory, scenario))
        sides = list(stack.enter_context(start_sides(directory, scenario, hop)))
        # The first round warms up, and is the one that is metered.
        for number in range(rounds + (rounds > 1)):
            if number and time.monotonic() > deadline:
                break
            for side in list(sides):
                try:
                    result = run(scenario, side, hop, metered=number == 0)
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    print(
                        f"{scenario.name:16} {side.name:17} did not come to its end: {error}",
                        flush=True,
                    )
                    sides.remove(side)
                    continue
                print(f"{scenario.name:16} {report.line(result)}", flush=True)
                results.append(result)
    return results


def _others_load() -> float:
    """How many cores other programs use now, while the benchmark does nothing."""
    before, idle_before = _ticks()
    time.sleep(1.0)
    after, idle_after = _ticks()
    return (os.cpu_count() or 1) * (1 - (idle_after - idle_before) / max(after - before, 1))


def _ticks() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def _file_system(directory: Path) -> str:
    """The type of the file system a directory is on."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [fields for fields in lines if directory.resolve().is_relative_to(fields[1])]
    return max(above, key=lambda fields: len(fields[1]))[2]


if __name__ == "__main__":
    main()
