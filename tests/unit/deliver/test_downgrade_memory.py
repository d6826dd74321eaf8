"""The memory at hand: what it asks the store, what it writes and when, of one worker and of two."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.deliver import memory as module
from relay.deliver.memory import DowngradeMemory
from relay.mail.memory import DomainMemory, DowngradeAlarm, Shown
from relay.policy.settings import MemoryAction
from relay.queue.memory import Change
from relay.queue.sqlite.memory import SqliteMemory
from relay.queue.store import SpoolError
from relay.route.memory import MemoryOptions
from tests.fakes.waiting import patient

NONE, ENCRYPTED, VERIFIED = Shown
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MX1 = "mx1.partner.example"
DOMAIN = "partner.example"


class Store(SqliteMemory):
    """A real store that counts what is asked of it, and can be in trouble."""

    reads = 0
    writes = 0
    in_trouble = False

    async def memory(self, domain: str) -> DomainMemory | None:
        self.reads += 1
        self._check()
        return await super().memory(domain)

    async def change(self, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
        self.writes += 1
        self._check()
        return await super().change(changes)

    def _check(self) -> None:
        if self.in_trouble:
            raise SpoolError("no room")


class Worker:
    """One worker's memory; all of a test share a clock."""

    clock = NOW
    seconds = 100.0

    def __init__(self, store: Store) -> None:
        self.store = store
        self.options = MemoryOptions()
        self.told: list[DowngradeAlarm] = []
        self.memory = DowngradeMemory(
            store,
            lambda: self.options,
            clock=lambda: Worker.clock,
            monotonic=lambda: Worker.seconds,
            on_alarm=self.told.append,
        )

    def learn(self, shown: Shown, *, domain: str = DOMAIN, host: str = MX1) -> None:
        self.memory.learn(domain, host, shown, VERIFIED)

    async def level(self, domain: str = DOMAIN) -> Shown | None:
        known = await self.memory.known(domain)
        return known.hosts[MX1].level if known is not None and MX1 in known.hosts else None

    async def ring(self, now: Shown = NONE) -> None:
        await self.memory.ring(DOMAIN, DowngradeAlarm(VERIFIED, now, MX1, NOW), host=MX1)


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[list[Worker]]:
    Worker.clock, Worker.seconds = NOW, 100.0
    stores = [await Store.open(tmp_path) for _ in range(2)]
    yield [Worker(store) for store in stores]
    for store in stores:
        await store.close()


@pytest.fixture
def worker(workers: list[Worker]) -> Worker:
    return workers[0]


# --- reading --------------------------------------------------------------------------------------


async def test_store_is_asked_once_in_a_few_seconds(worker: Worker) -> None:
    for _ in range(3):
        assert await worker.memory.known(DOMAIN) is None
    assert worker.store.reads == 1
    Worker.seconds += 5
    await worker.memory.known(DOMAIN)
    assert worker.store.reads == 2


async def test_other_worker_knows_a_sighting_within_seconds(workers: list[Worker]) -> None:
    one, other = workers
    assert await other.level() is None
    one.learn(VERIFIED)
    await one.memory.write()
    Worker.seconds += 5
    assert await other.level() is VERIFIED


async def test_memory_at_hand_is_bounded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.memory._at_hand._limit = 10
    for number in range(30):
        await worker.memory.known(f"d{number}.example")
    assert len(worker.memory._at_hand) == 10


async def test_nothing_is_remembered_by_ignore(worker: Worker) -> None:
    found = await worker.memory.of_domain(DOMAIN, MemoryAction.IGNORE, is_waived=False)
    assert found is None
    assert worker.store.reads == 0


@pytest.mark.parametrize("action", [MemoryAction.LOG, MemoryAction.DEFER])
async def test_mail_waits_for_a_store_that_cannot_be_read_only_by_defer(
    worker: Worker, action: MemoryAction, caplog: pytest.LogCaptureFixture
) -> None:
    worker.store.in_trouble = True
    for _ in range(2):
        if action is MemoryAction.DEFER:
            with pytest.raises(SpoolError):
                await worker.memory.of_domain(DOMAIN, action, is_waived=False)
        else:
            found = await worker.memory.of_domain(DOMAIN, action, is_waived=False)
            assert found is not None
            assert found.memory is None
    assert len(caplog.messages) == (1 if action is MemoryAction.LOG else 0)
    worker.store.in_trouble = False
    found = await worker.memory.of_domain(DOMAIN, action, is_waived=False)
    assert found is not None


# --- learning -------------------------------------------------------------------------------------


async def test_a_thousand_messages_are_one_write(worker: Worker) -> None:
    await worker.memory.known(DOMAIN)
    for _ in range(1000):
        worker.learn(VERIFIED)
    assert worker.store.writes == 0
    await worker.memory.write()
    assert worker.store.writes == 1
    kept = await worker.store.memory(DOMAIN)
    assert kept is not None
    assert kept.in_full.messages == 1000


async def test_sighting_counts_before_it_is_written(worker: Worker) -> None:
    assert await worker.level() is None
    worker.learn(VERIFIED)
    assert await worker.level() is VERIFIED
    Worker.seconds += 5  # it is asked for anew, and is in no store yet
    assert await worker.level() is VERIFIED
    assert worker.store.writes == 0


async def test_only_what_changes_a_level_is_urgent(worker: Worker) -> None:
    await worker.memory.known(DOMAIN)
    worker.learn(VERIFIED)
    assert worker.memory._is_urgent.is_set()
    await worker.memory.write()
    assert not worker.memory._is_urgent.is_set()
    worker.learn(VERIFIED)
    assert not worker.memory._is_urgent.is_set()
    worker.learn(NONE)
    assert worker.memory._is_urgent.is_set()


async def test_sighting_during_a_write_is_neither_lost_nor_counted_twice(worker: Worker) -> None:
    for number in range(50):
        worker.learn(VERIFIED)
        writing = asyncio.create_task(worker.memory.write())
        await asyncio.sleep(0)
        worker.learn(VERIFIED)
        if number % 2:
            await worker.ring()
        await writing
    await worker.memory.write()
    kept = await worker.store.memory(DOMAIN)
    assert kept is not None
    assert kept.in_full.messages == 100


async def test_counts_of_two_workers_are_added_up(workers: list[Worker]) -> None:
    for _ in range(5):
        for worker in workers:
            worker.learn(VERIFIED)
        await asyncio.gather(*(worker.memory.write() for worker in workers))
    kept = await workers[0].store.memory(DOMAIN)
    assert kept is not None
    assert kept.in_full.messages == 10


async def test_sighting_that_cannot_be_written_is_written_later(worker: Worker) -> None:
    worker.learn(VERIFIED)
    worker.store.in_trouble = True
    for _ in range(2):
        with pytest.raises(SpoolError):
            await worker.memory.write()
        worker.learn(VERIFIED)
    worker.store.in_trouble = False
    await worker.memory.write()
    kept = await worker.store.memory(DOMAIN)
    assert kept is not None
    assert kept.in_full.messages == 3


async def test_number_of_sightings_that_wait_to_be_written_is_bounded(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GATHERED", 10)
    for number in range(30):
        worker.learn(VERIFIED, domain=f"d{number}.example")
    await worker.memory.write()
    assert len(await worker.store.page()) == 10


async def test_many_domains_are_written_a_part_at_a_time(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DOMAINS_IN_A_WRITE", 10)
    for number in range(25):
        worker.learn(VERIFIED, domain=f"d{number}.example")
    await worker.memory.write()
    assert worker.store.writes == 3
    assert len(await worker.store.page()) == 25


async def test_run_writes_what_was_gathered_and_forgets_what_is_old(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WRITE_SOON_SECONDS", 0.01)
    monkeypatch.setattr(module, "_WRITE_SECONDS", 0.02)
    worker.learn(VERIFIED, domain="old.example")
    await worker.memory.write()
    Worker.clock = NOW + timedelta(days=90)
    worker.learn(VERIFIED)
    running = asyncio.create_task(worker.memory.run(purges=True))
    async with asyncio.timeout(patient(20)):
        while [one.domain for one in await worker.store.page()] != [DOMAIN]:
            await asyncio.sleep(0.01)
        worker.store.in_trouble = True
        worker.learn(ENCRYPTED, host="mx2.partner.example")
        await asyncio.sleep(0.1)
        worker.store.in_trouble = False
        while len((await worker.store.page())[0].hosts) < 2:
            await asyncio.sleep(0.01)
    running.cancel()


async def test_sightings_left_at_the_end_are_written(worker: Worker) -> None:
    worker.learn(VERIFIED)
    await worker.memory.close()
    assert await worker.store.memory(DOMAIN) is not None


# --- alarms ---------------------------------------------------------------------------------------


async def test_alarm_is_written_at_once_with_what_was_gathered_before(worker: Worker) -> None:
    await worker.memory.known(DOMAIN)
    worker.learn(VERIFIED)
    await worker.ring()
    kept = await worker.store.memory(DOMAIN)
    assert kept is not None
    assert (kept.hosts[MX1].level, len(kept.alarms)) == (VERIFIED, 1)
    assert worker.store.writes == 1
    for _ in range(10):
        await worker.ring()
    assert worker.store.writes == 1


async def test_one_of_two_workers_reports_an_alarm(workers: list[Worker]) -> None:
    one, other = workers
    one.learn(VERIFIED)
    await one.memory.write()
    assert await other.level() is VERIFIED
    await asyncio.gather(one.ring(), other.ring())
    assert len(one.told) + len(other.told) == 1
    Worker.seconds += 5
    await asyncio.gather(one.ring(), other.ring())
    assert len(one.told) + len(other.told) == 1


async def test_alarm_is_told_again_after_a_restart_only_when_a_day_is_over(
    workers: list[Worker],
) -> None:
    before, after = workers
    before.learn(VERIFIED)
    await before.ring()
    Worker.clock += HOUR
    await after.ring()
    assert (len(before.told), len(after.told)) == (1, 0)
    Worker.clock += timedelta(days=1)
    await after.ring()
    assert len(after.told) == 1


async def test_alarm_that_cannot_be_written_is_told_once_a_day_all_the_same(worker: Worker) -> None:
    worker.learn(VERIFIED)
    await worker.memory.write()
    assert await worker.level() is VERIFIED
    worker.store.in_trouble = True
    for _ in range(3):
        await worker.ring()
        Worker.seconds += 60  # what was at hand is asked for anew
    assert len(worker.told) == 1
    await worker.ring(ENCRYPTED)
    assert len(worker.told) == 2
    Worker.seconds += 86400
    await worker.ring()
    assert len(worker.told) == 3


async def test_alarm_about_what_was_just_forgotten_is_not_told(worker: Worker) -> None:
    worker.learn(VERIFIED)
    await worker.memory.write()
    assert await worker.memory.forget(DOMAIN)
    await worker.ring()
    assert worker.told == []
    assert await worker.store.memory(DOMAIN) is None


async def test_alarm_says_whose_memory_it_is(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    worker.learn(VERIFIED)
    alarm = DowngradeAlarm(VERIFIED, ENCRYPTED, MX1, NOW)
    await worker.memory.ring(DOMAIN, alarm, host="new.example")
    assert caplog.messages == [
        "TLS downgrade: mail for partner.example: new.example has TLS that is not verified now, "
        "and every known host of the domain (mx1.partner.example) has shown verified TLS before "
        "(last at 2030-01-31T12:00:00+00:00): docs/tls.md, When there is an alarm"
    ]


# --- the operator ---------------------------------------------------------------------------------


async def test_forgotten_domain_is_learned_anew_and_no_worker_holds_on_to_it(
    workers: list[Worker],
) -> None:
    one, other = workers
    one.learn(VERIFIED)
    await one.memory.write()
    assert await other.level() is VERIFIED
    one.learn(VERIFIED)
    assert await one.memory.forget(DOMAIN)
    assert not await one.memory.forget(DOMAIN)
    assert await one.level() is None
    Worker.seconds += 5
    assert await other.level() is None
    other.learn(NONE)
    assert await other.level() is NONE


async def test_one_host_is_forgotten_and_the_last_takes_the_domain_with_it(worker: Worker) -> None:
    worker.learn(VERIFIED)
    worker.learn(ENCRYPTED, host="mx2.partner.example")
    await worker.ring()
    assert await worker.memory.forget(DOMAIN, MX1)
    assert not await worker.memory.forget(DOMAIN, MX1)
    kept = await worker.store.memory(DOMAIN)
    assert kept is not None
    assert (list(kept.hosts), kept.alarms) == (["mx2.partner.example"], ())
    assert await worker.memory.forget(DOMAIN, "mx2.partner.example")
    assert await worker.store.memory(DOMAIN) is None


async def test_pages_have_what_was_gathered_and_say_where_to_go_on(worker: Worker) -> None:
    for name in ("b.example", "a.example", "c.example"):
        worker.learn(VERIFIED, domain=name)
    first, after = await worker.memory.page(limit=2)
    assert ([one.domain for one in first], after) == (["a.example", "b.example"], "b.example")
    rest, after = await worker.memory.page(after="b.example", limit=2)
    assert ([one.domain for one in rest], after) == (["c.example"], None)
