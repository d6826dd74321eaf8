"""TLS beyond one host and one message: several hosts, reuse of connections, bounces, reloads.

`test_tls_table` judges each cell alone; here the cells meet each other.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from relay.sandbox.certificates import Kind
from relay.sandbox.dns import Fault
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.waiting import patient
from tests.rigs.sandbox import Event, Sandbox

pytestmark = pytest.mark.slow

STRICT = {"X-Require-TLS": "yes", "X-Skip-Verification": "no"}
REQUIRED_UNVERIFIED = {"X-Require-TLS": "yes", "X-Skip-Verification": "yes"}
OPPORTUNISTIC = {"X-Require-TLS": "no", "X-Skip-Verification": "no"}
UNVERIFIED = {"X-Require-TLS": "no", "X-Skip-Verification": "yes"}

TIMEOUTS = {
    "connect": "2s",
    "tls_handshake": "3s",
    "command": "5s",
    "data_block": "2s",
    "final_reply": "2s",
}
DELIVERY: dict[str, Any] = {"timeouts": TIMEOUTS}

BAD_HOSTS = {
    "expired": (Script(certificate=Kind.EXPIRED), "4.7.5"),
    "wrong-name": (Script(certificate=Kind.WRONG_NAME), "4.7.5"),
    "no-starttls": (Script(starttls=StartTls.ABSENT), "4.7.4"),
    "starttls-454": (Script(starttls=StartTls.REFUSED_454), "4.7.4"),
    "starttls-502": (Script(starttls=StartTls.REFUSED_502), "4.7.4"),
    "hangs": (Script(starttls=StartTls.HANG), "4.7.5"),
}


def said_anywhere(mx: MxServer) -> bytes:
    """All bytes a host was sent, in clear and in TLS."""
    return b"".join(chunk for connection in mx.connections for _, chunk in connection.chunks)


def said_in_clear(mx: MxServer) -> bytes:
    return b"".join(connection.clear + connection.in_handshake for connection in mx.connections)


def assert_nothing_of_the_message_in_clear(mx: MxServer, token: str) -> None:
    verbs = {verb for connection in mx.connections for verb in connection.clear_verbs}
    assert verbs <= {"EHLO", "HELO", "STARTTLS", "QUIT"}
    assert token.encode() not in said_in_clear(mx)


def status_of(event: Event) -> dict[str, Any]:
    status: dict[str, Any] = event["delivery-status"]
    return status


async def two_hosts(
    sandbox: Sandbox, first: Script, second: Script, domain: str = "two.test"
) -> tuple[MxServer, MxServer]:
    """A domain with a first and a second host."""
    mx1 = await sandbox.host(f"mx1.{domain}", first)
    mx2 = await sandbox.host(f"mx2.{domain}", second)
    sandbox.dns.mx(domain, (10, mx1.name), (20, mx2.name))
    return mx1, mx2


# --- several hosts ------------------------------------------------------------------------------


async def test_required_tls_passes_over_a_bad_host_to_the_next_good_one(sandbox: Sandbox) -> None:
    pairs = {
        bad: await two_hosts(sandbox, script, Script(), f"{bad}.test")
        for bad, (script, _) in BAD_HOSTS.items()
    }
    await sandbox.start(delivery=DELIVERY)
    tokens = {
        bad: await sandbox.submit("a@from.test", f"bob@{bad}.test", fields=STRICT) for bad in pairs
    }
    for bad, (mx1, mx2) in pairs.items():
        (event,) = await sandbox.attempts(f"bob@{bad}.test")
        status = status_of(event)
        assert event["event"] == "delivered", bad
        assert (status["mx-host"], status["tls"], status["certificate-verified"]) == (
            mx2.name,
            True,
            True,
        )
        assert (len(mx1.messages), len(mx2.messages)) == (0, 1), bad
        assert len(mx1.connections) == 1, bad
        for mx in (mx1, mx2):
            assert_nothing_of_the_message_in_clear(mx, tokens[bad])


async def test_opportunistic_tls_goes_in_clear_to_the_first_host_before_it_tries_a_second(
    sandbox: Sandbox,
) -> None:
    mx1, mx2 = await two_hosts(sandbox, Script(certificate=Kind.EXPIRED), Script())
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@two.test")
    (event,) = await sandbox.attempts("bob@two.test")
    assert status_of(event)["mx-host"] == mx1.name
    assert status_of(event)["downgrade"]["reason"] == "certificate-unverified"
    assert (len(mx1.messages), len(mx2.connections)) == (1, 0)


async def test_message_that_no_host_can_take_waits_and_the_log_names_each_host(
    sandbox: Sandbox,
) -> None:
    mx1, mx2 = await two_hosts(
        sandbox, Script(starttls=StartTls.ABSENT), Script(certificate=Kind.EXPIRED)
    )
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@two.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@two.test")
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert status_of(event)["enhanced-code"] == "4.7.5"
    assert mx1.messages == mx2.messages == []


async def test_silence_after_the_final_dot_is_not_tried_at_another_host(sandbox: Sandbox) -> None:
    silent = Script(replies={"CONTENT": ScriptedReply(None, then=Then.SILENCE)})
    mx1, mx2 = await two_hosts(sandbox, silent, Script())
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@two.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@two.test")
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    assert (len(mx1.connections), len(mx2.connections)) == (1, 0)


# --- 530: a host that wants TLS on the clear leg has not refused the mail -------------------------

MUST_ISSUE_STARTTLS = "530 5.7.0 Must issue a STARTTLS command first"


async def test_a_host_that_insists_on_tls_in_clear_does_not_make_the_message_bounce(
    sandbox: Sandbox,
) -> None:
    without_tls = {
        "expired": Script(certificate=Kind.EXPIRED),
        "no-starttls": Script(starttls=StartTls.ABSENT),
        "starttls-454": Script(starttls=StartTls.REFUSED_454),
    }
    hosts = {}
    for verb in ("MAIL", "RCPT"):
        insists = {verb: MUST_ISSUE_STARTTLS, "DATA": MUST_ISSUE_STARTTLS}
        for name, script in without_tls.items():
            domain = f"{name}-{verb.lower()}.test"
            hosts[domain] = await sandbox.domain(domain, replace(script, replies_in_clear=insists))
    await sandbox.start(delivery=DELIVERY)
    for domain in hosts:
        await sandbox.submit("a@from.test", f"bob@{domain}")
    for domain, mx in hosts.items():
        (event,) = await sandbox.attempts(f"bob@{domain}")
        status = status_of(event)
        assert (event["event"], event["severity"]) == ("failed", "temporary"), domain
        assert (status["enhanced-code"], status["code"]) == ("4.7.5", 530), domain
        assert "STARTTLS" in status["message"]
        assert mx.messages == [], domain


async def test_a_host_that_insists_on_tls_is_passed_over_for_the_next(sandbox: Sandbox) -> None:
    insisting = Script(certificate=Kind.EXPIRED, replies_in_clear={"MAIL": MUST_ISSUE_STARTTLS})
    mx1, mx2 = await two_hosts(sandbox, insisting, Script())
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@two.test")
    (event,) = await sandbox.attempts("bob@two.test")
    assert event["event"] == "delivered"
    assert status_of(event)["mx-host"] == mx2.name
    assert status_of(event)["certificate-verified"] is True
    assert (len(mx1.messages), len(mx2.messages)) == (0, 1)


# --- what the operator may choose -----------------------------------------------------------------


async def test_on_tls_unmet_bounce_bounces_after_the_first_attempt_and_tells_the_sender_why(
    sandbox: Sandbox,
) -> None:
    hosts = {
        bad: await sandbox.domain(f"{bad}.test", script) for bad, (script, _) in BAD_HOSTS.items()
    }
    home = await sandbox.domain("from.test", Script())
    await sandbox.start(delivery=DELIVERY | {"on_tls_unmet": "bounce"})
    tokens = {
        bad: await sandbox.submit("a@from.test", f"bob@{bad}.test", fields=STRICT) for bad in hosts
    }
    await home.wait_for_messages(len(hosts))
    for bad, mx in hosts.items():
        (event,) = await sandbox.attempts(f"bob@{bad}.test")
        status = BAD_HOSTS[bad][1].replace("4.", "5.", 1)
        assert (event["event"], event["severity"]) == ("failed", "permanent"), bad
        assert status_of(event)["enhanced-code"] == status, bad
        (dsn,) = [dsn for dsn in home.messages if f"Subject: {tokens[bad]}".encode() in dsn.content]
        assert dsn.reverse_path == ""
        assert f"Status: {status}".encode() in dsn.content
        assert mx.name.encode() in dsn.content
        assert f"Body of {tokens[bad]}".encode() not in dsn.content
        assert mx.messages == [], bad


@pytest.mark.parametrize("trouble", ["nobody listens", "the DNS failed"])
async def test_on_tls_unmet_bounce_waits_where_a_host_could_not_be_reached(
    sandbox: Sandbox, trouble: str
) -> None:
    mx = await sandbox.host("mx1.two.test", Script(certificate=Kind.EXPIRED))
    if trouble == "nobody listens":
        sandbox.dns.a("mx2.two.test", "127.0.0.250")
    else:
        sandbox.dns.fail("mx2.two.test", "*", Fault.SERVFAIL)
    sandbox.dns.mx("two.test", (10, mx.name), (20, "mx2.two.test"))
    await sandbox.start(delivery=DELIVERY | {"on_tls_unmet": "bounce"})
    await sandbox.submit("a@from.test", "bob@two.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@two.test")
    assert (event["event"], event["severity"]) == ("failed", "temporary")


async def test_min_version_binds_where_tls_is_required_or_verified(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("old.test", Script(maximum_tls=ssl.TLSVersion.TLSv1_2))
    await sandbox.start(delivery=DELIVERY, tls={"min_version": "TLSv1.3"})
    came_of_it = []
    for n, fields in enumerate([STRICT, REQUIRED_UNVERIFIED, OPPORTUNISTIC, UNVERIFIED]):
        await sandbox.submit("a@from.test", f"bob{n}@old.test", fields=fields)
        (event,) = await sandbox.attempts(f"bob{n}@old.test")
        came_of_it.append((status_of(event)["enhanced-code"], status_of(event)["tls-version"]))
    assert came_of_it == [("4.7.5", None), ("4.7.5", None), ("2.0.0", None), ("2.0.0", "TLSv1.2")]
    assert [message.tls_version for message in mx.messages] == [None, "TLSv1.2"]


async def test_on_unverified_encrypted_keeps_the_session_that_nobody_could_verify(
    sandbox: Sandbox,
) -> None:
    kinds = [Kind.EXPIRED, Kind.WRONG_NAME, Kind.SELF_SIGNED, Kind.SHORT_KEY]
    hosts = {kind: await sandbox.domain(f"{kind}.test", Script(certificate=kind)) for kind in kinds}
    await sandbox.start(delivery=DELIVERY | {"on_unverified": "encrypted"})
    tokens = {kind: await sandbox.submit("a@from.test", f"bob@{kind}.test") for kind in kinds}
    for kind, mx in hosts.items():
        (event,) = await sandbox.attempts(f"bob@{kind}.test")
        status = status_of(event)
        assert event["event"] == "delivered", kind
        assert (status["tls"], status["certificate-verified"], status["verified-by"]) == (
            True,
            False,
            None,
        )
        assert mx.messages[0].in_tls
        assert_nothing_of_the_message_in_clear(mx, tokens[kind])


@pytest.mark.parametrize("fields", [STRICT, OPPORTUNISTIC], ids=["required", "opportunistic"])
async def test_on_unverified_encrypted_changes_nothing_where_there_is_no_tls(
    sandbox: Sandbox, fields: dict[str, str]
) -> None:
    mx = await sandbox.domain("bad.test", Script(starttls=StartTls.ABSENT))
    await sandbox.start(delivery=DELIVERY | {"on_unverified": "encrypted"})
    await sandbox.submit("a@from.test", "bob@bad.test", fields=fields)
    await sandbox.attempts("bob@bad.test")
    assert len(mx.messages) == (fields is OPPORTUNISTIC)


async def test_a_locked_rule_stands_against_a_message_that_would_weaken_it(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("bad.test", Script(starttls=StartTls.ABSENT))
    locked = {"require_tls": True, "allow_override": False}
    await sandbox.start(delivery=DELIVERY, policy={"domains": {"from.test": locked}})
    await sandbox.submit("a@from.test", "bob@bad.test", fields=UNVERIFIED)
    (event,) = await sandbox.attempts("bob@bad.test")
    assert event["policy"] == {
        "require-tls": True,
        "require-tls-source": "message-refused",
        "skip-verification": False,
        "skip-verification-source": "message-refused",
        "requiretls": False,
        "tls-required-no": False,
    }
    assert mx.messages == []


# --- reuse of connections -------------------------------------------------------------------------


async def test_protected_message_never_uses_the_connection_of_one_that_asked_for_less(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("good.test", Script())
    await sandbox.start(delivery=DELIVERY)
    orders = [UNVERIFIED, OPPORTUNISTIC, STRICT, REQUIRED_UNVERIFIED, STRICT, UNVERIFIED]
    tokens = []
    for n, fields in enumerate(orders):
        tokens.append(await sandbox.submit("a@from.test", f"bob{n}@good.test", fields=fields))
        await asyncio.sleep(0.2)
    await mx.wait_for_messages(len(orders))
    riders = {
        connection.number: {
            orders_of(tokens, orders, message.content) for message in connection.messages
        }
        for connection in mx.connections
    }
    assert all(len(settings) <= 1 for settings in riders.values()), riders


def orders_of(tokens: list[str], orders: list[dict[str, str]], content: bytes) -> tuple[str, ...]:
    (n,) = [n for n, token in enumerate(tokens) if f"Body of {token}.".encode() in content]
    return tuple(orders[n].values())


async def test_a_clear_connection_kept_open_is_not_used_for_a_protected_message(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("bad.test", Script(starttls=StartTls.ABSENT))
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "carol@bad.test", fields=OPPORTUNISTIC)
    await mx.wait_for_messages()
    await asyncio.sleep(0.2)
    token = await sandbox.submit("a@from.test", "bob@bad.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@bad.test")
    assert status_of(event)["enhanced-code"] == "4.7.4"
    assert token.encode() not in said_anywhere(mx)
    assert b"bob" not in said_anywhere(mx)


async def test_a_burst_of_mixed_settings_keeps_to_its_connections(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("good.test", Script(certificate=Kind.WILDCARD))
    await sandbox.start(delivery=DELIVERY)
    orders = [UNVERIFIED, OPPORTUNISTIC, STRICT, REQUIRED_UNVERIFIED] * 15
    async with sandbox.client() as client:
        tokens = [
            await sandbox.submit("a@from.test", f"bob{n}@good.test", fields=fields, client=client)
            for n, fields in enumerate(orders)
        ]
    await mx.wait_for_messages(len(orders))
    for connection in mx.connections:
        settings = {orders_of(tokens, orders, message.content) for message in connection.messages}
        assert len(settings) <= 1
    assert all(message.in_tls for message in mx.messages)
    assert len(mx.messages) == len(orders)


# --- what a bounce may not give away --------------------------------------------------------------

NO_SUCH_USER = Script(replies={"RCPT": "550 5.1.1 no such user"})


async def test_the_bounce_of_a_protected_message_has_its_header_only_and_goes_in_verified_tls(
    sandbox: Sandbox,
) -> None:
    await sandbox.domain("good.test", NO_SUCH_USER)
    home = await sandbox.domain("from.test", Script())
    await sandbox.start(delivery=DELIVERY)
    token = await sandbox.submit("a@from.test", "bob@good.test", fields=STRICT)
    (dsn,) = await home.wait_for_messages()
    assert dsn.in_tls
    assert dsn.forward_paths == ("a@from.test",)
    assert f"Subject: {token}".encode() in dsn.content
    assert f"Body of {token}".encode() not in dsn.content
    assert b"x-require-tls" not in dsn.content.lower()
    assert_nothing_of_the_message_in_clear(home, token)


async def test_the_bounce_of_a_protected_message_goes_out_under_no_weaker_rules(
    sandbox: Sandbox,
) -> None:
    await sandbox.domain("good.test", NO_SUCH_USER)
    homes = {
        bad: await sandbox.domain(f"{bad}.test", script) for bad, (script, _) in BAD_HOSTS.items()
    }
    weak = {"require_tls": False, "skip_verification": True}
    await sandbox.start(
        delivery=DELIVERY, policy={"default": weak, "destinations": {"*.test": weak}}
    )
    tokens = {
        bad: await sandbox.submit(f"a@{bad}.test", "bob@good.test", fields=STRICT) for bad in homes
    }
    for bad, home in homes.items():
        (event,) = await sandbox.attempts(f"a@{bad}.test")
        assert event["policy"]["require-tls"] is True
        assert event["policy"]["skip-verification"] is False
        assert (event["event"], status_of(event)["enhanced-code"]) == (
            "failed",
            BAD_HOSTS[bad][1],
        ), bad
        assert home.messages == [], bad
        assert_nothing_of_the_message_in_clear(home, tokens[bad])


async def test_the_bounce_of_an_unprotected_message_may_go_in_clear(sandbox: Sandbox) -> None:
    await sandbox.domain("good.test", NO_SUCH_USER)
    home = await sandbox.domain("from.test", Script(starttls=StartTls.ABSENT))
    await sandbox.start(delivery=DELIVERY)
    await sandbox.submit("a@from.test", "bob@good.test")
    (dsn,) = await home.wait_for_messages()
    assert not dsn.in_tls


# --- time -----------------------------------------------------------------------------------------


async def test_at_the_end_of_its_lifetime_a_message_whose_tls_stayed_unmet_bounces_with_each_reason(
    sandbox: Sandbox,
) -> None:
    mx1, mx2 = await two_hosts(
        sandbox, Script(starttls=StartTls.ABSENT), Script(certificate=Kind.EXPIRED)
    )
    home = await sandbox.domain("from.test", Script())
    await sandbox.start(
        delivery=DELIVERY, queue={"retry": ["1s"], "lifetime": "3s", "warn_after": "never"}
    )
    await sandbox.submit("a@from.test", "bob@two.test", fields=STRICT)
    (dsn,) = await home.wait_for_messages(timeout=patient(30))
    # The line may come after the DSN that was committed with it.
    async with asyncio.timeout(patient(20)):
        while (last := sandbox.events(recipient="bob@two.test")[-1])["severity"] != "permanent":
            await asyncio.sleep(0.05)
    assert last["event"] == "failed"
    assert (status_of(last)["code"], status_of(last)["enhanced-code"]) == (602, "5.7.5")
    assert b"Status: 5.7.5" in dsn.content
    for mx in (mx1, mx2):
        assert mx.name.encode() in dsn.content
        assert mx.messages == []


async def test_a_waiting_message_is_bound_by_a_rule_made_stricter_since(sandbox: Sandbox) -> None:
    busy = {"MAIL": "451 4.3.0 later"}
    mx = await sandbox.domain(
        "bad.test", Script(starttls=StartTls.ABSENT, replies=busy), Script(starttls=StartTls.ABSENT)
    )
    relay = await sandbox.start(delivery=DELIVERY, queue={"retry": ["2s"]})
    token = await sandbox.submit("a@from.test", "bob@bad.test")
    await sandbox.attempts("bob@bad.test")
    relay.config["policy"] = {"domains": {"from.test": {"require_tls": True}}}
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    relay.signal(signal.SIGHUP)
    second = (await sandbox.attempts("bob@bad.test", 2))[1]
    assert status_of(second)["enhanced-code"] == "4.7.4"
    assert second["policy"]["require-tls-source"] == "domain"
    assert mx.messages == []
    assert token.encode() not in said_anywhere(mx)


async def test_a_waiting_message_is_not_set_free_by_a_rule_made_looser_since(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("bad.test", Script(starttls=StartTls.ABSENT))
    relay = await sandbox.start(
        delivery=DELIVERY,
        queue={"retry": ["2s"]},
        policy={"domains": {"from.test": {"require_tls": True}}},
    )
    await sandbox.submit("a@from.test", "bob@bad.test")
    await sandbox.attempts("bob@bad.test")
    relay.config["policy"] = {"domains": {"from.test": {"require_tls": False}}}
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    relay.signal(signal.SIGHUP)
    second = (await sandbox.attempts("bob@bad.test", 2))[1]
    assert status_of(second)["enhanced-code"] == "4.7.4"
    assert mx.messages == []


# --- several recipients, and routes ---------------------------------------------------------------


async def test_each_recipient_domain_of_one_message_has_its_own_rule(sandbox: Sandbox) -> None:
    clear = Script(starttls=StartTls.ABSENT)
    guarded, free = (
        await sandbox.domain("guarded.test", clear),
        await sandbox.domain("free.test", clear),
    )
    await sandbox.start(
        delivery=DELIVERY, policy={"destinations": {"guarded.test": {"require_tls": True}}}
    )
    token = await sandbox.submit("a@from.test", "bob@guarded.test", "carol@free.test")
    (bob,) = await sandbox.attempts("bob@guarded.test")
    (carol,) = await sandbox.attempts("carol@free.test")
    assert (bob["event"], status_of(bob)["enhanced-code"]) == ("failed", "4.7.4")
    assert carol["event"] == "delivered"
    assert token.encode() not in said_anywhere(guarded)
    assert len(free.messages) == 1


@pytest.mark.parametrize("fields", [OPPORTUNISTIC, UNVERIFIED], ids=["opportunistic", "unverified"])
async def test_credentials_of_a_route_are_sent_in_verified_tls_only(
    sandbox: Sandbox, fields: dict[str, str]
) -> None:
    scripts = {"good": Script()} | {bad: script for bad, (script, _) in BAD_HOSTS.items()}
    hosts = {
        name: await sandbox.host(f"{name}.test", replace(script, offers=("AUTH PLAIN LOGIN",)))
        for name, script in scripts.items()
    }
    secret = sandbox.directory / "password"
    secret.write_text("sesame\n")
    secret.chmod(0o600)
    routes = {
        f"to-{name}.test": {
            "host": mx.name,
            "port": mx.port,
            "username": "app",
            "password_file": str(secret),
        }
        for name, mx in hosts.items()
    }
    await sandbox.start(delivery=DELIVERY, routes=routes)
    for name in hosts:
        await sandbox.submit("a@from.test", f"bob@to-{name}.test", fields=fields)
    for name, mx in hosts.items():
        (event,) = await sandbox.attempts(f"bob@to-{name}.test")
        assert (event["event"] == "delivered") is (name == "good"), name
        assert any("AUTH" in connection.verbs for connection in mx.connections) is (
            name == "good"
        ), name
        assert all("AUTH" not in connection.clear_verbs for connection in mx.connections), name


@pytest.mark.parametrize("kind", [Kind.GOOD, Kind.EXPIRED])
async def test_a_route_with_implicit_tls_keeps_the_same_rules(sandbox: Sandbox, kind: Kind) -> None:
    mx = await sandbox.host("smart.test", Script(implicit_tls=True, certificate=kind))
    route = {"host": mx.name, "port": mx.port, "tls": "implicit"}
    await sandbox.start(delivery=DELIVERY, routes={"routed.test": route})
    await sandbox.submit("a@from.test", "bob@routed.test", fields=STRICT)
    (event,) = await sandbox.attempts("bob@routed.test")
    assert (event["event"] == "delivered") is (kind is Kind.GOOD)
    assert len(mx.messages) == (kind is Kind.GOOD)
    assert_clear_is_empty(mx.connections)


def assert_clear_is_empty(connections: Iterable[Any]) -> None:
    for connection in connections:
        assert connection.clear == b""
