"""What happens to the process: signals, a clock that jumps, too few files. None is lost, none
stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from relay.sandbox.script import Script, ScriptedReply, StartTls
from tests.fakes.waiting import patient
from tests.rigs.cgroup import MemoryGroup, memory_group
from tests.rigs.ledger import LARGE, LINES, Ledger, check_agreement, check_log, listed, tokens
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sandbox import Sandbox, shown
from tests.rigs.sink import Sink, sink

QUICK: dict[str, Any] = {"queue": {"retry": ["1s"]}}
LAST_LINE = b"x\r\n"


def streaming(relay: Relay, ledger: Ledger, count: int, **more: Any) -> threading.Thread:
    """A stream of messages beside the test."""
    stream = threading.Thread(target=ledger.stream, args=(relay, tokens(count)), kwargs=more)
    stream.start()
    return stream


def _has_grown(ledger: Ledger, beyond: int) -> bool:
    return len(ledger.accepted) > beyond


def in_full(mx: Sink) -> bool:
    """Whether nothing arrived cut short."""
    return all(content.endswith(LINES[-78:].encode()) for content in mx.contents)


@pytest.mark.parametrize("rounds", [3])
def test_client_gets_250_or_421_from_a_relay_that_is_terminated_under_load(
    tmp_path: Path, mx: Sink, rounds: int
) -> None:
    ledger = Ledger()
    with relay_process(tmp_path, routes=mx.route, **QUICK) as relay:
        for number in range(rounds):
            stream = streaming(relay, ledger, 3000, clients=8)
            wait_until(
                partial(_has_grown, ledger, len(ledger.accepted) + 40 + 80 * number),
                what="the stream",
            )
            began = time.monotonic()
            assert relay.stop() == 0
            assert time.monotonic() - began < 40, "less than what is under way may take"
            stream.join(timeout=patient(60))
            relay.start()
        assert set(ledger.codes.values()) <= {0, 250, 421, 451}, set(ledger.codes.values())
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        ledger.check_refused(mx)
        assert in_full(mx)
        assert ledger.duplicates(mx) == 0
        assert check_log(relay) == len(ledger.accepted)


ENVELOPE = ("MAIL FROM:<a@client.example>", "RCPT TO:<b@dest.example>")


@pytest.mark.parametrize("seconds", [3])
def test_a_relay_that_was_stopped_for_a_while_goes_on(tmp_path: Path, seconds: int) -> None:
    """As a suspended machine: timers that ran out meanwhile end a session at most."""
    waits: dict[str, Any] = {
        "limits": {"idle": "2s"},
        "delivery": {"timeouts": {"command": "2s", "final_reply": "2s"}},
    }
    with (
        sink(idle_seconds=2) as mx,
        relay_process(tmp_path, routes=mx.route, **QUICK, **waits) as relay,
    ):
        ledger, late = Ledger(), tokens(5)
        with ledger.crowd(relay, clients=6):
            wait_until(lambda: len(ledger.accepted) > 60, what="the stream")
            silent = [begun(relay, *ENVELOPE[:steps]) for steps in range(3)]
            silent.append(begun(relay, *ENVELOPE, "DATA"))
            speaking = {token: begun(relay, *ENVELOPE, "DATA") for token in late}
            mx.last_word.clear()  # some deliveries stand behind their final dot
            time.sleep(0.2)
            relay.signal(signal.SIGSTOP)
            for token, client in speaking.items():
                client.sendall(f"Subject: {token}\r\n\r\n{LINES}.\r\n".encode())
            time.sleep(seconds)
            relay.signal(signal.SIGCONT)
            for token, client in speaking.items():
                ledger.codes[token], ledger.texts[token] = last_reply(client)
            assert {ledger.codes[token] for token in late} <= {250, 421}
            assert {last_reply(client)[0] for client in silent} == {421}
            mx.last_word.set()
            taken = len(ledger.accepted)
            wait_until(lambda: len(ledger.accepted) > taken + 20, what="mail that flows again")
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        ledger.check_refused(mx)
        assert in_full(mx)
        check_agreement(relay, mx)
        # The host has what it was not heard to take: that is not delivered, and may come twice.
        failed = relay.events(event="failed", severity="temporary")
        in_doubt = sum("in-doubt" in event["delivery-status"] for event in failed)
        assert 0 < ledger.duplicates(mx) <= in_doubt
        sys.stderr.write(
            f"\nstopped for {seconds} s: {len(ledger.accepted)} taken, {in_doubt} deliveries in"
            " doubt,"
            f" {ledger.duplicates(mx)} came twice;"
            f" {sum(ledger.codes[token] == 250 for token in late)} of 5"
            " that had said all meanwhile heard 250\n"
        )


def begun(relay: Relay, *commands: str) -> socket.socket:
    """A session that has come so far."""
    client = socket.create_connection(("127.0.0.1", relay.port), timeout=patient(20))
    assert client.recv(500).startswith(b"220")
    for command in ("HELO client.example", *commands):
        client.sendall(f"{command}\r\n".encode())
        assert client.recv(500)[:1] in b"23"
    return client


def last_reply(client: socket.socket) -> tuple[int, str]:
    """The next reply; 0 where there is none."""
    with client, client.makefile("rb") as replies:
        line = replies.readline().decode().strip()
    return int(line[:3] or 0), line


# --- the clock ------------------------------------------------------------------------------------


def set_clock(directory: Path, days: int) -> None:
    (directory / "clock.new").write_text(str(days * 86400))
    os.replace(directory / "clock.new", directory / "clock")


@pytest.mark.parametrize("days", [30, -30])
async def test_a_clock_that_jumps_neither_bounces_mail_nor_holds_it_up(
    sandbox: Sandbox, days: int
) -> None:
    replies = {"RCPT": "450 4.2.1 busy"}
    mx = await sandbox.domain("dest.example", Script(replies=replies))
    sender = await sandbox.domain("client.example")
    relay = await sandbox.prepare(queue={"retry": ["1s"], "lifetime": "5d", "warn_after": "never"})
    relay.program = ("tests.rigs.clock_relay", str(sandbox.directory / "clock"))
    set_clock(sandbox.directory, 0)
    await asyncio.to_thread(relay.start)
    words = [await sandbox.submit("a@client.example", f"b{n}@dest.example") for n in range(5)]
    for n in range(5):
        await sandbox.attempts(f"b{n}@dest.example", 1)
    async with sandbox.client() as client:  # a session during which the clock jumps
        await client.ehlo()
        set_clock(sandbox.directory, days)
        words.append(await sandbox.submit("a@client.example", "b5@dest.example", client=client))
    for n in range(6):  # tried again, within little more than a wait of real time
        seen = len(await sandbox.attempts(f"b{n}@dest.example", 1))
        await sandbox.attempts(f"b{n}@dest.example", seen + 1)
    # And back, seen at a start only.
    await asyncio.to_thread(relay.stop)
    set_clock(sandbox.directory, 0)
    await asyncio.to_thread(relay.start)
    for n in range(6):
        seen = len(await sandbox.attempts(f"b{n}@dest.example", 1))
        await sandbox.attempts(f"b{n}@dest.example", seen + 1)
    assert [event for event in sandbox.events() if event.get("severity") == "permanent"] == []
    del replies["RCPT"]
    await mx.wait_for_messages(6, timeout=patient(20))
    contents = b"".join(message.content for message in mx.messages)
    assert all(contents.count(f"Subject: {word}\r\n".encode()) == 1 for word in words)
    assert sender.messages == []


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.needs("prlimit")
def test_400_clients_with_256_files_cost_no_mail(tmp_path: Path, mx: Sink) -> None:
    with relay_process(
        tmp_path,
        routes=mx.route,
        wrapper=("prlimit", "--nofile=256"),
        limits={"connections_per_client": 1000},
    ) as relay:
        ledger = Ledger()
        first = smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(30))
        first.ehlo("client.example")
        greetings: list[bytes] = []
        crowd: list[socket.socket] = []
        for _ in range(400):
            client = socket.create_connection(("127.0.0.1", relay.port), timeout=patient(10))
            crowd.append(client)
            with contextlib.suppress(OSError):
                greetings.append(client.recv(200))
        told = {greeting[:3] for greeting in greetings if greeting}
        assert told == {b"220", b"421"}
        # Who is in, is served; queue and log can still be written.
        (token,) = tokens(1)
        ledger.codes[token] = 0
        ledger.one(first, token, "a@client.example", "b@dest.example", LINES)
        assert token in ledger.accepted, ledger.texts
        ledger.settle(relay, mx)
        assert listed(relay) == []  # the control socket answers
        wait_until(lambda: len(relay.events(event="delivered")) == 1, what="a line in the log")
        for client in crowd:
            client.close()
        first.close()
        again = Ledger()
        wait_until(lambda: _is_taken(again, relay), what="a new client")
        again.settle(relay, mx)
        assert "Traceback" not in relay.stderr
        sys.stderr.write(
            f"\n256 files, 400 clients: {sum(g.startswith(b'220') for g in greetings)} served,"
            f" {sum(g.startswith(b'421') for g in greetings)} told 421\n"
        )


# --- the last answer ------------------------------------------------------------------------------


async def test_message_whose_final_reply_is_lost_is_logged_in_doubt_and_tried_again(
    sandbox: Sandbox,
) -> None:
    silent = Script(replies={"CONTENT": ScriptedReply(None, delay=30)})
    mx = await sandbox.domain("dest.example", silent, Script())
    second = await sandbox.host("mx2.dest.example")
    sandbox.dns.mx("dest.example", (10, mx.name), (20, second.name))
    await sandbox.start(delivery={"timeouts": {"final_reply": "1s"}}, queue={"retry": ["1s"]})
    await sandbox.submit("a@client.example", "b@dest.example")
    first, then = await sandbox.attempts("b@dest.example", 2)
    assert (first["event"], first["severity"]) == ("failed", "temporary")
    assert first["delivery-status"]["in-doubt"] is True
    assert then["event"] == "delivered"
    assert second.connections == [], "another host was given what the first may have"


async def test_slow_host_that_makes_progress_is_not_cut_off(sandbox: Sandbox) -> None:
    """Each wait is for progress; no clock runs for the whole."""
    waits = {"command": "4s", "data_block": "2s", "final_reply": "3s", "greeting": "3s"}
    slow = Script(
        starttls=StartTls.ABSENT,
        read_bytes_per_second=60_000,
        replies={
            "GREETING": ScriptedReply("220 mx ESMTP", delay=1.5),
            "MAIL": ScriptedReply("250 2.1.0 OK", delay=1),
            "CONTENT": ScriptedReply("250 2.0.0 OK", delay=2),
        },
    )
    mx = await sandbox.domain("dest.example", slow)
    await sandbox.start(delivery={"timeouts": waits})
    await sandbox.submit("a@client.example", "b@dest.example", body=("y" * 70 + "\r\n") * 4000)
    began = time.monotonic()
    (only,) = await sandbox.attempts("b@dest.example", 1, seconds=60)
    assert only["event"] == "delivered", shown(only)
    assert time.monotonic() - began > 6, "not slow enough to mean anything"
    assert len(mx.messages) == 1


def _is_taken(ledger: Ledger, relay: Relay) -> bool:
    ledger.hand_in(relay, tokens(1))
    return bool(ledger.accepted)


def peak_rss(pid: int) -> int:
    """The most memory a process has had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def send_raw(port: int, payload: bytes) -> bytes:
    """One message, without a copy more than needed; the last reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=patient(90)) as client:
        replies = client.makefile("rb")
        replies.readline()
        for line in (
            b"HELO client.example",
            b"MAIL FROM:<a@client.example>",
            b"RCPT TO:<b@dest.example>",
            b"DATA",
        ):
            client.sendall(line + b"\r\n")
            replies.readline()
        client.sendall(payload)
        return replies.readline()


@pytest.mark.needs("smtp-sink")
def test_memory_does_not_grow_with_the_size_of_mail(tmp_path: Path) -> None:
    payload = b"Subject: large\r\n\r\n" + (b"z" * 76 + b"\r\n") * (30_000_000 // 78) + b".\r\n"
    port = free_port()
    host = subprocess.Popen(["smtp-sink", "-u", "nobody", f"127.0.0.1:{port}", "100"])
    try:
        to_host = {"*": {"host": "[127.0.0.1]", "port": port}}
        with relay_process(tmp_path, routes=to_host, limits={"message_size": "50MiB"}) as relay:
            assert send_raw(relay.port, b"Subject: small\r\n\r\n.\r\n").startswith(b"250")
            wait_until(lambda: relay.events(event="delivered"), what="a delivery")
            before = peak_rss(relay.pid)
            with ThreadPoolExecutor(5) as clients:
                replies = list(clients.map(lambda _: send_raw(relay.port, payload), range(10)))
            assert all(reply.startswith(b"250") for reply in replies)
            wait_until(
                lambda: len(relay.events(event="delivered")) == 11,
                seconds=60,
                what="ten deliveries",
            )
            peak = peak_rss(relay.pid)
    finally:
        host.terminate()
        host.wait(timeout=patient(10))
    sys.stderr.write(
        f"\n10 messages of 30 MB: peak RSS {peak >> 20} MiB, {(peak - before) >> 20} MiB more than"
        " before\n"
    )
    assert peak - before < 64 * 1024 * 1024


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(memory_group())
        except OSError as error:
            pytest.skip(f"no control group for memory to be had here: {error}")
        yield made


@pytest.mark.needs("root", "smtp-sink")
@pytest.mark.torture
def test_50_large_messages_at_once_fit_into_little_memory(
    tmp_path: Path, group: MemoryGroup, long_form: bool
) -> None:
    """Taken or put off, and nobody is killed."""
    size_mb, limit_mib = (32, 300) if long_form else (2, 130)
    group.limit(limit_mib << 20)
    payload = (
        b"Subject: large\r\n\r\n" + (b"z" * 76 + b"\r\n") * (size_mb * 1_000_000 // 78) + b".\r\n"
    )
    port = free_port()
    host = subprocess.Popen(["smtp-sink", "-u", "nobody", f"127.0.0.1:{port}", "100"])
    try:
        to_host = {"*": {"host": "[127.0.0.1]", "port": port}}
        with relay_process(tmp_path, routes=to_host, wrapper=group.enter) as relay:
            with ThreadPoolExecutor(50) as clients:
                replies = list(clients.map(lambda _: send_raw(relay.port, payload), range(50)))
            assert {reply[:3] for reply in replies} <= {b"250", b"452"}, set(replies)
            taken = sum(reply.startswith(b"250") for reply in replies)
            wait_until(
                lambda: len(relay.events(event="delivered")) == taken,
                seconds=100,
                what="their delivery",
            )
            peak = peak_rss(relay.pid)
            assert relay.stop() == 0
        assert group.oom_kills == 0
    finally:
        host.terminate()
        host.wait(timeout=patient(10))
    sys.stderr.write(
        f"\n50 messages of {size_mb} MB at once, {limit_mib} MiB allowed:"
        f" {taken} taken, peak RSS {peak >> 20} MiB\n"
    )


@pytest.mark.needs("root")
def test_accepted_mail_survives_the_out_of_memory_killer(
    tmp_path: Path, mx: Sink, group: MemoryGroup
) -> None:
    with relay_process(tmp_path, routes=mx.route, wrapper=group.enter, **QUICK) as relay:
        ledger = Ledger()
        ledger.stream(relay, tokens(60))
        group.limit(group.used_bytes + (4 << 20))
        with ledger.crowd(relay, clients=30, body=LARGE):
            assert relay.process is not None
            assert relay.process.wait(timeout=patient(30)) == -signal.SIGKILL
        assert group.oom_kills == 1
        assert len(ledger.accepted) >= 60
        group.limit(1 << 40)
        relay.start()
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        ledger.check_refused(mx)
        assert ledger.duplicates(mx) <= 20
        check_agreement(relay, mx)
        assert relay.stop() == 0
    sys.stderr.write(f"\nkilled for memory: {len(ledger.accepted)} answered 250, 0 lost\n")


# --- the delivery log -----------------------------------------------------------------------------


def logged(relay: Relay, *more: Path) -> set[str]:
    """Queue ids whose delivery is told in the log or in older files of it."""
    lines = [line for path in more for line in path.read_text(encoding="ascii").splitlines()]
    import json

    old = [event for line in lines for event in [json.loads(line)] if event["event"] == "delivered"]
    return {event["queue-id"] for event in [*old, *relay.events(event="delivered")]}


@pytest.mark.needs("root", "mount")
def test_a_full_disk_under_the_log_stops_no_mail_and_loses_no_line(
    tmp_path: Path, mx: Sink
) -> None:
    (tmp_path / "log").mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(tmp_path / "log")], check=True
    )
    try:
        with relay_process(tmp_path, routes=mx.route) as relay:
            ledger = Ledger()
            ledger.stream(relay, tokens(60))
            assert len(ledger.accepted) == 60
            ledger.settle(relay, mx)
            subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path / "log")], check=True)
            wait_until(lambda: logged(relay) == ledger.queue_ids(), what="each line in the log")
            check_log(relay)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "log")], check=True)


@pytest.mark.parametrize("way", ["rename and SIGHUP", "copy and truncate", "taken away"])
def test_a_log_rotated_under_load_misses_no_line(tmp_path: Path, mx: Sink, way: str) -> None:
    log, old = tmp_path / "log/delivery.log", tmp_path / "log/delivery.log.1"
    with relay_process(tmp_path, routes=mx.route) as relay:
        ledger = Ledger()
        stream = streaming(relay, ledger, 300, clients=4)
        wait_until(lambda: len(ledger.accepted) > 60, what="the stream")
        if way == "rename and SIGHUP":
            log.rename(old)
            relay.signal(signal.SIGHUP)
        elif way == "copy and truncate":
            relay.signal(
                signal.SIGSTOP
            )  # what is written between the two is lost by whoever rotates so
            old.write_bytes(log.read_bytes())
            os.truncate(log, 0)
            relay.signal(signal.SIGCONT)
        else:
            log.rename(old)
            log.mkdir()  # cannot be opened, nor written
            time.sleep(1)
            log.rmdir()
        stream.join(timeout=patient(60))
        assert len(ledger.accepted) == 300
        ledger.settle(relay, mx)
        wait_until(lambda: logged(relay, old) == ledger.queue_ids(), what="each line in a file")


def _says(relay: Relay, text: str, times: int) -> bool:
    return relay.stderr.count(text) == times


def test_a_broken_file_at_reload_disturbs_no_mail(tmp_path: Path, mx: Sink) -> None:
    with relay_process(tmp_path, routes=mx.route) as relay:
        ledger = Ledger()
        stream = streaming(relay, ledger, 300, clients=3)
        good = relay.config_file.read_text()
        mistakes = (
            "listeners: [",
            good + "\nnonsense: 1\n",
            good + "\nhostname: twice.example\n",
            good.replace("queue:", "queue:\n  retry: [soon]"),
        )
        for kept, broken in enumerate(mistakes, start=1):
            relay.config_file.write_text(broken)
            assert relay.run("check").returncode == 1
            relay.signal(signal.SIGHUP)
            wait_until(
                partial(_says, relay, "the configuration in force is kept", kept),
                what="a word in the log",
            )
        stream.join(timeout=patient(60))
        assert len(ledger.accepted) == 300
        ledger.settle(relay, mx)
