"""Floors beyond one host and one message: several hosts, connections, bounces, routes, reloads.

`test_floors_table` judges each cell alone; here the cells meet each other and the operator.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.admin.client import ask
from relay.sandbox.certificates import Kind
from relay.sandbox.dns import Fault
from relay.sandbox.mx import MxServer
from relay.sandbox.policy_host import WebAnswer, policy
from relay.sandbox.script import Script, StartTls
from tests.fakes.waiting import patient
from tests.rigs.policies import World, open_world
from tests.rigs.sandbox import Event

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STRICT = {"X-Require-TLS": "yes", "X-Skip-Verification": "no"}
DELIVERY: dict[str, Any] = {"timeouts": {"connect": "3s", "tls_handshake": "5s", "command": "5s"}}
BOUNCE = DELIVERY | {"on_tls_unmet": "bounce"}
TRUSTED = {"trust_ad": "auto"}
OTHER_KEY = "3 1 1 " + "00" * 32


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as opened:
        opened.sandbox.dns.sign("signed.test")
        yield opened


async def attempt(world: World, recipient: str, count: int = 1) -> Event:
    """The last of so many attempts."""
    found = await world.sandbox.attempts(recipient, count, seconds=60)
    return found[-1]


def status_of(event: Event) -> dict[str, Any]:
    status: dict[str, Any] = event["delivery-status"]
    return status


def verdict(event: Event) -> tuple[str, str, str]:
    return event["event"], event.get("severity", ""), status_of(event)["enhanced-code"]


async def failing(world: World, domain: str, kind: Kind = Kind.EXPIRED) -> MxServer:
    """A domain with a policy that names its host, and a host that does not meet it."""
    mx = await world.sandbox.domain(domain, Script(certificate=kind))
    await world.publish(domain, policy(mx.name))
    return mx


async def two_hosts(world: World, domain: str, *scripts: Script) -> list[MxServer]:
    hosts = [
        await world.sandbox.host(f"mx{number}.{domain}", script)
        for number, script in enumerate(scripts, 1)
    ]
    world.sandbox.dns.mx(domain, *((10 * n, mx.name) for n, mx in enumerate(hosts, 1)))
    return hosts


# --- several hosts --------------------------------------------------------------------------------


async def test_second_host_is_used_where_the_policy_does_not_name_the_first(world: World) -> None:
    mx1, mx2 = await two_hosts(world, "a.test", Script(), Script())
    await world.publish("a.test", policy(mx2.name))
    await world.start(delivery=DELIVERY)
    await world.sandbox.submit("a@from.test", "bob@a.test")
    event = await attempt(world, "bob@a.test")
    assert (event["event"], status_of(event)["mx-host"]) == ("delivered", mx2.name)
    assert mx1.connections == []


async def test_second_host_is_used_where_the_records_of_the_first_cannot_be_had(
    world: World,
) -> None:
    mx1, mx2 = await two_hosts(world, "a.signed.test", Script(), Script())
    dns, port = world.sandbox.dns, world.sandbox.delivery_port
    dns.fail(f"_{port}._tcp.{mx1.name}", "TLSA", Fault.SERVFAIL)
    await world.start(delivery=DELIVERY, resolver=TRUSTED)
    await world.sandbox.submit("a@from.test", "bob@a.signed.test")
    event = await attempt(world, "bob@a.signed.test")
    assert (event["event"], status_of(event)["mx-host"]) == ("delivered", mx2.name)
    assert mx1.connections == []


async def test_records_that_cannot_be_had_hold_mail_and_records_that_are_not_there_do_not(
    world: World,
) -> None:
    dns, port = world.sandbox.dns, world.sandbox.delivery_port
    hosts = {fault: await world.sandbox.domain(f"{fault}.signed.test", Script()) for fault in Fault}
    del hosts[Fault.TRUNCATED]  # its answer comes by TCP, and is that there are none
    for fault, mx in hosts.items():
        dns.fail(f"_{port}._tcp.{mx.name}", "TLSA", fault)
    await world.start(delivery=DELIVERY, resolver=TRUSTED | {"timeout": "3s"})
    for fault in hosts:
        await world.sandbox.submit("a@from.test", f"bob@{fault}.signed.test")
    for fault, mx in hosts.items():
        event = await attempt(world, f"bob@{fault}.signed.test")
        if fault in (Fault.NXDOMAIN, Fault.NO_DATA):
            assert event["event"] == "delivered", fault
            assert status_of(event)["policy-type"] == "no-policy-found", fault
        else:
            assert verdict(event) == ("failed", "temporary", "4.7.5"), fault
            assert status_of(event)["policy-result"] == "dnssec-invalid", fault
            assert mx.connections == [], fault


async def test_pin_is_used_where_a_forged_record_names_another_host_first(world: World) -> None:
    forged, real = await two_hosts(world, "a.test", Script(), Script())
    rule = {"require_tls": True, "mx": [real.name]}
    await world.start(delivery=DELIVERY, policy={"destinations": {"a.test": rule}})
    await world.sandbox.submit("a@from.test", "bob@a.test")
    event = await attempt(world, "bob@a.test")
    assert (event["event"], status_of(event)["mx-host"]) == ("delivered", real.name)
    assert forged.connections == []


# --- whose policy it is ---------------------------------------------------------------------------


async def test_policy_is_that_of_the_domain_however_it_is_written_and_of_no_domain_above(
    world: World,
) -> None:
    """Names are compared without case. A record may be an alias, a policy is never inherited."""
    world.sandbox.dns.mx("a.test", (10, "MX.A.Test"))
    await world.sandbox.host("mx.a.test", Script())
    await world.publish("a.test", policy("mX.a.tEsT"))
    await world.sandbox.domain("sub.a.test", Script(certificate=Kind.EXPIRED))
    await failing(world, "b.test")
    world.sandbox.dns.remove("_mta-sts.b.test", "TXT")
    world.sandbox.dns.cname("_mta-sts.b.test", "_mta-sts.provider.test")
    world.record("provider.test", "7")
    host = await world.sandbox.host("c.test", Script(certificate=Kind.WRONG_NAME))
    await world.publish("c.test", policy(host.name))
    await world.start(delivery=DELIVERY)
    for recipient in ("bob@A.Test", "bob@sub.a.test", "bob@b.test", "bob@c.test"):
        await world.sandbox.submit("a@from.test", recipient)
    (event,) = await world.sandbox.attempts("bob@A.Test")
    assert (event["event"], status_of(event)["policy-type"]) == ("delivered", "sts")
    assert status_of(event)["certificate-verified"] is True
    event = await attempt(world, "bob@sub.a.test")
    assert (event["event"], status_of(event)["policy-type"]) == ("delivered", "no-policy-found")
    assert status_of(await attempt(world, "bob@b.test"))["policy-result"] == "certificate-expired"
    event = await attempt(world, "bob@c.test")  # it has no MX record: its policy names itself
    assert status_of(event)["policy-result"] == "certificate-host-mismatch"


# --- connections ----------------------------------------------------------------------------------


async def test_messages_under_different_floors_share_no_connection(world: World) -> None:
    """Three domains have one mail host: one with a policy, one with another, one without."""
    mx = await world.sandbox.host("mx.shared.test", Script())
    for domain in ("one.test", "two.test", "three.test"):
        world.sandbox.dns.mx(domain, (10, mx.name))
    for domain in ("one.test", "two.test"):
        await world.publish(domain, policy(mx.name))
    await world.start(delivery=DELIVERY)
    domains = ["one.test", "three.test", "two.test", "three.test", "one.test", "two.test"]
    for number, domain in enumerate(domains):
        await world.sandbox.submit("a@from.test", f"u{number}@{domain}")
        await attempt(world, f"u{number}@{domain}")
    carried = [
        {
            path.partition("@")[2]
            for message in connection.messages
            for path in message.forward_paths
        }
        for connection in mx.connections
    ]
    assert sorted(domain for each in carried for domain in each) == sorted(set(domains))
    assert all(len(each) == 1 for each in carried)


# --- bounces --------------------------------------------------------------------------------------


async def test_on_tls_unmet_bounce_returns_only_what_requires_tls_by_its_own_settings(
    world: World,
) -> None:
    await failing(world, "a.test")
    home = await world.sandbox.domain("from.test", Script())
    await world.start(delivery=BOUNCE)
    await world.sandbox.submit("a@from.test", "strict@a.test", fields=STRICT)
    await world.sandbox.submit("a@from.test", "bob@a.test")
    assert verdict(await attempt(world, "strict@a.test")) == ("failed", "permanent", "5.7.5")
    assert verdict(await attempt(world, "bob@a.test")) == ("failed", "temporary", "4.7.5")
    (dsn,) = await home.wait_for_messages()
    assert b"Status: 5.7.5" in dsn.content
    assert b"mx.a.test" in dsn.content


async def test_on_tls_unmet_bounce_waits_where_the_records_of_a_host_cannot_be_had(
    world: World,
) -> None:
    bad, mx = await two_hosts(world, "a.signed.test", Script(certificate=Kind.EXPIRED), Script())
    dns, port = world.sandbox.dns, world.sandbox.delivery_port
    dns.fail(f"_{port}._tcp.{mx.name}", "TLSA", Fault.SERVFAIL)
    await world.start(delivery=BOUNCE, resolver=TRUSTED)
    await world.sandbox.submit("a@from.test", "bob@a.signed.test", fields=STRICT)
    event = await attempt(world, "bob@a.signed.test")
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert bad.messages == mx.messages == []


async def test_on_tls_unmet_bounce_returns_mail_that_no_pinned_host_can_take(world: World) -> None:
    mx = await world.sandbox.domain("a.test", Script())
    home = await world.sandbox.domain("from.test", Script())
    rule = {"require_tls": True, "mx": ["*.else.test"]}
    await world.start(delivery=BOUNCE, policy={"destinations": {"a.test": rule}})
    await world.sandbox.submit("a@from.test", "bob@a.test")
    assert verdict(await attempt(world, "bob@a.test")) == ("failed", "permanent", "5.7.5")
    (dsn,) = await home.wait_for_messages()
    assert b"Status: 5.7.5" in dsn.content
    assert mx.connections == []


async def test_floor_unmet_until_the_end_of_the_lifetime_bounces_with_the_reason(
    world: World,
) -> None:
    await failing(world, "a.test")
    await world.sandbox.domain("b.test", Script(starttls=StartTls.ABSENT))
    await world.publish("b.test", policy("mx.b.test"))
    home = await world.sandbox.domain("from.test", Script())
    await world.start(
        delivery=DELIVERY, queue={"retry": ["1s"], "lifetime": "4s", "warn_after": "never"}
    )
    for domain in ("a.test", "b.test"):
        await world.sandbox.submit("a@from.test", f"bob@{domain}")
    reports = await home.wait_for_messages(2, timeout=patient(60))
    said = {
        match[0]: dsn.content
        for dsn in reports
        if (match := re.search(rb"mx\.[ab]\.test", dsn.content)) is not None
    }
    assert b"Status: 5.7.5" in said[b"mx.a.test"]
    assert b"Status: 5.7.4" in said[b"mx.b.test"]


async def test_report_to_a_sender_is_under_the_floor_of_the_senders_domain(world: World) -> None:
    home = await failing(world, "from.test", Kind.WRONG_NAME)
    await world.sandbox.domain("a.test", Script(replies={"RCPT": "550 5.1.1 no such user"}))
    await world.start(delivery=DELIVERY)
    await world.sandbox.submit("a@from.test", "bob@a.test")
    event = await attempt(world, "a@from.test")
    assert verdict(event) == ("failed", "temporary", "4.7.5")
    assert status_of(event)["policy-result"] == "certificate-host-mismatch"
    assert home.messages == []


async def test_policy_is_looked_up_anew_before_mail_is_returned_for_it(world: World) -> None:
    """The domain has moved to another host and published so; the relay has not noticed yet."""
    web = await world.publish("a.test", policy("old.a.test"))
    await world.start(delivery=BOUNCE)
    assert (await world.run("mta-sts", "refresh", "a.test"))[0] == 0
    mx = await world.sandbox.domain("a.test", Script())
    web.answer = policy(mx.name)
    world.record("a.test", "2")
    await world.sandbox.submit("a@from.test", "bob@a.test", fields=STRICT)
    event = await attempt(world, "bob@a.test")
    assert event["event"] == "delivered"
    assert status_of(event)["policy-type"] == "sts"


# --- routes ---------------------------------------------------------------------------------------


async def test_route_is_under_the_policy_of_its_host_and_not_of_the_recipients_domain(
    world: World,
) -> None:
    good = await world.sandbox.host("smart.test", Script())
    bad = await world.sandbox.host("lax.test", Script(certificate=Kind.EXPIRED))
    for mx in (good, bad):
        await world.publish(mx.name, policy(mx.name))
    for domain in ("a.test", "b.test"):
        await world.publish(domain, policy("mx.else.test"))
    routes = {
        "a.test": {"host": good.name, "port": good.port},
        "b.test": {"host": bad.name, "port": bad.port},
    }
    await world.start(delivery=DELIVERY, routes=routes)
    for domain in routes:
        await world.sandbox.submit("a@from.test", f"bob@{domain}")
    event = await attempt(world, "bob@a.test")
    assert (event["event"], status_of(event)["policy-type"]) == ("delivered", "sts")
    assert status_of(event)["mx-secure"] is True  # the operator named it
    event = await attempt(world, "bob@b.test")
    assert verdict(event) == ("failed", "temporary", "4.7.5")
    assert status_of(event)["policy-result"] == "certificate-expired"


async def test_route_to_a_signed_host_is_under_its_records(world: World) -> None:
    mx = await world.sandbox.host("smart.signed.test", Script())
    world.sandbox.dns.tlsa(mx.name, OTHER_KEY, port=mx.port)
    routes = {"a.test": {"host": mx.name, "port": mx.port}}
    await world.start(delivery=DELIVERY, routes=routes, resolver=TRUSTED)
    await world.sandbox.submit("a@from.test", "bob@a.test")
    event = await attempt(world, "bob@a.test")
    assert verdict(event) == ("failed", "temporary", "4.7.5")
    assert status_of(event)["policy-type"] == "tlsa"
    assert mx.messages == []


async def test_route_to_an_address_is_under_no_floor(world: World) -> None:
    mx = await world.sandbox.host("smart.signed.test", Script())
    await world.publish("a.test", policy("mx.else.test"))
    routes = {"a.test": {"host": f"[{mx.address}]", "port": mx.port}}
    await world.start(delivery=DELIVERY, routes=routes, resolver=TRUSTED)
    await world.sandbox.submit("a@from.test", "bob@a.test")
    event = await attempt(world, "bob@a.test")
    assert (event["event"], status_of(event)["policy-type"]) == ("delivered", "no-policy-found")


# --- the operator ---------------------------------------------------------------------------------


async def test_mail_that_waits_for_a_floor_is_set_free_by_name_and_by_nothing_else(
    world: World,
) -> None:
    """Floors are looked up at each attempt. skip_verification in a rule does not lower one."""
    mx = await failing(world, "a.test", Kind.UNKNOWN_CA)
    await world.start(delivery=DELIVERY, queue={"retry": ["2s"]})
    await world.sandbox.submit("a@from.test", "bob@a.test")
    assert verdict(await attempt(world, "bob@a.test")) == ("failed", "temporary", "4.7.5")
    reload(world, {"skip_verification": True})
    so_far = len(world.sandbox.events(recipient="bob@a.test"))
    event = await attempt(world, "bob@a.test", so_far + 2)
    assert verdict(event) == ("failed", "temporary", "4.7.5")
    assert mx.messages == []
    reload(world, {"mta_sts": "ignore"})
    await mx.wait_for_messages(timeout=patient(60))
    async with asyncio.timeout(patient(20)):
        while not (delivered := world.sandbox.events(event="delivered")):
            await asyncio.sleep(0.05)
    assert status_of(delivered[0])["waived"] == "destination"


def reload(world: World, rule: dict[str, Any]) -> None:
    """Another rule for a.test, without a restart."""
    relay = world.sandbox.relay
    assert relay is not None
    relay.config["policy"] = {"destinations": {"a.test": rule}}
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    relay.signal(signal.SIGHUP)


async def test_metrics_count_hosts_that_fail_a_floor_and_fetches(world: World) -> None:
    await failing(world, "a.test")
    await world.sandbox.domain("b.test", Script())
    await world.publish("b.test", WebAnswer(status=404))
    await world.start(delivery=DELIVERY)
    for domain in ("a.test", "b.test"):
        await world.sandbox.submit("a@from.test", f"bob@{domain}")
        await attempt(world, f"bob@{domain}")
    socket = world.sandbox.directory / "relay.sock"
    (metrics,) = await asyncio.to_thread(lambda: list(ask(socket, {"verb": "metrics"})))
    text = metrics["done"]["text"]
    assert 'relay_policy_failures_total{policy="sts",result="certificate-expired"} 1' in text
    assert 'relay_sts_fetches_total{result="sts-policy-fetch-error"} 1' in text


@pytest.mark.parametrize(
    ("rule", "routes", "words"),
    [
        ({"mx": ["mx.a.test"]}, {}, "require_tls"),
        (
            {"mx": ["mx.a.test"], "require_tls": True, "skip_verification": True},
            {},
            "skip_verification",
        ),
        ({"mx": ["mx.a.test"], "require_tls": True}, {"a.test": {"host": "smart.test"}}, "routes"),
    ],
    ids=["may-go-in-clear", "not-verified", "routed"],
)
async def test_check_warns_of_pins_that_protect_nobody(
    world: World, rule: dict[str, Any], routes: dict[str, Any], words: str
) -> None:
    relay = await world.sandbox.prepare(policy={"destinations": {"a.test": rule}}, routes=routes)
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    code, _, err = await world.run("check")
    assert code == 0
    warned = [line for line in err.splitlines() if "a.test" in line]
    assert any(words in line for line in warned), err
