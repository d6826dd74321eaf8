"""What may be written under each key: the dataclasses' types and marks, read once, as a small tree.

`conform` checks a file by it, `schema` describes it, `document` writes it, and a reload asks it
which keys are taken over. So none of them can know another configuration than the others.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cache
from typing import Any, Union

from relay.config.tree import dotted
from relay.mail.option import Mark, NameKey, NotEmpty, Range, ShortKey, TextForm
from relay.route.next_hop import Rate


@dataclass(frozen=True, slots=True)
class Truth:
    """True or false."""


@dataclass(frozen=True, slots=True)
class Duration:
    """`30s`, `5m`."""


@dataclass(frozen=True, slots=True)
class Number:
    """A whole number in a range."""

    range: Range


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text, of a form or any. `is_secret`: never shown."""

    form: TextForm | None
    is_secret: bool = False


@dataclass(frozen=True, slots=True)
class Maybe:
    """A value, or null for none (of a duration: `never`)."""

    inner: Shape


@dataclass(frozen=True, slots=True)
class Items:
    """A list. `not_empty`: what an empty one would mean, where one is refused. `or_one`: one value
    may be written without brackets.
    """

    item: Shape
    not_empty: NotEmpty | None
    or_one: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """A map whose keys are names of the administrator's own: users (`form` None), or domains."""

    form: TextForm | None
    value: Shape


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a section, and the field of the dataclass that it becomes."""

    field: str
    shape: Shape
    is_reloaded: bool


@dataclass(frozen=True, slots=True)
class Short:
    """A key that stands for another: for `of`, or for the key `below` of the section `of`."""

    shape: Shape
    of: str
    below: str


@dataclass(frozen=True, slots=True)
class Section:
    """A map with keys that we define. `has_name`: its field `name` is the key it is found under.
    `short`: keys that may be written instead of another.
    """

    keys: Mapping[str, Key]
    required: tuple[str, ...]
    has_name: bool
    short: Mapping[str, Short]

    def __hash__(self) -> int:
        return hash(tuple(self.keys))


@dataclass(frozen=True, slots=True)
class NameOr:
    """The name of what is described elsewhere, or the description in place. `key`: of a section
    that says the name and nothing else.
    """

    name: Text
    section: Section
    key: str


Shape = Truth | Duration | Number | Choice | Text | Maybe | Items | Names | Section | NameOr


@cache
def section_of(cls: type) -> Section:
    """The keys a dataclass is written with: see `key_of`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    keys = {key_of(f.name): f for f in fields if f.name != "name"}
    return Section(
        {
            key: Key(f.name, _shape(hints[f.name]), Mark.RELOAD in _marks(hints[f.name]))
            for key, f in keys.items()
        },
        tuple(
            key
            for key, f in keys.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ),
        len(keys) < len(fields),
        {
            mark.key: Short(_shape(mark.type), key, mark.below)
            for key, f in keys.items()
            for mark in _marks(hints[f.name])
            if isinstance(mark, ShortKey)
        },
    )


def key_of(field: str) -> str:
    """The key that a field is written under: `from_`, too, which no field could be called."""
    return field.removesuffix("_bytes").removesuffix("_")


def known_keys(shape: Shape, key: str = "") -> Iterator[tuple[str, Shape]]:
    """Every dotted key below a shape; "*" stands for a name of its own, or a place in a list."""
    match shape:
        case Section():
            for name, below in shape.keys.items():
                yield dotted(key, name), below.shape
                yield from known_keys(below.shape, dotted(key, name))
            for name, short in shape.short.items():
                yield dotted(key, name), short.shape
        case Names():
            yield from known_keys(shape.value, f"{key}.*")
        case Items():
            yield from known_keys(shape.item, f"{key}.*")
        case Maybe():
            yield from known_keys(shape.inner, key)
        case NameOr():
            yield from known_keys(shape.section, key)
        case _:
            return


def is_secret(shape: Shape) -> bool:
    """Whether a value is a secret, or a list of them: it may stand in a file of its own."""
    match shape:
        case Text():
            return shape.is_secret
        case Maybe(inner) | Items(inner):
            return is_secret(inner)
        case _:
            return False


_NETWORK = {ipaddress.IPv4Network, ipaddress.IPv6Network}


def _marks(hint: Any) -> tuple[Any, ...]:
    return hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()


def _mark(hint: Any, kind: type) -> Any:
    return next((mark for mark in _marks(hint) if isinstance(mark, kind)), None)


def _shape(hint: Any) -> Shape:
    bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    origin, inner = typing.get_origin(bare), typing.get_args(bare)
    if origin in (Union, types.UnionType):
        if set(inner) == _NETWORK:
            return Text(TextForm.NETWORK)
        if (name_key := _mark(hint, NameKey)) is not None:
            name, section = map(_shape, inner)
            return _name_or(name, section, name_key.key)
        [one] = [arg for arg in inner if arg is not type(None)]
        return Maybe(_shape(one))
    if origin in (tuple, list, frozenset):
        return Items(_shape(inner[0]), _mark(hint, NotEmpty), Mark.ONE_OR_MORE in _marks(hint))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return Names(_mark(inner[0], TextForm), _shape(inner[1]))
    if dataclasses.is_dataclass(bare) and _mark(hint, TextForm) is None:
        return section_of(typing.cast(type, bare))
    return _leaf(hint, bare)


def _name_or(name: Shape, section: Shape, key: str) -> Shape:
    if not (isinstance(name, Text) and isinstance(section, Section)):
        raise TypeError(f"no rule for {name} | {section}")
    return NameOr(name, section, key)


def _leaf(hint: Any, bare: Any) -> Shape:
    form = _mark(hint, TextForm)
    if bare is bool:
        return Truth()
    if bare is timedelta:
        return Duration()
    if isinstance(bare, type) and issubclass(bare, StrEnum):
        return Choice(tuple(word.value for word in bare))
    if bare is int and form is None:
        return Number(_mark(hint, Range) or Range())
    if bare in (str, int, Rate):
        return Text(form, Mark.SECRET in _marks(hint))
    raise TypeError(f"no rule for the type {hint}")
