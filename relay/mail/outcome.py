"""What one attempt came to, for one recipient, and the session it happened in.

`Outcome = Delivered | Deferred | Bounced`. The types hold their own invariant (the
class of the enhanced status, RFC 3463 §2), so a bounce with a temporary status
cannot be written down. `HopSession` is the truth about the connection that decided:
it exists only where a session took place.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

__all__ = [
    "NO_POLICY",
    "Bounced",
    "CertificateFacts",
    "Code",
    "Deferred",
    "Delivered",
    "Downgrade",
    "DowngradeReason",
    "HopPolicy",
    "HopSession",
    "Level",
    "Outcome",
    "PolicyMode",
    "PolicyResult",
    "PolicyType",
    "VerifiedBy",
    "Waived",
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
    """A message that went in clear: the level first tried for, why it was not had, the error's own
    text.
    """

    wanted: Level
    reason: DowngradeReason
    error: str


class VerifiedBy(StrEnum):
    """What a host's certificate was checked against and found good by."""

    PKIX = "pkix"
    """A chain to a trusted root, in date, and the host's name (RFC 9525 §6.3)."""
    DANE_EE = "dane-ee"
    DANE_TA = "dane-ta"
    """A TLSA record of the host (RFC 7672 §3.1)."""


class PolicyType(StrEnum):
    """Which kind of policy of the recipient's domain judged a host (RFC 8460 §4.4, policy-type)."""

    TLSA = "tlsa"
    STS = "sts"
    NONE = "no-policy-found"


class PolicyMode(StrEnum):
    """What a policy asks for, our own configuration considered."""

    ENFORCE = "enforce"
    TESTING = "testing"
    NONE = "none"


class PolicyResult(StrEnum):
    """What was wrong with a host, or with the policy itself (RFC 8460 §4.3)."""

    STARTTLS_NOT_SUPPORTED = "starttls-not-supported"
    HOST_MISMATCH = "certificate-host-mismatch"
    EXPIRED = "certificate-expired"
    NOT_TRUSTED = "certificate-not-trusted"
    VALIDATION_FAILURE = "validation-failure"
    TLSA_INVALID = "tlsa-invalid"
    DNSSEC_INVALID = "dnssec-invalid"
    STS_FETCH_ERROR = "sts-policy-fetch-error"
    STS_INVALID = "sts-policy-invalid"
    STS_WEBPKI_INVALID = "sts-webpki-invalid"


class Waived(StrEnum):
    """Who said that the recipient's policy is not looked at."""

    DESTINATION = "destination"
    """A rule of the operator's for this domain."""
    TLS_REQUIRED_NO = "tls-required-no"
    """The message itself (TLS-Required: No, RFC 8689 §3)."""


@dataclass(frozen=True, slots=True)
class HopPolicy:
    """What the recipient's domain asked of a host, and what came of it.

    `mx_secure`: the host's name came by a signed answer, or from the operator.
    """

    type: PolicyType = PolicyType.NONE
    mode: PolicyMode | None = None
    result: PolicyResult | None = None
    mx_secure: bool = False
    waived: Waived | None = None


NO_POLICY = HopPolicy()


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a host's certificate says of itself, believed or not. `names`: the dNSNames it is for;
    `sha256`: of its DER, in hexadecimal.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class HopSession:
    """One SMTP session with a mail host, as far as it decided an outcome.

    `tls` and `verified_by` describe the session the outcome came from; None where the certificate
    was not looked at, or was not good. `unsigned`: why the message had no DKIM-Signature though
    its domain has a key. `requiretls`: REQUIRETLS was passed on. `seconds` runs from the start of the connect to the reply.
    """

    mx_host: str
    mx_ip: str
    tls: bool = False
    tls_version: str | None = None
    tls_cipher: str | None = None
    verified_by: VerifiedBy | None = None
    downgrade: Downgrade | None = None
    utf8: bool = False
    unsigned: str = ""
    seconds: float = 0.0
    policy: HopPolicy = NO_POLICY
    requiretls: bool = False
    certificate: CertificateFacts | None = None

    @property
    def certificate_verified(self) -> bool:
        """Whether the certificate was looked at, and good."""
        return self.verified_by is not None


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
    `policy`: of the host that decided, where there was no session with it.
    """

    status: str
    code: int
    message: str
    description: str = ""
    session: HopSession | None = None
    hosts: tuple[str, ...] = ()
    policy: HopPolicy | None = None


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
