"""A resolver that stops validating while the relay runs, and begins again.

Without validation there are no TLSA records to go by: mail is delivered as its settings say, and
the relay says so once. A resolver that does not answer at all is another matter: mail waits.
"""

from __future__ import annotations

import asyncio
import json
import smtplib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from relay.sandbox.script import Script
from tests.fakes.waiting import patient
from tests.rigs.dane import Authorities, DaneHost, Shown
from tests.rigs.dnssec import ValidatingDns, Zone, validating_dns
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sandbox import Event

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "knotd", "keymgr", "unbound"),
    pytest.mark.timeout(120),
]

DOMAIN = "a.signed.example"
NOT_LOOKED_UP = "TLSA records (DANE) are not looked up"


@dataclass
class World:
    dns: ValidatingDns
    mx: DaneHost
    relay: Relay
    sent: int = 0

    async def attempt(self) -> Event:
        """Hand in a message, and wait for what comes of it."""
        self.sent += 1
        recipient = f"bob{self.sent}@{DOMAIN}"
        await asyncio.sleep(1.1)  # the relay of this test keeps answers for a second
        await asyncio.to_thread(self._hand_in, recipient)
        return await asyncio.to_thread(self._event, recipient)

    def _hand_in(self, recipient: str) -> None:
        with smtplib.SMTP("127.0.0.1", self.relay.port, timeout=patient(30)) as session:
            session.sendmail("a@from.test", [recipient], "Subject: x\r\n\r\nx\r\n")

    def _event(self, recipient: str) -> Event:
        def events() -> list[Event]:
            found = self.relay.events(recipient=recipient)
            return [event for event in found if event["event"] != "accepted"]

        return wait_until(events, what="an attempt")[0]

    def explained(self) -> dict[str, Any]:
        asked = ("--json", "--from", "a@from.test", "--to", f"bob@{DOMAIN}")
        (host,) = json.loads(self.relay.run("explain", *asked).stdout)["hosts"]
        found: dict[str, Any] = host
        return found


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A host whose certificate its TLSA record does not match."""
    port, name = free_port("0.0.0.0"), f"mx.{DOMAIN}"
    identity = Authorities().identity(Shown.PRIVATE, name, DOMAIN)
    mx = DaneHost(Script(), identity, name=name, address="127.23.0.1", port=port)
    records = (
        f"a MX 10 mx.a\nmx.a A {mx.address}\n_{port}._tcp.mx.a {identity.rdata('3 1 1 other')}"
    )
    async with AsyncExitStack() as servers:
        await servers.enter_async_context(mx)
        stack = servers.enter_context(ExitStack())
        zones = validating_dns(Zone("signed.example", records))
        dns = await asyncio.to_thread(stack.enter_context, zones)
        process = relay_process(
            tmp_path,
            dns=dns.address,
            delivery_port=port,
            program=("tests.rigs.doubting_relay",),
            resolver={"trust_ad": "auto", "timeout": "3s"},
        )
        relay = await asyncio.to_thread(stack.enter_context, process)
        yield World(dns, mx, relay)


async def test_relay_notices_that_its_resolver_no_longer_validates_and_that_it_does_again(
    world: World,
) -> None:
    held = await world.attempt()
    assert (held["event"], held["severity"]) == ("failed", "temporary")
    assert held["delivery-status"]["policy-result"] == "validation-failure"
    assert world.explained()["must-prove"] == "dane"
    assert NOT_LOOKED_UP not in world.relay.stderr

    await asyncio.to_thread(world.dns.start, validates=False)
    for _ in range(2):
        free = await world.attempt()
        assert free["event"] == "delivered"
        assert free["delivery-status"]["policy-type"] == "no-policy-found"
        assert free["delivery-status"]["mx-secure"] is False
    assert world.relay.stderr.count(NOT_LOOKED_UP) == 1
    assert world.explained()["dane"]["state"] == "off"

    await asyncio.to_thread(world.dns.start)
    held = await world.attempt()
    assert held["event"] == "failed"
    assert held["delivery-status"]["policy-result"] == "validation-failure"
    assert len(world.mx.messages) == 2


async def test_mail_waits_while_the_resolver_does_not_answer(world: World) -> None:
    await world.attempt()
    await asyncio.to_thread(world.dns.stop)
    event = await world.attempt()
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert world.mx.messages == []
