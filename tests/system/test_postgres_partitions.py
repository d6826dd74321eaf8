"""The events of several nodes: a partition a day, made ahead and dropped as a whole."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from relay.queue.postgres import NodeOptions, PostgresStore, Server
from relay.queue.server_address import parse_url
from relay.queue.store import EventFilter
from tests.fakes.queued import event, new_message
from tests.fakes.waiting import patient

pytestmark = pytest.mark.needs("postgresql")

DAY = timedelta(days=1)
OLD = datetime(2026, 3, 1, 12, tzinfo=UTC)
LONG_AFTER = OLD + 30 * DAY
LEASE = timedelta(seconds=30)


@contextlib.asynccontextmanager
async def node(url: str, name: str = "a") -> AsyncIterator[PostgresStore]:
    server = Server(parse_url(url), name="relay", password=lambda: None)
    store = await PostgresStore.open(server, NodeOptions(name, LEASE))
    try:
        yield store
    finally:
        await store.close()


async def told(store: PostgresStore, *days: int) -> None:
    """An event on each of these days."""
    for day in days:
        at = OLD + day * DAY
        await store.accept(new_message(events=(event("accepted", f"q{day}", at=at),)))


def days_of(server) -> set[str]:
    names = server.sql(
        "SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'relay.event'::regclass"
    )
    return {name.rpartition("_")[2] for name in names.split()}


async def test_events_of_the_next_two_days_have_their_partitions(server):
    async with node(server.url()):
        today = datetime.now(UTC)
        assert days_of(server) == {f"{today + ahead * DAY:%Y%m%d}" for ahead in range(3)}


async def test_nodes_that_meet_a_new_day_together_make_one_partition(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        await asyncio.gather(told(one, 0, 1, 2), told(two, 0, 1, 2))
        assert len(await one.find_events(EventFilter())) == 6


async def test_old_day_is_dropped_when_the_logs_of_all_nodes_have_it(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        await told(one, 0, 1)
        await told(two, 1)
        await one.log_written(2)
        assert await one.purge_events(before=LONG_AFTER) == 1
        assert {stored.event.queue_id for stored in await two.find_events(EventFilter())} == {"q1"}
        await two.log_written(1)
        assert await two.purge_events(before=LONG_AFTER) == 1
        assert await one.find_events(EventFilter()) == []
        assert len(days_of(server)) == 3, "today and those ahead stay"


async def test_day_that_somebody_reads_is_dropped_later_and_stops_no_mail(server):
    async with node(server.url()) as store:
        await told(store, 0)
        await store.log_written(1)
        reader = await asyncpg.connect(server.url())
        try:
            transaction = reader.transaction(isolation="repeatable_read")
            await transaction.start()
            assert await reader.fetchval("SELECT count(*) FROM relay.event") == 1
            dropping = asyncio.create_task(store.purge_events(before=LONG_AFTER))
            async with asyncio.timeout(patient(30)):
                while not dropping.done():
                    now = datetime.now(UTC)
                    await store.accept(new_message(events=(event("accepted", "now", at=now),)))
            assert await dropping == 0
            assert await reader.fetchval("SELECT count(*) FROM relay.event WHERE seq = 1") == 1
            await transaction.rollback()
        finally:
            await reader.close()
        assert await store.purge_events(before=LONG_AFTER) == 1
        assert server.sql("SELECT count(*) FROM relay.event WHERE seq = 1") == "0"
