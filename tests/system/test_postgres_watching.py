"""What a node tells of the database: what keeps dead rows, standbys, and the other nodes."""

from __future__ import annotations

import logging

import asyncpg
import pytest

from relay.queue import nodes
from relay.queue.postgres import store as postgres_store
from tests.fakes.queued import new_message
from tests.rigs.postgres import standby
from tests.system.test_postgres_store import node, until

pytestmark = pytest.mark.needs("postgresql")


async def test_open_transaction_of_another_program_is_measured_and_warned_of(
    server, monkeypatch, caplog
):
    monkeypatch.setattr(nodes, "_LONG_SECONDS", 0.0)
    monkeypatch.setattr(postgres_store, "_FOLD_SECONDS", 0.5)
    async with node(server.url()) as store:
        other = await asyncpg.connect(server.url(), server_settings={"application_name": "dump"})
        try:
            await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            await other.fetchval("SELECT version FROM relay.meta")
            for _ in range(3):
                await store.accept(new_message())
            state = await store.database_state()
            assert state is not None
            assert state.oldest_transaction_seconds > 0
            assert state.oldest_xmin_age >= 3

            async def is_told() -> bool:
                return "a transaction of relay (dump), process" in caplog.text

            with caplog.at_level(logging.WARNING):
                await until(is_told)
        finally:
            await other.close()


async def test_nodes_and_standbys_are_counted(server):
    with standby(server):
        async with node(server.url(), "a") as one, node(server.url(), "b") as two:

            async def follows() -> bool:
                state = await two.database_state()
                return state is not None and state.asynchronous_standbys == 1

            await until(follows)
            server.sql(f"UPDATE relay.lease SET lost = now() WHERE id = {one.lease.id}")
            state = await two.database_state()
            assert state is not None
            assert (state.live, state.lost) == (1, 1)
            assert state.synchronous_standbys == state.unknown_commits == 0


async def test_database_that_does_not_answer_has_no_state(server):
    async with node(server.url()) as store:
        server.stop()
        try:
            assert await store.database_state() is None
        finally:
            server.start()
