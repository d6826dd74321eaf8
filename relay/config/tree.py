"""YAML as a tree in which every key and every value knows its line, and the environment laid over it.

Composed only, never constructed: YAML's guesses at types (`no` is false, `1:30` is ninety) are not
taken; the dataclass that wants the value says what it is, and the text is kept as written.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from relay.config.mistakes import Mistake, Place

ENVIRONMENT_PREFIX = "RELAY__"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar. `kind` is what YAML takes it for (str, int, float, bool, null); `text` is as written."""

    place: Place
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class List:
    place: Place
    items: tuple[Tree, ...]


@dataclass(slots=True)
class Map:
    place: Place
    keys: dict[str, Place]
    values: dict[str, Tree]


Tree = Leaf | List | Map


class Composer:
    """Makes a tree of one YAML document, and notes every key that is there twice."""

    def __init__(self, source: str, mistakes: list[Mistake], *, has_lines: bool = True) -> None:
        self._source = source
        self._mistakes = mistakes
        self._has_lines = has_lines
        self._open: list[yaml.Node] = []

    def compose(self, text: str) -> Tree | None:
        """The tree, or None where the text is no YAML (which is noted)."""
        try:
            node = _one_document(text)
        except yaml.MarkedYAMLError as error:
            problem = " ".join(part for part in (error.context, error.problem) if part)
            mark = error.problem_mark or error.context_mark
            self._mistakes.append(
                Mistake(self._place(mark), "", f"not YAML: {problem}", _yaml_cure(problem))
            )
            return None
        except yaml.YAMLError as error:
            problem = str(error).replace("\n", " ")
            self._mistakes.append(
                Mistake(Place(self._source), "", f"not YAML: {problem}", _yaml_cure(problem))
            )
            return None
        return self._tree(node, "") if node is not None else Map(Place(self._source), {}, {})

    def _place(self, mark: Any) -> Place:
        return Place(self._source, mark.line + 1 if mark is not None and self._has_lines else 0)

    def _tree(self, node: yaml.Node, key: str) -> Tree:
        place = self._place(node.start_mark)
        if node in self._open:
            self._mistakes.append(
                Mistake(place, key, "an alias that contains itself", "write the value out")
            )
            return Leaf(place, "null", "")
        if isinstance(node, yaml.ScalarNode):
            return Leaf(place, node.tag.rpartition(":")[2], str(node.value))
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                items = enumerate(node.value)
                return List(
                    place, tuple(self._tree(item, dotted(key, str(i))) for i, item in items)
                )
            return self._map(typing.cast(yaml.MappingNode, node), place, key)
        finally:
            self._open.pop()

    def _map(self, node: yaml.MappingNode, place: Place, key: str) -> Map:
        tree = Map(place, {}, {})
        for name_node, value_node in node.value:
            where = self._place(name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                self._mistakes.append(
                    Mistake(where, key, "a key that is not a word", "write a plain name as the key")
                )
                continue
            # The text as written: a domain such as `no` would otherwise become a truth value.
            name = str(name_node.value)
            if name in tree.keys:
                first = tree.keys[name].line
                said = f"said twice (first on line {first})" if first else "said twice"
                self._mistakes.append(
                    Mistake(where, dotted(key, name), said, "keep one of the two")
                )
                continue
            tree.keys[name] = where
            tree.values[name] = self._tree(value_node, dotted(key, name))
        return tree


class _Loader(yaml.SafeLoader):
    """Composes only: nothing is ever constructed from a tag."""


def _one_document(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _yaml_cure(problem: str) -> str:
    if "\\t" in problem or "tab" in problem:
        return "indent with spaces, not with tabs"
    if "special characters" in problem or "decode" in problem:
        return "save the file as UTF-8 text without control characters"
    if "expected a single document" in problem:
        return "keep one document, without '---' in the middle"
    if "alias" in problem or "'*'" in problem:
        return 'put a value that begins with "*" in quotes'
    return "look at this line and the one before it: indentation, a missing colon, an open quote or bracket"


def dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def overlay(tree: Map, environ: Mapping[str, str], mistakes: list[Mistake]) -> None:
    """Put what the environment says in the place of what the file says, whole sections before their keys."""
    names = sorted(
        (n for n in environ if n.startswith(ENVIRONMENT_PREFIX)), key=lambda n: (n.count("__"), n)
    )
    for variable in names:
        steps = [step.lower() for step in variable.removeprefix(ENVIRONMENT_PREFIX).split("__")]
        value = Composer(variable, mistakes, has_lines=False).compose(environ[variable])
        if value is None:
            continue
        if not environ[variable].strip():
            value = Leaf(Place(variable), "null", "")
        _put(tree, steps, value, Place(variable), mistakes)


def _put(tree: Map, steps: list[str], value: Tree, place: Place, mistakes: list[Mistake]) -> None:
    if not all(steps):
        cure = "write it as in RELAY__QUEUE__PATH"
        mistakes.append(Mistake(place, ".".join(steps), "not the name of a key", cure))
        return
    branch = tree
    for depth, step in enumerate(steps[:-1]):
        below = branch.values.get(step)
        if isinstance(below, List):
            whole = ENVIRONMENT_PREFIX + "__".join(steps[: depth + 1]).upper()
            mistakes.append(
                Mistake(place, ".".join(steps), "a list is given whole", f"write {whole}=[…]")
            )
            return
        if not isinstance(below, Map):
            below = Map(place, {}, {})
            branch.keys[step] = place
            branch.values[step] = below
        branch = below
    branch.keys[steps[-1]] = place
    branch.values[steps[-1]] = value
