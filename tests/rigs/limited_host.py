"""A mail host that serves so many connections at once and turns away the rest.

`manner`: how it treats the rest: "421" as the greeting, "421 at MAIL", "close" or "reset" before a
greeting, "refuse" (its port is closed meanwhile), "silence". `seconds`: how long it takes for each
message, `farewell`: and after QUIT. `at_once`: so many messages it works on at a time, 0 for any
number. `messages`: after so many on one connection it answers 452 to MAIL. `rate`: so many MAIL in
so many seconds; more of them are answered with `over_rate`. `hello`: the answer to EHLO and HELO.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf


@dataclass(eq=False, slots=True)
class Stay:
    """A connection, from the greeting to its end on the monotonic clock. `client`: as it called
    itself.
    """

    began: float
    ended: float = inf
    client: str = ""


def most_at_once(stays: Iterable[Stay]) -> int:
    """The most connections that stood at one moment."""
    changes = [change for one in stays for change in ((one.began, 1), (one.ended, -1))]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


class LimitedHost:
    """Listens on `address`; port 0 is any that is free."""

    def __init__(
        self,
        takes: int = 3,
        manner: str = "421",
        *,
        seconds: float = 0.0,
        messages: int = 0,
        farewell: float = 0.0,
        at_once: int = 0,
        rate: tuple[int, float] | None = None,
        over_rate: str = "451 4.7.1 rate limit exceeded",
        hello: str = "250-host\r\n250 PIPELINING",
        address: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.takes = takes
        self.manner = manner
        self.seconds = seconds
        self.messages = messages
        self.farewell = farewell
        self.rate = rate
        self.over_rate = over_rate
        self.hello = hello
        self.begun_at: list[float] = []
        """Each MAIL, on the monotonic clock."""
        self.over = 0
        """How many of them were over the rate."""
        self._working = asyncio.Semaphore(at_once or 10_000)
        self.messages_of: list[int] = []
        """How many messages each connection has carried that was greeted."""
        self.address = address
        self.port = port
        self.open = self.most = self.connections = self.turned_away = 0
        self.taken: list[str] = []
        self.taken_at: dict[str, float] = {}
        """By recipient, on the monotonic clock."""
        self.stays: list[Stay] = []
        self._server: asyncio.Server | None = None
        self._is_listening = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> LimitedHost:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fall_silent(self) -> None:
        """Hang up, and greet nobody from now on."""
        self.takes, self.manner = 0, "silence"
        for task in self._tasks:
            task.cancel()

    def most_begun_within(self, seconds: float) -> int:
        """The most MAIL that came in any stretch of so many seconds."""
        times = self.begun_at
        return max((bisect_right(times, at + seconds) - n for n, at in enumerate(times)), default=0)

    def _is_over_rate(self) -> bool:
        now = time.monotonic()
        self.begun_at.append(now)
        if self.rate is None:
            return False
        messages, seconds = self.rate
        is_over = len(self.begun_at) - bisect_left(self.begun_at, now - seconds) > messages
        self.over += is_over
        return is_over

    async def _listen(self) -> None:
        self._is_listening = True
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((self.address, self.port))
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listening)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        stay = Stay(time.monotonic())
        self.stays.append(stay)
        self.most = max(self.most, self.open)
        is_full = self.open > self.takes
        self.turned_away += is_full
        if self.manner == "refuse" and self.open >= self.takes and self._server is not None:
            self._server.close()
            self._server, self._is_listening = None, False
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._talk(reader, writer, is_full, stay)
        finally:
            self.open -= 1
            stay.ended = time.monotonic()
            self._tasks.discard(task)
            with suppress(ConnectionError):
                writer.close()
            if not self._is_listening and self.open < self.takes:
                await self._listen()

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_full: bool, stay: Stay
    ) -> None:
        if is_full and self.manner == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if is_full and self.manner in ("close", "reset"):
            return
        if is_full and self.manner == "silence":
            await reader.read()  # until the client goes
            return
        if is_full and self.manner == "421":
            writer.write(b"421 4.7.0 too many connections\r\n")
            return
        writer.write(b"220 ready\r\n")
        number, rcpt = len(self.messages_of), ""
        self.messages_of.append(0)
        while line := await reader.readline():
            verb = line[:4].upper()
            if verb in (b"EHLO", b"HELO"):
                stay.client = line[4:].strip().decode()
                writer.write(f"{self.hello}\r\n".encode())
            elif verb == b"MAIL" and is_full and self.manner == "421 at MAIL":
                writer.write(b"421 4.7.0 too many connections\r\n")
                return
            elif verb == b"MAIL" and self._is_over_rate():
                writer.write(f"{self.over_rate}\r\n".encode())
                if self.over_rate.startswith("421"):
                    return
                await _without_mail(reader, writer)
            elif verb == b"MAIL" and self.messages and self.messages_of[number] >= self.messages:
                writer.write(b"452 4.3.2 too many messages on this connection\r\n")
                await _without_mail(reader, writer)
            elif verb == b"DATA":
                writer.write(b"354 go on\r\n")
                await reader.readuntil(b"\r\n.\r\n")
                async with self._working:
                    await asyncio.sleep(self.seconds)
                self.taken.append(rcpt)
                self.taken_at[rcpt] = time.monotonic()
                self.messages_of[number] += 1
                writer.write(b"250 2.0.0 taken\r\n")
            elif verb == b"QUIT":
                await asyncio.sleep(self.farewell)
                writer.write(b"221 bye\r\n")
                return
            else:
                if verb == b"RCPT":
                    rcpt = line.split(b":", 1)[1].strip(b"<>\r\n ").decode()
                writer.write(b"250 ok\r\n")
            await writer.drain()


async def _without_mail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer what a pipelining client sends after its MAIL was refused, to DATA."""
    verb = b""
    while verb != b"DATA":
        verb = (await reader.readline())[:4].upper()
        if not verb:
            raise ConnectionResetError
        writer.write(b"503 5.5.1 no MAIL\r\n")
