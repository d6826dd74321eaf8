"""A next hop that accepts everything and has what smtp-sink lacks: STARTTLS, late replies, times.

    python -m benchmarks.sink ADDRESS[,ADDRESS …] PORT [CERTIFICATE] [--delay SECONDS]

For each line on stdin it prints one line of JSON: the recipients accepted so far, the most
transactions at a time, and the travel time in seconds of each message that came with an X-Sent
field (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import ssl
import sys
import time
from typing import cast

import uvloop

_END = b"\r\n.\r\n"
_SENT = b"\r\nX-Sent: "


class _Taken:
    """What all sessions have accepted."""

    def __init__(self) -> None:
        self.recipients = 0
        self.messages = 0
        self.under_way: set[_Session] = set()
        self.most = 0
        self.seconds: list[float] = []


class _Session(asyncio.Protocol):
    def __init__(self, taken: _Taken, tls: ssl.SSLContext | None, delay: float) -> None:
        self._taken, self._tls, self._delay = taken, tls, delay
        self._loop = asyncio.get_running_loop()
        self._in_data = False
        self._in_tls = False
        self._recipients = 0
        self._buffer = b""
        self._content: list[bytes] = []
        self._said: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._in_tls:
            self._say(b"220 sink ESMTP\r\n")
            self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._taken.under_way.discard(self)

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        while data:
            if self._in_data:
                end = data.find(_END)
                if end < 0:
                    # The beginning is enough; keep the last octets, which may begin the final dot.
                    if len(self._content) < 2:
                        self._content.append(data[:-4])
                    data = data[-4:]
                    break
                self._taken_one(b"".join(self._content) + data[:end])
                data = data[end + 5 :]
                continue
            line, found, rest = data.partition(b"\r\n")
            if not found:
                break
            data = rest
            self._obey(line[:4].upper())
        self._buffer = data
        self._flush()

    def _obey(self, verb: bytes) -> None:
        if verb == b"EHLO":
            offers = b"250-STARTTLS\r\n" if self._tls and not self._in_tls else b""
            self._say(b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n" + offers + b"250 SIZE\r\n")
        elif verb == b"MAIL":
            self._taken.under_way.add(self)
            self._taken.most = max(self._taken.most, len(self._taken.under_way))
            self._say(b"250 2.1.0 Ok\r\n")
        elif verb == b"RCPT":
            self._recipients += 1
            self._say(b"250 2.1.5 Ok\r\n")
        elif verb == b"DATA":
            self._in_data, self._content = True, []
            self._say(b"354 Go on\r\n")
        elif verb == b"STAR" and self._tls:
            self._say(b"220 Go on\r\n")
            self._flush()
            self._task = self._loop.create_task(self._start_tls(self._tls))
        elif verb == b"QUIT":
            self._say(b"221 2.0.0 Bye\r\n")
            self._flush(and_close=True)
        else:
            self._say(b"250 2.0.0 Ok\r\n")

    async def _start_tls(self, tls: ssl.SSLContext) -> None:
        try:
            upgraded = await self._loop.start_tls(self._transport, self, tls, server_side=True)
        except (OSError, ssl.SSLError):
            return
        assert upgraded is not None
        self._transport, self._in_tls = upgraded, True

    def _taken_one(self, content: bytes) -> None:
        self._in_data = False
        self._taken.recipients += self._recipients
        self._taken.messages += 1
        self._recipients = 0
        found = content.find(_SENT, 0, 4096)
        if found >= 0:
            value = content[found + len(_SENT) :].partition(b"\r\n")[0]
            self._taken.seconds.append(time.monotonic() - float(value))
        self._say(b"250 2.0.0 Ok\r\n")
        self._loop.call_later(self._delay, self._taken.under_way.discard, self)

    def _say(self, reply: bytes) -> None:
        self._said.append(reply)

    def _flush(self, *, and_close: bool = False) -> None:
        if self._said:
            words, delay = b"".join(self._said), self._delay * len(self._said)
            self._said.clear()
            if delay:
                self._loop.call_later(delay, self._write, words, and_close)
            else:
                self._write(words, and_close)

    def _write(self, words: bytes, and_close: bool) -> None:
        if not self._transport.is_closing():
            self._transport.write(words)
            if and_close:
                self._transport.close()


async def _serve(address: str, port: int, certificate: str, delay: float) -> None:
    taken = _Taken()
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Session(taken, tls, delay), address.split(","), port, backlog=2000
    )
    gc.freeze()
    questions = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    while await questions.readline():
        print(
            json.dumps({"taken": taken.recipients, "most": taken.most, "seconds": taken.seconds}),
            flush=True,
        )
        taken.seconds, taken.most = [], 0
    server.close()


def main() -> None:
    """Read the arguments and serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("certificate", nargs="?", default="")
    parser.add_argument("--delay", type=float, default=0.0)
    wanted = parser.parse_args()
    uvloop.run(_serve(wanted.address, wanted.port, wanted.certificate, wanted.delay))


if __name__ == "__main__":
    main()
