"""Requests to web servers that a domain names, where they differ from fetches of policies."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from contextlib import AsyncExitStack
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from relay.deliver.https import HttpsClient, NoAnswer
from relay.deliver.tls import TlsContexts
from relay.route.addresses import Own, Rejection, judge, parse_address
from relay.route.security import TlsVersion
from relay.sandbox.certificates import Authority, server_context
from relay.sandbox.policy_host import PolicyHost, WebAnswer
from tests.fakes.dns import FakeDns
from tests.fakes.waiting import patient

URL_ = URL("https://mta-sts.example.net/report")


async def status_of(answer: aiohttp.ClientResponse) -> int:
    return answer.status


class Web:
    """A web server, and a client of it."""

    def __init__(self, host: PolicyHost, directory: Path, authority: Authority) -> None:
        self.host = host
        self._dns = FakeDns(hosts={host.name: [host.address]})
        (directory / "ca.pem").write_bytes(authority.ca_pem)
        self._contexts = TlsContexts(str(directory / "ca.pem"))

    def client(self, *, allow: str = "127.0.0.0/8", at_once: int = 20) -> HttpsClient:
        def judged(text: str, port: int) -> Rejection | None:
            address = parse_address(text)
            assert address is not None
            return judge(address, port, own=Own(), allow_networks=[ip_network(allow)])

        return HttpsClient(
            self._dns,
            judge=judged,
            context=lambda: self._contexts.verifying(TlsVersion.TLS_1_2),
            timeout=timedelta(seconds=30),
            at_once=at_once,
            port=self.host.port,
        )


@pytest.fixture
async def servers():
    async with AsyncExitStack() as stack:
        yield stack


async def serve(
    servers: AsyncExitStack, directory: Path, authority: Authority, answer: WebAnswer
) -> Web:
    host = PolicyHost("example.net", answer, authority=authority)
    return Web(await servers.enter_async_context(host), directory, authority)


async def test_a_body_is_posted_and_no_redirect_followed(
    servers: AsyncExitStack, tmp_path: Path, authority: Authority
) -> None:
    answer = WebAnswer(status=302, fields=("Location: /elsewhere",))
    web = await serve(servers, tmp_path, authority, answer)
    found = await web.client().ask(URL_, status_of, headers={"X-Field": "1"}, body=b"octets")
    assert found == 302
    [head] = web.host.heads
    assert head.startswith(b"POST /report HTTP/1.1\r\n")
    assert b"\r\nX-Field: 1\r\n" in head
    assert b"\r\nContent-Length: 6\r\n" in head


async def test_nothing_is_posted_to_an_address_that_is_not_public(
    servers: AsyncExitStack, tmp_path: Path, authority: Authority
) -> None:
    web = await serve(servers, tmp_path, authority, WebAnswer())
    client = web.client(allow="192.0.2.0/24")
    found = await client.ask(URL_, status_of, headers={}, body=b"octets")
    assert isinstance(found, NoAnswer)
    assert web.host.requests == 0


@pytest.mark.parametrize("at_once", [2, 20])
async def test_a_request_that_does_not_wait_is_not_made_where_others_are(
    servers: AsyncExitStack, tmp_path: Path, authority: Authority, at_once: int
) -> None:
    web = await serve(servers, tmp_path, authority, WebAnswer(is_silent=True))
    client = web.client(at_once=at_once)
    asking = [
        asyncio.create_task(client.ask(URL_, status_of, headers={}, body=b"", waits=False))
        for _ in range(min(at_once, 4))
    ]
    async with asyncio.timeout(patient(20)):
        while web.host.requests < len(asking):
            await asyncio.sleep(0.01)
    found = await client.ask(URL_, status_of, headers={}, body=b"", waits=False)
    assert isinstance(found, NoAnswer)
    assert found.is_busy
    assert web.host.requests == len(asking)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_server_that_does_not_end_tls_holds_no_connection_after_its_answer(
    tmp_path: Path, authority: Authority
) -> None:
    """The server neither reads nor writes after its answer; a poll of its socket sees the end."""
    (tmp_path / "ca.pem").write_bytes(authority.ca_pem)
    contexts = TlsContexts(str(tmp_path / "ca.pem"))
    context = server_context(authority.leaf("mta-sts.example.net"))
    has_asked = threading.Event()

    def serve_one(listening: socket.socket) -> bool:
        """Whether the client's socket is gone once the client has its answer."""
        plain, _ = listening.accept()
        plain.settimeout(patient(20))
        with context.wrap_socket(plain, server_side=True) as served:
            served.recv(4096)
            served.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert has_asked.wait(patient(20))
            end = select.poll()
            end.register(served, select.POLLRDHUP)
            return bool(end.poll(0))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(patient(20))
        client = HttpsClient(
            FakeDns(hosts={"mta-sts.example.net": ["127.0.0.1"]}),
            judge=lambda address, port: None,
            context=lambda: contexts.verifying(TlsVersion.TLS_1_2),
            timeout=timedelta(seconds=30),
            at_once=2,
            port=listening.getsockname()[1],
        )
        serving = asyncio.create_task(asyncio.to_thread(serve_one, listening))
        assert await client.ask(URL_, status_of, headers={}) == 200
        has_asked.set()
        assert await serving
