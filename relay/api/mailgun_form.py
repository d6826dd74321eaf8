"""The values of a form, and the error that a client gets. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FOLD = re.compile(r"\r?\n(?=[ \t])")


class ApiError(Exception):
    """The answer to a request that is refused: an HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class File:
    """A part of a form that came as a file. `name`: attachment, inline or message.

    `content_type` is "" where the client named none.
    """

    name: str
    filename: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """A form: its fields in order (a name may be repeated), and its files."""

    fields: tuple[tuple[str, str], ...]
    files: tuple[File, ...] = ()

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return [value for field, value in self.fields if field == name]

    def first(self, name: str) -> str | None:
        """The first value of a field, None where there is no such field."""
        return next(iter(self.all(name)), None)

    def after(self, prefix: str) -> list[tuple[str, str]]:
        """Name without the prefix, and value, of every field whose name has the prefix."""
        return [
            (field[len(prefix) :], value)
            for field, value in self.fields
            if field.startswith(prefix)
        ]


def unfolded(value: str) -> str:
    """A value without the folds of a header field (RFC 5322 §2.2.3)."""
    return _FOLD.sub("", value).strip(" \t\r\n")


def shown(text: str) -> str:
    """A stranger's text for an answer: cut, in printable ASCII."""
    cut = text[:80].encode("ascii", "backslashreplace").decode("ascii")
    return "".join(c if c.isprintable() else "?" for c in cut)
