"""What is done to recipients beyond adding and settling them: claims, verbs, what is left over.

Functions of a connection that is inside a transaction. Fairness is as in SQLite: `claim` goes
through the domains that have something due from where the last claim of this node stopped, and
takes the same number of each. What another node is claiming at the moment is passed over.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from relay.queue.conditions import all_of, recipient_conditions
from relay.queue.due import latest_wish
from relay.queue.entry import Entry
from relay.queue.handoff import ClaimQuery, Shares
from relay.queue.postgres.connection import Db, changed_rows
from relay.queue.postgres.matching import PostgresValues
from relay.queue.postgres.schema import ASIDE, CLAIMED, LEAVING, READY, WAITING
from relay.queue.postgres.statements import remove_if_done
from relay.queue.rows import (
    STATE_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    is_untried,
    message_of,
    micros,
    recipient_of,
    wish_of,
)
from relay.queue.store import ClaimLost, QueueFilter
from relay.queue.verbs import VERBS, Changed, Verb

_Columns = tuple[int, str, int, int | None, str]
"""Of a recipient: idx, domain, state, due, data."""

log = logging.getLogger(__name__)

_PROMOTED = 1000
_ROUNDS = 4


# Claims.


async def claim(db: Db, lease: int, query: ClaimQuery, cursor: str) -> tuple[list[Entry], str]:
    """Entries that are due, claimed, and the domain the next claim is to start behind."""
    limit, shares, only = query.limit, query.shares, query.only
    passed = {*query.skip, *(domain for domain in shares.taken if not shares.left(domain))}
    domains: list[str] = []
    for _ in range(_ROUNDS):
        promoted = await _promote(db, query.now)
        domains = await _ready_domains(db, limit, passed, shares, cursor, only)
        if domains or promoted < _PROMOTED:
            break
    entries: list[Entry] = []
    while domains:
        # A round that finds nothing, since other nodes are claiming there, passes its domains.
        found, last, empty = await _claim_of(db, lease, domains, limit - len(entries), shares)
        cursor = last if only is None else cursor
        entries += found
        passed.update(empty)
        passed.update(domain for domain in domains if not shares.left(domain))
        left = limit - len(entries)
        if left <= 0:
            break
        domains = await _ready_domains(db, left, passed, shares, cursor, only)
    return entries, cursor


async def _promote(db: Db, now: datetime) -> int:
    """Move what has become due to the ready ones, a stretch at a time; how many."""
    status = await db.execute(
        f"""UPDATE relay.recipient SET place = {READY} WHERE (queue_id, idx) IN
        (SELECT queue_id, idx FROM relay.recipient WHERE place = {WAITING} AND due <= $1
         ORDER BY due LIMIT {_PROMOTED} FOR UPDATE SKIP LOCKED) AND place = {WAITING}""",
        micros(now),
    )
    return changed_rows(status)


async def _ready_domains(
    db: Db,
    limit: int,
    passed: Collection[str],
    shares: Shares,
    cursor: str,
    only: Collection[str] | None,
) -> list[str]:
    """Up to `limit` domains with something ready: those behind the cursor, then from the start."""
    if only is not None:
        rows = await db.fetch(
            f"""SELECT domain FROM unnest($1::text[]) AS wanted (domain) WHERE EXISTS
            (SELECT 1 FROM relay.recipient WHERE place = {READY}
             AND recipient.domain = wanted.domain) LIMIT $2""",
            [domain for domain in only if domain not in passed and shares.left(domain)],
            limit,
        )
        return [row[0] for row in rows]
    skipped = list(passed)
    behind = await _ready_between(db, limit, skipped, shares, cursor, None)
    if cursor and len(behind) < limit:
        behind += await _ready_between(db, limit - len(behind), skipped, shares, "", cursor)
    return behind


async def _ready_between(
    db: Db, limit: int, skipped: Sequence[str], shares: Shares, low: str, high: str | None
) -> list[str]:
    """Ready domains that this node may have something of."""
    found: list[str] = []
    while len(found) < limit:
        page = await _page_between(db, limit, skipped, low, high)
        found += [domain for domain in page if shares.left(domain)]
        if len(page) < limit:
            break
        low = page[-1]
    return found[:limit]


async def _page_between(
    db: Db, limit: int, skipped: Sequence[str], low: str, high: str | None
) -> list[str]:
    """Each domain is one step in the index, however many recipients it has there."""
    rows = await db.fetch(
        f"""WITH RECURSIVE ready (domain) AS (
            SELECT min(domain) FROM relay.recipient
            WHERE place = {READY} AND domain > $1
            UNION ALL
            SELECT (SELECT min(domain) FROM relay.recipient
                    WHERE place = {READY} AND recipient.domain > ready.domain)
            FROM ready WHERE ready.domain IS NOT NULL
            AND ($2::text IS NULL OR ready.domain < $2))
        SELECT domain FROM ready WHERE domain IS NOT NULL
        AND ($2::text IS NULL OR domain <= $2) AND domain <> ALL($3::text[]) LIMIT $4""",
        low,
        high,
        skipped,
        limit,
    )
    return [row[0] for row in rows]


async def _claim_of(
    db: Db, lease: int, domains: Sequence[str], limit: int, shares: Shares
) -> tuple[list[Entry], str, list[str]]:
    """The oldest entries of some domains, as many of each; the last domain that was served; and
    those where nothing was to be had.
    """
    quota = -(-limit // len(domains))
    wanted: list[tuple[str, int]] = []
    left = limit
    for domain in domains:
        most = shares.left(domain, min(quota, left))
        wanted.append((domain, most))
        left -= most
        if left <= 0:
            break
    rows = await db.fetch(
        f"""WITH found AS (
            SELECT first.queue_id, wanted.domain
            FROM unnest($1::text[], $2::integer[]) AS wanted (domain, most),
            LATERAL (SELECT queue_id FROM relay.recipient
                WHERE place = {READY} AND recipient.domain = wanted.domain
                ORDER BY due LIMIT wanted.most FOR UPDATE SKIP LOCKED) AS first)
        UPDATE relay.recipient SET place = {CLAIMED}, lease = $3
        FROM (SELECT DISTINCT queue_id, domain FROM found) AS one
        WHERE recipient.queue_id = one.queue_id AND recipient.domain = one.domain
        AND recipient.place = {READY}
        RETURNING recipient.queue_id, idx, recipient.domain, state, due, data""",
        [domain for domain, _ in wanted],
        [most for _, most in wanted],
        lease,
    )
    claimed: dict[tuple[str, str], list[_Columns]] = {}
    for queue_id, *columns in sorted(rows, key=lambda row: (row["due"] or 0, row["queue_id"])):
        claimed.setdefault((queue_id, columns[1]), []).append(tuple(columns))
    entries = await _entries(db, lease, claimed)
    for _, domain in claimed:
        shares.taken[domain] += 1
    empty = {domain for domain, _ in wanted} - {domain for _, domain in claimed}
    return _in_turn(entries), wanted[-1][0], sorted(empty)


def _in_turn(entries: Sequence[Entry]) -> list[Entry]:
    """One entry of each domain, then the next of each."""
    turn: Counter[str] = Counter()
    order = []
    for entry in entries:
        order.append((turn[entry.domain], entry))
        turn[entry.domain] += 1
    return [entry for _, entry in sorted(order, key=lambda one: one[0])]


async def _entries(
    db: Db, lease: int, claimed: dict[tuple[str, str], list[_Columns]]
) -> list[Entry]:
    """The entries of claimed rows. A damaged message is set aside, and the others go on."""
    ids = sorted({queue_id for queue_id, _ in claimed})
    rows = await db.fetch(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data, recipients"
        " FROM relay.message WHERE queue_id = ANY($1)",
        ids,
    )
    messages = {row["queue_id"]: tuple(row) for row in rows}
    entries: list[Entry] = []
    for (queue_id, _), columns in claimed.items():
        try:
            if queue_id not in messages:
                raise BadRow("its message row is gone")
            *message, total = messages[queue_id]
            recipients = sorted((recipient_of(*one) for one in columns), key=lambda one: one.index)
            entries.append(Entry(message_of(*message), tuple(recipients), total=total, token=lease))
        except BadRow as exc:
            await _quarantine(db, queue_id, lease, str(exc))
    return entries


async def _quarantine(db: Db, queue_id: str, lease: int, damage: str) -> None:
    """Set a message aside as it is, for a person to look at: it stays in the queue and in its
    state.
    """
    log.error("%s: set aside, it is damaged: %s", queue_id, damage)
    await db.execute(
        f"UPDATE relay.recipient SET place = {ASIDE}, lease = NULL WHERE queue_id = $1"
        f" AND (place IN ({WAITING}, {READY}) OR place = {CLAIMED} AND lease = $2)",
        queue_id,
        lease,
    )


async def release(db: Db, entries: Iterable[Entry], due: datetime | None) -> None:
    """Give claims back, to be due at `due`; None: at once. `ClaimLost` where one is over."""
    place, at = (READY, None) if due is None else (WAITING, micros(due))
    for entry in entries:
        status = await db.execute(
            f"UPDATE relay.recipient SET place = $1, due = coalesce($2, due, 0), lease = NULL"
            f" WHERE queue_id = $3 AND idx = ANY($4) AND place = {CLAIMED} AND lease = $5",
            place,
            at,
            entry.message.queue_id,
            [one.index for one in entry.recipients],
            entry.token,
        )
        if changed_rows(status) != len(entry.recipients):
            raise ClaimLost(f"{entry.message.queue_id}: the recipients are not claimed")


async def held(db: Db, lease: int) -> set[tuple[str, int]]:
    """What is claimed under a lease: queue id and index of each recipient."""
    rows = await db.fetch(
        f"SELECT queue_id, idx FROM relay.recipient WHERE place = {CLAIMED} AND lease = $1", lease
    )
    return {(queue_id, index) for queue_id, index in rows}


async def free(db: Db, lease: int, keys: Collection[tuple[str, int]]) -> None:
    """Make READY what is claimed under a lease and its node does not know of."""
    await db.execute(
        f"""UPDATE relay.recipient SET place = {READY}, lease = NULL, due = coalesce(due, 0)
        FROM unnest($2::text[], $3::integer[]) AS one (queue_id, idx)
        WHERE recipient.queue_id = one.queue_id AND recipient.idx = one.idx
        AND place = {CLAIMED} AND lease = $1""",
        lease,
        [queue_id for queue_id, _ in keys],
        [index for _, index in keys],
    )


# The operator's verbs.


async def are_claimed_by_others(db: Db, lease: int, ids: Sequence[str]) -> bool:
    """Whether another lease has claimed a recipient of these messages."""
    found: bool = await db.fetchval(
        "SELECT EXISTS (SELECT FROM relay.recipient"
        f" WHERE queue_id = ANY($2::text[]) AND place = {CLAIMED} AND lease <> $1)",
        lease,
        ids,
    )
    return found


def _becomes(does: Verb, before: int, data: str) -> int:
    """The number of the state that a verb leaves a recipient in. Of damaged data nobody knows
    whether it was tried: it counts as tried. PostgreSQL would refuse the whole statement.
    """
    after = does.becomes
    if does.untried_becomes is not does.becomes and is_untried(data):
        after = does.untried_becomes
    return before if after is None else STATE_NUMBER[after]


async def change(db: Db, wanted: QueueFilter, verb: str, now: datetime) -> Changed:
    """Do one verb to some messages: those that the filter names. Only their recipients have still
    to match.

    A recipient that is claimed is being tried at this moment: what comes of that stands, so it is
    left as it is and not counted.
    """
    does = VERBS[verb]
    values = PostgresValues()
    of_recipient = all_of(recipient_conditions(wanted, values))
    ids = sorted(wanted.queue_ids)
    takes = values.add([STATE_NUMBER[state] for state in does.takes])
    due = micros(now) if does.is_due else None
    place = READY if does.is_due else ASIDE
    changed = Changed()
    await db.execute(
        "SELECT 1 FROM relay.message WHERE queue_id = ANY($1) ORDER BY queue_id FOR UPDATE", ids
    )
    meant = await db.fetch(
        f"""SELECT r.queue_id, r.idx, r.state, r.data FROM relay.recipient r
        WHERE r.queue_id = ANY({values.add(ids)}::text[]) AND {of_recipient}
        AND r.state = ANY({takes}::smallint[]) AND r.place NOT IN ({CLAIMED}, {LEAVING})
        ORDER BY r.queue_id, r.idx FOR UPDATE""",
        *values.all,
    )
    rows = [(row[0], row[1], row[2], _becomes(does, row[2], row[3])) for row in meant]
    await db.execute(
        "UPDATE relay.recipient SET state = new.state, place = $4, due = $5"
        " FROM unnest($1::text[], $2::integer[], $3::smallint[]) AS new (queue_id, idx, state)"
        " WHERE recipient.queue_id = new.queue_id AND recipient.idx = new.idx",
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[3] for row in rows],
        place,
        due,
    )
    for queue_id, index, before, after in rows:
        changed.recipients.append((queue_id, index))
        changed.states[STATE_OF_NUMBER[before]] -= 1
        changed.states[STATE_OF_NUMBER[after]] += 1
    if verb == "remove" and rows:
        await remove_if_done(db, ids)
    return changed


# Leftovers.


async def pull_forward(db: Db, now: datetime, latest: datetime) -> None:
    """What is due later than any wait we give was written while the clock was ahead, and is due
    now. But not before its sender wants it to go out; of damaged data nobody knows what it wants.
    """
    rows = await db.fetch(
        f"SELECT DISTINCT queue_id FROM relay.recipient WHERE place = {WAITING} AND due > $1",
        micros(latest),
    )
    ids = [row[0] for row in rows]
    longest = micros(latest_wish(now, latest))
    for start in range(0, len(ids), _PROMOTED):
        found = await db.fetch(
            "SELECT queue_id, data FROM relay.message WHERE queue_id = ANY($1)",
            ids[start : start + _PROMOTED],
        )
        wishes = {row[0]: wish_of(row[1]) for row in found}
        due = [
            max(micros(now), wish) if wish is not None and wish <= longest else micros(now)
            for wish in wishes.values()
        ]
        await db.execute(
            "UPDATE relay.recipient SET due = new.due"
            " FROM unnest($2::text[], $3::bigint[]) AS new (queue_id, due)"
            f" WHERE recipient.queue_id = new.queue_id AND place = {WAITING}"
            " AND recipient.due > $1",
            micros(latest),
            list(wishes),
            due,
        )
