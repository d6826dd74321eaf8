"""Names of modules and public classes are ordinary words, or words of the project's glossary.

Ordinary is what stands in /usr/share/dict/words (Debian's wamerican); the glossary is the table and
the list of abbreviations in docs/glossary.md.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DICTIONARY = Path("/usr/share/dict/words")


def _names() -> Iterator[tuple[str, str]]:
    """Each file of the package, and the names of modules and public classes that it gives."""
    for path in sorted((ROOT / "relay").rglob("*.py")):
        name = path.parent.name if path.name.startswith("__") else path.stem
        place = str(path.relative_to(ROOT))
        yield place, name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield place, node.name


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _glossary() -> set[str]:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    table = " ".join(re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE))
    abbreviations = re.search(
        r"^Names and abbreviations.*?:(.*?)\. `", text, re.MULTILINE | re.DOTALL
    )
    assert abbreviations is not None
    return set(re.findall(r"[a-z]+", f"{table} {abbreviations[1]}".lower()))


def test_names_are_ordinary_words_or_in_the_glossary() -> None:
    if not DICTIONARY.exists():
        reason = f"needs {DICTIONARY} (Debian: wamerican)"
        (pytest.fail if os.environ.get("RELAY_REQUIRE_TOOLS") == "1" else pytest.skip)(reason)
    known = set(DICTIONARY.read_text(encoding="utf-8").lower().split()) | _glossary()
    # A plural, or two known words written as one (`handoff`, `jsontext`), is as good.
    unknown = sorted(
        f"{place}: {name} ({word})"
        for place, name in _names()
        for word in _words(name)
        if not {word, word.removesuffix("s")} & known and not _is_compound(word, known)
    )
    assert not unknown, "write an ordinary word, or explain it in docs/glossary.md: " + "; ".join(
        unknown
    )


def _is_compound(word: str, known: set[str]) -> bool:
    return any(word[:at] in known and word[at:] in known for at in range(3, len(word) - 2))
