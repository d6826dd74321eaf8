"""What a commit does to recipients beyond adding and settling them: claims, verbs, recovery.

Functions of a connection that is inside a transaction. Fairness: `claim` goes through the
domains that have something due from where the last claim stopped, and takes the same number
of each. How long that takes depends on what is taken, not on what is queued.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from relay.mail.jsontext import of_json
from relay.queue.conditions import all_of, recipient_conditions
from relay.queue.due import latest_wish
from relay.queue.entry import Entry, QueuedMessage, State
from relay.queue.handoff import ClaimQuery, Shares
from relay.queue.rows import (
    ATTEMPTS_PATH,
    FINAL_NUMBER,
    NOT_BEFORE_PATH,
    STATE_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    message_of,
    micros,
    recipient_of,
)
from relay.queue.sqlite.contents import Contents
from relay.queue.sqlite.matching import SqliteValues
from relay.queue.sqlite.schema import ASIDE, CLAIMED, LEAVING, READY, WAITING
from relay.queue.sqlite.statements import remove_all_but
from relay.queue.sqlite.tls_sessions import forget_claims
from relay.queue.store import QueueFilter, SpoolError
from relay.queue.verbs import VERBS, Changed, Verb

log = logging.getLogger(__name__)

_PROMOTED = 1000
_ROUNDS = 4

_IN_FILES = "SELECT queue_id FROM message WHERE in_file"

_WISH = (
    "SELECT wish FROM (SELECT CASE WHEN json_valid(data)"
    f" THEN json_extract(data, '{NOT_BEFORE_PATH}') END AS wish"
    " FROM message WHERE message.queue_id = recipient.queue_id) WHERE wish <= :postponed"
)
"""When the sender wants a message to go out, if it said so."""

_UNTRIED = (
    "CASE WHEN json_valid(data)"
    f" THEN coalesce(json_extract(data, '{ATTEMPTS_PATH}') = 0, 0) ELSE 0 END"
)
"""Whether a recipient was never tried."""


# Claims.


def claim(
    db: sqlite3.Connection, query: ClaimQuery, cursor: str | None
) -> tuple[list[Entry], str | None]:
    """Entries that are due, claimed, and the domain the next claim is to start behind.

    What has become due since the last time is moved to the ready ones first, a stretch at a time. A
    claim of some domains `only` leaves the turn of the others as it was.
    """
    limit, shares, only = query.limit, query.shares, query.only
    passed = {*query.skip, *(domain for domain in shares.taken if not shares.left(domain))}
    for _ in range(_ROUNDS):
        promoted = db.execute(
            f"UPDATE recipient SET place = {READY} WHERE (queue_id, idx) IN"
            f" (SELECT queue_id, idx FROM recipient WHERE place = {WAITING} AND due <= ?"
            f" ORDER BY due LIMIT {_PROMOTED})",
            (micros(query.now),),
        ).rowcount
        domains = _ready_domains(db, limit, passed, cursor, only)
        if domains or promoted < _PROMOTED:
            break
    entries: list[Entry] = []
    while domains and len(entries) < limit:
        # Each round takes entries or sets damaged ones aside, so there is an end.
        found, last = _claim_of(db, domains, limit - len(entries), shares)
        cursor = last if only is None else cursor
        entries += found
        passed.update(domain for domain in domains if not shares.left(domain))
        left = limit - len(entries)
        domains = _ready_domains(db, left, passed, cursor, only) if left > 0 else []
    return entries, cursor


def _ready_domains(
    db: sqlite3.Connection,
    limit: int,
    passed: Collection[str],
    cursor: str | None,
    only: Collection[str] | None,
) -> list[str]:
    """Up to `limit` domains with something ready: those behind the cursor, then from the start."""
    if only is not None:
        return _ready_of(db, limit, [domain for domain in only if domain not in passed])
    skipped = json.dumps(list(passed))
    if cursor is None:
        return _ready_between(db, limit, skipped, None, None)
    behind = _ready_between(db, limit, skipped, cursor, None)
    if len(behind) < limit:
        behind += _ready_between(db, limit - len(behind), skipped, None, cursor)
    return behind


def _ready_of(db: sqlite3.Connection, limit: int, domains: Sequence[str]) -> list[str]:
    rows = db.execute(
        f"""SELECT value FROM json_each(?) WHERE EXISTS
        (SELECT 1 FROM recipient WHERE place = {READY} AND domain = value) LIMIT ?""",
        (json.dumps(list(domains)), limit),
    ).fetchall()
    return [row[0] for row in rows]


def _ready_between(
    db: sqlite3.Connection, limit: int, skipped: str, low: str | None, high: str | None
) -> list[str]:
    """Each domain is one step in the index, however many recipients it has there."""
    rows = db.execute(
        f"""WITH RECURSIVE ready (domain) AS (
            SELECT min(domain) FROM recipient
            WHERE place = {READY} {"" if low is None else "AND domain > :low"}
            UNION ALL
            SELECT (SELECT min(domain) FROM recipient
                    WHERE place = {READY} AND domain > ready.domain)
            FROM ready WHERE ready.domain IS NOT NULL
            {"" if high is None else "AND ready.domain < :high"})
        SELECT domain FROM ready WHERE domain IS NOT NULL
        {"" if high is None else "AND domain <= :high"}
        AND domain NOT IN (SELECT value FROM json_each(:skipped)) LIMIT :limit""",
        {"low": low, "high": high, "skipped": skipped, "limit": limit},
    ).fetchall()
    return [row[0] for row in rows]


def _claim_of(
    db: sqlite3.Connection, domains: Sequence[str], limit: int, shares: Shares
) -> tuple[list[Entry], str]:
    """The oldest entries of some domains, as many of each, and the last domain that was served."""
    quota = -(-limit // len(domains))
    keys: list[tuple[str, str]] = []
    for domain in domains:
        rows = db.execute(
            f"SELECT DISTINCT queue_id FROM recipient WHERE place = {READY} AND domain = ?"
            " ORDER BY due LIMIT ?",
            (domain, shares.left(domain, min(quota, limit - len(keys)))),
        ).fetchall()
        keys += [(queue_id, domain) for (queue_id,) in rows]
        shares.taken[domain] += len(rows)
        if len(keys) >= limit:
            break
    claimed = (_claim_one(db, queue_id, domain) for queue_id, domain in keys)
    return [entry for entry in claimed if entry is not None], domain


def _claim_one(db: sqlite3.Connection, queue_id: str, domain: str) -> Entry | None:
    """One entry, or None where its rows are damaged: then the message is set aside and the others
    go on.
    """
    rows = db.execute(
        "SELECT idx, domain, state, due, data FROM recipient"
        f" WHERE queue_id = ? AND domain = ? AND place = {READY}",
        (queue_id, domain),
    ).fetchall()
    try:
        message, total = _message(db, queue_id)
        recipients = tuple(recipient_of(*row) for row in rows)
    except BadRow as exc:
        _quarantine(db, queue_id, str(exc))
        return None
    db.execute(
        f"UPDATE recipient SET place = {CLAIMED}"
        f" WHERE queue_id = ? AND domain = ? AND place = {READY}",
        (queue_id, domain),
    )
    return Entry(message, recipients, total=total)


def _message(db: sqlite3.Connection, queue_id: str) -> tuple[QueuedMessage, int]:
    row = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data, recipients FROM message"
        " WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    if row is None:
        raise BadRow("its message row is gone")
    return message_of(*row[:5]), row[5]


def _quarantine(db: sqlite3.Connection, queue_id: str, damage: str) -> None:
    """Set a message aside as it is, for a person to look at: it stays in the queue and in its
    state.
    """
    log.error("%s: set aside, it is damaged: %s", queue_id, damage)
    db.execute(
        f"UPDATE recipient SET place = {ASIDE}"
        f" WHERE queue_id = ? AND place IN ({WAITING}, {READY})",
        (queue_id,),
    )


def release(db: sqlite3.Connection, entries: Iterable[Entry], due: datetime | None) -> None:
    """Give claims back, to be due at `due`; None: at once."""
    place, at = (READY, None) if due is None else (WAITING, micros(due))
    for entry in entries:
        changed = db.executemany(
            f"UPDATE recipient SET place = ?, due = coalesce(?, due, 0)"
            f" WHERE queue_id = ? AND idx = ? AND place = {CLAIMED}",
            [(place, at, entry.message.queue_id, one.index) for one in entry.recipients],
        ).rowcount
        if changed != len(entry.recipients):
            raise SpoolError(f"{entry.message.queue_id}: the recipients are not claimed")


# The operator's verbs.


def change(db: sqlite3.Connection, wanted: QueueFilter, verb: str, now: datetime) -> Changed:
    """Do one verb to some messages: those that the filter names. Only their recipients have still
    to match.

    A recipient that is claimed is being tried at this moment: what comes of that stands, so it is
    left as it is and not counted.
    """
    does = VERBS[verb]
    values = SqliteValues()
    named = values.is_among("r.queue_id", sorted(wanted.queue_ids))
    states = ",".join(str(STATE_NUMBER[state]) for state in does.takes)
    meant = (
        f"{all_of(recipient_conditions(wanted, values))}"
        f" AND r.state IN ({states}) AND r.place NOT IN ({CLAIMED}, {LEAVING})"
    )
    changed, left = _what_changes(db, f"{named} AND r.state < {FINAL_NUMBER}", meant, does, values)
    if verb == "remove":
        # What leaves the queue need not be written before.
        rest = remove_all_but(db, {queue_id for queue_id, _ in changed.recipients}, left)
        named = values.is_among("r.queue_id", rest)
        if not rest:
            return changed
    due = micros(now) if does.is_due else None
    place = ASIDE if due is None else READY
    db.execute(
        f"UPDATE recipient AS r SET state = {_becomes(does)}, place = {place}, due = :due"
        f" WHERE {named} AND {meant}",
        values.all | {"due": due},
    )
    return changed


def _what_changes(
    db: sqlite3.Connection, among: str, meant: str, does: Verb, values: SqliteValues
) -> tuple[Changed, set[str]]:
    """What a verb will do to the recipients that are meant, and the messages that have others."""
    # In one row: with each row that is read the interpreter lock goes, and has to be won back.
    found = db.execute(
        f"SELECT json_group_array(json_array(queue_id, idx, state, {_becomes(does)}, {meant}))"
        f" FROM recipient AS r WHERE {among}",
        values.all,
    ).fetchone()[0]
    changed, left = Changed(), set()
    steps: Counter[tuple[int, int]] = Counter()
    for queue_id, index, before, after, is_meant in of_json(found):
        if is_meant:
            changed.recipients.append((queue_id, index))
            steps[before, after] += 1
        else:
            left.add(queue_id)
    for (before, after), number in steps.items():
        changed.states[STATE_OF_NUMBER[before]] -= number
        changed.states[STATE_OF_NUMBER[after]] += number
    return changed, left


def _becomes(does: Verb) -> str:
    """The number of the state that a verb leaves a recipient in."""
    if does.becomes is does.untried_becomes:
        return _number(does.becomes)
    return f"iif({_UNTRIED}, {_number(does.untried_becomes)}, {_number(does.becomes)})"


def _number(state: State | None) -> str:
    return "state" if state is None else str(STATE_NUMBER[state])


# Leftovers.


def purge_events(
    db: sqlite3.Connection, before: datetime, mark: int, after: int, limit: int
) -> tuple[int, int | None]:
    """Forget old events within one stretch; how many, and where the next stretch begins.

    The newest event always stays: its number keeps the numbers rising.
    """
    until = db.execute(
        "SELECT max(seq) FROM"
        " (SELECT seq FROM event WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?)",
        (after, mark, limit),
    ).fetchone()[0]
    if until is None:
        return 0, None
    count = db.execute(
        "DELETE FROM event WHERE seq > ? AND seq <= ? AND at < ?"
        " AND seq < (SELECT max(seq) FROM event)",
        (after, until, micros(before)),
    ).rowcount
    return count, until if count else None


def pull_forward(db: sqlite3.Connection, now: datetime, latest: datetime) -> None:
    """What is due later than any wait we give was written while the clock was ahead, and is due
    now.

    But not before its sender wants it to go out.
    """
    db.execute(
        f"UPDATE recipient SET due = max(:now, coalesce(({_WISH}), 0))"
        f" WHERE place = {WAITING} AND due > :latest",
        {
            "now": micros(now),
            "latest": micros(latest),
            "postponed": micros(latest_wish(now, latest)),
        },
    )


def recover(db: sqlite3.Connection, contents: Contents, now: datetime, latest: datetime) -> None:
    """What a start has to put right.

    What was claimed is due at once. Files without a message were never accepted, or have left.
    """
    db.execute("BEGIN IMMEDIATE")
    db.execute(
        f"UPDATE recipient SET place = {READY}, due = min(coalesce(due, :now), :now)"
        f" WHERE place = {CLAIMED}",
        {"now": micros(now)},
    )
    forget_claims(db)
    pull_forward(db, now, latest)
    for queue_id in contents.sweep([row[0] for row in db.execute(_IN_FILES)]):
        _quarantine(db, queue_id, f"its content, {contents.path_of(queue_id)}, is gone")
    db.execute("COMMIT")
