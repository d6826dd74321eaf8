"""Compact JSON in ASCII (RFC 8259), for the delivery log and the rows of the queue.

The relay writes JSON several times for each message, so a fast encoder (orjson) does it. That
encoder does not escape characters beyond ASCII and refuses lone surrogates. A value that has
either goes through the standard encoder, which escapes both, so that every reader of a log can
read it. A text with an escaped lone surrogate is read by the standard decoder for the same reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import orjson

JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
"""A value of JSON."""

JsonObject: TypeAlias = dict[str, JsonValue]
"""An object that the relay writes."""

JsonFields: TypeAlias = Mapping[str, Any]
"""An object that the relay wrote and reads again, so that its form is known."""

JsonDocument: TypeAlias = dict[str, Any]
"""An object that is made step by step, or read by its keys: an answer for the CLI, a schema."""

_escaping = json.JSONEncoder(separators=(",", ":"), check_circular=False, allow_nan=False).encode


def to_json(value: object) -> str:
    """Dicts, lists, strings, numbers, booleans and None as one line of JSON."""
    try:
        line = orjson.dumps(value)
    except orjson.JSONEncodeError:
        return _escaping(value)
    return line.decode("ascii") if line.isascii() else _escaping(value)


def ascii_json(value: object) -> str | None:
    """The same, where no text in it has a character beyond ASCII; else None."""
    try:
        line = orjson.dumps(value)
    except orjson.JSONEncodeError:
        return None
    return line.decode("ascii") if line.isascii() else None


def of_json(text: str | bytes) -> Any:
    """The value that a JSON text holds. ValueError or RecursionError where the text is no JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def object_of(text: str) -> JsonDocument | None:
    """The object that a JSON text holds; None where it holds none, or is no JSON."""
    try:
        found = of_json(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
