"""A proxy between a client and a server on loopback that cuts connections where a test says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from enum import Enum, auto

from tests.fakes.waiting import patient


class Cut(Enum):
    """What becomes of the octets that are waited for."""

    BEFORE = auto()
    """The server does not get them, and the connection is cut."""
    AFTER = auto()
    """The server gets them, and the connection is cut before its answer comes through."""


class Cutter:
    """Passes octets on; `cut` waits for some. `is_open`: new connections are passed on.

    `line`: cleared, no octet passes either way, and nobody is told; what comes is kept until it is
    set again. `altered`: octets of the server that are replaced by others.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._cut: Cut | None = None
        self._marker = b""
        self.port = 0
        self.is_open = True
        self.closes_then = False
        self.cuts = 0
        self.is_over = False
        self.line = threading.Event()
        self.line.set()
        self.altered: tuple[bytes, bytes] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self, how: Cut, marker: bytes, *, closes_then: bool = False) -> None:
        """Cut the first connection whose client sends `marker`; `closes_then`: and take no other
        until `is_open` is set again.
        """
        self._cut, self._marker, self.closes_then = how, marker, closes_then

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client."""
        if not self.is_open:
            writer.transport.abort()
            return
        try:
            others = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        answers = asyncio.create_task(self._pass_on(others[0], writer))
        self._tasks.add(answers)
        try:
            await self._requests(reader, others[1], answers)
        finally:
            answers.cancel()
            self._tasks.discard(answers)
            others[1].transport.abort()
            writer.transport.abort()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        answers: asyncio.Task[None],
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await self._while_dead()
                how = self._cut if self._marker and self._marker in data else None
                if how is not None:
                    self._cut, self._marker = None, b""
                    self.cuts += 1
                    self.is_open = not self.closes_then
                    if how is Cut.BEFORE:
                        return
                    answers.cancel()
                server.write(data)
                await server.drain()
                if how is Cut.AFTER:
                    await asyncio.sleep(0.3)
                    return

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                await self._while_dead()
                writer.write(data.replace(*self.altered) if self.altered else data)
                await writer.drain()
        writer.transport.abort()

    async def _while_dead(self) -> None:
        while not self.line.is_set() and not self.is_over:
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def cutter(port: int) -> AsyncIterator[Cutter]:
    """A proxy to a port of loopback."""
    between = Cutter(port)
    server = await asyncio.start_server(between.serve, "127.0.0.1", 0)
    between.port = server.sockets[0].getsockname()[1]
    try:
        yield between
    finally:
        server.close()
        between.is_over = True
        await asyncio.sleep(0.1)


@contextlib.contextmanager
def cutter_beside(port: int) -> Iterator[Cutter]:
    """The same in a thread of its own, for a test without a loop."""
    ready, over = threading.Event(), threading.Event()
    made: list[Cutter] = []

    async def run() -> None:
        async with cutter(port) as between:
            made.append(between)
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(patient(30)), "the proxy did not start"
    try:
        yield made[0]
    finally:
        over.set()
        thread.join(timeout=patient(30))
