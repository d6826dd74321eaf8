"""A Postfix `smtp_tls_policy_maps` table, read as postmap(1) and the smtp(8) client read it.

`read_table` finds the logical lines of the source: comments, empty lines and continuation lines as
postmap(1) has them. `read_policy` divides a value into its level and its attributes, as Postfix
does at each delivery; `PolicyValueError` is what makes Postfix defer all mail for that key.
`allowed_versions` says which versions of TLS a `protocols=` value lets through. What all that means
for us is for `relay.policy.postfix_import` to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class TableLine:
    """A logical line. `number`: of its first physical line, from 1. `fault`: why Postfix passes
    over it, "" where it does not.
    """

    number: int
    key: str
    value: str
    fault: str = ""

    @property
    def text(self) -> str:
        """The line as one."""
        return f"{self.key} {self.value}".strip()


class PostfixLevel(StrEnum):
    """The TLS security levels of the smtp(8) client."""

    NONE = "none"
    MAY = "may"
    ENCRYPT = "encrypt"
    DANE = "dane"
    DANE_ONLY = "dane-only"
    FINGERPRINT = "fingerprint"
    VERIFY = "verify"
    SECURE = "secure"

    @property
    def requires_tls(self) -> bool:
        """Whether no mail goes in clear, whatever the host publishes."""
        return self not in (PostfixLevel.NONE, PostfixLevel.MAY, PostfixLevel.DANE)


@dataclass(frozen=True, slots=True)
class PostfixPolicy:
    """The value of a line. `match` and `tafile` may be there more than once, and are joined.

    None: not there. `others`: attributes by which MTA-STS plug-ins tell Postfix what to report.
    """

    level: PostfixLevel
    match: tuple[str, ...] = ()
    protocols: str | None = None
    ciphers: str | None = None
    exclude: str | None = None
    tafile: tuple[str, ...] = ()
    servername: str | None = None
    connection_reuse: bool | None = None
    enable_rpk: bool | None = None
    others: tuple[str, ...] = ()


class PolicyValueError(ValueError):
    """Postfix cannot use the value, and defers all mail that it is for."""


_SPACE = " \t\r\f\v"
_BLANK_OR_COMMENT = re.compile(rf"[{_SPACE}]*(?:#.*)?")
_QUOTED_KEY = re.compile(r'("(?:[^"\\]|\\.)*")(.*)', re.DOTALL)
_TOKEN = re.compile(r"\{[^{}]*\}|[^,\s]+", re.ASCII)
_ONLY_ONCE = ("ciphers", "protocols", "exclude", "servername")
_GRADES = ("high", "medium", "low", "export", "null")
_SWITCHES = ("connection_reuse", "enable_rpk")
_REPORTED = (
    "policy_type",
    "policy_ttl",
    "policy_domain",
    "policy_string",
    "policy_failure",
    "mx_host_pattern",
)
_HOST_NAME = re.compile(r"(?=.{1,255}$)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")

VERSIONS = ("SSLv2", "SSLv3", "TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
"""The names of `protocols=`, oldest first."""
_NUMBERS = {0x0002: 0, 0x0300: 1, 0x0301: 2, 0x0302: 3, 0x0303: 4, 0x0304: 5}
"""What OpenSSL numbers them by, as an index of `VERSIONS`."""


def read_table(text: str) -> tuple[TableLine, ...]:
    """The logical lines of a table's source (postmap(1), INPUT FILE FORMAT)."""
    return tuple(_parsed(number, line) for number, line in _logical_lines(text))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """A comment or an empty line between a line and its continuation does not end the line."""
    begun = 0
    parts: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if _BLANK_OR_COMMENT.fullmatch(line):
            continue
        if parts and line[0] in _SPACE:
            parts.append(line)
            continue
        if parts:
            yield begun, "".join(parts)
        begun, parts = number, [line]
    if parts:
        yield begun, "".join(parts)


def _parsed(number: int, line: str) -> TableLine:
    if line[0] in _SPACE:
        return TableLine(
            number, "", line.strip(), "it begins with white space and continues no line"
        )
    # The quotes stay part of the key: white space in it is all they are for.
    quoted = _QUOTED_KEY.fullmatch(line)
    parts = quoted.groups() if quoted else re.split(f"[{_SPACE}]", line, maxsplit=1)
    key, value = parts[0], "".join(parts[1:]).strip(_SPACE)
    if not key or not value:
        return TableLine(number, key, value, "it is not of the form `key value`")
    return TableLine(number, key, value)


def read_policy(value: str) -> PostfixPolicy:
    """The level and attributes of a value; PolicyValueError where Postfix would defer the mail."""
    tokens = _TOKEN.findall(value)
    if not tokens:
        raise PolicyValueError("there is no level")
    try:
        level = PostfixLevel(tokens[0].lower())
    except ValueError:
        raise PolicyValueError(f'"{tokens[0]}" is no level') from None
    if level is PostfixLevel.NONE:  # its attributes are passed over, right or wrong
        return PostfixPolicy(level)
    found: dict[str, list[str]] = {}
    for before, token in pairwise(tokens):
        name, attribute = _attribute(token, before)
        found.setdefault(name, []).append(attribute)
    _hold_to_form(level, found)
    return PostfixPolicy(
        level,
        match=_divided(found.get("match", []), "|" if level is PostfixLevel.FINGERPRINT else ":"),
        protocols=_first(found, "protocols"),
        ciphers=_first(found, "ciphers"),
        exclude=_first(found, "exclude"),
        tafile=tuple(found.get("tafile", [])),
        servername=_first(found, "servername"),
        connection_reuse=_switch(found, "connection_reuse"),
        enable_rpk=_switch(found, "enable_rpk"),
        others=tuple(name for name in found if name in _REPORTED),
    )


def _attribute(token: str, before: str) -> tuple[str, str]:
    """`name=value`, or `{ name = value }` with white space in it. `before`: the token before it."""
    name, equals, value = token.strip("{}").partition("=")
    name = name.strip()
    if not equals or not name:
        why = ""
        if token.startswith("#"):
            why = " (a comment stands on a line of its own)"
        elif before.lower().startswith("match="):
            why = f" (between the names of match stands a colon: {before}:{token})"
        raise PolicyValueError(f'"{token}" is no name=value{why}')
    return name.lower(), value.strip()


def _hold_to_form(level: PostfixLevel, found: dict[str, list[str]]) -> None:
    """PolicyValueError for what Postfix refuses: errors that could make a line protect less."""
    is_pkix = level in (PostfixLevel.VERIFY, PostfixLevel.SECURE)
    for name, values in found.items():
        if name not in ("match", "tafile", *_ONLY_ONCE, *_SWITCHES, *_REPORTED):
            raise PolicyValueError(f'"{name}" is no attribute')
        if name in _ONLY_ONCE and len(values) > 1:
            raise PolicyValueError(f'"{name}" is there more than once')
        if name in ("match", "tafile", "ciphers") and not all(values):
            raise PolicyValueError(f'"{name}" has no value')
        if name == "match" and not (is_pkix or level is PostfixLevel.FINGERPRINT):
            raise PolicyValueError(f'level {level} has no "match"')
        if name == "tafile" and not is_pkix:
            raise PolicyValueError(f'level {level} has no "tafile"')
        if name in _SWITCHES and not {value.lower() for value in values} <= {"yes", "no"}:
            raise PolicyValueError(f'"{name}" is neither yes nor no')
        if name == "ciphers" and values[0].lower() not in _GRADES:
            raise PolicyValueError(f'"{values[0]}" is no grade of ciphers')
        if name == "servername" and not _HOST_NAME.fullmatch(values[0]):
            raise PolicyValueError(f'"{values[0]}" is no host name')
        if name == "protocols":
            allowed_versions(values[0])


def _divided(values: list[str], at: str) -> tuple[str, ...]:
    return tuple(part.strip() for value in values for part in value.split(at) if part.strip())


def _first(found: dict[str, list[str]], name: str) -> str | None:
    return found[name][0] if name in found else None


def _switch(found: dict[str, list[str]], name: str) -> bool | None:
    """The last one counts."""
    return found[name][-1].lower() == "yes" if name in found else None


def allowed_versions(protocols: str) -> tuple[str, ...]:
    """The versions of TLS that a `protocols=` value lets through, oldest first.

    `!SSLv3` takes one away, `TLSv1.2` names those that are left, `>=TLSv1.2` and `<=TLSv1.2` are
    bounds. PolicyValueError for a word that Postfix does not know.
    """
    least, most = 0, len(VERSIONS) - 1
    named: set[int] = set()
    taken: set[int] = set()
    for word in re.split(r"[\s,:]+", protocols.strip()):
        match word[:2]:
            case ">=":
                least = _version(word[2:], word)
            case "<=":
                most = _version(word[2:], word)
            case _ if word.startswith("!"):
                taken.add(_version(word[1:], word))
            case _ if word:
                named.add(_version(word, word))
    left = (named or set(range(len(VERSIONS)))) - taken
    return tuple(VERSIONS[each] for each in sorted(left) if least <= each <= most)


def _version(name: str, word: str) -> int:
    """The index of a version, which bounds may also name by OpenSSL's number (0x0303)."""
    for index, known in enumerate(VERSIONS):
        if known.lower() == name.lower():
            return index
    try:
        return _NUMBERS[int(name, 0)]
    except (ValueError, KeyError):
        raise PolicyValueError(f'"{word}" is no version of TLS') from None
