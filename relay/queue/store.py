"""What the queue promises, whichever engine keeps it: six protocols, and the values they speak in.

    MessageSink    takes a message in: staged pieces, then `accept`
    DeliveryQueue  gives out what is due, and takes the result of each attempt
    QueueView      the operator's look at messages and events; of a stopped relay's queue, too
    QueueControl   the operator's verbs: retry, hold, release, remove
    EventLog       the events in the order of their commits, for those that follow them
    TlsReports     which reports on TLS (RFC 8460) are sent

`Store` is all of them: what an engine implements (`relay.queue.sqlite`), and what the tests
in `tests/contract/store` ask of each. Everybody else takes the protocol it needs.

What `accept` returned from is committed and synced: it survives a power cut. Every change of
state and every event commits through here, in one transaction each call.

Errors are three: `SpoolError` (our own trouble: 451 4.3.0 at the listener, and the attempt is
made again), `QueueFull` (no room: 452 4.3.1) and `ClaimLost`. An engine translates what its library
raises, once, and never raises anything else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple, Protocol

from relay.mail.event import Event
from relay.mail.record import record
from relay.mail.tls_session import TlsSession
from relay.queue.api_state import ApiState, DomainSettings
from relay.queue.destinations import DestinationPart
from relay.queue.entry import Entry, QueuedMessage, QueuedRecipient, State
from relay.queue.nodes import DatabaseState, Node
from relay.queue.settle import Change, Settlement
from relay.queue.statistics import StatisticsView
from relay.queue.tls_sessions import ReportResult, TlsSessionsView

CHUNK_BYTES = 256 * 1024
"""Content is read in pieces of at most this size."""

STAGE_BYTES = 1024 * 1024
"""Content is staged in pieces of at most this size."""

PAGE_RECIPIENTS = 5000
"""A page of the queue ends behind the message with which it has this many recipients."""

FRUITLESS = 10
"""A search that has found nothing may take this many times the patience for a page."""


class SpoolError(Exception):
    """The store could not do what was asked; nothing was changed. Temporary for every client."""


class QueueFull(SpoolError):
    """The store has no room left for another message."""


class ClaimLost(SpoolError):
    """The claim of an entry is over though nobody here ended it: another node may have the entry.

    What an attempt came to is not written then, and does not become so by another try.
    """


class SearchTooLong(SpoolError):
    """The patience of a search was over before an event was found or the end was reached.

    `reached`: the search can go on after this sequence number; 0 where that is not known.
    """

    def __init__(self, text: str, reached: int = 0) -> None:
        super().__init__(text)
        self.reached = reached


@record(frozen=True, slots=True)
class NewMessage:
    """A message to take in: from a client, or a DSN of ours.

    `content` is the part of the content that was not staged, all of it where nothing was;
    `staged_bytes` is how much `MessageSink.stage` has taken under this queue id.
    """

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...]
    content: bytes
    staged_bytes: int = 0
    events: tuple[Event, ...] = ()


@record(frozen=True, slots=True)
class StoredEvent:
    """An event with the sequence number its commit gave it (strictly rising)."""

    seq: int
    event: Event


@dataclass(frozen=True, slots=True)
class QueueFilter:
    """Which messages an operator means; every field that is set has to match."""

    queue_ids: frozenset[str] = frozenset()
    domain: str = ""  # of a recipient
    sender: str = ""
    older_than: timedelta | None = None
    state: State | None = None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are asked for; every field that is set has to match.

    `sender_domain`: of the reverse-path, in any case; `recipient_domain`: of a recipient. `fields`:
    pairs of a field of the event and the value it must have: from, to, subject (part of it, in any
    case), message-id, severity, tag, protection (`relay.mail.event.Protection`), policy-source (of
    either setting), about (the message that a report is about), text (part of addresses, ids or
    subject, in any case).
    """

    begin: datetime | None = None
    end: datetime | None = None
    names: frozenset[str] = frozenset()
    recipient: str = ""
    sender: str = ""
    queue_id: str = ""
    sender_domain: str = ""
    recipient_domain: str = ""
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class EventPage:
    """Which of the events that match: at most `limit` in the order of their numbers, either way.

    `after`: the last `seq` of the page before. After `patience` a page that has any event ends.
    """

    after: int = 0
    limit: int = 300
    ascending: bool = True
    patience: timedelta | None = None


FIRST_PAGE = EventPage()


@dataclass(frozen=True, slots=True)
class QueuedItem:
    """A message as the operator sees it: with all its recipients, done ones included."""

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...] = field(default_factory=tuple)


class ListedRecipient(NamedTuple):
    """A recipient in a listing. `last`: time, code, status, text and host of the last attempt."""

    address: str
    state: State
    attempts: int
    due: int | None
    last: Sequence[Any] | None


class ListedMessage(NamedTuple):
    """A message in a listing: only what is shown, times in whole microseconds."""

    queue_id: str
    reverse_path: str
    arrived: int
    size_bytes: int
    recipients: Sequence[ListedRecipient]


def more_follows(page: Sequence[ListedMessage], limit: int) -> bool:
    """Whether a page is full: then there may be another."""
    return len(page) >= limit or sum(len(item.recipients) for item in page) >= PAGE_RECIPIENTS


EventOfChange = Callable[[QueuedMessage, QueuedRecipient], Event]
"""Makes the event of a change to a recipient, which is given as it was before."""


@dataclass(frozen=True, slots=True)
class ChangeStep:
    """What a verb did to a part of the queue: how many recipients changed, which messages matched.

    `until`: where the next part begins, None at the end.
    """

    until: str | None
    changed: int = 0
    found: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PendingReport:
    """What the sender of a message is still to be told about its recipients, of all domains.

    `done`: recipients in a final state. `delayed`: recipients whose delivery takes longer; their
    state says what has become of them since.
    """

    message: QueuedMessage
    done: tuple[Change, ...] = ()
    delayed: tuple[Change, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """What is to be reported: delays that are over are left out."""
        return self.done + tuple(one for one in self.delayed if not one.recipient.state.is_final)


class MessageSink(Protocol):
    """Takes messages in. May raise `SpoolError`, and `QueueFull` where there is no room."""

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece of content before its message is accepted; on return the caller may forget
        it.

        `offset` is how much was staged before. Without an `accept` the piece is garbage, which
        `discard` or the next start removes.
        """

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged for a message that was not given to `accept`."""

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility. On return envelope, content and events are committed and synced.

        Runs to its end even if the caller is cancelled: a message is in the queue whole or not at
        all. If it fails, the staged content is removed, too.
        """


class ContentReader(Protocol):
    """Reads messages of the queue. May raise `SpoolError`."""

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces of at most `CHUNK_BYTES`, in order."""

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """A message's header section with the empty line at its end, at most `limit_bytes`."""


class ContentFile(Protocol):
    """The open file that holds a message's content, and nothing else."""

    size_bytes: int

    def fileno(self) -> int: ...

    def is_in_memory(self, offset: int, count: int) -> bool:
        """Whether the system has these octets in memory, as far as some of them tell."""

    async def read(self, offset: int, count: int) -> bytes:
        """Some of the octets there, at most `count`; it may wait for the disk."""

    def close(self) -> None: ...


class DeliveryQueue(ContentReader, Protocol):
    """Gives out entries that are due and takes their results. May raise `SpoolError`.

    Where several nodes share the queue, a claim lasts as long as the lease it was made under. What
    ends one that is over raises `ClaimLost`.
    """

    async def open_content(self, queue_id: str) -> ContentFile | None:
        """The file of a message's content, for the caller to close; None where there is none."""

    def may_begin(self, entry: Entry) -> bool:
        """Whether the claim of an entry still holds, so that an attempt may take its next step."""

    def part(self, limit: int, name: str) -> int:
        """What this node may use now of a limit at a destination that holds for all nodes together;
        all of it where the queue is this machine's alone.
        """

    def when_divided_anew(self, call: Callable[[], Awaitable[bool]]) -> None:
        """Have this called when the parts of this node have become others, and again until it
        returns True: that this node uses no more than its parts.
        """

    def limit_domains(self, limit_of: Callable[[str], int]) -> None:
        """Have one claim take no more entries of a domain than this says, however many are due.

        0, where several nodes share the queue: no entry of that domain is claimed, nor handed over
        by `accept`.
        """

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        with_new: bool = False,
    ) -> list[Entry]:
        """At most `limit` entries that are due, fairly over the domains, none of a domain in
        `skip`.

        `only`: none of another domain than these, those named first before others; `with_new`: and
        what was handed over by `accept`, where the engine has a hand-off. No other claim gets a
        claimed entry until it is recorded or released, or until the store is opened again after a
        crash, when it is due at once.
        """

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        """When the next unclaimed entry outside `skip` is due; None if there is none."""

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Make due at once what is due after `latest`: that was written while the clock was ahead.

        A message whose sender asked for a later delivery keeps the time the sender asked for.
        """

    async def wait_for_work(self) -> None:
        """Return when something was accepted, released or changed since the last return."""

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """End a claim without an attempt; the entry is due at `due`."""

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
        sessions: Sequence[TlsSession] = (),
    ) -> bool:
        """Commit, as one: the new states, the DSNs about them, their events, and the sessions that
        reports on TLS count. Ends the claim.

        `settlement.pending` is kept as the message's pending report. True: the message has a
        pending report, and all attempts that were due by its `report_after` have ended, so that it
        is to be sent now. Of attempts that settle at the same moment one gets True. The message and
        its content are removed when no recipient is left to be tried and no report is pending.
        """

    async def count_sessions(self, sessions: Sequence[TlsSession], *, at: datetime) -> None:
        """Count sessions that belong to no result."""

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        """Queue ids of messages whose pending report is to be sent.

        No other attempt that is due within the report's window is awaited, or the report has been
        pending since `pending_since`. An attempt that was put off is not waited for.
        """

    async def pending_report(self, queue_id: str) -> PendingReport | None:
        """What the sender of a message is still to be told; None if nothing is pending."""

    async def report(self, pending: PendingReport, reports: Sequence[NewMessage]) -> None:
        """Commit, as one: these DSNs, and that the report is sent; `SpoolError` if it was before.

        What became pending after `pending` was read stays pending.
        """

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        """Have this called before the operator changes mail: it releases claims not begun on.

        Nothing is claimed from then until the change is made.
        """


class EventStream(Protocol):
    """Events that are found by filters, in the order of their numbers."""

    async def find_events(
        self, wanted: EventFilter, page: EventPage = FIRST_PAGE
    ) -> list[StoredEvent]:
        """A page of the events that match.

        A page is empty only where nothing follows: a search that has found nothing goes on, at most
        `FRUITLESS` times as long as its patience (`SearchTooLong`).
        """


class QueueView(ContentReader, EventStream, StatisticsView, TlsSessionsView, Protocol):
    """What the operator may look at, with the statistics. May raise `SpoolError`."""

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of the messages that match, by queue id (which sorts by arrival), after `after`.

        The last page, unless `more_follows`.
        """

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        """All that is kept about one message, None where there is no such message."""

    async def counts(self) -> Mapping[State, int]:
        """How many recipients are in each state that is not final."""

    async def nodes(self) -> list[Node]:
        """The nodes that share the queue; none where it is this machine's alone."""

    async def count_destinations(self, after: str) -> tuple[list[DestinationPart], str | None]:
        """The next step of a count of the queue by domain, and where it ended; "" begins it, None
        is its end.
        """


class QueueControl(Protocol):
    """What the operator may change."""

    async def change(
        self,
        wanted: QueueFilter,
        *,
        verb: str,
        now: datetime,
        after: str = "",
        event_of: EventOfChange | None = None,
    ) -> ChangeStep:
        """A verb of `relay.queue.verbs` on the next that match, in one commit, or `SpoolError`.

        A recipient that is being tried is left alone. The event that `event_of` makes of a
        recipient, as it was before, commits with its change. It is called on any thread.
        """


class EventLog(Protocol):
    """The events of the delivery log, for those that follow them. May raise `SpoolError`."""

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """Events in the order of their commits, those after `seq`."""

    async def write_event(self, event: Event) -> None:
        """Commit an event that tells of what an operator did."""

    async def log_written(self, seq: int) -> None:
        """Remember that the log's file holds, synced, all events up to `seq`. Needs no sync."""

    async def log_mark(self) -> int:
        """The last `seq` given to `log_written`, 0 at first."""

    async def last_seq(self) -> int:
        """The number of the newest event, 0 at first."""

    async def purge_events(self, *, before: datetime) -> int:
        """Remove events older than `before` that the log holds. An engine may remove them by whole
        days, and returns how many of these, or how many events; 0 where there were none.
        """

    async def purge_statistics(self, *, before: datetime) -> int:
        """Remove what was counted in hours that ended before `before`; returns how many rows."""


class TlsReports(Protocol):
    """Which reports on TLS are sent (RFC 8460). May raise `SpoolError`.

    A report has a day, a domain, and a place that it is sent to: a URI, or "" for all places of the
    domain together. It is finished in one commit with the mail that carries it: so there is one,
    whoever is killed when.
    """

    async def claim_tls_report(self, day: date, domain: str, place: str) -> bool:
        """Take a report for sending; False where it is finished, or claimed already.

        A claim ends with `finish_tls_report` or `release_tls_report`, or when the store is opened
        again after a crash.
        """

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        """End a claim; the report was not sent."""

    async def finish_tls_report(
        self,
        day: date,
        domain: str,
        place: str,
        result: ReportResult,
        *,
        message: NewMessage | None = None,
    ) -> None:
        """Commit, as one: what became of a claimed report, and the mail that carries it, which is
        accepted. `SpoolError` if it is not claimed.
        """

    async def finished_tls_reports(self, day: date, domain: str) -> Mapping[str, ReportResult]:
        """What became of the reports of a day and domain, by place."""

    async def domains_reported(self, day: date) -> set[str]:
        """The domains whose report of a day is finished for all places."""

    async def purge_tls_sessions(self, *, before: date) -> int:
        """Remove what was counted in days before `before`, and what became of their reports;
        returns how many rows.
        """


class ReadOnlyQueue(QueueView, Protocol):
    """The queue of another worker, or of a relay that does not run."""

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """What was set over HTTP, by sender domain."""

    async def close(self) -> None:
        """Release the files."""


class LostEvents(Protocol):
    """The events of nodes that are lost and that no log file has. May raise `SpoolError`."""

    async def lost_events(self, *, limit: int = 1000) -> tuple[int, list[StoredEvent]]:
        """The number of a lost node, and its next events. No events where there is none, and at
        all live nodes but one.
        """

    async def lost_written(self, node: int, seq: int) -> None:
        """Remember that a log file holds, synced, all events of a lost node up to `seq`."""


class Store(MessageSink, DeliveryQueue, QueueView, QueueControl, EventLog, TlsReports, Protocol):
    """A whole queue that survives: what an engine implements."""

    @property
    def api_state(self) -> ApiState:
        """What the HTTP interface keeps beside the queue."""

    def clock(self) -> datetime:
        """The time now, the same for all that share the queue."""

    @property
    def lost(self) -> LostEvents | None:
        """Where several nodes share the queue: what the lost ones have not written to a log."""

    async def database_state(self) -> DatabaseState | None:
        """Where several nodes share the queue: how they and its database are, if that answers."""

    def not_ready(self) -> str:
        """Why no mail should be handed to this relay though it is alive; "" where it may be."""

    def when_superseded(self, call: Callable[[str], None]) -> None:
        """Have `call` hear, once, why this process must leave the queue to others and end."""

    async def close(self) -> None:
        """Finish what was begun and release the files."""
