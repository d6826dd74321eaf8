"""What the delivery log shows of a message's header: decoded, cleaned and cut.

It runs for every message, so the common field, printable ASCII on one line, costs a `decode` and
nothing more; the first field of each name counts. RFC 2047 encoded words are decoded leniently,
since people should recognise their subject; what cannot be decoded stays as it came. Header fields
are for people here: no decision about delivery rests on them.
"""

from __future__ import annotations

import binascii
import re
import unicodedata

from relay.mail.section import HeaderSection
from relay.queue.entry import MessageSummary

MAX_CHARS = 250
"""How much of a field is kept."""

_MAX_VALUE_BYTES = 4096
"""How much is looked at of a field: nobody reads on, and attackers write more."""

_ENCODED_WORD = re.compile(r"=\?([!-)+->@-~]{1,60})(?:\*[!-~]{0,30})?\?([bBqQ])\?([!->@-~ ]*)\?=")
_CHARSETS = frozenset(
    [
        "ascii",
        "us-ascii",
        "utf-8",
        "utf8",
        "utf-7",
        "utf-16",
        "utf-16be",
        "utf-16le",
        "utf-32",
        "big5",
        "big5-hkscs",
        "cp437",
        "cp850",
        "cp866",
        "cp874",
        "cp932",
        "cp936",
        "cp949",
        "cp950",
        "cp1250",
        "cp1251",
        "cp1252",
        "euc-jp",
        "euc-kr",
        "gb18030",
        "gb2312",
        "gbk",
        "hz-gb-2312",
        "iso-2022-jp",
        "iso-2022-jp-2",
        "iso-2022-kr",
        "iso-8859-1",
        "iso-8859-2",
        "iso-8859-3",
        "iso-8859-4",
        "iso-8859-5",
        "iso-8859-6",
        "iso-8859-7",
        "iso-8859-8",
        "iso-8859-9",
        "iso-8859-10",
        "iso-8859-11",
        "iso-8859-13",
        "iso-8859-14",
        "iso-8859-15",
        "iso-8859-16",
        "koi8-r",
        "koi8-u",
        "ks_c_5601-1987",
        "latin1",
        "macintosh",
        "shift_jis",
        "shift-jis",
        "sjis",
        "tis-620",
        "windows-31j",
        "windows-1250",
        "windows-1251",
        "windows-1252",
        "windows-1253",
        "windows-1254",
        "windows-1255",
        "windows-1256",
        "windows-1257",
        "windows-1258",
    ]
)
"""The names that are decoded, in lower case: those of the IANA registry that mail really uses."""
_BETWEEN_WORDS = re.compile(r"\?=[ \t]+(?==\?)")
_BULK = frozenset({"bulk", "junk", "list"})
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; the others could rearrange the line of a log."""


def summarise(section: HeaderSection) -> MessageSummary:
    """The fields of a header section that the delivery log shows."""
    return MessageSummary(
        message_id=readable(section.first(b"message-id")).removeprefix("<").removesuffix(">"),
        from_=readable(section.first(b"from")),
        to=readable(section.first(b"to")),
        subject=readable(section.first(b"subject")),
        auto_submitted=_is_by_program(
            readable(section.first(b"auto-submitted")), readable(section.first(b"precedence"))
        ),
    )


def readable(value: bytes) -> str:
    """The value of a field as a person reads it: unfolded, decoded, without control characters,
    cut.
    """
    if not value:
        return ""
    value = value[:_MAX_VALUE_BYTES].strip()
    if value.isascii():
        text = value.decode("ascii")
        if text.isprintable() and "=?" not in text:
            return text[:MAX_CHARS]
    else:
        text = value.decode("utf-8", "replace")
    text = _without_folds(text)
    return "".join(map(_harmless, text[:MAX_CHARS])).strip()


def decoded(value: bytes) -> str:
    """The value of a field on one line, its encoded words decoded; nothing is cut."""
    return _without_folds(value.decode("utf-8", "replace"))


def _without_folds(text: str) -> str:
    text = text.replace("\r\n", "")
    return _decoded(text) if "=?" in text else text


def _is_by_program(auto_submitted: str, precedence: str) -> bool:
    """RFC 3834 §5: any value but "no". Precedence is older, in no standard, and still in use."""
    if not auto_submitted and not precedence:
        return False
    keyword = auto_submitted.partition(";")[0].partition("(")[0].strip().lower()
    return keyword not in ("", "no") or precedence.strip().lower() in _BULK


def _decoded(text: str) -> str:
    """The text with its encoded words decoded (RFC 2047 §6).

    White space between two encoded words is not shown (§6.2). Neighbours of one charset are
    decoded together, since many programs split a character between them, against §5.
    """
    parts: list[str] = []
    octets, charset = b"", ""
    begun = 0
    text = _BETWEEN_WORDS.sub("?=", text)
    for match in _ENCODED_WORD.finditer(text):
        word = _octets(match[2], match[3])
        if word is None:
            continue
        if match.start() > begun or match[1].lower() != charset:
            parts += _in_charset(octets, charset), text[begun : match.start()]
            octets, charset = b"", match[1].lower()
        octets += word
        begun = match.end()
    parts += _in_charset(octets, charset), text[begun:]
    return "".join(parts)


def _octets(encoding: str, text: str) -> bytes | None:
    """What an encoded word encodes, None if it cannot be told."""
    try:
        if encoding in "qQ":
            return binascii.a2b_qp(text.replace("_", " ").encode("ascii"), header=False)
        return binascii.a2b_base64(text.rstrip("=") + "===")
    except ValueError:
        return None


def _in_charset(octets: bytes, charset: str) -> str:
    """The text of octets; as ASCII where the charset is none that mail uses.

    Python remembers every name of a codec it was ever asked for, so it is never asked for one that
    a stranger made up.
    """
    if charset not in _CHARSETS:
        charset = "ascii"
    try:
        return octets.decode(charset, "replace")
    except ValueError:  # a codec that cannot replace
        return octets.decode("ascii", "replace")


def _harmless(char: str) -> str:
    """The character, a space for white space of any kind, or U+FFFD for what no log should hold."""
    if char.isprintable() or char in _JOINERS:
        return char
    category = unicodedata.category(char)
    if char == "\t" or category == "Zs":
        return " "
    # Unassigned is only unknown to this Python: a newer emoji.
    return char if category in ("Cn", "Co") else "\ufffd"
