"""What a Postfix asks whether a password is right: the authentication protocol of Dovecot, version
1.1, on loopback, for one user.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_HANDSHAKE = (
    b"VERSION\t1\t1\nMECH\tPLAIN\tplaintext\nMECH\tLOGIN\tplaintext\n"
    b"SPID\t1\nCUID\t1\nCOOKIE\t0123456789abcdef0123456789abcdef\nDONE\n"
)


@asynccontextmanager
async def sasl_server(user: str, password: str) -> AsyncIterator[int]:
    """Its port."""
    right = [user.encode(), password.encode()]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _answer(reader, writer, right)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, right: list[bytes]
) -> None:
    said: dict[bytes, list[bytes]] = {}
    mechanism = b""
    writer.write(_HANDSHAKE)
    while line := await reader.readline():
        word, *rest = line.rstrip(b"\n").split(b"\t")
        if word == b"AUTH":
            mechanism, (_, is_given, answer) = rest[1], rest[-1].partition(b"resp=")
            said[rest[0]] = _words(mechanism, answer) if is_given else []
        elif word == b"CONT":
            said[rest[0]] += _words(mechanism, rest[1])
        else:
            continue
        writer.write(_verdict(rest[0], said[rest[0]], mechanism, right))


def _words(mechanism: bytes, answer: bytes) -> list[bytes]:
    octets = base64.b64decode(answer)
    return octets.split(b"\0")[1:] if mechanism == b"PLAIN" else [octets]


def _verdict(number: bytes, words: list[bytes], mechanism: bytes, right: list[bytes]) -> bytes:
    if len(words) < 2:
        asked = b"" if mechanism == b"PLAIN" else (b"Username:", b"Password:")[len(words)]
        return b"CONT\t%s\t%s\n" % (number, base64.b64encode(asked))
    if words == right:
        return b"OK\t%s\tuser=%s\n" % (number, right[0])
    return b"FAIL\t%s\n" % number
