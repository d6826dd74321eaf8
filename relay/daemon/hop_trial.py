"""Tries a next hop of the configuration without a message: connect, TLS, login, QUIT.

Each host is reached as mail would reach it, by `relay.deliver.negotiate`; this module only says
which steps came about.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from relay.deliver.connection import Connection
from relay.deliver.diagnosis import Stage, judge
from relay.deliver.negotiate import Failed, SessionOptions, Unmet, reach
from relay.mail.outcome import HopSession
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.next_hop import Host, NextHop, NoRoute
from relay.route.router import Router
from relay.route.security import SecurityOptions, at_host, requirement

__all__ = ["Step", "try_next_hop"]

_BEFORE_TLS = (Stage.CONNECT, Stage.GREETING, Stage.EHLO)


@dataclass(frozen=True, slots=True)
class Step:
    """One step at a host. `host`: `name [address]:port`, "" before there is one. `name`: hosts,
    connect, TLS, login or QUIT.
    """

    host: str
    name: str
    is_good: bool
    text: str


async def try_next_hop(
    hop: NextHop, *, router: Router, using: SessionOptions, options: SecurityOptions
) -> AsyncIterator[Step]:
    """The steps at each address of a next hop. A step that failed is the last one at its host."""
    found = await router.hosts_of(hop)
    if isinstance(found, NoRoute):
        yield Step("", "hosts", is_good=False, text=found.outcome.description)
        return
    for host in found.hosts:
        async for step in _try_host(host, using, options):
            yield step


async def _try_host(
    host: Host, using: SessionOptions, options: SecurityOptions
) -> AsyncIterator[Step]:
    where = f"{host.name} [{host.address}]:{host.port}"
    default = Setting(value=False, source=Source.DEFAULT)
    needed = at_host(requirement(TlsSettings(default, default), options), host, options)
    began = time.monotonic()
    reached = await reach(host, needed, using)
    seconds = f"{time.monotonic() - began:.2f} s"
    if isinstance(reached, Failed) and reached.answer.stage in _BEFORE_TLS:
        yield Step(where, "connect", is_good=False, text=judge(reached.answer, host).description)
        return
    if isinstance(reached, Failed) and reached.session is None:
        yield Step(where, "login", is_good=False, text=judge(reached.answer, host).description)
        return
    yield Step(where, "connect", is_good=True, text="done")
    if isinstance(reached, Unmet):
        yield Step(where, "TLS", is_good=False, text=reached.error)
        return
    session = reached.hop if isinstance(reached, Connection) else reached.session
    assert session is not None
    yield Step(where, "TLS", is_good=True, text=_tls_text(session))
    if isinstance(reached, Failed):
        text = judge(reached.answer, host, session).description
        yield Step(where, "login", is_good=False, text=text)
        return
    yield Step(where, "login", is_good=True, text=_login_text(session))
    reached.quit()
    await reached.wait_closed()
    yield Step(where, "QUIT", is_good=True, text=f"done, login and all after {seconds}")


def _tls_text(session: HopSession) -> str:
    if not session.tls:
        why = f" ({session.downgrade.error})" if session.downgrade is not None else ""
        return f"none{why}: mail that does not require TLS goes in clear"
    pinned = f", pin {session.pin}" if session.pin is not None else ""
    verified = f"certificate verified ({session.verified_by}{pinned})"
    if session.verified_by is None:
        verified = "certificate not verified"
    return f"{session.tls_version} {session.tls_cipher}, {verified}"


def _login_text(session: HopSession) -> str:
    login = session.login
    if login is None:
        return "none is configured"
    return f"{login.mechanism}{f' as {login.user}' if login.user else ''}, accepted"
