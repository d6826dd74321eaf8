"""The geometry of the charts: lines of results and bars of protection over time. Pure.

A template makes SVG of it, and a table of the same numbers for people who cannot see the chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil, log10

from relay.mail.event import EventResult, Protection
from relay.queue.statistics import HourlyCount

WIDTH, HEIGHT = 600, 160
_PROTECTIONS = (Protection.VERIFIED, Protection.ENCRYPTED, Protection.CLEAR)
_MOST_SLOTS = 60


@dataclass(frozen=True, slots=True)
class Slot:
    """The numbers of one slot of time."""

    begin: datetime
    results: dict[str, int]
    protections: dict[str, int]


@dataclass(frozen=True, slots=True)
class Line:
    """`points`: in SVG's form; the last one is at `x`, `y`."""

    name: str
    points: str
    x: float
    y: float
    total: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a stacked bar."""

    name: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Both charts. `top` and `top_delivered`: the numbers at their upper edges."""

    slots: tuple[Slot, ...]
    lines: tuple[Line, ...]
    bars: tuple[Bar, ...]
    top: int
    top_delivered: int
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(sum(slot.results.values()) for slot in self.slots)


def chart_of(found: Sequence[HourlyCount], *, begin: datetime, hours: int) -> Chart:
    """The charts of so many hours from `begin` on, in slots of one or more hours."""
    width = max(1, ceil(hours / _MOST_SLOTS))
    width = 24 if width > 1 and hours > 24 * 7 else width
    count = ceil(hours / width)
    slots = [
        Slot(
            begin + n * width * timedelta(hours=1),
            dict.fromkeys(EventResult, 0),
            dict.fromkeys(_PROTECTIONS, 0),
        )
        for n in range(count)
    ]
    for one in found:
        n = int((one.hour - begin) / timedelta(hours=1)) // width
        if 0 <= n < count:
            slots[n].results[one.result] += one.number
            if one.result == EventResult.DELIVERED and one.protection in slots[n].protections:
                slots[n].protections[one.protection] += one.number
    top = _round_up(max(max(slot.results.values()) for slot in slots))
    top_delivered = _round_up(max(sum(slot.protections.values()) for slot in slots))
    return Chart(
        tuple(slots),
        tuple(_line(result, slots, top) for result in EventResult),
        tuple(_bars(slots, top_delivered)),
        top,
        top_delivered,
    )


def _round_up(number: int) -> int:
    """The next greater number that is 1, 2 or 5 with zeros."""
    if number <= 5:
        return max(number, 1)
    unit: int = 10 ** int(log10(number))
    return next(step * unit for step in (1, 2, 5, 10) if step * unit >= number)


def _line(result: EventResult, slots: Sequence[Slot], top: int) -> Line:
    step = WIDTH / len(slots)
    points = [
        (round((n + 0.5) * step, 1), round(HEIGHT * (1 - slot.results[result] / top), 1))
        for n, slot in enumerate(slots)
    ]
    text = " ".join(f"{x},{y}" for x, y in points)
    return Line(result.value, text, *points[-1], sum(slot.results[result] for slot in slots))


def _bars(slots: Sequence[Slot], top: int) -> list[Bar]:
    step = WIDTH / len(slots)
    bars = []
    for n, slot in enumerate(slots):
        below = 0.0
        for name in _PROTECTIONS:
            height = HEIGHT * slot.protections[name] / top
            if height:
                y = HEIGHT - below - height
                x, width = n * step + step * 0.15, step * 0.7
                bars.append(
                    Bar(name.value, round(x, 1), round(y, 1), round(width, 1), round(height, 1))
                )
            below += height
    return bars
