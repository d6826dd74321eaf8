"""A listener as its connections see it: what they share, and which of them are open.

A listener's state outlives its connections. A task that a connection began belongs to it, so
that a commit is finished for a client that has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Protocol, TypeVar

from aiosmtpd.smtp import SMTP

from relay.receive.content import BdatReader, DataReader
from relay.receive.intake import Intake, Reception
from relay.receive.limits import Limits
from relay.receive.session import Session, Transaction
from relay.receive.spec import ListenerSpec
from relay.submit.certificates import ServerTls
from relay.submit.secrets import SecretChecker

T = TypeVar("T")


class Inside(Protocol):
    """A connection, as far as its listener knows it."""

    def drain(self) -> None:
        """The listener closes: send 421 now, or after the message that is coming in."""

    def abort(self) -> None:
        """The grace is over: abort the connection."""


class ListenerState:
    """The state that the connections of a listener share, and the set of open connections."""

    def __init__(
        self,
        spec: ListenerSpec,
        reception: Reception,
        tls: ServerTls | None,
        passwords: SecretChecker,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.smtp_state = vars(SMTP(None, loop=self._loop, hostname="", timeout=0))
        """The state with which every aiosmtpd session begins."""
        self.spec = spec
        self.reception = reception
        self.tls = tls
        self.passwords = passwords
        self.is_closing = False
        self.inside: set[Inside] = set()
        self.empty = asyncio.Event()
        self.empty.set()
        self.tasks: set[asyncio.Task[object]] = set()
        self.greeting = f"220 {reception.hostname} ESMTP ready\r\n".encode()
        self._ehlo_replies: dict[tuple[bool, bool, bool], bytes] = {}

    @property
    def limits(self) -> Limits:
        return self.reception.limits

    @property
    def hostname(self) -> str:
        return self.reception.hostname

    @property
    def has_tls(self) -> bool:
        return self.tls is not None

    def begin_message(
        self, session: Session, transaction: Transaction, reader: DataReader | BdatReader
    ) -> Intake:
        """Begin a message, which `reader` reads."""
        return Intake(self.reception, session, transaction, reader)

    def enter(self, connection: Inside) -> None:
        self.inside.add(connection)
        self.empty.clear()

    def leave(self, connection: Inside) -> None:
        self.inside.discard(connection)
        if not self.inside:
            self.empty.set()

    def spawn(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Start a task that goes on although the connection may end."""
        task = self._loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def ehlo_reply(self, session: Session) -> bytes:
        """The reply to EHLO: the host name and the extensions (RFC 5321 §4.1.1.1)."""
        key = (session.offers_starttls, session.offers_auth, session.tls is not None)
        reply = self._ehlo_replies.get(key)
        if reply is None:
            lines = [self.reception.hostname, *self._keywords(*key)]
            text = "".join(f"250-{line}\r\n" for line in lines[:-1]) + f"250 {lines[-1]}\r\n"
            reply = self._ehlo_replies[key] = text.encode()
        return reply

    def _keywords(self, offers_starttls: bool, offers_auth: bool, is_in_tls: bool) -> list[str]:
        limits = self.reception.limits
        return [
            "PIPELINING",
            f"SIZE {limits.message_size_bytes}",
            *(["STARTTLS"] if offers_starttls else []),
            *(["AUTH PLAIN LOGIN"] if offers_auth else []),
            "8BITMIME",
            "SMTPUTF8",
            "ENHANCEDSTATUSCODES",
            "DSN",
            *(["REQUIRETLS"] if is_in_tls else []),
            "CHUNKING",
            f"LIMITS RCPTMAX={limits.recipients}",
        ]
