"""A session with a mail host, as a report on TLS counts it (RFC 8460 §4).

A session is one of three things: a connection that reached EHLO; a host to which the relay did not
connect because of a policy; a policy that could not be fetched. It names the policy it was judged
by, and the failure, if there was one. A value that is not known is "" or empty here, and is left
out of a report.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.mail.outcome import PolicyResult, PolicyType


@dataclass(frozen=True, slots=True)
class JudgedBy:
    """A policy as it was applied (RFC 8460 §4.4, §4.5).

    `domain`: where the policy was published (for TLSA records, the TLSA base domain). `strings`:
    the lines of an MTA-STS policy, or each TLSA record. `mx`: the patterns of an MTA-STS policy.
    """

    type: PolicyType
    domain: str
    strings: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionFailure:
    """Why a session failed (RFC 8460 §4.3). `sending_ip`: the address of this relay. `mx_ip`: the
    address of the host. `reason`: a sentence.
    """

    result: PolicyResult
    sending_ip: str = ""
    mx_host: str = ""
    mx_ip: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TlsSession:
    """One session. `domain`: the domain that gets the report: the recipient domain, or the host of
    a route.
    """

    domain: str
    judged_by: JudgedBy
    failure: SessionFailure | None = None
