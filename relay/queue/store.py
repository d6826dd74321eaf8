"""What a store of the queue promises, whichever engine keeps it.

The store is the only meeting point of receiving and delivering. What `accept`
returned from is committed and synced: it survives a power cut. Every change of
state and every event commits through here, in one transaction each call.

Errors are two: `SpoolError` (our own trouble: 451 4.3.0 at the listener, and the
attempt is made again) and `QueueFull` (no room: 452 4.3.1). An engine translates
what its library raises, once, and never answers with anything else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

from relay.mail.event import Event
from relay.queue.entry import Entry, QueuedMessage, QueuedRecipient, State
from relay.queue.settle import Change, Settlement

__all__ = [
    "CHUNK_BYTES",
    "FRUITLESS",
    "PAGE_RECIPIENTS",
    "EventFilter",
    "Listed",
    "ListedRecipient",
    "NewMessage",
    "PendingReport",
    "QueueFilter",
    "QueueFull",
    "QueuedItem",
    "SearchTooLong",
    "SpoolError",
    "Store",
    "StoredEvent",
    "Stretch",
    "Tell",
    "more_follows",
]

CHUNK_BYTES = 256 * 1024
"""Content is staged and read in pieces of at most this size."""

PAGE_RECIPIENTS = 5000
"""A page of the queue ends behind the message with which it has so many recipients."""

FRUITLESS = 10
"""So many times the patience for a page is given to a search that has found nothing."""


class SpoolError(Exception):
    """The store could not do what was asked; nothing was changed. Temporary for every client."""


class QueueFull(SpoolError):
    """The store has no room left for another message."""


class SearchTooLong(SpoolError):
    """The patience of who asked was over before anything was found, or the end was reached."""


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to take in: from a client, or a DSN of ours.

    `content` is what of the content was not staged before, all of it where none was;
    `staged_bytes` is how much `Store.stage` has taken under this queue id.
    """

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...]
    content: bytes
    staged_bytes: int = 0
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event with the sequence number its commit gave it (strictly rising)."""

    seq: int
    event: Event


@dataclass(frozen=True, slots=True)
class QueueFilter:
    """Which messages an operator means; every field that is set has to match. `domain` is a recipient's."""

    queue_ids: frozenset[str] = frozenset()
    domain: str = ""
    sender: str = ""
    older_than: timedelta | None = None
    state: State | None = None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events are asked for; every field that is set has to match.

    `sender_domain`: of the reverse-path, in any case. `told`: pairs of a field and what it has to
    say: from, to, subject (part of it, in any case), message-id, severity, tag.
    """

    begin: datetime | None = None
    end: datetime | None = None
    names: frozenset[str] = frozenset()
    recipient: str = ""
    sender: str = ""
    queue_id: str = ""
    sender_domain: str = ""
    told: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class QueuedItem:
    """A message as the operator sees it: with all its recipients, done ones included."""

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...] = field(default_factory=tuple)


class ListedRecipient(NamedTuple):
    """A recipient in a listing. `last`: time, code, status, message and host of the last attempt."""

    address: str
    state: State
    attempts: int
    due: int | None
    last: Sequence[Any] | None


class Listed(NamedTuple):
    """A message in a listing, which may be long: as little as is shown, times in whole microseconds."""

    queue_id: str
    reverse_path: str
    arrived: int
    size_bytes: int
    recipients: Sequence[ListedRecipient]


def more_follows(page: Sequence[QueuedItem] | Sequence[Listed], limit: int) -> bool:
    """Whether a page is full: then there may be another."""
    return len(page) >= limit or sum(len(item.recipients) for item in page) >= PAGE_RECIPIENTS


Tell = Callable[[QueuedMessage, QueuedRecipient], Event]
"""Makes the event of a change to a recipient, which is given as it was before."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a verb did to a part of the queue: recipients changed, messages that matched.

    `until`: where the next part begins, None at the end.
    """

    until: str | None
    changed: int = 0
    found: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PendingReport:
    """What the sender of a message is still to be told of its recipients, of whatever domain.

    `done`: what became of them. `delayed`: that they take longer; what has become of them since is in
    their state.
    """

    message: QueuedMessage
    done: tuple[Change, ...] = ()
    delayed: tuple[Change, ...] = ()

    @property
    def to_be_told(self) -> tuple[Change, ...]:
        """Without the delays that are over."""
        return self.done + tuple(one for one in self.delayed if not one.recipient.state.is_final)


class Store(Protocol):
    """A queue that survives. All methods may raise `SpoolError`."""

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Take a piece of content before its message is accepted; returns when it may be forgotten by us.

        `offset` is how much was staged before it. Nothing is owed for it yet: without an `accept` it is
        garbage, removed by `discard` or at the next start.
        """

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged for a message that was not given to `accept`."""

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility. On return envelope, content and events are committed and synced.

        Runs to its end even if the caller is cancelled: a message half taken in does not exist. Where it
        fails, what was staged is gone, too.
        """

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        limit_per_domain: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> list[Entry]:
        """At most `limit` entries that are due, fairly over the domains, none of a domain in `skip`.

        `only`: none of another domain than these, those named first before others. At most `limit_per_domain` of them are of one domain, however many of it are due. An entry claimed
        is out of reach of every other claim until it is recorded or released, or until the store is opened
        again after a crash, when it is due at once.
        """

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        """When the next unclaimed entry outside `skip` is due (maybe long since), None if there is none."""

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Make due at once what is due after `latest`: by a clock that was ahead, and is no more.

        What its sender asked to be sent later keeps the time he asked for.
        """

    async def wait_for_work(self) -> None:
        """Return when something was accepted, released or changed since the last return."""

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """Give a claim back untried, to be due at `due`."""

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
    ) -> bool:
        """Commit, as one: the new states, the DSNs they owe, the events they make. Ends the claim.

        What is `held` in the settlement is kept as a debt. True: the message has debts, and all attempts
        that were due by the `report_after` of its first one have ended, so they are to be paid with
        `report`. Of attempts that settle at the same moment the last one is told. The message and its
        content are removed with its last recipient and its last debt.
        """

    async def owing(self, *, now: datetime, held_before: datetime, limit: int = 100) -> list[str]:
        """Queue ids of messages whose debts are to be paid: with no company to wait for, or held too long.

        Too long: since `held_before`. An attempt that is put off is not waited for.
        """

    async def debt(self, queue_id: str) -> PendingReport | None:
        """What is owed about a message; None if nothing is."""

    async def report(self, debt: PendingReport, reports: Sequence[NewMessage]) -> None:
        """Commit, as one: these DSNs, and that the debt is paid. `SpoolError` where it was paid already.

        What came to be owed since `debt` was read stays owed.
        """

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces of at most `CHUNK_BYTES`, in order."""

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section of a message with the empty line that ends it, at most `limit_bytes`."""

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[QueuedItem]:
        """A page of the messages that match, by queue id (which sorts by arrival), those after `after`.

        The last one, unless `more_follows`.
        """

    async def list_briefly(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[Listed]:
        """The same, with as much as a listing shows."""

    async def change(
        self,
        wanted: QueueFilter,
        *,
        verb: str,
        now: datetime,
        after: str = "",
        tell: Tell | None = None,
    ) -> Stretch:
        """The operator's `retry`, `hold`, `release`, `remove` on the next of what matches, as one.

        The event that `tell` makes of a recipient, just before, commits with its change. It is called on any
        thread.
        """

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        """Have this called before the operator changes mail, to give back claims that were not begun on.

        Nothing is claimed from then until the change is made.
        """

    async def counts(self) -> Mapping[State, int]:
        """How many recipients are in each state that is not final."""

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """Events in the order of their commits, those after `seq`."""

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        """A page of the events that match; `after` is the last `seq` of the page before, either way.

        After `patience` a page that has anything ends. Empty it is only where nothing follows: while it
        would be, it is searched for on, at most `FRUITLESS` times as long (`SearchTooLong`).
        """

    async def log_written(self, seq: int) -> None:
        """Remember that the delivery log holds, synced, all events up to `seq`. Needs no sync of its own."""

    async def log_mark(self) -> int:
        """The last `seq` given to `log_written`, 0 at first."""

    async def purge_events(self, *, before: datetime) -> int:
        """Forget events older than `before` that the log holds; how many."""

    async def close(self) -> None:
        """Finish what was begun and let the files go."""
