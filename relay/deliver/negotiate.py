"""Opens a session with a host that is as secure as the message needs it, or says why there is none.

`relay.route.security` decides by the table of TLS rules, and this module acts: it connects, tries
TLS, and without TLS goes on in clear, or on a new connection, or gives the host up. After a
handshake has begun, a connection is never used in clear again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from relay.deliver.connection import Connection, TlsResult
from relay.deliver.diagnosis import NO_REQUIRETLS, Answer, Stage
from relay.deliver.dialogue import SessionBroken
from relay.deliver.login import Logins, log_in, why_not_now
from relay.deliver.options import Timeouts
from relay.deliver.pool import pool_key
from relay.deliver.tls import Handshake, HopFilesError, TlsContexts
from relay.mail.memory import Shown
from relay.mail.outcome import CertificateFacts, Downgrade, HopPolicy, HopSession, PolicyResult
from relay.mail.record import record
from relay.mail.reply import Reply
from relay.route.next_hop import Credentials, Host, TlsMode
from relay.route.security import (
    DOWNGRADE_REASONS,
    Action,
    Requirement,
    Situation,
    instead,
    next_step,
    policy_result,
)

Seen = Callable[[TlsResult, str], None]
"""A function that is called once with the result of TLS with a host, and the relay's address."""

Opened = Callable[[Connection], None]
"""A function that is called with each connection, whatever comes of it."""


def _unheard(found: TlsResult, local_ip: str) -> None:
    """No part of the relay needs the result."""


def _uncounted(connection: Connection) -> None:
    """No part of the relay counts the connection."""


@record(frozen=True, slots=True)
class Unmet:
    """The host did not meet the requirement.

    `status`: 4.7.4, 4.7.5 or `NO_REQUIRETLS`. `reply`: the host's reply, if one decided. `instead`:
    the TLS with which the message would have gone without the downgrade memory.
    """

    status: str
    error: str
    session: HopSession
    reply: Reply | None = None
    instead: Shown | None = None


@record(frozen=True, slots=True)
class Failed:
    """There is no session, for a reason that has nothing to do with TLS.

    `before`: the error of TLS on an earlier connection. `session`: the session, if it had begun.
    """

    answer: Answer
    session: HopSession | None = None
    before: str = ""


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What every session with a host needs. `logins`: None where nobody logs in."""

    hostname: str
    timeouts: Timeouts
    contexts: TlsContexts
    logins: Logins | None = None


@dataclass(frozen=True, slots=True)
class _Leg:
    """One connection on the way to a session. `needed` None: in clear. `downgrade`: why.

    `may_resume`: whether an earlier TLS session may be resumed. `against`: the failure under the
    floor on an earlier connection. `shown`: the certificate of that connection. `credentials`: the
    login with a token fetched meanwhile, None for that of the host.
    """

    needed: Requirement | None
    downgrade: Downgrade | None = None
    may_resume: bool = True
    against: PolicyResult | None = None
    shown: CertificateFacts | None = None
    credentials: Credentials | None = None


async def reach(
    host: Host,
    needed: Requirement,
    using: SessionOptions,
    *,
    seen: Seen = _unheard,
    opened: Opened = _uncounted,
) -> Connection | Unmet | Failed:
    """A session with `host` that a message with this requirement may use.

    `seen` is called for the first handshake that judges the host, if the session comes to EHLO.
    `policy.result` of the returned value is the failure under the floor, enforced or not.
    """
    if (answer := why_not_now(host, using.logins)) is not None:
        return Failed(answer)
    leg = _Leg(needed)
    while True:
        if leg.credentials is not None:
            host = replace(host, credentials=leg.credentials)
        heard = _unheard if leg.downgrade else seen
        reached = await _walk(host, needed, leg, using, heard, opened)
        if not isinstance(reached, _Leg):
            return reached
        leg = reached


async def _walk(
    host: Host, needed: Requirement, leg: _Leg, using: SessionOptions, seen: Seen, opened: Opened
) -> Connection | Unmet | Failed | _Leg:
    """One connection: the session, the end of it, or the next connection to make to this host."""
    before = leg.downgrade.error if leg.downgrade else ""
    try:
        handshake = using.contexts.handshake(host, leg.needed) if leg.needed is not None else None
        connection = await Connection.open(host, hostname=using.hostname, timeouts=using.timeouts)
    except HopFilesError as error:
        return Failed(Answer(Stage.CONNECT, None, str(error), ours=True), None, before)
    except SessionBroken as broken:
        return Failed(broken.answer, None, before)
    opened(connection)
    connection.must_encrypt = needed.must_encrypt
    try:
        if handshake is None:
            assert leg.downgrade is not None
            _note(connection, leg.against)
            connection.session = replace(connection.session, certificate=leg.shown)
            await connection.greet()
            connection.downgraded(leg.downgrade)
            return connection
        key = pool_key(host, handshake.needed), handshake.stamp
        kept_session = (
            using.contexts.sessions.take(key, now=time.monotonic()) if leg.may_resume else None
        )
        connection.resumption.kept_session = kept_session
        result = await _try_tls(connection, handshake, seen)
        if result.situation is Situation.HANDSHAKE_FAILED and kept_session is not None:
            # The resumption may be the cause: repeat with a full handshake to judge the host.
            connection.abort()
            return replace(leg, may_resume=False)
        seen(result, connection.local_ip)
        if result.situation is Situation.SECURED:
            using.contexts.sessions.keep(key, connection.kept_session, now=time.monotonic())
        against = leg.against or policy_result(needed.floor, result.situation, result.fault)
        _note(connection, against)
        shown = connection.session.certificate or leg.shown
        leg = replace(leg, against=against, shown=shown)
        return await _next(connection, result, needed, leg, using.logins)
    except SessionBroken as broken:
        return Failed(broken.answer, connection.session, before)
    except BaseException:
        connection.abort()
        raise


def _note(connection: Connection, against: PolicyResult | None) -> None:
    if against is not None:
        connection.session = replace(connection.session, policy=HopPolicy(result=against))


async def _try_tls(connection: Connection, handshake: Handshake, seen: Seen) -> TlsResult:
    try:
        if connection.host.tls is TlsMode.IMPLICIT:
            return await connection.begin_in_tls(handshake)
        await connection.greet()
        return await connection.start_tls(handshake)
    except SessionBroken:
        if connection.session.tls:  # the host broke off behind a good handshake
            seen(connection.secured, connection.local_ip)
        raise


async def _next(
    connection: Connection, result: TlsResult, needed: Requirement, leg: _Leg, logins: Logins | None
) -> Connection | Unmet | _Leg:
    """Do what the table of TLS rules says for this result."""
    assert leg.needed is not None
    step = next_step(leg.needed, result.situation)
    if step.action is Action.SEND_IN_TLS and needed.requiretls and not connection.offers.requiretls:
        connection.quit()
        return Unmet(NO_REQUIRETLS, "REQUIRETLS not offered", connection.session)
    if step.action is Action.SEND_IN_TLS:
        credentials = await log_in(connection, logins)
        return connection if credentials is None else replace(leg, credentials=credentials)
    error = f"{leg.downgrade.error}; then {result.error}" if leg.downgrade else result.error
    if step.action is Action.NEXT_HOST:
        connection.quit()
        spared = instead(leg.needed, result.situation)
        return Unmet(step.unmet, error, connection.session, result.reply, spared)
    downgrade = Downgrade(needed.wanted, DOWNGRADE_REASONS[result.situation], error)
    if step.action is Action.RECONNECT_UNVERIFIED:
        connection.quit()
        return _Leg(leg.needed.unlooked, downgrade, against=leg.against, shown=leg.shown)
    took_its_leave = result.reply is not None and result.reply.code == 421
    if step.action is Action.SEND_IN_CLEAR and connection.is_usable and not took_its_leave:
        connection.downgraded(downgrade)
        return connection
    # A host that closed after its refusal is tried again, as after a failed handshake.
    connection.quit()
    return _Leg(None, downgrade, against=leg.against, shown=leg.shown)
