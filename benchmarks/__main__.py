"""`make bench`: runs every scenario on both sides in turn (A B, B A) and writes a report.

    python -m benchmarks [WORD …] [--only NAME …] [--rounds N] [--smoke] [--directory D] [--save]

`benchmarks.words` lists the words. A scenario begins only while time is left. The first round of
each is metered (syncs, memory) and warms up; the rates and the CPU are of the others, with nothing
attached. `--smoke` runs a few messages of the cheap scenarios: it shows that everything works, and
says nothing about speed.

`against` and `peers` take the scenarios that compare the relay with Postfix. `nodes`, `million` and
`soak` are measurements of their own (`benchmarks.nodes` and so on), without Postfix.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import before, peers, report, soak
from benchmarks.hops import NextHop, next_hop
from benchmarks.run import Result, run
from benchmarks.scenarios import SCENARIOS, Scenario
from benchmarks.sides import Side, start_sides
from benchmarks.words import Measurement, Words, read_words

_SMOKE_MESSAGES = 60
_TMPFS = "tmpfs"
_ROUNDS = {Measurement.BEFORE: 5}
_MINUTES = {
    Measurement.BEFORE: 20.0,
    Measurement.PEERS: 20.0,
    Measurement.NODES: 6.0,
    Measurement.SOAK: 60.0,
}

_Start = Callable[[Path, Scenario, NextHop], contextlib.AbstractContextManager[Sequence[Side]]]


def main() -> None:
    """Read the arguments, measure, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="see benchmarks/words.py")
    parser.add_argument("--only", action="append", choices=[one.name for one in SCENARIOS])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", action="append", help="nodes: standing, series or full")
    parser.add_argument(
        "--shrink",
        type=int,
        default=1,
        help="divide the numbers of messages by this, on a machine that has little time",
    )
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results and the README's table"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="on the disk to be measured"
    )
    wanted = parser.parse_intermixed_args()
    try:
        words = read_words(wanted.words)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process stays behind
    if _file_system(wanted.directory) == _TMPFS:
        parser.error(f"{wanted.directory} is in memory: name a directory on a disk")
    wanted.rounds = wanted.rounds or _ROUNDS.get(words.measurement, 3)
    wanted.minutes = words.minutes or _MINUTES.get(words.measurement, 13.0)
    match words.measurement:
        case Measurement.POSTFIX:
            _beside_postfix(wanted, words)
        case Measurement.BEFORE:
            _beside_older(wanted, words)
        case Measurement.PEERS:
            _beside_peers(wanted, words)
        case Measurement.NODES:
            _nodes(wanted)
        case Measurement.MILLION:
            _million(wanted)
        case Measurement.SOAK:
            _soak(wanted)


def _beside_postfix(wanted: argparse.Namespace, words: Words) -> None:
    results, loads = _all_scenarios(wanted, words, start_sides)
    print(report.tables(results))
    if wanted.save and not words.is_quick:
        report.save(results, loads)


def _beside_older(wanted: argparse.Namespace, words: Words) -> None:
    """The relay of another commit, this one, and Postfix."""
    with _directory(wanted.directory) as directory, before.code_of(words.commit, directory) as code:
        start = functools.partial(before.start_both, code=code)
        results, loads = _all_scenarios(wanted, words, start)
    print(f"{report.about(results, loads)}\n\n{before.tables(results)}")


def _beside_peers(wanted: argparse.Namespace, words: Words) -> None:
    """Exim, OpenSMTPD and Haraka, beside this relay and Postfix."""
    with _directory(wanted.directory) as directory:
        programs = peers.installed(directory)
        start = functools.partial(peers.start_peers, programs=programs)
        results, loads = _all_scenarios(wanted, words, start)
        durabilities = peers.trace_all(directory, programs)
    print(f"{report.about(results, loads)}\n\n{peers.tables(results, durabilities, programs)}")


def _all_scenarios(
    wanted: argparse.Namespace, words: Words, start: _Start
) -> tuple[list[Result], list[float]]:
    """The results, and how busy the machine was with other work before each scenario."""
    deadline = time.monotonic() + 60 * wanted.minutes
    results: list[Result] = []
    loads: list[float] = []
    for scenario in _chosen(wanted, words):
        if time.monotonic() > deadline:
            print(f"no time is left for {scenario.name}")
            continue
        rounds = 1 if wanted.smoke else wanted.rounds
        loads.append(_others_load())
        results += measure(scenario, wanted.directory, rounds, deadline, start)
    return results, loads


@contextlib.contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    """A directory on the disk to be measured, which servers under their own users may enter."""
    with tempfile.TemporaryDirectory(prefix="relay-bench-", dir=parent) as path:
        directory = Path(path)
        directory.chmod(0o755)
        yield directory


def _nodes(wanted: argparse.Namespace) -> None:
    """Several nodes with one queue, and a relay with its queue in a directory."""
    from benchmarks import nodes

    load = _others_load()
    rounds, shrink = (1, 200) if wanted.smoke else (wanted.rounds, wanted.shrink)
    # The last round of each part may still take a while.
    until = time.monotonic() + 60 * wanted.minutes
    with _directory(wanted.directory) as directory:
        found = nodes.measure_nodes(
            directory,
            parts=wanted.part or nodes.PARTS,
            rounds=rounds,
            shrink=shrink,
            is_smoke=wanted.smoke,
            until=until,
        )
    print(f"{nodes.about(load)}\n\n{nodes.table(found)}")


def _million(wanted: argparse.Namespace) -> None:
    """A queue of a million beside an empty one."""
    from benchmarks import million

    print(f"other programs use {_others_load():.1f} cores")
    shrink = 500 if wanted.smoke else wanted.shrink
    million.measure(wanted.directory, shrink=shrink)


def _soak(wanted: argparse.Namespace) -> None:
    """The relay alone, for an hour at half load."""
    load = _others_load()
    with _directory(wanted.directory) as directory:
        found = soak.soak(directory, max(round(wanted.minutes), 2))
    print(f"{report.machine()} Cores busy with other work before: {load:.1f}.")
    print(f"\n{soak.comparison(found)}")


def _chosen(wanted: argparse.Namespace, words: Words) -> Iterator[Scenario]:
    for scenario in SCENARIOS:
        if wanted.only and scenario.name not in wanted.only:
            continue
        if words.is_quick and not scenario.quick:
            continue
        if words.measurement is Measurement.BEFORE and not before.is_comparable(scenario):
            continue
        if words.measurement is Measurement.PEERS and not peers.is_measured(scenario):
            continue
        if wanted.smoke:
            if scenario.cheap:
                yield replace(scenario, messages=_SMOKE_MESSAGES)
        else:
            yield replace(scenario, messages=max(scenario.messages // wanted.shrink, 1))


def measure(
    scenario: Scenario, parent: Path, rounds: int, deadline: float, start: _Start
) -> list[Result]:
    """All sides, one after the other, as often as there are rounds; every second round goes the
    other way round, so that no side is always the one that comes after a certain other.
    """
    results = []
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_directory(parent))
        hop = stack.enter_context(next_hop(directory, scenario))
        sides = list(stack.enter_context(start(directory, scenario, hop)))
        # The first round warms up, and is the one that is metered.
        for number in range(rounds + (rounds > 1)):
            if number and time.monotonic() > deadline:
                break
            for side in sides[:: -1 if number % 2 else 1]:
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
    """The type of the file system a directory is on; "" where it is not known (a chroot)."""
    lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [fields for fields in lines if directory.resolve().is_relative_to(fields[1])]
    return max(above, key=lambda fields: len(fields[1]), default=["", "", ""])[2]


if __name__ == "__main__":
    main()
