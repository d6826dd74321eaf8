"""Tries a next hop of the configuration without a message: connect, TLS, login, QUIT.

Each host is reached as mail would reach it, by `relay.deliver.negotiate`; this module only says
which steps came about.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass

from relay.deliver.diagnosis import Stage, judge
from relay.deliver.negotiate import Failed, SessionOptions, Unmet, reach
from relay.mail.outcome import Bounced, Code, Deferred, HopLogin, HopSession
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.mx import hop_host_names
from relay.route.next_hop import Host, NextHop, NoRoute, TlsMode
from relay.route.plan import not_found
from relay.route.router import Router
from relay.route.security import SecurityOptions, at_host, requirement

_IMPLICIT_PORT = 465
_NO_TLS = "WRONG_VERSION_NUMBER"
"""What OpenSSL says of octets that are no TLS."""
_BEFORE_TLS = (Stage.CONNECT, Stage.GREETING, Stage.EHLO)


@dataclass(frozen=True, slots=True)
class TrialStep:
    """One step at a host. `host`: `name [address]:port`, "" before there is one. `name`: hosts,
    token, connect, TLS, login or QUIT. A host that is not found has one step, `hosts`.
    """

    host: str
    name: str
    is_good: bool
    text: str


async def try_next_hop(
    hop: NextHop, *, router: Router, using: SessionOptions, options: SecurityOptions
) -> AsyncIterator[TrialStep]:
    """The steps at each address of a next hop. A step that failed is the last one at its host."""
    found = await router.hosts_of(hop)
    if isinstance(found, NoRoute):
        for step in _without_hosts(hop, found.outcome):
            yield step
        return
    for step in _not_found(hop, found.hosts, (*found.trouble, *found.rejected)):
        yield step
    for host in found.hosts:
        async for step in _try_host(host, using, options):
            yield step


def _without_hosts(hop: NextHop, outcome: Deferred | Bounced) -> Iterator[TrialStep]:
    """Why there is no host to try: the login is not there, or no host is found."""
    if outcome.code == Code.NONE:
        name = "token" if hop.auth is not None and hop.auth.oauth2 is not None else "login"
        yield TrialStep("", name, is_good=False, text=outcome.description)
    elif outcome.hosts:
        yield from _not_found(hop, (), outcome.hosts)
    else:
        yield TrialStep("", "hosts", is_good=False, text=outcome.description)


def _not_found(hop: NextHop, found: Sequence[Host], lines: Sequence[str]) -> Iterator[TrialStep]:
    for name, why in not_found(hop_host_names(hop), {host.name for host in found}, lines).items():
        yield TrialStep(name, "hosts", is_good=False, text=why)


async def _try_host(
    host: Host, using: SessionOptions, options: SecurityOptions
) -> AsyncIterator[TrialStep]:
    where = f"{host.name} [{host.address}]:{host.port}"
    default = Setting(value=False, source=Source.DEFAULT)
    needed = at_host(requirement(TlsSettings(default, default), options), host, options)
    began = time.monotonic()
    reached = await reach(host, needed, using)
    seconds = f"{time.monotonic() - began:.2f} s"
    if isinstance(reached, Failed) and reached.answer.stage in _BEFORE_TLS:
        text = judge(reached.answer, host).description
        if reached.answer.stage is Stage.GREETING and reached.answer.reply is None:
            text += _hint_of_greeting(host)
        yield TrialStep(where, "connect", is_good=False, text=text)
        return
    if isinstance(reached, Failed) and reached.session is None:
        yield TrialStep(where, "login", is_good=False, text=judge(reached.answer, host).description)
        return
    yield TrialStep(where, "connect", is_good=True, text="done")
    if isinstance(reached, Unmet):
        yield TrialStep(
            where, "TLS", is_good=False, text=reached.error + _hint_of_tls(host, reached.error)
        )
        return
    session = reached.session
    assert session is not None
    yield TrialStep(where, "TLS", is_good=True, text=_tls_text(session))
    if isinstance(reached, Failed):
        text = judge(reached.answer, host, session).description
        if session.login is not None:
            text = f"{_login_name(session.login)}: {text}"
        yield TrialStep(where, "login", is_good=False, text=text)
        return
    yield TrialStep(where, "login", is_good=True, text=_login_text(session, reached.offers.auth))
    reached.quit()
    await reached.wait_closed()
    yield TrialStep(where, "QUIT", is_good=True, text=f"done, login and all after {seconds}")


def _tls_text(session: HopSession) -> str:
    if not session.tls:
        why = f" ({session.downgrade.error})" if session.downgrade is not None else ""
        return f"none{why}: mail that does not require TLS goes in clear"
    pinned = f", pin {session.pin}" if session.pin is not None else ""
    verified = f"certificate verified ({session.verified_by}{pinned})"
    if session.verified_by is None:
        verified = "certificate not verified"
    return f"{session.tls_version} {session.tls_cipher}, {verified}"


def _login_text(session: HopSession, offered: Collection[str]) -> str:
    if session.login is not None:
        return f"{_login_name(session.login)}, accepted"
    if offered:
        return f"no auth is configured, but the host offers AUTH {' '.join(sorted(offered))}"
    return "none is configured"


def _login_name(login: HopLogin) -> str:
    return f"{login.mechanism}{f' as {login.user}' if login.user else ''}"


def _hint_of_greeting(host: Host) -> str:
    """What may be wrong where a host says nothing: it may wait for TLS."""
    is_likely = host.port == _IMPLICIT_PORT and host.tls is TlsMode.STARTTLS
    text = f"; port {host.port} speaks TLS from the first octet: write tls: implicit"
    return text if is_likely else ""


def _hint_of_tls(host: Host, error: str) -> str:
    """What is wrong where a host answers the handshake with a greeting in clear."""
    is_clear = host.tls is TlsMode.IMPLICIT and _NO_TLS in error.upper().replace(" ", "_")
    return f"; port {host.port} begins in clear: write tls: starttls" if is_clear else ""
