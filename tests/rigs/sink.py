"""A next hop that takes everything and remembers it, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
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


_QUEUE_ID = re.compile(rb"\s+id\s+([0-9A-Za-z]+)")


@dataclass
class Sink:
    """`contents` in the order of their arrival; safe to read from the test's thread."""

    address: str
    port: int
    contents: list[bytes] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    gate: threading.Event = field(default_factory=_open_gate)
    """Closed, it keeps every client waiting for the reply to MAIL."""
    last_word: threading.Event = field(default_factory=_open_gate)
    """Closed, it takes messages and keeps every client waiting for the reply that says so."""
    deferred: threading.Event = field(default_factory=threading.Event)
    """Set, it answers every RCPT with 451."""
    refused: list[str] = field(default_factory=list)
    """The recipients that were answered so."""
    unknown: frozenset[str] = frozenset()
    """Recipients that are refused for good."""
    taken: set[tuple[str, str]] = field(default_factory=set)
    """What arrived, by the queue id in its uppermost Received field, with each recipient."""
    idle_seconds: float = 60

    async def handle_MAIL(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 OK"

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        if self.deferred.is_set():
            self.refused.append(address)
            return "451 4.3.2 later"
        if address in self.unknown:
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        content = bytes(envelope.content)
        trace = _QUEUE_ID.search(content) if content.startswith(b"Received:") else None
        with self.lock:
            self.contents.append(content)
            if trace is not None:  # a report of the relay's own has none
                self.taken |= {(trace[1].decode(), recipient) for recipient in envelope.rcpt_tos}
        while not self.last_word.is_set():
            await asyncio.sleep(0.01)
        return "250 2.0.0 taken"

    def tokens(self, known: set[str]) -> list[str]:
        """The subjects of what arrived, those in `known`, one for each copy."""
        with self.lock:
            contents = list(self.contents)
        subjects = [
            content.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode()
            for content in contents
        ]
        return [subject for subject in subjects if subject in known]

    def reported(self, known: set[str]) -> list[str]:
        """The words of `known` in reports of the relay's own, one for each copy."""
        with self.lock:
            reports = [content for content in self.contents if not content.startswith(b"Received:")]
        words = [
            re.findall(rb"^Subject: (token\S+)\r$", report, re.MULTILINE) for report in reports
        ]
        return [word.decode() for found in words for word in found if word.decode() in known]

    @property
    def route(self) -> dict[str, Any]:
        """The `routes` section that sends everything here."""
        return {"*": {"host": f"[{self.address}]", "port": self.port}}


class _Controller(Controller):
    def factory(self) -> SMTPServer:
        idle = self.handler.idle_seconds
        return SMTPServer(self.handler, hostname="sink.example", data_size_limit=None, timeout=idle)


@contextlib.contextmanager
def sink(address: str = "127.0.0.31", *, idle_seconds: float = 60) -> Iterator[Sink]:
    """A running sink. It ends the connection of a client that says nothing for `idle_seconds`."""
    where = Sink(address, free_port(address), idle_seconds=idle_seconds)
    controller = _Controller(where, hostname=where.address, port=where.port)
    controller.start()
    try:
        yield where
    finally:
        controller.stop()
