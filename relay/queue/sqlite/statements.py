"""The statements of a commit: all tables that mail is written to, and the numbers of events.

Each execution of a statement lets go of the interpreter lock and has to get it back from a busy
event loop, so there are few: one writes many rows. There is a statement for each number of rows,
so that number has a bound, and all of them stay prepared.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

from relay.mail.event import Event
from relay.mail.files import sync_directory
from relay.mail.jsontext import of_json
from relay.queue.batch import Row, joined
from relay.queue.numbering import EventNumbers
from relay.queue.request import Refused, Request, answer_settled, settled_messages
from relay.queue.rows import FINAL_NUMBER
from relay.queue.sqlite.schema import ASIDE, CLAIMED
from relay.queue.sqlite.statistics import CommitCounts
from relay.queue.sqlite.tls_sessions import SessionCounter, finish_reports

T = TypeVar("T")

_MOST_ROWS = 32
_MANY_ROWS = 128
"""Where there are many rows, a statement of this size writes them until fewer are left."""

AWAITED = (
    "SELECT 1 FROM recipient WHERE recipient.queue_id = owed.queue_id"
    f" AND place <> {ASIDE} AND due <= owed.report_after"
)
"""An attempt that a pending report (a row of `owed`) waits for."""

_REPORT_IS_DUE = (
    f"SELECT DISTINCT queue_id FROM owed WHERE NOT EXISTS ({AWAITED}) AND queue_id IN (?)"
)
"""Messages among some whose pending report waits for no attempt."""


class Tables:
    """What `relay.queue.sqlite.commit` writes with. `on_gone`: removed messages that had a file."""

    def __init__(
        self, directory: Path, numbers: EventNumbers, *, on_gone: Callable[[list[str]], None]
    ) -> None:
        self._directory = directory
        self._numbers = numbers
        self._on_gone = on_gone
        self._mail = CommitCounts()
        self._sessions = SessionCounter()
        self._mark_in_commit: int | None = None
        self._leaving: list[str] = []
        self._gone: list[str] = []

    @property
    def has_more(self) -> bool:
        """Whether there is something to be written that no request asks for."""
        return self._numbers.mark_to_write is not None

    # Connections.

    def load(self, db: sqlite3.Connection) -> None:
        """Read where the numbers of events go on."""
        found = db.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()[0]
        mark = db.execute("SELECT value FROM meta WHERE key = 'log_mark'").fetchone()
        self._numbers.load(found, mark[0] if mark else 0)

    def connected(self, db: sqlite3.Connection) -> None:
        """Have every removed message that has a file noted (`_remove_messages`)."""
        db.create_function("leaves", 1, self._leaving.append)

    def commit_something(self, db: sqlite3.Connection) -> None:
        """A commit of its own. Its sync is one of all that lies in the log before it, too.

        SQLite syncs the name of a new log along with it, and overlooks it where that fails.
        """
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            "INSERT INTO meta VALUES ('reopened', 1)"
            " ON CONFLICT (key) DO UPDATE SET value = value + 1"
        )
        db.execute("COMMIT")
        sync_directory(self._directory)

    # One transaction.

    def point(self) -> int:
        """The last number that an event was given."""
        return self._numbers.last

    def back_to(self, point: int) -> None:
        """What was numbered since is undone."""
        self._numbers.last = point
        self._sessions.forget()

    def write(self, db: sqlite3.Connection, requests: Sequence[Request]) -> None:
        """All rows of some requests, table by table."""
        rows = [request.rows for request in requests if request.rows is not None]
        if not rows:
            return
        _insert(db, "message", 8, joined(one.messages for one in rows))
        _insert(db, "recipient", 7, joined(one.recipients for one in rows))
        _finish(db, joined(one.finished for one in rows))
        _update(db, joined(one.updates for one in rows))
        _insert(db, "owed", 6, joined(one.pending for one in rows))
        _strike_out(db, joined(one.reported for one in rows))
        remove_if_done(db, joined(one.perhaps_done for one in rows))
        numbered = [
            row
            for request in requests
            if request.rows is not None and request.rows.events
            for row in self._numbers.rows_of(request, request.rows.events)
        ]
        _insert(db, "event", 8, numbered)
        self._mail.add(db, [event for one in rows for event in one.events])
        self._sessions.add(db, [one.sessions for one in rows if one.sessions])
        finish_reports(db, joined(one.tls_reports for one in rows))
        _tell_whose_report_is_due(db, requests)

    def write_events(
        self, db: sqlite3.Connection, request: Request, events: Iterable[Event]
    ) -> None:
        """Add events within a request's function."""
        events = list(events)
        self._mail.add(db, events)
        _insert(db, "event", 8, self._numbers.rows_of(request, events))

    def last(self, db: sqlite3.Connection) -> None:
        """What comes last in a transaction."""
        self._mark_in_commit = mark = self._numbers.mark_to_write
        if mark is not None:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('log_mark', ?)", (mark,))
        self._gone = unknown(db, self._leaving)  # what was undone in it is there still
        self._leaving.clear()

    def committed(self) -> None:
        """The transaction is on the disk."""
        if self._mark_in_commit is not None:
            self._numbers.mark_is_written(self._mark_in_commit)
        if self._gone:
            self._on_gone(self._gone)


def unknown(db: sqlite3.Connection, queue_ids: Iterable[str]) -> list[str]:
    """Those of which there is no message in the queue."""
    asked = "SELECT 1 FROM message WHERE queue_id = ?"
    return [queue_id for queue_id in queue_ids if db.execute(asked, (queue_id,)).fetchone() is None]


def _pieces(rows: Sequence[T]) -> Iterable[Sequence[T]]:
    many = len(rows) - len(rows) % _MANY_ROWS
    for start in range(0, many, _MANY_ROWS):
        yield rows[start : start + _MANY_ROWS]
    for start in range(many, len(rows), _MOST_ROWS):
        yield rows[start : start + _MOST_ROWS]


@lru_cache(maxsize=256)
def _values(width: int, count: int) -> str:
    row = f"({','.join('?' * width)})"
    return ",".join([row] * count)


@lru_cache(maxsize=256)
def _insert_statement(table: str, width: int, count: int) -> str:
    return f"INSERT INTO {table} VALUES {_values(width, count)}"


def _insert(db: sqlite3.Connection, table: str, width: int, rows: Sequence[Row]) -> None:
    for piece in _pieces(rows):
        db.execute(_insert_statement(table, width, len(piece)), list(chain.from_iterable(piece)))


@lru_cache(maxsize=256)
def _in_statement(statement: str, count: int) -> str:
    return statement.replace("(?)", f"({','.join('?' * count)})")


def _for_ids(db: sqlite3.Connection, statement: str, ids: Sequence[str]) -> int:
    """Run a statement that ends in `IN (?)` for these ids; how many rows it changed."""
    if len(ids) > _MOST_ROWS:
        many = statement.replace("(?)", "(SELECT value FROM json_each(?))")
        return db.execute(many, (json.dumps(ids),)).rowcount
    return db.execute(_in_statement(statement, len(ids)), ids).rowcount if ids else 0


def _finish(db: sqlite3.Connection, finished: Sequence[tuple[str, int]]) -> None:
    """Remove messages whose recipients are all claimed and all final now."""
    if not finished:
        return
    ids = [queue_id for queue_id, _ in finished]
    gone = _for_ids(db, f"DELETE FROM recipient WHERE place = {CLAIMED} AND queue_id IN (?)", ids)
    if gone != sum(count for _, count in finished):
        raise Refused("the recipients are not claimed")
    if _remove_messages(db, ids) != len(ids):
        raise Refused("there is no such message")


@lru_cache(maxsize=64)
def _update_statement(count: int) -> str:
    # It has to begin with UPDATE: sqlite3 counts no rows for a statement that begins with WITH.
    return (
        "UPDATE recipient SET state = new.column3, place = new.column4, due = new.column5,"
        f" data = new.column6 FROM (VALUES {_values(6, count)}) AS new"
        " WHERE recipient.queue_id = new.column1 AND recipient.idx = new.column2"
        f" AND recipient.place = {CLAIMED}"
    )


def _update(db: sqlite3.Connection, updates: Sequence[Row]) -> None:
    """Write what an attempt left of recipients that were claimed for it."""
    for piece in _pieces(updates):
        values = list(chain.from_iterable(piece))
        if db.execute(_update_statement(len(piece)), values).rowcount != len(piece):
            raise Refused("the recipients are not claimed")


def _strike_out(db: sqlite3.Connection, reported: Sequence[tuple[str, int, bool]]) -> None:
    """Remove what is reported now from what is pending; nothing is reported twice."""
    strike = "DELETE FROM owed WHERE queue_id = ? AND idx = ? AND is_done = ?"
    for row in reported:
        if not db.execute(strike, row).rowcount:
            raise Refused(f"{row[0]}: nothing is pending about recipient {row[1]}")


def _tell_whose_report_is_due(db: sqlite3.Connection, requests: Sequence[Request]) -> None:
    """Answer the requests that settled a message of which a report is pending."""
    settled = settled_messages(requests)
    due: set[str] = set()
    for piece in _pieces([queue_id for _, queue_id in settled]):
        due.update(row[0] for row in db.execute(_in_statement(_REPORT_IS_DUE, len(piece)), piece))
    answer_settled(settled, due)


def remove_if_done(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    """Remove messages that have no open recipient left and about which no report is pending."""
    if not ids:
        return
    gone = _remove_messages(
        db,
        ids,
        "NOT EXISTS (SELECT 1 FROM recipient"
        f" WHERE recipient.queue_id = message.queue_id AND state < {FINAL_NUMBER})"
        " AND NOT EXISTS (SELECT 1 FROM owed WHERE owed.queue_id = message.queue_id) AND",
    )
    if gone:
        _for_ids(
            db,
            "DELETE FROM recipient WHERE NOT EXISTS (SELECT 1 FROM message"
            " WHERE message.queue_id = recipient.queue_id) AND queue_id IN (?)",
            ids,
        )


def remove_all_but(db: sqlite3.Connection, ids: Collection[str], left: set[str]) -> list[str]:
    """Remove messages, but not those that are `left` and those about which a report is pending;
    these are the result.
    """
    pending = "SELECT json_group_array(queue_id) FROM owed WHERE queue_id IN (SELECT value FROM"
    some = db.execute(f"{pending} json_each(?))", (json.dumps(sorted(ids)),)).fetchone()[0]
    left = left.union(of_json(some))
    gone = sorted(queue_id for queue_id in ids if queue_id not in left)
    _for_ids(db, "DELETE FROM recipient WHERE queue_id IN (?)", gone)
    _remove_messages(db, gone)
    return sorted(left.intersection(ids))


def _remove_messages(db: sqlite3.Connection, ids: Sequence[str], condition: str = "") -> int:
    """Remove messages; how many. Of those that have a file, `Tables` is told.

    A trigger would tell as well, but SQLite keeps a copy of every page that a statement with a
    trigger changes. `condition`: ends in AND.
    """
    delete = f"DELETE FROM message WHERE {condition}"
    gone = _for_ids(db, f"{delete} NOT in_file AND queue_id IN (?)", ids)
    if gone == len(ids):
        return gone
    asked = "SELECT count(leaves(queue_id)) FROM message WHERE in_file AND queue_id IN (?)"
    _for_ids(db, asked, ids)
    return gone + _for_ids(db, f"{delete} in_file AND queue_id IN (?)", ids)
