"""Quantities as the operator writes them: yes and no, durations, sizes, numbers and rates. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import timedelta

from relay.config.mistakes import shown
from relay.mail.option import Range
from relay.route.next_hop import Rate

DURATION = (
    r"(?!(?:0+(?:ms|[wdhms]))+$)(?=.)"
    r"(?:[0-9]{1,3}w)?(?:[0-9]{1,4}d)?(?:[0-9]{1,6}h)?(?:[0-9]{1,7}m(?!s))?(?:[0-9]{1,9}s)?"
    r"(?:[0-9]{1,12}ms)?"
)
"""A duration: each unit once, from the longest to the shortest, and not nothing in all."""

_DURATION = re.compile(DURATION)
_DURATION_PART = re.compile(r"([0-9]+)(ms|[smhdw])")
_LIKE_A_DURATION = re.compile(r"(?:[0-9]+(?:ms|[wdhms]))+")
_UNITS = {
    "w": timedelta(weeks=1),
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}

_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB)?")
_SIZE_UNITS = {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "B": 1}
LARGEST_SIZE = 10**15 - 1


def _in_each_case(words: Mapping[str, bool]) -> Mapping[str, bool]:
    return {w: truth for word, truth in words.items() for w in (word, word.title(), word.upper())}


TRUTHS = _in_each_case({"yes": True, "no": False, "on": True, "off": False})
"""Words of YAML 1.1 that are texts in YAML 1.2. In both `true` is no text, "true" is one."""

_ALL_TRUTHS = {**TRUTHS, **_in_each_case({"true": True, "false": False})}


def parse_truth(text: str) -> bool:
    """`true`, `yes`, `on` and their opposites."""
    if text not in _ALL_TRUTHS:
        raise ValueError(f"{shown(text)} is neither true nor false; write true or false")
    return _ALL_TRUTHS[text]


def parse_duration(text: str) -> timedelta:
    """`30s`, `5m`, `1h30m`, `5d`. A bare number is refused: nobody could tell what it counts."""
    if not _DURATION.fullmatch(text):
        raise ValueError(_not_a_duration(text))
    return sum((int(n) * _UNITS[unit] for n, unit in _DURATION_PART.findall(text)), timedelta())


def _not_a_duration(text: str) -> str:
    if text.isdecimal():
        return f"{shown(text)} is not a duration; write a unit, as in {with_unit(text, None)}"
    if not _LIKE_A_DURATION.fullmatch(text):
        return f"{shown(text)} is not a duration; write it as 30s, 5m, 4h, 5d or 1h30m"
    if not any(int(number[:12]) for number, _ in _DURATION_PART.findall(text)):
        return "has to be longer than nothing; write a longer duration"
    if any(len(number) > 4 for number, _ in _DURATION_PART.findall(text)):
        return f"{shown(text)} is longer than ten years; write a shorter duration"
    return f"{shown(text)} has its units in no order; write each once, as in 1d12h or 1h30m"


def with_unit(number: str, usual: timedelta | None) -> str:
    """A bare number with the unit, of s, m, h and d, that brings it nearest to the usual value."""
    if usual is None or not int(number[:12]) > 0:
        return f"{number}s"

    def distance(unit: str) -> float:
        return abs(math.log(int(number[:12]) * (_UNITS[unit] / usual)))

    return f"{number}{min('smhd', key=distance)}"


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads as `value`."""
    text, rest = "", value
    for unit, length in _UNITS.items():
        if unit == "w":
            continue
        count, rest = divmod(rest, length)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


def parse_size(text: str) -> int:
    """`64KiB`, `50MiB`, or a plain number of octets."""
    match = _SIZE.fullmatch(text)
    if match is None or (text.startswith("0") and len(match[1]) > 1):
        cure = "write it as 64KiB, 50MiB, 2GiB or a number of octets"
        raise ValueError(f"{shown(text)} is not a size; {cure}")
    return int(match[1]) * _SIZE_UNITS[match[2] or "B"]


def parse_number(text: str, allowed: Range) -> int:
    """A whole number in decimal digits."""
    if not re.fullmatch(r"-?[0-9]+", text):
        raise ValueError(f"{shown(text)} is not a whole number; write digits only")
    bare = text.removeprefix("-")
    if len(bare) > 1 and bare.startswith("0"):
        # In YAML 1.1 this is octal, in YAML 1.2 it is not.
        raise ValueError(f"{shown(text)} begins with 0; write {bare.lstrip('0') or '0'}")
    if len(text) > 12 or not allowed.least <= int(text) <= allowed.greatest:
        cure = f"write a number from {allowed.least} to {allowed.greatest}"
        raise ValueError(f"{text[:40]} is out of range; {cure}")
    return int(text)


RATE = re.compile(r"([1-9][0-9]{0,8})/([smh])")
_RATE_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rate(text: str) -> Rate:
    """`5/s`, `30/m`, `1000/h`."""
    match = RATE.fullmatch(rate(text))
    assert match is not None
    return Rate(int(match[1]), _RATE_SECONDS[match[2]])


def format_rate(value: Rate) -> str:
    """The text that `parse_rate` reads as `value`."""
    [unit] = [unit for unit, seconds in _RATE_SECONDS.items() if seconds == value.seconds]
    return f"{value.messages}/{unit}"


def rate(text: str) -> str:
    if not RATE.fullmatch(text):
        raise ValueError(f"{shown(text)} is not a rate; write it as 5/s, 30/m or 1000/h")
    return text


def format_size(octets: int) -> str:
    """The shortest text that `parse_size` reads as `octets`."""
    for unit, count in _SIZE_UNITS.items():
        if octets and octets % count == 0 and unit != "B":
            return f"{octets // count}{unit}"
    return str(octets)
