"""A store in memory: what `relay.queue.store` promises to receiving and delivering, written as
simply as it can be.

It passes those tests of `tests/contract/store`, as every engine does, and survives nothing: what is
closed can be opened `after` it with the same content, as a store on disk is after a crash. It has
none of what follows the events, counts them, or is kept for the HTTP interface.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from itertools import count, islice
from typing import Self

from relay.admin.operations import listed
from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.due import first_place, latest_wish, settled_place
from relay.queue.entry import Entry, QueuedMessage, QueuedRecipient, State
from relay.queue.event_matching import event_matches
from relay.queue.header import header_section
from relay.queue.settle import Change, Settlement
from relay.queue.store import (
    CHUNK_BYTES,
    STAGE_BYTES,
    ChangeStep,
    EventFilter,
    ListedMessage,
    NewMessage,
    PendingReport,
    QueuedItem,
    QueueFilter,
    SpoolError,
    StoredEvent,
)
from relay.queue.tls_sessions import CountedSessions, DomainSessions, ReportResult
from relay.queue.verbs import VERBS
from tests.fakes.memory_matching import message_matches, recipient_matches
from tests.fakes.memory_tls_sessions import MemoryTlsSessions


@dataclass
class _Pending:
    """A change that is to be reported later; see `Settlement.pending`."""

    change: Change
    since: datetime
    report_after: datetime


@dataclass
class _Kept:
    """A message. `due` holds the recipients that are to be tried; `claimed` those of them being
    tried.
    """

    message: QueuedMessage
    content: bytes
    recipients: dict[int, QueuedRecipient]
    due: dict[int, datetime]
    claimed: set[int] = field(default_factory=set)
    pending: dict[tuple[int, bool], _Pending] = field(default_factory=dict)

    def shown(self) -> QueuedItem:
        """As the operator sees it."""
        recipients = self.recipients.values()
        return QueuedItem(
            self.message,
            tuple(replace(one, next_attempt=self.due.get(one.index)) for one in recipients),
        )

    def waits_for(self, until: datetime) -> bool:
        """Whether an attempt is due by then."""
        return any(due <= until for due in self.due.values())

    def report_is_due(self) -> bool:
        return any(not self.waits_for(one.report_after) for one in self.pending.values())

    def is_done(self) -> bool:
        return not self.pending and all(one.state.is_final for one in self.recipients.values())


class MemoryStore:
    """Everything happens at once, within a call; so a transaction is a check of all before any
    change.
    """

    def __init__(
        self,
        *,
        now: datetime | None = None,
        max_wait: timedelta = timedelta(days=1),
        after: Self | None = None,
    ) -> None:
        self._kept: dict[str, _Kept] = after._kept if after else {}
        self._events: list[StoredEvent] = after._events if after else []
        self._tls: MemoryTlsSessions = after._tls if after else MemoryTlsSessions()
        self._tls.forget_claims()
        self._staged: dict[str, bytearray] = {}
        self._cursor = ""
        self._limit_of: Callable[[str], int] = lambda domain: 1 << 30
        self._work = asyncio.Event()
        self._give_back: list[Callable[[], Awaitable[None]]] = []
        now = now or datetime.now(UTC)
        for kept in self._kept.values():
            for index in kept.claimed:
                kept.due[index] = min(kept.due[index], now)
            kept.claimed.clear()
        self._bring_forward(now, now + max_wait)

    async def close(self) -> None:
        pass

    def may_begin(self, entry: Entry) -> bool:
        return True

    def part(self, limit: int, name: str) -> int:
        return limit

    def when_divided_anew(self, call: Callable[[], Awaitable[bool]]) -> None:
        pass

    def limit_domains(self, limit_of: Callable[[str], int]) -> None:
        self._limit_of = limit_of

    # Taking in.

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        if len(piece) > STAGE_BYTES:
            raise SpoolError(f"a piece of {len(piece)} octets is too large")
        if not offset and queue_id in self._staged:
            raise SpoolError(f"{queue_id}: another message has this queue id")
        self._require_staged(queue_id, offset)
        self._staged.setdefault(queue_id, bytearray()).extend(piece)

    def _require_staged(self, queue_id: str, size_bytes: int) -> None:
        if len(self._staged.get(queue_id, b"")) != size_bytes:
            raise SpoolError(f"{queue_id}: what is before octet {size_bytes} is not there")

    async def discard(self, queue_id: str) -> None:
        self._staged.pop(queue_id, None)

    async def accept(self, new: NewMessage) -> None:
        try:
            self._require_staged(new.message.queue_id, new.staged_bytes)
            self._require_new([new])
            self._add([new])
        finally:
            self._staged.pop(new.message.queue_id, None)
        await asyncio.sleep(0)  # the caller may be cancelled; the message is in the queue

    def _require_new(self, messages: Sequence[NewMessage]) -> None:
        ids = Counter(new.message.queue_id for new in messages)
        for queue_id, times in ids.items():
            if times > 1 or queue_id in self._kept:
                raise SpoolError(f"{queue_id}: another message has this queue id")

    def _add(self, messages: Sequence[NewMessage]) -> None:
        for new in messages:
            queue_id = new.message.queue_id
            places = {one.index: first_place(new.message, one) for one in new.recipients}
            self._kept[queue_id] = _Kept(
                new.message,
                bytes(self._staged.pop(queue_id, b"")) + new.content,
                {one.index: one for one in new.recipients},
                {index: due for index, (_, due) in places.items() if due is not None},
            )
            self._write_events(new.events)
            self._remove_if_done(queue_id)
        self._work.set()

    def _remove_if_done(self, queue_id: str) -> None:
        if queue_id in self._kept and self._kept[queue_id].is_done():
            del self._kept[queue_id]

    # Handing out.

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        with_new: bool = False,
    ) -> list[Entry]:
        ready = self._ready(now)
        domains = [one for one in (sorted(ready) if only is None else only) if one not in skip]
        if only is None:
            domains.sort(key=lambda domain: (domain <= self._cursor, domain))
        by_domain = {domain: ready.get(domain, [])[: self._limit_of(domain)] for domain in domains}
        if only is not None and with_new:
            others = sorted(set(ready) - set(only) - set(skip))
            by_domain |= {
                domain: [queue_id for queue_id in ready[domain] if self._is_new(queue_id)][
                    : self._limit_of(domain)
                ]
                for domain in others
            }
            domains += others
        # One of each domain in turn.
        turns = ((domain, turn) for turn in count() for domain in domains)
        rounds = islice(turns, limit * len(domains))
        taken = [
            (domain, by_domain[domain][n]) for domain, n in rounds if n < len(by_domain[domain])
        ][:limit]
        if taken and only is None:
            self._cursor = taken[-1][0]
        return [self._claim(queue_id, domain) for domain, queue_id in taken]

    def _is_new(self, queue_id: str) -> bool:
        recipients = self._kept[queue_id].recipients.values()
        is_untried = not any(one.attempts for one in recipients)
        return is_untried and len({one.domain for one in recipients}) <= 20

    def _ready(self, now: datetime) -> dict[str, list[str]]:
        """Queue ids with something due, by domain, those due longest first."""
        found: dict[tuple[str, str], datetime] = {}
        for queue_id, kept in self._kept.items():
            for index, due in kept.due.items():
                if due <= now and index not in kept.claimed:
                    key = kept.recipients[index].domain, queue_id
                    found[key] = min(found.get(key, due), due)
        ready: dict[str, list[str]] = {}
        for domain, queue_id in sorted(found, key=lambda key: found[key]):
            ready.setdefault(domain, []).append(queue_id)
        return ready

    def _claim(self, queue_id: str, domain: str) -> Entry:
        kept = self._kept[queue_id]
        indices = [
            index
            for index in kept.due
            if kept.recipients[index].domain == domain and index not in kept.claimed
        ]
        kept.claimed.update(indices)
        recipients = tuple(kept.recipients[index] for index in sorted(indices))
        return Entry(kept.message, recipients, total=len(kept.recipients))

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        return min(
            (
                due
                for kept in self._kept.values()
                for index, due in kept.due.items()
                if index not in kept.claimed and kept.recipients[index].domain not in skip
            ),
            default=None,
        )

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        self._bring_forward(now, latest)
        self._work.set()

    def _bring_forward(self, now: datetime, latest: datetime) -> None:
        for kept in self._kept.values():
            wish = kept.message.begins
            not_before = wish if wish <= latest_wish(now, latest) else now
            for index, due in kept.due.items():
                if due > latest and index not in kept.claimed:
                    kept.due[index] = max(now, not_before)

    async def wait_for_work(self) -> None:
        await self._work.wait()
        self._work.clear()

    async def release(self, entry: Entry, *, due: datetime) -> None:
        kept = self._claimed(entry.message.queue_id, entry.recipients)
        for one in entry.recipients:
            kept.claimed.discard(one.index)
            kept.due[one.index] = due
        self._work.set()

    def _claimed(self, queue_id: str, recipients: Sequence[QueuedRecipient]) -> _Kept:
        kept = self._kept.get(queue_id)
        if kept is None or not kept.claimed.issuperset(one.index for one in recipients):
            raise SpoolError(f"{queue_id}: the recipients are not claimed")
        return kept

    # Results.

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
        sessions: Sequence[TlsSession] = (),
    ) -> bool:
        entry, at = settlement.entry, settlement.at
        after = [change.recipient for change in settlement.changes]
        kept = self._claimed(entry.message.queue_id, after)
        if entry.total not in (0, len(kept.recipients)):
            raise SpoolError(f"{entry.message.queue_id}: it has other recipients, too")
        self._require_new(reports)
        for one in after:
            kept.claimed.discard(one.index)
            kept.recipients[one.index] = one
            _, due = settled_place(one, at)
            _set_due(kept, one.index, due)
        for change in settlement.pending:
            key = change.recipient.index, change.recipient.state.is_final
            kept.pending[key] = _Pending(change, at, settlement.report_after or at)
        self._write_events(events)
        self._tls.add(sessions, at)
        self._add(reports)
        self._remove_if_done(entry.message.queue_id)
        return kept.report_is_due()

    async def count_sessions(self, sessions: Sequence[TlsSession], *, at: datetime) -> None:
        self._tls.add(sessions, at)

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        return [
            queue_id
            for queue_id, kept in self._kept.items()
            if kept.report_is_due()
            or any(not pending_since < one.since <= now for one in kept.pending.values())
        ][:limit]

    async def pending_report(self, queue_id: str) -> PendingReport | None:
        kept = self._kept.get(queue_id)
        if kept is None or not kept.pending:
            return None
        done, delayed = (
            tuple(
                replace(kept.pending[key].change, recipient=kept.recipients[key[0]])
                for key in sorted(kept.pending)
                if key[1] is is_done
            )
            for is_done in (True, False)
        )
        return PendingReport(kept.message, done, delayed)

    async def report(self, pending: PendingReport, reports: Sequence[NewMessage]) -> None:
        queue_id = pending.message.queue_id
        sent = [(change.recipient.index, True) for change in pending.done]
        sent += [(change.recipient.index, False) for change in pending.delayed]
        kept = self._kept.get(queue_id)
        if kept is None or not kept.pending.keys() >= set(sent):
            raise SpoolError(f"{queue_id}: this was reported before")
        self._require_new(reports)
        for key in sent:
            del kept.pending[key]
        self._add(reports)
        self._remove_if_done(queue_id)

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        if queue_id not in self._kept:
            raise SpoolError(f"{queue_id}: there is no such message")
        content = self._kept[queue_id].content
        for start in range(0, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        return await header_section(self.read_content(queue_id), limit_bytes=limit_bytes)

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        self._give_back.append(give_back)

    # Reports on TLS.

    async def tls_days(self) -> list[date]:
        return self._tls.days()

    async def tls_domains(
        self, day: date, *, after: str = "", limit: int = 500
    ) -> list[DomainSessions]:
        return [one for one in self._tls.domains(day) if one.domain > after][:limit]

    async def tls_sessions(self, day: date, domain: str) -> list[CountedSessions]:
        return self._tls.sessions(day, domain)

    async def claim_tls_report(self, day: date, domain: str, place: str) -> bool:
        return self._tls.claim(day, domain, place)

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        self._tls.release(day, domain, place)

    async def open_content(self, queue_id: str) -> None:
        return None

    async def finish_tls_report(
        self,
        day: date,
        domain: str,
        place: str,
        result: ReportResult,
        *,
        message: NewMessage | None = None,
    ) -> None:
        messages = [message] if message is not None else []
        self._require_new(messages)
        self._tls.finish(day, domain, place, result)
        self._add(messages)

    async def finished_tls_reports(self, day: date, domain: str) -> Mapping[str, ReportResult]:
        return self._tls.finished(day, domain)

    async def domains_reported(self, day: date) -> set[str]:
        return self._tls.domains_reported(day)

    async def purge_tls_sessions(self, *, before: date) -> int:
        return self._tls.purge(before)

    # The operator.

    async def list_messages(self, wanted: QueueFilter, *, now: datetime) -> list[ListedMessage]:
        return [listed(self._kept[queue_id].shown()) for queue_id in self._matching(wanted, now)]

    def _matching(self, wanted: QueueFilter, now: datetime) -> list[str]:
        return [
            queue_id
            for queue_id, kept in sorted(self._kept.items())
            if message_matches(kept.message, wanted, now)
            and any(recipient_matches(one, wanted) for one in kept.recipients.values())
        ]

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        kept = self._kept.get(queue_id)
        return kept.shown() if kept is not None else None

    async def counts(self) -> Mapping[State, int]:
        found = Counter(
            one.state for kept in self._kept.values() for one in kept.recipients.values()
        )
        return {state: found[state] for state in (State.QUEUED, State.DEFERRED, State.HELD)}

    async def change(self, wanted: QueueFilter, *, verb: str, now: datetime) -> ChangeStep:
        found = self._matching(wanted, now)
        for give_back in self._give_back:
            await give_back()
        changed = sum(self._change(queue_id, wanted, verb, now) for queue_id in found)
        self._work.set()
        return ChangeStep(None, changed, frozenset(found))

    def _change(self, queue_id: str, wanted: QueueFilter, verb: str, now: datetime) -> int:
        kept, does = self._kept[queue_id], VERBS[verb]
        changed = [
            one
            for one in kept.recipients.values()
            if one.state in does.takes
            and one.index not in kept.claimed
            and recipient_matches(one, wanted)
        ]
        for one in changed:
            state = does.becomes if one.attempts else does.untried_becomes
            kept.recipients[one.index] = replace(one, state=state or one.state)
            _set_due(kept, one.index, now if does.is_due else None)
        self._remove_if_done(queue_id)
        return len(changed)

    # Events.

    def _write_events(self, events: Sequence[Event]) -> None:
        for event in events:
            last = self._events[-1].seq if self._events else 0
            self._events.append(StoredEvent(last + 1, event))

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        return [stored for stored in self._events if stored.seq > seq][:limit]

    async def find_events(self, wanted: EventFilter) -> list[StoredEvent]:
        return [stored for stored in self._events if event_matches(stored.event, wanted)]


def _set_due(kept: _Kept, index: int, due: datetime | None) -> None:
    if due is None:
        kept.due.pop(index, None)
    else:
        kept.due[index] = due
