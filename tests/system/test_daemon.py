"""`relay serve` as a process: its start, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from relay.admin.client import ask
from relay.sandbox.script import Script, ScriptedReply
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_config, relay_process
from tests.rigs.sandbox import Sandbox


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """A relay without a network: what it takes, it keeps."""
    with relay_process(tmp_path, start=False, resolver={"timeout": "500ms"}) as process:
        yield process


def said(relay: Relay, text: str) -> None:
    """Wait until the relay's own log has a text."""
    wait_until(lambda: text in relay.stderr, what=f"{text!r} in the log")


def ended(relay: Relay, *, seconds: float = 30) -> int:
    """The exit code of a relay that already got a SIGTERM (this function must not send another)."""
    assert relay.process is not None
    return relay.process.wait(timeout=patient(seconds))


def submit(
    relay: Relay, recipient: str = "b@dest.example", sender: str = "a@client.example"
) -> str:
    """Hand in a message; the queue id it was answered with."""
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20)) as client:
        client.ehlo("client.example")
        client.mail(sender)
        client.rcpt(recipient)
        code, text = client.data("Subject: hello\r\n\r\nbody\r\n")
    assert code == 250, text
    return text.decode().split()[-1]


def listed(relay: Relay, *filters: str) -> list[dict[str, Any]]:
    done = relay.run("queue", "list", "--json", *filters)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


# --- start ----------------------------------------------------------------------------------------


def test_the_service_manager_hears_of_start_life_reload_and_end(
    relay: Relay, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(patient(15))
        relay.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}
        relay.start()
        heard = [manager.recv(4096).decode() for _ in range(3)]
        assert heard[0].startswith("READY=1\nSTATUS=relay.test.example relays from 127.0.0.1:")
        assert heard[1:] == ["WATCHDOG=1"] * 2
        relay.signal(signal.SIGHUP)
        after = wait_for(manager, "RELOADING=1")
        assert "MONOTONIC_USEC=" in after
        wait_for(manager, "READY=1")
        relay.signal(signal.SIGTERM)
        wait_for(manager, "STOPPING=1")
    assert ended(relay) == 0


def wait_for(manager: socket.socket, word: str) -> str:
    while word not in (heard := manager.recv(4096).decode()):
        pass
    return heard


def serve(directory: Path, config: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """A relay that is expected to end by itself."""
    (directory / "bad.yaml").write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, "-m", "relay", "serve", "-c", "bad.yaml"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=patient(30),
        check=False,
    )


def test_failed_start_says_its_reason_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            f"listener 127.0.0.1:{port}: address already in use": {"port": port},
            "queue.path: ": {"queue": {"path": "file"}},
            "queue.path: queue directory /proc/spool": {"queue": {"path": "/proc/spool"}},
            "listener 203.0.113.7:25: ": {"listeners": [{"address": "203.0.113.7:25"}]},
            "admin.socket: file is there and is no socket": {"admin": {"socket": "file"}},
        }
        for text, wrong in cases.items():
            config = relay_config(port=free_port(), dns="127.0.0.1:9", delivery_port=9)
            if "port" in wrong:
                config["listeners"] = [{"address": f"127.0.0.1:{wrong['port']}"}]
            else:
                config |= wrong
            done = serve(tmp_path, config)
            assert done.returncode == 1
            assert f"error cannot start: {text}" in done.stderr, done.stderr
            assert "Traceback" not in done.stderr


def test_a_broken_configuration_does_not_start(tmp_path: Path) -> None:
    done = serve(tmp_path, {"hostnme": "a.example", "limits": {"idle": 5}})
    assert done.returncode == 1
    assert 'error bad.yaml:1: hostnme: unknown key; did you mean "hostname"?' in done.stderr
    assert "error bad.yaml:3: limits.idle: " in done.stderr


def test_a_second_relay_does_not_take_the_queue_of_the_first(relay: Relay, tmp_path: Path) -> None:
    relay.start()
    other = {
        **relay.config,
        "listeners": [{"address": f"127.0.0.1:{free_port()}"}],
        "admin": {"socket": "other"},
    }
    done = serve(tmp_path, other)
    assert done.returncode == 1
    assert "cannot start: queue.path: " in done.stderr
    assert "Traceback" not in done.stderr
    assert listed(relay) == []


def test_files_of_the_relay_are_for_its_user_only(relay: Relay, tmp_path: Path) -> None:
    relay.start()
    submit(relay)
    wait_until(lambda: (tmp_path / "log/delivery.log").exists(), what="the delivery log")
    written = [path for path in tmp_path.rglob("*") if path.name not in ("relay.yaml", "stderr")]
    assert len(written) >= 6
    assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_relay_accepts_fewer_connections_where_few_files_may_be_open(relay: Relay) -> None:
    limit = 256
    relay.wrapper = ["prlimit", f"--nofile={limit}:{limit}"]
    relay.start()
    said(relay, "only 256 files may be open and 2590 are needed")
    with contextlib.ExitStack() as clients:
        greetings = []
        for _ in range(200):
            client = clients.enter_context(
                socket.create_connection(("127.0.0.1", relay.port), timeout=patient(20))
            )
            greetings.append(client.recv(100)[:3])
        assert set(greetings) == {b"220", b"421"}
        assert listed(relay) == [], "the control socket still answers"
    wait_until(lambda: submit(relay), what="a message being taken again")


def test_the_programs_own_log_can_be_json(relay: Relay) -> None:
    relay.config["log"] |= {"format": "json"}
    relay.start()
    said(relay, "ready")
    lines = [json.loads(line) for line in relay.stderr.splitlines()]
    [ready] = [line for line in lines if " ready: " in line["message"]]
    assert ready["level"] == "info"
    assert ready["message"].startswith("relay ")


# --- SIGHUP ---------------------------------------------------------------------------------------


async def test_a_reload_takes_policy_and_routes_over_and_says_so(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    other = await sandbox.host("other.example")
    relay = await sandbox.start()
    await sandbox.submit("a@client.example", "before@dest.example")
    await mx.wait_for_messages(1)
    relay.config["policy"] = {"domains": {"client.example": {"skip_verification": True}}}
    relay.config["routes"] = {"dest.example": {"host": f"[{other.address}]", "port": other.port}}
    relay.config["limits"] = {"recipients": 7}
    relay.config_file.write_text(yaml.safe_dump(relay.config))
    relay.signal(signal.SIGHUP)
    await asyncio.to_thread(
        said,
        relay,
        "reloaded: changed: policy.domains.client.example, routes.dest.example; "
        "only after a restart: limits.recipients",
    )
    await sandbox.submit("a@client.example", "after@dest.example")
    await other.wait_for_messages(1)
    [event] = await sandbox.attempts("after@dest.example")
    assert event["policy"]["skip-verification-source"] == "domain"
    assert event["delivery-status"]["certificate-verified"] is False


@pytest.mark.parametrize("broken", ["policy: [", "fly: high", "policy: {}\npolicy: {}", None])
async def test_reload_of_a_broken_file_keeps_the_configuration_in_force(
    sandbox: Sandbox, broken: str | None
) -> None:
    mx = await sandbox.domain("dest.example")
    relay = await sandbox.start(policy={"default": {"require_tls": True}})
    if broken is None:
        relay.config_file.unlink()
    else:
        relay.config_file.write_text(broken)
    relay.signal(signal.SIGHUP)
    await asyncio.to_thread(said, relay, "reload: the configuration in force is kept")
    assert "error reload: " in relay.stderr
    await sandbox.submit("a@client.example", "b@dest.example")
    await mx.wait_for_messages(1)
    [event] = await sandbox.attempts("b@dest.example")
    assert event["policy"]["require-tls"] is True
    assert await asyncio.to_thread(relay.stop) == 0


@pytest.mark.parametrize("door", ["smtp", "http"])
def test_a_new_certificate_is_shown_after_a_reload_and_a_broken_one_is_not(
    relay: Relay, tmp_path: Path, door: str
) -> None:
    authority = trustme.CA()
    http = free_port()

    def issue() -> None:
        leaf = authority.issue_cert("relay.test.example")
        (tmp_path / "tls.pem").write_bytes(leaf.private_key_and_cert_chain_pem.bytes())

    def shown() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with contextlib.ExitStack() as stack:
            if door == "smtp":
                client = stack.enter_context(
                    smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20))
                )
                client.starttls(context=context)
                protected = client.sock
            else:
                plain = stack.enter_context(
                    socket.create_connection(("127.0.0.1", http), timeout=patient(20))
                )
                protected = stack.enter_context(context.wrap_socket(plain))
            assert isinstance(protected, ssl.SSLSocket)
            certificate = protected.getpeercert(binary_form=True)
            assert certificate is not None
            return certificate

    issue()
    if door == "smtp":
        relay.config["listeners"][0] |= {"tls": "starttls", "certificate": "tls.pem"}
    else:
        relay.config["admin"] |= {
            "http": f"127.0.0.1:{http}",
            "api_keys": ["k"],
            "certificate": "tls.pem",
        }
    relay.start()
    first = shown()
    [metrics] = ask(tmp_path / "relay.sock", {"verb": "metrics"})
    assert 'relay_certificate_expiry_timestamp_seconds{file="tls.pem"}' in metrics["done"]["text"]
    issue()
    relay.signal(signal.SIGHUP)
    said(relay, "reloaded: ")
    second = shown()
    assert second != first
    (tmp_path / "tls.pem").write_text("no certificate")
    relay.signal(signal.SIGHUP)
    said(relay, "the configuration in force is kept")
    assert shown() == second


def test_relay_begins_a_new_delivery_log_after_the_old_one_was_moved(
    relay: Relay, tmp_path: Path
) -> None:
    relay.start()
    submit(relay)
    log = tmp_path / "log/delivery.log"
    wait_until(lambda: log.exists() and log.read_text(), what="the first line")
    log.rename(tmp_path / "log/old")
    relay.signal(signal.SIGHUP)
    queue_id = submit(relay)
    wait_until(
        lambda: relay.events(event="accepted", queue_id=queue_id), what="a line in the new file"
    )
    assert queue_id not in (tmp_path / "log/old").read_text()


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_relay_exits_with_0_after_a_signal(
    relay: Relay, tmp_path: Path, number: signal.Signals
) -> None:
    relay.start()
    submit(relay)
    relay.signal(number)
    assert ended(relay) == 0
    assert relay.stderr.rstrip().endswith("info ended")
    assert not (tmp_path / "relay.sock").exists()
    assert len(listed(relay)) == 1, "the queue of a stopped relay can be looked at"
    relay.start()
    assert len(listed(relay)) == 1


async def test_a_delivery_under_way_is_finished_before_the_end(sandbox: Sandbox) -> None:
    slow = Script(replies={"CONTENT": ScriptedReply("250 2.0.0 at last", delay=1.5)})
    mx = await sandbox.domain("slow.example", slow)
    relay = await sandbox.start()
    await sandbox.submit("a@client.example", "b@slow.example")
    async with asyncio.timeout(patient(15)):
        while not mx.connections or "DATA" not in mx.connections[0].verbs:
            await asyncio.sleep(0.02)
    relay.signal(signal.SIGTERM)
    assert await asyncio.to_thread(ended, relay) == 0
    assert len(mx.messages) == 1
    [event] = sandbox.events(event="delivered")
    assert event["delivery-status"]["message"] == "2.0.0 at last"
    assert await asyncio.to_thread(listed, relay) == []


async def test_a_client_in_the_middle_of_a_message_may_finish_it(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    relay = await sandbox.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"EHLO client.example\r\n")
    await reader.readuntil(b"250 ")
    writer.write(b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@dest.example>\r\nDATA\r\n")
    await reader.readuntil(b"354 ")
    writer.write(b"Subject: half\r\n\r\n")
    relay.signal(signal.SIGTERM)
    await asyncio.to_thread(said, relay, "SIGTERM: draining")
    await asyncio.sleep(0.2)
    writer.write(b"the other half\r\n.\r\n")
    await asyncio.wait_for(reader.readuntil(b"250 2.0.0"), patient(10))
    writer.close()
    assert await asyncio.to_thread(ended, relay) == 0
    assert len(mx.messages) + len(await asyncio.to_thread(listed, relay)) == 1


async def test_a_second_signal_ends_it_at_once_and_nothing_is_lost(sandbox: Sandbox) -> None:
    deaf = Script(replies={"MAIL": ScriptedReply("250 OK", delay=60)})
    mx = await sandbox.domain("deaf.example", deaf, Script())
    relay = await sandbox.start()
    await sandbox.submit("a@client.example", "b@deaf.example")
    async with asyncio.timeout(patient(15)):
        while not mx.connections:
            await asyncio.sleep(0.02)
    relay.signal(signal.SIGTERM)
    await asyncio.to_thread(said, relay, "SIGTERM: draining")
    relay.signal(signal.SIGTERM)
    assert await asyncio.to_thread(ended, relay, seconds=30) == 1
    assert "SIGTERM again: ending at once" in relay.stderr
    await asyncio.to_thread(relay.start)
    await mx.wait_for_messages(1)


# --- the whole way --------------------------------------------------------------------------------


async def test_deferred_mail_is_delivered_after_the_operators_retry(sandbox: Sandbox) -> None:
    refusing = Script(replies={"RCPT": "450 4.2.1 mailbox busy"})
    mx = await sandbox.domain("dest.example", refusing, Script())
    relay = await sandbox.start()
    await sandbox.submit("a@client.example", "b@dest.example")
    [event] = await sandbox.attempts("b@dest.example")
    assert (event["event"], event["severity"]) == ("failed", "temporary")
    [item] = await asyncio.to_thread(listed, relay)
    [recipient] = item["recipients"]
    assert item["state"] == recipient["state"] == "deferred"
    assert recipient["last"]["message"] == "4.2.1 mailbox busy"
    assert recipient["attempts"] == 1

    assert await asyncio.to_thread(relay.stop) == 0
    await asyncio.to_thread(relay.start)
    assert len(await asyncio.to_thread(listed, relay, "--state", "deferred")) == 1
    done = await asyncio.to_thread(relay.run, "queue", "retry", "--domain", "dest.example")
    assert done.stdout == "retry: 1 recipient\n"
    await mx.wait_for_messages(1)
    _, second = await sandbox.attempts("b@dest.example", 2)
    assert second["event"] == "delivered"
    assert second["delivery-status"]["attempt-no"] == 2
    shown = await asyncio.to_thread(relay.run, "log", "--recipient", "b@dest.example")
    assert "TLS verified, mx.dest.example: 250 2.0.0 OK" in shown.stdout


async def test_the_log_is_followed_while_mail_flows(sandbox: Sandbox) -> None:
    await sandbox.domain("dest.example")
    relay = await sandbox.start()
    following = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay", "log", "-c", str(relay.config_file), "--follow", "--json"),
        cwd=relay.directory,
        stdout=asyncio.subprocess.PIPE,
        # A shell starts what runs in its background with SIGINT ignored, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert following.stdout is not None
    try:
        await asyncio.sleep(0.5)
        await sandbox.submit("a@client.example", "b@dest.example")
        names = [
            json.loads(await asyncio.wait_for(following.stdout.readline(), patient(15)))["event"]
            for _ in range(2)
        ]
        assert names == ["accepted", "delivered"]
        following.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(following.wait(), patient(10)) == 0
    finally:
        if following.returncode is None:
            following.kill()
            await following.wait()
