"""The tree against the dataclasses: unknown keys, wrong types, missing values, words not to choose
from.
"""

from __future__ import annotations

import difflib
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from relay.config import quantities
from relay.config.document import as_document
from relay.config.mistakes import Location, Mistake, shown, split
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
    known_keys,
    section_of,
)
from relay.config.tree import Leaf, List, Map, Tree, dotted
from relay.config.words import WORDS
from relay.mail.option import TextForm

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_WRONG: object = object()
"""Stands for a value that was wrong and has been noted as such."""


class Conformer:
    """Turns a tree into what pydantic can make dataclasses of, and notes all that does not fit.

    YAML guesses the type of a plain scalar (`no` is false, `1:30` is ninety); here the dataclass
    says what is wanted, and the text as written is read as that.
    """

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = mistakes
        self.locations: dict[str, Location] = {}
        self.noted: set[str] = set()
        self.missing: list[str] = []
        self.written: dict[str, str] = {}
        """By key: the short key that the file has instead."""

    def wrong(self, location: Location, key: str, problem: str, cure: str) -> object:
        self.mistakes.append(Mistake(location, key, problem, cure))
        self.noted.add(key)
        return _WRONG

    def conform(self, tree: Tree, shape: Shape, key: str) -> Any:
        self.locations[key] = tree.location
        match shape:
            case Maybe():
                return self._maybe(tree, shape, key)
            case Section():
                return self._section(tree, shape, key)
            case Names():
                return self._names(tree, shape, key)
            case NameOr():
                return self._name_or(tree, shape, key)
            case Items():
                return self._items(tree, shape, key)
        if not isinstance(tree, Leaf):
            kind = "a list" if isinstance(tree, List) else "a section with keys"
            problem = f"{kind} where a single value belongs"
            return self.wrong(tree.location, key, problem, _leaf_cure(shape))
        return self._leaf(tree, shape, key)

    def _maybe(self, tree: Tree, shape: Maybe, key: str) -> object:
        if isinstance(tree, Leaf):
            never = isinstance(shape.inner, Duration) and tree.text == "never"
            if tree.kind == "null" or never:
                return None
        return self.conform(tree, shape.inner, key)

    def _name_or(self, tree: Tree, shape: NameOr, key: str) -> object:
        if isinstance(tree, Map) and list(tree.values) == [shape.key]:
            return self.conform(tree.values[shape.key], shape.name, dotted(key, shape.key))
        if isinstance(tree, Map):
            return self._section(tree, shape.section, key)
        if isinstance(tree, Leaf) and tree.kind != "null":
            return self._leaf(tree, shape.name, key)
        problem = "no value" if isinstance(tree, Leaf) else "a list where one name belongs"
        cure = f"write a name, or keys below it: {', '.join(shape.section.keys)}"
        return self.wrong(tree.location, key, problem, cure)

    def _section(self, tree: Tree, section: Section, key: str) -> object:
        if isinstance(tree, Leaf) and tree.kind == "null":
            tree = Map(tree.location, {}, {})  # every key below it is commented out
        if not isinstance(tree, Map):
            cure = f"write keys below it: {', '.join(section.keys)}"
            return self.wrong(tree.location, key, "not a section", cure)
        values: dict[str, Any] = {}
        self._read_secrets(tree, section, key)
        for name, below in tree.values.items():
            if name in section.short:
                self._short(tree, name, section, key, values)
                continue
            if name not in section.keys:
                self._unknown(tree.keys[name], name, section.keys, key)
                continue
            found = section.keys[name]
            value = self.conform(below, found.shape, dotted(key, name))
            self.locations[dotted(key, name)] = tree.keys[name]
            if value is not _WRONG:
                values[found.field] = value
        self.missing += [
            dotted(key, name)
            for name in section.required
            if name not in tree.values
            and dotted(key, name) not in self.noted
            and not any(section.short[n].of == name for n in tree.values if n in section.short)
        ]
        return values

    def _short(
        self, tree: Map, name: str, section: Section, key: str, values: dict[str, Any]
    ) -> None:
        """`host: a` is `hosts: [a]`, and `username: a` is `auth: {username: a}`."""
        short, here = section.short[name], dotted(key, name)
        if short.of in tree.values:
            problem = f"{short.of} is given, too"
            cure = f"write all of it under {short.of}" if short.below else "keep one of the two"
            self.wrong(tree.keys[name], here, problem, cure)
            return
        meant = section.keys[short.of]
        target = (
            dotted(dotted(key, short.of), short.below) if short.below else dotted(key, short.of)
        )
        value = self.conform(tree.values[name], short.shape, here)
        self.locations[here] = self.locations[target] = tree.keys[name]
        self.written[target] = here
        if value is _WRONG or value is None:
            return
        if short.below:
            values.setdefault(meant.field, {})[short.below] = value
        else:
            values[meant.field] = _listed(value, meant.shape)

    def _read_secrets(self, tree: Map, section: Section, key: str) -> None:
        """`api_keys_file: PATH` is `api_keys` with what the file says: a secret, or one a line."""
        for name, found in section.keys.items():
            from_file = f"{name}_file"
            if from_file not in tree.values or not is_secret(found.shape):
                continue
            path, location = tree.values.pop(from_file), tree.keys.pop(from_file)
            if name in tree.values:
                problem = f"{name} is given, too"
                self.wrong(location, dotted(key, from_file), problem, "keep one of the two")
                continue
            text = self.conform(path, Text(TextForm.PATH), dotted(key, from_file))
            lines = (
                None if text is _WRONG else self._lines_of(text, location, dotted(key, from_file))
            )
            if lines is None:
                self.noted.add(dotted(key, name))
                continue
            secrets = tuple(Leaf(location, "str", line) for line in lines)
            tree.keys[name] = location
            tree.values[name] = (
                List(location, secrets)
                if isinstance(found.shape, Items)
                else Leaf(location, "str", "\n".join(lines))
            )

    def _lines_of(self, path: str, location: Location, key: str) -> list[str] | None:
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            problem = getattr(error, "strerror", None) or "not UTF-8"
            cure = "correct the path, or let the relay's user read it"
            self.wrong(location, key, f"{path}: {problem}", cure)
            return None
        return [line.strip() for line in lines if line.strip()]

    def _unknown(self, location: Location, name: str, known: Collection[str], key: str) -> None:
        meant = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6)
        elsewhere = _elsewhere(name, key)
        if name == "<<":
            cure = "merge keys are not read here: write the keys out"
        elif meant:
            cure = f'did you mean "{meant[0]}"?'
        elif elsewhere:
            cure = elsewhere
        else:
            cure = f"known here: {', '.join(known)}"
        self.wrong(location, dotted(key, name), "unknown key", cure)

    def _names(self, tree: Tree, shape: Names, key: str) -> object:
        """A map whose keys are names of the administrator's own: users, or domains."""
        if isinstance(tree, Leaf) and tree.kind == "null":
            return {}
        if not isinstance(tree, Map):
            cure = "write one name a line, each followed by a colon"
            return self.wrong(tree.location, key, "not a map of names", cure)
        said: dict[str, Location] = {}
        values = {}
        for written, below in tree.values.items():
            here = dotted(key, written)
            name = self._name(written, tree.keys[written], key, shape.form)
            if name is _WRONG:
                continue
            value = self.conform(below, shape.value, here)
            self.locations[here] = tree.keys[written]
            if name in said:
                where = f" (first on line {said[name].line})" if said[name].line else ""
                problem = f"a second rule for {name}{where}"
                self.wrong(tree.keys[written], here, problem, "keep one of the two")
                continue
            said[name] = tree.keys[written]
            if value is not _WRONG:
                values[name] = {**value, "name": name} if _has_name(shape.value, value) else value
        return values

    def _name(self, written: str, location: Location, key: str, form: TextForm | None) -> Any:
        try:
            return WORDS[form].read(written) if form is not None else written
        except ValueError as error:
            return self.wrong(location, dotted(key, written), *split(error))

    def _items(self, tree: Tree, shape: Items, key: str) -> object:
        is_empty = isinstance(tree, Leaf) and tree.kind == "null"
        if shape.or_one and isinstance(tree, Leaf) and not is_empty:
            value = self.conform(tree, _innermost(shape), key)
            return value if value is _WRONG else _listed(value, shape)
        if not is_empty and not isinstance(tree, List):
            cure = "write [a, b], or one value a line, each behind a dash"
            return self.wrong(tree.location, key, "not a list", cure)
        items = tree.items if isinstance(tree, List) else ()
        if shape.not_empty is not None and is_empty:
            cure = "write a value behind the colon, or remove the key"
            return self.wrong(tree.location, key, "no value", cure)
        if shape.not_empty is not None and not items:
            return self.wrong(tree.location, key, shape.not_empty.problem, shape.not_empty.cure)
        values = [
            self.conform(item, shape.item, dotted(key, str(i))) for i, item in enumerate(items)
        ]
        return [value for value in values if value is not _WRONG]

    def _leaf(self, leaf: Leaf, shape: LeafShape, key: str) -> object:
        if leaf.kind == "null":
            cure = f"{_leaf_cure(shape)}, or remove the key"
            return self.wrong(leaf.location, key, "no value", cure)
        try:
            return _read_leaf(leaf, shape, key)
        except ValueError as error:
            return self.wrong(leaf.location, key, *split(error))


def _has_name(shape: Shape, value: object) -> bool:
    section = shape.section if isinstance(shape, NameOr) else shape
    return isinstance(section, Section) and section.has_name and isinstance(value, dict)


def _innermost(shape: Shape) -> Shape:
    """The shape of one value of a list, or of a list of lists."""
    return _innermost(shape.item) if isinstance(shape, Items) and shape.or_one else shape


def _listed(value: object, shape: Shape) -> object:
    """One value as the list it stands for."""
    if isinstance(shape, Items) and shape.or_one:
        return [_listed(value, shape.item)]
    return value


def _elsewhere(name: str, key: str) -> str:
    """Where a key that `key` does not know belongs; empty where no section knows it."""
    found = [k for k, _ in known_keys(section_of(Config)) if k.rpartition(".")[2] == name]
    for_all = next((k for k in found if "*" not in k), "")
    is_by_recipient = f"policy.destinations.*.{name}" in found
    _, by_sender, domain = key.partition("policy.domains.")
    if is_by_recipient and (by_sender or not for_all):
        domain = domain or "DOMAIN"
        return f'by recipient domain it belongs at "policy.destinations.{domain}.{name}"'
    return f'it belongs at "{for_all}"' if for_all else ""


LeafShape = Truth | Duration | Number | Choice | Text


def _read_leaf(leaf: Leaf, shape: LeafShape, key: str) -> object:
    """A scalar as the type the dataclass wants; ValueError with "what; cure"."""
    match shape:
        case Truth():
            if leaf.kind == "str" and leaf.text.lower() in ("true", "false"):
                raise ValueError(
                    f"{shown(leaf.text)} is a text; write {leaf.text.lower()} without quotes"
                )
            return quantities.parse_truth(leaf.text)
        case Number():
            if leaf.kind == "str" and leaf.text.isdecimal():
                raise ValueError(f"{shown(leaf.text)} is a text; write {leaf.text} without quotes")
            return quantities.parse_number(leaf.text, shape.range)
        case Duration():
            if leaf.text.isdecimal():
                cure = f"write a unit, as in {quantities.with_unit(leaf.text, _default_of(key))}"
                raise ValueError(f"{shown(leaf.text)} is not a duration; {cure}")
            return quantities.parse_duration(leaf.text)
        case Text(form=TextForm.SIZE):
            size = quantities.parse_size(leaf.text)
            if not size:
                raise ValueError("0 is out of range; write at least one octet, as in 64KiB")
            return size
        case Text(form=TextForm.RATE):
            return quantities.parse_rate(_read_text(leaf, shape))
        case Choice():
            return _one_of(shape.words, leaf.text)
        case Text():
            return _read_text(leaf, shape)


def _default_of(key: str) -> timedelta | None:
    """The default of a duration, of a list its first; None where it has none."""
    value: object = as_document(Config())
    for step in key.split("."):
        value = value[0] if isinstance(value, list) and value else value
        value = value.get(step) if isinstance(value, dict) else value
    try:
        return quantities.parse_duration(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _read_text(leaf: Leaf, shape: Text) -> str:
    text = leaf.text
    if leaf.kind == "bool":
        problem = f"{shown(text)} is read as true or false"
        raise ValueError(f"{problem}; put it in quotes where the word is meant")
    value = WORDS[shape.form].read(text) if shape.form is not None else text
    if leaf.kind != "str":
        # YAML knows more kinds of numbers than people do: 0600 is octal, 1:30 ninety.
        kind = "a date" if leaf.kind == "timestamp" else "a number"
        raise ValueError(f"{shown(text)} is read as {kind}; put it in quotes")
    return value


def _one_of(choices: Sequence[str], text: str) -> str:
    if text in choices:
        return text
    meant = difflib.get_close_matches(text, choices, n=1)
    cure = f'did you mean "{meant[0]}"?' if meant else f"write one of {', '.join(choices)}"
    raise ValueError(f"{shown(text)} is not a choice here; {cure}")


def _leaf_cure(shape: LeafShape) -> str:
    match shape:
        case Duration():
            return "write a duration such as 30s, 5m, 4h, 5d"
        case Text(form=TextForm.SIZE):
            return "write a size such as 64KiB, 50MiB"
        case Truth():
            return "write true or false"
        case Number():
            return "write a number"
        case _:
            return "write a value behind the colon"


def build(values: object, conformer: Conformer) -> Config | None:
    """The dataclasses of these values, None where something is wrong or missing."""
    for key in conformer.missing:
        name = key.rpartition(".")[2]
        location = nearest(conformer.locations, key)
        conformer.wrong(location, key, "is missing", f"add {name}: with its value")
    return None if conformer.mistakes else _adapter().validate_python(values)


@cache
def _adapter() -> TypeAdapter[Config]:
    # Otherwise pydantic reads the metadata of every installed distribution, in search of plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def nearest(locations: Mapping[str, Location], key: str) -> Location:
    """The location of a key, or of the section it should stand in; without a line outside of all
    sections.
    """
    while key and key not in locations:
        key = key.rpartition(".")[0]
    return locations[key] if key else Location(locations[key].source)
