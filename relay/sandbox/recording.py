"""What a mail host of the sandbox receives: each byte, with the phase of its connection (clear, the
handshake, inside TLS), and each finished message.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from relay.mail.jsontext import JsonFields
from relay.sandbox.script import Script


class Phase(StrEnum):
    """The phase of the connection in which a byte came."""

    CLEAR = "clear"
    HANDSHAKE = "handshake"
    """After 220 to STARTTLS, where the handshake did not succeed."""
    TLS = "tls"


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A message that got 250 at its final dot (or at BDAT LAST), with the client's arguments."""

    mail: str
    recipients: tuple[str, ...]
    content: bytes
    in_tls: bool
    tls_version: str | None
    sni: str | None
    connection: RecordedConnection = field(repr=False)

    @property
    def reverse_path(self) -> str:
        return path(self.mail)

    @property
    def forward_paths(self) -> tuple[str, ...]:
        return tuple(path(recipient) for recipient in self.recipients)


@dataclass(eq=False, slots=True)
class RecordedConnection:
    """One connection from its first byte to its last."""

    number: int
    peer: tuple[str, int]
    chunks: list[tuple[Phase, bytes]] = field(default_factory=list)
    """Every byte that came, in order; inside TLS, the decrypted bytes."""
    commands: list[tuple[Phase, str]] = field(default_factory=list)
    messages: list[ReceivedMessage] = field(default_factory=list)
    sni: str | None = None
    tls_version: str | None = None
    client_name: str | None = None
    """The common name of the client's certificate."""
    resumed: bool = False
    """Whether the client resumed an earlier TLS session."""
    tls_error: str = ""
    """Why the handshake failed, as this host reports it."""
    closed: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def clear(self) -> bytes:
        """All that the client sent in clear, without the ClientHello of a handshake."""
        return self._bytes(Phase.CLEAR)

    @property
    def in_handshake(self) -> bytes:
        """All that came after a 220 to STARTTLS where the handshake did not succeed."""
        return self._bytes(Phase.HANDSHAKE)

    @property
    def in_tls(self) -> bytes:
        """All that the client sent inside TLS."""
        return self._bytes(Phase.TLS)

    @property
    def verbs(self) -> list[str]:
        """The commands' verbs, in order."""
        return [line.split(" ", 1)[0].upper() for _, line in self.commands]

    @property
    def clear_verbs(self) -> list[str]:
        """The verbs that came in clear, in order."""
        return [
            line.split(" ", 1)[0].upper() for phase, line in self.commands if phase is Phase.CLEAR
        ]

    def _bytes(self, phase: Phase) -> bytes:
        return b"".join(chunk for at, chunk in self.chunks if at is phase)


class Ended(Exception):
    """One side has closed the connection."""


class HostProtocol(asyncio.Protocol):
    """Reads and writes one connection, in clear and then in TLS, and records each byte."""

    def __init__(
        self,
        opened: Callable[[HostProtocol], RecordedConnection],
        lost: Callable[[HostProtocol], None],
    ) -> None:
        self._opened = opened
        self._lost = lost
        self._buffer = bytearray()
        self._more = asyncio.Event()
        self._ended = False
        self._read_bytes = 0
        self._rate: int | None = None
        self._stop_after: int | None = None
        self.phase = Phase.CLEAR

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted by class: uvloop's transports are none of asyncio's.
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.connection = self._opened(self)

    def pace(self, script: Script) -> None:
        """Read at the speed that the script sets."""
        self._rate, self._stop_after = script.read_bytes_per_second, script.read_stops_after

    def data_received(self, data: bytes) -> None:
        self.connection.chunks.append((self.phase, data))
        self._buffer += data
        self._more.set()
        self._read_bytes += len(data)
        if self._stop_after is not None and self._read_bytes >= self._stop_after:
            self.transport.pause_reading()
        elif self._rate is not None:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(len(data) / self._rate, self._resume)

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        self._ended = True
        self._more.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self.connection.closed = True
        self._more.set()
        self._lost(self)

    async def line(self) -> str:
        """The next line, without its end."""
        while (end := self._buffer.find(b"\n")) < 0:
            await self._wait()
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")

    async def content(self) -> bytes:
        """What follows DATA up to the final dot, with dot-stuffing undone (RFC 5321 §4.5.2)."""
        if self._buffer[:3] == b".\r\n":
            del self._buffer[:3]
            return b""
        searched = 0
        while (end := self._buffer.find(b"\r\n.\r\n", searched)) < 0:
            searched = max(0, len(self._buffer) - 4)
            await self._wait()
            if not searched and self._buffer[:3] == b".\r\n":
                del self._buffer[:3]
                return b""
        content = bytes(self._buffer[: end + 2])
        del self._buffer[: end + 5]
        return (
            content.removeprefix(b".")
            if content[:2] == b".."
            else content.replace(b"\r\n..", b"\r\n.")
        )

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        while len(self._buffer) < count:
            await self._wait()
        chunk = bytes(self._buffer[:count])
        del self._buffer[:count]
        return chunk

    async def anything(self) -> None:
        """Wait until the client has sent something."""
        while not self._buffer:
            await self._wait()

    async def until_closed(self) -> None:
        """Read and discard until the client closes the connection."""
        while True:
            self._buffer.clear()
            await self._wait()

    async def _wait(self) -> None:
        if self._ended:
            raise Ended
        self._more.clear()
        await self._more.wait()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """The server's side of the handshake. Unread bytes that came in clear are discarded."""
        self._buffer.clear()
        # From here on `data_received` gets decrypted bytes only.
        self.phase = Phase.TLS
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=60
            )
        except (OSError, EOFError) as error:
            self.connection.tls_error = str(error) or type(error).__name__
            raise Ended from error
        if transport is None:
            raise Ended
        self.transport = transport
        session = transport.get_extra_info("ssl_object")
        self.connection.tls_version = session.version()
        self.connection.resumed = bool(session.session_reused)
        self.connection.client_name = _common_name(session.getpeercert())

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    async def send(self, data: bytes, drip: float) -> None:
        """Write it at once, or byte by byte with `drip` seconds after each."""
        if not drip:
            self.write(data)
            return
        for byte in data:
            self.write(bytes([byte]))
            await asyncio.sleep(drip)

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def reset(self) -> None:
        """Break off with RST instead of FIN."""
        with suppress(OSError, AttributeError):
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self.transport.abort()


def _common_name(certificate: JsonFields | None) -> str | None:
    fields = (pair for names in (certificate or {}).get("subject", ()) for pair in names)
    return next((value for name, value in fields if name == "commonName"), None)


def path_text(argument: str) -> str:
    """`FROM:<a@b> SIZE=1` → `<a@b>`."""
    return argument.partition(":")[2].strip().partition(" ")[0]


def path(argument: str) -> str:
    return path_text(argument).removeprefix("<").removesuffix(">")
