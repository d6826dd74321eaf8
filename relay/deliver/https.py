"""HTTPS requests: for a policy, with a report on TLS, for an access token. †

The server has to prove the same as a verified mail host: a valid chain to a trusted root, the name
in the certificate, TLS of `tls.min_version`. The relay's own resolver looks its address up once,
the rules for mail hosts judge it, and the relay connects to exactly that address. Redirects,
caches and proxies are not used.

Many domains may share one server. At most `at_once` requests are under way, a few of them at one
address. An address that accepts no connection fails for all its domains for a while: otherwise a
dead server of a thousand domains would use every place for hours.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from weakref import WeakValueDictionary

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

from relay.route.addresses import Rejection, parse_address
from relay.route.answers import AddressAnswer, AddressLookup, NoSuchName, Resolver
from relay.route.cache import ExpiringCache
from relay.route.judged import JudgedResolver

HTTPS_PORT = 443
_AT_ONE_ADDRESS = 4
_CONNECT_SECONDS = 10.0
_MOST_ADDRESSES = 4
_DEAD_ADDRESSES = 10_000
DEAD = timedelta(minutes=5)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why there is no answer.

    `reason`: a sentence for a person. `is_untrusted`: the server's certificate is not valid.
    `is_busy`: the server was not asked, since enough others ask it now.
    """

    reason: str
    is_untrusted: bool = False
    is_busy: bool = False


class HttpsClient:
    """`judge`: why the relay must not connect to an address and port, None where it may.

    `timeout`: the limit for a complete request. `port`: of every server; 0 where the
    operator wrote the URLs: then their port counts, and their host may be an address. `dead_for`:
    how long an address that accepts no connection fails for all.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        judge: Callable[[str, int], Rejection | None],
        context: Callable[[], ssl.SSLContext],
        timeout: timedelta,
        at_once: int,
        port: int | None = None,
        dead_for: timedelta = DEAD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolver = resolver
        self._judge = judge
        self._context = context
        self._seconds = timeout.total_seconds()
        self._port = HTTPS_PORT if port is None else port
        self._dead_for = dead_for
        self._clock = clock
        self._places = asyncio.Semaphore(at_once)
        self._at_address: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._dead: ExpiringCache[str] = ExpiringCache(_DEAD_ADDRESSES)

    async def ask(
        self,
        url: URL,
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        waits: bool = True,
    ) -> T | NoAnswer:
        """What `read` returns for the answer to GET, or to POST with a body.

        Errors of aiohttp and the system become `NoAnswer`. `waits` False: the request is made at
        once or not at all.
        """
        host, port = url.host or "", self._port or url.port or HTTPS_PORT
        addresses = await self._addresses(host, port)
        if isinstance(addresses, NoAnswer):
            return addresses
        at_address = self._at_address.setdefault(addresses[0], asyncio.Semaphore(_AT_ONE_ADDRESS))
        if not waits and (at_address.locked() or self._places.locked()):
            return NoAnswer(f"{host} has no place for another request now", is_busy=True)
        # The address first: a caller that waits for a slow look-up holds no place of the others.
        async with at_address, self._places:
            dead = self._dead.get(addresses[0], now=self._clock())
            if dead is not None:
                return NoAnswer(dead)
            request = self._request(addresses, url.with_port(port), read, headers, body)
            return await self._answer(host, addresses[0], request)

    async def _addresses(self, host: str, port: int) -> list[str] | NoAnswer:
        """The allowed addresses, at least one, always in the same order."""
        answer = await self._look_up(host)
        if not isinstance(answer, AddressAnswer):
            words = f" {answer.reason}" if isinstance(answer, NoSuchName) else f": {answer.reason}"
            return NoAnswer(f"{host}{words}")
        judged = {one: self._judge(one, port) for one in sorted(answer.addresses)}
        good = [one for one, rejection in judged.items() if rejection is None]
        if good:
            return good[:_MOST_ADDRESSES]
        reasons = [f"{host}: {one} {why.reason}" for one, why in judged.items() if why is not None]
        return NoAnswer(next(iter(reasons), f"{host} has no address"))

    async def _look_up(self, host: str) -> AddressLookup:
        if self._port == 0 and parse_address(host) is not None:
            return AddressAnswer((host,))
        if self._port == 0 and host == "localhost":  # RFC 6761 §6.3: never asked of the DNS
            return AddressAnswer(("127.0.0.1", "::1"))
        return await self._resolver.addresses(host)

    async def _answer(self, host: str, address: str, request: Awaitable[T]) -> T | NoAnswer:
        """The answer to a request, or why there is none."""
        try:
            async with asyncio.timeout(self._seconds):
                return await request
        except (aiohttp.ClientConnectorCertificateError, ssl.CertificateError) as exc:
            return NoAnswer(_reason(host, exc), is_untrusted=True)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as exc:
            reason = _reason(host, exc)
            if not isinstance(exc, aiohttp.ClientSSLError):
                until = self._clock() + self._dead_for.total_seconds()
                self._dead.put(address, reason, expires=until)
            return NoAnswer(reason)
        except TimeoutError:
            return NoAnswer(f"{host} took longer than {self._seconds:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            return NoAnswer(_reason(host, exc))

    async def _request(
        self,
        addresses: list[str],
        url: URL,
        read: Callable[[aiohttp.ClientResponse], Awaitable[T]],
        headers: Mapping[str, str],
        body: bytes | None,
    ) -> T:
        async def judged(host: str, port: int) -> list[str]:
            return addresses

        connector = _Connector(
            resolver=JudgedResolver(judged),
            use_dns_cache=False,
            ssl=self._context(),
            force_close=True,
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "relay", **headers},
                timeout=timeout,
                trust_env=False,
                auto_decompress=False,
            ) as session,
            session.request(
                "GET" if body is None else "POST", url, data=body, allow_redirects=False
            ) as answer,
        ):
            return await read(answer)


class _Connector(aiohttp.TCPConnector):
    """The connection of one request; none is left when this is closed.

    aiohttp does not wait for the end of a connection that it does not keep, and asyncio waits for
    a server that does not end TLS for 30 seconds: the server would hold a socket beyond its place.
    """

    _opened: tuple[asyncio.Transport, ResponseHandler] | None = None

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None and connection.protocol is not None:
            self._opened = connection.transport, connection.protocol
        return connection

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        if self._opened is None:
            return
        (transport, protocol), self._opened = self._opened, None
        transport.abort()
        if (closed := protocol.closed) is not None:
            await asyncio.wait([closed])
            closed.exception()  # whatever the server did last, the answer has been read


def _reason(host: str, exc: BaseException) -> str:
    words = " ".join(str(exc).split()) or type(exc).__name__
    return words[:300] if host in words else f"{host}: {words[:300]}"
