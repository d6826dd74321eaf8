"""Policies fetched from real web servers, good ones and broken ones (RFC 8461 §3.3)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from relay.deliver.https import HttpsClient
from relay.deliver.sts_fetch import Fetched, FetchFailed, PolicyFetcher
from relay.deliver.tls import TlsContexts
from relay.route.addresses import Own, Rejection, judge, parse_address
from relay.route.answers import NoSuchName, Unanswered
from relay.route.mta_sts import PolicyError
from relay.route.security import TlsVersion
from relay.sandbox.certificates import Authority, Kind
from relay.sandbox.policy_host import PolicyHost, WebAnswer, policy
from tests.fakes.dns import FakeDns
from tests.fakes.waiting import idle_seconds, patient
from tests.rigs.ports import free_port

POLICY = policy("mx.example.net")
NAME = "mta-sts.example.net"


class Web:
    """Servers, and a fetcher that knows where they are."""

    def __init__(self, directory: Path, open_servers: AsyncExitStack) -> None:
        self.authority = AUTHORITY
        self.dns = FakeDns(hosts={})
        self.now = 1000.0
        self._open = open_servers
        ca_file = directory / "ca.pem"
        ca_file.write_bytes(self.authority.ca_pem)
        self._contexts = TlsContexts(str(ca_file))

    async def serve(
        self, answer: bytes | WebAnswer, domain: str = "example.net", **how: Any
    ) -> PolicyHost:
        host = PolicyHost(domain, answer, authority=self.authority, **how)
        await self._open.enter_async_context(host)
        self.dns.hosts = {**self.dns.hosts, host.name: [host.address]}
        return host

    def fetcher(
        self,
        port: int,
        *,
        seconds: float = 30,
        at_once: int = 20,
        allow: str = "127.0.0.0/8",
        **how: Any,
    ) -> PolicyFetcher:
        def judged(text: str, port: int) -> Rejection | None:
            address = parse_address(text)
            assert address is not None
            networks = [ip_network(allow)] if allow else []
            return judge(address, port, own=Own(), allow_networks=networks)

        https = HttpsClient(
            self.dns,
            judge=judged,
            context=lambda: self._contexts.verifying(how.get("version", TlsVersion.TLS_1_2)),
            timeout=timedelta(seconds=seconds),
            at_once=at_once,
            port=port,
            clock=lambda: self.now,
        )
        return PolicyFetcher(https)

    async def fetch(self, host: PolicyHost, **how: Any) -> Fetched | FetchFailed:
        return await self.fetcher(host.port, **how).fetch("example.net")


AUTHORITY = Authority()


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Web]:
    async with AsyncExitStack() as servers:
        yield Web(tmp_path, servers)


async def test_a_policy_is_fetched(web: Web) -> None:
    host = await web.serve(POLICY)
    found = await web.fetch(host)
    assert isinstance(found, Fetched)
    assert (found.policy.mx, found.body) == (("mx.example.net",), POLICY)
    [head] = host.heads
    assert head.startswith(b"GET /.well-known/mta-sts.txt HTTP/1.1\r\nHost: mta-sts.example.net")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "text/plain; charset=utf-8", "Text/Plain;charset=US-ASCII"]
)
async def test_a_type_may_have_parameters(web: Web, content_type: str) -> None:
    assert isinstance(
        await web.fetch(await web.serve(WebAnswer(POLICY, content_type=content_type))), Fetched
    )


@pytest.mark.parametrize(
    "kind", [kind for kind in Kind if kind not in (Kind.GOOD, Kind.WILDCARD, Kind.SHORT_KEY)]
)
async def test_a_certificate_that_does_not_verify_gives_no_policy(web: Web, kind: Kind) -> None:
    host = await web.serve(POLICY, kind=kind)
    found = await web.fetch(host)
    assert isinstance(found, FetchFailed)
    assert found.error is PolicyError.CERTIFICATE
    assert "\n" not in found.reason
    assert host.requests == 0  # nothing was asked of a server that is not the one


async def test_a_wildcard_certificate_is_one_for_the_policy_host(web: Web) -> None:
    assert isinstance(await web.fetch(await web.serve(POLICY, kind=Kind.WILDCARD)), Fetched)


async def test_tls_is_not_older_than_min_version(web: Web) -> None:
    host = await web.serve(POLICY)
    assert host._context is not None
    host._context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert isinstance(await web.fetch(host), Fetched)
    found = await web.fetch(host, version=TlsVersion.TLS_1_3)
    assert isinstance(found, FetchFailed)
    assert found.error is PolicyError.FETCH


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (WebAnswer(POLICY, status=404), PolicyError.FETCH, "status 404"),
        (WebAnswer(POLICY, status=206), PolicyError.FETCH, "status 206"),
        (WebAnswer(status=304), PolicyError.FETCH, "status 304"),
        (WebAnswer(POLICY, status=500), PolicyError.FETCH, "status 500"),
        (WebAnswer(POLICY, content_type="text/html"), PolicyError.INVALID, "text/html"),
        (WebAnswer(POLICY, content_type=""), PolicyError.INVALID, "not text/plain"),
        (WebAnswer(b"<html>"), PolicyError.INVALID, "STSv1"),
        (WebAnswer(b""), PolicyError.INVALID, "STSv1"),
        (WebAnswer(POLICY, fields=("Content-Encoding: gzip",)), None, ""),
        (WebAnswer(POLICY + b"x: " + b"y" * (64 * 1024 - 3 - len(POLICY))), None, ""),
        (
            WebAnswer(POLICY + b"x: " + b"y" * (64 * 1024 - 2 - len(POLICY))),
            PolicyError.INVALID,
            "65536",
        ),
        (WebAnswer(POLICY, length=len(POLICY) + 1), PolicyError.FETCH, ""),
        (WebAnswer(POLICY, fields=("X: " + "y" * 20_000,)), PolicyError.FETCH, ""),
        (WebAnswer(POLICY, fields=("X: y",) * 1000), PolicyError.FETCH, ""),
        (WebAnswer(is_silent=True), PolicyError.FETCH, "longer than 2 s"),
        (WebAnswer(POLICY, pause=0.1), PolicyError.FETCH, "longer than 2 s"),
    ],
)
async def test_answer_of_a_policy_host_is_a_policy_or_a_named_error(
    web: Web, answer: WebAnswer, error: PolicyError | None, words: str
) -> None:
    host = await web.serve(answer)
    began = idle_seconds()
    found = await web.fetch(host, seconds=2 if "longer than" in words else 30)
    assert idle_seconds() - began < 20
    assert host.requests == 1
    if error is None:
        assert isinstance(found, Fetched)
    else:
        assert isinstance(found, FetchFailed)
        assert found.error is error
        assert words in found.reason


async def test_a_redirect_is_not_followed(web: Web) -> None:
    other = await web.serve(POLICY, domain="other.example")
    where = f"Location: https://mta-sts.other.example:{other.port}/.well-known/mta-sts.txt"
    for status in (301, 302, 303, 307, 308):
        host = await web.serve(WebAnswer(status=status, fields=(where,)))
        found = await web.fetch(host)
        assert found == FetchFailed(PolicyError.FETCH, f"{NAME} answers with status {status}")
    assert other.requests == 0


async def test_no_proxy_is_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert isinstance(await web.fetch(await web.serve(POLICY)), Fetched)


async def test_an_address_that_is_not_public_is_not_connected_to(web: Web) -> None:
    host = await web.serve(POLICY)
    found = await web.fetch(host, allow="")
    assert found == FetchFailed(PolicyError.FETCH, f"{NAME}: 127.0.0.1 is loopback (RFC 1122)")
    assert host.requests == 0


async def test_the_name_is_looked_up_once(web: Web) -> None:
    await web.fetch(await web.serve(POLICY))
    assert web.dns.asked == [f"A {NAME}"]


async def test_another_address_is_tried_where_one_takes_no_connection(web: Web) -> None:
    host = await web.serve(POLICY, address="127.0.0.2")
    web.dns.hosts = {NAME: ["127.0.0.1", "127.0.0.2"]}
    assert isinstance(await web.fetch(host), Fetched)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (NoSuchName(), "does not exist"),
        (Unanswered("SERVFAIL from 127.0.0.1"), "SERVFAIL"),
        ([], "has no address"),
    ],
)
async def test_policy_host_without_an_address_gives_no_policy(
    web: Web, answer: Any, words: str
) -> None:
    web.dns.hosts = {NAME: answer}
    found = await web.fetcher(9).fetch("example.net")
    assert isinstance(found, FetchFailed)
    assert found.error is PolicyError.FETCH
    assert words in found.reason


async def test_a_server_that_says_nothing_before_tls_is_not_waited_for(web: Web) -> None:
    host = await web.serve(POLICY, takes_tls=False)
    found = await web.fetch(host, seconds=0.3)
    assert found == FetchFailed(PolicyError.FETCH, f"{NAME} took longer than 0.3 s")


# --- many domains at one server -------------------------------------------------------------------


async def test_policy_fetches_at_a_time_are_limited(web: Web) -> None:
    answers, port = WebAnswer(POLICY, delay=2), free_port("0.0.0.0")
    hosts = [
        await web.serve(answers, f"d{number}.example", address=f"127.0.1.{number + 1}", port=port)
        for number in range(6)
    ]
    fetcher = web.fetcher(port, at_once=3)
    fetches = [asyncio.create_task(fetcher.fetch(f"d{number}.example")) for number in range(6)]
    async with asyncio.timeout(patient(20)):
        while sum(host.requests for host in hosts) < 3:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert sum(host.requests for host in hosts) == 3
    assert all(isinstance(found, Fetched) for found in await asyncio.gather(*fetches))


async def test_a_slow_server_of_many_domains_delays_nobody_elses(web: Web) -> None:
    port = free_port("0.0.0.0")
    slow = await web.serve(
        WebAnswer(is_silent=True), "slow0.example", address="127.0.1.1", port=port
    )
    quick = await web.serve(POLICY, "quick.example", address="127.0.1.2", port=port)
    names = [f"slow{number}.example" for number in range(50)]
    web.dns.hosts = {**web.dns.hosts, **{f"mta-sts.{name}": [slow.address] for name in names}}
    fetcher = web.fetcher(port, at_once=5, seconds=30)
    waiting = [asyncio.create_task(fetcher.fetch(name)) for name in names]
    await asyncio.sleep(0.2)
    began = idle_seconds()
    assert isinstance(await fetcher.fetch("quick.example"), Fetched)
    assert idle_seconds() - began < 10, "the slow ones end after 30 s"
    assert quick.requests == 1
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_dead_address_fails_all_its_domains_at_once_for_a_while(web: Web) -> None:
    host = await web.serve(POLICY)
    web.dns.hosts = {NAME: ["127.0.0.9"], "mta-sts.other.example": ["127.0.0.9"]}
    fetcher = web.fetcher(host.port)
    first = await fetcher.fetch("example.net")
    assert isinstance(first, FetchFailed)
    living = await web.serve(POLICY, "other.example", address="127.0.0.9", port=host.port)
    assert await fetcher.fetch("other.example") == first
    assert living.requests == 0
    web.now += 300
    assert isinstance(await fetcher.fetch("other.example"), Fetched)


async def test_a_server_that_refuses_one_certificate_is_not_dead(web: Web) -> None:
    host = await web.serve(POLICY, kind=Kind.EXPIRED)
    fetcher = web.fetcher(host.port)
    await fetcher.fetch("example.net")
    await fetcher.fetch("example.net")
    assert len(fetcher._https._dead) == 0
