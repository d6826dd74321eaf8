"""The envelope of a message: its sender, its recipients, and the parameters of MAIL and RCPT.

Addresses are the exact text that the client wrote inside the angle brackets, already
checked by `relay.mail.address`. Encoding one as UTF-8 gives the accepted bytes
back, and no part after the listener parses it again. `reverse_path == ""` is the
null reverse-path (RFC 5321 §4.5.5).

The DSN parameters are RFC 3461's, with their case and xtext kept as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from relay.mail.record import record


class Body(StrEnum):
    """The BODY parameter of MAIL (RFC 6152 §3, RFC 3030 §3)."""

    SEVEN_BIT = "7BIT"
    EIGHT_BIT_MIME = "8BITMIME"


class Notify(StrEnum):
    """A NOTIFY keyword of RCPT (RFC 3461 §4.1)."""

    NEVER = "NEVER"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    DELAY = "DELAY"


class Ret(StrEnum):
    """The RET parameter of MAIL: how much of the message a DSN returns (RFC 3461 §4.3)."""

    FULL = "FULL"
    HDRS = "HDRS"


@record(frozen=True, slots=True)
class Recipient:
    """One forward-path of a transaction.

    `domain` is `relay.mail.address.domain_of(address)`: lower case, A-labels, no
    final dot. An empty `notify` means that the client gave no NOTIFY: RFC 3461 §4.1
    then asks for a report of failure and allows one of delay.
    """

    address: str
    domain: str
    notify: frozenset[Notify] = frozenset()
    orcpt: str = ""


@dataclass(frozen=True, slots=True)
class Envelope:
    """MAIL and its accepted RCPTs (RFC 5321 §3.3)."""

    reverse_path: str
    recipients: tuple[Recipient, ...]
    body: Body = Body.SEVEN_BIT
    smtputf8: bool = False
    ret: Ret | None = None
    envid: str = ""
