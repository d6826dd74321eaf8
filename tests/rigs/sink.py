"""A next hop that takes everything and remembers it, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as SMTPServer

from tests.rigs.ports import free_port


def _open_gate() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


@dataclass
class Sink:
    """`contents` in the order of their arrival; safe to read from the test's thread."""

    address: str
    port: int
    contents: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    gate: threading.Event = field(default_factory=_open_gate)
    """Closed, it keeps every client waiting for the reply to MAIL."""

    async def handle_MAIL(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        with self.lock:
            self.contents.append(bytes(envelope.content))
        return "250 2.0.0 taken"

    def tokens(self, known: set[str]) -> list[str]:
        """The subjects of what arrived, those in `known`, one for each copy."""
        with self.lock:
            contents = list(self.contents)
        subjects = [content.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode() for content in contents]
        return [subject for subject in subjects if subject in known]

    @property
    def route(self) -> dict[str, Any]:
        """The `routes` section that sends everything here."""
        return {"*": {"host": f"[{self.address}]", "port": self.port}}


class _Controller(Controller):
    def factory(self) -> SMTPServer:
        return SMTPServer(self.handler, hostname="sink.example", data_size_limit=None, timeout=60)


@contextlib.contextmanager
def sink(address: str = "127.0.0.31") -> Iterator[Sink]:
    """A running sink."""
    where = Sink(address, free_port(address))
    controller = _Controller(where, hostname=where.address, port=where.port)
    controller.start()
    try:
        yield where
    finally:
        controller.stop()
