"""What the runs came to, as a table and a plot: medians, and the ratio of the two sides."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.run import Result

__all__ = ["line", "save", "table"]


def line(result: Result) -> str:
    """One run in one line."""
    return (
        f"{result.side:8} {result.rate:7.0f}/s  intake {result.messages / result.intake_seconds:7.0f}/s  "
        f"{result.cpu_per_thousand:6.2f} CPU s/1000  {result.peak_bytes >> 20:5} MiB"
    )


def table(results: Iterable[Result]) -> str:
    return ""


def save(results: Iterable[Result]) -> None:
    return None


def median(numbers: Iterable[float]) -> float:
    return statistics.median(numbers)
