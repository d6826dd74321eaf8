"""What the hosts of `relay demo` are, and what has to become of mail to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from relay.mail.jsontext import JsonDocument, JsonFields
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script, StartTls

__all__ = [
    "BY_PUBLISHED",
    "HOSTS",
    "LEGEND",
    "PUBLISHED",
    "RULES",
    "WAYS",
    "Cell",
    "Published",
    "Result",
]


class Result(StrEnum):
    """The result for a message."""

    VERIFIED = "sent in TLS, verified"
    UNVERIFIED = "sent in TLS, unverified"
    IN_CLEAR = "sent in clear"
    DEFERRED = "deferred"
    BOUNCED = "bounced"
    LOST = "no word of it"


class Published(StrEnum):
    """What a domain publishes about its mail host, or what the operator configures for it."""

    NOTHING = "nothing"
    TLSA = "the TLSA record of its certificate"
    OTHER_TLSA = "the TLSA record of another certificate"
    POLICY = "an MTA-STS policy that names the host"
    OTHER_POLICY = "an MTA-STS policy that names another host"
    PINNED = "another host is pinned"


HOSTS: Mapping[str, Script] = {
    "good": Script(),
    "wrong-name": Script(certificate=Kind.WRONG_NAME),
    "expired": Script(certificate=Kind.EXPIRED),
    "no-starttls": Script(starttls=StartTls.ABSENT),
    "dane": Script(certificate=Kind.SELF_SIGNED),
    "dane-mismatch": Script(),
    "mta-sts": Script(),
    "mta-sts-other": Script(),
    "pinned-other": Script(),
}

PUBLISHED: Mapping[str, Published] = {
    "dane": Published.TLSA,
    "dane-mismatch": Published.OTHER_TLSA,
    "mta-sts": Published.POLICY,
    "mta-sts-other": Published.OTHER_POLICY,
    "pinned-other": Published.PINNED,
}

LEGEND: Mapping[str, str] = {
    "good": "TLS, with a valid certificate",
    "wrong-name": "TLS, with a certificate for another name",
    "expired": "TLS, with an expired certificate",
    "no-starttls": "no TLS",
    "dane": f"no authority's certificate; the domain publishes {Published.TLSA}",
    "dane-mismatch": f"a valid certificate; the domain publishes {Published.OTHER_TLSA}",
    "mta-sts": f"a valid certificate; the domain publishes {Published.POLICY}",
    "mta-sts-other": f"a valid certificate; the domain publishes {Published.OTHER_POLICY}",
    "pinned-other": "a valid certificate; the configuration allows only another host (a pin)",
}
"""The kinds of mail host, as the demo explains them."""

BY_PUBLISHED: Mapping[Published, Result] = {
    Published.TLSA: Result.VERIFIED,
    Published.OTHER_TLSA: Result.DEFERRED,
    Published.POLICY: Result.VERIFIED,
    Published.OTHER_POLICY: Result.DEFERRED,
    Published.PINNED: Result.DEFERRED,
}
"""The expected result, the same with all four pairs of settings."""

# fmt: off
RULES: Mapping[tuple[bool, bool], tuple[Result, Result, Result, Result]] = {
    # require, skip:  good             wrong name       expired          no STARTTLS
    (False, False): (Result.VERIFIED,   Result.IN_CLEAR,   Result.IN_CLEAR,   Result.IN_CLEAR),
    (False, True):  (Result.UNVERIFIED, Result.UNVERIFIED, Result.UNVERIFIED, Result.IN_CLEAR),
    (True,  False): (Result.VERIFIED,   Result.DEFERRED,   Result.DEFERRED,   Result.DEFERRED),
    (True,  True):  (Result.UNVERIFIED, Result.UNVERIFIED, Result.UNVERIFIED, Result.DEFERRED),
}
# fmt: on


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
