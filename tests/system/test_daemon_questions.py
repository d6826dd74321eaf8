"""`relay explain` and `relay probe`, asked about hosts of every kind."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import yaml

from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script, StartTls
from tests.rigs.ports import wait_until
from tests.rigs.sandbox import Sandbox


async def asked(sandbox: Sandbox, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert sandbox.relay is not None
    done = await asyncio.to_thread(sandbox.relay.run, *arguments, "--json")
    assert done.returncode == code, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def test_probe_shows_the_tls_of_each_host(sandbox: Sandbox) -> None:
    await sandbox.start()
    hosts = [
        await sandbox.host("good.dest.example", Script()),
        await sandbox.host("expired.dest.example", Script(certificate=Kind.EXPIRED)),
        await sandbox.host("clear.dest.example", Script(starttls=StartTls.ABSENT)),
    ]
    sandbox.dns.a("dead.dest.example", "127.7.9.9")
    names = [*(host.name for host in hosts), "dead.dest.example"]
    sandbox.dns.mx("dest.example", *((10 * place, name) for place, name in enumerate(names, 1)))
    answer = await asked(sandbox, "probe", "dest.example", "--timeout", "5s")
    good, expired, clear, dead = answer["hosts"]
    assert [host["host"] for host in answer["hosts"]] == names
    assert (good["tls-offered"], good["verified"], good["tls-version"]) == (True, True, "TLSv1.3")
    assert good["certificate"]["names"] == ["good.dest.example"]
    assert [rule["would-send"] for rule in good["rules"]] == [True] * 4
    assert (expired["verified"], "expired" in expired["why-not-verified"]) == (False, True)
    assert [rule["unmet"] for rule in expired["rules"]] == ["", "", "4.7.5", ""]
    assert clear["tls-offered"] is False
    assert [rule["unmet"] for rule in clear["rules"]] == ["", "", "4.7.4", "4.7.4"]
    assert dead["trouble"]
    for host in hosts:
        assert not any(
            verb in ("MAIL", "RCPT", "DATA") for each in host.connections for verb in each.verbs
        )


async def test_probe_prints_text_for_people(sandbox: Sandbox) -> None:
    await sandbox.domain("dest.example", Script(certificate=Kind.WRONG_NAME))
    relay = await sandbox.start()
    done = await asyncio.to_thread(relay.run, "probe", "dest.example")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "MTA-STS: no policy"
    assert lines[1].startswith("  1. mx.dest.example [127.7.0.1]:")
    assert "TLSv1.3" in lines[2]
    assert lines[2].endswith("not verified")
    assert "     certificate not verified: Hostname mismatch" in done.stdout
    assert lines[-5:] == [
        "       require-tls  skip-verification",
        "       no           no                 sent in clear over a new connection",
        "       no           yes                sent in TLS, unverified",
        "       yes          no                 not sent here; deferred 4.7.5 if no other host has"
        " better",
        "       yes          yes                sent in TLS, unverified",
    ]


async def test_probe_and_explain_of_a_domain_without_a_host_exit_with_1(sandbox: Sandbox) -> None:
    await sandbox.start()
    sandbox.dns.mx("nomail.example", (0, "."))
    answer = await asked(sandbox, "probe", "nomail.example", code=1)
    assert answer["no-route"]["status"] == "5.1.10"
    answer = await asked(
        sandbox, "explain", "--from", "a@x.example", "--to", "b@nomail.example", code=1
    )
    assert answer["no-route"]["status"] == "5.1.10"


async def test_explain_says_when_the_running_relay_goes_by_other_rules_than_the_file(
    sandbox: Sandbox,
) -> None:
    await sandbox.domain("dest.example")
    relay = await sandbox.start()
    question = ("explain", "--from", "a@x.example", "--to", "b@dest.example")
    assert (await asyncio.to_thread(relay.run, *question)).stderr == ""
    relay.config["policy"] = {"default": {"require_tls": True}}
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    answer = await asyncio.to_thread(relay.run, *question)
    assert "require-tls:       yes" in answer.stdout
    assert "has not taken over what it says of policy (" in answer.stderr
    relay.signal(signal.SIGHUP)

    def is_taken_over() -> bool:
        return not relay.run(*question).stderr

    await asyncio.to_thread(wait_until, is_taken_over)


async def test_explain_says_the_hosts_in_order_and_connects_to_none(sandbox: Sandbox) -> None:
    first, second = await sandbox.host("mx1.dest.example"), await sandbox.host("mx2.dest.example")
    sandbox.dns.mx("dest.example", (20, second.name), (10, first.name))
    await sandbox.start(policy={"domains": {"*.client.example": {"require_tls": True}}})
    answer = await asked(
        sandbox, "explain", "--from", "a@sub.client.example", "--to", "b@dest.example"
    )
    assert [(host["host"], host["preference"]) for host in answer["hosts"]] == [
        (first.name, 10),
        (second.name, 20),
    ]
    assert answer["policy"]["require-tls"] == {
        "value": True,
        "source": "domain",
        "rule": "*.client.example",
    }
    assert (
        "no STARTTLS offered: not sent here; deferred 4.7.4 if no other host has better"
        in answer["hosts"][0]["rules"]
    )
    assert first.connections == second.connections == []
