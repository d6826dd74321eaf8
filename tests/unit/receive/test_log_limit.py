"""A client that does not behave is a line in the log, and not more than so many."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from relay.receive.access import Access
from relay.receive.limits import Limits
from relay.receive.spec import ListenerSpec, ListenerTls
from relay.submit.log_limit import LogLimit
from tests.fakes.waiting import patient
from tests.unit.receive.conftest import USERS, Desk

NOW = datetime(2026, 11, 20, tzinfo=UTC)
LOCAL = ListenerSpec("127.0.0.1:0")
CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303") + b"\n" * 60


class Log(logging.Handler):
    """What is logged, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    async def line(self, begins: str) -> str:
        async with asyncio.timeout(patient(10)):
            while True:
                for line in self.lines:
                    if line.startswith(begins):
                        return line
                await asyncio.sleep(0.01)


@pytest.fixture
async def log(desk: Desk) -> AsyncIterator[Log]:
    handler, logger = Log(), logging.getLogger("relay.receive")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("octets", "line"),
    [
        (b"EHLO x\n", "500 5.5.2 Lines end with CRLF"),
        (b"EHLO\r\n", "501 5.5.4 Syntax: EHLO hostname"),
        (b"SSH-2.0-Go\r\n", "500 5.5.2 Syntax error: b'SSH-2.0-GO'"),
        (b"\x03\x00\x00/*\xe0\r\n", "500 5.5.2 Syntax error: b'\\x03\\x00\\x00/*\\xe0'"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP, where SMTP is spoken"),
        (CLIENT_HELLO, "a TLS handshake, where TLS begins with STARTTLS or never"),
        (CLIENT_HELLO[:5], "a TLS handshake, where TLS begins with STARTTLS or never"),
        (b"x" * 13000, "500 5.5.2 Line too long"),
        (b"MAIL FROM:<a@b.example>\r\n", "503 5.5.1 EHLO or HELO comes first"),
        (b"EHLO x\r\nc2VjcmV0\r\n", "500 5.5.2 Syntax error"),
    ],
)
async def test_text_that_is_no_smtp_is_a_line_in_the_log(
    desk: Desk, log: Log, octets: bytes, line: str
) -> None:
    client = await desk.client(LOCAL)
    await client.reply()
    await client.send(octets)
    assert await log.line("[127.0.0.1]") == f"[127.0.0.1]: {line}"


@pytest.mark.parametrize("said", [b"", b"EHLO x"])
async def test_a_client_that_goes_without_a_command_is_a_line_in_the_log(
    desk: Desk, log: Log, said: bytes
) -> None:
    client = await desk.client(LOCAL)
    await client.reply()
    await client.send(said)
    await client.close()
    assert await log.line("[127.0.0.1]") == "[127.0.0.1]: gone without a command"


async def test_a_client_that_goes_in_the_middle_of_a_message_is_a_line_in_the_log(
    desk: Desk, log: Log
) -> None:
    client = await desk.client(LOCAL)
    await client.begin()
    assert (await client.say("DATA")).startswith("354")
    await client.send(b"Subject: x\r\n")
    client.vanish()
    assert await log.line("[127.0.0.1]") == "[127.0.0.1]: gone in the middle of a message"


async def test_client_that_keeps_to_the_protocol_is_no_line_in_the_log(
    desk: Desk, log: Log
) -> None:
    for last in ("QUIT", "NOOP"):
        client = await desk.client(LOCAL)
        await client.begin()
        assert (await client.data(b"x\r\n.\r\n")).startswith("250")
        await client.say(last)
        await client.close()
    connections = desk.listeners[-1]
    async with asyncio.timeout(patient(10)):
        while connections.connections:
            await asyncio.sleep(0.01)
    assert log.lines == []


async def test_plain_smtp_at_a_tls_port_is_a_line_in_the_log(desk: Desk, log: Log) -> None:
    client = await desk.client(replace(LOCAL, tls=ListenerTls.IMPLICIT))
    await client.send(b"EHLO x\r\n")
    assert (await log.line("[127.0.0.1]")).startswith("[127.0.0.1]: no TLS: ")


async def test_connection_beyond_the_limit_is_a_line_in_the_log(desk: Desk, log: Log) -> None:
    desk.limits = Limits(connections_per_client=1)
    await (await desk.client(LOCAL)).greet()
    await (await desk.client()).reply()
    assert await log.line("[127.0.0.1]: 421") == (
        "[127.0.0.1]: 421 4.7.0 Too many connections from your address"
    )


@pytest.mark.parametrize("line", ["RCPT TO:<b@example.net>", "FOO", "EHLO", "HELO x\n"])
async def test_a_stranger_cannot_fill_the_log(desk: Desk, log: Log, line: str) -> None:
    desk.access, desk.now = Access(networks=(), users=USERS), lambda: NOW
    for _ in range(3):
        client = await desk.client(None if desk.listeners else LOCAL)
        await client.greet()
        await client.say("MAIL FROM:<a@example.com>")
        for _ in range(20):
            if await client.say(line) == "closed":
                break
    for _ in range(20):
        await (await desk.client()).close()
    assert 3 <= len(log.lines) <= 10


async def test_refusals_of_a_client_that_may_relay_are_lines_in_the_log(
    desk: Desk, log: Log
) -> None:
    client = await desk.client(LOCAL)
    await client.begin()
    for number in range(30):
        await client.say(f"RCPT TO:<{number}>")
    assert len(log.lines) == 30


def test_each_client_has_ten_lines_in_ten_minutes_and_hears_how_many_were_left_out() -> None:
    log_limit = LogLimit()
    lines = [log_limit.line("192.0.2.1", "odd", NOW) for _ in range(25)]
    assert lines == ["odd"] * 10 + [None] * 15
    assert log_limit.line("192.0.2.2", "odd", NOW) == "odd"
    later = NOW + timedelta(minutes=10)
    assert log_limit.line("192.0.2.1", "odd", later) == "odd (15 such lines were left out before)"
    assert log_limit.line("192.0.2.1", "odd", later) == "odd"


def test_all_clients_together_have_a_thousand_lines_in_ten_minutes() -> None:
    log_limit = LogLimit()
    clients = [f"198.51.{n // 250}.{n % 250}" for n in range(3000)]
    assert sum(log_limit.line(client, "odd", NOW) is not None for client in clients) == 1000
    later = log_limit.line(clients[0], "odd", NOW + timedelta(minutes=10))
    assert later == "odd (2000 such lines were left out before)"


def test_no_more_clients_are_remembered_than_there_is_room_for() -> None:
    log_limit = LogLimit()
    for number in range(12_000):
        log_limit.line(f"2001:db8:{number:x}::1", "odd", NOW)
    assert len(log_limit._shares) == 10_000
