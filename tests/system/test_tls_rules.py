"""Rules of TLS around the table, each through the real relay: names, loops, senders, the end of a
lifetime.

`test_tls_table` plays the table, `test_tls_table_beyond` several hosts and messages; here is
what is left, and what `relay explain` says of it beforehand.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, StartTls
from tests.fakes.waiting import patient
from tests.rigs.sandbox import Sandbox

pytestmark = pytest.mark.slow

STRICT = {"X-Require-TLS": "yes", "X-Skip-Verification": "no"}
CLEAR = Script(starttls=StartTls.ABSENT)
BUSY = {"MAIL": "451 4.3.0 later"}
DELIVERY: dict[str, Any] = {"timeouts": {"connect": "2s", "tls_handshake": "3s", "command": "5s"}}


async def explained(sandbox: Sandbox, sender: str, recipient: str, *options: str) -> dict[str, Any]:
    assert sandbox.relay is not None
    asked = ("explain", "--json", "--from", sender, "--to", recipient, *options)
    done = await asyncio.to_thread(sandbox.relay.run, *asked)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def step(answer: dict[str, Any], situation: str) -> dict[str, Any]:
    (found,) = [step for step in answer["hosts"][0]["steps"] if step["situation"] == situation]
    assert isinstance(found, dict)
    return found


def in_order(*hosts: MxServer) -> list[str]:
    """The names of the hosts that were connected to, the first one first."""
    return [
        mx.name
        for mx in sorted(
            (mx for mx in hosts if mx.connections), key=lambda mx: mx.connections[0].began
        )
    ]


# --- names --------------------------------------------------------------------------------------


async def test_a_host_is_verified_by_the_name_of_its_mx_record_in_whatever_spelling(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.host("mx.xn--bcher-kva.test")
    sandbox.dns.mx("names.test", (10, "MX.XN--bcher-KVA.Test."))
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@names.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@names.test")
    status = event["delivery-status"]
    assert (event["event"], status["certificate-verified"]) == ("delivered", True)
    assert status["mx-host"] == mx.name
    assert mx.connections[0].sni == mx.name


async def test_a_host_is_not_verified_by_the_name_its_own_name_is_an_alias_of(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.host("target.test")
    sandbox.dns.cname("alias.test", mx.name)
    sandbox.dns.mx("names.test", (10, "alias.test"))
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@names.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@names.test")
    assert event["delivery-status"]["enhanced-code"] == "4.7.5"
    assert event["delivery-status"]["mx-host"] == "alias.test"
    assert mx.connections[0].sni == "alias.test"
    assert mx.messages == []


async def test_rule_of_a_sender_domain_holds_in_every_spelling_and_not_for_the_null_reverse_path(
    sandbox: Sandbox,
) -> None:
    await sandbox.domain("clear.test", CLEAR)
    await sandbox.start(
        delivery=DELIVERY, policy={"domains": {"Bücher.Test.": {"require_tls": True}}}
    )
    unmet = ("4.7.4", True, "domain")
    came = {
        "a@xn--bcher-kva.test": unmet,
        "a@XN--BCHER-KVA.test": unmet,
        "a@from.test": ("2.0.0", False, "default"),
        "": ("2.0.0", False, "default"),
    }
    for number, (sender, expected) in enumerate(came.items()):
        recipient = f"bob{number}@clear.test"
        await sandbox.submit(sender, recipient, fields={"From": "a@xn--bcher-kva.test"})
        (event,) = await sandbox.attempts(recipient)
        policy = event["policy"]
        status = event["delivery-status"]["enhanced-code"]
        assert (status, policy["require-tls"], policy["require-tls-source"]) == expected, sender
        told = (await explained(sandbox, sender or "<>", recipient))["policy"]["require-tls"]
        assert (told["value"], told["source"]) == expected[1:], sender


# --- which hosts ----------------------------------------------------------------------------------


async def test_hosts_are_tried_in_the_order_that_explain_gives(sandbox: Sandbox) -> None:
    hosts = [
        await sandbox.host(f"mx{n}.many.test", script)
        for n, script in enumerate(
            [
                CLEAR,
                Script(certificate=Kind.EXPIRED),
                Script(starttls=StartTls.REFUSED_454),
                CLEAR,
                Script(),
            ]
        )
    ]
    preferences = [50, 10, 40, 20, 30]
    sandbox.dns.mx("many.test", *((p, mx.name) for p, mx in zip(preferences, hosts, strict=True)))
    await sandbox.start(delivery=DELIVERY)
    told = await explained(sandbox, "a@from.test", "bob@many.test", "--require-tls", "yes")
    assert [host["preference"] for host in told["hosts"]] == [10, 20, 30, 40, 50]
    await sandbox.submit("a@from.test", "bob@many.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@many.test")
    names = [host["host"] for host in told["hosts"]]
    assert event["event"] == "delivered"
    assert event["delivery-status"]["mx-host"] == names[2]  # the first of them that is good
    assert in_order(*hosts) == names[:3]


async def test_every_host_is_tried_in_order_where_none_will_do(sandbox: Sandbox) -> None:
    hosts = [await sandbox.host(f"mx{n}.many.test", CLEAR) for n in range(6)]
    sandbox.dns.mx("many.test", *((n // 2 * 10, mx.name) for n, mx in enumerate(hosts)))
    await sandbox.start(delivery=DELIVERY)
    told = await explained(sandbox, "a@from.test", "bob@many.test", "--require-tls", "yes")
    await sandbox.submit("a@from.test", "bob@many.test", fields=STRICT)
    await sandbox.attempts("bob@many.test")
    names, tried = [host["host"] for host in told["hosts"]], in_order(*hosts)
    for pair in (
        slice(0, 2),
        slice(2, 4),
        slice(4, 6),
    ):  # equal preferences are drawn by lot each time
        assert set(names[pair]) == set(tried[pair]) == {mx.name for mx in hosts[pair]}


async def test_hosts_at_our_own_preference_or_worse_are_never_tried(sandbox: Sandbox) -> None:
    before = await sandbox.host("mx1.two.test", Script(replies=BUSY))
    equal, behind = await sandbox.host("mx2.two.test"), await sandbox.host("mx3.two.test")
    ourselves = "Relay.Test.Example."
    sandbox.dns.a("relay.test.example", "127.8.8.8")
    sandbox.dns.mx(
        "two.test", (10, before.name), (20, equal.name), (20, ourselves), (30, behind.name)
    )
    sandbox.dns.mx("loop.test", (10, ourselves), (30, behind.name))
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@two.test")
    (event,) = await sandbox.attempts("bob@two.test")
    assert (event["event"], event["delivery-status"]["code"]) == ("failed", 451)
    await sandbox.submit("a@from.test", "bob@loop.test")
    (event,) = await sandbox.attempts("bob@loop.test")
    assert (event["severity"], event["delivery-status"]["enhanced-code"]) == ("permanent", "5.4.6")
    assert in_order(before, equal, behind) == [before.name]
    told = await explained(sandbox, "a@from.test", "bob@two.test")
    assert [host["host"] for host in told["hosts"]] == [before.name]
    assert (await explained(sandbox, "a@from.test", "bob@loop.test"))["no-route"][
        "status"
    ] == "5.4.6"


async def test_wildcard_listener_makes_every_address_of_this_machine_our_own(
    sandbox: Sandbox,
) -> None:
    relay = await sandbox.prepare(delivery=DELIVERY)
    relay.config["listeners"].append({"address": f"0.0.0.0:{sandbox.delivery_port}"})
    sandbox.dns.a("mx.loop.test", "127.9.9.9")
    sandbox.dns.mx("loop.test", (10, "mx.loop.test"))
    await asyncio.to_thread(relay.start)
    await sandbox.submit("a@from.test", "bob@loop.test")
    (event,) = await sandbox.attempts("bob@loop.test")
    assert (event["severity"], event["delivery-status"]["enhanced-code"]) == ("permanent", "5.4.6")
    assert (await explained(sandbox, "a@from.test", "bob@loop.test"))["no-route"][
        "status"
    ] == "5.4.6"


# --- what explain says of the operator's choices --------------------------------------------------


@pytest.mark.parametrize(
    ("script", "situation"),
    [
        (CLEAR, "not-offered"),
        (Script(certificate=Kind.EXPIRED), "unverified"),
        (Script(starttls=StartTls.REFUSED_502), "refused"),
        (Script(starttls=StartTls.GARBAGE), "handshake-failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_explain_predicts_the_effect_of_on_tls_unmet_bounce_and_on_unverified_encrypted(
    sandbox: Sandbox, script: Script, situation: str
) -> None:
    await sandbox.domain("bad.test", script)
    choices = {"on_tls_unmet": "bounce", "on_unverified": "encrypted"}
    await sandbox.start(delivery=DELIVERY | choices)
    told = step(
        await explained(sandbox, "a@from.test", "bob@bad.test", "--require-tls", "yes"), situation
    )
    await sandbox.submit("a@from.test", "bob@bad.test", fields={"X-Require-TLS": "yes"})
    (event,) = await sandbox.attempts("bob@bad.test")
    assert (event["event"], event["severity"]) == ("failed", "permanent")
    assert told["if-last"] == event["delivery-status"]["enhanced-code"]
    told = step(await explained(sandbox, "a@from.test", "carol@bad.test"), situation)
    await sandbox.submit("a@from.test", "carol@bad.test")
    (event,) = await sandbox.attempts("carol@bad.test")
    status = event["delivery-status"]
    assert event["event"] == "delivered"
    assert (told["tls"], told["certificate-verified"]) == (
        status["tls"],
        status["certificate-verified"],
    )
    assert told["downgrade"] == (status["downgrade"] and status["downgrade"]["reason"])


async def test_explain_predicts_that_a_route_with_implicit_tls_asks_more_than_the_message(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.host("smart.test", Script(implicit_tls=True, certificate=Kind.EXPIRED))
    route = {"host": mx.name, "port": mx.port, "tls": "implicit"}
    await sandbox.start(
        delivery=DELIVERY | {"on_tls_unmet": "bounce"}, routes={"routed.test": route}
    )
    told = await explained(sandbox, "a@from.test", "bob@routed.test")
    assert {step["situation"] for step in told["hosts"][0]["steps"]} == {
        "secured",
        "unverified",
        "handshake-failed",
    }
    await sandbox.submit("a@from.test", "bob@routed.test")
    (event,) = await sandbox.attempts("bob@routed.test")
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert (
        step(told, "unverified")["if-last"] == event["delivery-status"]["enhanced-code"] == "4.7.5"
    )
    assert mx.messages == []


# --- the end of a lifetime ------------------------------------------------------------------------

INSISTS = {"MAIL": "530 5.7.0 Must issue a STARTTLS command first"}


@pytest.mark.parametrize(
    ("script", "fields", "status", "code", "told"),
    [
        (Script(starttls=StartTls.REFUSED_454), STRICT, "5.7.4", 454, "TLS not available"),
        (CLEAR, STRICT, "5.7.4", 0, "STARTTLS not offered"),
        (Script(certificate=Kind.EXPIRED), STRICT, "5.7.5", 0, "certificate has expired"),
        (replace(CLEAR, replies_in_clear=INSISTS), {}, "5.7.5", 530, "Must issue a STARTTLS"),
    ],
    ids=["refused", "not-offered", "expired", "insists"],
)
async def test_at_the_end_of_the_lifetime_the_code_is_602_and_the_last_answer_is_told(
    sandbox: Sandbox, script: Script, fields: dict[str, str], status: str, code: int, told: str
) -> None:
    await sandbox.domain("bad.test", script)
    await sandbox.domain("from.test")
    await sandbox.start(
        delivery=DELIVERY, queue={"retry": ["1s"], "lifetime": "2s", "warn_after": "never"}
    )
    await sandbox.submit("a@from.test", "bob@bad.test", fields=fields)
    events = await sandbox.attempts("bob@bad.test", 2)
    async with asyncio.timeout(patient(20)):
        while events[-1]["severity"] != "permanent":
            await asyncio.sleep(0.2)
            events = await sandbox.attempts("bob@bad.test")
    first, last = events[0]["delivery-status"], events[-1]["delivery-status"]
    assert (first["code"], first["enhanced-code"]) == (code, status.replace("5", "4", 1))
    assert (last["code"], last["enhanced-code"], last["last-code"]) == (602, status, code)
    assert told in last["last-message"]
    assert events[-1]["reason"] == "old"
