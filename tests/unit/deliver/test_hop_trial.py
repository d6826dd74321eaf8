"""What `relay route test` says of the hosts of a next hop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from relay.cli import relay
from relay.deliver.hop_trial import TrialStep, try_next_hop
from relay.deliver.negotiate import SessionOptions
from relay.route.answers import NoSuchName, Unanswered
from relay.route.credentials import CredentialsError, HeldToken, RouteCredentials
from relay.route.next_hop import Auth, NextHop, TlsMode
from relay.route.router import RouteOptions, Router
from relay.route.security import SecurityOptions
from relay.sandbox.dns import DnsServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.dns import FakeDns
from tests.unit.deliver.conftest import QUICK

NAME = "mx1.dest.example"
TABLE: dict[str, Any] = {NAME: ["127.0.1.1"], "broken.example": Unanswered("SERVFAIL")}


async def steps(rig, *hosts: str, tokens=None, **keys: Any) -> list[TrialStep]:
    port = rig.servers[0].port if rig.servers else 25
    hop = NextHop("provider", (hosts or (NAME,),), port, **keys)
    logins = RouteCredentials(tokens)
    router = Router(FakeDns(hosts=TABLE), RouteOptions(), hostname="r.example", credentials=logins)
    using = SessionOptions("r.example", QUICK, rig.contexts, logins)
    return [
        step
        async for step in try_next_hop(hop, router=router, using=using, options=SecurityOptions())
    ]


def failed(found: list[TrialStep]) -> TrialStep:
    (step,) = [step for step in found if not step.is_good]
    return step


async def test_host_that_does_not_exist_is_a_failed_step_of_its_own(rig):
    await rig.mx(Script())
    found = await steps(rig, "nosuch.example", NAME)
    assert failed(found) == TrialStep("nosuch.example", "hosts", False, NoSuchName().reason)
    assert found[-1].name == "QUIT"


async def test_each_host_is_named_where_none_is_found(rig):
    found = await steps(rig, "nosuch.example", "broken.example")
    assert [(step.host, step.name, step.is_good) for step in found] == [
        ("nosuch.example", "hosts", False),
        ("broken.example", "hosts", False),
    ]
    assert [step.text for step in found] == [NoSuchName().reason, "SERVFAIL"]


@pytest.mark.parametrize(("hosts", "status"), [((NAME,), 0), (("nosuch.example", NAME), 1)])
async def test_route_test_exits_with_1_where_a_host_is_not_found(rig, tmp_path, hosts, status):
    mx = await rig.mx(Script())
    async with DnsServer() as dns:
        dns.a(NAME, mx.address)
        config = {
            "hostname": "r.example",
            "resolver": {"nameservers": [dns.nameserver], "timeout": "2s"},
            "next_hops": {"provider": {"hosts": list(hosts), "port": mx.port}},
            "routes": {"*": "provider"},
        }
        (tmp_path / "relay.yaml").write_text(yaml.safe_dump(config))
        command = ["route", "test", "provider", "-c", str(tmp_path / "relay.yaml")]
        done = await asyncio.to_thread(CliRunner().invoke, relay, command)
        assert done.exit_code == status, done.output
        is_named = "nosuch.example\n  hosts    does not exist" in done.output
        assert is_named == (status == 1), done.output


def test_route_test_refuses_a_next_hop_that_is_the_relay_itself(tmp_path):
    config = {
        "hostname": "r.example",
        "listeners": [{"address": "127.0.0.1:2525"}],
        "routes": {"*": {"host": "127.0.0.1", "port": 2525}},
    }
    (tmp_path / "relay.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(relay, ["route", "test", "*", "-c", str(tmp_path / "relay.yaml")])
    assert done.exit_code == 1, done.output
    assert done.output.startswith("  hosts ")
    assert done.output.endswith("loops back to ourselves\n")


class NoTokens:
    async def token(self, name: str) -> HeldToken:
        raise CredentialsError("oauth2.app: no token: it is down", "4.7.0")

    async def anew(self, name: str, refused: str) -> HeldToken:
        raise AssertionError(name)


async def test_token_that_is_not_there_is_a_step_of_its_own(rig):
    auth = Auth(username="us", oauth2="app")
    found = await steps(rig, auth=auth, tokens=NoTokens())
    assert found == [TrialStep("", "token", False, "oauth2.app: no token: it is down")]


async def test_refused_login_names_mechanism_and_user(rig, tmp_path):
    (tmp_path / "password").write_text("open sesame\n")
    await rig.mx(Script(offers=("AUTH PLAIN",), replies={"AUTH": "535 5.7.8 no"}))
    auth = Auth(username="app", password_file=str(tmp_path / "password"))
    step = failed(await steps(rig, auth=auth))
    assert step.name == "login"
    assert step.text.startswith(f"PLAIN as app: {NAME} ")
    assert "535" in step.text


async def test_host_that_offers_auth_where_none_is_configured_is_said(rig):
    await rig.mx(Script(offers=("AUTH PLAIN LOGIN",)))
    (login,) = [step for step in await steps(rig) if step.name == "login"]
    assert login.text == "no auth is configured, but the host offers AUTH LOGIN PLAIN"


async def test_implicit_tls_to_a_port_that_begins_in_clear_names_the_key(rig):
    await rig.mx(Script(starttls=StartTls.ABSENT))
    step = failed(await steps(rig, tls=TlsMode.IMPLICIT))
    assert step.text.endswith("begins in clear: write tls: starttls"), step


async def test_starttls_to_a_port_of_implicit_tls_names_the_key(rig, monkeypatch):
    mx = await rig.mx(Script(replies={"GREETING": ScriptedReply(None, then=Then.CLOSE)}))
    monkeypatch.setattr("relay.deliver.hop_trial._IMPLICIT_PORT", mx.port)
    step = failed(await steps(rig))
    assert step.text.endswith("speaks TLS from the first octet: write tls: implicit"), step
