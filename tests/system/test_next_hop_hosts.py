"""A next hop with several hosts, and what each has to prove: a relay between real hosts, seen at
the hosts, in the delivery log and in the program's log.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay.sandbox.certificates import Authority, Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.waiting import patient
from tests.rigs.relay import Relay
from tests.rigs.sandbox import Event, Sandbox

QUICK = {"timeouts": {"greeting": "2s", "connect": "5s"}}
GOOD = Script(offers=("AUTH PLAIN", "PIPELINING"))

FIRST = {
    "refused": GOOD,
    "silent": Script(replies={"GREETING": ScriptedReply(None, then=Then.SILENCE)}),
    "closing": Script(replies={"GREETING": "421 4.3.2 closing for the night"}),
    "expired": replace(GOOD, certificate=Kind.EXPIRED),
    "no-tls": replace(GOOD, starttls=StartTls.ABSENT),
    "login": replace(GOOD, replies={"AUTH": "535 5.7.8 no such user"}),
}
"""What the first host of each next hop does, by the name of the next hop."""


async def within(
    seconds: float, found: Callable[[], Any], *, what: str = "what was waited for"
) -> Any:
    deadline = time.monotonic() + patient(seconds)
    while not (value := found()):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.1)
    return value


async def event_of(sandbox: Sandbox, token: str, kind: str = "delivered") -> Event:
    """The line of the delivery log about a message that `submit` named."""

    def found() -> Event | None:
        lines = sandbox.events(event=kind)
        return next(
            (line for line in lines if line["message"]["headers"]["subject"] == token), None
        )

    event: Event = await within(60, found, what=f"{kind} {token}")
    return event


def told(relay: Relay, words: str) -> list[str]:
    """The lines of the program's log with these words."""
    return [line for line in relay.stderr.splitlines() if words in line]


async def test_second_host_takes_over_in_the_same_attempt_however_the_first_is_dead(sandbox):
    (sandbox.directory / "password").write_text("open sesame\n")
    hosts: dict[str, tuple[MxServer, MxServer]] = {}
    for manner, script in FIRST.items():
        first = await sandbox.host(f"first.{manner}.example", script)
        hosts[manner] = first, await sandbox.host(f"second.{manner}.example", GOOD)
    await hosts["refused"][0].close()
    await sandbox.start(
        delivery=QUICK,
        routes={f"to-{manner}.example": manner for manner in FIRST},
        next_hops={
            manner: {
                "hosts": [first.name, second.name],
                "port": sandbox.delivery_port,
                "auth": {"username": "us", "password_file": "password"},
            }
            for manner, (first, second) in hosts.items()
        },
    )
    tokens = {
        manner: [await sandbox.submit("a@s.example", f"b@to-{manner}.example") for _ in range(3)]
        for manner in FIRST
    }
    for manner, (first, second) in hosts.items():
        for token in tokens[manner]:
            status = (await event_of(sandbox, token))["delivery-status"]
            assert (status["attempt-no"], status["mx-host"]) == (1, second.name), manner
            assert (status["certificate-verified"], status["route"]) == (True, manner)
        assert len(second.messages) == 3, manner
        assert first.messages == [], manner
        # Three messages at once may meet the host before its death is noted.
        assert len(first.connections) <= 3
        port = sandbox.delivery_port
        words = f"next hop {manner}: {first.name} port {port} is dead, "
        # A thread of its own writes the program's log, which may be behind the delivery log.
        dead = await within(10, partial(told, sandbox.relay, words), what=words)
        assert len(dead) == 1, dead


async def test_host_that_is_back_has_mail_within_a_minute(sandbox):
    first = await sandbox.host("first.example", GOOD)
    second = await sandbox.host("second.example", GOOD)
    await first.close()
    hop = {"hosts": [first.name, second.name], "port": sandbox.delivery_port}
    await sandbox.start(delivery=QUICK, routes={"*": hop})
    await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    assert len(second.messages) == 1
    await first.start()
    back = time.monotonic()
    while not first.messages:
        assert time.monotonic() < back + 60
        await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
        await asyncio.sleep(0.5)
    assert len(first.connections) == 1  # one message tested it
    taken = len(second.messages)
    for _ in range(3):
        await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    assert (len(first.messages), len(second.messages)) == (4, taken)
    lines = told(sandbox.relay, "next hop *: first.example ")
    assert [re.sub(r".* is (dead|alive).*", r"\1", line) for line in lines] == ["dead", "alive"]


async def test_equals_share_100_messages(sandbox):
    hosts = [await sandbox.host(f"{name}.example", GOOD) for name in ("a", "b", "c")]
    a, b, c = hosts
    hop = {"hosts": [[a.name, b.name], c.name], "port": sandbox.delivery_port}
    await sandbox.start(routes={"*": hop})
    async with sandbox.client() as client:
        for n in range(100):
            await sandbox.submit("a@s.example", f"b@d{n % 7}.example", client=client)
    await within(60, lambda: sum(len(host.messages) for host in hosts) == 100)
    assert [len(host.messages) for host in hosts] == [50, 50, 0]


async def test_message_waits_with_the_reason_of_each_host_where_all_are_dead(sandbox):
    gone = await sandbox.host("gone.example", GOOD)
    plain = await sandbox.host("plain.example", FIRST["no-tls"])
    await gone.close()
    hop = {"hosts": [gone.name, plain.name], "port": sandbox.delivery_port}
    await sandbox.start(delivery=QUICK, routes={"*": hop})
    required = await sandbox.submit("a@s.example", "b@d.example", fields={"X-Require-TLS": "yes"})
    event = await event_of(sandbox, required, "failed")
    status = event["delivery-status"]
    assert (event["severity"], status["enhanced-code"]) == ("temporary", "4.7.4")
    reasons = f"{status['description']} {status['hosts']}"
    assert "STARTTLS not offered" in reasons
    assert "gone.example" in reasons
    assert "Connection refused" in reasons
    # What one message requires does not stop the others.
    await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    assert len(plain.messages) == 1
    await plain.close()
    lost = await sandbox.submit("a@s.example", "b@e.example")
    status = (await event_of(sandbox, lost, "failed"))["delivery-status"]
    assert (status["enhanced-code"], status["code"]) == ("4.4.1", 680)


async def test_no_second_host_has_a_message_that_the_first_may_have(sandbox):
    first = await sandbox.host(
        "first.example",
        replace(GOOD, replies={"CONTENT": ScriptedReply(None, delay=1, then=Then.RESET)}),
    )
    second = await sandbox.host("second.example", GOOD)
    hop = {"hosts": [first.name, second.name], "port": sandbox.delivery_port}
    await sandbox.start(delivery=QUICK, routes={"*": hop})
    token = await sandbox.submit("a@s.example", "b@d.example")
    await within(30, lambda: any(b"\r\n.\r\n" in one.in_tls for one in first.connections))
    await first.close()  # after the final dot, before the answer
    status = (await event_of(sandbox, token, "failed"))["delivery-status"]
    assert status["in-doubt"] is True
    assert status["mx-host"] == first.name
    await asyncio.sleep(1)
    assert second.connections == []


# --- what the host proves, and the relay --------------------------------------------------------


def pin_of(server: MxServer, kind: Kind = Kind.GOOD) -> str:
    leaf = server.authority.leaf(server.name, kind, address=server.address)
    key = x509.load_pem_x509_certificate(leaf.chain_pem).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b64encode(sha256(spki).digest()).decode()


def written(directory: Path, name: str, content: bytes) -> str:
    (directory / name).write_bytes(content)
    return name


async def test_each_next_hop_has_proofs_of_its_own(sandbox):
    clients = Authority("Clients")
    ours = clients.client("relay.example.com")
    own = Authority("Partner CA")
    good = await sandbox.host("good.example", Script(resumes_tls=True))
    signed = await sandbox.host("self-signed.example", Script(certificate=Kind.SELF_SIGNED))
    demanding = await sandbox.host("demanding.example", Script(client_ca=clients.ca_pem))
    partner = await sandbox.host("partner.example", Script())
    partner.authority = own
    right, wrong = pin_of(good), b64encode(bytes(32)).decode()
    own_pin = pin_of(signed, Kind.SELF_SIGNED)
    certificate = {
        "certificate": written(sandbox.directory, "us.pem", ours.chain_pem),
        "key": written(sandbox.directory, "us.key", ours.key_pem),
    }
    ca_file = written(sandbox.directory, "partner.pem", own.ca_pem)
    # next hop: keys, and what the log says: verified by, pin; or a reason why mail waits
    cases: dict[str, tuple[MxServer, dict[str, Any], tuple[str, str | None] | str]] = {
        "right-pin": (good, {"pin_sha256": [right, wrong]}, ("pkix", right)),
        "second-pin": (good, {"pin_sha256": [wrong, right]}, ("pkix", right)),
        "wrong-pin": (good, {"pin_sha256": [wrong]}, f"its pin is {right}"),
        "pin-alone": (signed, {"pin_sha256": [own_pin], "ca_file": "none"}, ("pin", own_pin)),
        "pin-besides": (signed, {"pin_sha256": [own_pin]}, "self-signed certificate"),
        "own-roots": (partner, {"ca_file": ca_file}, ("pkix", None)),
        "other-roots": (good, {"ca_file": ca_file, **certificate}, "certificate not verified"),
        "wrong-name": (
            good,
            {"verify_name": "other.example", "pin_sha256": [right]},
            "certificate is not valid for 'other.example'",
        ),
        "client": (demanding, certificate, ("pkix", None)),
    }
    relay = await sandbox.start(
        routes={f"{name}.to.example": name for name in cases},
        next_hops={
            name: {"host": server.name, "port": sandbox.delivery_port, **keys}
            for name, (server, keys, _) in cases.items()
        },
    )
    for name, (server, _, expected) in cases.items():
        token = await sandbox.submit("a@s.example", f"b@{name}.to.example")
        kind = "failed" if isinstance(expected, str) else "delivered"
        event = await event_of(sandbox, token, kind)
        status = event["delivery-status"]
        assert status["mx-host"] == server.name, name
        if isinstance(expected, str):
            assert (event["severity"], status["enhanced-code"]) == ("temporary", "4.7.5"), name
            assert expected in status["description"], name
            assert not status["certificate-verified"], name
        else:
            assert (status["verified-by"], status.get("pin")) == expected, name
            assert status["certificate-verified"], name
    assert demanding.connections[-1].client_name == "relay.example.com"
    # Five next hops lead to one host, each with a handshake of its own.
    assert not any(connection.resumed for connection in good.connections)

    explained = await asyncio.to_thread(_explained, relay, "pin-alone.to.example")
    assert explained["must-prove"] == "pin"
    assert f"its key must be pinned: {own_pin} (pin_sha256)" in explained["rules"]
    probed = await asyncio.to_thread(_probed, relay, "pin-alone.to.example")
    assert (probed["verified"], probed["verified-by"], probed["pin"]) == (True, "pin", own_pin)
    probed = await asyncio.to_thread(_probed, relay, "wrong-pin.to.example")
    assert (probed["verified"], probed["pin"]) == (False, None)
    assert f"its pin is {right}" in probed["why-not-verified"]


def _explained(relay: Relay, domain: str) -> dict[str, Any]:
    said = relay.run("explain", "--from", "a@s.example", "--to", f"b@{domain}", "--json")
    host: dict[str, Any] = json.loads(said.stdout)["hosts"][0]
    return host


def _probed(relay: Relay, domain: str) -> dict[str, Any]:
    host: dict[str, Any] = json.loads(relay.run("probe", domain, "--json").stdout)["hosts"][0]
    return host


async def test_certificate_of_the_relay_is_read_again_without_a_reload(sandbox):
    clients = Authority("Clients")
    mx = await sandbox.host("mx.example", Script(client_ca=clients.ca_pem))
    for name in ("first", "second"):
        ours = clients.client(f"{name}.example.com")
        written(sandbox.directory, f"{name}.pem", ours.chain_pem + ours.key_pem)
    shown = sandbox.directory / "us.pem"
    shown.write_bytes((sandbox.directory / "first.pem").read_bytes())
    hop = {"host": mx.name, "port": sandbox.delivery_port, "certificate": "us.pem"}
    await sandbox.start(routes={"*": hop | {"max_messages_per_connection": 1}})
    await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    (sandbox.directory / "second.pem").replace(shown)
    await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    assert [connection.client_name for connection in mx.connections] == [
        "first.example.com",
        "second.example.com",
    ]


async def test_source_address_family_and_name_are_those_of_the_next_hop(sandbox):
    mx = await sandbox.host("mx.example", Script())
    hop = {
        "host": mx.name,
        "port": sandbox.delivery_port,
        "source_address": "127.0.9.9",
        "hello": "mail.example.com",
        "ip_family": "ipv4",
    }
    await sandbox.start(routes={"*": hop})
    await event_of(sandbox, await sandbox.submit("a@s.example", "b@d.example"))
    (connection,) = mx.connections
    assert connection.peer[0] == "127.0.9.9"
    assert {line for _, line in connection.commands if line.startswith("EHLO")} == {
        "EHLO mail.example.com"
    }
