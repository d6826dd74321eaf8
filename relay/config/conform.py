"""The tree against the dataclasses: unknown keys, wrong types, missing values, words not to choose from."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any, Union

from relay.config import words
from relay.config.mistakes import Mistake, Place, shown, split
from relay.config.sections import Config
from relay.config.tree import Leaf, List, Map, Tree, dotted

_DOMAIN_MAPS = frozenset({"policy.domains", "policy.destinations", "routes", "dkim.domains"})
SIZES = frozenset({"limits.message_size"})


_CHECKS: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = tuple(
    (re.compile(pattern), check)
    for pattern, check in (
        (r"hostname", words.domain),
        (r"listeners\.\d+\.address", words.listen_address),
        (r"listeners\.\d+\.(certificate|key)", words.path),
        (r"listeners\.\d+\.socket_mode", words.file_mode),
        (r"access\.users\..+\.password", words.argon2),
        (r"access\.users\..+\.sender_domains\.\d+", words.domain_pattern),
        (r"routes\..+\.host", words.mail_host),
        (r"routes\..+\.password_file", words.path),
        (r"resolver\.nameservers\.\d+", words.nameserver),
        (r"tls\.ca_file", words.path),
        (r"queue\.path", words.path),
        (r"log\.delivery", words.path),
        (r"admin\.socket", words.socket_path),
        (r"admin\.http", words.http_address),
        (r"admin\.(certificate|key)", words.path),
        (r"admin\.api_keys\.\d+", words.api_key),
        (r"admin\.domains\.\d+", words.domain),
        (r"admin\.webhook_signing_key", words.secret),
        (r"dkim\.domains\..+\.selector", words.selector),
        (r"dkim\.domains\..+\.key_file", words.path),
    )
)


def _checked(text: str, key: str) -> str:
    for pattern, check in _CHECKS:
        if pattern.fullmatch(key):
            return check(text)
    return text


_WRONG: Any = object()
"""Stands for a value that was wrong and has been noted as such."""

_NUMBER_LIMITS = {"port": 65535, "workers": 64}


def is_network(hint: Any) -> bool:
    return set(typing.get_args(hint)) == {ipaddress.IPv4Network, ipaddress.IPv6Network}


def _key_of(name: str) -> str:
    """The key of a field: its name, without the `_bytes` of a size."""
    return name.removesuffix("_bytes")


def shape_of(cls: type) -> dict[str, tuple[str, Any]]:
    """The keys a dataclass is written with: key -> (field, type). Its `name` is the key it is found under."""
    hints = typing.get_type_hints(cls)
    written = [f.name for f in dataclasses.fields(cls) if f.init and f.name != "name"]
    return {_key_of(name): (name, hints[name]) for name in written}


def _wants_name(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and any(
        f.name == "name" for f in dataclasses.fields(hint)
    )


def known_keys(cls: type, key: str = "") -> Iterator[str]:
    """Every dotted key below a dataclass; "*" stands for a name of its own, or a place in a list."""
    for name, (_, hint) in shape_of(cls).items():
        here = dotted(key, name)
        yield here
        inner = next((arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)), None)
        if dataclasses.is_dataclass(hint):
            yield from known_keys(typing.cast(type, hint), here)
        elif inner is not None:
            yield from known_keys(typing.cast(type, inner), f"{here}.*")


class Conformer:
    """Turns a tree into what pydantic can make dataclasses of, and notes all that does not fit.

    YAML guesses the type of a plain scalar (`no` is false, `1:30` is ninety); here the dataclass
    says what is wanted, and the text as written is read as that.
    """

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        self.places: dict[str, Place] = {}
        self.noted: set[str] = set()

    def wrong(self, place: Place, key: str, problem: str, cure: str) -> Any:
        self.mistakes.append(Mistake(place, key, problem, cure))
        self.noted.add(key)
        return _WRONG

    def conform(self, tree: Tree, hint: Any, key: str) -> Any:
        self.places[key] = tree.place
        if typing.get_origin(hint) in (Union, types.UnionType) and not is_network(hint):
            return self._optional(tree, hint, key)
        if dataclasses.is_dataclass(hint):
            return self._section(tree, typing.cast(type, hint), key)
        origin = typing.get_origin(hint)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            return self._names(tree, typing.get_args(hint)[1], key)
        if origin in (tuple, list, frozenset):
            return self._items(tree, typing.get_args(hint)[0], key)
        if not isinstance(tree, Leaf):
            kind = "a list" if isinstance(tree, List) else "a section with keys"
            return self.wrong(
                tree.place, key, f"{kind} where a single value belongs", _leaf_cure(hint, key)
            )
        return self._leaf(tree, hint, key)

    def _optional(self, tree: Tree, hint: Any, key: str) -> Any:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{key}: no rule for the type {hint}")
        if isinstance(tree, Leaf):
            never = inner[0] is timedelta and tree.text == "never"
            if tree.kind == "null" or never:
                return None
        return self.conform(tree, inner[0], key)

    def _section(self, tree: Tree, cls: type, key: str) -> Any:
        if isinstance(tree, Leaf) and tree.kind == "null":
            return {}  # every key below it is commented out
        shape = shape_of(cls)
        if not isinstance(tree, Map):
            return self.wrong(
                tree.place, key, "not a section", f"write keys below it: {', '.join(shape)}"
            )
        values = {}
        for name, below in tree.values.items():
            if name not in shape:
                self._unknown(tree.keys[name], name, shape, key)
                continue
            value = self.conform(below, shape[name][1], dotted(key, name))
            self.places[dotted(key, name)] = tree.keys[name]
            if value is not _WRONG:
                values[shape[name][0]] = value
        return values

    def _unknown(self, place: Place, name: str, shape: Collection[str], key: str) -> None:
        meant = difflib.get_close_matches(name.lower().replace("-", "_"), shape, n=1, cutoff=0.6)
        elsewhere = [k for k in known_keys(Config) if k.rpartition(".")[2] == name and "*" not in k]
        if meant:
            cure = f'did you mean "{meant[0]}"?'
        elif elsewhere:
            cure = f'it belongs at "{elsewhere[0]}"'
        else:
            cure = f"known here: {', '.join(shape)}"
        self.wrong(place, dotted(key, name), "unknown key", cure)

    def _names(self, tree: Tree, hint: Any, key: str) -> Any:
        """A map whose keys are names of the administrator's own: users, or domains."""
        if isinstance(tree, Leaf) and tree.kind == "null":
            return {}
        if not isinstance(tree, Map):
            return self.wrong(
                tree.place,
                key,
                "not a map of names",
                "write one name a line, each followed by a colon",
            )
        said: dict[str, Place] = {}
        values = {}
        for written, below in tree.values.items():
            here = dotted(key, written)
            name = self._name(written, tree.keys[written], key)
            if name is _WRONG:
                continue
            value = self.conform(below, hint, here)
            self.places[here] = tree.keys[written]
            if name in said:
                where = f" (first on line {said[name].line})" if said[name].line else ""
                problem = f"a second rule for {name}{where}"
                self.wrong(tree.keys[written], here, problem, "keep one of the two")
                continue
            said[name] = tree.keys[written]
            if value is not _WRONG:
                values[name] = {**value, "name": name} if _wants_name(hint) else value
        return values

    def _name(self, written: str, place: Place, key: str) -> Any:
        if key not in _DOMAIN_MAPS:
            return written
        try:
            if key == "dkim.domains":
                return words.domain(written)
            return words.domain_pattern(written, alone=key == "routes")
        except ValueError as error:
            return self.wrong(place, dotted(key, written), *split(error))

    def _items(self, tree: Tree, hint: Any, key: str) -> Any:
        if isinstance(tree, Leaf) and tree.kind == "null":
            return []
        if not isinstance(tree, List):
            cure = "write [a, b], or one value a line, each behind a dash"
            return self.wrong(tree.place, key, "not a list", cure)
        values = [
            self.conform(item, hint, dotted(key, str(i))) for i, item in enumerate(tree.items)
        ]
        return [value for value in values if value is not _WRONG]

    def _leaf(self, leaf: Leaf, hint: Any, key: str) -> Any:
        if leaf.kind == "null":
            return self.wrong(
                leaf.place, key, "no value", f"{_leaf_cure(hint, key)}, or remove the key"
            )
        if hint is bool:
            if leaf.kind == "bool":
                return leaf.text.lower() in ("true", "yes", "on")
            return self.wrong(
                leaf.place,
                key,
                f"{shown(leaf.text)} is neither true nor false",
                "write true or false",
            )
        try:
            value = _read_leaf(leaf, hint, key)
        except ValueError as error:
            return self.wrong(leaf.place, key, *split(error))
        return value


def _read_leaf(leaf: Leaf, hint: Any, key: str) -> Any:
    """A scalar as the type the dataclass wants; ValueError with "what; cure"."""
    name = key.rpartition(".")[2]
    if hint is timedelta:
        value = words.parse_duration(leaf.text)
        if not value:
            raise ValueError("has to be longer than nothing; write a longer duration")
        return value
    if hint is int and key in SIZES:
        return _at_least_one(words.parse_size(leaf.text), name)
    if hint is int:
        if leaf.kind != "int" or not re.fullmatch(r"[0-9]{1,12}", leaf.text):
            raise ValueError(f"{shown(leaf.text)} is not a whole number; write digits only")
        return _at_least_one(int(leaf.text), name)
    if is_network(hint):
        return words.network(leaf.text)
    if leaf.kind == "bool" and not (isinstance(hint, type) and issubclass(hint, StrEnum)):
        raise ValueError(
            f"{shown(leaf.text)} is read as true or false; put it in quotes where the word is meant"
        )
    return _checked(leaf.text, key)


def _at_least_one(number: int, name: str) -> int:
    most = _NUMBER_LIMITS.get(name, 10**12)
    if not 1 <= number <= most:
        raise ValueError(f"{number} is out of range; write a number from 1 to {most}")
    return number


def _leaf_cure(hint: Any, key: str) -> str:
    if hint is timedelta:
        return "write a duration such as 30s, 5m, 4h, 5d"
    if key in SIZES:
        return "write a size such as 64KiB, 50MiB"
    if hint is bool:
        return "write true or false"
    if hint is int:
        return "write a number"
    return "write a value behind the colon"


def build(values: Any, conformer: Conformer) -> Config | None:
    """The dataclasses of these values; pydantic sees to what is missing and to the words to choose from."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            key = ".".join(_key_of(str(step)) for step in fault["loc"])
            if any(noted == key or noted.startswith(f"{key}.") for noted in conformer.noted):
                continue  # said already, and better
            conformer.wrong(nearest(conformer.places, key), key, *_in_our_words(fault))
        return None


def _in_our_words(fault: Any) -> tuple[str, str]:
    """A pydantic error as problem and cure."""
    name = str(fault["loc"][-1]) if fault["loc"] else ""
    match fault["type"]:
        case "missing" | "missing_argument":
            return "is missing", f"add {_key_of(name)}: with its value"
        case "enum":
            choices = (
                str(fault["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
            )
            meant = difflib.get_close_matches(str(fault["input"]), choices, n=1)
            cure = f'did you mean "{meant[0]}"?' if meant else f"write one of {', '.join(choices)}"
            return f"{shown(str(fault['input']))} is not a choice here", cure
        case _:
            return str(fault["msg"]).lower(), "correct it"


def nearest(places: Mapping[str, Place], key: str) -> Place:
    """The place of a key, or of the section it should stand in."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places[key]
