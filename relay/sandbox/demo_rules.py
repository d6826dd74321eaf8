"""The mail hosts of `relay demo`, and the result that the TLS rules give a message to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from relay.mail.jsontext import JsonDocument, JsonFields
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script, StartTls


class Result(StrEnum):
    """The result for a message."""

    VERIFIED = "sent in TLS, verified"
    UNVERIFIED = "sent in TLS, unverified"
    IN_CLEAR = "sent in clear"
    DEFERRED = "deferred"
    BOUNCED = "bounced"
    LOST = "no word of it"


class Published(Enum):
    """What a domain publishes about its mail host, or what the operator configures for it."""

    NOTHING = auto()
    TLSA = auto()
    OTHER_TLSA = auto()
    POLICY = auto()
    OTHER_POLICY = auto()
    PINNED = auto()


@dataclass(frozen=True, slots=True)
class DemoHost:
    """A kind of mail host. `expected`: the result with each pair of `SETTINGS`."""

    meaning: str
    expected: tuple[Result, ...]
    script: Script = field(default_factory=Script)
    published: Published = Published.NOTHING


SETTINGS = ((False, False), (False, True), (True, False), (True, True))
"""require_tls and skip_verification."""

_WITHOUT_VERIFIED_TLS = (Result.IN_CLEAR, Result.UNVERIFIED, Result.DEFERRED, Result.UNVERIFIED)
_ALWAYS_VERIFIED = (Result.VERIFIED,) * len(SETTINGS)
_NEVER_SENT = (Result.DEFERRED,) * len(SETTINGS)

HOSTS: Mapping[str, DemoHost] = {
    "good": DemoHost(
        "TLS, with a valid certificate",
        (Result.VERIFIED, Result.UNVERIFIED, Result.VERIFIED, Result.UNVERIFIED),
    ),
    "wrong-name": DemoHost(
        "TLS, with a certificate for another name",
        _WITHOUT_VERIFIED_TLS,
        Script(certificate=Kind.WRONG_NAME),
    ),
    "expired": DemoHost(
        "TLS, with an expired certificate", _WITHOUT_VERIFIED_TLS, Script(certificate=Kind.EXPIRED)
    ),
    "no-starttls": DemoHost(
        "no TLS",
        (Result.IN_CLEAR, Result.IN_CLEAR, Result.DEFERRED, Result.DEFERRED),
        Script(starttls=StartTls.ABSENT),
    ),
    "dane": DemoHost(
        "no authority's certificate; the domain publishes the TLSA record of its certificate",
        _ALWAYS_VERIFIED,
        Script(certificate=Kind.SELF_SIGNED),
        Published.TLSA,
    ),
    "dane-mismatch": DemoHost(
        "a valid certificate; the domain publishes the TLSA record of another certificate",
        _NEVER_SENT,
        published=Published.OTHER_TLSA,
    ),
    "mta-sts": DemoHost(
        "a valid certificate; the domain publishes an MTA-STS policy that names the host",
        _ALWAYS_VERIFIED,
        published=Published.POLICY,
    ),
    "mta-sts-other": DemoHost(
        "a valid certificate; the domain publishes an MTA-STS policy that names another host",
        _NEVER_SENT,
        published=Published.OTHER_POLICY,
    ),
    "pinned-other": DemoHost(
        "a valid certificate; the configuration allows only another host (a pin)",
        _NEVER_SENT,
        published=Published.PINNED,
    ),
}


WAYS: Mapping[Result, list[str]] = {
    Result.VERIFIED: ["tls"],
    Result.UNVERIFIED: ["tls"],
    Result.IN_CLEAR: ["clear"],
    Result.DEFERRED: [],
    Result.BOUNCED: [],
    Result.LOST: [],
}
"""For each result, how the copies reach the host."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One message: its settings, its host and its result. `event`: the delivery log's line."""

    require_tls: bool
    skip_verification: bool
    host: str
    expected: Result
    result: Result
    seen_by_host: bool
    """Whether the host received what the log says, with or without TLS as the log says."""
    why: str
    event: JsonFields

    @property
    def is_as_ruled(self) -> bool:
        return self.result is self.expected and self.seen_by_host

    def as_json(self) -> JsonDocument:
        """The cell as data for JSON output."""
        return {
            "require-tls": self.require_tls,
            "skip-verification": self.skip_verification,
            "host": self.host,
            "expected": self.expected,
            "became": self.result,
            "as-ruled": self.is_as_ruled,
            "why": self.why,
            "event": self.event,
        }
