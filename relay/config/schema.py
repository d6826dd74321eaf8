"""The configuration as a JSON Schema, for editors: the same shape that `conform` checks a file by.

Both take the same values, with two exceptions. Patterns know a form, and not whether a network has
bits behind its prefix or a name obeys IDNA. And the schema sees a value as YAML 1.2 reads it, where
`yes` is a text.
"""

from __future__ import annotations

from typing import Any

from relay.config import quantities
from relay.config.document import as_document
from relay.config.sections import Config
from relay.config.shape import (
    Choice,
    Duration,
    Items,
    Maybe,
    NameOr,
    Names,
    Number,
    Section,
    Shape,
    Text,
    Truth,
    is_secret,
    section_of,
)
from relay.config.words import WORDS
from relay.mail.jsontext import JsonDocument
from relay.mail.option import TextForm

_TRUTHS = [True, False, *quantities.TRUTHS]


def json_schema() -> JsonDocument:
    """The schema (draft 2020-12) of a whole file."""
    schema = _of(section_of(Config), as_document(Config()))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "relay.yaml",
        **schema,
    }


def _of(shape: Shape, default: Any = None) -> JsonDocument:
    match shape:
        case Section():
            return _of_section(shape, default if isinstance(default, dict) else {})
        case Names():
            names = {"propertyNames": {"pattern": _whole(shape.form)}} if shape.form else {}
            return {"type": ["object", "null"], "additionalProperties": _of(shape.value), **names}
        case Items():
            return _of_items(shape) | _default(default)
        case NameOr(name, section, key):
            named = {"type": "object", "properties": {key: _of(name)}, "required": [key]}
            return {"anyOf": [_of(name), {**named, "additionalProperties": False}, _of(section)]}
        case Maybe(inner):
            never = [{"const": "never"}] if isinstance(inner, Duration) else []
            return {"anyOf": [_of(inner), *never, {"type": "null"}]} | _default(default)
        case _:
            return _of_leaf(shape) | _default(default)


def _of_section(shape: Section, defaults: JsonDocument) -> JsonDocument:
    properties = {name: _of(key.shape, defaults.get(name)) for name, key in shape.keys.items()}
    secrets = [name for name, key in shape.keys.items() if is_secret(key.shape)]
    properties |= {f"{name}_file": _of(Text(TextForm.PATH)) for name in secrets}
    properties |= {name: _of(short.shape) for name, short in shape.short.items()}
    found = {"properties": properties, "additionalProperties": False}
    rules: list[JsonDocument] = [
        {"anyOf": [{"required": [name]}, *({"required": [other]} for other in others)]}
        for name in shape.required
        if (others := _others(shape, name))
    ]
    rules += [{"not": {"required": [name, short.of]}} for name, short in shape.short.items()]
    if rules:
        found["allOf"] = rules
    if shape.required:
        required = [name for name in shape.required if not _others(shape, name)]
        return {"type": "object", **found, "required": required}
    return {"type": ["object", "null"], **found}


def _others(shape: Section, name: str) -> list[str]:
    """The keys that may be written instead of a required one."""
    in_file = [f"{name}_file"] if is_secret(shape.keys[name].shape) else []
    return in_file + [
        other for other, short in shape.short.items() if short.of == name and not short.below
    ]


def _of_items(shape: Items) -> JsonDocument:
    if shape.not_empty is not None:
        found: JsonDocument = {"type": "array", "items": _of(shape.item), "minItems": 1}
    else:
        found = {"type": ["array", "null"], "items": _of(shape.item)}
    return {"anyOf": [_alone(shape.item), found]} if shape.or_one else found


def _alone(item: Shape) -> JsonDocument:
    """One value without brackets: of a list of lists, one value of the inner list."""
    return _alone(item.item) if isinstance(item, Items) and item.or_one else _of(item)


def _of_leaf(shape: Truth | Duration | Number | Choice | Text) -> JsonDocument:
    match shape:
        case Truth():
            return {"enum": _TRUTHS}
        case Number(range):
            return {"type": "integer", "minimum": range.least, "maximum": range.greatest}
        case Choice(words=choices):
            return {"enum": list(choices)}
        case Duration():
            return {
                "type": "string",
                "pattern": rf"^{quantities.DURATION}$",
                "examples": ["30s", "4h"],
            }
        case Text(form=TextForm.SIZE):
            most = quantities.LARGEST_SIZE
            return {
                "type": ["string", "integer"],
                "pattern": _whole(TextForm.SIZE),
                "minimum": 1,
                "maximum": most,
                "examples": ["50MiB"],
            }
        case Text(form):
            if form is None:
                return {"type": "string"}
            example = WORDS[form].example
            return {"type": "string", "pattern": _whole(form), "examples": [example]}


def _whole(form: TextForm) -> str:
    return f"^(?:{WORDS[form].pattern})$"


def _default(value: Any) -> JsonDocument:
    return {"default": value} if value not in (None, "") else {}
