"""The header section of one message: where it ends, and which of the known fields are in it. Pure.

The relay makes one `HeaderSection` of a message that comes in; `relay.policy.fields`,
`relay.submit` and `relay.queue.summary` read it. One search over its octets finds the fields whose
names are in `KNOWN` or `ASKING`. The search of a megabyte of short fields takes some milliseconds.

The section ends at the first line that is no field, as it does for every mail host. A person may
take more lines for fields than a mail host does: a name can contain a letter of another script that
looks like a Latin one, a character without width, or a line end. So names that only look like one
of `ASKING` are found too, within the section (`HeaderSection.asking`) and behind its end
(`lines_like_fields`).

A field ends at CRLF and nowhere else, as in `relay.mail.header`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from relay.mail.header import each_field, part_end, split_content

NOT_SUPPORTED = frozenset(
    {
        b"X-Mailgun-Archive-To",
        b"X-Mailgun-Recipient-Variables",
        b"X-Mailgun-Secondary-DKIM",
        b"X-Mailgun-Secondary-DKIM-Public",
        b"X-Mailgun-Suppress-Headers",
        b"X-Mailgun-Template-Name",
        b"X-Mailgun-Template-Variables",
        b"X-Mailgun-Template-Version",
    }
)
"""Fields that ask for something that this relay does not support."""

ASKING = (
    "X-Require-TLS",
    "X-Skip-Verification",
    "X-Mailgun-Require-TLS",
    "X-Mailgun-Skip-Verification",
    "X-Mailgun-Deliver-By",
    "X-Mailgun-Deliver-Within",
    "X-Mailgun-Dkim",
    "X-Mailgun-Drop-Message",
    "X-Mailgun-Tag",
    "X-Mailgun-Variables",
    *sorted(name.decode() for name in NOT_SUPPORTED),
)
"""The fields by which a message asks this relay for something."""

IGNORED = frozenset(
    {
        b"x-mailgun-campaign-id",
        b"x-mailgun-delivery-time-optimize-period",
        b"x-mailgun-sending-ip-pool",
        b"x-mailgun-time-zone-localize",
        b"x-mailgun-track",
        b"x-mailgun-track-clicks",
        b"x-mailgun-track-opens",
        b"x-mailgun-track-pixel-location-top",
    }
)
"""Fields without a meaning for a relay. They are removed like the fields that the relay obeys."""

KNOWN = (
    "Auto-Submitted",
    "Bcc",
    "Cc",
    "Date",
    "From",
    "In-Reply-To",
    "Message-ID",
    "Precedence",
    "Received",
    "References",
    "Reply-To",
    "Sender",
    "Subject",
    "TLS-Required",
    "To",
    *(name.decode() for name in sorted(IGNORED)),
)
"""The other fields that a part of the relay reads."""


class FoundField(NamedTuple):
    """A field of a section that asks for something.

    `name`: as the message writes it. `value`: still folded, without the final CRLF. `start`,
    `end`: where the field begins, and where it ends with its CRLF. `meant`: the field of `ASKING`
    that `name` is, or looks like.
    """

    name: bytes
    value: bytes
    start: int
    end: int
    meant: bytes

    @property
    def is_exact(self) -> bool:
        """Whether the name is the right one, apart from upper and lower case."""
        return self.name.lower() == self.meant.lower()


class HeaderSection:
    """The fields of a header section.

    `octets`: the complete section. `asking`: the fields that ask for something, and those whose
    names look like one of these, in order.
    """

    __slots__ = ("_octets", "_spans", "asking")

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self._spans: dict[bytes, list[tuple[int, int, int]]] = {}
        self.asking: list[FoundField] = []
        for match, end in each_field(octets, _find().search):
            name = match[1]
            if name is not None:
                span = (match.start(), match.end(1) - 2, end)
                self._spans.setdefault(name, []).append(span)
            else:
                self.asking.append(self._asking(match.start(), match.end(2) - 2, end))

    @property
    def octets(self) -> bytes:
        return self._octets

    def __contains__(self, name: bytes) -> bool:
        """Whether the section has a field of this name, which is one of `KNOWN` in lower case."""
        return name in self._spans

    def count(self, name: bytes) -> int:
        return len(self._spans.get(name, ()))

    def first(self, name: bytes) -> bytes:
        """The value of the first field of this name, still folded; b"" without one."""
        for _, name_end, end in self._spans.get(name, ()):
            return self._octets[self._octets.index(b":", name_end) + 1 : end]
        return b""

    def without(self, *names: bytes) -> bytes:
        """The section without the fields of these names, of `IGNORED` and of `ASKING`.

        All other octets stay as they are.
        """
        spans = [(found.start, found.end) for found in self.asking if found.is_exact]
        for name, fields in self._spans.items():
            if name in IGNORED or name in names:
                spans += [(start, end + 2) for start, _, end in fields]
        if not spans:
            return self._octets
        kept, begun = [], 0
        for start, end in sorted(spans):
            kept.append(self._octets[begun:start])
            begun = end
        return b"".join([*kept, self._octets[begun:]])

    def _asking(self, start: int, colon: int, end: int) -> FoundField:
        name = self._octets[start:colon]
        return FoundField(
            name,
            self._octets[colon + 1 : end],
            start,
            min(end + 2, len(self._octets)),
            _meant(name.decode("latin-1")),
        )


class Sections(NamedTuple):
    """Content divided in two. `rest` begins with the empty line that ends the header section.

    `behind`: the first lines of `rest`, which a person may take for fields. Where a line that is
    no field ended the header section, they go from that line to the first empty line. Where the
    content has no field at all, the first lines behind the empty ones are among them.
    """

    header: bytes
    rest: bytes
    behind: bytes = b""

    @classmethod
    def of(cls, content: bytes) -> Sections:
        """Divide content at the first line that is no field, as every mail host does.

        As Postfix does, the relay adds a missing empty line, and makes an X-Mailbox-Line field of
        a first line `From ` of a mailbox file (smtpd and cleanup of Postfix 3.7).
        """
        mailbox_line = _MAILBOX_LINE.match(content)
        if mailbox_line:
            content = _AS_FIELD + content
        header, rest = split_content(content)
        end = _end_of_fields(header)
        behind = header[end:]
        if end == (len(_AS_FIELD) + mailbox_line.end() if mailbox_line else 0):
            behind += _first_lines(rest)
        if end == len(header):
            return cls(header, rest, behind)
        return cls(header[:end], b"\r\n" + content[end:], behind)


def _first_lines(rest: bytes) -> bytes:
    """The lines up to an empty one, behind all empty lines at the beginning."""
    return split_content(rest[_EMPTY_LINES(rest).end() :])[0]  # type: ignore[union-attr]


def _end_of_fields(header: bytes) -> int:
    """The end of the last field before the first line that is no field (RFC 5322 §2.2)."""
    if not _NAMED(header):
        return 0
    at = 0
    while at < len(header):
        end = part_end(header, at)
        last = _BEFORE_NO_FIELD(header, at, end)
        if last is not None:
            return last.end()
        at = end
    return at


class LineLikeField(NamedTuple):
    """A line that a person may read as a field of `ASKING`. `meant`: that field.

    `number`: of the line, from 0. `value`: the text after the name and a colon; None where there is
    no colon, or where other text stands between the name and the colon.
    """

    number: int
    value: bytes | None
    meant: bytes


def lines_like_fields(lines: bytes) -> Iterator[LineLikeField]:
    """The lines behind the end of a header section that a person may read as one of `ASKING`."""
    text = "\r\n" + _as_read(lines)
    number, at = 0, 0
    for match in _find_behind().finditer(text):
        number += text.count("\r\n", at, match.start())
        at = match.start()
        more, value = match[2], match[3]
        if more and match[1][-1].isalpha():
            continue  # the name has more letters, so it is another name
        yield LineLikeField(
            number, value.encode() if value is not None and not more else None, _meant(match[1])
        )


# --- how names are found ------------------------------------------------------------------------

_AS_FIELD = b"X-Mailbox-Line: "
_EMPTY_LINES = re.compile(rb"(?:\xef\xbb\xbf)?(?:[ \t]*+\r\n)*").match
_MAILBOX_LINE = re.compile(rb">*From (?![ \t]*+:)[^\r\n]*\r\n")
"""Not `From : Bob <b@x.example>`, which is a field (RFC 5322 §4.5.2)."""
_NAMED = re.compile(rb"[!-9;-~]++[ \t]*+:").match
_BEFORE_NO_FIELD = re.compile(rb"\r\n(?![ \t]|[!-9;-~]++[ \t]*+:)").search

_SCRIPTS = {
    "a": "аАαΑᴀɑ", "b": "вВβΒЬƅʙ", "c": "сСϲϹᴄ", "d": "ԁժᴅ", "e": "еЕεΕєҽ℮ᴇ", "f": "ƒϝқғꜰք",
    "g": "ɡցɢԍ", "h": "һҺнНΗհʜ", "i": "іІιΙıɩӏӀɪǀ", "k": "кКκΚᴋĸ", "l": "ʟłƚ", "m": "мМΜᴍ",
    "n": "пηΝոռɴ", "o": "оОοΟσօᴏø", "p": "рРρΡᴘ", "q": "ԛԚգզ", "r": "гГʀᴦ", "s": "ѕЅꜱ",
    "t": "тТτΤᴛŧ", "u": "υսᴜʋ", "v": "νѵѴᴠ", "w": "ԝԜωѡᴡ", "x": "хХχΧ×", "y": "уУүҮγΥ",
    ":": "∶꞉ː։",
}  # fmt: skip
"""Letters of Greek, Cyrillic, Armenian and phonetic scripts that look like a Latin letter.

NFKD finds the letters that Unicode itself makes equal to a Latin one (full width, Kelvin sign,
long s).
"""
_LOOKS_LIKE = {ord(other): latin for latin, others in _SCRIPTS.items() for other in others}
_DIGITS = {"i": "[il1|!]", "l": "[il1|!]", "o": "[o0]", "s": "[s5$]"}
_DIGITS_AS_LETTERS = str.maketrans("1|!0$5", "iiioss")
_NO_LETTERS = re.compile(r"[^a-z]+")
_NO_LETTERS_YET = re.compile(r"[^A-Za-z]*")
"""The characters before a name: a digit there does not count as a letter, as in the patterns."""


def _as_read(octets: bytes) -> str:
    """Text as a person reads it, in lower case."""
    if octets.isascii():
        return octets.decode("ascii").lower()
    text = unicodedata.normalize("NFKD", octets.decode("utf-8", "replace"))
    return text.translate(_LOOKS_LIKE).lower()


def _letters(name: str) -> str:
    """The letters of a name in lower case, `l` as `i`: names that look alike give the same."""
    return _NO_LETTERS.sub("", name.lower()).replace("l", "i")


_BY_LETTERS = {_letters(name): name.encode() for name in ASKING}


def _meant(name: str) -> bytes:
    letters = _letters(name)
    if letters in _BY_LETTERS:
        return _BY_LETTERS[letters]
    begin = _NO_LETTERS_YET.match(name).end()  # type: ignore[union-attr]  # it always matches
    return _BY_LETTERS[_letters(name[begin:].translate(_DIGITS_AS_LETTERS))]


def _looks_like_asking(*, digits: bool, folded: bool) -> str:
    """A pattern for every name that has the letters of one of `ASKING`. Its search is linear.

    Any characters that are no letters may stand between the letters; with `folded` also a line end
    with white space behind it. With `digits`, a digit that looks like a letter counts as one.
    """
    no_letters = rf"[^a-z:\r\n{'015$|!' if digits else ''}]"
    between = rf"{no_letters}*+(?:\r\n[ \t]{no_letters}*+)*" if folded else f"{no_letters}*+"

    def spelled(letters: str) -> str:
        return "".join(
            (_DIGITS[c] if digits and c in _DIGITS else "[il]" if c in "il" else c) + between
            for c in letters
        )

    names = sorted((_NO_LETTERS.sub("", name.lower()) for name in ASKING), key=len, reverse=True)
    of_mailgun = [name.removeprefix("xmailgun") for name in names if name.startswith("xmailgun")]
    others = [name.removeprefix("x") for name in names if not name.startswith("xmailgun")]
    mailgun = f"{spelled('mailgun')}(?:{'|'.join(map(spelled, of_mailgun))})"
    return f"{spelled('x')}(?:{mailgun}|{'|'.join(map(spelled, others))})"


def _asking_names(*, folded: bool) -> str:
    either = "|".join(_looks_like_asking(digits=digits, folded=folded) for digits in (False, True))
    return rf"[^a-z:\r\n]*+(?:{either})"


# Both take some 10 ms to compile, so a command that reads no message does without them.


@cache
def _find() -> re.Pattern[bytes]:
    known = "|".join(name.lower() for name in KNOWN)
    asking = _asking_names(folded=False)
    return re.compile(rf"\r\n(?:({known})[ \t]*+|(?![ \t])({asking})):".encode())


@cache
def _find_behind() -> re.Pattern[str]:
    return re.compile(rf"\r\n({_asking_names(folded=True)})([^:\r\n]*+)(?::([^\r\n]*+))?")
