"""Who is tried when, and that nothing is lost, tried twice or kept waiting on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.deliver import pacing
from relay.deliver.options import DeliveryOptions
from relay.deliver.scheduler import Scheduler
from relay.deliver.sts_policies import PolicyPending
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, HopSession, Outcome, VerifiedBy
from relay.mail.tls_session import TlsSession
from relay.policy.rules import PolicyRules, TlsRule
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, State
from relay.queue.retry import RetrySchedule
from relay.queue.store import ClaimLost
from relay.report.metrics import Metrics
from tests.fakes.queue import CONTENT, DISK_TROUBLE, MemoryQueue
from tests.fakes.scheduling import make_scheduler
from tests.fakes.waiting import patient, until

SESSION = HopSession("mx.b.example", "192.0.2.1", tls=True, verified_by=VerifiedBy.PKIX)
OK: Outcome = Delivered("2.0.0", 250, "OK", session=SESSION)
BUSY: Outcome = Deferred("4.2.1", 450, "busy", session=SESSION)
NOBODY: Outcome = Bounced("5.1.1", 550, "no such user", session=SESSION)
SILENCE: Outcome = Deferred(
    "4.4.1", Code.NO_CONNECTION, "", "mx.dead.example [192.0.2.9]: timed out"
)

SCHEDULE = RetrySchedule(waits=(timedelta(minutes=5), timedelta(hours=1)))
QUICK = RetrySchedule(waits=(timedelta(milliseconds=200),))

Behaviour = Callable[[Entry], Outcome]


class Attempts:
    """Attempts that end as the test says, at once unless their domain is held; each is written
    down.
    """

    def __init__(self, behaviour: Behaviour = lambda entry: OK) -> None:
        self.behaviour = behaviour
        self.made: list[Entry] = []
        self.contents: list[bytes] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.in_flight: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.most_in_all = 0
        self.past_the_dot = False

    def hold(self, domain: str) -> asyncio.Event:
        return self.gates.setdefault(domain, asyncio.Event())

    def open_gates(self) -> None:
        for gate in self.gates.values():
            gate.set()

    async def run(
        self, entry: Entry, content: Callable[[], AsyncIterator[bytes]], sessions: list[TlsSession]
    ) -> Mapping[int, Outcome]:
        domain = entry.domain
        self.made.append(entry)
        self.in_flight[domain] += 1
        self.most[domain] = max(self.most[domain], self.in_flight[domain])
        self.most_in_all = max(self.most_in_all, self.in_flight.total())
        try:
            self.contents.append(b"".join([piece async for piece in content()]))
            await asyncio.sleep(0)
            if domain in self.gates:
                await self._held(domain)
            outcome = self.behaviour(entry)
            return {recipient.index: outcome for recipient in entry.recipients}
        finally:
            self.in_flight[domain] -= 1

    async def _held(self, domain: str) -> None:
        try:
            await self.gates[domain].wait()
        except asyncio.CancelledError:
            if not self.past_the_dot:
                raise
            await self.gates[domain].wait()


TWENTY = {"concurrency": 20, "concurrency_per_destination": 5}
"""Connections in all, and to one destination."""


@contextlib.asynccontextmanager
async def running(
    queue: MemoryQueue, attempts: Attempts, *, grace: float = 0.2, **settings: Any
) -> AsyncIterator[Scheduler]:
    scheduler = make(queue, attempts, **settings)
    task = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
    finally:
        await scheduler.drain(timedelta(seconds=grace))
        await task
        assert not queue.claimed, "left claimed"


def make(queue: MemoryQueue, attempts: Attempts, **settings: Any) -> Scheduler:
    rules = settings.pop("rules", PolicyRules())
    return make_scheduler(
        queue,
        attempts,
        schedule=settings.pop("schedule", SCHEDULE),
        options=DeliveryOptions(**settings.pop("options", {})),
        rules=lambda: rules,
        **settings,
    )


@pytest.fixture
async def queue() -> MemoryQueue:
    return MemoryQueue()


async def test_due_mail_is_delivered_and_logged(queue):
    queue.add("Q1", "b@b.example", "c@b.example", "d@d.example")
    attempts = Attempts()
    async with running(queue, attempts):
        await queue.until(2)
    assert queue.states() == {State.DELIVERED: 3}
    assert sorted((e.name, e.recipient) for e in queue.events) == [
        ("delivered", "b@b.example"),
        ("delivered", "c@b.example"),
        ("delivered", "d@d.example"),
    ]
    assert attempts.contents == [CONTENT, CONTENT]
    assert not queue.entries


async def test_mail_that_arrives_is_tried_at_once(queue):
    async with running(queue, Attempts()):
        await asyncio.sleep(0.05)
        queue.add("Q1", "b@b.example")
        await queue.until(1)


async def test_timer_that_fires_a_moment_early_is_set_again(queue):
    # Timers and the wall clock are two clocks, and a loop rounds its timers: uvloop's to
    # milliseconds.
    began = datetime.now(UTC)

    def slow_clock() -> datetime:
        return began + (datetime.now(UTC) - began) * 0.9

    queue.add("Q1", "b@b.example", due=began + timedelta(seconds=0.2))
    async with running(queue, Attempts(), clock=slow_clock):
        await queue.until(1)


async def test_mail_is_tried_when_it_is_due_and_not_before(queue):
    queue.add("Q1", "b@b.example", due=datetime.now(UTC) + timedelta(seconds=2))
    async with running(queue, Attempts()):
        await asyncio.sleep(0.2)
        assert not queue.settlements
        await queue.until(1)


async def test_a_deferral_is_tried_again_after_its_wait(queue):
    answers = iter([BUSY, BUSY, OK])
    queue.add("Q1", "b@b.example")
    async with running(queue, Attempts(lambda entry: next(answers)), schedule=QUICK):
        await queue.until(3)
    assert [change.recipient.state for s in queue.settlements for change in s.changes] == [
        State.DEFERRED,
        State.DEFERRED,
        State.DELIVERED,
    ]
    assert queue.settlements[-1].changes[0].recipient.attempts == 3


async def test_an_idle_scheduler_asks_the_store_for_nothing(queue):
    queue.add("Q1", "b@b.example", due=datetime.now(UTC) + timedelta(hours=1))
    async with running(queue, Attempts()):
        await asyncio.sleep(0.4)
        assert queue.claims <= 2


# --- nobody waits for somebody else ---------------------------------------------------------------


async def test_two_thousand_for_a_dead_destination_do_not_delay_one_for_another(queue):
    for n in range(2000):
        queue.add(f"D{n}", f"{n}@dead.example")
    attempts = Attempts(lambda entry: SILENCE if entry.domain == "dead.example" else OK)
    attempts.hold("dead.example")  # its hosts swallow every packet
    async with running(queue, attempts):
        await until(lambda: attempts.in_flight["dead.example"] > 0)
        queue.add("Q1", "b@b.example")
        await queue.until(1)
        assert attempts.most["dead.example"] <= 5
        assert queue.most_claimed <= 60


async def test_destinations_that_are_slow_keep_to_their_own_slots(queue):
    attempts = Attempts()
    for n in range(400):
        queue.add(f"S{n}", f"a@slow{n % 8}.example")
    for n in range(8):
        attempts.hold(f"slow{n}.example")
    async with running(
        queue, attempts, options={"concurrency": 20, "concurrency_per_destination": 2}
    ):
        await until(lambda: attempts.in_flight.total() == 15)
        for n in range(50):
            queue.add(f"Q{n}", "b@b.example")
        await queue.until(50)
        assert attempts.most_in_all <= 20
        attempts.open_gates()
        await queue.until(450)
    assert max(attempts.most.values()) == 2


async def test_a_few_destinations_that_hang_cannot_take_every_place(queue):
    attempts = Attempts()
    for n in range(400):
        queue.add(f"S{n}", f"a@slow{n % 6}.example")
        attempts.hold(f"slow{n % 6}.example")
    async with running(queue, attempts, options=TWENTY):
        await until(lambda: attempts.in_flight.total() == 15)
        queue.add("Q1", "b@b.example")
        queue.add("Q2", "c@c.example")
        await queue.until(2)


async def test_a_thousand_destinations_that_hang_do_not_delay_one_that_answered(queue):
    attempts = Attempts()
    queue.add("W0", "w@well.example")
    async with running(queue, attempts, options=TWENTY):
        await queue.until(1)
        for n in range(1000):
            attempts.hold(f"slow{n}.example")
            queue.add(f"S{n}", f"a@slow{n}.example")
        await until(lambda: attempts.in_flight.total() == 15)
        for n in range(50):
            queue.add(f"W{n + 1}", "w@well.example")
            await queue.until(n + 2)
        assert queue.most_claimed <= 60
        attempts.open_gates()
        await queue.until(1051)


async def test_a_message_to_a_thousand_names_that_hang_does_not_delay_one_to_a_new_name(queue):
    attempts = Attempts()
    queue.add("W0", "w@well.example")
    async with running(queue, attempts, options=TWENTY):
        await queue.until(1)
        for n in range(1000):
            attempts.hold(f"slow{n}.example")
        queue.add("S0", *(f"a@slow{n}.example" for n in range(1000)))
        await until(lambda: attempts.in_flight.total() == 7)
        for n in range(20):
            queue.add(f"N{n}", f"b@new{n}.example")
            await queue.until(n + 2)
        assert queue.most_claimed <= 60
        attempts.open_gates()
        await queue.until(1021)


async def test_destinations_that_have_become_slow_do_not_delay_one_that_is_not(queue, monkeypatch):
    monkeypatch.setattr(pacing, "LONG", timedelta(seconds=0.1))
    attempts = Attempts()
    domains = [f"slow{n}.example" for n in range(4)]
    for domain in [*domains, "well.example"]:
        queue.add(domain, f"a@{domain}")
    async with running(queue, attempts, options=TWENTY):
        await queue.until(5)
        for n, domain in enumerate(domains * 20):
            attempts.hold(domain)
            queue.add(f"S{n}", f"a@{domain}")
        await until(lambda: attempts.in_flight.total() >= 15)
        await asyncio.sleep(0.15)  # from now on they are slow
        for n in range(20):
            queue.add(f"W{n}", "w@well.example")
            await queue.until(6 + n)
        attempts.open_gates()
        await queue.until(105)


async def test_proven_destinations_that_all_become_slow_at_once_do_not_keep_every_place(
    queue, monkeypatch
):
    monkeypatch.setattr(pacing, "LONG", timedelta(seconds=0.1))
    attempts = Attempts()
    domains = [f"slow{n}.example" for n in range(40)]
    for domain in [*domains, "well.example"]:
        queue.add(domain, f"a@{domain}")
    async with running(queue, attempts, options=TWENTY):
        await queue.until(41)
        for domain in domains:
            attempts.hold(domain)
            queue.add(f"S{domain}", f"a@{domain}")
        await until(lambda: attempts.in_flight.total() == 20)
        for n in range(20):
            queue.add(f"W{n}", "w@well.example")
            await queue.until(42 + n)
        assert attempts.in_flight.total() >= 15
        attempts.open_gates()
        await queue.until(101)


async def test_concurrency_holds_in_all_and_for_each_destination(queue):
    for n in range(300):
        queue.add(f"Q{n}", f"a@b{n % 20}.example")
    attempts = Attempts()
    for n in range(20):
        attempts.hold(f"b{n}.example")
    async with running(
        queue, attempts, options={"concurrency": 12, "concurrency_per_destination": 7}
    ):
        await until(lambda: attempts.in_flight.total() == 12)
        attempts.open_gates()
        attempts.gates.clear()
        await queue.until(300)
    assert attempts.most_in_all == 12
    assert max(attempts.most.values()) <= 7
    assert queue.most_claimed <= 40


async def test_dead_destination_is_tried_a_few_times_and_then_waits(queue):
    for n in range(300):
        queue.add(f"D{n}", f"{n}@dead.example")
    attempts = Attempts(lambda entry: SILENCE)
    async with running(queue, attempts) as scheduler:
        await until(lambda: "dead.example" in scheduler.silent_domains())
        await until(lambda: not queue.claimed)
        assert len(attempts.made) == 5
        queue.add("D-new", "new@dead.example")
        await until(lambda: len(queue.released) >= 296)
        assert len(attempts.made) == 5
    first = min(queue.due_of(*entry) for entry in queue.entries)
    assert first - datetime.now(UTC) > timedelta(minutes=4)


async def test_mail_whose_policy_is_being_fetched_is_tried_later_and_not_counted(queue):
    queue.add("Q1", "b@b.example")
    fetched = datetime.now(UTC) + timedelta(seconds=0.3)

    def pending(entry: Entry) -> Outcome:
        if datetime.now(UTC) < fetched:
            raise PolicyPending("b.example", fetched)
        return OK

    attempts = Attempts(pending)
    async with running(queue, attempts) as scheduler:
        await until(lambda: len(queue.released) == 1)
        assert not scheduler.silent_domains()
        await queue.until(1)
    assert len(attempts.made) == 2
    [settlement] = queue.settlements
    assert settlement.changes[0].recipient.attempts == 1
    assert queue.states() == {State.DELIVERED: 1}


async def test_two_thousand_that_wait_for_a_policy_do_not_delay_one_for_another(queue):
    for n in range(2000):
        queue.add(f"D{n}", f"{n}@slow.example")
    fetched = datetime.now(UTC) + timedelta(hours=1)

    def pending(entry: Entry) -> Outcome:
        if entry.domain == "slow.example":
            raise PolicyPending(entry.domain, fetched)
        return OK

    async with running(queue, Attempts(pending)):
        await until(lambda: bool(queue.released))
        queue.add("Q1", "b@b.example")
        await queue.until(1)


async def test_one_attempt_ends_a_silence_and_an_answer_releases_the_other_mail(queue):
    is_dead = True
    for n in range(40):
        queue.add(f"D{n}", f"{n}@dead.example")
    attempts = Attempts(lambda entry: SILENCE if is_dead else OK)
    async with running(queue, attempts, schedule=QUICK):
        await until(lambda: len(attempts.made) == 5)
        attempts.most.clear()
        await until(lambda: len(attempts.made) >= 8)
        assert attempts.most["dead.example"] == 1
        assert set(queue.states()) == {State.DEFERRED}
        is_dead = False
        await until(lambda: queue.states()[State.DELIVERED] == 40)
    assert attempts.most["dead.example"] > 1


async def test_the_operator_can_ask_for_a_silent_destination_to_be_tried(queue):
    queue.add("D1", "1@dead.example")
    attempts = Attempts(lambda entry: SILENCE)
    async with running(queue, attempts) as scheduler:
        await until(lambda: bool(scheduler.silent_domains()))
        queue.add("D2", "2@dead.example")
        await until(lambda: len(queue.released) == 1)
        assert len(attempts.made) == 1
        scheduler.retry_silent()
        queue.make_due("D2")
        await until(lambda: len(attempts.made) == 2)


async def test_expired_mail_bounces_although_its_destination_is_silent(queue):
    """With thousands queued for a dead host nobody would live to see a try of his own."""
    arrived = datetime.now(UTC) - timedelta(days=6)
    queue.add("D1", "1@dead.example")
    attempts = Attempts(lambda entry: SILENCE)
    async with running(queue, attempts) as scheduler:
        await until(lambda: bool(scheduler.silent_domains()))
        # The clock has run evenly for long enough to be believed.
        look = scheduler.clocks.last_look
        assert look is not None
        scheduler.clocks.last_look = replace(look, steady_since=arrived - timedelta(days=2))
        queue.add("OLD", "2@dead.example", arrived=arrived)
        await queue.until(2)
    assert len(attempts.made) == 1
    change = queue.settlements[-1].changes[0]
    assert change.recipient.state is State.EXPIRED
    assert change.outcome.description.startswith("not tried: no answer since ")
    assert [report.recipients[0].address for report in queue.reports] == ["a@a.example"]


# --- nothing is lost ------------------------------------------------------------------------------


async def test_an_error_of_ours_is_a_deferral_and_not_a_hot_loop(queue, caplog):
    def broken(entry: Entry) -> Outcome:
        raise ZeroDivisionError("oops")

    queue.add("Q1", "b@b.example")
    attempts = Attempts(broken)
    async with running(queue, attempts):
        await queue.until(1)
        await asyncio.sleep(0.1)
    assert len(attempts.made) == 1
    change = queue.settlements[0].changes[0]
    assert (change.recipient.state, change.status) == (State.DEFERRED, "4.3.0")
    assert "ZeroDivisionError" in change.outcome.description
    assert "Q1" in caplog.text


async def test_content_that_cannot_be_read_is_a_deferral(queue, caplog):
    queue.trouble["read_content"] = DISK_TROUBLE
    queue.add("Q1", "b@b.example")
    async with running(queue, Attempts()):
        await queue.until(1)
    assert queue.states() == {State.DEFERRED: 1}
    assert "Q1" in caplog.text


async def test_a_result_is_held_until_the_store_takes_it_and_the_message_is_not_sent_again(
    queue, caplog
):
    queue.add("Q1", "b@b.example")
    queue.trouble["record"] = DISK_TROUBLE
    attempts = Attempts()
    async with running(queue, attempts):
        await until(lambda: "waits to be recorded" in caplog.text)
        del queue.trouble["record"]
        await queue.until(1, within=timedelta(seconds=6))
    assert len(attempts.made) == 1
    assert queue.states() == {State.DELIVERED: 1}


async def test_results_that_wait_take_up_slots_and_so_their_number_is_bounded(queue):
    for n in range(100):
        queue.add(f"Q{n}", f"a@b{n}.example")
    queue.trouble["record"] = DISK_TROUBLE
    attempts = Attempts()
    async with running(queue, attempts, options={"concurrency": 10}):
        await until(lambda: len(attempts.made) == 10)
        await asyncio.sleep(0.1)
        assert len(attempts.made) == 10
        del queue.trouble["record"]
        await queue.until(100)
    assert len(attempts.made) == 100


async def test_a_queue_that_cannot_be_read_is_read_again(queue, caplog):
    queue.trouble["claim_due"] = DISK_TROUBLE
    queue.add("Q1", "b@b.example")
    async with running(queue, Attempts()):
        await until(lambda: "cannot be read" in caplog.text)
        del queue.trouble["claim_due"]
        await queue.until(1)


# --- reports --------------------------------------------------------------------------------------


async def test_a_bounce_and_its_report_commit_together(queue):
    queue.add("Q1", "b@b.example", "c@b.example")
    async with running(queue, Attempts(lambda entry: NOBODY)):
        await queue.until(1)
    assert queue.states() == {State.BOUNCED: 2}
    [report] = queue.reports
    assert (report.message.reverse_path, report.message.origin) == ("", "dsn")
    assert [recipient.address for recipient in report.recipients] == ["a@a.example"]
    assert report.recipients[0].domain == "a.example"
    assert report.message.size_bytes == len(report.content)
    assert b"Message-ID: <1@a.example>" in report.content
    assert b"Status: 5.1.1" in report.content
    assert [event.name for event in report.events] == ["accepted"]
    assert report.message.queue_id != "Q1"


async def test_bounce_that_bounces_is_reported_to_nobody(queue):
    queue.add("Q1", "b@b.example", sender="", origin="dsn")
    async with running(queue, Attempts(lambda entry: NOBODY)):
        await queue.until(1)
    assert queue.states() == {State.BOUNCED: 1}
    assert not queue.reports


async def test_a_report_is_never_sent_more_weakly_than_its_message(queue):
    required = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.MESSAGE))
    queue.add("Q1", "b@b.example", settings=required)
    rules = PolicyRules(default=TlsRule(False, True))
    async with running(queue, Attempts(lambda entry: NOBODY), rules=rules):
        await queue.until(1)
    assert queue.reports[0].recipients[0].settings == required


# --- rules of today -------------------------------------------------------------------------------


async def test_rules_that_became_stricter_hold_for_mail_that_waits(queue):
    queue.add("Q1", "b@b.example")
    rules = PolicyRules(domains={"a.example": TlsRule(require_tls=True)})
    attempts = Attempts(lambda entry: BUSY)
    async with running(queue, attempts, rules=rules):
        await queue.until(1)
    wanted = Setting(True, Source.DOMAIN, "a.example")
    assert attempts.made[0].settings.require_tls == wanted
    assert queue.settlements[0].changes[0].recipient.settings.require_tls == wanted


async def test_rules_that_became_looser_do_not_hold_for_mail_that_waits(queue):
    stored = TlsSettings(
        Setting(True, Source.DOMAIN, "a.example"), Setting(False, Source.DEFAULT, "default")
    )
    queue.add("Q1", "b@b.example", settings=stored)
    attempts = Attempts()
    async with running(queue, attempts, rules=PolicyRules(default=TlsRule(False, True))):
        await queue.until(1)
    assert attempts.made[0].settings == stored


# --- the end --------------------------------------------------------------------------------------


async def test_draining_waits_for_attempts_under_way_and_begins_no_other(queue):
    for n in range(60):
        queue.add(f"Q{n}", f"{n}@b.example")
    attempts = Attempts()
    gate = attempts.hold("b.example")
    async with running(queue, attempts, grace=5):
        await until(lambda: len(attempts.made) == 5)
        asyncio.get_running_loop().call_later(0.1, gate.set)
    assert len(attempts.made) == 5
    assert queue.states() == {State.DELIVERED: 5}
    assert len(queue.entries) == 55


async def test_after_the_grace_attempts_are_broken_off_and_their_mail_is_due_again(queue):
    queue.add("Q1", "b@b.example")
    attempts = Attempts()
    attempts.hold("b.example")
    async with running(queue, attempts, grace=0.1):
        await until(lambda: len(attempts.made) == 1)
    assert not queue.settlements
    assert len(queue.released) == 1
    assert queue.due_of("Q1", "b.example") <= datetime.now(UTC)


async def test_an_attempt_past_the_final_dot_is_heard_to_the_end(queue):
    queue.add("Q1", "b@b.example")
    attempts = Attempts()
    attempts.past_the_dot = True
    gate = attempts.hold("b.example")
    async with running(queue, attempts, grace=0.05):
        await until(lambda: len(attempts.made) == 1)
        asyncio.get_running_loop().call_later(0.3, gate.set)
    assert queue.states() == {State.DELIVERED: 1}


async def test_a_scheduler_whose_task_is_cancelled_leaves_nothing_claimed(queue):
    for n in range(60):
        queue.add(f"Q{n}", f"{n}@b.example")
    attempts = Attempts()
    attempts.hold("b.example")
    task = asyncio.create_task(make(queue, attempts).run())
    await until(lambda: len(attempts.made) == 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not queue.claimed
    assert len(queue.entries) == 60


async def test_draining_ends_though_the_store_is_in_trouble(queue, caplog):
    queue.add("Q1", "b@b.example")
    queue.trouble["record"] = DISK_TROUBLE
    attempts = Attempts()
    scheduler = make(queue, attempts)
    task = asyncio.create_task(scheduler.run())
    await until(lambda: "waits to be recorded" in caplog.text)
    async with asyncio.timeout(patient(2)):
        await scheduler.drain(timedelta(seconds=0.1))
        await task
    assert "will be tried anew after a restart" in caplog.text


async def test_drain_of_a_scheduler_that_never_ran_ends_at_once(queue):
    scheduler = make(queue, Attempts())
    await scheduler.drain(timedelta(seconds=5))
    await scheduler.run()
    assert queue.claims == 0


async def test_result_that_another_node_made_old_is_told_and_not_tried_to_be_written_again(
    queue, caplog
):
    queue.add("Q1", "b@b.example")
    queue.trouble = {"record": ClaimLost("the lease is lost")}
    metrics = Metrics()
    attempts = Attempts()
    scheduler = make(queue, attempts, metrics=metrics)
    task = asyncio.create_task(scheduler.run())
    await until(lambda: "not recorded" in caplog.text)
    await scheduler.drain(timedelta(seconds=0.2))
    await task
    assert len(attempts.made) == 1
    [line] = [one for one in caplog.messages if "not recorded" in one]
    assert line == (
        "Q1: the result for b@b.example is not recorded (the lease is lost):"
        " host mx.b.example answered 250 OK"
    )
    assert metrics.results_refused == 1
