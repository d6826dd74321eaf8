"""Compact JSON in ASCII (RFC 8259): what the delivery log and the queue's rows hold.

Each message is written down several times, so this is made by the fastest encoder there is. It
writes what is beyond ASCII as it is; the little that has any goes through the standard one, which escapes
it, lone surrogates too: no reader of a log may trip over them.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

__all__ = ["to_json"]

_escaping = json.JSONEncoder(separators=(",", ":"), check_circular=False, allow_nan=False).encode


def to_json(value: Any) -> str:
    """Dicts, lists, strings, numbers, booleans and None on one line."""
    try:
        line = orjson.dumps(value)
    except orjson.JSONEncodeError:
        return _escaping(value)
    return line.decode("ascii") if line.isascii() else _escaping(value)
