"""The configuration as a JSON Schema, for editors: made from the same dataclasses that are read into."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any, Union

from relay.config.conform import SIZES, is_network, shape_of
from relay.config.document import as_document
from relay.config.sections import Config
from relay.config.tree import dotted

__all__ = ["json_schema"]

_DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|w|d|h|m|s))+$", "examples": ["30s", "4h"]}
_SIZE = {
    "type": ["string", "integer"],
    "pattern": r"^[0-9]+(B|KiB|MiB|GiB|TiB)?$",
    "examples": ["50MiB"],
}
_NETWORK = {"type": "string", "examples": ["192.0.2.0/24", "2001:db8::/32"]}


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of a whole file."""
    schema = _of(Config, "", as_document(Config()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "relay.yaml",
        **schema,
    }


def _of(hint: Any, key: str, default: Any) -> dict[str, Any]:
    if typing.get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        return _of_union(hint, key, default)
    if dataclasses.is_dataclass(hint):
        return _of_section(typing.cast(type, hint), key, default)
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        inner = _of(typing.get_args(hint)[1], f"{key}.*", None)
        return {"type": ["object", "null"], "additionalProperties": inner}
    if origin in (tuple, list, frozenset):
        return {"type": ["array", "null"], "items": _of(typing.get_args(hint)[0], f"{key}.*", None)}
    return _of_value(hint, key) | ({"default": default} if default is not None else {})


def _of_union(hint: Any, key: str, default: Any) -> dict[str, Any]:
    if is_network(hint):
        return dict(_NETWORK)
    [inner] = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    words: list[Any] = [{"const": "never"}] if inner is timedelta else []
    return {"anyOf": [_of(inner, key, None), *words, {"type": "null"}]} | (
        {"default": default} if default is not None else {}
    )


def _of_section(cls: type, key: str, default: Any) -> dict[str, Any]:
    shape = shape_of(cls)
    required = [
        name
        for name, (field, _) in shape.items()
        if (f := cls.__dataclass_fields__[field]).default is dataclasses.MISSING  # type: ignore[attr-defined]
        and f.default_factory is dataclasses.MISSING
    ]
    defaults = default if isinstance(default, dict) else {}
    return {
        "type": ["object", "null"],
        "description": " ".join((cls.__doc__ or "").split()),
        "properties": {
            name: _of(hint, dotted(key, name), defaults.get(name))
            for name, (_, hint) in shape.items()
        },
        "additionalProperties": False,
    } | ({"required": required} if required else {})


def _of_value(hint: Any, key: str) -> dict[str, Any]:
    if hint is bool:
        return {"type": "boolean"}
    if hint is int and key in SIZES:
        return dict(_SIZE)
    if hint is int:
        return {"type": "integer", "minimum": 1}
    if hint is timedelta:
        return dict(_DURATION)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return {"enum": [word.value for word in hint]}
    return {"type": "string"}
