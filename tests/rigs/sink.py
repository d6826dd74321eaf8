"""A next hop that takes everything and remembers it, in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as SMTPServer

from tests.rigs.ports import free_port


@dataclass
class Sink:
    """`contents` in the order of their arrival; safe to read from the test's thread."""

    address: str
    port: int
    contents: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

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
