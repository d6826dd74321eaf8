"""Who gets in at the HTTP port, how long a request may take to come, and which certificate is
shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from relay.api import HttpError, HttpServer, start_http
from relay.receive.spec import ListenerSpec, ListenerTls, TcpAddress
from relay.submit.certificates import CertificateError
from tests.fakes.http import KEY, Rig, auth
from tests.fakes.waiting import patient
from tests.unit.receive.conftest import Desk

Start = Callable[..., Any]


@pytest.fixture
async def start(rig: Rig) -> AsyncIterator[Start]:
    async with contextlib.AsyncExitStack() as stack:

        async def started(**more: Any) -> HttpServer:
            server = await start_http(rig.api, ("127.0.0.1", 0), **more)
            stack.push_async_callback(server.close)
            return server

        yield started


class Caller:
    """A client that says what it likes, octet by octet."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, str]:
        """Status and body of one answer."""
        async with asyncio.timeout(patient(10)):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length:")[2].partition("\r\n")[0])
            return int(head.split()[1]), (await self.reader.readexactly(length)).decode()

    async def ask(self) -> int:
        self.writer.write(b"GET /relay/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        return (await self.answer())[0]

    async def ended(self, seconds: float) -> bool:
        """Whether the server has ended the connection by then."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                return await self.reader.read() == b""
        return False


@pytest.fixture
async def call() -> AsyncIterator[Callable[[HttpServer], Any]]:
    made: list[Caller] = []

    async def called(server: HttpServer, source: str = "127.0.0.1") -> Caller:
        made.append(Caller(*await asyncio.open_connection(*server.address, local_addr=(source, 0))))
        return made[-1]

    yield called
    for caller in made:
        caller.writer.transport.abort()


async def test_connection_beyond_the_limit_is_refused_until_another_ends(
    start: Start, call: Start
) -> None:
    server = await start(connections=3)
    inside = [await call(server, f"127.0.0.{number}") for number in (2, 3, 4)]
    for one in inside:
        assert await one.ask() == 200
    status, said = await (await call(server)).answer()
    assert (status, set(json.loads(said))) == (503, {"message"})
    assert await inside[0].ask() == 200, "who is inside stays"
    inside[0].writer.close()
    async with asyncio.timeout(patient(5)):
        while server.connections == 3:
            await asyncio.sleep(0.01)
    assert await (await call(server)).ask() == 200


async def test_one_address_has_half_of_the_connections_and_leaves_the_others_room(
    start: Start, call: Start
) -> None:
    server = await start(connections=6)
    inside = [await call(server) for _ in range(3)]
    for one in inside:
        assert await one.ask() == 200
    status, said = await (await call(server)).answer()
    assert (status, set(json.loads(said))) == (429, {"message"})
    assert await (await call(server, "127.0.0.2")).ask() == 200
    inside[0].writer.close()
    async with asyncio.timeout(patient(5)):
        while server.connections == 4:
            await asyncio.sleep(0.01)
    assert await (await call(server)).ask() == 200


@pytest.mark.parametrize(
    "octets",
    [b"\x16\x03\x01 this is no HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n: secret\r\n\r\n"],
)
async def test_text_that_is_no_http_is_answered_like_any_other_mistake(
    start: Start, call: Start, octets: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "relay.api.entrance")
    client = await call(await start())
    client.writer.write(octets)
    head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert head.startswith(("HTTP/1.0 400 Bad Request\r\n", "HTTP/1.1 400 Bad Request\r\n"))
    assert "Content-Type: application/json" in head
    assert "Server: relay\r\n" in head
    assert json.loads(await client.reader.read()) == {"message": "This is no HTTP request"}
    [said] = caplog.messages
    assert said.startswith("HTTP: [127.0.0.1]: no HTTP request: ")
    assert "secret" not in said


async def test_a_stranger_cannot_fill_the_log_of_an_https_port(
    start: Start, call: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "relay.api.entrance")
    server = await start(certificate=_issue(trustme.CA(), tmp_path))
    for _ in range(20):
        client = await call(server)
        client.writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await client.ended(10)
    assert len(caplog.messages) == 10
    assert caplog.messages[0].startswith("HTTP: [127.0.0.1]: no connection was made: ")


async def test_a_connection_counts_from_before_its_handshake(
    start: Start, call: Start, tmp_path: Path
) -> None:
    server = await start(connections=4, certificate=_issue(trustme.CA(), tmp_path))
    for _ in range(2):
        await call(server)  # says nothing
    await asyncio.sleep(0.1)
    assert await (await call(server)).ended(15)


@pytest.mark.parametrize("octets", [b"", b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"x" * 1000])
async def test_request_that_does_not_end_in_time_is_cut_off(
    start: Start, call: Start, octets: bytes
) -> None:
    server = await start(header_seconds=0.5)
    slow = await call(server)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            for octet in octets:
                slow.writer.write(bytes([octet]))
                await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await slow.ended(20)
    dripping.cancel()
    await asyncio.gather(dripping, return_exceptions=True)


async def test_a_second_request_has_the_same_time_from_the_first_ones_answer(
    start: Start, call: Start
) -> None:
    server = await start(header_seconds=2)
    kept = await call(server)
    for _ in range(4):
        assert await kept.ask() == 200
        await asyncio.sleep(0.7)
    assert await kept.ended(20)


async def test_a_body_may_take_longer_than_a_header(rig: Rig, start: Start, call: Start) -> None:
    server = await start(header_seconds=2)
    caller = await call(server)
    body = b"from=ann@example.com&to=bob@dest.example&text=hello"
    head = (
        f"POST /v3/example.com/messages HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: {auth(KEY)['Authorization']}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    )
    caller.writer.write(head.encode())
    for start_at in range(0, len(body), 10):
        caller.writer.write(body[start_at : start_at + 10])
        await asyncio.sleep(0.5)
    assert (await caller.answer())[0] == 200
    assert len(await rig.claimed()) == 1


def _issue(authority: trustme.CA, directory: Path) -> str:
    path = directory / "tls.pem"
    path.unlink(missing_ok=True)
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return str(path)


async def _shown(server: HttpServer) -> bytes | None:
    """The certificate a new client is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection(*server.address, ssl=context)
    shown: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return shown


async def test_api_is_served_over_tls_where_there_is_a_certificate(
    start: Start, tmp_path: Path
) -> None:
    authority = trustme.CA()
    server = await start(certificate=_issue(authority, tmp_path))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = f"https://127.0.0.1:{server.address[1]}/v4/domains"
    async with aiohttp.ClientSession(headers=auth(KEY)) as session:
        async with session.get(url, ssl=trusting) as response:
            assert response.status == 200
            assert response.headers["Server"] == "relay"
        with pytest.raises(aiohttp.ClientError):
            await session.get(url.replace("https", "http"))
    with pytest.raises(CertificateError, match=r"nothing\.pem cannot be used"):
        await start(certificate=str(tmp_path / "nothing.pem"))


async def _speaks(port: int, suite: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"{suite}:@SECLEVEL=0")
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return False
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    return True


async def test_https_and_smtp_speak_tls_1_2_with_forward_secrecy_and_aead_only(
    start: Start, tmp_path: Path
) -> None:
    """RFC 9325 §4.2."""
    issued = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.RSA)
    files = str(tmp_path / "tls.pem"), str(tmp_path / "tls.key")
    issued.cert_chain_pems[0].write_to_path(files[0])
    issued.private_key_pem.write_to_path(files[1])
    desk = Desk(*files, ssl.create_default_context())
    listener = await desk.open(ListenerSpec("127.0.0.1:0", tls=ListenerTls.IMPLICIT))
    assert isinstance(listener.address, TcpAddress)
    http = await start(certificate=files[0], key=files[1])
    cbc = ("ECDHE-RSA-AES256-SHA384", "ECDHE-RSA-AES128-SHA", "AES128-SHA", "AES256-SHA256")
    good = "ECDHE-RSA-AES128-GCM-SHA256"
    for port in (listener.address.port, http.address[1]):
        spoken = [s for s in (*cbc, "AES128-GCM-SHA256", good) if await _speaks(port, s)]
        assert spoken == [good]
    await desk.close()


async def test_a_new_certificate_is_shown_once_it_is_read_and_a_broken_one_never(
    start: Start, tmp_path: Path
) -> None:
    authority = trustme.CA()
    server = await start(certificate=_issue(authority, tmp_path))
    first = await _shown(server)
    _issue(authority, tmp_path)
    show = server.read_certificate()
    assert await _shown(server) == first, "only read so far"
    show()
    second = await _shown(server)
    assert second not in (None, first)
    (tmp_path / "tls.pem").write_text("no certificate")
    with pytest.raises(CertificateError):
        server.read_certificate()
    assert await _shown(server) == second


async def test_port_in_use_is_reported(start: Start, rig: Rig) -> None:
    server = await start()
    with pytest.raises(HttpError, match="in use"):
        await start_http(rig.api, server.address)
