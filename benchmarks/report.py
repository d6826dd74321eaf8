"""The results of the runs as tables and a plot: medians, and ratios between the sides."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.run import Result
from benchmarks.scenarios import SCENARIOS, Beside, Scenario

__all__ = [
    "about",
    "faster_postfix",
    "latencies",
    "line",
    "machine",
    "median",
    "rounded",
    "save",
    "table",
    "tables",
    "timed",
]

_RESULTS = Path(__file__).parent / "results"
_README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_WIDTH = 100
_SIDES = ("relay", "relay, 2 workers", "Postfix")


def line(result: Result) -> str:
    """One run in one line."""
    syncs = (
        "" if result.syncs is None else f"  {1000 * result.syncs / result.messages:5.0f} syncs/1000"
    )
    peak = f"  {result.peak_bytes >> 20:4} MiB" if result.peak_bytes is not None else ""
    most = f"  {result.most_at_once} at once" if result.most_at_once else ""
    intake = result.messages / result.intake_seconds
    return (
        f"{result.side:20} {result.rate:7.0f}/s  intake {intake:6.0f}/s  "
        f"{result.cpu_per_thousand:6.2f} CPU s/1000{peak}{syncs}{most}"
    )


def tables(results: Sequence[Result]) -> str:
    """All of it in Markdown."""
    parts = [_against_postfix(results), latencies(results, _SIDES), _against_others(results)]
    return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, its numbers on the right; an empty text if it has no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if not lines:
        return ""
    rule = "|---" + "|---:" * (len(head) - 1) + "|"
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), rule, *lines])


def _against_postfix(results: Sequence[Result]) -> str:
    rows = []
    for scenario in SCENARIOS:
        mine = [result for result in results if result.scenario == scenario.name]
        if scenario.beside is Beside.POSTFIX and not scenario.rate and mine:
            rows.append(_row(scenario, mine))
    head = (
        *("", "copies/s: relay", "2 workers", "Postfix", "ratio", "2 workers", "wanted"),
        *("CPU s/1000: relay", "Postfix", "MiB: relay", "2 workers", "Postfix"),
        *("syncs/1000: relay", "Postfix"),
    )
    return table(head, rows)


def _row(scenario: Scenario, results: Sequence[Result]) -> list[str]:
    sides = (*_SIDES[:2], faster_postfix(results))

    def of(side: str, value: Callable[[Result], float], metered: bool = False) -> float:
        return median(value(one) for one in timed(results, side, metered=metered))

    rates = [of(side, lambda one: one.rate) for side in sides]
    cpu = [of(side, lambda one: one.cpu_per_thousand) for side in sides]
    peaks = [of(side, lambda one: (one.peak_bytes or 0) / 2**20, True) for side in sides]
    syncs = [of(side, lambda one: one.syncs_per_thousand, True) for side in sides]
    wanted = f"{scenario.target:g}" if scenario.target else ""
    return [
        scenario.title,
        *map(rounded, rates),
        f"**{rounded(rates[0] / rates[2])}**",
        f"**{rounded(rates[1] / rates[2])}**",
        wanted,
        *map(rounded, (cpu[0], cpu[2])),
        *(rounded(round(peak)) if peak == peak else "" for peak in peaks),
        *map(rounded, (syncs[0], syncs[2])),
    ]


def timed(results: Sequence[Result], side: str, *, metered: bool = False) -> list[Result]:
    """The runs of a side that were metered, or those that were not: only these have true times. All
    of them where there are no others.
    """
    mine = [one for one in results if one.side == side]
    return [one for one in mine if one.is_metered == metered] or mine


def faster_postfix(results: Sequence[Result]) -> str:
    """The name of that form of Postfix that passed on more a second."""
    rates = {
        side: median(one.rate for one in timed(results, side))
        for side in {one.side for one in results}
        if side.startswith("Postfix")
    }
    return max(rates, key=lambda side: rates[side], default="Postfix")


def rounded(value: float) -> str:
    """A number with its significant digits; an empty text for one that was not measured."""
    if value != value:
        return ""
    return f"{value:.0f}" if value >= 20 or value == int(value) else f"{value:.2f}"


def latencies(results: Sequence[Result], sides: Iterable[str]) -> str:
    """Percentiles of the times to the 250 and to the next hop, of runs that have such times."""
    rows = []
    for side in sides:
        mine = [result for result in timed(results, side) if result.arrival_seconds]
        replies = [one for result in mine for one in result.reply_seconds]
        arrivals = [one for result in mine for one in result.arrival_seconds]
        if replies and arrivals:
            rows.append([side, *_percentiles(replies), *_percentiles(arrivals)])
    head = ("ms at 150 messages/s", "250: p50", "p95", "p99", "next hop: p50", "p95", "p99")
    return table(head, rows)


def _percentiles(seconds: Sequence[float]) -> list[str]:
    cuts = statistics.quantiles(seconds, n=100)
    return [f"{1000 * cuts[percent - 1]:.1f}" for percent in (50, 95, 99)]


def _against_others(results: Sequence[Result]) -> str:
    rows = []
    for scenario in SCENARIOS:
        mine = [result for result in results if result.scenario == scenario.name]
        sides = list(dict.fromkeys(result.side for result in mine))
        if scenario.beside is Beside.POSTFIX or len(sides) != 2:
            continue
        cells = [scenario.title]
        for value in (_intake, lambda one: one.rate, lambda one: one.cpu_per_thousand):
            for side in sides:
                middle = median(value(result) for result in timed(mine, side))
                cells.append(rounded(middle))
        rows.append(cells)
    head = (
        *("relay, and the other", "intake/s", "other", "end to end/s", "other"),
        *("CPU s/1000", "other"),
    )
    return table(head, rows)


def _intake(result: Result) -> float:
    return result.messages / result.intake_seconds


def median(numbers: Iterable[float]) -> float:
    """Not a number where there are none."""
    found = list(numbers)
    return statistics.median(found) if found else float("nan")


def save(results: Sequence[Result], loads: Sequence[float]) -> None:
    """The tables and the plot in benchmarks/results, and the first table in the README."""
    _RESULTS.mkdir(exist_ok=True)
    text = f"{about(results, loads)}\n\n{tables(results)}\n"
    (_RESULTS / "report.md").write_text(text)
    _plot(results)
    readme = _README.read_text()
    if _BEGIN in readme and _END in readme:
        before, after = readme.partition(_BEGIN)[0], readme.partition(_END)[2]
        _README.write_text(f"{before}{_BEGIN}\n{text}{_END}{after}")


def machine() -> str:
    """When, and on what, the runs took place: the beginning of a paragraph."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (one.partition(":")[2].strip() for one in lines if "model name" in one)
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores"
        f" ({next(models, platform.machine())}), Python {platform.python_version()}, load"
        " generators on the same cores."
    )


def about(results: Sequence[Result], loads: Sequence[float]) -> str:
    """The machine, the rounds, and how busy the machine was with other work: on a busy one the
    ratios say little.
    """
    keys = [(result.scenario, result.side) for result in results]
    rounds = max(map(keys.count, keys))
    return textwrap.fill(
        f"{machine()} Medians of up to {rounds} rounds. Cores busy with other work before a"
        f" scenario: {min(loads):.1f} to {max(loads):.1f}.",
        _WIDTH,
    )


def _plot(results: Sequence[Result]) -> None:
    """Plot the rates as multiples of Postfix's rates, if matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is missing (pip install '.[bench]')")
        return
    found = []
    for scenario in SCENARIOS:
        mine = [one for one in results if one.scenario == scenario.name]
        sides = (*_SIDES[:2], faster_postfix(mine))
        rates = [median(one.rate for one in timed(mine, side)) for side in sides]
        if rates[2] == rates[2] and not scenario.rate:
            found.append((scenario.title, rates[0] / rates[2], rates[1] / rates[2]))
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(found) + 1.2))
    for column, label, shift, colour in (
        (1, "relay", -0.2, "#4477aa"),
        (2, "2 workers", 0.2, "#66ccee"),
    ):
        places = [place + shift for place in range(len(found))]
        axes.barh(places, [one[column] for one in found], 0.38, label=label, color=colour)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [one[0] for one in found])
    axes.invert_yaxis()
    axes.set_xlabel("copies a second, Postfix = 1")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(_RESULTS / "ratios.svg", metadata={"Date": None})
