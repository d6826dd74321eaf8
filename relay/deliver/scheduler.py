"""Claims due entries and starts their attempts, as slots become free. †

The scheduler owns the claims of this process, from `claim_due` until `recorder` ends them. Other
modules decide: `waiting` how much to claim and which entry is next, `pacing` how many attempts a
domain gets, `destinations` how many connections a destination gets. `runner` makes an attempt,
`recorder` writes its result, `report_sender` sends the reports that waited for several domains of a
message.

A claimed entry waits in the line of its domain until a slot is free, and is attempted. Then

    a result                                             settle, record: result, DSNs, events
    no room at its hosts                                 back into its line; released if that
                                                         takes long
    broken off by the relay, or a policy is fetched      released
    this node has no part of its destination's limits    released, for other nodes
    its domain is silent                                 released until the silence ends

At most `concurrency` attempts are under way. The loop sleeps until the store has work or the next
entry is due. Once a second a task checks the entries that wait for a connection.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from relay.deliver import pacing
from relay.deliver.clocks import Clocks
from relay.deliver.destinations import Destinations, NotNow
from relay.deliver.options import DeliveryOptions
from relay.deliver.recorder import FIRST_PAUSE, LONGEST_PAUSE, Recorder
from relay.deliver.report_sender import ReportSender
from relay.deliver.runner import Attempts, Runner, reconsidered
from relay.deliver.waiting import LEFT_FOR, NextAttempt, Waiting, Wanted
from relay.deliver.wake_up import WakeUp
from relay.mail.outcome import Outcome
from relay.mail.tls_session import TlsSession
from relay.policy.rules import PolicyRules
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule, latest_due
from relay.queue.store import DeliveryQueue, SpoolError
from relay.report.metrics import Metrics
from relay.route.next_hop import NextHop

logger = logging.getLogger(__name__)

_NEXT_LOOK = 1.0
"""Seconds between two claims for proven domains while there are no claims for others.

Also the seconds between two checks of the lines that wait for a connection.
"""


class Scheduler:
    """One loop of delivery: `run` delivers until `drain` is called.

    When both have returned, this process holds no claims, except those that the store could not
    take back; they are due at the next start.
    """

    def __init__(
        self,
        store: DeliveryQueue,
        attempts: Attempts,
        reports: ReportSender,
        *,
        schedule: RetrySchedule,
        options: DeliveryOptions,
        rules: Callable[[], PolicyRules],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        destinations: Destinations | None = None,
        metrics: Metrics | None = None,
        leads_to: Callable[[Entry], NextHop | None] = lambda entry: None,
    ) -> None:
        """`destinations`: those of `attempts`. `leads_to`: the operator's next hop for an entry."""
        self._store = store
        self._schedule = schedule
        self._rules = rules
        self._clock = clock
        self._monotonic = monotonic
        self._most = options.concurrency
        self._most_per_domain = min(options.concurrency_per_destination, options.concurrency)
        self.clocks = Clocks(clock, monotonic, on_set=self.retry_silent)
        self._wake_up = WakeUp(clock)
        self._reports = reports
        self._recorder = Recorder(
            store,
            self._reports,
            self.clocks,
            schedule=schedule,
            metrics=metrics,
            on_end=self._claim_ended,
        )
        self._runner = Runner(store, attempts, clock)
        self._destinations = destinations or Destinations(
            self._most_per_domain, schedule, clock=monotonic
        )
        self._destinations.on_room = self._has_room
        self._waiting: Waiting[asyncio.Task[None]] = Waiting(
            self._most,
            self._most_per_domain,
            schedule=schedule,
            destinations=self._destinations,
            clock=clock,
            monotonic=monotonic,
            leads_to=leads_to,
        )
        self._slots, self._paces = self._waiting.slots, self._waiting.paces
        self._next_look: asyncio.TimerHandle | None = None
        self._is_unreadable = False
        self._stopping = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._parts = self._destinations.parts
        store.before_change(self._give_back)
        store.limit_domains(self._parts.to_claim)
        store.when_divided_anew(self._divided_anew)

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self._slots.attempts)

    def silent_domains(self) -> dict[str, datetime]:
        """The domains that get no attempts, and until when."""
        return self._paces.silent()

    def note_proven(self, domains: Iterable[str]) -> None:
        """Domains that answered lately and at once, before this process began; the latest last."""
        for domain in domains:
            self._slots.note(domain, is_proven=True)

    def retry_silent(self) -> None:
        """Try silent domains and silent destinations again at once.

        The operator asks for it, or the clock with which the silences were measured was set.
        """
        self._paces.retry_silent()
        self._destinations.retry_silent()
        self._wake_up.wake()

    def routes_changed(self) -> None:
        """Deliver what waits as the routes of a new configuration say."""
        self._waiting.line_up_again()
        self._begin_attempts()
        self._wake_up.wake()

    async def run(self) -> None:
        """Deliver until `drain` is called."""
        self._ended.clear()
        watches = (self._watch_for_work(), self._reports.watch(), self._watch_lines())
        beside = [asyncio.create_task(watch) for watch in watches]
        try:
            while not self._stopping:
                self.clocks.steady_since()
                await self._catch_up_with_clock()
                await self._step()
        except BaseException:
            self._break_off()
            raise
        finally:
            for task in beside:
                task.cancel()
            self._stopping = True
            await self._wind_up()
            await asyncio.wait(beside)
            self._ended.set()

    async def drain(self, grace: timedelta) -> None:
        """Begin no new attempt, wait for those under way up to the grace, and break off the rest.

        An attempt past the final dot is waited for in any case: its message may have been taken,
        and to break it off would deliver the message twice.
        """
        self._stopping = True
        self._wake_up.wake()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace.total_seconds()):
                await self._ended.wait()
        self._break_off()
        await self._ended.wait()

    def _break_off(self) -> None:
        self._recorder.give_up()
        self._runner.break_off()

    async def _wind_up(self) -> None:
        """Give the waiting entries back, and finish what was begun."""
        self._wake_up.stop()
        if self._next_look is not None:
            self._next_look.cancel()
        await self._release_all_waiting()
        while self._slots.attempts:
            await asyncio.wait(self._slots.attempts)
        await self._recorder.wait_for_put_offs()

    async def _give_back(self) -> None:
        """Release the claimed entries without a slot: the operator is about to change them."""
        await self._release_all_waiting()
        with suppress(TimeoutError):  # entries that are being put off are not claimed for long
            async with asyncio.timeout(LONGEST_PAUSE):
                await self._recorder.wait_for_put_offs()

    async def _release_all_waiting(self) -> None:
        due = self._clock()
        waiting = self._waiting.pop_all()
        await asyncio.gather(*(self._recorder.release(entry, due=due) for entry in waiting))

    # --- claims -----------------------------------------------------------------------------------

    async def _step(self) -> None:
        """Claim entries if slots or lines need some; sleep until woken if there are no more."""
        self._wake_up.reset()
        wanted = self._waiting.wanted()
        if wanted is not None:
            try:
                all_taken = await self._claim(wanted)
            except SpoolError as exc:
                self._in_trouble(exc)
                await self._recorder.pause(FIRST_PAUSE)
                return
            self._in_trouble(None)
            if not all_taken:
                return
        await self._wake_up.wait()

    def _in_trouble(self, trouble: SpoolError | None) -> None:
        """Log once that the queue cannot be read, and once that it can be read again."""
        if trouble is not None and not self._is_unreadable:
            logger.error("the queue cannot be read, nothing new is delivered: %s", trouble)
        elif trouble is None and self._is_unreadable:
            logger.info("the queue can be read again")
        self._is_unreadable = trouble is not None

    async def _claim(self, wanted: Wanted) -> bool:
        """Claim entries, and begin those with a slot. Returns whether the store has no more.

        Then the loop is woken for the next entry that is due, or after `_NEXT_LOOK` if only proven
        domains were wanted.
        """
        claimed = await self._store.claim_due(
            now=self._clock(),
            limit=wanted.limit,
            skip=wanted.skip,
            only=wanted.only,
            with_new=wanted.with_new,
        )
        self._waiting.claimed(wanted)
        await self._take(claimed)
        by_domain = Counter(entry.domain for entry in claimed)
        is_full = any(count >= self._parts.to_claim(domain) for domain, count in by_domain.items())
        if is_full or len(claimed) >= wanted.limit:
            return False
        if wanted.only is None:
            self._wake_up.wake_at(await self._store.next_due(skip=wanted.skip))
        else:
            self._wake_up.wake_at(self._clock() + timedelta(seconds=_NEXT_LOOK))
        return True

    async def _take(self, claimed: Sequence[Entry]) -> None:
        """Put claimed entries into their lines; begin those with a slot."""
        lines, silent, unserved = self._waiting.line_up(claimed)
        self._begin_attempts()
        if silent:
            await self._put_off(silent)
        if unserved:
            await self._leave_to_others(unserved)
            if len(unserved) == len(claimed):
                await self._recorder.pause(_NEXT_LOOK)  # there may be much more that is others'
        if not self._waiting.lines:
            return
        is_too_much = len(self._waiting.lines) > 2 * self._most
        if is_too_much or self._waiting.room.has_excess(lines):
            await self._shorten_lines()

    async def _leave_to_others(self, entries: Sequence[Entry]) -> None:
        """Release entries whose destination this node has no part of."""
        for domain in {entry.domain for entry in entries}:
            self._waiting.leave(domain)
        due = self._clock()
        await asyncio.gather(*(self._recorder.release(entry, due=due) for entry in entries))
        if entries:
            self._wake_up.wake_at(due + LEFT_FOR)

    async def _divided_anew(self) -> bool:
        """The parts of this node have become others. Whether no more than these are under way."""
        await self._leave_to_others(self._waiting.pop_unserved())
        self._destinations.on_division()
        self._begin_attempts()
        self._wake_up.wake()
        return self._waiting.is_within_parts()

    def _claim_ended(self, entry: Entry, due: datetime | None) -> None:
        """A claim has ended; the entry is due again at `due`, or never."""
        self._waiting.room.forget(entry)
        if due is not None:
            self._wake_up.wake_at(due)

    async def _put_off(self, entries: Iterable[Entry]) -> None:
        """Give entries of silent domains back until the end of the silence."""
        await self._recorder.put_off(
            [(entry, *self._paces.silence(self._waiting.room.line_of(entry))) for entry in entries]
        )

    async def _watch_for_work(self) -> None:
        """Wake the loop when the store has new work."""
        while True:
            try:
                await self._store.wait_for_work()
            except SpoolError:
                await asyncio.sleep(FIRST_PAUSE)
            self._wake_up.wake()

    async def _catch_up_with_clock(self) -> None:
        """After the clock was set back, correct the due times, so that no entry waits too long."""
        if self.clocks.was_set_back:
            now = self._clock()
            try:
                await self._store.clock_set_back(
                    now=now, latest=latest_due(self._schedule, now=now)
                )
                self.clocks.was_set_back = False
            except SpoolError as exc:
                self._in_trouble(exc)

    # --- attempts ---------------------------------------------------------------------------------

    def _begin_attempts(self) -> None:
        """Begin attempts for waiting entries while slots are free.

        Break off long attempts that take the slots of proven domains.
        """
        if self._stopping or not self._waiting.lines:
            return
        loop = asyncio.get_running_loop()
        for turn in self._waiting.turns():
            task = loop.create_task(self._run_one(turn))
            self._slots.begin(task, turn.line, turn.entry, turn.rank)
            task.add_done_callback(self._ended_one)
        self._runner.break_off(self._slots.in_the_way())
        self._look_again()

    def _look_again(self) -> None:
        """Begin attempts again as soon as a next hop is to be asked that mail waits for."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        if (seconds := self._waiting.room.room_in()) is not None:
            loop = asyncio.get_running_loop()
            self._next_look = loop.call_later(max(seconds, 0.001), self._begin_attempts)

    async def _run_one(self, turn: NextAttempt) -> None:
        """Try one claimed entry and record the result.

        The claim holds until the result is committed, so a crash here delays the message and loses
        nothing.
        """
        entry, use = turn.entry, turn.use
        begun, started = self._clock(), self._monotonic()
        outcomes: Mapping[int, Outcome] | None = None
        sessions: list[TlsSession] = []
        took = 0.0
        try:
            entry = reconsidered(entry, self._rules())
            result = await self._runner.run(entry, sessions)
            took = self._monotonic() - started
            if use is not None:
                self._destinations.end(use)
            if isinstance(result, NotNow | datetime):
                await self._recorder.count(sessions)
            if isinstance(result, NotNow):
                outcomes = await self._not_now(entry, result)
            elif isinstance(result, datetime):
                await self._recorder.release(entry, due=result)
            else:
                outcomes = result
                await self._recorder.record(entry, outcomes, sessions)
        finally:
            self._destinations.limits.is_over(entry.key)
            self._waiting.ended(entry)
            self._learn(turn, begun, outcomes or {}, took)
            if self._paces.is_suspended(turn.line):
                await self._put_off(self._waiting.lines.pop_all(turn.line))

    def _learn(
        self, turn: NextAttempt, begun: datetime, outcomes: Mapping[int, Outcome], took: float
    ) -> None:
        """Note what an ended attempt, which took so many seconds, shows about its destination."""
        line = turn.line
        has_answered = self._paces.learn(line, outcomes.values(), begun=begun)
        if outcomes:
            is_proven = has_answered and took < pacing.LONG.total_seconds()
            self._slots.note(line, is_proven=is_proven, domain=turn.entry.domain)

    def _ended_one(self, task: asyncio.Task[None]) -> None:
        self._slots.end(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an attempt ended in an error of ours", exc_info=error)
        self._begin_attempts()
        if self._stopping or self._waiting.may_claim():
            self._wake_up.wake()

    # --- hosts without room -----------------------------------------------------------------------

    async def _not_now(self, entry: Entry, why: NotNow) -> Mapping[int, Outcome] | None:
        """Let an entry wait for room at its hosts; the outcomes if that was too often."""
        if self._waiting.room.was_too_often_turned_away(entry, why):
            await self._recorder.record(entry, why.turned_away)
            return why.turned_away
        if self._stopping:
            await self._recorder.release(entry, due=self._clock())
        else:
            self._waiting.wait_for_room(entry, why)
        return None

    def _has_room(self, name: str) -> None:
        """A destination has room for a connection again."""
        if self._waiting.lines.waiting_at(name):
            self._begin_attempts()

    async def _watch_lines(self) -> None:
        """Check each second whether entries wait too long, or a host may be asked again."""
        while True:
            await asyncio.sleep(_NEXT_LOOK)
            self._destinations.give_up_surplus()
            if self._waiting.lines:
                await self._shorten_lines()
                self._begin_attempts()

    async def _shorten_lines(self) -> None:
        """Give back the entries that would wait long for a connection."""
        now = self._clock()
        excess = [
            (entry, now + timedelta(seconds=seconds), outcome)
            for entry, seconds, outcome in self._waiting.room.take_excess()
        ]
        if excess:
            await self._recorder.put_off(excess)
            self._wake_up.wake()
