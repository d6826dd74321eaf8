"""YAML as a tree in which every key and every value knows its line, and the environment laid over
it.

Composed only, never constructed: YAML's guesses at types (`no` is false, `1:30` is ninety) are not
taken; the dataclass that wants the value says what it is, and the text is kept as written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from relay.config.mistakes import Location, Mistake, shown

ENVIRONMENT_PREFIX = "RELAY__"

MAX_DEPTH = 20
"""Levels of lists and sections in one another. The configuration has five."""

MAX_VALUES = 200_000
"""Values of a file, counted as often as aliases repeat them: ten of ten can make millions."""

_KINDS = frozenset(
    {"str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value"}
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar. `kind` is what YAML takes it for (str, int, float, bool, null, …); `text` is as
    written.
    """

    location: Location
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class List:
    location: Location
    items: tuple[Tree, ...]


@dataclass(slots=True)
class Map:
    location: Location
    keys: dict[str, Location]
    values: dict[str, Tree]


Tree = Leaf | List | Map


class Composer:
    """Makes a tree of one YAML document, and notes every key that is there twice."""

    def __init__(self, source: str, mistakes: list[Mistake], *, has_lines: bool = True) -> None:
        self._source = source
        self._mistakes = mistakes
        self._has_lines = has_lines
        self._open: list[yaml.Node] = []
        self._values = 0

    def compose(self, text: str) -> Tree | None:
        """The tree, or None where the text is no YAML (which is noted)."""
        try:
            node = _one_document(text)
        except yaml.MarkedYAMLError as error:
            problem = " ".join(part for part in (error.context, error.problem) if part)
            mark = error.problem_mark or error.context_mark
            self._mistakes.append(
                Mistake(self._location(mark), "", f"not YAML: {problem}", _yaml_cure(problem))
            )
            return None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1 if self._has_lines else 0
            problem = f"a control character ({chr(error.character)!a})"
            cure = "save the file as UTF-8 text without control characters"
            self._mistakes.append(Mistake(Location(self._source, line), "", problem, cure))
            return None
        if node is None:
            return Map(Location(self._source), {}, {})
        try:
            return self._tree(node, "")
        except _TooMuch as error:
            self._mistakes.append(error.mistake)
            return None

    def _location(self, mark: Any) -> Location:
        return Location(self._source, mark.line + 1 if mark is not None and self._has_lines else 0)

    def _tree(self, node: yaml.Node, key: str) -> Tree:
        location = self._location(node.start_mark)
        self._bound(location, key)
        if node.tag.rpartition(":")[2] not in _KINDS:
            self._mistakes.append(Mistake(location, key, f"the tag {shown(node.tag)}", "remove it"))
        if node in self._open:
            self._mistakes.append(
                Mistake(location, key, "an alias that contains itself", "write the value out")
            )
            return Leaf(location, "null", "")
        if isinstance(node, yaml.ScalarNode):
            return Leaf(location, node.tag.rpartition(":")[2], str(node.value))
        self._open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                items = enumerate(node.value)
                return List(
                    location, tuple(self._tree(item, dotted(key, str(i))) for i, item in items)
                )
            assert isinstance(node, yaml.MappingNode)
            return self._map(node, location, key)
        finally:
            self._open.pop()

    def _bound(self, location: Location, key: str) -> None:
        """What aliases make of a short file is bounded; without them the file's length is the
        bound.
        """
        self._values += 1
        key = key[:80]
        if len(self._open) > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
            raise _TooMuch(Mistake(location, key, problem, "write it flat: no key is that deep"))
        if self._values > MAX_VALUES:
            problem = f"aliases make more than {MAX_VALUES} values of this file"
            raise _TooMuch(Mistake(location, key, problem, "write the values out"))

    def _map(self, node: yaml.MappingNode, location: Location, key: str) -> Map:
        tree = Map(location, {}, {})
        for name_node, value_node in node.value:
            where = self._location(name_node.start_mark)
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


class _TooMuch(Exception):
    """More than any configuration has."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


class _Loader(yaml.SafeLoader):
    """Composes only: nothing is ever constructed from a tag. Composing is recursive, so its depth
    is bounded.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} levels deep"
            raise yaml.composer.ComposerError(None, None, problem, self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _one_document(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _yaml_cure(problem: str) -> str:
    if "levels deep" in problem:
        return "write it flat: no key is that deep"
    if "\\t" in problem or "tab" in problem:
        return "indent with spaces, not with tabs"
    if "expected a single document" in problem:
        return "keep one document, without '---' in the middle"
    if "alias" in problem or "'*'" in problem:
        return 'put a value that begins with "*" in quotes'
    if "cannot start any token" in problem:
        return "put a value that begins with this character in quotes (a domain has no @)"
    if "found ':'" in problem:
        return "put an address that begins with a colon in quotes"
    return (
        "look at this line and the one before it: indentation, a missing colon, an open quote"
        " or bracket"
    )


def dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def overlay(tree: Map, environ: Mapping[str, str], mistakes: list[Mistake]) -> None:
    """Put what the environment says in the place of what the file says, whole sections before their
    keys.
    """
    names = sorted(
        (n for n in environ if n.startswith(ENVIRONMENT_PREFIX)), key=lambda n: (n.count("__"), n)
    )
    for variable in names:
        steps = [step.lower() for step in variable.removeprefix(ENVIRONMENT_PREFIX).split("__")]
        value = Composer(variable, mistakes, has_lines=False).compose(environ[variable])
        if value is None:
            continue
        if not environ[variable].strip():
            value = Leaf(Location(variable), "null", "")
        _put(tree, steps, value, Location(variable), mistakes)


def _put(
    tree: Map, steps: list[str], value: Tree, location: Location, mistakes: list[Mistake]
) -> None:
    if not all(steps):
        cure = "write it as in RELAY__QUEUE__PATH"
        mistakes.append(Mistake(location, ".".join(steps), "not the name of a key", cure))
        return
    branch = tree
    for depth, step in enumerate(steps[:-1]):
        below = branch.values.get(step)
        if isinstance(below, List):
            whole = ENVIRONMENT_PREFIX + "__".join(steps[: depth + 1]).upper()
            mistakes.append(
                Mistake(location, ".".join(steps), "a list is given whole", f"write {whole}=[…]")
            )
            return
        if not isinstance(below, Map):
            below = Map(location, {}, {})
            branch.keys[step] = location
            branch.values[step] = below
        branch = below
    branch.keys[steps[-1]] = location
    branch.values[steps[-1]] = value
