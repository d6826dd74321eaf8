"""Compact JSON in ASCII (RFC 8259): what the delivery log and the queue's rows hold.

Each message is written down several times, so this is made by the fastest encoder there is. It
writes what is beyond ASCII as it is; the little that has any goes through the standard one, which
escapes it, lone surrogates too: no reader of a log may trip over them. It does not read them back
either: that is the standard decoder's, too.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

__all__ = ["of_json", "to_json"]

_escaping = json.JSONEncoder(separators=(",", ":"), check_circular=False, allow_nan=False).encode


def to_json(value: Any) -> str:
    """Dicts, lists, strings, numbers, booleans and None on one line."""
    try:
        line = orjson.dumps(value)
    except orjson.JSONEncodeError:
        return _escaping(value)
    return line.decode("ascii") if line.isascii() else _escaping(value)


def of_json(text: str | bytes) -> Any:
    """The value of a text. ValueError, or RecursionError, where it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)
