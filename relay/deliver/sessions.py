"""Which sessions of an attempt reports on TLS count, and as what (RFC 8460 §4.2, §4.3). Pure.

    a new connection that came as far as EHLO    once, by its first handshake
    a host that a policy kept from being used    once an attempt
    a fetch of an MTA-STS policy that failed     once

A connection that is used again, or a second one to the same host in clear, is no session of its
own. Counted is what judged the host: its TLSA records, the domain's MTA-STS policy, or neither.
"""

from __future__ import annotations

from datetime import datetime

from relay.deliver.connection import TlsResult
from relay.deliver.sts_fetch import FetchFailed
from relay.mail.outcome import HopPolicy, PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession
from relay.route.floor import DaneFloor, HostFloor, Proof, StsFloor
from relay.route.mta_sts import KeptPolicy, StsMode
from relay.route.next_hop import Host
from relay.route.security import Situation, policy_result

_WITH_REASON = (PolicyResult.NOT_TRUSTED, PolicyResult.VALIDATION_FAILURE)
"""Results that say little without words."""


class SessionLog:
    """The sessions of one attempt; None for `into`: they are not counted. Neither is one at a host
    of which no domain can be told.
    """

    def __init__(self, into: list[TlsSession] | None = None) -> None:
        self._into = into
        self._refused: dict[str, TlsSession] = {}

    def refused(self, host: Host, floor: HostFloor) -> None:
        """A host is not connected to. What the operator said of it is none of the domain's; a
        policy without a mode could not be fetched, which `failed_fetch` counts.
        """
        result = floor.policy.result
        if self._is_counted(floor) and result is not None and floor.policy.mode is not None:
            reason = f"it {floor.not_used}" if result in _WITH_REASON else ""
            failure = SessionFailure(result, mx_host=host.name, reason=reason)
            self._refused.setdefault(host.name, self._session(floor, failure))

    def end(self) -> None:
        """The attempt came to its end. One that is made again at once refuses its hosts again."""
        if self._into is not None:
            self._into.extend(self._refused.values())
            self._refused.clear()

    def met(self, host: Host, floor: HostFloor, found: TlsResult, sending_ip: str) -> None:
        """A host was connected to, and this became of TLS."""
        if self._into is None or not self._is_counted(floor):
            return
        result = _result(floor, found)
        if result is None:
            self._into.append(self._session(floor))
            return
        reason = found.error if result in _WITH_REASON else ""
        failure = SessionFailure(result, sending_ip, host.name, host.address, reason)
        self._into.append(self._session(floor, failure))

    def _is_counted(self, floor: HostFloor) -> bool:
        return self._into is not None and floor.told != ""

    def _session(self, floor: HostFloor, failure: SessionFailure | None = None) -> TlsSession:
        policy = floor.judged_by or JudgedBy(PolicyType.NONE, floor.told)
        return TlsSession(floor.told, policy, failure)


def judged_by(policy: HopPolicy, told: str, dane: DaneFloor, sts: StsFloor) -> JudgedBy:
    """What judges a host. A policy that could not be had judges nothing (RFC 8460 §4)."""
    if policy.type is PolicyType.TLSA:
        return JudgedBy(PolicyType.TLSA, dane.base or told, tuple(map(str, dane.records)))
    if policy.type is PolicyType.STS and sts.is_looked_at:
        return JudgedBy(PolicyType.STS, sts.domain, sts.lines, sts.mx)
    return JudgedBy(PolicyType.NONE, told)


def failed_fetch(
    domain: str, found: FetchFailed, before: KeptPolicy | None, *, now: datetime
) -> TlsSession | None:
    """What a failed fetch is counted as: a failure of the policy in force, if any. None: a domain
    that has given its policy up does not want to hear of it (RFC 8461 §6).
    """
    policy = before.policy if before is not None and before.is_in_force(now) else None
    if policy is not None and policy.mode is StsMode.NONE:
        return None
    lines, mx = (policy.lines, policy.mx) if policy is not None else ((), ())
    failure = SessionFailure(PolicyResult(found.error.value))
    return TlsSession(domain, JudgedBy(PolicyType.STS, domain, lines, mx), failure)


def _result(floor: HostFloor, found: TlsResult) -> PolicyResult | None:
    """What was wrong with a session, None for success."""
    if floor.floor.asks is not Proof.NOTHING:
        result = policy_result(floor.floor, found.situation, found.fault)
        return result or floor.policy.result
    if floor.judged_by is not None and floor.judged_by.type is not PolicyType.NONE:
        return floor.policy.result  # it was only looked at, and no good before we connected
    match found.situation:
        case Situation.SECURED:
            return None
        case Situation.UNVERIFIED:
            return found.fault or PolicyResult.NOT_TRUSTED
        case Situation.HANDSHAKE_FAILED:
            return PolicyResult.VALIDATION_FAILURE
        case _:
            return PolicyResult.STARTTLS_NOT_SUPPORTED
