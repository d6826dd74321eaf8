"""An older commit of this relay beside the checkout: `make bench ARGS="against=COMMIT"`.

The older one has a worktree of its own (`git worktree add --detach`) and an environment of its own
in a temporary directory, with the same interpreter and the same releases of the libraries, so that
only the relay's own code differs. Both get the same configuration, made of keys that have not
changed, and a Postfix runs beside them.

Each round is a pair: the two relays one after the other, and the other way round in the next round.
The machine changes less between the two of a pair than in the whole time, so the ratio is taken of
each pair; its spread shows the noise.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.hops import NextHop
from benchmarks.report import faster_postfix, latencies, median, rounded, table, timed
from benchmarks.run import Result
from benchmarks.scenarios import SCENARIOS, Beside, Client, Scenario
from benchmarks.sides import AS_INSTALLED, Code, Side, postfix_side, relay_side

__all__ = ["beyond_noise", "code_of", "is_comparable", "pair_ratios", "start_both", "tables"]

_ROOT = Path(__file__).parents[1]
_BEFORE, _NOW = "relay before", "relay now"
_ENOUGH_PAIRS = 4
"""With fewer pairs, all of them are on one side of 1 too often by chance."""


@contextlib.contextmanager
def code_of(commit: str, directory: Path) -> Iterator[Code]:
    """A commit of this repository in a worktree, with an environment; removed at the end."""
    tree, environment = directory / "tree", directory / "environment"
    _run("git", "worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        _run(sys.executable, "-m", "venv", str(environment))
        pip = [str(environment / "bin/pip"), "--disable-pip-version-check", "--quiet"]
        freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
        releases = directory / "releases.txt"
        releases.write_text(_run(*freeze))
        _run(*pip, "install", "--constraint", str(releases), "--editable", str(tree))
        yield Code(str(environment / "bin/python"), tree)
    finally:
        _run("git", "worktree", "remove", "--force", str(tree))


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def start_both(
    directory: Path, scenario: Scenario, hop: NextHop, *, code: Code
) -> Iterator[Sequence[Side]]:
    """Start the older relay, this one, and Postfix in its two forms."""
    with contextlib.ExitStack() as stack:
        old = relay_side(directory / "before", scenario, hop, name=_BEFORE, code=code)
        new = relay_side(directory / "now", scenario, hop, name=_NOW)
        sides = [stack.enter_context(old), stack.enter_context(new)]
        sides.append(stack.enter_context(postfix_side(directory, scenario, hop)))
        if scenario.client is Client.LOCKSTEP:
            installed = postfix_side(directory, scenario, hop, name=AS_INSTALLED)
            sides.append(stack.enter_context(installed))
        yield sides


def is_comparable(scenario: Scenario) -> bool:
    """Whether a scenario compares the relay with Postfix, and not with a form of itself."""
    return scenario.beside is Beside.POSTFIX


def pair_ratios(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """The ratio of each pair, in the order of the rounds."""
    return [new / old for old, new in zip(before, now, strict=False)]


def beyond_noise(ratios: Sequence[float]) -> str:
    """`less` or `more` where all pairs agree and are enough; an empty text otherwise."""
    if len(ratios) < _ENOUGH_PAIRS:
        return ""
    if max(ratios) < 1:
        return "less"
    return "more" if min(ratios) > 1 else ""


def tables(results: Sequence[Result]) -> str:
    """One row for each scenario, and the latencies."""
    rows = []
    for scenario in SCENARIOS:
        mine = [result for result in results if result.scenario == scenario.name]
        if mine and not scenario.rate:
            rows.append(_row(scenario, mine))
    parts = [table(_HEAD, rows), latencies(results, (_BEFORE, _NOW, "Postfix"))]
    return "\n\n".join(part for part in parts if part)


_HEAD = (
    *("", "copies/s: before", "now", "Postfix", "now/before", "its rounds", "beyond noise"),
    *("CPU s/1000: before", "now", "now/before", "its rounds", "beyond noise"),
    *("MiB: before", "now", "syncs/1000: before", "now"),
)


def _row(scenario: Scenario, results: Sequence[Result]) -> list[str]:
    def rate(result: Result) -> float:
        return result.rate

    def cpu(result: Result) -> float:
        return result.cpu_per_thousand

    other = median(one.rate for one in timed(results, faster_postfix(results)))
    metered = [timed(results, side, metered=True) for side in (_BEFORE, _NOW)]
    return [
        scenario.title,
        *_values(results, rate),
        rounded(other),
        *_compared(results, rate),
        *_values(results, cpu),
        *_compared(results, cpu),
        *(rounded(median((one.peak_bytes or 0) >> 20 for one in runs)) for runs in metered),
        *(rounded(median(one.syncs_per_thousand for one in runs)) for runs in metered),
    ]


def _values(results: Sequence[Result], value: Callable[[Result], float]) -> list[str]:
    return [rounded(median(value(one) for one in timed(results, side))) for side in (_BEFORE, _NOW)]


def _compared(results: Sequence[Result], value: Callable[[Result], float]) -> list[str]:
    before, now = ([value(one) for one in timed(results, side)] for side in (_BEFORE, _NOW))
    ratios = pair_ratios(before, now)
    if not ratios:
        return ["", "", ""]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [f"**{median(ratios):.2f}**", spread, beyond_noise(ratios)]
