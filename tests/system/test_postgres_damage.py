"""A row of the shared queue that cannot be read costs its own message and no other."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from relay.queue.entry import State
from relay.queue.postgres import NodeOptions, PostgresStore, Server, parse_url
from relay.queue.store import EventFilter, QueueFilter
from tests.fakes.queued import (
    BOUNCED,
    NOW,
    claim_all,
    entries_of,
    event,
    holding,
    new_message,
    queue_ids,
)
from tests.rigs.postgres import Postgres

pytestmark = pytest.mark.needs("postgresql")

LATER = NOW + timedelta(hours=1)


@contextlib.asynccontextmanager
async def opened(server: Postgres) -> AsyncIterator[PostgresStore]:
    where = Server(parse_url(server.url()), name="relay", password=lambda: None)
    store = await PostgresStore.open(where, NodeOptions("a"), now=NOW)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE relay.message SET data = '[1,' WHERE queue_id = 'q1'",
        "UPDATE relay.recipient SET data = '[' WHERE queue_id = 'q1'",
        "UPDATE relay.recipient SET data = '{}' WHERE queue_id = 'q1'",
        "UPDATE relay.recipient SET state = 99 WHERE queue_id = 'q1'",
        "DELETE FROM relay.message WHERE queue_id = 'q1'",
    ],
)
async def test_damaged_message_is_set_aside_and_the_others_go_on(
    server: Postgres, caplog: pytest.LogCaptureFixture, statement: str
) -> None:
    async with opened(server) as store:
        for number in range(3):
            await store.accept(new_message(queue_id=f"q{number}"))
    server.sql(statement)
    for _ in range(2):
        async with opened(server) as store:
            claimed = await claim_all(store)
            assert [entry.message.queue_id for entry in claimed] == ["q0", "q2"]
            assert await store.next_due() is None
            assert set(await queue_ids(store)) == {"q0", "q2", "q1"} - (
                {"q1"} if "DELETE" in statement else set()
            )
    assert "q1: set aside, it is damaged" in caplog.text


async def test_damaged_row_keeps_no_verb_from_the_others(server: Postgres) -> None:
    async with opened(server) as store:
        for number in range(3):
            await store.accept(new_message(queue_id=f"q{number}", state=State.HELD))
    server.sql("UPDATE relay.recipient SET data = '[' WHERE queue_id = 'q1'")
    async with opened(server) as store:
        for verb in ("release", "hold", "retry", "release"):
            await store.change(QueueFilter(), verb=verb, now=NOW)
        # Never tried is queued again; of the damaged one nobody knows.
        assert (await store.counts())[State.QUEUED] == 2
        assert [one.message.queue_id for one in await claim_all(store)] == ["q0", "q2"]
    async with opened(server) as store:
        assert (await store.change(QueueFilter(), verb="remove", now=NOW)).changed == 3
        assert await queue_ids(store) == []


async def test_damaged_message_keeps_no_start_from_correcting_a_clock(server: Postgres) -> None:
    async with opened(server) as store:
        for number in range(3):
            far = NOW + timedelta(days=300)
            await store.accept(new_message(queue_id=f"q{number}", due=far))
    server.sql("UPDATE relay.message SET data = '[' WHERE queue_id = 'q1'")
    async with opened(server) as store:
        assert [one.message.queue_id for one in await claim_all(store)] == ["q0", "q2"]


async def test_damaged_pending_report_keeps_no_other_from_being_sent(server: Postgres) -> None:
    async with opened(server) as store:
        for _ in range(2):
            [entry] = await entries_of(store, "b@example.net")
            await store.record(holding(entry, BOUNCED))
        one, two = sorted(await store.pending_reports(now=LATER, pending_since=LATER))
        server.sql(f"UPDATE relay.owed SET data = '[' WHERE queue_id = '{one}'")
        pending = await store.pending_report(two)
        assert pending is not None
        await store.report(pending, [])
        assert await queue_ids(store) == [one]


async def test_damaged_event_is_passed_over_by_a_search(server: Postgres) -> None:
    async with opened(server) as store:
        for number in range(3):
            told = event("accepted", f"q{number}", "b@example.net")
            await store.accept(new_message(queue_id=f"q{number}", events=(told,)))
        server.sql("UPDATE relay.event SET line = '{' WHERE queue_id = 'q1'")
        wanted = EventFilter(fields=(("text", "example.net"),))
        found = [one.event.queue_id for one in await store.find_events(wanted)]
        assert found == ["q0", "q2"]
