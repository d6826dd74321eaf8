"""What one attempt came to, for one recipient, and the session it happened in.

`Outcome = Delivered | Deferred | Bounced`. The types hold their own invariant (the
class of the enhanced status, RFC 3463 §2), so a bounce with a temporary status
cannot be written down. `HopSession` is the truth about the connection that decided:
it exists only where a session took place.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "Bounced",
    "Code",
    "Deferred",
    "Delivered",
    "Downgrade",
    "DowngradeReason",
    "HopSession",
    "Level",
    "Outcome",
]


class Level(StrEnum):
    """How well a session is protected, weakest first."""

    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"
    VERIFIED = "verified"


class DowngradeReason(StrEnum):
    """Why a message went in clear."""

    NOT_OFFERED = "starttls-not-offered"
    REFUSED = "starttls-refused"
    HANDSHAKE_FAILED = "handshake-failed"
    UNVERIFIED = "certificate-unverified"


@dataclass(frozen=True, slots=True)
class Downgrade:
    """A message that went in clear: the level first tried for, why it was not had, the error's own text."""

    wanted: Level
    reason: DowngradeReason
    error: str


@dataclass(frozen=True, slots=True)
class HopSession:
    """One SMTP session with a mail host, as far as it decided an outcome.

    `tls` and `certificate_verified` describe the session the outcome came from.
    `verified_by` is "pkix" (or later "dane-…") where the certificate was checked and
    good, else None. `seconds` runs from the start of the connect to the reply.
    """

    mx_host: str
    mx_ip: str
    tls: bool
    certificate_verified: bool
    tls_version: str | None = None
    tls_cipher: str | None = None
    verified_by: str | None = None
    downgrade: Downgrade | None = None
    utf8: bool = False
    seconds: float = 0.0


class Code:
    """Codes of the delivery log that no SMTP reply gave (the field's own, as Mailgun numbers them)."""

    NONE = 0
    """No reply decided."""
    NO_USABLE_MX = 498
    TOO_OLD = 602
    TEST_MODE = 650
    NO_CONNECTION = 680


@dataclass(frozen=True, slots=True)
class _Result:
    """`code`: the reply code that decided, or one of `Code`. `status`: enhanced (RFC 3463).
    `message`: the peer's text, as it came. `description`: our sentence for a person.
    `session`: None when none took place. `hosts`: one line for each host tried before.
    """

    status: str
    code: int
    message: str
    description: str = ""
    session: HopSession | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delivered(_Result):
    """The next hop took responsibility (RFC 5321 §4.2.5).

    `dsn_passed_on`: the host offered DSN, so reporting success is its duty now (RFC 3461 §5.2).
    """

    dsn_passed_on: bool = False

    def __post_init__(self) -> None:
        _hold(self.status, "2")


@dataclass(frozen=True, slots=True)
class Deferred(_Result):
    """To be tried again. `tls_unmet`: the rules of TLS could not be kept at any host.

    `in_doubt`: the host fell silent after the final dot and may have taken the message (RFC 1047).
    """

    tls_unmet: bool = False
    in_doubt: bool = False

    def __post_init__(self) -> None:
        _hold(self.status, "4")


@dataclass(frozen=True, slots=True)
class Bounced(_Result):
    """Never to be tried again; to be reported to the sender."""

    def __post_init__(self) -> None:
        _hold(self.status, "5")


Outcome = Delivered | Deferred | Bounced


def _hold(status: str, wanted: str) -> None:
    if not status.startswith(f"{wanted}."):
        raise ValueError(f"status {status!r} is not of class {wanted} (RFC 3463 §2)")
