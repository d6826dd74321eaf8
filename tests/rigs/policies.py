"""A sandbox with policy hosts, and a relay that looks for them at their port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from relay.sandbox.certificates import Kind
from relay.sandbox.policy_host import PolicyHost, WebAnswer
from tests.rigs.ports import free_port
from tests.rigs.sandbox import Sandbox, open_sandbox


class World:
    """Publishes policies, and starts the relay."""

    def __init__(self, sandbox: Sandbox, servers: AsyncExitStack) -> None:
        self.sandbox = sandbox
        self.port = free_port("0.0.0.0")
        self._servers = servers
        self._served = 0

    async def publish(
        self, domain: str, answer: bytes | WebAnswer, *, id: str = "1", kind: Kind = Kind.GOOD
    ) -> PolicyHost:
        """A record, and a policy host with an address of its own."""
        self._served += 1
        address = f"127.13.{self._served // 250}.{self._served % 250 + 1}"
        host = PolicyHost(
            domain,
            answer,
            authority=self.sandbox.authority,
            address=address,
            port=self.port,
            kind=kind,
        )
        await self._servers.enter_async_context(host)
        self.sandbox.dns.a(host.name, address)
        self.record(domain, id)
        return host

    def record(self, domain: str, id: str, *, ttl: int = 300) -> None:
        self.sandbox.dns.txt(f"_mta-sts.{domain}", f"v=STSv1; id={id};", ttl=ttl)

    async def start(self, **sections: object) -> None:
        relay = await self.sandbox.prepare(**sections)
        relay.program = ("tests.rigs.policy_relay", str(self.port))
        await asyncio.to_thread(relay.start)

    async def run(self, *arguments: str) -> tuple[int, str, str]:
        """A command against the running relay."""
        assert self.sandbox.relay is not None
        done = await asyncio.to_thread(self.sandbox.relay.run, *arguments)
        return done.returncode, done.stdout, done.stderr


@asynccontextmanager
async def open_world(directory: Path) -> AsyncIterator[World]:
    async with open_sandbox(directory, addresses="127.12") as sandbox, AsyncExitStack() as servers:
        yield World(sandbox, servers)
