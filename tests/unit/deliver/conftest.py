"""Delivering to real sockets: mail hosts as scripted, one test CA for all, both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop

from relay.deliver.attempt import Attempt
from relay.deliver.floors import Floors
from relay.deliver.options import DeliveryOptions, Timeouts, TlsOptions
from relay.deliver.pool import Pool, PoolLimits
from relay.deliver.tls import TlsContexts, TlsSessions
from relay.mail.outcome import Outcome
from relay.mail.tls_session import TlsSession
from relay.queue.entry import Entry
from relay.route.credentials import RouteCredentials
from relay.route.next_hop import Host, Route
from relay.sandbox.certificates import Authority
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.floors import Published, floors_of
from tests.fakes.mail import to

BOTH_LOOPS = {
    "test_attempt_tls",
    "test_attempt_dialogue",
    "test_attempt_login",
    "test_attempt_proofs",
    "test_attempt_routes",
    "test_pool",
    "test_probe",
    "test_resumption",
}
"""TLS, flow control and the ends of connections are each loop's own work."""


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Function
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    plain = {"asyncio": asyncio.new_event_loop}
    if item.module.__name__.rpartition(".")[2] in BOTH_LOOPS:
        return plain | {"uvloop": uvloop.new_event_loop}
    return plain


def milliseconds(count: int) -> timedelta:
    return timedelta(milliseconds=count)


def all_of(wait: timedelta) -> Timeouts:
    """The same time for each step of a session."""
    return Timeouts(
        connect=wait,
        greeting=wait,
        command=wait,
        data_block=wait,
        final_reply=wait,
        tls_handshake=wait,
    )


_SHORT = milliseconds(500)
UNHURRIED = all_of(timedelta(seconds=20))
"""Where every host answers: a busy machine is no reason for a test to fail."""
QUICK = replace(all_of(_SHORT), connect=timedelta(seconds=20))
"""Where a host may be silent. It takes the connection all the same: the kernel does."""

_PROMPT = {
    StartTls.OK,
    StartTls.ABSENT,
    StartTls.REFUSED_454,
    StartTls.REFUSED_502,
    StartTls.REPLY_354,
    StartTls.CLOSE,
}


def _timeouts(scripts: Iterable[Script]) -> Timeouts:
    """Short for the steps at which one of the hosts may be silent or slow, and for no others."""
    short = set[str]()
    for script in scripts:
        if script.starttls not in _PROMPT:
            short |= {"command", "tls_handshake"}
        if script.read_stops_after is not None:
            short |= {"data_block", "final_reply"}
        for verb, answers in [*script.replies.items(), *script.replies_in_clear.items()]:
            for answer in [answers] if isinstance(answers, str | ScriptedReply) else answers:
                if isinstance(answer, ScriptedReply):
                    short |= _slow_steps(verb, answer)
    return replace(UNHURRIED, **dict.fromkeys(short, _SHORT))


def _slow_steps(verb: str, answer: ScriptedReply) -> set[str]:
    step = {"GREETING": "greeting", "CONTENT": "final_reply"}.get(verb, "command")
    if answer.then is Then.SILENCE:  # from there on
        return {step, "command", "final_reply"} | (
            {"tls_handshake"} if verb == "STARTTLS" else set()
        )
    return {step} if answer.delay >= _SHORT.total_seconds() or answer.drip else set()


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def ca_file(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("ca") / "ca.pem"
    path.write_bytes(authority.ca_pem)
    return str(path)


@pytest.fixture(scope="session")
def contexts(ca_file: str) -> TlsContexts:
    """Shared, since the roots of the system take their time."""
    return TlsContexts(ca_file)


class Rig:
    """Mail hosts, and attempts at them. Hosts are at 127.0.1.1, 127.0.1.2 and so on, with a port
    each.
    """

    def __init__(self, authority: Authority, contexts: TlsContexts, stack: AsyncExitStack) -> None:
        self.authority = authority
        self.contexts = contexts
        # A host of an earlier test may have had the same port, and its session fails here.
        contexts.sessions = TlsSessions()
        self._stack = stack
        self.servers: list[MxServer] = []
        self.delivery: dict[str, Any] = {}
        self.tls: dict[str, Any] = {}
        self.limits = PoolLimits()
        self.hosts: list[Host] = []
        self.trouble: tuple[str, ...] = ()
        self.floors: Floors | None = None
        self.logins: RouteCredentials | None = None
        self.counts_sessions = False
        self.may_begin: Callable[[Entry], bool] = lambda entry: True
        self.sessions: list[TlsSession] = []

    async def mx(self, *scripts: Script, name: str = "", **host: Any) -> MxServer:
        """One more mail host, the next to be tried after those before."""
        number = len(self.servers) + 1
        server = MxServer(
            *scripts,
            name=name or f"mx{number}.dest.example",
            address=f"127.0.1.{number}",
            authority=self.authority,
        )
        await self._stack.enter_async_context(server)
        self.servers.append(server)
        self.hosts.append(Host(server.name, server.address, server.port, **host))
        return server

    @cached_property
    def attempt(self) -> Attempt:
        """Made once, at its first use, with what the test had set by then."""
        every = [script for server in self.servers for script in server.scripts]
        attempt = Attempt(
            lambda domain, *_: self.route(domain),
            hostname="relay.example",
            delivery=DeliveryOptions(**({"timeouts": _timeouts(every)} | self.delivery)),
            tls=TlsOptions(**self.tls),
            pool=Pool(self.limits),
            contexts=self.contexts,
            logins=self.logins,
            floors=self.floors or floors_of(Published()),
            counts_sessions=self.counts_sessions,
            may_begin=self.may_begin,
        )
        self._stack.push_async_callback(attempt.close)
        return attempt

    @property
    def route(self) -> Callable[[str], Awaitable[Route]]:
        return to(*self.hosts, trouble=self.trouble)

    async def deliver(self, entry: Entry) -> Mapping[int, Outcome]:
        """One attempt."""

        async def content() -> AsyncIterator[bytes]:
            assert entry.content is not None
            yield entry.content

        return await self.attempt.run(entry, content, self.sessions)

    async def send(self, entry: Entry) -> Outcome:
        """One attempt for the first recipient of an entry."""
        return (await self.deliver(entry))[0]


@pytest_asyncio.fixture
async def rig(authority: Authority, contexts: TlsContexts) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(authority, contexts, stack)
