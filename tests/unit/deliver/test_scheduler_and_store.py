"""The scheduler on the real queue: what is promised there holds across the seam."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.deliver.scheduler import Scheduler
from relay.mail.address import domain_of
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, HopSession, Outcome, VerifiedBy
from relay.mail.tls_session import TlsSession
from relay.policy.rules import DestinationRule, PolicyRules, TlsRule
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.handoff import HandOffLimits
from relay.queue.queue_id import new_queue_id
from relay.queue.retry import RetrySchedule
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage, QueueFilter
from tests.fakes.queue import CONTENT, DEFAULTS
from tests.fakes.scheduling import make_scheduler
from tests.fakes.waiting import patient

SESSION = HopSession("mx.b.example", "192.0.2.1", tls=True, verified_by=VerifiedBy.PKIX)
OK = Delivered("2.0.0", 250, "OK", session=SESSION)
BUSY = Deferred("4.2.1", 450, "busy", session=SESSION)
NOBODY = Bounced("5.1.1", 550, "no such user", session=SESSION)
SILENCE = Deferred("4.4.1", Code.NO_CONNECTION, "", "mx.dead.example [192.0.2.9]: timed out")
MINUTES = RetrySchedule(waits=(timedelta(minutes=5),))


class Attempts:
    """Attempts that end as the test says, each written down."""

    def __init__(self, behaviour: Callable[[Entry], Outcome]) -> None:
        self.behaviour = behaviour
        self.made: Counter[str] = Counter()
        self.settings: dict[str, bool] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def run(
        self, entry: Entry, content: Callable[[], AsyncIterator[bytes]], sessions: list[TlsSession]
    ) -> Mapping[int, Outcome]:
        self.made[entry.domain] += 1
        self.settings[entry.domain] = entry.settings.require_tls.value
        assert b"".join([piece async for piece in content()])
        if gate := self.gates.get(entry.domain):
            await gate.wait()
        return {recipient.index: self.behaviour(entry) for recipient in entry.recipients}


@contextlib.asynccontextmanager
async def opened(
    directory: Path, limits: HandOffLimits | None = None
) -> AsyncIterator[SqliteStore]:
    store = await SqliteStore.open(directory, synchronous="OFF", limits=limits)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with opened(tmp_path) as store:
        yield store


async def accept(store: SqliteStore, *recipients: str, settings=DEFAULTS) -> str:
    now = datetime.now(UTC)
    queue_id = new_queue_id(now)
    message = QueuedMessage(queue_id, "a@a.example", now, len(CONTENT), MessageSummary())
    queued = tuple(
        QueuedRecipient(n, one, domain_of(one), settings) for n, one in enumerate(recipients)
    )
    await store.accept(NewMessage(message, queued, CONTENT))
    return queue_id


@contextlib.asynccontextmanager
async def running(
    store: SqliteStore,
    attempts: Attempts,
    rules: PolicyRules | None = None,
    schedule: RetrySchedule = MINUTES,
) -> AsyncIterator[Scheduler]:
    scheduler = make_scheduler(
        store, attempts, schedule=schedule, rules=lambda: rules or PolicyRules()
    )
    task = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
    finally:
        await scheduler.drain(timedelta(seconds=0.2))
        await task


async def waiting(store: SqliteStore) -> int:
    return sum((await store.counts()).values())


async def is_empty(store: SqliteStore) -> bool:
    return not await waiting(store)


async def is_quiet(store: SqliteStore) -> bool:
    due = await store.next_due()
    return due is not None and due > datetime.now(UTC) + timedelta(minutes=1)


async def has_events(store: SqliteStore) -> bool:
    return bool(await store.events_after(0))


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(patient(20)):
        while True:
            answer = condition()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.01)


async def names(store: SqliteStore) -> Counter[str]:
    return Counter(stored.event.name for stored in await store.events_after(0))


async def test_accepted_mail_is_delivered_once_and_logged_once(store):
    attempts = Attempts(lambda entry: OK)
    async with running(store, attempts):
        await asyncio.gather(
            *(accept(store, f"{n}@b{n % 7}.example", f"{n}@c.example") for n in range(200))
        )
        await eventually(lambda: is_empty(store))
    assert attempts.made.total() == 400
    assert await names(store) == {"delivered": 400}


async def test_two_thousand_for_a_dead_destination_do_not_delay_one_for_another(tmp_path):
    async with opened(tmp_path, HandOffLimits(entries=400, entries_per_domain=100)) as store:
        await asyncio.gather(*(accept(store, f"{n}@dead.example") for n in range(2000)))
        attempts = Attempts(lambda entry: SILENCE if entry.domain == "dead.example" else OK)
        attempts.gates["dead.example"] = asyncio.Event()
        async with running(store, attempts) as scheduler:
            await eventually(lambda: attempts.made["dead.example"] == 5)
            await accept(store, "b@b.example")
            await eventually(lambda: attempts.made["b.example"] == 1)
            # Its hosts turn out to be dead, and all 2,000 are put off without a try.
            attempts.gates["dead.example"].set()
            await eventually(lambda: bool(scheduler.silent_domains()))
            await accept(store, "c@c.example")
            await eventually(lambda: attempts.made["c.example"] == 1)
            await eventually(lambda: is_quiet(store))
        assert attempts.made["dead.example"] == 5
        assert await waiting(store) == 2000


async def test_a_bounce_is_reported_to_its_sender_by_a_message_in_the_same_queue(store):
    attempts = Attempts(lambda entry: NOBODY if entry.message.reverse_path else OK)
    rules = PolicyRules(destinations={"a.example": DestinationRule(require_tls=True)})
    async with running(store, attempts, rules):
        await accept(store, "nobody@b.example")
        await eventually(lambda: attempts.made["a.example"] == 1)
        await eventually(lambda: is_empty(store))
    assert attempts.settings == {"b.example": False, "a.example": True}
    assert await names(store) == {"failed": 1, "accepted": 1, "delivered": 1}


@pytest.mark.parametrize("verb", ["hold", "remove"])
async def test_operator_can_change_mail_that_waits_for_its_turn(store, verb):
    attempts = Attempts(lambda entry: OK)
    attempts.gates["b.example"] = asyncio.Event()
    async with running(store, attempts):
        await asyncio.gather(*(accept(store, f"{n}@b.example") for n in range(60)))
        await eventually(lambda: attempts.made["b.example"] == 5)
        done = await store.change(QueueFilter(domain="b.example"), verb=verb, now=datetime.now(UTC))
        assert done.changed == 55  # all but those that are being tried at this moment
        attempts.gates["b.example"].set()
        await eventually(lambda: is_settled(store))
    assert attempts.made["b.example"] == 5


async def is_settled(store: SqliteStore) -> bool:
    counts = await store.counts()
    return not counts[State.QUEUED] and not counts[State.DEFERRED]


async def test_rules_that_became_stricter_are_stored_with_mail_that_waits(store):
    attempts = Attempts(lambda entry: BUSY)
    await accept(store, "b@b.example")
    async with running(store, attempts, PolicyRules(default=TlsRule(require_tls=True))):
        await eventually(lambda: has_events(store))
    [entry] = await store.claim_due(now=datetime.now(UTC) + timedelta(hours=1), limit=1)
    assert entry.settings.require_tls.value


async def test_mail_of_a_stopped_scheduler_is_delivered_by_the_next(store):
    attempts = Attempts(lambda entry: OK)
    attempts.gates["b.example"] = asyncio.Event()
    for n in range(60):
        await accept(store, f"{n}@b.example")
    async with running(store, attempts):
        await eventually(lambda: attempts.made["b.example"] == 5)
    assert (await store.counts())[State.QUEUED] == 60
    again = Attempts(lambda entry: OK)
    async with running(store, again):
        await eventually(lambda: is_empty(store))
    assert again.made["b.example"] == 60
