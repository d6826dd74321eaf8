"""Taking over the queue of a worker that does not exist any more.

With fewer workers than before, what the others still hold would never be delivered. The first
worker takes all of it into its own queue before it delivers anything:

    lock       the orphaned queue, as its owner would
    rename     its directory to a name that no queue ever had: what follows is about this one alone
    link       its files of large content, into those of the queue
    copy       everything else, and a note of the name, in one transaction that is synced
    remove     the directory, then the note

A crash before the commit leaves the orphaned queue as it was, and links that mean nothing; after
the commit, the next start finds the note and copies nothing again. So each message is in exactly
one queue whenever something is delivered.

Events that are in the log's file already, and looked at for webhooks, go before all others, with
numbers below zero; the rest come as new ones, and are written and told as those. Calls that
webhooks wait for come along, and so does what reports on TLS are still to tell. Webhooks and
settings do not: what another worker has of them is a copy of the first one's, and may be an old
one.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import sqlite3
from collections.abc import Collection
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

from relay.mail.files import sync_directory
from relay.queue.sqlite.disk import DATABASE, Spool, is_full, open_writer
from relay.queue.sqlite.files import CONTENT, link_all
from relay.queue.sqlite.schema import migrate
from relay.queue.store import SpoolError

log = logging.getLogger(__name__)

_ADOPTED = "adopting-"
_NOTE = "adopted:"
_LOCK_WAIT = timedelta(seconds=3)


def orphans(directory: Path, prefix: str, *, present: Collection[str]) -> list[Path]:
    """The queues below a directory that begin with a prefix and have no worker; and those half
    adopted.
    """
    below = sorted(path for path in directory.glob("*/") if (path / DATABASE).exists())
    return [
        path
        for path in below
        if path.name.startswith(_ADOPTED)
        or (path.name.startswith(prefix) and path.name not in present)
    ]


def adopt(db: sqlite3.Connection, directory: Path, found: Collection[Path]) -> None:
    """Take these queues into that of `db`, which is in `directory`."""
    for path in found:
        try:
            _adopt_one(db, directory, path)
        except (sqlite3.Error, OSError) as exc:
            if not is_full(exc):
                raise
            log.error(
                "%s: no room to take over what is queued there; the next start tries again", path
            )
    _remove_adopted(db, directory)


def _adopt_one(db: sqlite3.Connection, directory: Path, path: Path) -> None:
    if path.name.startswith(_ADOPTED):
        renamed = path
    else:
        _fold(path)
        renamed = path.rename(directory / f"{_ADOPTED}{secrets.token_hex(8)}")
        sync_directory(directory)
    note = f"{_NOTE}{renamed.name}"
    if db.execute("SELECT 1 FROM meta WHERE key = ?", (note,)).fetchone() is None:
        if (renamed / CONTENT).exists():
            link_all(renamed / CONTENT, directory / CONTENT)
        count = _copy(db, renamed, note)
        log.warning("%s: %d messages of a worker that is no more were taken over", path, count)


def _remove_adopted(db: sqlite3.Connection, directory: Path) -> None:
    """By the notes: of what a crash left, the database may be what was removed first."""
    for (note,) in db.execute("SELECT key FROM meta WHERE key LIKE ?", (f"{_NOTE}%",)).fetchall():
        adopted = directory / note.removeprefix(_NOTE)
        if adopted.exists():
            shutil.rmtree(adopted)
        sync_directory(directory)
        db.execute("DELETE FROM meta WHERE key = ?", (note,))


def _fold(path: Path) -> None:
    """Bring an orphaned queue to today's tables and into one file, while nobody else has it."""
    spool = Spool(path, reserve_bytes=0, lock_wait=_LOCK_WAIT)
    try:
        spool.drop_ballast()
        with closing(open_writer(spool.path, synchronous="FULL", wal_limit_bytes=0)) as orphan:
            migrate(orphan)
            sync_directory(path)  # the log has a name before its pages go into the database
            busy = orphan.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if busy:
            raise SpoolError(f"{path}: another process reads this queue")
    finally:
        spool.close()


def _copy(db: sqlite3.Connection, path: Path, note: str) -> int:
    """Everything in one transaction; how many messages."""
    db.execute("ATTACH ? AS orphan", (f"file:{quote(str(path / DATABASE))}?mode=ro",))
    try:
        db.execute("BEGIN IMMEDIATE")
        try:
            count = db.execute("INSERT INTO message SELECT * FROM orphan.message").rowcount
            for table in ("recipient", "owed", "leaving"):
                db.execute(f"INSERT INTO {table} SELECT * FROM orphan.{table}")
            db.execute(
                "INSERT INTO call (due, attempts, url, line)"
                " SELECT due, attempts, url, line FROM orphan.call"
            )
            db.execute(
                "INSERT INTO statistic SELECT * FROM orphan.statistic WHERE 1"
                " ON CONFLICT DO UPDATE SET number = number + excluded.number"
            )
            for table in ("exception", "tls_policy", "imported"):
                db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM orphan.{table}")
            db.execute(
                "INSERT INTO tls_session SELECT * FROM orphan.tls_session WHERE 1"
                " ON CONFLICT DO UPDATE SET number = number + excluded.number"
            )
            _copy_events(db)
            db.execute("INSERT INTO meta VALUES (?, 1)", (note,))
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
    finally:
        db.execute("DETACH orphan")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return count


_COLUMNS = "at, name, queue_id, sender, recipient, id, line"


def _copy_events(db: sqlite3.Connection) -> None:
    done = _done(db)
    mark = db.execute("SELECT coalesce(max(value), 0) FROM meta WHERE key = 'log_mark'").fetchone()[
        0
    ]
    lowest, highest = db.execute("SELECT min(seq), max(seq) FROM event").fetchone()
    # The number 0 is nobody's: as a place to go on from, it means the beginning.
    below = min(0 if lowest is None else lowest, 0)
    above = max(0 if highest is None else highest, mark)
    last_done = db.execute("SELECT max(seq) FROM orphan.event WHERE seq <= ?", (done,)).fetchone()[
        0
    ]
    if last_done is not None:
        db.execute(
            f"INSERT INTO event SELECT seq - ? + ? - 1, {_COLUMNS} FROM orphan.event"
            " WHERE seq <= ?",
            (last_done, below, done),
        )
    db.execute(
        f"INSERT INTO event SELECT seq - ? + ?, {_COLUMNS} FROM orphan.event WHERE seq > ?",
        (done, above, done),
    )


def _done(db: sqlite3.Connection) -> int:
    """Up to which event the orphaned queue's log, and its webhooks if any, have seen all."""
    marks = dict(
        db.execute("SELECT key, value FROM orphan.meta WHERE key IN ('log_mark', 'calls_seen')")
    )
    written = int(marks.get("log_mark", 0))
    since = db.execute("SELECT min(since) FROM orphan.webhook").fetchone()[0]
    return written if since is None else min(written, max(int(marks.get("calls_seen", 0)), since))
