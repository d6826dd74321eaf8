"""The wall clock is set while the scheduler runs: nothing waits for it to come as far again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.mail.outcome import Code, Deferred, HopSession, VerifiedBy
from relay.queue.entry import State, Terms
from relay.queue.retry import RetrySchedule
from relay.queue.sqlite.disk import DATABASE
from relay.queue.sqlite.store import SqliteStore
from tests.fakes.queued import new_message
from tests.fakes.scheduling import make_scheduler
from tests.fakes.waiting import patient

SESSION = HopSession("mx.b.example", "192.0.2.1", tls=True, verified_by=VerifiedBy.PKIX)
BUSY = Deferred("4.2.1", 450, "busy", session=SESSION)
SILENCE = Deferred("4.4.1", Code.NO_CONNECTION, "", "mx.b.example [192.0.2.9]: timed out")
MONTH = timedelta(days=30)


class Attempts:
    def __init__(self, answer) -> None:
        self.answer = answer
        self.made: list[str] = []

    async def run(self, entry, content, sessions):
        self.made.append(entry.recipients[0].address)
        return {recipient.index: self.answer for recipient in entry.recipients}


class SetClock:
    """The wall clock, set ahead or back while the other one runs on."""

    def __init__(self) -> None:
        self.ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path, synchronous="OFF")
    yield opened
    await opened.close()


async def until(made: list[str], wanted: int) -> None:
    async with asyncio.timeout(patient(5)):
        while len(made) < wanted:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [BUSY, SILENCE])
@pytest.mark.parametrize("days", [30, -30])
async def test_deferred_mail_is_tried_again_though_the_clock_was_set(store, answer, days) -> None:
    clock, attempts = SetClock(), Attempts(answer)
    scheduler = make_scheduler(
        store, attempts, schedule=RetrySchedule(waits=(timedelta(hours=1),)), clock=clock
    )
    running = asyncio.create_task(scheduler.run())
    await store.accept(new_message("b@b.example", arrived=clock()))
    await until(attempts.made, 1)
    clock.ahead = timedelta(days=days)
    await store.accept(
        new_message("c@c.example", arrived=clock())
    )  # something makes the scheduler look
    await until(attempts.made, 3)
    assert sorted(attempts.made) == ["b@b.example", "b@b.example", "c@c.example"]
    await scheduler.drain(timedelta(0))
    await running
    assert (await store.counts())[State.DEFERRED] == 2


@pytest.mark.parametrize(
    ("wanted", "put_off", "due"),
    [
        (3, None, 3),
        (7, None, 7),
        (None, 3, 0),  # by us, for a destination that is silent
        (None, 30, 0),
        (2, 5, 2),
        (-2, 5, 0),
        (30, None, 0),  # asked of the clock that was ahead
    ],
)
@pytest.mark.parametrize("restarts", [True, False])
async def test_scheduled_mail_keeps_its_time_and_deferred_mail_does_not(
    tmp_path, wanted, put_off, due, restarts
) -> None:
    now = datetime.now(UTC)

    def in_days(days: int | None) -> datetime | None:
        return None if days is None else now + timedelta(days=days)

    new = new_message(arrived=now - MONTH, due=in_days(wanted))
    terms = Terms(not_before=in_days(wanted))
    store = await SqliteStore.open(tmp_path, now=now)
    await store.accept(replace(new, message=replace(new.message, terms=terms)))
    if put_off is not None:
        [entry] = await store.claim_due(now=now + 2 * MONTH, limit=9)
        await store.release(entry, due=now + timedelta(days=put_off))
    if restarts:
        await store.close()
        store = await SqliteStore.open(tmp_path, now=now, max_wait=timedelta(hours=5))
    else:
        await store.clock_set_back(now=now, latest=now + timedelta(hours=5))
    if due:
        assert await store.claim_due(now=now + timedelta(days=due, seconds=-1), limit=9) == []
    assert len(await store.claim_due(now=now + timedelta(days=due), limit=9)) == 1
    await store.close()


async def test_message_that_cannot_be_read_delays_no_other_after_a_clock_change(tmp_path) -> None:
    now = datetime.now(UTC)
    store = await SqliteStore.open(tmp_path, now=now)
    damaged, whole = (
        new_message("b@b.example", arrived=now),
        new_message("c@c.example", arrived=now),
    )
    await store.accept(damaged)
    await store.accept(whole)
    for entry in await store.claim_due(now=now, limit=9):
        await store.release(entry, due=now + timedelta(days=3))
    await store.close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as db, db:
        db.execute("UPDATE message SET data = '{' WHERE queue_id = ?", (damaged.message.queue_id,))
    store = await SqliteStore.open(tmp_path, now=now, max_wait=timedelta(hours=5))
    assert [entry.message for entry in await store.claim_due(now=now, limit=9)] == [whole.message]
    await store.close()
