"""STARTTLS taken out on the way to a host that was always verified: the real relay, the octets at
both ends.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from relay.admin.client import ask
from relay.queue.sqlite.disk import DATABASE
from relay.sandbox.mx import MxServer
from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until
from tests.rigs.sandbox import Event, Sandbox
from tests.rigs.stripper import Stripper, stripper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

DOMAIN, NAME, BOB = "partner.example", "mx.partner.example", "bob@partner.example"
ALARM = "TLS downgrade: mail for partner.example: mx.partner.example has no TLS now"


class World:
    """A host with good TLS, somebody in front of it, and a relay that sends there."""

    def __init__(self, sandbox: Sandbox, mx: MxServer, man: Stripper) -> None:
        self.sandbox = sandbox
        self.mx = mx
        self.man = man

    async def start(self, action: str, *, workers: int = 1, **options: str) -> None:
        relay = await self.sandbox.prepare(downgrade_memory={"action": action, **options})
        relay.config["workers"] = workers
        await asyncio.to_thread(relay.start)
        if workers > 1:
            await asyncio.to_thread(wait_until, lambda: "ready: " in relay.stderr)

    async def send(self) -> Event:
        """One message; what its first attempt came to."""
        before = len(self.sandbox.events())
        await self.sandbox.submit("a@sender.example", BOB)
        async with asyncio.timeout(patient(60)):
            while True:
                for event in self.sandbox.events()[before:]:
                    if event["event"] != "accepted":
                        return event
                await asyncio.sleep(0.05)

    async def run(self, *arguments: str) -> str:
        assert self.sandbox.relay is not None
        done = await asyncio.to_thread(self.sandbox.relay.run, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def alarms_counted(self) -> dict[tuple[str, str], int]:
        """`relay_downgrade_alarms_total`, as Prometheus would have it."""
        [line] = ask(self.sandbox.directory / "relay.sock", {"verb": "metrics"})
        found = {}
        for sample in line["done"]["text"].splitlines():
            if sample.startswith("relay_downgrade_alarms_total{"):
                labels, _, value = sample.partition("} ")
                words = dict(part.split("=") for part in labels.partition("{")[2].split(","))
                found[json.loads(words["before"]), json.loads(words["now"])] = int(float(value))
        return found

    @property
    def warnings(self) -> int:
        assert self.sandbox.relay is not None
        return self.sandbox.relay.stderr.count(ALARM)


@asynccontextmanager
async def opened(sandbox: Sandbox) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        mx = await sandbox.host(NAME)
        address = next(sandbox._addresses)
        at, host = (address, sandbox.delivery_port), (mx.address, mx.port)
        man = await stack.enter_async_context(stripper(at, host))
        sandbox.dns.a(NAME, address)
        sandbox.dns.mx(DOMAIN, (10, NAME))
        yield World(sandbox, mx, man)


@pytest.fixture
async def world(sandbox: Sandbox) -> AsyncIterator[World]:
    async with opened(sandbox) as world:
        yield world


def messages_in(spool: Path) -> int:
    """How many messages wait in a worker's queue."""
    with closing(sqlite3.connect(f"file:{spool / DATABASE}?mode=ro", uri=True)) as db:
        count: int = db.execute("SELECT count(*) FROM message").fetchone()[0]
    return count


def memory_in(event: Event) -> dict[str, Any] | None:
    found: dict[str, Any] | None = event["delivery-status"]["memory"]
    return found


async def test_first_stripped_starttls_after_a_verified_history_rings_once_a_day(
    world: World,
) -> None:
    await world.start("log")
    assert memory_in(first := await world.send()) is None
    assert first["delivery-status"]["certificate-verified"] is True
    world.man.strip()
    for _ in range(3):
        event = await world.send()
        assert (event["event"], event["delivery-status"]["tls"]) == ("delivered", False)
        memory = memory_in(event)
        assert memory is not None
        since = memory.pop("since")
        assert memory == {"before": "verified", "now": "none", "host": NAME}
        assert since.endswith("+00:00")
    assert world.warnings == 1
    assert world.alarms_counted() == {
        ("verified", "none"): 1,
        ("verified", "encrypted"): 0,
        ("encrypted", "none"): 0,
    }
    assert "verified before" in await world.run("log", "--recipient", BOB)
    listed = await world.run("memory", "list", "--alarm")
    assert "alarm: mx.partner.example shows none, before it was verified" in listed


async def test_no_octet_of_a_message_under_defer_is_sent_in_clear(world: World) -> None:
    await world.start("defer", defer_for="24h")
    assert (await world.send())["event"] == "delivered"
    world.man.strip()
    before = len(world.mx.connections)
    event = await world.send()
    status = event["delivery-status"]
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert (status["enhanced-code"], status["tls"]) == ("4.7.4", False)
    assert memory_in(event) is not None
    assert "relay memory forget partner.example" in status["description"]
    # What the relay sent, and what came to the host.
    [said] = world.man.from_relay
    hostname = b"relay.test.example"
    assert bytes(said) == b"EHLO " + hostname + b"\r\nQUIT\r\n"
    [connection] = world.mx.connections[before:]
    assert connection.clear == bytes(said)
    assert connection.in_handshake == connection.in_tls == b""
    assert world.warnings == 1
    assert world.alarms_counted()["verified", "none"] == 1

    explained = await world.run("explain", "--from", "a@sender.example", "--to", BOB)
    assert "the host has shown verified TLS before, and mail is held to that" in explained
    assert f"{NAME} [" in explained
    found = json.loads(await world.run("explain", "--from", "a@b.example", "--to", BOB, "--json"))
    [host] = found["hosts"]
    assert (host["must-prove"], host["memory"]["before"]) == ("pkix", "verified")
    assert host["memory"]["held-until"] is not None
    probed = await world.run("probe", DOMAIN)
    assert "shown before: it has shown verified" in probed
    assert "not sent here; deferred 4.7.4" in probed
    assert world.man.said.count(b"MAIL") == 0

    world.man.strip(False)
    await world.run("queue", "retry", "--all")
    await world.mx.wait_for_messages(2, timeout=patient(30))
    assert all(message.in_tls for message in world.mx.messages)
    assert world.warnings == 1


async def test_mail_goes_with_the_alarm_after_the_time_of_defer(world: World) -> None:
    await world.start("defer", defer_for="4s")
    assert (await world.send())["event"] == "delivered"
    world.man.strip()
    assert (await world.send())["event"] == "failed"
    await asyncio.sleep(patient(5))
    await world.run("queue", "retry", "--all")
    await world.mx.wait_for_messages(2, timeout=patient(30))
    *_, event = await world.sandbox.attempts(BOB, 3)
    assert (event["event"], event["delivery-status"]["tls"]) == ("delivered", False)
    assert memory_in(event) is not None
    assert world.warnings == 1


async def test_workers_share_what_was_shown_a_restart_keeps_it_and_forget_lifts_it(
    world: World,
) -> None:
    await world.start("defer", workers=2)
    assert (await world.send())["event"] == "delivered"
    # Written within one second, known to the other worker after five.
    await asyncio.sleep(patient(7))
    world.man.strip()
    for _ in range(12):  # over connections of their own, so that both workers have some
        event = await world.send()
        assert (event["event"], event["delivery-status"]["enhanced-code"]) == ("failed", "4.7.4")
        assert memory_in(event) is not None
    assert world.warnings == 1
    assert world.alarms_counted()["verified", "none"] == 1
    relay = world.sandbox.relay
    assert relay is not None
    spools = (relay.directory / "spool", relay.directory / "spool/worker-1")
    assert all(map(messages_in, spools))  # both workers were asked, and both held back

    await asyncio.to_thread(relay.kill_all)
    await asyncio.to_thread(relay.start)
    assert (await world.send())["event"] == "failed"
    assert b"MAIL" not in world.man.said
    assert world.warnings == 1  # it was told today

    assert await world.run("memory", "forget", DOMAIN) == "forgotten: 1 domain\n"
    assert await world.run("memory", "list") == "Nothing is remembered, or nothing of it matches.\n"
    await asyncio.sleep(patient(7))  # until the other worker knows
    await world.run("queue", "retry", "--all")
    await world.mx.wait_for_messages(14, timeout=patient(60))
    assert sum(not message.in_tls for message in world.mx.messages) == 13


async def test_sighting_survives_a_sigterm_that_follows_at_once(world: World) -> None:
    """It is gathered for seconds, and written at the end."""
    await world.start("log")
    await world.send()
    relay = world.sandbox.relay
    assert relay is not None
    assert await asyncio.to_thread(relay.stop) == 0
    [found] = json.loads(await world.run("memory", "list", "--json"))
    assert found["hosts"][0]["level"] == "verified"
    assert Path(relay.directory / "spool/policies.db").exists()
