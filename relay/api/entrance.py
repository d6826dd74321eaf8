"""The listening socket of the HTTP server: limits of connections, and the certificate.

A connection counts from its acceptance until its descriptor is closed, also during the TLS
handshake. A connection beyond the limit, or beyond half of it from one client, is closed; without
TLS it gets an answer first. A handshake has a time limit here; the header section of a request has
its time limit in aiohttp.

Text that is no HTTP gets the same form of answer as every other mistake. The kernel ends the
connection of a client that reads nothing (TCP_USER_TIMEOUT). A new `context` counts from the next
handshake on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

from aiohttp import web

from relay.mail.ip import canonical
from relay.mail.jsontext import JsonFields
from relay.submit.failures import client_key
from relay.submit.log_limit import LogLimit

log = logging.getLogger(__name__)

_BACKLOG = 256
_HANDSHAKE_SECONDS = 20.0
_UNREAD_SECONDS = 60
_PAUSE_SECONDS = 1.0


def _turned_away(status: str, sentence: str) -> bytes:
    said = json.dumps({"message": sentence})
    return (
        f"HTTP/1.1 {status}\r\nServer: relay\r\nRetry-After: 60\r\nConnection: close\r\n"
        "Content-Type: application/json; charset=utf-8\r\n"
        f"Content-Length: {len(said)}\r\n\r\n{said}"
    ).encode()


_TOO_MANY = _turned_away("503 Service Unavailable", "Too many connections, try again later")
_TOO_MANY_OF_CLIENT = _turned_away(
    "429 Too Many Requests", "Too many connections from your address"
)


class HttpError(Exception):
    """The server cannot start; the text says why."""


class HttpConnection(web.RequestHandler):
    """One connection. `client`: the name that it is counted under."""

    __slots__ = ("client", "note")

    def __init__(
        self, server: web.Server, *, client: str, note: Callable[[str], None], **options: Any
    ) -> None:
        self.client = client
        self.note = note
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        # How many requests may wait for the answers before them. aiohttp would keep 32 header
        # sections for a client that reads no answers.
        self._max_msg_queue_size = 2
        self._msg_queue_resume_size = 1

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that reaches no handler. aiohttp's answer would be a text that quotes
        the request.
        """
        super().handle_error(request, status, exc, message)
        if status == 400:
            self.note(f"no HTTP request: {type(exc).__name__ if exc else message}")
        said = "This is no HTTP request" if status == 400 else "An error of the relay's own"
        response = web.json_response({"message": said}, status=status, headers={"Server": "relay"})
        response.force_close()
        return response


class Entrance:
    """Accepts at most `most` connections at a time for a server. `context`: for the next handshake.

    `options`: of aiohttp's connections.
    """

    def __init__(
        self,
        server: web.Server,
        *,
        most: int,
        context: ssl.SSLContext | None = None,
        options: JsonFields | None = None,
        clock: Callable[[], datetime],
    ) -> None:
        self.context = context
        self._clock = clock
        self._log_limit = LogLimit()
        self._server = server
        self._options = options or {}
        self._most = most
        self._most_of_client = max(most // 2, 1)
        self._sockets: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._entering: dict[asyncio.Task[None], str] = {}

    async def open(self, address: tuple[str, int]) -> tuple[str, int]:
        """Listen. Returns the address with the real port. OSError where that is not possible."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, *_, name in dict.fromkeys(found):
                self._sockets.append(_listening(family, name))
        except OSError:
            self._close_sockets()
            raise
        for listening in self._sockets:
            task = asyncio.get_running_loop().create_task(self._accept(listening))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        bound = self._sockets[0].getsockname()
        return bound[0], bound[1]

    async def close(self) -> None:
        """Accept no new connection. Open connections stay."""
        for task in [*self._tasks, *self._entering]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._entering, return_exceptions=True)
        self._close_sockets()

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    @property
    def connections(self) -> int:
        """How many connections are open, or in their handshake."""
        return len(self._entering) + len(self._server.connections)

    def _connections_of(self, client: str) -> int:
        inside = [one.client for one in self._server.connections if isinstance(one, HttpConnection)]
        return [*self._entering.values(), *inside].count(client)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, address = await loop.sock_accept(listening)
            except ConnectionError:
                continue  # the client is gone already
            except OSError as error:  # no descriptor is left
                log.warning("HTTP: a connection cannot be accepted: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            note = partial(self._note, address[0])
            name = client_key(address[0])
            if self.connections >= self._most:
                self._turn_away(client, _TOO_MANY, note)
            elif self._connections_of(name) >= self._most_of_client:
                self._turn_away(client, _TOO_MANY_OF_CLIENT, note)
            else:
                entering = loop.create_task(self._let_in(client, name, note))
                self._entering[entering] = name
                entering.add_done_callback(self._entering.pop)

    def _note(self, client: str, said: str) -> None:
        """Log a line about a client, unless it has had too many."""
        line = self._log_limit.line(client, said, self._clock())
        if line is not None:
            log.info("HTTP: [%s]: %s", canonical(client), line)

    def _turn_away(self, client: socket.socket, answer: bytes, note: Callable[[str], None]) -> None:
        whose = "all" if answer is _TOO_MANY else "this address"
        note(f"{self.connections} connections are open, too many of {whose}: not let in")
        with client, contextlib.suppress(OSError):
            if self.context is None:
                client.send(answer)
                client.shutdown(socket.SHUT_WR)

    async def _let_in(self, client: socket.socket, name: str, note: Callable[[str], None]) -> None:
        try:
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                client.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000
                )
            await asyncio.get_running_loop().connect_accepted_socket(
                partial(HttpConnection, self._server, client=name, note=note, **self._options),
                client,
                ssl=self.context,
                ssl_handshake_timeout=_HANDSHAKE_SECONDS if self.context is not None else None,
            )
        except asyncio.CancelledError:
            client.close()
        except OSError as error:  # SSLError is one
            client.close()
            note(f"no connection was made: {error}")


def _listening(family: int, name: Any) -> socket.socket:
    """A listening socket. One of IPv6 takes no IPv4, as with the servers of the event loop."""
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(name)
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening
