"""DNS, scripted mail hosts and the relay between them, on loopback.

The relay is the real one, in a process of its own (`tests.rigs.relay`). The hosts live in
the test's loop, each on an address of its own in 127.0.0.0/8 and all on one port, so that
names lead to them through the relay's own routing.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiosmtplib

from relay.sandbox.certificates import Authority
from relay.sandbox.dns import DnsServer
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port
from tests.rigs.relay import Relay, relay_process

Event = dict[str, Any]


@functools.cache
def shared_authority() -> Authority:
    """One CA for a whole run of tests: its leafs are made once."""
    return Authority()


class Sandbox:
    """A small internet and a relay in it."""

    def __init__(
        self, directory: Path, dns: DnsServer, hosts: AsyncExitStack, addresses: str
    ) -> None:
        self.directory = directory
        self.dns = dns
        self.authority = shared_authority()
        self.delivery_port = free_port("0.0.0.0")
        self.relay: Relay | None = None
        self._hosts = hosts
        self._addresses = (f"{addresses}.{n // 250}.{n % 250 + 1}" for n in itertools.count())
        self._tokens = itertools.count(1)

    async def host(self, name: str, *scripts: Script) -> MxServer:
        """A mail host with an address of its own, known to the DNS."""
        address = next(self._addresses)
        mx = MxServer(
            *scripts, name=name, address=address, port=self.delivery_port, authority=self.authority
        )
        await self._hosts.enter_async_context(mx)
        self.dns.a(name, address)
        return mx

    async def domain(self, domain: str, *scripts: Script) -> MxServer:
        """A domain with one mail host, `mx.` before its name."""
        mx = await self.host(f"mx.{domain}", *scripts)
        self.dns.mx(domain, (10, mx.name))
        return mx

    async def start(self, **sections: Any) -> Relay:
        """Start the relay; `sections` are merged into a configuration for loopback."""
        relay = await self.prepare(**sections)
        await asyncio.to_thread(relay.start)
        return relay

    async def prepare(self, **sections: Any) -> Relay:
        """A relay that is not started yet."""
        ca_file = self.directory / "ca.pem"
        ca_file.write_bytes(self.authority.ca_pem)
        process = relay_process(
            self.directory,
            dns=self.dns.nameserver,
            delivery_port=self.delivery_port,
            ca_file=ca_file,
            start=False,
            **sections,
        )
        self.relay = self._hosts.enter_context(process)
        return self.relay

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiosmtplib.SMTP]:
        """A client of the relay's, connected."""
        assert self.relay is not None
        client = aiosmtplib.SMTP(
            hostname="127.0.0.1", port=self.relay.port, start_tls=False, timeout=patient(30)
        )
        async with client:
            yield client

    async def submit(
        self,
        sender: str,
        *recipients: str,
        fields: Mapping[str, str] | None = None,
        client: aiosmtplib.SMTP | None = None,
        body: str = "",
    ) -> str:
        """Hand the relay a message, and return the word that is in its subject and its body."""
        token = f"token{next(self._tokens)}x"
        header = {"From": sender or "postmaster@relay.test", "To": recipients[0], "Subject": token}
        header |= fields or {}
        lines = [f"{name}: {value}" for name, value in header.items()]
        content = "\r\n".join([*lines, "", f"Body of {token}.", body, ""]).encode()
        if client is None:
            async with self.client() as own:
                await own.sendmail(sender, recipients, content)
        else:
            await client.sendmail(sender, recipients, content)
        return token

    def events(self, **wanted: str) -> list[Event]:
        """Lines of the delivery log."""
        assert self.relay is not None
        return self.relay.events(**wanted)

    async def attempts(self, recipient: str, count: int = 1, *, seconds: float = 60) -> list[Event]:
        """The log's lines about attempts for a recipient, as soon as there are `count` of them."""
        async with asyncio.timeout(patient(seconds)):
            while len(found := self._attempts(recipient)) < count:
                await asyncio.sleep(0.05)
        return found

    async def all_attempted(
        self, recipients: set[str], *, seconds: float
    ) -> dict[str, list[Event]]:
        """The attempts of many recipients, once each has one, or the time is over."""
        deadline = time.monotonic() + patient(seconds)
        while True:
            found: dict[str, list[Event]] = {recipient: [] for recipient in recipients}
            for event in self.events():
                if event["event"] != "accepted" and event["recipient"] in found:
                    found[event["recipient"]].append(event)
            if all(found.values()) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.25)

    def _attempts(self, recipient: str) -> list[Event]:
        return [event for event in self.events(recipient=recipient) if event["event"] != "accepted"]


@asynccontextmanager
async def open_sandbox(directory: Path, *, addresses: str = "127.7") -> AsyncIterator[Sandbox]:
    """A sandbox without a relay yet; closed whole at the end."""
    async with AsyncExitStack() as hosts, DnsServer() as dns:
        yield Sandbox(directory, dns, hosts, addresses)


def shown(event: Event) -> str:
    """An event as a failing test shows it."""
    return json.dumps(event, indent=1)
