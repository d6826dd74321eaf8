"""Reads address parameters: comma lists of mailboxes, as people and programs write them. Pure.

    Ann <ann@example.com>, "Doe, Jane" <jane@example.com>, joe@example.com
    root@example.com (Cron Daemon)                      the old form of a name (RFC 5322 §3.4)

An address has to be one that `relay.mail.address` accepts. It is not decoded or completed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from relay.api.mailgun_form import ApiError, unfolded
from relay.mail.address import AddressError, domain_of, parse_path

_COMMENT_LAST = re.compile(r"(.*?[^ \t])[ \t]*\(([^()]*)\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox of an address field (RFC 5322 §3.4). `name` may be ""."""

    name: str
    address: str
    domain: str


def mailboxes(text: str, parameter: str) -> list[Mailbox]:
    """The mailboxes of a comma list. 400 with the parameter's name where one is invalid."""
    found = []
    for piece in _pieces(unfolded(text)):
        if piece.strip():
            found.append(_mailbox(piece.strip(), parameter))
    return found


def authors(values: Sequence[str]) -> list[Mailbox]:
    """The mailboxes of `from`. `Doe, Jane <jane@example.com>` is one mailbox here, although it is
    invalid in a list of recipients, where it could lose one.
    """
    found = []
    for value in values:
        try:
            found += mailboxes(value, "from")
        except ApiError:
            found.append(_mailbox(unfolded(value), "from"))
    return found


def _pieces(text: str) -> Iterable[str]:
    """The text divided at the commas outside quotes, comments and angle brackets, in one pass."""
    begun, quoted, angle, comment = 0, False, False, 0
    escaped = False
    for position, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\" and (quoted or comment):
            escaped = True
        elif char == '"' and not comment:
            quoted = not quoted
        elif quoted:
            continue
        elif char == "(":
            comment += 1
        elif char == ")":
            comment = max(comment - 1, 0)
        elif comment:
            continue
        elif char in "<>":
            angle = char == "<"
        elif char == "," and not angle:
            yield text[begun:position]
            begun = position + 1
    yield text[begun:]


def _mailbox(piece: str, parameter: str) -> Mailbox:
    comment = ""
    if piece.endswith(")") and (match := _COMMENT_LAST.fullmatch(piece)):
        piece, comment = match[1], _display_name(match[2].strip(), parameter)
    name, path = "", piece
    if piece.endswith(">"):
        name, _, path = piece[:-1].rpartition("<")
    try:
        address, rest = parse_path(f"<{path.strip()}>".encode(), smtputf8=True)
        domain = domain_of(address)
    except (AddressError, UnicodeEncodeError):
        raise _not_an_address(parameter) from None
    if rest or not domain or domain.startswith("["):
        raise _not_an_address(parameter)
    local = address.rpartition("@")[0]
    if local.isascii() and not address.isascii():
        address = f"{local}@{domain}"  # the A-labels of the domain need no SMTPUTF8
    name = _display_name(name.strip(), parameter)
    if comment:
        name = f"{name} ({comment})" if name else comment
    return Mailbox(name, address, domain)


def _display_name(text: str, parameter: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    if any(c in text for c in "\r\n\0") or "<" in text:
        raise _not_an_address(parameter)
    return text


def _not_an_address(parameter: str) -> ApiError:
    return ApiError(
        400, f"'{parameter}' parameter is not a valid address. please check documentation"
    )
