"""The store in memory, for tests of deliveries: its calls are noted, and fail on demand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta

from relay.mail.address import domain_of
from relay.mail.envelope import Notify
from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.settle import Settlement
from relay.queue.store import NewMessage, PendingReport, SpoolError
from tests.fakes.memory_store import MemoryStore
from tests.fakes.waiting import patient

DEFAULTS = TlsSettings(
    Setting(False, Source.DEFAULT, "default"), Setting(False, Source.DEFAULT, "default")
)
CONTENT = b"From: a@a.example\r\nSubject: hello\r\nMessage-ID: <1@a.example>\r\n\r\nbody\r\n"


class MemoryQueue(MemoryStore):
    """Each call is noted. `trouble` is raised by the calls it names, while it is set.

    Reports are noted in `reports` and not queued, so that a test sees its own messages only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settlements: list[Settlement] = []
        self.reports: list[NewMessage] = []
        self.events: list[Event] = []
        self.claims = 0
        self.released: list[Entry] = []
        self.most_claimed = 0
        self.trouble: dict[str, Exception] = {}

    def add(
        self,
        queue_id: str,
        *recipients: str,
        sender: str = "a@a.example",
        arrived: datetime | None = None,
        due: datetime | None = None,
        settings: TlsSettings = DEFAULTS,
        notify: Iterable[Notify] = (),
        origin: str = "smtp",
    ) -> None:
        arrived = arrived or datetime.now(UTC)
        message = QueuedMessage(
            queue_id, sender, arrived, len(CONTENT), MessageSummary(), origin=origin
        )
        queued = (
            QueuedRecipient(
                n, address, domain_of(address), settings, notify=frozenset(notify), next_attempt=due
            )
            for n, address in enumerate(recipients)
        )
        self._add([NewMessage(message, tuple(queued), CONTENT)])

    @property
    def claimed(self) -> list[tuple[str, str]]:
        """Queue id and domain of each entry that is claimed."""
        return [key for key, entry in self._entries() if entry[1]]

    @property
    def entries(self) -> list[tuple[str, str]]:
        """Queue id and domain of each entry that is not settled."""
        return [key for key, _ in self._entries()]

    def due_of(self, queue_id: str, domain: str) -> datetime:
        """When an entry is due."""
        return dict(self._entries())[queue_id, domain][0]

    def make_due(self, queue_id: str) -> None:
        """Make a message due now."""
        self._kept[queue_id].due = dict.fromkeys(self._kept[queue_id].due, datetime.now(UTC))

    def _entries(self) -> list[tuple[tuple[str, str], tuple[datetime, bool]]]:
        """By queue id and domain: when the entry is due, and whether it is claimed."""
        found = {
            (queue_id, kept.recipients[index].domain): (due, index in kept.claimed)
            for queue_id, kept in self._kept.items()
            for index, due in kept.due.items()
        }
        return list(found.items())

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        with_new: bool = False,
    ) -> list[Entry]:
        self._fail("claim_due")
        self.claims += 1
        taken = await super().claim_due(
            now=now, limit=limit, skip=skip, only=only, with_new=with_new
        )
        self.most_claimed = max(self.most_claimed, len(self.claimed))
        return taken

    async def release(self, entry: Entry, *, due: datetime) -> None:
        self._fail("release")
        await super().release(entry, due=due)
        self.released.append(entry)

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
        sessions: Sequence[TlsSession] = (),
    ) -> bool:
        await asyncio.sleep(0)
        self._fail("record")
        report_is_due = await super().record(settlement, events=events, sessions=sessions)
        self.settlements.append(settlement)
        self.reports += reports
        self.events += events
        return report_is_due

    async def report(self, pending: PendingReport, reports: Sequence[NewMessage]) -> None:
        await super().report(pending, [])
        self.reports += reports

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        self._fail("read_content")
        async for piece in super().read_content(queue_id):
            yield piece

    def states(self) -> Counter[State]:
        """What has become of the recipients settled so far, in each settlement."""
        return Counter(change.recipient.state for s in self.settlements for change in s.changes)

    async def until(self, settled: int, *, within: timedelta = timedelta(seconds=10)) -> None:
        """Wait for so many settlements."""
        async with asyncio.timeout(patient(within.total_seconds())):
            while len(self.settlements) < settled:
                await asyncio.sleep(0.005)

    def _fail(self, call: str) -> None:
        if call in self.trouble:
            raise self.trouble[call]


DISK_TROUBLE = SpoolError("the disk is full")
