"""The outcome of one attempt for one recipient, and the session in which it was decided.

`Outcome = Delivered | Deferred | Bounced`. The types hold their own invariant (the
class of the enhanced status, RFC 3463 §2), so no code can make a bounce with a temporary
status. `HopSession` describes the connection that decided the outcome; it exists only where
a session took place.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from relay.mail.memory import DowngradeAlarm
from relay.mail.record import record


class Level(StrEnum):
    """How well a session is protected, weakest first."""

    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"
    VERIFIED = "verified"


class DowngradeReason(StrEnum):
    """Why a message went without TLS."""

    NOT_OFFERED = "starttls-not-offered"
    REFUSED = "starttls-refused"
    HANDSHAKE_FAILED = "handshake-failed"
    UNVERIFIED = "certificate-unverified"


@dataclass(frozen=True, slots=True)
class Downgrade:
    """A message that went without TLS: the level first tried, why it failed, the error's text."""

    wanted: Level
    reason: DowngradeReason
    error: str


class VerifiedBy(StrEnum):
    """What verified a host's certificate."""

    PKIX = "pkix"
    """A valid chain to a trusted root, and the host's name (RFC 9525 §6.3)."""
    DANE_EE = "dane-ee"
    DANE_TA = "dane-ta"
    """A TLSA record of the host (RFC 7672 §3.1)."""
    PIN = "pin"
    """A key that the operator has pinned, and no chain (`ca_file: none`)."""


class PolicyType(StrEnum):
    """The kind of policy that the recipient's domain has (RFC 8460 §4.4, policy-type)."""

    TLSA = "tlsa"
    STS = "sts"
    NONE = "no-policy-found"


class PolicyMode(StrEnum):
    """What a policy asks for, after the relay's configuration was applied to it."""

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
    """Why the relay did not look up the policy of the recipient's domain."""

    DESTINATION = "destination"
    """The operator's rule for this domain says so."""
    TLS_REQUIRED_NO = "tls-required-no"
    """The message says so (TLS-Required: No, RFC 8689 §3)."""


@record(frozen=True, slots=True)
class HopPolicy:
    """What the policy of the recipient's domain required of a host, and the result.

    `mx_secure`: the host's name came from a signed DNS answer, or from the operator. `memory`: the
    alarm, where the host showed less than before.
    """

    type: PolicyType = PolicyType.NONE
    mode: PolicyMode | None = None
    result: PolicyResult | None = None
    mx_secure: bool = False
    waived: Waived | None = None
    memory: DowngradeAlarm | None = None


NO_POLICY = HopPolicy()


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The contents of a host's certificate, verified or not.

    `names`: its dNSNames. `sha256`: the digest of its DER form, in hexadecimal.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class HopLogin:
    """Who the relay logged in as at a next hop, or tried to, and by which SASL mechanism."""

    mechanism: str
    user: str


@record(frozen=True, slots=True)
class HopSession:
    """The SMTP session with a mail host that decided an outcome.

    `verified_by` is None where the relay did not check the certificate, or did not find it valid.
    `certificate`: what the host showed, also in a handshake that failed because of it.
    `unsigned`: why the message had no DKIM-Signature although its domain has a key. `requiretls`:
    REQUIRETLS was passed on. `seconds`: from the start of the connect to the reply. `pin`: the pin
    of the next hop that the host's key matches.
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
    login: HopLogin | None = None
    pin: str | None = None

    @property
    def certificate_verified(self) -> bool:
        """Whether the certificate was checked and found valid."""
        return self.verified_by is not None


class NamedBy(StrEnum):
    """Who named the hosts of a recipient's domain."""

    MX = "mx"
    """Its MX records."""
    DOMAIN = "domain"
    """It has no MX record, and is its own host (RFC 5321 §5.1)."""
    ROUTE = "route"
    """The operator."""
    ADDRESS = "address"
    """The domain is an address literal."""


@record(frozen=True, slots=True)
class Routing:
    """Where an attempt could go. `hosts`: one line each, in the order in which they are tried.
    `is_authentic`: a signed answer named them, which the resolver validated, or the operator did.
    `next_hop`: the name of the operator's next hop, "" where there was none.
    """

    named_by: NamedBy
    is_authentic: bool
    hosts: tuple[str, ...]
    next_hop: str = ""


class Code:
    """Codes of the delivery log for results without an SMTP reply, with Mailgun's numbers."""

    NONE = 0
    """No reply decided the outcome."""
    NO_USABLE_MX = 498
    TOO_OLD = 602
    TEST_MODE = 650
    NO_CONNECTION = 680


@record(frozen=True, slots=True)
class _Result:
    """`code`: the reply code that decided, or one of `Code`. `status`: enhanced (RFC 3463).
    `message`: the peer's text, unchanged. `description`: the relay's sentence for a person.
    `session`: None when none took place. `hosts`: one line for each host tried before.
    `earlier`: the sessions with them, where there were any. `policy`: of the host that decided,
    where there was no session with it. `routing`: None where the domain had no host, and no next
    hop of the operator's.
    """

    status: str
    code: int
    message: str
    description: str = ""
    session: HopSession | None = None
    hosts: tuple[str, ...] = ()
    policy: HopPolicy | None = None
    earlier: tuple[HopSession, ...] = ()
    routing: Routing | None = None


@record(frozen=True, slots=True)
class Delivered(_Result):
    """The next hop took responsibility (RFC 5321 §4.2.5).

    `dsn_passed_on`: the host offered DSN, so that host has to report success (RFC 3461 §5.2).
    """

    dsn_passed_on: bool = False

    def __post_init__(self) -> None:
        _require_class(self.status, "2")


@record(frozen=True, slots=True)
class Deferred(_Result):
    """The relay will try again. `tls_unmet`: no host could give the TLS that is required.

    `in_doubt`: the host did not answer the final dot and may have taken the message (RFC 1047).
    """

    tls_unmet: bool = False
    in_doubt: bool = False

    def __post_init__(self) -> None:
        _require_class(self.status, "4")


@record(frozen=True, slots=True)
class Bounced(_Result):
    """The relay will not try again, and reports to the sender."""

    def __post_init__(self) -> None:
        _require_class(self.status, "5")


Outcome = Delivered | Deferred | Bounced


def _require_class(status: str, wanted: str) -> None:
    if not status.startswith(f"{wanted}."):
        raise ValueError(f"status {status!r} is not of class {wanted} (RFC 3463 §2)")
