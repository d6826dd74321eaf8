"""A listener on loopback with a store in memory, clients for it, and a certificate."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trustme
from argon2 import PasswordHasher

from relay.policy.rules import PolicyRules
from relay.receive.access import Access, User
from relay.receive.intake import Reception
from relay.receive.limits import Limits
from relay.receive.listener import Listener, start_listener
from relay.receive.spec import ListenerSpec, TcpAddress
from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker
from tests.fakes.client import Client
from tests.fakes.store import FakeStore


@cache
def hashed(password: str) -> str:
    """An argon2 hash that costs nothing: the tests are about mail."""
    return PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(password)


USERS = {
    "app1": User("app1", hashed("secret"), ("example.com", "*.sub.example")),
    "any": User("any", hashed("secret")),
}


@dataclass
class Desk:
    """Starts listeners and clients, and ends them all."""

    certificate: str
    key: str
    trust: ssl.SSLContext
    store: Any = field(default_factory=FakeStore)
    rules: PolicyRules = field(default_factory=PolicyRules)
    access: Access = field(default_factory=lambda: Access(users=USERS))
    limits: Limits = field(default_factory=Limits)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    listeners: list[Listener] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    passwords: SecretChecker | None = None
    reception: Reception | None = None

    async def open(self, spec: ListenerSpec | None = None) -> Listener:
        spec = spec or ListenerSpec("127.0.0.1:0")
        if spec.tls != "none" and spec.certificate is None:
            spec = replace(spec, certificate=self.certificate, key=self.key)
        if self.reception is None:
            self.reception = Reception(
                hostname="relay.example.org",
                store=self.store,
                policy=lambda: self.rules,
                access=lambda: self.access,
                clock=lambda: self.now(),
                limits=self.limits,
            )
            self.passwords = SecretChecker(Failures(), clock=lambda: self.now())
        listener = await start_listener(spec, self.reception, passwords=self.passwords)
        self.listeners.append(listener)
        return listener

    async def client(self, spec: ListenerSpec | None = None, *, tls: bool = False) -> Client:
        """A client of the last listener; with a spec, of a new one."""
        if spec is not None or not self.listeners:
            await self.open(spec)
        address = self.listeners[-1].address
        if isinstance(address, TcpAddress):
            client = await Client.connect(
                address.host, address.port, tls=self.trust if tls else None
            )
        else:
            client = await Client.connect_unix(address.path)
        self.clients.append(client)
        return client

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for listener in self.listeners:
            await listener.close(timedelta(0))
        if self.passwords is not None:
            self.passwords.close()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def pem(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory: Path = tmp_path_factory.mktemp("certificate")
    issued = authority.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(directory / "tls.pem"))
    issued.private_key_pem.write_to_path(str(directory / "tls.key"))
    return str(directory / "tls.pem"), str(directory / "tls.key")


@pytest.fixture(scope="session")
def trust(authority: trustme.CA) -> ssl.SSLContext:
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(trust)
    return trust


@pytest.fixture
async def desk(pem: tuple[str, str], trust: ssl.SSLContext) -> AsyncIterator[Desk]:
    desk = Desk(*pem, trust)
    yield desk
    await desk.close()
