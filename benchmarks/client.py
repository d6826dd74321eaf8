"""A client that has what smtp-source lacks: STARTTLS, an even rate, and the time of each 250.

    python -m benchmarks.client PORT --messages N [--sessions S] [--rate R] [--tls] [--each M]
    [--mixture FIRST]

It prints JSON: for each message the seconds from MAIL to the 250 that accepts it. With a rate, the
time starts when the message was to be sent, so that it includes the wait for a free session. With a
mixture, the recipients are those of `benchmarks.mixture` from a number on, otherwise always one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from itertools import count, repeat

import uvloop

from benchmarks.mixture import recipient


class _Session:
    """One connection to the relay."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None) -> _Session:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        session = cls(reader, writer)
        await session._hear(b"220")
        await session._say(b"EHLO client.example\r\n", b"250")
        if tls is not None:
            await session._say(b"STARTTLS\r\n", b"220")
            await writer.start_tls(tls, server_hostname="client.example")
            await session._say(b"EHLO client.example\r\n", b"250")
        return session

    async def send(self, to: str, content: bytes, sent: float) -> None:
        envelope = f"MAIL FROM:<a@client.example>\r\nRCPT TO:<{to}>\r\nDATA\r\n"
        self._writer.write(envelope.encode())
        for code in (b"250", b"250", b"354"):
            await self._hear(code)
        await self._say(b"X-Sent: %.6f\r\n" % sent + content + b"\r\n.\r\n", b"250")

    async def close(self) -> None:
        await self._say(b"QUIT\r\n", b"221")
        self._writer.close()

    async def _say(self, words: bytes, expected: bytes) -> None:
        self._writer.write(words)
        await self._hear(expected)

    async def _hear(self, expected: bytes) -> None:
        line = await self._reader.readline()
        while line[3:4] == b"-":
            line = await self._reader.readline()
        if not line.startswith(expected):
            raise SystemExit(f"expected {expected!r}, heard {line!r}")


def _schedule(messages: int, rate: float) -> Iterator[float]:
    """When each message is to be sent; 0 for at once."""
    began = time.monotonic()
    for number in range(messages):
        yield began + number / rate if rate else 0.0


async def _run(wanted: argparse.Namespace) -> list[float]:
    tls = None
    if wanted.tls:
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    content = b"Subject: benchmark\r\nFrom: a@client.example\r\n\r\n" + b"x" * 76 + b"\r\n"
    content += (b"y" * 76 + b"\r\n") * ((wanted.size - len(content)) // 78)
    schedule, seconds = _schedule(wanted.messages, wanted.rate), []
    recipients: Iterator[str] = repeat("b@d0.example")
    if wanted.mixture is not None:
        recipients = map(recipient, count(wanted.mixture))

    async def session() -> None:
        open_session, sent_here = await _Session.open(wanted.port, tls), 0
        for due in schedule:
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            if sent_here == wanted.each:
                await open_session.close()
                open_session, sent_here = await _Session.open(wanted.port, tls), 0
            sent = due or time.monotonic()
            await open_session.send(next(recipients), content, sent)
            seconds.append(time.monotonic() - sent)
            sent_here += 1
        await open_session.close()

    await asyncio.gather(*(session() for _ in range(wanted.sessions)))
    return seconds


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--each", type=int, default=0, help="messages a connection, 0 for all")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--mixture", type=int, metavar="FIRST")
    print(json.dumps(uvloop.run(_run(parser.parse_args()))))


if __name__ == "__main__":
    main()
