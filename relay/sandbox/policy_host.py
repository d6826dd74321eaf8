"""Web servers for tests that publish MTA-STS policies, good ones and broken ones.

    PolicyHost("example.net", policy("mx.example.net"), address="127.7.0.9", port=8443, authority=…)

A server gives the same answer to every request, over TLS with a certificate for `mta-sts.` and the
domain. `requests` counts them.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from relay.route.mta_sts import policy_host
from relay.sandbox.certificates import Authority, Kind, server_context


def policy(*mx: str, mode: str = "enforce", max_age: int = 604_800) -> bytes:
    """The text of a policy."""
    lines = [
        "version: STSv1",
        f"mode: {mode}",
        *(f"mx: {name}" for name in mx),
        f"max_age: {max_age}",
    ]
    return "".join(f"{line}\r\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class WebAnswer:
    """The server's answer. `is_silent`: it reads the request and does not answer.

    `pause`: seconds between two octets, `delay`: before the first. `length`: the Content-Length
    that it claims, None for the true one.
    """

    body: bytes = b""
    status: int = 200
    content_type: str = "text/plain"
    fields: tuple[str, ...] = ()
    is_silent: bool = False
    delay: float = 0.0
    pause: float = 0.0
    length: int | None = None

    @property
    def octets(self) -> bytes:
        """Header section and body."""
        length = len(self.body) if self.length is None else self.length
        head = [
            f"HTTP/1.1 {self.status} Answer",
            *([f"Content-Type: {self.content_type}"] if self.content_type else []),
            f"Content-Length: {length}",
            *self.fields,
        ]
        return "".join(f"{line}\r\n" for line in [*head, ""]).encode() + self.body


class PolicyHost:
    """One server, at one address. `answer` may be changed while it runs."""

    def __init__(
        self,
        domain: str,
        answer: bytes | WebAnswer,
        *,
        authority: Authority,
        address: str = "127.0.0.1",
        port: int = 0,
        kind: Kind = Kind.GOOD,
        takes_tls: bool = True,
    ) -> None:
        self.name = policy_host(domain)
        self.answer = answer
        self.address = address
        self.port = port
        self.requests = 0
        self.heads: list[bytes] = []
        self._context = server_context(authority.leaf(self.name, kind)) if takes_tls else None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> PolicyHost:
        self._server = await asyncio.start_server(
            self._serve, self.address, self.port, ssl=self._context
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._one_request(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._context is None:
            await asyncio.sleep(3600)
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        self.requests += 1
        answer = self.answer if isinstance(self.answer, WebAnswer) else WebAnswer(self.answer)
        await asyncio.sleep(3600 if answer.is_silent else answer.delay)
        if not answer.pause:
            writer.write(answer.octets)
        else:
            for octet in answer.octets:
                writer.write(bytes((octet,)))
                await writer.drain()
                await asyncio.sleep(answer.pause)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
