"""Pending reports in the tables of older versions."""

from __future__ import annotations

import sqlite3
from datetime import timedelta

from relay.queue.entry import State
from relay.queue.sqlite.disk import DATABASE
from relay.queue.sqlite.schema import MIGRATIONS
from tests.fakes.queued import BOUNCED, NOW, entries_of, holding, opened


async def test_pending_report_of_an_older_version_is_still_pending(tmp_path):
    async with opened(tmp_path) as store:
        one, _ = await entries_of(store, "a@one.example", "b@two.example")
        await store.record(holding(one, BOUNCED))
    db = sqlite3.connect(tmp_path / DATABASE, isolation_level=None)
    db.execute("ALTER TABLE owed RENAME TO newer")
    db.execute(str(MIGRATIONS[1][0]))
    db.execute("INSERT INTO owed SELECT queue_id, idx, since, data FROM newer")
    for table in ("newer", "statistic", "exception", "tls_policy", "tls_session", "tls_report"):
        db.execute(f"DROP TABLE {table}")
    db.execute("PRAGMA user_version = 4")
    db.close()
    async with opened(tmp_path) as store:
        assert await store.pending_reports(now=NOW, pending_since=NOW - timedelta(minutes=5)) == []
        [two] = await store.claim_due(now=NOW, limit=9)
        assert await store.record(holding(two, BOUNCED)) is True
        states = [("a@one.example", State.BOUNCED), ("b@two.example", State.BOUNCED)]
        pending = await store.pending_report(two.message.queue_id)
        assert pending is not None
        assert [(one.recipient.address, one.recipient.state) for one in pending.changes] == states
