"""Queue ids: the name of a message in the queue, in its Received field and in every log.

Eleven digits of time in microseconds, then six of chance, in base 32 without the
letters that are mistaken for digits. Ids sort by arrival, say nothing about how much
mail passes, and need no agreement between processes or nodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PLAIN_DIGITS = str.maketrans(_DIGITS, "0123456789ABCDEFGHIJKLMNOPQRSTUV")
_PAIRS = [high + low for high in _DIGITS for low in _DIGITS]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_CHANCE_BITS = 30
_CHANCE_BYTES = 4
_DRAWN_BYTES = 4096
_TIME_BITS = 55


def new_queue_id(now: datetime) -> str:
    """A new id of 17 characters for a message that arrives at `now`.

    Two messages of the same microsecond, anywhere, get the same id once in 10^9 times;
    the store refuses the second of them for a moment.
    """
    micros = max(0, (now - _EPOCH) // _MICROSECOND) & ((1 << _TIME_BITS) - 1)
    number, pairs = micros << _CHANCE_BITS | next(_chances), _PAIRS
    return (
        f"{_DIGITS[number >> 80]}"
        f"{pairs[number >> 70 & 1023]}{pairs[number >> 60 & 1023]}"
        f"{pairs[number >> 50 & 1023]}{pairs[number >> 40 & 1023]}"
        f"{pairs[number >> 30 & 1023]}{pairs[number >> 20 & 1023]}"
        f"{pairs[number >> 10 & 1023]}{pairs[number & 1023]}"
    )


def arrival_of(queue_id: str) -> datetime:
    """The time that an id was made at; 1970 of what is no id."""
    try:
        number = int(queue_id.translate(_PLAIN_DIGITS), 32)
        return _EPOCH + (number >> _CHANCE_BITS) * _MICROSECOND
    except (ValueError, OverflowError):
        return _EPOCH


def _draw() -> Iterator[int]:
    """Chance, drawn from the system for a thousand ids at once.

    Each call of the system lets go of the interpreter lock, and in a busy process getting it
    back takes longer than all the rest of an accepted message.
    """
    while True:
        drawn = secrets.token_bytes(_DRAWN_BYTES)
        for start in range(0, _DRAWN_BYTES, _CHANCE_BYTES):
            yield int.from_bytes(drawn[start : start + _CHANCE_BYTES]) >> (
                8 * _CHANCE_BYTES - _CHANCE_BITS
            )


_chances = _draw()
