"""A mail host on this machine that accepts every message and keeps the latest ones.

It has an event loop and a thread of its own, so that a relay can run unchanged beside it. Its
name is `localhost`. A client that trusts `ca_file` can verify its certificate.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Self

from relay.sandbox.certificates import Authority
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script

_KEPT_CONNECTIONS = 200
_CLEANING_SECONDS = 1.0
_HEADER_BYTES = 8192


class Catcher:
    """Runs from `with` to its end. `ca_file` is written at the start."""

    def __init__(self, directory: Path) -> None:
        self.ca_file = directory / "ca.pem"
        authority = Authority("Relay demonstration CA")
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file.write_bytes(authority.ca_pem)
        self._server = MxServer(Script(), name="localhost", authority=authority)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="catcher", daemon=True)
        self._ended: asyncio.Event | None = None
        self._started = threading.Event()
        self._error: BaseException | None = None

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return self._server.port

    def find(self, queue_id: str) -> bytes | None:
        """The content of a message as it came, by the id in its Received field."""
        mark = queue_id.encode("ascii", "replace")
        for message in reversed(self._server.messages):
            if mark in message.content[:_HEADER_BYTES]:
                return message.content
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        if self._ended is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        async with self._server:
            self._ended = asyncio.Event()
            self._started.set()
            while not self._ended.is_set():
                self._forget()
                try:
                    async with asyncio.timeout(_CLEANING_SECONDS):
                        await self._ended.wait()
                except TimeoutError:
                    pass

    def _forget(self) -> None:
        """Keep only the latest connections, and those that are open."""
        connections = self._server.connections
        old = connections[:-_KEPT_CONNECTIONS]
        connections[:-_KEPT_CONNECTIONS] = [one for one in old if not one.closed]
