"""What is used of aiosmtplib's protocol beside its public names: a release that changes one of them
is to be noticed here, and not by mail.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiosmtplib import SMTPException

from relay.deliver.protocol import ClientProtocol, connect
from tests.fakes.waiting import patient, until


class Host:
    """A server that says what a test tells it, and remembers what it heard."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.writer: asyncio.StreamWriter | None = None
        self.is_reading = asyncio.Event()
        self.is_reading.set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        while True:
            await self.is_reading.wait()
            if not (octets := await reader.read(65536)):
                return
            self.heard += octets

    def say(self, octets: bytes) -> None:
        assert self.writer is not None
        self.writer.write(octets)


@pytest_asyncio.fixture
async def host() -> Host:
    return Host()


@pytest_asyncio.fixture
async def wire(host: Host) -> AsyncIterator[ClientProtocol]:
    server = await asyncio.start_server(host, "127.0.0.1", 0)
    made = await connect("127.0.0.1", server.sockets[0].getsockname()[1], 10)
    await until(lambda: host.writer is not None)
    yield made
    made.abort()
    assert host.writer is not None
    host.writer.close()
    server.close()


async def test_transport_and_is_connected_tell_of_the_connection(wire: ClientProtocol):
    assert wire.transport is not None
    assert wire.is_connected
    wire.transport.close()
    assert not wire.is_connected


async def test_loop_is_the_one_that_the_protocol_was_made_with(wire: ClientProtocol):
    assert wire._loop is asyncio.get_running_loop()


async def test_buffer_is_emptied_by_the_library_before_the_handshake(
    host: Host, wire: ClientProtocol
):
    host.say(b"220 mx\r\n")
    await wire.next_reply(10)
    host.say(b"220 go ahead\r\n250 injected\r\n")
    with pytest.raises((OSError, RuntimeError, SMTPException)):
        await wire.start_tls(ssl.create_default_context(), server_hostname="mx", timeout=0.2)
    assert not wire._buffer
    assert wire._buffer is wire._reader.buffer


async def test_over_ssl_refuses_a_second_starttls(wire: ClientProtocol):
    assert wire._over_ssl is False
    wire._over_ssl = True
    with pytest.raises(RuntimeError, match="TLS"):
        await wire.start_tls(ssl.create_default_context(), timeout=1)


async def test_paused_says_that_the_transport_wants_no_more(wire: ClientProtocol):
    assert wire._paused is False
    wire.pause_writing()
    assert wire._paused is True
    wire.resume_writing()
    assert wire._paused is False


async def test_drain_helper_waits_in_drain_waiters_until_writing_goes_on(wire: ClientProtocol):
    wire.pause_writing()
    waiting = asyncio.create_task(wire._drain_helper())
    await until(lambda: len(wire._drain_waiters) == 1)
    assert not waiting.done()
    wire.resume_writing()
    await asyncio.wait_for(waiting, patient(10))
    assert not wire._drain_waiters


async def test_reply_wakes_a_waiting_writer_although_there_is_no_room(
    host: Host, wire: ClientProtocol
):
    wire.pause_writing()
    waiting = asyncio.create_task(wire._drain_helper())
    await until(lambda: len(wire._drain_waiters) == 1)
    host.say(b"421 closing\r\n")
    await asyncio.wait_for(waiting, patient(10))
    assert wire._paused is True


async def test_handshake_on_a_lost_connection_says_that_it_is_lost(wire: ClientProtocol):
    wire.abort()
    await wire.closed.wait()
    await until(lambda: wire.transport is None)
    with pytest.raises(SMTPException, match="lost"):
        await wire.handshake(ssl.create_default_context(), "mx", 1)
