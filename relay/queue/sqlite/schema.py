"""The tables of the queue in SQLite, and the way from each older version to this one.

    message     one row a message; small content lies in it, larger in a file (`contents`)
    recipient   one row a recipient, done ones included until the message leaves
    event       the delivery log, in the order of the commits
    owed        what the sender is still to be told of recipients that are done, or take longer
    domain_settings, webhook, call
                what the HTTP interface keeps (relay.queue.api_state)
    statistic, exception
                what was counted of mail, by the hour (relay.queue.sqlite.statistics)
    tls_policy, tls_session, tls_report
                what reports on TLS tell, and which are sent (relay.queue.sqlite.tls_sessions)
    leaving, imported
                messages on their way to another queue; the stamps of those that came from one
                (relay.queue.move)
    meta        the mark up to which the log file holds the events

Where a recipient stands is its `place`, and each place has an index of its own or none:

    WAITING   not due yet                  by due
    READY     due                          by domain, then due: each domain is found in one step
    CLAIMED   handed to an attempt         none; after a crash it is READY
    ASIDE     final, held or quarantined   none
    LEAVING   for another queue            none

So neither a million recipients of a dead domain nor a million domains that wait make
it slower to find one that is due. Mail that is delivered at once is never in an index.

The version is in `PRAGMA user_version`. Migrations are only ever added at the end.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

from relay.mail.files import sync_directory
from relay.queue.due import Place
from relay.queue.sqlite.files import CONTENT, write_whole
from relay.queue.store import SpoolError

APPLICATION_ID = 0x524C5951
"""Marks the file as a relay's queue ("RLYQ")."""

WAITING, READY, CLAIMED, ASIDE, LEAVING = map(int, Place)

Migration = Sequence[str | Callable[[sqlite3.Connection], None]]
"""Statements, and what no statement can do."""

_VERSION_1: Migration = (
    """CREATE TABLE message (
        queue_id TEXT NOT NULL PRIMARY KEY,
        arrived INTEGER NOT NULL,      -- microseconds since 1970, as all times here
        size_bytes INTEGER NOT NULL,
        recipients INTEGER NOT NULL,   -- how many, done ones included
        chunks INTEGER NOT NULL,       -- pieces of content in chunk; 0: it is all in this row
        reverse_path TEXT NOT NULL,
        data TEXT NOT NULL,            -- relay.queue.rows.message_data
        content BLOB
    ) WITHOUT ROWID""",
    """CREATE TABLE recipient (
        queue_id TEXT NOT NULL,
        idx INTEGER NOT NULL,
        domain TEXT NOT NULL,
        state INTEGER NOT NULL,        -- relay.queue.rows.STATE_OF_NUMBER
        place INTEGER NOT NULL,
        due INTEGER,
        data TEXT NOT NULL,            -- relay.queue.rows.recipient_data
        PRIMARY KEY (queue_id, idx)
    ) WITHOUT ROWID""",
    "CREATE INDEX recipient_waiting ON recipient (due, domain) WHERE place = 0",
    "CREATE INDEX recipient_ready ON recipient (domain, due) WHERE place = 1",
    """CREATE TABLE chunk (
        queue_id TEXT NOT NULL,
        seq INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (queue_id, seq)
    ) WITHOUT ROWID""",
    """CREATE TABLE event (
        seq INTEGER NOT NULL PRIMARY KEY,
        at INTEGER NOT NULL,
        name TEXT NOT NULL,
        queue_id TEXT NOT NULL,
        sender TEXT NOT NULL,
        recipient TEXT NOT NULL,
        id TEXT NOT NULL,
        line TEXT NOT NULL
    )""",
    "CREATE INDEX event_at ON event (at)",
    "CREATE INDEX event_queue_id ON event (queue_id)",
    "CREATE INDEX event_recipient ON event (recipient) WHERE recipient <> ''",
    "CREATE TABLE meta (key TEXT NOT NULL PRIMARY KEY, value) WITHOUT ROWID",
)

_VERSION_2: Migration = (
    """CREATE TABLE owed (
        queue_id TEXT NOT NULL,
        idx INTEGER NOT NULL,
        since INTEGER NOT NULL,
        data TEXT NOT NULL,            -- relay.queue.rows.pending_data
        PRIMARY KEY (queue_id, idx)
    ) WITHOUT ROWID""",
)

_VERSION_3: Migration = (
    """CREATE TABLE domain_settings (
        domain TEXT NOT NULL PRIMARY KEY,
        require_tls INTEGER,           -- null: nothing was said
        skip_verification INTEGER
    ) WITHOUT ROWID""",
    """CREATE TABLE webhook (
        domain TEXT NOT NULL,
        name TEXT NOT NULL,
        urls TEXT NOT NULL,            -- a JSON list
        since INTEGER NOT NULL,        -- events up to this seq came before it
        PRIMARY KEY (domain, name)
    ) WITHOUT ROWID""",
    """CREATE TABLE call (
        number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
        due INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        url TEXT NOT NULL,
        line TEXT NOT NULL
    )""",
    "CREATE INDEX call_due ON call (due)",
)


def _content_to_files(db: sqlite3.Connection) -> None:
    """Pieces of content become the files that version 4 wants; a crash before the commit leaves
    both.
    """
    directory = Path(db.execute("PRAGMA database_list").fetchone()[2]).parent / CONTENT
    directory.mkdir(mode=0o700, exist_ok=True)
    for (queue_id,) in db.execute("SELECT queue_id FROM message WHERE chunks > 0"):
        pieces = db.execute("SELECT data FROM chunk WHERE queue_id = ? ORDER BY seq", (queue_id,))
        write_whole(directory / queue_id, (piece for (piece,) in pieces))
    sync_directory(directory)
    sync_directory(directory.parent)


_VERSION_4: Migration = (
    _content_to_files,
    "DROP TABLE chunk",
    "UPDATE message SET chunks = 1 WHERE chunks > 0",
    "ALTER TABLE message RENAME COLUMN chunks TO in_file",  # 1: content is null here
    "CREATE INDEX message_in_file ON message (queue_id) WHERE in_file",
)

_VERSION_5: Migration = (
    """CREATE TABLE debt (
        queue_id TEXT NOT NULL,
        idx INTEGER NOT NULL,
        is_done INTEGER NOT NULL,      -- 0: that it takes longer
        since INTEGER NOT NULL,
        report_after INTEGER NOT NULL,  -- attempts of the message that are due by then come first
        data TEXT NOT NULL,            -- relay.queue.rows.pending_data
        PRIMARY KEY (queue_id, idx, is_done)
    ) WITHOUT ROWID""",
    "INSERT INTO debt SELECT queue_id, idx, 1, since, since, data FROM owed",
    "DROP TABLE owed",
    "ALTER TABLE debt RENAME TO owed",
)

# Addresses are looked for without case (relay.mail.address.spellings).
_VERSION_6: Migration = (
    "DROP INDEX event_recipient",
    "CREATE INDEX event_recipient ON event (recipient COLLATE NOCASE) WHERE recipient <> ''",
)

_VERSION_7: Migration = (
    """CREATE TABLE statistic (
        recipient_domain TEXT NOT NULL,  -- "": sums, with sender_domain "" those of all pairs
        sender_domain TEXT NOT NULL,
        hour INTEGER NOT NULL,           -- since 1970, in UTC
        result TEXT NOT NULL,            -- relay.mail.event.Result
        protection TEXT NOT NULL,        -- relay.mail.event.Protection
        policy TEXT NOT NULL,
        reason TEXT NOT NULL,
        number INTEGER NOT NULL,
        PRIMARY KEY (recipient_domain, sender_domain, hour, result, protection, policy, reason)
    ) WITHOUT ROWID""",
    "CREATE INDEX statistic_hour ON statistic (hour)",
    "CREATE INDEX statistic_sender ON statistic (sender_domain, hour) WHERE sender_domain <> ''",
    """CREATE TABLE exception (
        recipient_domain TEXT NOT NULL,
        sender_domain TEXT NOT NULL,
        at INTEGER NOT NULL,
        event_id TEXT NOT NULL,
        queue_id TEXT NOT NULL,
        result TEXT NOT NULL,
        protection TEXT NOT NULL,
        sentence TEXT NOT NULL,
        PRIMARY KEY (recipient_domain, sender_domain, at, event_id)
    ) WITHOUT ROWID""",
    "CREATE INDEX exception_at ON exception (at)",
    "CREATE INDEX exception_sender ON exception (sender_domain, at)",
)

_VERSION_8: Migration = (
    """CREATE TABLE tls_policy (
        day INTEGER NOT NULL,            -- since 1970, in UTC
        domain TEXT NOT NULL,            -- that is told
        policy TEXT NOT NULL,            -- relay.queue.tls_sessions.policy_id
        data TEXT NOT NULL,              -- and policy_data
        PRIMARY KEY (day, domain, policy)
    ) WITHOUT ROWID""",
    """CREATE TABLE tls_session (
        day INTEGER NOT NULL,
        domain TEXT NOT NULL,
        policy TEXT NOT NULL,
        failure TEXT NOT NULL,           -- relay.queue.tls_sessions.failure_data; "": success
        number INTEGER NOT NULL,
        PRIMARY KEY (day, domain, policy, failure)
    ) WITHOUT ROWID""",
    """CREATE TABLE tls_report (
        day INTEGER NOT NULL,
        domain TEXT NOT NULL,
        place TEXT NOT NULL,             -- a URI; "": all of the domain's
        result TEXT NOT NULL,            -- relay.queue.tls_sessions.ReportResult; "": claimed
        PRIMARY KEY (day, domain, place)
    ) WITHOUT ROWID""",
)

# A sender domain's mail of a year is asked for as often as all mail is.
_VERSION_9: Migration = (
    """INSERT INTO statistic
        SELECT '', sender_domain, hour, result, protection, policy, reason, sum(number)
        FROM statistic WHERE recipient_domain <> '' GROUP BY 2, 3, 4, 5, 6, 7""",
    "DROP INDEX IF EXISTS statistic_sender",
)

_VERSION_10: Migration = (
    """CREATE TABLE IF NOT EXISTS leaving (
        queue_id TEXT NOT NULL PRIMARY KEY,
        stamp TEXT NOT NULL,             -- of this move of the message
        target TEXT NOT NULL             -- the directory it goes to
    ) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS imported (
        queue_id TEXT NOT NULL,
        stamp TEXT NOT NULL,
        at INTEGER NOT NULL,
        PRIMARY KEY (queue_id, stamp)
    ) WITHOUT ROWID""",
)

# Without row numbers SQLite keeps whole rows in the inner pages of the tree, and of each row 489
# octets in its page and the rest in pages of its own: a message of 1 KB took 4.9 KB of disk, and
# among a million messages it was found by way of seven pages.
_VERSION_11: Migration = (
    """CREATE TABLE numbered_message (
        queue_id TEXT NOT NULL PRIMARY KEY,
        arrived INTEGER NOT NULL,
        size_bytes INTEGER NOT NULL,
        recipients INTEGER NOT NULL,     -- how many, done ones included
        in_file INTEGER NOT NULL,        -- 1: content is null here
        reverse_path TEXT NOT NULL,
        data TEXT NOT NULL,              -- relay.queue.rows.message_data
        content BLOB
    )""",
    "INSERT INTO numbered_message SELECT * FROM message ORDER BY queue_id",
    "DROP TABLE message",
    "ALTER TABLE numbered_message RENAME TO message",
    "CREATE INDEX message_in_file ON message (queue_id) WHERE in_file",
)

MIGRATIONS: Sequence[Migration] = (
    _VERSION_1,
    _VERSION_2,
    _VERSION_3,
    _VERSION_4,
    _VERSION_5,
    _VERSION_6,
    _VERSION_7,
    _VERSION_8,
    _VERSION_9,
    _VERSION_10,
    _VERSION_11,
)


def version_of(db: sqlite3.Connection) -> int:
    """The version of the tables in the file, 0 where there are none yet."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def migrate(db: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the tables to the newest version, each step in a transaction of its own.

    A crash between two steps is continued at the next start. Tables of a newer program
    are refused: what they mean we cannot know.
    """
    version = version_of(db)
    if version > len(migrations):
        raise SpoolError(
            f"the queue was written by a newer relay (its tables have version {version}, "
            f"this one knows {len(migrations)}): start that version, or restore an older copy"
        )
    for number, statements in enumerate(migrations[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            if version_of(db) >= number:  # another process was quicker
                db.execute("COMMIT")
                continue
            for statement in statements:
                if isinstance(statement, str):
                    db.execute(statement)
                else:
                    statement(db)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
