"""A client that says exactly what it is told, octet by octet, and reads whole replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct

from tests.fakes.waiting import patient

PATIENCE = 10.0


class Client:
    """One connection. `say` adds CRLF, `send` does not; `reply` is all lines of one reply, joined
    by LF.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> Client:
        name = "localhost" if tls else None
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, server_hostname=name)
        return cls(reader, writer)

    @classmethod
    async def connect_unix(cls, path: str) -> Client:
        return cls(*await asyncio.open_unix_connection(path))

    async def send(self, octets: bytes) -> None:
        self.writer.write(octets)
        await self.writer.drain()

    async def say(self, line: str) -> str:
        """Say a command and hear its reply."""
        await self.send(line.encode() + b"\r\n")
        return await self.reply()

    async def reply(self) -> str:
        lines: list[str] = []
        async with asyncio.timeout(patient(PATIENCE)):
            while not lines or lines[-1][3:4] == "-":
                line = await self.reader.readline()
                if not line.endswith(b"\r\n"):
                    return "closed"
                lines.append(line[:-2].decode())
        return "\n".join(lines)

    async def replies(self, count: int) -> list[str]:
        return [await self.reply() for _ in range(count)]

    async def greet(self) -> str:
        """Hear the greeting, and say EHLO."""
        assert (await self.reply()).startswith("220 ")
        return await self.say("EHLO client.example")

    async def begin(self, sender: str = "a@example.com", *recipients: str) -> None:
        """Greet, and name sender and recipients; all of it is accepted."""
        assert (await self.greet()).startswith("250")
        assert (await self.say(f"MAIL FROM:<{sender}>")).startswith("250")
        for recipient in recipients or ("b@example.net",):
            assert (await self.say(f"RCPT TO:<{recipient}>")).startswith("250")

    async def data(self, content: bytes) -> str:
        """DATA with this content, as it is; what it ends with is the caller's."""
        assert (await self.say("DATA")).startswith("354")
        await self.send(content)
        return await self.reply()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        await self.writer.start_tls(context, server_hostname="localhost")

    async def is_closed(self, within: float = PATIENCE) -> bool:
        """Whether the peer ends the connection, whatever it still says."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(patient(within)):
                while await self.reader.read(65536):
                    pass
        return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            async with asyncio.timeout(patient(1)):
                await self.writer.wait_closed()

    def vanish(self) -> None:
        """Gone, without a word: the peer is sent RST, not FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
