"""Which file of a Postfix a text is, and what of its lines may be shown.

The files of a Postfix stand in one directory, and a table of logins looks much like one of TLS
policies. `kind_of` decides by the lines, so that a wrong file is refused before any of it is shown:

    TLS policies    partner.example         encrypt
    logins          [smtp.example]:587      user:password
    main.cf         relayhost               = [smtp.example]:587
    transports      partner.example         smtp:[gw.example]:25
    relay hosts     @example.com            [smtp.example]:587

A value that begins with `word:` may hold a password, so it is shown only where it is understood
(`shown`).
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum

from relay.policy.postfix_table import PostfixLevel, TableLine, read_table


class PostfixFile(StrEnum):
    """A file of Postfix, as a person calls it."""

    TLS_POLICIES = "a table of TLS policies (smtp_tls_policy_maps)"
    LOGINS = "a table of logins (smtp_sasl_password_maps)"
    MAIN_CF = "main.cf"
    TRANSPORTS = "a table of transports (transport_maps)"
    SENDER_TRANSPORTS = "a table of transports by sender (sender_dependent_default_transport_maps)"
    SENDER_RELAYHOSTS = "a table of relay hosts by sender (sender_dependent_relayhost_maps)"


HIDDEN = "(not shown: it may be a password)"

_SETTING = re.compile(r"[a-z][a-z0-9_]*\s*=(?!=)")
_IN_BRACKETS = r"\[[^\[\]\s]+\](?::\w+)?"
_PLAIN = r"[\w-]+(?:\.[\w-]+)+(?::(?:\d+|smtps?|submissions?))?|[\w-]+:(?:25|465|587)"
_RELAYHOST = re.compile(rf"{_IN_BRACKETS}(?:[,\s]+{_IN_BRACKETS})*|{_PLAIN}|DUNNO", re.IGNORECASE)
_TRANSPORT = re.compile(
    rf"(?:smtp|relay|lmtp|local|virtual|uucp|error|retry|discard):.*|[\w-]*:{_IN_BRACKETS}|:|\w+:"
)
_LEVELS = frozenset(map(str, PostfixLevel))
_COLON_FIRST = re.compile(r"(?:^|[\s,])[^\s=:,\[\]]+:")
"""A word that begins with `user:`. `match=a:b` and `[host]:587` do not."""


def kind_of(text: str, wanted: PostfixFile) -> PostfixFile | None:
    """What most lines of a file are; `wanted` where there are as many of it as of another. None:
    the lines are like those of no such file.
    """
    found = Counter(kind for line in read_table(text) if (kind := _kind(line)) is not None)
    return max(found, key=lambda kind: (found[kind], kind is wanted), default=None)


def _kind(line: TableLine) -> PostfixFile | None:
    first = re.split(r"[\s,]", line.value, maxsplit=1)[0]
    is_sender = line.key.startswith("@") or ("@" in line.key and not line.key.startswith("/"))
    if _SETTING.match(line.text):
        return PostfixFile.MAIN_CF
    if line.fault:
        return None
    if first.lower() in _LEVELS:
        return PostfixFile.TLS_POLICIES
    if _RELAYHOST.fullmatch(line.value):
        return PostfixFile.SENDER_RELAYHOSTS if is_sender else None
    if _TRANSPORT.fullmatch(line.value) and not line.key.startswith("["):
        return PostfixFile.SENDER_TRANSPORTS if is_sender else PostfixFile.TRANSPORTS
    return PostfixFile.LOGINS if holds_secret(line.value) else None


def holds_secret(value: str) -> bool:
    """Whether a value that is not understood may be `user:password`."""
    first = re.split(r"[\s,]", value, maxsplit=1)[0]
    if first.lower() not in _LEVELS and ":" in first and not first.startswith("["):
        return True
    return _COLON_FIRST.search(value) is not None


def shown(line: TableLine, *, is_understood: bool) -> str:
    """A line as it may be shown."""
    if is_understood:
        return line.text
    if line.fault:
        return HIDDEN if holds_secret(line.text) else line.text
    return f"{line.key} {HIDDEN}" if holds_secret(line.value) else line.text
