"""Policy hosts and resolvers that fail, and mail that goes on all the same.

A failure of the policy host is a failure of the policy and never of the mail: with no policy in
force, mail is delivered as its settings say and the log has the reason; with one in force, that
one holds. One domain's trouble delays nobody else's mail.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.sandbox.certificates import Kind
from relay.sandbox.dns import Fault
from relay.sandbox.mx import MxServer
from relay.sandbox.policy_host import PolicyHost, WebAnswer, policy
from relay.sandbox.script import Script
from tests.fakes.waiting import patient
from tests.rigs.policies import World, open_world
from tests.rigs.sandbox import Event

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LIMIT = 65_536
FETCH_SECONDS = 4
DELIVERY = {"timeouts": {"policy_fetch": f"{FETCH_SECONDS}s"}}
PATIENCE = 60


@dataclass(frozen=True)
class Broken:
    """A policy host that gives no policy, and how the log names it (RFC 8460 §4.3.2.2)."""

    result: str
    answer: WebAnswer
    kind: Kind = Kind.GOOD


def _good(domain: str) -> bytes:
    return policy(f"mx.{domain}")


def _broken(domain: str) -> dict[str, Broken]:
    good = _good(domain)
    large = good + b"x: " + b"y" * (LIMIT + 1 - len(good) - 3)
    assert len(large) == LIMIT + 1
    elsewhere = (f"Location: https://mta-sts.{domain}/other.txt",)
    fetch, invalid, pki = "sts-policy-fetch-error", "sts-policy-invalid", "sts-webpki-invalid"
    return {
        "silent": Broken(fetch, WebAnswer(good, is_silent=True)),
        "slow-by-the-octet": Broken(fetch, WebAnswer(good, pause=0.2)),
        "breaks-off": Broken(fetch, WebAnswer(good, length=len(good) + 10)),
        "redirects": Broken(fetch, WebAnswer(good, status=301, fields=elsewhere)),
        "not-found": Broken(fetch, WebAnswer(good, status=404)),
        "in-trouble": Broken(fetch, WebAnswer(good, status=500)),
        "too-large": Broken(invalid, WebAnswer(large)),
        "web-page": Broken(invalid, WebAnswer(good, content_type="text/html")),
        "nonsense": Broken(invalid, WebAnswer(b"hello\r\n")),
        "expired": Broken(pki, WebAnswer(good), Kind.EXPIRED),
        "wrong-name": Broken(pki, WebAnswer(good), Kind.WRONG_NAME),
        "untrusted": Broken(pki, WebAnswer(good), Kind.UNKNOWN_CA),
    }


KINDS = _broken("example.test")


def _domain(kind: str) -> str:
    return f"{kind}.test"


async def _attempt(world: World, recipient: str) -> Event:
    (event,) = await world.sandbox.attempts(recipient, seconds=PATIENCE)
    return event


def _policy_of(event: Event) -> tuple[Any, Any, Any]:
    status = event["delivery-status"]
    return status["policy-type"], status["policy-mode"], status["policy-result"]


async def test_policy_host_that_fails_is_named_in_the_log_and_holds_no_mail(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts: dict[str, MxServer] = {}
        for kind in KINDS:
            domain = _domain(kind)
            hosts[kind] = await world.sandbox.domain(domain, Script(certificate=Kind.EXPIRED))
            broken = _broken(domain)[kind]
            await world.publish(domain, broken.answer, kind=broken.kind)
        hosts["dead"] = await world.sandbox.domain("dead.test", Script(certificate=Kind.EXPIRED))
        world.record("dead.test", "1")
        world.sandbox.dns.a("mta-sts.dead.test", "127.13.250.250")  # nobody listens
        hosts["nameless"] = await world.sandbox.domain(
            "nameless.test", Script(certificate=Kind.EXPIRED)
        )
        world.record("nameless.test", "1")
        await world.start(delivery=DELIVERY)
        for kind in hosts:
            await world.sandbox.submit("a@from.test", f"bob@{_domain(kind)}")
        for kind, mx in hosts.items():
            event = await _attempt(world, f"bob@{_domain(kind)}")
            result = KINDS[kind].result if kind in KINDS else "sts-policy-fetch-error"
            assert event["event"] == "delivered", kind
            assert _policy_of(event) == ("sts", None, result), kind
            assert len(mx.messages) == 1, kind


async def test_policy_in_force_holds_however_its_host_fails(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        hosts: dict[str, MxServer] = {}
        webs: dict[str, PolicyHost] = {}
        same_host = {kind for kind, broken in KINDS.items() if broken.kind is Kind.GOOD}
        for kind in same_host:
            domain = _domain(kind)
            hosts[kind] = await world.sandbox.domain(domain, Script(certificate=Kind.EXPIRED))
            webs[kind] = await world.publish(domain, _good(domain))
            world.record(domain, "1", ttl=0)
        await world.start(delivery=DELIVERY)
        for kind in same_host:
            assert (await world.run("mta-sts", "refresh", _domain(kind)))[0] == 0
            webs[kind].answer = _broken(_domain(kind))[kind].answer
            world.record(_domain(kind), "2", ttl=0)
        before = {kind: web.requests for kind, web in webs.items()}
        await asyncio.sleep(1.1)  # what the relay keeps of a record is kept for a second at least
        for kind in same_host:
            await world.sandbox.submit("a@from.test", f"bob@{_domain(kind)}")
        for kind, mx in hosts.items():
            event = await _attempt(world, f"bob@{_domain(kind)}")
            assert (event["event"], event["severity"]) == ("failed", "temporary"), kind
            assert event["delivery-status"]["enhanced-code"] == "4.7.5", kind
            assert _policy_of(event) == ("sts", "enforce", "certificate-expired"), kind
            assert mx.messages == [], kind
            assert webs[kind].requests > before[kind], f"{kind}: the new policy was not asked for"


async def test_record_that_cannot_be_had_lowers_no_policy_and_holds_no_mail(tmp_path: Path) -> None:
    faults = (Fault.SERVFAIL, Fault.REFUSED, Fault.DROP, Fault.GARBAGE, Fault.TRUNCATED_NO_TCP)
    async with open_world(tmp_path) as world:
        dns = world.sandbox.dns
        hosts: dict[str, MxServer] = {}
        for domain in (f"{which}-{fault}.test" for which in ("new", "kept") for fault in faults):
            hosts[domain] = await world.sandbox.domain(domain, Script(certificate=Kind.EXPIRED))
            await world.publish(domain, _good(domain))
            world.record(domain, "1", ttl=0)
        await world.start(delivery=DELIVERY, resolver={"timeout": "3s"})
        for fault in faults:
            assert (await world.run("mta-sts", "refresh", f"kept-{fault}.test"))[0] == 0
        for domain in hosts:
            dns.fail(f"_mta-sts.{domain}", "TXT", Fault(domain.partition("-")[2][:-5]))
        await asyncio.sleep(1.1)  # what the relay keeps of a record is kept for a second at least
        for domain in hosts:
            await world.sandbox.submit("a@from.test", f"bob@{domain}")
        for domain, mx in hosts.items():
            event = await _attempt(world, f"bob@{domain}")
            if domain.startswith("new-"):
                assert event["event"] == "delivered", domain
                assert _policy_of(event) == ("no-policy-found", None, None), domain
                assert len(mx.messages) == 1, domain
            else:
                assert (event["event"], event["severity"]) == ("failed", "temporary"), domain
                assert _policy_of(event) == ("sts", "enforce", "certificate-expired"), domain
                assert mx.messages == [], domain


async def test_policy_holds_although_its_record_is_gone_and_after_kill_9(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        mx = await world.sandbox.domain("a.test", Script(certificate=Kind.WRONG_NAME))
        web = await world.publish("a.test", _good("a.test"))
        world.record("a.test", "1", ttl=0)
        await world.start(delivery=DELIVERY)
        assert (await world.run("mta-sts", "refresh", "a.test"))[0] == 0
        world.sandbox.dns.remove("_mta-sts.a.test", "TXT")
        web.answer = WebAnswer(status=404)
        relay = world.sandbox.relay
        assert relay is not None
        relay.kill()
        await asyncio.to_thread(relay.start)
        await world.sandbox.submit("a@from.test", "bob@a.test")
        event = await _attempt(world, "bob@a.test")
        assert _policy_of(event) == ("sts", "enforce", "certificate-host-mismatch")
        assert mx.messages == []


async def _arrival(mx: MxServer) -> float:
    """When the first message was there."""
    await mx.wait_for_messages(timeout=patient(600))
    return time.monotonic()


@pytest.mark.timeout(900)
async def test_mail_that_waits_for_one_policy_waits_for_one_fetch_and_delays_nobody(
    tmp_path: Path,
) -> None:
    """The long form (RELAY_LONG=1): ten thousand messages."""
    many = 10_000 if os.environ.get("RELAY_LONG") == "1" else 500
    async with open_world(tmp_path) as world:
        mx = await world.sandbox.domain("wait.test", Script())
        web = await world.publish(
            "wait.test", WebAnswer(_good("wait.test"), delay=FETCH_SECONDS / 2)
        )
        other = await world.sandbox.domain("other.test", Script())
        await world.start(
            delivery=DELIVERY | {"concurrency": 20}, limits={"connections_per_client": 1000}
        )
        arrival = asyncio.create_task(_arrival(other))
        async with world.sandbox.client() as client:
            for number in range(many):
                await world.sandbox.submit("a@from.test", f"u{number}@wait.test", client=client)
                if number == 100:
                    handed_in = time.monotonic()
                    await world.sandbox.submit("a@from.test", "bob@other.test", client=client)
        await mx.wait_for_messages(many, timeout=patient(600))
        relay = world.sandbox.relay
        assert relay is not None
        assert await asyncio.to_thread(relay.stop) == 0  # its log is whole
        events = [
            event
            for event in world.sandbox.events()
            if event["event"] != "accepted" and event["recipient-domain"] == "wait.test"
        ]
        assert {_policy_of(event) for event in events} == {("sts", "enforce", None)}
        assert {event["event"] for event in events} == {"delivered"}
        assert len(events) == len(mx.messages) == many
        assert all(message.in_tls for message in mx.messages)
        assert web.requests == 1
        assert await arrival - handed_in < 10


async def test_dead_policy_hosts_delay_nobody_elses_mail(tmp_path: Path) -> None:
    """Sixty domains whose policy hosts take the connection and say nothing."""
    async with open_world(tmp_path) as world:
        slow = [f"slow{number}.test" for number in range(60)]
        for domain in slow:
            await world.sandbox.domain(domain, Script())
            await world.publish(domain, WebAnswer(is_silent=True))
        good = await world.sandbox.domain("good.test", Script())
        await world.start(
            delivery={"timeouts": {"policy_fetch": "1m"}, "concurrency": 20},
            limits={"connections_per_client": 1000},
        )
        async with world.sandbox.client() as client:
            for domain in slow:
                for number in range(3):
                    await world.sandbox.submit("a@from.test", f"u{number}@{domain}", client=client)
            began = time.monotonic()
            for number in range(20):
                await world.sandbox.submit("a@from.test", f"u{number}@good.test", client=client)
        await good.wait_for_messages(20, timeout=patient(30))
        assert time.monotonic() - began < 15
        assert world.sandbox.relay is not None
        assert not [
            event
            for event in world.sandbox.events(event="failed")
            if event["recipient-domain"].startswith("slow")
        ]


async def test_probe_says_that_the_policy_is_slow_to_come_and_waits_no_longer_than_asked(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        await world.sandbox.domain("a.test", Script())
        await world.publish("a.test", WebAnswer(is_silent=True))
        relay = await world.sandbox.prepare()
        relay.config_file.write_text(yaml.safe_dump(relay.config))
        probe = ("-m", "tests.rigs.policy_relay", str(world.port), "probe", "a.test")
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, *probe, "-c", str(relay.config_file), "--timeout", "1s"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=patient(60),
        )
        assert done.returncode == 1
        told = "the MTA-STS policy of a.test is being fetched; ask again"
        assert done.stderr.startswith(told)
