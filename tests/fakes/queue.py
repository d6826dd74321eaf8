"""A queue in memory: the delivering half of a store, with every call written down, and failures on demand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from relay.mail.address import domain_of
from relay.mail.envelope import Notify
from relay.mail.event import Event
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.settle import Settlement
from relay.queue.store import NewMessage, SpoolError

DEFAULTS = TlsSettings(
    Setting(False, Source.DEFAULT, "default"), Setting(False, Source.DEFAULT, "default")
)
CONTENT = b"From: a@a.example\r\nSubject: hello\r\nMessage-ID: <1@a.example>\r\n\r\nbody\r\n"


class MemoryQueue:
    """`entries` by (queue id, domain). `trouble` is raised by the calls it names, while it is set."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], Entry] = {}
        self.due: dict[tuple[str, str], datetime] = {}
        self.claimed: set[tuple[str, str]] = set()
        self.settlements: list[Settlement] = []
        self.reports: list[NewMessage] = []
        self.events: list[Event] = []
        self.claims = 0
        self.released: list[Entry] = []
        self.most_claimed = 0
        self.trouble: dict[str, Exception] = {}
        self._work = asyncio.Event()

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
        all_of_them = [
            QueuedRecipient(n, address, domain_of(address), settings, notify=frozenset(notify))
            for n, address in enumerate(recipients)
        ]
        for domain in {recipient.domain for recipient in all_of_them}:
            of_domain = tuple(recipient for recipient in all_of_them if recipient.domain == domain)
            self.entries[queue_id, domain] = Entry(message, of_domain, total=len(all_of_them))
            self.due[queue_id, domain] = due or arrived
        self._work.set()

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        limit_per_domain: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> list[Entry]:
        self._fail("claim_due")
        self.claims += 1
        taken: list[Entry] = []
        shares: Counter[str] = Counter()
        for key in [key for key, due in self.due.items() if due <= now and key not in self.claimed]:
            domain = key[1]
            if len(taken) == limit or domain in skip or shares[domain] == limit_per_domain:
                continue
            if only is not None and domain not in only:
                continue
            shares[domain] += 1
            self.claimed.add(key)
            taken.append(self.entries[key])
        self.most_claimed = max(self.most_claimed, len(self.claimed))
        return taken

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        return min(
            (
                due
                for key, due in self.due.items()
                if key not in self.claimed and key[1] not in skip
            ),
            default=None,
        )

    async def wait_for_work(self) -> None:
        await self._work.wait()
        self._work.clear()

    async def release(self, entry: Entry, *, due: datetime) -> None:
        self._fail("release")
        key = (entry.message.queue_id, entry.domain)
        assert key in self.claimed, "released without a claim"
        self.released.append(entry)
        self.due[key] = due
        self.claimed.discard(key)
        self._work.set()

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
    ) -> bool:
        await asyncio.sleep(0)
        self._fail("record")
        entry = settlement.entry
        key = (entry.message.queue_id, entry.domain)
        assert key in self.claimed, "recorded without a claim"
        self.claimed.discard(key)
        self.settlements.append(settlement)
        self.reports += reports
        self.events += events
        left = tuple(c.recipient for c in settlement.changes if not c.recipient.state.is_final)
        if left:
            self.entries[key] = replace(entry, recipients=left)
            self.due[key] = min(r.next_attempt for r in left if r.next_attempt is not None)
        else:
            del self.entries[key], self.due[key]
        return False

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        """Debts are tested on the real store."""
        return []

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        self.give_back = give_back

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        self._fail("read_content")
        yield CONTENT[:10]
        yield CONTENT[10:]

    async def read_header(self, queue_id: str, *, limit_bytes: int = 0) -> bytes:
        self._fail("read_header")
        return CONTENT[: CONTENT.index(b"\r\n\r\n") + 4]

    def states(self) -> Counter[State]:
        """What has become of the recipients settled so far, in each settlement."""
        return Counter(change.recipient.state for s in self.settlements for change in s.changes)

    async def until(self, settled: int, *, within: timedelta = timedelta(seconds=10)) -> None:
        """Wait for so many settlements."""
        async with asyncio.timeout(within.total_seconds()):
            while len(self.settlements) < settled:
                await asyncio.sleep(0.005)

    def _fail(self, call: str) -> None:
        if call in self.trouble:
            raise self.trouble[call]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"delivering has no use for Store.{name}")


DISK_TROUBLE = SpoolError("the disk is full")
