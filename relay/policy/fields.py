"""The header fields by which a message speaks about its own security.

`X-Require-TLS` and `X-Skip-Verification`, each with an alias. Values, in any case and with
white space and folding around them: true yes 1 on, false no 0 off. Anything else, and two
fields that contradict each other, is a `BadField`: a sender who asks for protection in words
we do not understand is told so, and never served without it. Only the header section counts,
on CRLF line ends (`relay.mail.header`), and all four fields are taken out before the message
goes on: the next hop need not know what we think of its certificate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from relay.mail.header import Field, field_at, unfold

__all__ = [
    "NO_WISHES",
    "POLICY_FIELDS",
    "BadField",
    "Wishes",
    "read_wishes",
    "refuse_displaced",
    "strip_policy_fields",
    "truth_of",
]

_REQUIRE_TLS = frozenset({b"x-require-tls", b"x-mailgun-require-tls"})
_SKIP_VERIFICATION = frozenset({b"x-skip-verification", b"x-mailgun-skip-verification"})

POLICY_FIELDS = _REQUIRE_TLS | _SKIP_VERIFICATION
"""The names of the four fields, in lower case."""

_NO_LETTERS = re.compile(rb"[^A-Za-z]+")
_NAMES_IN_LETTERS = tuple(sorted(_NO_LETTERS.sub(b"", name) for name in POLICY_FIELDS))
_WORDS = re.compile(rb"require[^a-z\n]{0,4}tls"), re.compile(rb"skip[^a-z\n]{0,4}verification")
"""Each begins with a text that never changes, which makes the search fast."""

_VALUES = dict.fromkeys((b"true", b"yes", b"1", b"on"), True) | dict.fromkeys(
    (b"false", b"no", b"0", b"off"), False
)
_SHOWN_OCTETS = 60


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a message asks for, by its header fields or by options beside it; None where it is
    silent.
    """

    require_tls: bool | None = None
    skip_verification: bool | None = None


NO_WISHES = Wishes()


class BadField(ValueError):
    """A policy field we cannot obey. Its text, `field`, `value`: printable ASCII, cut, fit for a
    reply.
    """

    def __init__(self, field: Field, complaint: str) -> None:
        self.field = _printable(field.name)
        self.value = _printable(_unfolded(field))
        super().__init__(f'{self.field}: "{self.value}" {complaint}')


def read_wishes(header: bytes) -> Wishes:
    """What the fields of a header section ask for. `BadField` where they cannot be understood.

    A name that only nearly is that of a policy field (a space before the colon, `_` for `-`) is
    a `BadField` too: its sender means the field, and would be served without it in silence.
    """
    fields = []
    for _, field in _policy_fields(header):
        if field.name.lower() not in POLICY_FIELDS:
            raise BadField(
                field, "is nearly a policy field; write its name exactly, and the colon next"
            )
        fields.append(field)
    if not fields:
        return NO_WISHES
    return Wishes(
        require_tls=_agreed([field for field in fields if field.name.lower() in _REQUIRE_TLS]),
        skip_verification=_agreed(
            [field for field in fields if field.name.lower() in _SKIP_VERIFICATION]
        ),
    )


def refuse_displaced(lines: bytes) -> None:
    """`BadField` where lines behind the end of the header section ask for more security.

    Those lines follow one that is no field, so they are body for every reader, and a wish among
    them is not obeyed. One that would make the message less secure may be text that somebody
    typed, and stays text; one that asks for more, or that cannot be understood, is refused.
    """
    if not _where_words_stand(lines):
        return
    for line in lines.split(b"\r\n"):
        name, _, value = line.partition(b":")
        letters = _letters(name[:_SHOWN_OCTETS])
        if not letters.startswith(_NAMES_IN_LETTERS):
            continue
        weakens = b"skipverification" in letters
        if letters not in _NAMES_IN_LETTERS or truth_of(value) is not weakens:
            raise BadField(Field(name, line, value), "stands behind a line that is no header field")


def strip_policy_fields(header: bytes) -> bytes:
    """The header section without the four fields; byte for byte nothing else changes."""
    kept, begun = [], 0
    for start, field in _policy_fields(header):
        if field.name.lower() in POLICY_FIELDS:
            kept.append(header[begun:start])
            begun = start + len(field.raw)
    return b"".join([*kept, header[begun:]]) if begun else header


def truth_of(word: bytes) -> bool | None:
    """What a value says: true or false, None where it is neither."""
    return _VALUES.get(word.strip(b" \t").lower())


def _policy_fields(header: bytes) -> Iterator[tuple[int, Field]]:
    """Where each field begins whose name is, or looks like, one of the four; and the field.

    Only lines with one of the words are looked at: a section of a megabyte of short fields costs
    one search and not a step for each field.
    """
    done = 0
    for at in _where_words_stand(header):
        if at < done:
            continue
        start = header.rfind(b"\r\n", done, at) + 2
        if start < 2:
            start = done
        if header[start] in b" \t":  # inside a value
            end = header.find(b"\r\n", at)
            done = len(header) if end < 0 else end
            continue
        field = field_at(header, start)
        done = start + len(field.raw)
        if _letters(field.name) in _NAMES_IN_LETTERS:
            yield start, field


def _where_words_stand(octets: bytes) -> list[int]:
    lower = octets.lower()
    return sorted(match.start() for words in _WORDS for match in words.finditer(lower))


def _letters(name: bytes) -> bytes:
    """A name without all that is no letter, in lower case: equal for what looks alike."""
    return _NO_LETTERS.sub(b"", name).lower()


def _agreed(fields: list[Field]) -> bool | None:
    """The one value that all the fields give; None without any."""
    agreed: bool | None = None
    for field in fields:
        value = truth_of(_unfolded(field))
        if value is None:
            raise BadField(field, "is neither yes nor no")
        if agreed not in (None, value):
            raise BadField(field, "contradicts an earlier field")
        agreed = value
    return agreed


def _unfolded(field: Field) -> bytes:
    return unfold(field.value).strip(b" \t")


def _printable(text: bytes) -> str:
    """Text of a stranger's, on one line of ASCII."""
    cut = text[:_SHOWN_OCTETS].decode("latin-1").encode("unicode_escape").decode("ascii")
    return cut.replace('"', "'") + ("..." if len(text) > _SHOWN_OCTETS else "")
