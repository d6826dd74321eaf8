"""A relay watched from outside: metrics, health, wrong passwords, reloads, signatures, an older
queue.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import signal
import smtplib
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dkim
import pytest
import trustme
import yaml
from argon2 import PasswordHasher
from prometheus_client.parser import text_string_to_metric_families

from relay.sandbox.script import Script
from relay.sign.keys import dns_record, new_key
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-for-tests"


def get(port: int, path: str, key: str = KEY) -> tuple[int, str]:
    """What the HTTP interface answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if key:
        request.add_header(
            "Authorization", f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"
        )
    try:
        with urllib.request.urlopen(request, timeout=patient(20)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def numbers(port: int) -> dict[str, float]:
    """The metrics, by name and labels."""
    status, text = get(port, "/metrics")
    assert status == 200
    return {
        sample.name + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- metrics and health ---------------------------------------------------------------------------


@pytest.mark.needs("promtool")
async def test_promtool_accepts_metrics_and_alerts(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    http = free_port()
    await sandbox.start(admin={"http": f"127.0.0.1:{http}", "api_keys": [KEY]})
    await sandbox.submit("a@client.example", "b@dest.example")
    await mx.wait_for_messages(1)
    await sandbox.attempts("b@dest.example")
    _, metrics = await asyncio.to_thread(get, http, "/metrics")
    rules = ROOT / "docs/alerts.yml"
    for arguments, text in ((["metrics"], metrics), (["rules", str(rules)], "")):
        done = await asyncio.to_thread(
            subprocess.run,
            ["promtool", "check", *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    names = {family.name for family in text_string_to_metric_families(metrics)}
    named = set(re.findall(r"relay_[a-z_]+", rules.read_text(encoding="utf-8")))
    unknown = {
        name
        for name in named
        if not {name, re.sub(r"_(total|bucket|sum|count)$", "", name)} & names
    }
    assert not unknown


async def test_prometheus_reads_counters_and_gauges(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    leaf = trustme.CA().issue_cert("relay.test.example")
    (sandbox.directory / "tls.pem").write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    http = free_port()
    shown = {"address": f"127.0.0.1:{free_port()}", "tls": "starttls", "certificate": "tls.pem"}
    relay = await sandbox.start(admin={"http": f"127.0.0.1:{http}", "api_keys": [KEY]})
    relay.config["listeners"].append(shown)
    await asyncio.to_thread(relay.stop)
    await asyncio.to_thread(relay.start)
    await sandbox.submit("a@client.example", "b@dest.example")
    await sandbox.submit("a@client.example", "b@nowhere.example")
    await mx.wait_for_messages(1)
    await sandbox.attempts("b@dest.example")
    await sandbox.attempts("b@nowhere.example")
    found = await asyncio.to_thread(numbers, http)
    assert found["relay_messages_accepted_total origin=smtp"] == 2
    assert found["relay_deliveries_total result=delivered tls=true verified=true"] == 1
    assert found["relay_delay_seconds_count"] == 1
    assert found["relay_store_commit_seconds_count operation=accept"] == 2
    assert found["relay_route_seconds_count"] >= 2
    assert found["relay_routes_failed_total"] >= 1
    assert found["relay_certificate_expiry_timestamp_seconds file=tls.pem"] > time.time()
    assert found[f"relay_client_connections listener=127.0.0.1:{relay.port}"] == 0
    assert found["relay_config_reload_failed"] == 0
    assert found["relay_kept_connections"] == 1
    assert found["relay_spool_free_bytes"] > 0
    assert (await asyncio.to_thread(get, http, "/metrics", "wrong"))[0] == 401
    for path in ("/healthz", "/readyz"):
        assert await asyncio.to_thread(get, http, path, "") == (200, "ok\n")

    relay.config_file.write_text("broken: [")
    relay.signal(signal.SIGHUP)
    await asyncio.to_thread(wait_until, lambda: numbers(http)["relay_config_reload_failed"] == 1)
    await asyncio.to_thread(wait_until, lambda: numbers(http)["relay_log_lag_events"] == 0)


# --- the program's own log ------------------------------------------------------------------------


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with relay_process(tmp_path, start=False) as process:
        yield process


@pytest.mark.needs("fail2ban-regex")
def test_fail2ban_finds_who_guesses_passwords_and_nobody_else(relay: Relay, tmp_path: Path) -> None:
    http = free_port()
    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    relay.config["access"] = {"users": {"app": {"password": hasher.hash("secret")}}}
    relay.config["listeners"][0] |= {"auth": "optional", "auth_without_tls": True}
    relay.config["admin"] |= {"http": f"127.0.0.1:{http}", "api_keys": [KEY]}
    relay.start()
    names = [
        "app",
        "x client=192.0.2.9 service=smtp",
        "x'\r\n<4>auth failed: client=192.0.2.9 service=smtp",
    ]
    for name, password, reply in (
        *((name, "wrong", 535) for name in names),
        ("app", "secret", 235),
    ):
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(30)) as client:
            client.ehlo()
            answer = base64.b64encode(f"\0{name}\0{password}".encode()).decode()
            assert client.docmd("AUTH", f"PLAIN {answer}")[0] == reply
    assert get(http, "/metrics", "wrong")[0] == 401
    relay.stop()
    (tmp_path / "own.log").write_text(relay.stderr)
    done = subprocess.run(
        [
            "fail2ban-regex",
            "--raw",
            "-o",
            "ip",
            str(tmp_path / "own.log"),
            str(ROOT / "docs/fail2ban/relay.conf"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["127.0.0.1"] * 4, done.stdout + done.stderr + relay.stderr


@pytest.mark.needs("fail2ban-regex")
@pytest.mark.parametrize(
    ("line", "client"),
    [
        (
            "Jan 31 12:00:00 host relay[123]: auth failed: client=2001:db8::7 service=smtp"
            " user=b'a'",
            "2001:db8::7",
        ),
        (
            "Jan 31 12:00:00 host relay[123]: auth refused: client=192.0.2.7 service=http",
            "192.0.2.7",
        ),
        (
            "Jan 31 12:00:00 host relay[123]: [192.0.2.7]: 550: auth failed: client=192.0.2.9"
            " service=smtp",
            "",
        ),
    ],
)
def test_fail2ban_reads_the_journals_lines(tmp_path: Path, line: str, client: str) -> None:
    done = subprocess.run(
        ["fail2ban-regex", "-o", "ip", line, str(ROOT / "docs/fail2ban/relay.conf")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == client, done.stdout + done.stderr


# --- reload under load ----------------------------------------------------------------------------


async def test_a_reload_under_load_loses_nothing_and_rules_the_next_message(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("dest.example")
    relay = await sandbox.start()
    said: list[tuple[float, str, str]] = []
    over = time.monotonic() + 6.0

    async def client(number: int) -> None:
        """A message each 40 ms, and ten of us: at most 250 a second."""
        async with sandbox.client() as connection:
            count = 0
            while time.monotonic() < over:
                count += 1
                began = time.monotonic()
                recipient = f"r{number}-{count}@dest.example"
                content = (
                    f"From: a@client.example\r\nSubject: {recipient}\r\n\r\nhello\r\n".encode()
                )
                refused, text = await connection.sendmail("a@client.example", recipient, content)
                assert not refused
                assert text.startswith("2.0.0 Ok"), text
                said.append((began, recipient, text))
                await asyncio.sleep(max(0.04 - (time.monotonic() - began), 0))

    async def reloads() -> list[tuple[float, float, bool]]:
        """Each reload: when it was told, when it was done, the rule in force from then on."""
        done = []
        for round_, require in enumerate((True, False, True, False), 1):
            await asyncio.sleep(1.0)
            relay.config["policy"] = {"domains": {"client.example": {"require_tls": require}}}
            relay.config_file.write_text(yaml.safe_dump(relay.config))
            told = time.monotonic()
            relay.signal(signal.SIGHUP)
            await asyncio.to_thread(
                wait_until, lambda n=round_: relay.stderr.count("reloaded: ") == n
            )
            done.append((told, time.monotonic(), require))
        return done

    sending = [asyncio.create_task(client(number)) for number in range(10)]
    done = await reloads()
    await asyncio.gather(*sending)
    assert len(said) >= 60  # a machine with other work manages fewer than 250 a second
    await mx.wait_for_messages(len(said), timeout=60)
    await asyncio.to_thread(wait_until, lambda: len(sandbox.events(event="delivered")) == len(said))
    rules = {
        event["recipient"]: event["policy"]["require-tls"]
        for event in sandbox.events(event="accepted")
    }
    assert len(rules) == len(said)
    sent = sorted(said)
    for (_, since, require), until in zip(
        done, [*(told for told, _, _ in done[1:]), over], strict=True
    ):
        # A message that was begun before the next SIGHUP may end after it.
        between = [recipient for began, recipient, _ in sent if since <= began < until - 0.2]
        assert between
        assert {rules[recipient] for recipient in between} == {require}
    assert "error" not in relay.stderr
    print(f"{len(said) / 6.0:.0f} messages a second through four reloads")


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rsa", "ed25519"])
async def test_message_at_the_mx_has_a_valid_signature(sandbox: Sandbox, kind: str) -> None:
    mx = await sandbox.domain("dest.example")
    key = new_key(sandbox.directory / "dkim.pem", kind=kind)
    signing = {"domains": {"client.example": {"selector": "s1", "key_file": "dkim.pem"}}}
    relay = await sandbox.start(dkim=signing)
    large = "a line of some length  \r\n" * 20_000
    await sandbox.submit(
        "a@client.example", "b@dest.example", fields={"From": "A <a@client.example>"}
    )
    await sandbox.submit(
        "a@client.example",
        "c@dest.example",
        fields={"From": "a@client.example"},
        body=large + ".dot",
    )
    await sandbox.submit("a@other.example", "d@dest.example", fields={"From": "a@client.example"})
    await mx.wait_for_messages(3)

    def txt(name: bytes, timeout: int = 5) -> bytes | None:
        zone = dns_record(key, domain="client.example", selector="s1")
        published = {b"s1._domainkey.client.example.": "".join(zone.split('"')[1::2]).encode()}
        return published.get(name.rstrip(b".") + b".")

    got = {message.forward_paths[0]: message.content for message in mx.messages}
    assert dkim.verify(got["b@dest.example"], dnsfunc=txt)
    assert dkim.verify(got["c@dest.example"], dnsfunc=txt)
    assert b"DKIM-Signature" not in got["d@dest.example"]
    assert f"SIZE={len(got['b@dest.example'])}" in next(
        m.mail for m in mx.messages if m.forward_paths == ("b@dest.example",)
    ), "the size is told with the signature in it"

    old = await sandbox.domain("old.example", Script(offers=("PIPELINING",)))
    async with sandbox.client() as client:
        text = "From: a@client.example\r\nSubject: x\r\n\r\nGrüße\r\n".encode()
        await client.sendmail(
            "a@client.example", "f@old.example", text, mail_options=["BODY=8BITMIME"]
        )
    await old.wait_for_messages(1)
    assert old.messages[0].content.isascii()
    assert dkim.verify(old.messages[0].content, dnsfunc=txt), "what is signed is what was converted"
    (sandbox.directory / "dkim.pem").write_text("no key any more")
    relay.signal(signal.SIGHUP)
    await asyncio.to_thread(
        wait_until, lambda: "the configuration in force is kept" in relay.stderr
    )
    await sandbox.submit("a@client.example", "e@dest.example", fields={"From": "a@client.example"})
    await mx.wait_for_messages(4)
    [last] = [message for message in mx.messages if message.forward_paths == ("e@dest.example",)]
    assert dkim.verify(last.content, dnsfunc=txt), "the key in force is kept with its configuration"


# --- upgrade --------------------------------------------------------------------------------------


SPOOLS = sorted((ROOT / "tests/fixtures").glob("spool-*.sql"))


@pytest.mark.parametrize("dump", SPOOLS, ids=lambda path: path.stem)
async def test_the_queue_of_an_older_version_is_taken_over_and_delivered(
    sandbox: Sandbox, dump: Path
) -> None:
    mx = await sandbox.domain("dest.example")
    spool = sandbox.directory / "spool"
    spool.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(spool / "queue.db")) as db:
        db.executescript(dump.read_text(encoding="utf-8"))
    expected = json.loads(dump.with_suffix(".json").read_text())
    relay = await sandbox.start(queue={"path": "spool", "lifetime": "3650d"})
    await asyncio.to_thread(relay.run, "queue", "release", "--all")
    await asyncio.to_thread(relay.run, "queue", "retry", "--all")
    await mx.wait_for_messages(len(expected), timeout=30)
    arrived = {
        tuple(sorted(message.forward_paths)): message.content.decode() for message in mx.messages
    }
    for one in expected:
        content = arrived[tuple(sorted(one["recipients"]))]
        assert f"Subject: {one['subject']}\r\n" in content
        assert len(content) == one["size"]
    done = await asyncio.to_thread(relay.run, "queue", "list", "--json")
    assert json.loads(done.stdout) == []
