"""The outcome at a host that no message went to, since no session with it may be used. Pure.

not_used     the recipient's domain, or the operator, does not allow the host
not_known    REQUIRETLS asks for a host whose name is known for sure
unreached    a connection failed, or did not give the TLS that the message needs
"""

from __future__ import annotations

from relay.deliver.diagnosis import NO_SECURE_WAY, judge, unmet
from relay.deliver.hop_turns import cause_of
from relay.deliver.host_health import Cause
from relay.deliver.negotiate import Failed, Unmet
from relay.mail.outcome import Deferred, HopPolicy, HopSession
from relay.mail.record import replace
from relay.route.floor import HostFloor
from relay.route.next_hop import Host

_SURE = "a signed MX record, an enforced MTA-STS policy, a route, or a domain without MX records"
"""What makes the name of a host known for sure (`DomainFloor.has_secure_name`)."""


def not_used(floor: HostFloor, host: Host) -> Deferred:
    """The outcome at a host that the recipient's domain or the operator does not allow."""
    text = f"not connected to: it {floor.not_used}"
    outcome = unmet("4.7.5", text, host, None, policy=floor.policy)
    return replace(outcome, message=outcome.description)


def not_known(floor: HostFloor, host: Host) -> Deferred:
    """The outcome at a host whose name is not known for sure, as REQUIRETLS asks."""
    text = f"not connected to: REQUIRETLS asks for a host whose name is known for sure ({_SURE})"
    outcome = unmet(NO_SECURE_WAY, text, host, None, policy=floor.policy)
    return replace(outcome, message=outcome.description)


def unreached(failure: Unmet | Failed, host: Host, policy: HopPolicy, seconds: float) -> Deferred:
    """The outcome where there is no session that a message could go over, after so many seconds."""
    session = failure.session
    if session is not None:
        policy = with_result(policy, session)
        session = replace(session, seconds=seconds, policy=policy)
    if isinstance(failure, Unmet):
        return unmet(failure.status, failure.error, host, session, failure.reply)
    outcome = judge(failure.answer, host, session)
    assert isinstance(outcome, Deferred)
    outcome = replace(outcome, policy=policy)
    if failure.before:
        description = f"{outcome.description} (before that, {failure.before})"
        outcome = replace(outcome, description=description)
    if host.hop is not None and cause_of(failure, host) is Cause.UNREACHABLE:
        outcome = replace(outcome, status="4.4.1")
    return outcome


def with_result(policy: HopPolicy, session: HopSession) -> HopPolicy:
    """What the domain asked of a host, with what came of it in a session."""
    result = session.policy.result
    return policy if result is None else replace(policy, result=result)
