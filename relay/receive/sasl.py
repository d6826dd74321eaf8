"""The exchange of AUTH: PLAIN (RFC 4616) and LOGIN, up to name and password.

`begin` and `answer` return the next challenge, or the credentials, or a reply that ends the
exchange (RFC 4954 §4, §6). Other modules check the credentials.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from relay.mail.reply import Reply

MECHANISMS = ("PLAIN", "LOGIN")

_CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
_NOT_BASE64 = Reply(501, "5.5.2", "That is not base64")
_NOT_PLAIN = Reply(501, "5.5.2", "That is not PLAIN")
_UNKNOWN = Reply(504, "5.5.4", "This mechanism is not known here")
_SYNTAX = Reply(501, "5.5.4", "Syntax: AUTH mechanism")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenge that the client has to answer."""

    text: bytes

    def encode(self) -> bytes:
        return b"334 " + base64.b64encode(self.text) + b"\r\n"


@dataclass(frozen=True, slots=True)
class GivenPassword:
    """The name and password that the client gave."""

    name: bytes
    password: bytes


Step = Challenge | GivenPassword | Reply


class AuthExchange:
    """One AUTH command, from its argument to its end."""

    def __init__(self) -> None:
        self._mechanism = b""
        self._name: bytes | None = None

    def begin(self, arg: bytes) -> Step:
        """Read the argument of AUTH: a mechanism, in any case, and perhaps an initial response."""
        mechanism, _, initial = arg.partition(b" ")
        self._mechanism = mechanism.upper()
        if not mechanism:
            return _SYNTAX
        if self._mechanism.decode("latin-1") not in MECHANISMS:
            return _UNKNOWN
        if initial:
            return self.answer(initial.strip(b" "))
        return Challenge(b"" if self._mechanism == b"PLAIN" else b"Username:")

    def answer(self, line: bytes) -> Step:
        """The client's answer to a challenge."""
        if line == b"*":
            return _CANCELLED
        try:
            octets = b"" if line == b"=" else base64.b64decode(line, validate=True)
        except binascii.Error:
            return _NOT_BASE64
        return self._plain(octets) if self._mechanism == b"PLAIN" else self._login(octets)

    def _plain(self, octets: bytes) -> Step:
        """authzid NUL authcid NUL passwd (RFC 4616 §2); a user may not act for another."""
        parts = octets.split(b"\0")
        if len(parts) != 3 or not parts[1] or parts[0] not in (b"", parts[1]):
            return _NOT_PLAIN
        return GivenPassword(parts[1], parts[2])

    def _login(self, octets: bytes) -> Step:
        if self._name is None:
            self._name = octets
            return Challenge(b"Password:")
        return GivenPassword(self._name, octets)
