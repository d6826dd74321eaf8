"""A session with a mail host, as a report on TLS counts it (RFC 8460 §4).

A session is a connection that came as far as EHLO, a host that a policy kept from being connected
to, or a policy that could not be fetched. It has a policy it was judged by, and a failure where it
failed. What is not known is "" or empty here, and left out of a report.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.mail.outcome import PolicyResult, PolicyType

__all__ = ["JudgedBy", "SessionFailure", "TlsSession"]


@dataclass(frozen=True, slots=True)
class JudgedBy:
    """A policy as it was applied (RFC 8460 §4.4, §4.5).

    `domain`: where it was published; of TLSA records the TLSA base domain. `strings`: the lines of
    an MTA-STS policy, or each TLSA record. `mx`: the patterns of an MTA-STS policy.
    """

    type: PolicyType
    domain: str
    strings: tuple[str, ...] = ()
    mx: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionFailure:
    """Why a session failed (RFC 8460 §4.3). `sending_ip`: ours. `mx_ip`: the address connected to.
    `reason`: in words.
    """

    result: PolicyResult
    sending_ip: str = ""
    mx_host: str = ""
    mx_ip: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TlsSession:
    """One session. `domain`: which is told of it: the recipient domain, or the host of a route."""

    domain: str
    judged_by: JudgedBy
    failure: SessionFailure | None = None
