"""MTA-STS: the record, the policy, the hosts that it names, and when to fetch it. Pure.

A domain publishes a TXT record that announces a policy and its id, and the policy itself on a web
server whose certificate proves who wrote it (RFC 8461 §3). A sender keeps the policy for
`max_age`; only a newer policy replaces it earlier.

    record                 policy in force    action
    the same id            yes                the policy holds
    another id             yes                fetch; the policy holds until that has succeeded
    none, or no answer     yes                the policy holds: an attacker could remove a record
                                              (RFC 8461 §3.3)
    an id                  no                 fetch; without success there is no policy
    none, or no answer     no                 there is no policy

After a fetch that failed, the relay does not ask the policy host again for `BACK_OFF` (§3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from relay.mail.address import AddressError, normalise_domain

MAX_POLICY_BYTES = 64 * 1024
"""RFC 8461 §3.3 suggests it."""
_LONGEST_MAX_AGE = timedelta(seconds=31_557_600)
"""RFC 8461 §3.2: about a year."""
BACK_OFF = timedelta(minutes=5)
"""The time between a fetch that failed and the next (RFC 8461 §3.3)."""
_REFRESH = timedelta(days=1)
"""RFC 8461 §3.3: a policy is refetched once a day although its id is the same."""
_SHORTEST_REFRESH = timedelta(hours=1)

_RECORD_BEGINS = b"v=STSv1;"
_LONGEST_ID = 32


class StsMode(StrEnum):
    """What a domain asks of its senders (RFC 8461 §5)."""

    ENFORCE = "enforce"
    TESTING = "testing"
    NONE = "none"


class PolicyError(StrEnum):
    """Why there is no policy although a record announces one: a result type of RFC 8460 §4.3."""

    FETCH = "sts-policy-fetch-error"
    INVALID = "sts-policy-invalid"
    CERTIFICATE = "sts-webpki-invalid"


class InvalidPolicy(ValueError):
    """A text that is no policy; the message says why."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as its domain wrote it. `mx`: normalised patterns.

    `lines`: its text, for reports (RFC 8460 §4.4, policy-string).
    """

    mode: StsMode
    max_age: timedelta
    mx: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeptPolicy:
    """A policy that was fetched. `id`: of the record that announced it.

    `refresh_at`: when it is fetched again in the background.
    """

    domain: str
    id: str
    policy: Policy
    fetched: datetime
    refresh_at: datetime

    @property
    def expires(self) -> datetime:
        """Until when the policy holds, also if later fetches fail (RFC 8461 §3.3)."""
        return self.fetched + self.policy.max_age

    def is_in_force(self, now: datetime) -> bool:
        """Whether the policy is younger than its `max_age`."""
        return now < self.expires


@dataclass(frozen=True, slots=True)
class Refreshed:
    """The result of a refresh by the operator.

    `kept`: the policy in force now, None for none. `reason`: why none was fetched.
    """

    kept: KeptPolicy | None
    reason: str = ""


# --- the record -----------------------------------------------------------------------------------


def policy_domain(recipient_domain: str, route_host: str | None = None) -> str:
    """The domain whose policy holds for mail to a domain; "" where none can.

    For mail by an operator's route it is the route's host, never the recipient domain (RFC 8461
    §3.4). An address has no policy.
    """
    name = recipient_domain if route_host is None else route_host
    try:
        domain = normalise_domain(name)
    except AddressError:
        return ""
    return "" if domain.startswith("[") else domain


def record_name(domain: str) -> str:
    """The name of the record (RFC 8461 §3.1)."""
    return f"_mta-sts.{domain}"


def policy_host(domain: str) -> str:
    """The web server that has the policy (RFC 8461 §3.3)."""
    return f"mta-sts.{domain}"


def record_id(texts: Iterable[bytes]) -> str | None:
    """The id in the TXT records of `record_name`; None where they announce no policy.

    RFC 8461 §3.1. `texts`: each record with its strings joined. Other records are ignored; there
    has to be exactly one that begins with the version of MTA-STS.
    """
    records = [text for text in texts if text.startswith(_RECORD_BEGINS)]
    if len(records) != 1:
        return None
    for field in records[0].split(b";"):
        name, equals, value = field.strip(b" \t").partition(b"=")
        if equals and name == b"id":  # the first of two fields with the same name counts (§3.2)
            return value.decode("ascii") if _is_id(value) else None
    return None


def _is_id(value: bytes) -> bool:
    return (
        1 <= len(value) <= _LONGEST_ID and value.isalnum()
    )  # of octets: letters and digits of ASCII


# --- the policy -----------------------------------------------------------------------------------


def parse_policy(body: bytes) -> Policy:
    """The policy in the body of an answer (RFC 8461 §3.2). Raises `InvalidPolicy`."""
    if len(body) > MAX_POLICY_BYTES:
        raise InvalidPolicy(f"the policy is longer than {MAX_POLICY_BYTES} octets")
    lines = [line.removesuffix("\r") for line in body.decode("utf-8", "replace").split("\n")]
    fields: dict[str, str] = {}
    patterns: list[str] = []
    for key, value in _fields(lines):
        if key == "mx":
            patterns.append(value)
        else:
            fields.setdefault(key, value)  # the first of two values for the same key counts
    if fields.get("version") != "STSv1":
        raise InvalidPolicy("the policy is not of version STSv1")
    mode = _mode(fields.get("mode", ""))
    mx = tuple(_patterns(patterns))
    if not mx and mode is not StsMode.NONE:
        raise InvalidPolicy("the policy names no mail host")
    max_age = _max_age(fields.get("max_age", ""))
    return Policy(mode, max_age, mx, tuple(line for line in lines if line.strip()))


def _fields(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(" \t"), value.strip(" \t")


def _mode(word: str) -> StsMode:
    try:
        return StsMode(word)
    except ValueError:
        raise InvalidPolicy("the policy has no mode that is known") from None


def _max_age(digits: str) -> timedelta:
    if not (digits.isascii() and digits.isdigit()):
        raise InvalidPolicy("the policy has no max_age in seconds")
    # Eleven digits already exceed the maximum; a number of a thousand digits is not computed.
    seconds = int(digits.lstrip("0")[:11] or "0")
    return min(timedelta(seconds=seconds), _LONGEST_MAX_AGE)


def _patterns(values: Iterable[str]) -> Iterator[str]:
    """The valid patterns, normalised, each once."""
    seen = set()
    for value in values:
        star = "*." if value.startswith("*.") else ""
        try:
            pattern = star + normalise_domain(value.removeprefix("*."))
        except AddressError:
            continue
        if not pattern.removeprefix(star).startswith("[") and pattern not in seen:
            seen.add(pattern)
            yield pattern


def is_pattern(text: str) -> bool:
    """Whether this is valid as a value of `mx:`."""
    return any(_patterns([text]))


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether one of the patterns names a mail host (RFC 8461 §4.1).

    `name`: as the MX record gives it, in any case, with or without a final dot. "*." stands for
    exactly one label, the left-most.
    """
    name = name.removesuffix(".").lower()
    label, _, above = name.partition(".")
    return name in patterns or (bool(label and above) and f"*.{above}" in patterns)


# --- when to fetch --------------------------------------------------------------------------------


def wants_fetch(
    kept: KeptPolicy | None, record: str | None, *, failed: datetime | None, now: datetime
) -> bool:
    """Whether an attempt has to fetch the policy, given the kept policy and the record's id now.

    `record` None: no record, or no answer. `failed`: when a fetch failed last.
    """
    if record is None or is_backing_off(failed, now=now):
        return False
    return kept is None or not kept.is_in_force(now) or kept.id != record


def is_backing_off(failed: datetime | None, *, now: datetime) -> bool:
    """Whether a recent failure prevents a fetch. A clock that was set back ends this."""
    return failed is not None and failed <= now < failed + BACK_OFF


def refresh_due(expires: datetime, *, now: datetime, jitter: float) -> datetime:
    """When the background refresh fetches a policy again after a try; `jitter` from 0 to 1.

    It is a random moment between half a day and a day from now, so that policies which were fetched
    together do not stay together; and it is before the policy expires, unless that is within an
    hour.
    """
    within = max(_SHORTEST_REFRESH, min(_REFRESH, expires - now))
    return now + within * (0.5 + jitter / 2)
