"""Brings one message from the reader into the store.

A small message is complete in memory when its end is read, and goes to `store.accept` in one
piece. A larger one is staged in pieces of `STAGE_BYTES` as it comes. Its header section is
judged and rewritten as soon as it is complete, so that memory holds no more than one or two
pieces, and less when many messages come in at once (`relay.receive.buffered`). A message that is
refused on the way is read to its end and kept nowhere; the client gets the refusal after the end
of its data (RFC 5321 §4.2.5).

For the client, every error of the store is temporary, and the reply does not describe it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from relay.mail.section import HeaderSection, Sections
from relay.mail.threads import AT_ONCE_OCTETS, in_thread_if_large
from relay.policy.rules import PolicyRules
from relay.queue.queue_id import new_queue_id
from relay.queue.store import STAGE_BYTES, MessageSink, NewMessage, QueueFull, SpoolError
from relay.receive.access import Access
from relay.receive.buffered import SMALL_BYTES, Buffered
from relay.receive.content import ContentReader
from relay.receive.limits import Connections, Limits
from relay.receive.session import Session, Transaction
from relay.receive.submission import complete, judge_message, refusal_of
from relay.report.deliverylog import accepted_events
from relay.submit.log_limit import LogLimit
from relay.submit.message import (
    HEADER_SECTION_OCTETS,
    HEADER_TOO_LARGE,
    OUR_TROUBLE,
    OUT_OF_ROOM,
    JudgedHeader,
    Refusal,
    refuse,
)
from relay.submit.trace import Arrival

log = logging.getLogger(__name__)

_NO_MEMORY = refuse(
    452, "4.3.1", "Too much mail at once, try again later", "no memory for a long header section"
)


@dataclass(slots=True)
class Reception:
    """The state that all sessions of a node share.

    `policy` and `access` are functions, called for each use, so that a reload takes effect.
    """

    hostname: str
    store: MessageSink
    policy: Callable[[], PolicyRules]
    access: Callable[[], Access]
    clock: Callable[[], datetime]
    limits: Limits = field(default_factory=Limits)
    connections: Connections = field(default_factory=Connections)
    buffered: Buffered = field(default_factory=Buffered)
    log_limit: LogLimit = field(default_factory=LogLimit)


class Intake:
    """A message while it comes in."""

    def __init__(
        self,
        reception: Reception,
        session: Session,
        transaction: Transaction,
        reader: ContentReader,
    ) -> None:
        self.reader = reader
        self.transaction = transaction
        self.refusal: Refusal | None = None
        now = reception.clock()
        self.queue_id = new_queue_id(now)
        self._arrival = Arrival(reception.hostname, self.queue_id, now)
        self._reception = reception
        self._session = session
        self._judged: JudgedHeader | None = None
        self._staged_bytes = 0
        self._staging: asyncio.Future[None] | None = None
        self._staging_bytes = 0
        self._searched = 0
        self._counted_bytes = 0

    def should_stage(self) -> bool:
        """Whether so much is held that a piece of it should go to the store now."""
        held, buffered = len(self.reader.held), self._reception.buffered
        if held >= SMALL_BYTES or self._counted_bytes:
            self._count(self._staging_bytes + held)
        if held < buffered.piece_bytes or self.refusal is not None:
            return False
        if self._judged is not None or self._has_header():
            return True
        if held > HEADER_SECTION_OCTETS:
            self._refuse(HEADER_TOO_LARGE)
        elif buffered.is_full:
            self._refuse(_NO_MEMORY)
        return False

    async def stage(self) -> None:
        """Give the store all whole pieces that are held.

        When this returns, the last piece is still being written: the session reads on meanwhile.
        """
        if self._judged is None:
            await self._open()
        while self.refusal is None and self._has_piece():
            await self._stage_one()
        self._count(self._staging_bytes + len(self.reader.held))

    def _has_piece(self) -> bool:
        """Whether a whole piece is held."""
        return len(self.reader.held) >= self._reception.buffered.piece_bytes

    async def finish(self) -> Refusal | None:
        """Accept the complete message, or return why not. After None it is committed and synced."""
        if self.reader.flaw is not None:
            self._refuse(refusal_of(self.reader.flaw))
        if self.refusal is None and self._judged is None:
            await self._open()
        if self.refusal is None and self._has_piece():
            await self.stage()
        if self._staging is not None:
            await self._staged()
        if self.refusal is None:
            await self._accept()
        if self.refusal is not None:
            await self.abandon()
        if self._counted_bytes:
            self._count(0)
        return self.refusal

    async def abandon(self) -> None:
        """Leave nothing of the message in the store."""
        self.reader.stop_keeping()
        await self._staged()
        self._count(0)
        if self._staged_bytes:
            self._staged_bytes = 0
            try:
                await self._reception.store.discard(self.queue_id)
            except Exception as error:  # what remains is removed at the next start
                log.warning("%s: could not discard what was staged: %s", self.queue_id, error)

    def _count(self, held_bytes: int) -> None:
        """Count how much memory this message uses."""
        self._reception.buffered.held_bytes += held_bytes - self._counted_bytes
        self._counted_bytes = held_bytes

    def _has_header(self) -> bool:
        """Whether the header section is complete. Content that begins with an empty line has none,
        and is judged, too.
        """
        held = self.reader.held
        if held.find(b"\r\n", 0, 2) == 0 or held.find(b"\r\n\r\n", self._searched) >= 0:
            return True
        self._searched = max(0, len(held) - 3)
        return False

    async def _open(self) -> None:
        """Judge the header section, and put it back as it is from now on."""
        content = self.reader.held.take_all()
        if len(content) <= AT_ONCE_OCTETS:
            judged, rest = self._judge(content)
        else:
            end = content.find(b"\r\n\r\n")
            octets = end if end >= 0 else len(content)
            judged, rest = await in_thread_if_large(partial(self._judge, content), octets=octets)
        if isinstance(judged, Refusal):
            self._refuse(judged)
        else:
            self._judged = judged
            self.reader.held.put_back(rest)
            self.reader.held.put_back(judged.header)

    def _judge(self, content: bytes) -> tuple[JudgedHeader | Refusal, bytes]:
        """The decision about the header section, and the content after it."""
        sections = Sections.of(content)
        judged = judge_message(
            self._session,
            self.transaction,
            HeaderSection(sections.header),
            self._arrival,
            displaced=sections.behind,
            rules=self._reception.policy(),
            limits=self._reception.limits,
        )
        return judged, sections.rest

    def _refuse(self, refusal: Refusal) -> None:
        self.refusal = self.refusal or refusal
        self.reader.stop_keeping()
        self._count(0)

    async def _stage_one(self) -> None:
        await self._staged()
        if self.refusal is not None:
            return
        piece = self.reader.held.take(STAGE_BYTES)
        staging = self._reception.store.stage(self.queue_id, self._staged_bytes, piece)
        # Counted before the write: a piece that fails half-way has to be discarded, too.
        self._staged_bytes += len(piece)
        self._staging, self._staging_bytes = asyncio.ensure_future(staging), len(piece)

    async def _staged(self) -> None:
        """Wait for the piece that is being written."""
        staging, self._staging, self._staging_bytes = self._staging, None, 0
        if staging is not None:
            try:
                await staging
            except Exception as error:
                self._refuse(self._trouble(error))

    async def _accept(self) -> None:
        assert self._judged is not None
        content = self.reader.held.take_all()
        message, recipients = complete(
            self._judged,
            self._session,
            self.transaction,
            size_bytes=self._staged_bytes + len(content),
            eight_bit=self.reader.eight_bit,
            is_dotless=self.reader.is_dotless and b"\n." not in self._judged.header,
        )
        try:
            events = accepted_events(message, recipients)
            new = NewMessage(message, recipients, content, self._staged_bytes, events)
            await self._reception.store.accept(new)
        except Exception as error:
            self._refuse(self._trouble(error))

    def _trouble(self, error: Exception) -> Refusal:
        if isinstance(error, QueueFull):
            log.warning("%s: refused for now: %s", self.queue_id, error)
            return OUT_OF_ROOM
        if isinstance(error, SpoolError):
            log.error("%s: refused for now: %s", self.queue_id, error)
        else:
            log.exception("%s: refused for now", self.queue_id)
        return OUR_TROUBLE
