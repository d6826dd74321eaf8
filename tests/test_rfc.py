"""docs/rfc.md lists every RFC that the code cites, and every citation has the same form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "docs" / "rfc.md"
SOURCES = sorted((ROOT / "relay").rglob("*.py"))

_CITED = re.compile(r"\bRFC (\d{3,5})\b")
_MISWRITTEN = re.compile(r"\bRFC[-_]?\d|\bRFC \d+,? (?:sec|s\.|chapter)", re.IGNORECASE)
_NOT_CITATIONS = re.compile(r"rfc822|rfc4514_string", re.IGNORECASE)
_ROW = re.compile(r"^\| (RFC [^|]+?) \| ([^|]*?) \| (.+?) \|$", re.MULTILINE)


def _rows() -> list[tuple[str, str, str]]:
    return _ROW.findall(LIST.read_text(encoding="utf-8"))


def _listed() -> list[str]:
    return [number for names, _, _ in _rows() for number in _CITED.findall(names)]


def _citations() -> dict[str, str]:
    """Each RFC cited in the code, and a place where it is."""
    found: dict[str, str] = {}
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for cited in _CITED.findall(line):
                found.setdefault(cited, f"{path.relative_to(ROOT)}:{number}")
    return found


def test_every_rfc_that_the_code_cites_is_in_the_list():
    listed = set(_listed())
    missing = {
        f"RFC {number}": place for number, place in _citations().items() if number not in listed
    }
    assert not missing


def test_every_rfc_is_listed_once():
    listed = _listed()
    assert [number for number in listed if listed.count(number) > 1] == []


@pytest.mark.parametrize(("names", "answer", "sentence"), _rows(), ids=[row[0] for row in _rows()])
def test_every_row_says_yes_partly_or_no_and_why(names, answer, sentence):
    assert answer in ("yes", "partly", "no")
    assert sentence.endswith("."), f"{names}: a sentence"


def test_the_list_is_read_by_this_test_and_not_empty():
    assert len(_listed()) > 50
    assert len(_citations()) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_citation_has_one_form(path):
    # As in "RFC 5321 §4.5.4.1", so that one search finds all.
    text = _NOT_CITATIONS.sub("", path.read_text(encoding="utf-8"))
    assert [match[0] for match in _MISWRITTEN.finditer(text)] == []


def test_every_file_that_the_list_names_is_there():
    named = set(re.findall(r"`((?:relay|tests)/[\w./]+)`", LIST.read_text(encoding="utf-8"))) - {
        "relay/"
    }
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
