"""Fetches an MTA-STS policy from the web server of its domain (RFC 8461 §3.3). †

What is asked of the server is what is asked of a mail host that has to be verified: a chain to a
trusted root, in date, the name in the certificate, TLS of `tls.min_version`. Its address is looked
up once, by our own resolver, judged by the rules for mail hosts, and connected to as it was judged.
Only 200 with text/plain counts; nothing is redirected, kept by a cache, or sent through a proxy.

A server is somebody's machine, and many domains may be on one. At most `AT_ONCE` fetches are under
way, a few of them at one address, and an address that takes no connection fails all its domains at
once for a while: otherwise a dead server of a thousand domains would take every place, for hours.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from relay.route.addresses import Rejection
from relay.route.answers import AddressAnswer, NoSuchName, Resolver
from relay.route.cache import ExpiringCache
from relay.route.judged import JudgedResolver
from relay.route.mta_sts import (
    BACK_OFF,
    MAX_POLICY_BYTES,
    InvalidPolicy,
    Policy,
    PolicyError,
    parse_policy,
    policy_host,
)

__all__ = ["AT_ONCE", "FetchFailed", "Fetched", "PolicyFetcher"]

HTTPS_PORT = 443
AT_ONCE = 20
_AT_ONE_ADDRESS = 4
_CONNECT_SECONDS = 10.0
_MOST_ADDRESSES = 4
_DEAD_ADDRESSES = 10_000
_PATH = "/.well-known/mta-sts.txt"
_HEADERS = {"User-Agent": "relay", "Accept": "text/plain", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A policy, and the text it was read from."""

    policy: Policy
    body: bytes


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """Why there is none. `reason`: a sentence for a person."""

    error: PolicyError
    reason: str


class PolicyFetcher:
    """`judge`: why an address and port must not be connected to, None where it may be."""

    def __init__(
        self,
        resolver: Resolver,
        *,
        judge: Callable[[str, int], Rejection | None],
        context: Callable[[], ssl.SSLContext],
        timeout: timedelta,
        at_once: int = AT_ONCE,
        port: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolver = resolver
        self._judge = judge
        self._context = context
        self._seconds = timeout.total_seconds()
        self._port = HTTPS_PORT if port is None else port
        self._clock = clock
        self._places = asyncio.Semaphore(at_once)
        self._at_address: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._dead: ExpiringCache[str] = ExpiringCache(_DEAD_ADDRESSES)

    async def fetch(self, domain: str) -> Fetched | FetchFailed:
        """The policy of a domain as its server has it now. Raises nothing that a server could
        cause.
        """
        host = policy_host(domain)
        addresses = await self._addresses(host)
        if isinstance(addresses, FetchFailed):
            return addresses
        at_address = self._at_address.setdefault(addresses[0], asyncio.Semaphore(_AT_ONE_ADDRESS))
        # The address first: who waits for one that is slow holds no place of the others.
        async with at_address, self._places:
            dead = self._dead.get(addresses[0], now=self._clock())
            if dead is not None:
                return FetchFailed(PolicyError.FETCH, dead)
            return await self._fetch_from(host, addresses)

    async def _addresses(self, host: str) -> list[str] | FetchFailed:
        """Those that may be connected to, at least one, in an order that is always the same."""
        answer = await self._resolver.addresses(host)
        if not isinstance(answer, AddressAnswer):
            words = f" {answer.reason}" if isinstance(answer, NoSuchName) else f": {answer.reason}"
            return FetchFailed(PolicyError.FETCH, f"{host}{words}")
        judged = {one: self._judge(one, self._port) for one in sorted(answer.addresses)}
        good = [one for one, rejection in judged.items() if rejection is None]
        if good:
            return good[:_MOST_ADDRESSES]
        reasons = [f"{host}: {one} {why.reason}" for one, why in judged.items() if why is not None]
        return FetchFailed(PolicyError.FETCH, next(iter(reasons), f"{host} has no address"))

    async def _fetch_from(self, host: str, addresses: list[str]) -> Fetched | FetchFailed:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._get(host, addresses)
        except (aiohttp.ClientConnectorCertificateError, ssl.CertificateError) as exc:
            return FetchFailed(PolicyError.CERTIFICATE, _reason(host, exc))
        except InvalidPolicy as exc:
            return FetchFailed(PolicyError.INVALID, f"{host}: {exc}")
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as exc:
            reason = _reason(host, exc)
            if not isinstance(exc, aiohttp.ClientSSLError):
                until = self._clock() + BACK_OFF.total_seconds()
                self._dead.put(addresses[0], reason, expires=until)
            return FetchFailed(PolicyError.FETCH, reason)
        except TimeoutError:
            return FetchFailed(PolicyError.FETCH, f"{host} took longer than {self._seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return FetchFailed(PolicyError.FETCH, _reason(host, exc))

    async def _get(self, host: str, addresses: list[str]) -> Fetched | FetchFailed:
        async def judged(host: str, port: int) -> list[str]:
            return addresses

        connector = aiohttp.TCPConnector(
            resolver=JudgedResolver(judged),
            use_dns_cache=False,
            ssl=self._context(),
            force_close=True,
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        url = URL.build(scheme="https", host=host, port=self._port, path=_PATH)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=_HEADERS,
                timeout=timeout,
                trust_env=False,
                auto_decompress=False,
            ) as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            return await _read(host, answer)


async def _read(host: str, answer: aiohttp.ClientResponse) -> Fetched | FetchFailed:
    if answer.status != 200:
        return FetchFailed(PolicyError.FETCH, f"{host} answers with status {answer.status}")
    if answer.content_type != "text/plain":
        raise InvalidPolicy(f"the policy is {answer.content_type}, not text/plain")
    body = b""
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > MAX_POLICY_BYTES:
            break  # `parse_policy` says what is wrong with it
    return Fetched(parse_policy(body), body)


def _reason(host: str, exc: BaseException) -> str:
    words = " ".join(str(exc).split()) or type(exc).__name__
    return words[:300] if host in words else f"{host}: {words[:300]}"
