"""Everything that is read from the queue, on a thread and a read-only connection of its own.

Each question is answered in short reads: a long one would keep the write-ahead log from being
folded back, and everybody else waiting. So a search goes through its table in windows, and of all
searches one window waits at a time: any other question comes before the next. Large content comes
piece by piece from its file, on threads of its own. The same questions are asked of a running
relay's queue and of a stopped one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from relay.mail.address import domain_spellings, spellings
from relay.mail.event import Event
from relay.mail.jsontext import of_json
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.api_state import DomainSettings
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.header import header_section
from relay.queue.rows import (
    FINAL_NUMBER,
    STATE_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    message_of,
    micros,
    moment,
    pending_change,
    recipient_of,
)
from relay.queue.sqlite.api_state import domain_settings
from relay.queue.sqlite.disk import DATABASE, open_reader, open_stopped, translated
from relay.queue.sqlite.files import CONTENT, read_piece
from relay.queue.sqlite.schema import ASIDE, READY, WAITING
from relay.queue.store import (
    CHUNK_BYTES,
    FRUITLESS,
    PAGE_RECIPIENTS,
    EventFilter,
    EventOfChange,
    ListedMessage,
    ListedRecipient,
    PendingReport,
    QueuedItem,
    QueueFilter,
    SearchTooLong,
    SpoolError,
    StoredEvent,
    more_follows,
)

__all__ = ["OWING", "Reader", "StoppedQueue", "matching"]

log = logging.getLogger(__name__)

_WINDOW = 5000
_EVENT_WINDOW = 1000
_ITEMS_AT_ONCE = 200
_DUE_WINDOW = 1000
_AWAITED = (
    "SELECT 1 FROM recipient WHERE recipient.queue_id = owed.queue_id"
    f" AND place <> {ASIDE} AND due <= owed.report_after"
)
OWING = f"SELECT DISTINCT queue_id FROM owed WHERE NOT EXISTS ({_AWAITED}) AND queue_id IN (?)"
"""Messages among some whose debts are to be paid: the first of them has no company to wait for."""

_EVENT_COLUMNS = "seq, at, name, queue_id, sender, recipient, id, line"

_STRICTEST = TlsSettings(Setting(True, Source.DEFAULT), Setting(False, Source.DEFAULT))

T = TypeVar("T")


class Reader:
    """Asks one connection, on one thread."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], directory: Path) -> None:
        self._connect = connect
        self._directory = directory
        self._db: sqlite3.Connection | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="queue-reader")
        self._files = ThreadPoolExecutor(max_workers=4, thread_name_prefix="queue-content-reader")
        self._searching = asyncio.Lock()
        self._closed = False

    @classmethod
    def of(cls, directory: Path) -> Reader:
        """A reader of a running relay's queue."""
        return cls(lambda: open_reader(directory / DATABASE), directory)

    async def ask(self, question: Callable[..., T], *args: Any) -> T:
        """The answer of `question(connection, *args)`."""
        return await self._on(self._pool, self._answer, question, args)

    async def _search(self, question: Callable[..., T], *args: Any) -> T:
        """The same, for one step of a long search."""
        async with self._searching:
            return await self.ask(question, *args)

    def _answer(self, question: Callable[..., T], args: tuple[Any, ...]) -> T:
        if self._db is None:
            self._db = self._connect()
        return question(self._db, *args)

    async def _on(self, threads: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise SpoolError("the queue is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work, *args)
        except (sqlite3.Error, OSError) as exc:
            raise translated(exc) from exc

    async def close(self) -> None:
        """Let the connection go."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._pool, self._let_go)
            self._pool.shutdown(wait=True)
            self._files.shutdown(wait=True)

    def _let_go(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # What the Store protocol promises.

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces, in order. `SpoolError` where it is not whole."""
        content, in_file, size_bytes = await self.ask(_content_of, queue_id)
        if in_file:
            path = self._directory / CONTENT / queue_id
            for offset in range(0, size_bytes, CHUNK_BYTES):
                yield await self._on(self._files, read_piece, path, offset, size_bytes)
        else:
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section."""
        return await header_section(self.read_content(queue_id), limit_bytes=limit_bytes)

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of what matches, by queue id."""
        found: list[ListedMessage] = []
        reached: str | None = after
        while reached is not None and not more_follows(found, limit):
            few = min(limit - len(found), _ITEMS_AT_ONCE)
            ids, reached = await self._search(_look, wanted, now, reached, few)
            found += await self._search(_listed, ids)
        return found

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        """All that is kept about one message."""
        return await self.ask(_item, queue_id)

    async def find_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str, limit: int
    ) -> tuple[list[str], str | None]:
        """The ids of some that match, and up to where the queue was looked through; None: to its
        end.
        """
        ids: list[str] = []
        reached: str | None = after
        while reached is not None and not ids:
            ids, reached = await self._search(_look, wanted, now, reached, limit)
        return ids, reached

    async def events_of(
        self, ids: Sequence[str], event_of: EventOfChange
    ) -> dict[tuple[str, int], Event]:
        """The event of each recipient of these messages that is not final, by queue id and index."""
        events: dict[tuple[str, int], Event] = {}
        for start in range(0, len(ids), _ITEMS_AT_ONCE):
            events |= await self._search(_events_of, ids[start : start + _ITEMS_AT_ONCE], event_of)
        return events

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        return await self.ask(count_states)

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events."""
        return await self.ask(_events_after, seq, limit)

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        """A page of the events that match."""
        began = time.monotonic()
        low, high = await self._search(_event_bounds, after, ascending)
        found: list[StoredEvent] = []
        while low <= high and len(found) < limit:
            some, reached = await self._search(
                _events_within, wanted, low, high, limit - len(found), ascending
            )
            found += some
            low, high = (reached + 1, high) if ascending else (low, reached - 1)
            if patience is not None and _is_over(patience, time.monotonic() - began, found):
                break
        return found

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """What was set over HTTP, by sender domain."""
        return await self.ask(domain_settings)

    async def log_mark(self) -> int:
        """Up to where the log file holds the events."""
        return await self.ask(_log_mark)

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        """Messages whose debts are to be paid."""
        return await self.ask(_owing, micros(now), micros(pending_since), limit)

    async def pending_report(self, queue_id: str) -> PendingReport | None:
        """What is owed about a message."""
        return await self.ask(_debt, queue_id)

    async def next_due(self, skip: Sequence[str]) -> datetime | None:
        """When the next unclaimed recipient outside `skip` is due, or a little earlier."""
        return await self.ask(_next_due, json.dumps(list(skip)))


class StoppedQueue(Reader):
    """The queue of a relay that does not run: all that can be looked at, nothing that changes."""

    def __init__(self, directory: Path) -> None:
        self._lock_fd = -1
        super().__init__(lambda: self._connect_stopped(directory), directory)

    @classmethod
    async def open(cls, directory: Path) -> Self:
        """Open it, or raise `SpoolError`: it is in use, is not there, or cannot be read."""
        stopped = cls(directory)
        try:
            await stopped.ask(lambda db: None)
        except SpoolError:
            await stopped.close()
            raise
        return stopped

    def _connect_stopped(self, directory: Path) -> sqlite3.Connection:
        db, self._lock_fd = open_stopped(directory)
        return db

    async def close(self) -> None:
        """Let the next relay have the queue."""
        await super().close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


# Content.


def _content_of(db: sqlite3.Connection, queue_id: str) -> tuple[bytes, int, int]:
    row: tuple[bytes, int, int] | None = db.execute(
        "SELECT content, in_file, size_bytes FROM message WHERE queue_id = ?", (queue_id,)
    ).fetchone()
    if row is None:
        raise SpoolError(f"{queue_id}: there is no such message")
    content, in_file, _ = row
    if not in_file and not isinstance(content, bytes):
        raise SpoolError(f"{queue_id}: its content is damaged")
    return row


def _is_one_of(column: str, spelled: Sequence[str], values: dict[str, Any]) -> str:
    """The condition that an address or a domain is written in one of these ways.

    One way is the usual case, and with `=` an index gives the rows in the order of their numbers.
    """
    name = column.replace(".", "_")
    values |= {f"{name}{number}": text for number, text in enumerate(spelled)}
    parameters = ", ".join(f":{name}{number}" for number in range(len(spelled)))
    return (
        f"{column} COLLATE NOCASE IN ({parameters})"
        if len(spelled) > 1
        else f"{column} = {parameters} COLLATE NOCASE"
    )


# Messages.


def matching(wanted: QueueFilter, now: datetime) -> tuple[str, str, dict[str, Any]]:
    """The conditions on a message `m` and on a recipient `r`, and their values."""
    of_message, of_recipient = ["1"], ["1"]
    values: dict[str, Any] = {}
    if wanted.queue_ids:
        of_message.append("m.queue_id IN (SELECT value FROM json_each(:ids))")
        values["ids"] = json.dumps(sorted(wanted.queue_ids))
    if wanted.sender:
        of_message.append(_is_one_of("m.reverse_path", spellings(wanted.sender), values))
    if wanted.older_than is not None:
        of_message.append("m.arrived <= :arrived")
        values["arrived"] = micros(now - wanted.older_than)
    if wanted.domain:
        of_recipient.append(_is_one_of("r.domain", domain_spellings(wanted.domain), values))
    if wanted.state is not None:
        of_recipient.append("r.state = :state")
        values["state"] = STATE_NUMBER[wanted.state]
    return " AND ".join(of_message), " AND ".join(of_recipient), values


def _look(
    db: sqlite3.Connection, wanted: QueueFilter, now: datetime, after: str, limit: int
) -> tuple[list[str], str | None]:
    """The ids of the next messages that match, and up to where that looked; None: to the end.

    Not more of them than have `PAGE_RECIPIENTS` together. Who asks about recipients looks through
    theirs: a message's row, which has its content in it, is many times longer.
    """
    of_message, of_recipient, values = matching(wanted, now)
    table = "message" if of_recipient == "1" else "recipient"
    width = limit if of_message == of_recipient == "1" else _WINDOW
    until, seen = (
        (max(wanted.queue_ids), 0)
        if wanted.queue_ids
        else db.execute(
            "SELECT max(queue_id), count(*) FROM"
            f" (SELECT queue_id FROM {table} WHERE queue_id > ? ORDER BY queue_id LIMIT ?)",
            (after, width),
        ).fetchone()
    )
    among = (
        ""
        if of_recipient == "1"
        else " AND m.queue_id IN (SELECT r.queue_id FROM recipient r"
        f" WHERE r.queue_id > :after AND r.queue_id <= :until AND {of_recipient})"
    )
    rows = db.execute(
        "SELECT m.queue_id, m.recipients FROM message m"
        f" WHERE m.queue_id > :after AND m.queue_id <= :until AND {of_message}{among}"
        " ORDER BY m.queue_id LIMIT :limit",
        values | {"after": after, "until": until, "limit": limit},
    ).fetchall()
    ids: list[str] = []
    recipients = 0
    for queue_id, count in rows:
        ids.append(queue_id)
        recipients += count
        if len(ids) == limit or recipients >= PAGE_RECIPIENTS:
            return ids, queue_id
    return ids, until if seen == width else None


def _item(db: sqlite3.Connection, queue_id: str) -> QueuedItem | None:
    """A message as the operator sees it."""
    row = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data FROM message WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    if row is None:
        return None
    recipients = db.execute(
        "SELECT idx, domain, state, due, data FROM recipient WHERE queue_id = ? ORDER BY idx",
        (queue_id,),
    )
    return QueuedItem(_shown_message(*row), tuple(_shown_recipient(*one) for one in recipients))


def _listed(db: sqlite3.Connection, ids: Sequence[str]) -> list[ListedMessage]:
    """Messages in a listing. Nearly all its time goes by here, so nothing is made that is not
    shown.
    """
    found: list[ListedMessage] = []
    recipients: list[ListedRecipient] = []
    for queue_id, reverse_path, arrived, size_bytes, *columns in db.execute(
        "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes, r.idx, r.domain, r.state, r.due, r.data"
        " FROM message m LEFT JOIN recipient r ON r.queue_id = m.queue_id"
        " WHERE m.queue_id IN (SELECT value FROM json_each(?)) ORDER BY m.queue_id, r.idx",
        (json.dumps(ids),),
    ):
        if not found or found[-1].queue_id != queue_id:
            recipients = []
            found.append(
                ListedMessage(
                    queue_id, str(reverse_path), _int(arrived), _int(size_bytes), recipients
                )
            )
        if columns[0] is not None:
            recipients.append(_listed_recipient(*columns))
    return found


def _int(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _listed_recipient(
    index: int, domain: str, state: int, due: int | None, data: str
) -> ListedRecipient:
    try:
        address, _, _, _, attempts, last, *_ = of_json(data)
        if isinstance(address, str) and (due is None or isinstance(due, int)):
            shown = None if last is None else (_int(last[0]), *last[1:5])
            return ListedRecipient(address, STATE_OF_NUMBER[state], _int(attempts), due, shown)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    damaged = _shown_recipient(index, domain, state, due, data)
    return ListedRecipient(damaged.address, damaged.state, 0, None, None)


def _events_of(
    db: sqlite3.Connection, ids: Sequence[str], event_of: EventOfChange
) -> dict[tuple[str, int], Event]:
    """Of a damaged row there is none."""
    events: dict[tuple[str, int], Event] = {}
    message: QueuedMessage | None = None
    for row in db.execute(
        "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes, m.data,"
        " r.idx, r.domain, r.state, r.due, r.data"
        " FROM message m JOIN recipient r ON r.queue_id = m.queue_id"
        f" WHERE m.queue_id IN (SELECT value FROM json_each(?)) AND r.state < {FINAL_NUMBER}"
        " ORDER BY m.queue_id, r.idx",
        (json.dumps(ids),),
    ):
        if message is None or row[0] != message.queue_id:
            message = _shown_message(*row[:5])
        with contextlib.suppress(BadRow):
            events[row[0], row[5]] = event_of(message, recipient_of(*row[5:]))
    return events


def _shown_message(
    queue_id: str, reverse_path: str, arrived: int, size_bytes: int, data: str
) -> QueuedMessage:
    """The message, or what can be told of it where its row is damaged: the operator has to see it."""
    try:
        return message_of(queue_id, reverse_path, arrived, size_bytes, data)
    except BadRow as exc:
        return QueuedMessage(
            queue_id=str(queue_id),
            reverse_path=str(reverse_path),
            arrived=moment(arrived) if isinstance(arrived, int) else moment(0),
            size_bytes=size_bytes if isinstance(size_bytes, int) else 0,
            summary=MessageSummary(subject=f"({exc})"),
        )


def _shown_recipient(
    index: int, domain: str, state: int, due: int | None, data: str
) -> QueuedRecipient:
    try:
        return recipient_of(index, domain, state, due, data)
    except BadRow as exc:
        known = isinstance(state, int) and 0 <= state < len(STATE_OF_NUMBER)
        return QueuedRecipient(
            index=index,
            address=f"({exc})",
            domain=str(domain),
            settings=_STRICTEST,
            state=STATE_OF_NUMBER[state] if known else State.HELD,
        )


def count_states(db: sqlite3.Connection) -> dict[State, int]:
    """Recipients in each state that is not final, counted."""
    counted = dict(
        db.execute(
            f"SELECT state, count(*) FROM recipient WHERE state < {FINAL_NUMBER} GROUP BY state"
        )
    )
    return {STATE_OF_NUMBER[number]: counted.get(number, 0) for number in range(FINAL_NUMBER)}


def _next_due(db: sqlite3.Connection, skip: str) -> datetime | None:
    """Ready domains are few steps apart; of those that wait only the first stretch is looked at,
    since too early an answer costs one look more, and too late a one a delay.
    """
    ready = db.execute(
        f"""WITH RECURSIVE ready (domain) AS (
            SELECT min(domain) FROM recipient WHERE place = {READY}
            UNION ALL
            SELECT (SELECT min(domain) FROM recipient WHERE place = {READY} AND domain > ready.domain)
            FROM ready WHERE ready.domain IS NOT NULL)
        SELECT (SELECT min(due) FROM recipient WHERE place = {READY} AND domain = ready.domain) FROM ready
        WHERE domain IS NOT NULL AND domain NOT IN (SELECT value FROM json_each(?)) LIMIT 1""",
        (skip,),
    ).fetchone()
    waiting = (
        db.execute(
            f"""SELECT due FROM
            (SELECT due, domain FROM recipient WHERE place = {WAITING} ORDER BY due LIMIT ?)
            WHERE domain NOT IN (SELECT value FROM json_each(?)) LIMIT 1""",
            (_DUE_WINDOW, skip),
        ).fetchone()
        or db.execute(
            f"SELECT due FROM recipient WHERE place = {WAITING} ORDER BY due LIMIT 1 OFFSET ?",
            (_DUE_WINDOW,),
        ).fetchone()
    )
    found = [row[0] for row in (ready, waiting) if row is not None and isinstance(row[0], int)]
    return moment(min(found)) if found else None


# Debts.


def _owing(db: sqlite3.Connection, now: int, pending_since: int, limit: int) -> list[str]:
    """What was written by a clock that was ahead has waited long enough, too."""
    rows = db.execute(
        "SELECT DISTINCT queue_id FROM owed"
        f" WHERE since <= ? OR since > ? OR NOT EXISTS ({_AWAITED}) LIMIT ?",
        (pending_since, now, limit),
    ).fetchall()
    return [row[0] for row in rows]


def _debt(db: sqlite3.Connection, queue_id: str) -> PendingReport | None:
    rows = db.execute(
        "SELECT is_done, owed.data, idx, domain, state, due, recipient.data"
        " FROM owed JOIN recipient USING (queue_id, idx) WHERE queue_id = ? ORDER BY idx",
        (queue_id,),
    ).fetchall()
    message = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data FROM message WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    if not rows or message is None:
        return None
    try:
        done, delayed = (
            tuple(
                pending_change(recipient_of(*row[2:]), row[1], is_done=kind)
                for row in rows
                if row[0] == kind
            )
            for kind in (True, False)
        )
        return PendingReport(message_of(*message), done, delayed)
    except BadRow as exc:
        raise SpoolError(f"{queue_id}: {exc}") from exc


# Events.


_FIELD_IS = {
    "severity": "json_extract(line, '$.severity') = :value",
    "message-id": "json_extract(line, '$.message.headers.message-id') = :value",
    "tag": "EXISTS (SELECT 1 FROM json_each(line, '$.tags') WHERE value = :value)",
} | {
    field: f"instr(lower(json_extract(line, '$.message.headers.{field}')), lower(:value)) > 0"
    for field in ("from", "to", "subject")
}
"""Conditions on fields of the event; few searches have them, so no column holds these fields."""


def _event(row: tuple[Any, ...]) -> StoredEvent:
    seq, at, name, queue_id, sender, recipient, event_id, line = row
    return StoredEvent(seq, Event(event_id, moment(at), name, queue_id, sender, recipient, line))


def _events_after(db: sqlite3.Connection, seq: int, limit: int) -> list[StoredEvent]:
    rows = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM event WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
    ).fetchall()
    return [_event(row) for row in rows]


def _is_over(patience: timedelta, seconds: float, found: Sequence[StoredEvent]) -> bool:
    """An empty page would say that this is the end, which nobody knows yet."""
    if not found and seconds >= FRUITLESS * patience.total_seconds():
        raise SearchTooLong(f"nothing was found in {seconds:.0f} seconds")
    return bool(found) and seconds >= patience.total_seconds()


def _event_bounds(db: sqlite3.Connection, after: int, ascending: bool) -> tuple[int, int]:
    """The first and the last number that can match. Times say little of them: events commit in any
    order.
    """
    # Each is one step in the index; asked for together they would be a walk through all.
    low, high = db.execute(
        "SELECT (SELECT min(seq) FROM event), (SELECT max(seq) FROM event)"
    ).fetchone()
    if low is None:
        return 1, 0
    if after:
        low, high = (max(low, after + 1), high) if ascending else (low, min(high, after - 1))
    return low, high


def _events_within(
    db: sqlite3.Connection, wanted: EventFilter, low: int, high: int, limit: int, ascending: bool
) -> tuple[list[StoredEvent], int]:
    """The first between two numbers that match, and the end of the window they were looked for in."""
    where = ["seq BETWEEN :low AND :high"]
    values: dict[str, Any] = {"low": low, "high": high, "limit": limit, "width": _EVENT_WINDOW}
    if wanted.begin is not None:
        where.append("at >= :begin")
        values["begin"] = micros(wanted.begin)
    if wanted.end is not None:
        where.append("at <= :end")
        values["end"] = micros(wanted.end)
    if wanted.names:
        where.append("name IN (SELECT value FROM json_each(:names))")
        values["names"] = json.dumps(sorted(wanted.names))
    if wanted.sender:
        where.append(_is_one_of("sender", spellings(wanted.sender), values))
    if wanted.sender_domain:
        where.append(
            "EXISTS (SELECT 1 FROM json_each(:sender_domain)"
            " WHERE lower(substr(sender, -length(value))) = value)"
        )
        domains = domain_spellings(wanted.sender_domain)
        values["sender_domain"] = json.dumps([f"@{domain}" for domain in domains])
    for number, (field, value) in enumerate(wanted.fields):
        where.append(_FIELD_IS[field].replace(":value", f":field{number}"))
        values[f"field{number}"] = value
    source, narrow = "event NOT INDEXED", ""
    if wanted.recipient:
        is_recipient = _is_one_of("recipient", spellings(wanted.recipient), values)
        narrow = f" AND {is_recipient} AND recipient <> ''"  # so that the partial index can serve
        source = "event INDEXED BY event_recipient"
    if wanted.queue_id:
        narrow += " AND queue_id = :queue_id"
        source, values["queue_id"] = "event INDEXED BY event_queue_id", wanted.queue_id
    last, order = ("max", "ASC") if ascending else ("min", "DESC")
    reached, seen = db.execute(
        f"SELECT {last}(seq), count(*) FROM (SELECT seq FROM {source}"
        f" WHERE seq BETWEEN :low AND :high{narrow} ORDER BY seq {order} LIMIT :width)",
        values,
    ).fetchone()
    if seen < _EVENT_WINDOW:
        reached = high if ascending else low
    values["low" if not ascending else "high"] = reached
    rows = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM {source} WHERE {' AND '.join(where)}{narrow}"
        f" ORDER BY seq {order} LIMIT :limit",
        values,
    ).fetchall()
    return [_event(row) for row in rows], reached


def _log_mark(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = 'log_mark'").fetchone()
    return int(row[0]) if row else 0
