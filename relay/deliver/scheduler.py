"""Which message is tried when: claims what is due, has it attempted, writes down what came of it. †

Owned here: the claims of this process, from `claim_due` to `record` or `release`. The
decisions are elsewhere: how many attempts a destination gets in `relay.deliver.pacing`,
what an outcome means in `relay.queue.settle`, how a host is talked to in
`relay.deliver.attempt`, how many connections it gets in `relay.deliver.destinations`.

    claimed ─► waiting, by domain ─► attempt ─► settle ─► record: result, DSNs, events
                 │      ▲              ├─ broken off by us, or a policy is fetched ─► release
                 │      └─ no room ────┘  at its hosts; where that takes longer ─► release
                 └─ domain is silent ─► release until the silence ends

Memory does not grow with the queue: at most a page of each class of domains is claimed and
waits, at most `concurrency` attempts are under way, and both are counted before a task is
made. A destination that is slow or dead has its own few places and a short line of its own,
and what is due elsewhere passes it. Domains that answered lately and at once (proven) have a
share of the places to themselves, and are claimed for while the others fill their page. Nothing
is polled: the scheduler sleeps until the store has work or the next entry is due (a minute at
most, since a wall clock may be set).

Reports about a message whose recipients have several domains wait in the store for its other
entries that are being tried or soon will be, so that its sender gets one; who settles last sends
it. What has waited for nearly `REPORT_PATIENCE`, or through a restart, is found by a look at
the store every half a minute.

What an attempt came to is held until the store has taken it, however long that lasts:
better to wait with a result in hand than to deliver twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from relay.deliver import pacing
from relay.deliver.destinations import Destinations, Holder, NotNow, Use
from relay.deliver.lines import Lines, Rank
from relay.deliver.options import DeliveryOptions
from relay.deliver.pacing import Pace
from relay.deliver.reports import dsn_message
from relay.deliver.sts_policies import PolicyPending
from relay.mail.outcome import Code, Deferred, Outcome
from relay.policy.rules import PolicyRules, reconsider
from relay.queue.entry import Entry, QueuedRecipient
from relay.queue.retry import ClockWatch, RetrySchedule, jitter_of, latest_due, watch
from relay.queue.settle import Report, Settlement, notification_due, reports_about, settle
from relay.queue.store import CHUNK_BYTES, DeliveryQueue, NewMessage, SpoolError
from relay.report import deliverylog, dsn

__all__ = ["REPORT_PATIENCE", "Attempts", "Scheduler"]

logger = logging.getLogger(__name__)

_LONGEST_SLEEP = 60.0
_SHORTEST_SLEEP = 0.05
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 5.0
"""Between two tries of a store that is in trouble, in seconds: mail is to flow soon after it is
well.
"""

_RECORD_TRIES = 5
"""How often an error in the recording itself, which no waiting mends, is met before we leave it."""

REPORT_PATIENCE = timedelta(minutes=5)
"""The longest that a report waits for attempts at other domains of its message."""

_DEBTS_SECONDS = 30.0
_DEBTS_PAGE = 100

_MOST_PACES = 10_000

_MOST_PROVEN = 1000
"""Domains that answered lately, of which the store is asked by name."""

_NEXT_LOOK = 1.0
"""Seconds between claims for proven domains while others are not claimed for, and between looks at
the lines that wait for a connection.
"""

_MOST_TURNED_AWAY = 10
"""How often an entry is tried again at once after a host turned its connection away."""

_BOUND = 5.0
"""Seconds that a domain's mail is taken to lead where it led."""


class Attempts(Protocol):
    """What makes an attempt: `relay.deliver.attempt.Attempt`.

    Cancelled before the final dot it ends with CancelledError; after it, it stays for the answer
    and returns the outcomes, since nobody else will ever hear them. An attempt that cannot begin
    yet raises `PolicyPending`, or `NotNow`.
    """

    async def run(
        self, entry: Entry, content: Callable[[], AsyncIterator[bytes]]
    ) -> Mapping[int, Outcome]: ...


class Scheduler:
    """One loop of delivery. `run` until `drain`; after both nothing is left claimed."""

    def __init__(
        self,
        store: DeliveryQueue,
        attempts: Attempts,
        *,
        schedule: RetrySchedule,
        options: DeliveryOptions,
        rules: Callable[[], PolicyRules],
        hostname: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
        report_patience: timedelta = REPORT_PATIENCE,
        destinations: Destinations | None = None,
    ) -> None:
        """`destinations`: those of `attempts`."""
        self._store = store
        self._attempts = attempts
        self._schedule = schedule
        self._most = options.concurrency
        self._most_per_destination = min(options.concurrency_per_destination, options.concurrency)
        self._rules = rules
        self._hostname = hostname
        self._clock = clock
        self._monotonic = monotonic
        self._report_patience = report_patience
        self._paying: set[str] = set()
        self._clocks: ClockWatch | None = None
        self._was_set_back = False
        self._paces: dict[str, Pace] = {}
        self._proven: dict[str, None] = {}
        self._only_proven = False
        self._ranks = list(Rank)
        self._lines = Lines()
        self._destinations = destinations or Destinations(
            self._most_per_destination, schedule, clock=monotonic
        )
        self._destinations.on_room = self._has_room
        self._turned_away: Counter[Holder] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._prompt: dict[asyncio.Task[None], tuple[float, str]] = {}
        """Attempts for proven domains that have not taken long yet: when each began."""
        self._bulk: set[asyncio.Task[None]] = set()
        self._put_offs: set[asyncio.Task[None]] = set()
        self._breakable: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: datetime | None = None
        self._passed_over: frozenset[str] | None = None
        self._unreadable = False
        self._stopping = False
        self._impatient = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        store.before_change(self._give_back)

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self._tasks)

    def silent_destinations(self) -> dict[str, datetime]:
        """The destinations that are left alone, and until when."""
        now = self._clock()
        return {
            domain: pace.suspended_until
            for domain, pace in self._paces.items()
            if pace.suspended_until is not None and now < pace.suspended_until
        }

    def retry_silent(self) -> None:
        """Try silent destinations again at once: the operator says that it is worth it."""
        for domain, pace in self._paces.items():
            if pace.suspended_until is not None:
                self._paces[domain] = Pace(in_flight=pace.in_flight)
        self._destinations.retry_silent()
        self._wake.set()

    async def run(self) -> None:
        """Deliver until `drain` is called."""
        self._ended.clear()
        beside = [
            asyncio.create_task(self._watch_for_work()),
            asyncio.create_task(self._watch_debts()),
            asyncio.create_task(self._watch_lines()),
        ]
        try:
            while not self._stopping:
                self._look_at_clocks()
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
        """Begin no attempt any more, wait for those under way up to the grace, break off the
        others.

        An attempt past the final dot is waited for still: its message may have been taken, and
        breaking off would deliver it twice.
        """
        self._stopping = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace.total_seconds()):
                await self._ended.wait()
        self._break_off()
        await self._ended.wait()

    def _break_off(self) -> None:
        self._impatient.set()
        for task in list(self._breakable):
            task.cancel()

    # --- the loop ---------------------------------------------------------------------------------

    async def _step(self) -> None:
        """Claim once, or sleep until that may be worth it."""
        self._wake.clear()
        self._passed_over = None
        wanted = self._wanted()
        if wanted:
            try:
                all_taken = await self._claim(wanted)
            except SpoolError as exc:
                self._in_trouble(exc)
                await self._pause(_FIRST_PAUSE)
                return
            self._in_trouble(None)
            if not all_taken:
                return
        await self._wake.wait()

    def _wanted(self) -> int:
        """How many entries to claim: for the free places, or a page ahead of them.

        Where a page waits for domains that are not proven, and no place is left for them, only
        others are wanted, and what has just come.
        """
        has_page = self._lines.waiting(Rank.NEW, Rank.BULK) >= self._most
        self._only_proven = has_page and not self._has_place(Rank.BULK)
        waiting = self._lines.waiting(Rank.PROVEN) if self._only_proven else len(self._lines)
        free = self._most - len(self._tasks)
        ahead = self._most - waiting
        if free > 0:
            return max(free, ahead)
        return ahead if 2 * waiting < self._most else 0

    def _in_trouble(self, trouble: SpoolError | None) -> None:
        """Say once that the queue cannot be read, and once that it can again."""
        if trouble is not None and not self._unreadable:
            logger.error("the queue cannot be read, nothing new is delivered: %s", trouble)
        elif trouble is None and self._unreadable:
            logger.info("the queue can be read again")
        self._unreadable = trouble is not None

    async def _claim(self, wanted: int) -> bool:
        """Claim up to a page and begin what there is room for; whether nothing more is due for now.

        Then the alarm is set on what is due next. A destination whose own line is long enough is
        passed over.
        """
        skip = frozenset(
            domain for domain in self._lines.domains() if not self._has_short_line(domain)
        )
        only = tuple(self._proven) if self._only_proven else None
        claimed = await self._store.claim_due(
            now=self._clock(),
            limit=wanted,
            limit_per_domain=self._most_per_destination,
            skip=skip,
            only=only,
            with_new=self._lines.waiting(Rank.NEW) < self._most,
        )
        self._passed_over = skip
        await self._take(claimed)
        share = max(Counter(entry.domain for entry in claimed).values(), default=0)
        if len(claimed) >= wanted or share >= self._most_per_destination:
            return False
        if only is None:
            self._expect(await self._store.next_due(skip=skip))
        else:
            self._expect(self._clock() + timedelta(seconds=_NEXT_LOOK))
        return True

    async def _take(self, claimed: Sequence[Entry]) -> None:
        """Let claimed entries wait, each in the line of its destination; begin what has room."""
        now = self._clock()
        silent: list[Entry] = []
        for entry in claimed:
            if pacing.is_suspended(self._paces.get(entry.domain, pacing.NEW), now=now):
                silent.append(entry)
            else:
                self._lines.add(entry, self._rank(entry))
        self._begin_waiting()
        await self._put_off(silent)
        if len(self._lines) > 2 * self._most:
            await self._shorten_lines()

    def _begin_waiting(self) -> None:
        """Begin attempts while there are places: the classes of domains in turn, and those of each."""
        if self._stopping or not self._lines:
            return
        self._note_long_attempts()
        self._ranks.append(self._ranks.pop(0))
        ranks = [rank for rank in self._ranks if self._lines.waiting(rank)]
        while ranks and len(self._tasks) < self._most:
            rank = ranks.pop(0)
            if self._begin_next(rank):
                ranks.append(rank)

    def _begin_next(self, rank: Rank) -> bool:
        """Begin an attempt for the next domain of a class that may have one; whether there was one."""
        if not self._has_place(rank):
            return False
        under_way, places = self._places(rank)
        now, share = self._clock(), self._most_per_destination
        is_crowded = pacing.is_crowded(under_way, concurrency=places, most=share)
        for domain in self._lines.turns(rank):
            pace = self._paces.get(domain, pacing.NEW)
            if pacing.room(pace, most=share, now=now, is_crowded=is_crowded) > 0:
                names = self._lines.destinations(domain, self._monotonic())
                if not names or any(map(self._destinations.is_to_be_asked, names)):
                    self._begin(self._lines.pop(domain), names, rank)
                    return True
        return False

    def _rank(self, entry: Entry) -> Rank:
        if entry.domain in self._proven:
            return Rank.PROVEN
        others = entry.total - len(entry.recipients)
        return Rank.BULK if others >= pacing.MANY else Rank.NEW

    def _places(self, rank: Rank) -> tuple[int, int]:
        """The attempts under way for a class of domains, and the places that it has."""
        unproven = len(self._tasks) - len(self._prompt)
        if rank is Rank.PROVEN:
            return len(self._prompt), self._most - unproven
        if not self._proven:
            return unproven, self._most
        if rank is Rank.NEW:
            return unproven, pacing.unproven_places(self._most)
        return len(self._bulk), pacing.bulk_places(self._most)

    def _has_place(self, rank: Rank) -> bool:
        under_way, places = self._places(rank)
        return under_way < places and (rank is not Rank.BULK or self._has_place(Rank.NEW))

    def _note_long_attempts(self) -> None:
        """Attempts that take long prove nothing: from now on they are counted with the others."""
        if not self._prompt:
            return
        long_ago = self._monotonic() - pacing.LONG.total_seconds()
        while self._prompt:
            task = next(iter(self._prompt))
            began, domain = self._prompt[task]
            if began > long_ago:
                return
            del self._prompt[task]
            self._note_proven(domain, False)

    def _note_proven(self, domain: str, is_proven: bool) -> None:
        was_proven = domain in self._proven
        self._proven.pop(domain, None)
        if is_proven:
            self._proven[domain] = None
            self._lines.classify(domain, Rank.PROVEN)
            if len(self._proven) > _MOST_PROVEN:
                oldest = next(iter(self._proven))
                self._note_proven(oldest, False)
        elif was_proven:
            self._lines.classify(domain, Rank.NEW)

    def _begin(self, entry: Entry, names: Sequence[str], rank: Rank) -> None:
        domain = entry.domain
        self._paces[domain] = pacing.began(self._paces.get(domain, pacing.NEW))
        use = self._destinations.reserve(names, _holder(entry))
        task = asyncio.create_task(self._run_one(entry, use))
        self._tasks.add(task)
        if rank is Rank.PROVEN:
            self._prompt[task] = self._monotonic(), domain
        elif self._rank(entry) is Rank.BULK:
            self._bulk.add(task)
        task.add_done_callback(self._ended_one)

    def _ended_one(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._prompt.pop(task, None)
        self._bulk.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an attempt ended in an error of ours", exc_info=error)
        self._begin_waiting()
        # What the last claim passed over may have a place now.
        if (
            self._stopping
            or self._passed_over is None
            or any(map(self._has_short_line, self._passed_over))
            or (
                self._only_proven
                and (
                    2 * self._lines.waiting(Rank.NEW, Rank.BULK) < self._most
                    or self._has_place(Rank.BULK)
                )
            )
        ):
            self._wake.set()

    def _has_short_line(self, domain: str) -> bool:
        """Whether so few wait for a destination that it is time to claim more."""
        if 2 * self._lines.length(domain) >= self._most_per_destination:
            return False
        names = self._lines.destinations(domain, self._monotonic())
        return not names or any(self._excess_at(name) < 0 for name in names)

    async def _watch_for_work(self) -> None:
        """Wake the loop whenever the store has something new."""
        while True:
            try:
                await self._store.wait_for_work()
            except SpoolError:
                await asyncio.sleep(_FIRST_PAUSE)
            self._wake.set()

    def _expect(self, due: datetime | None) -> None:
        """Wake the loop when something is due, if nothing wakes it before."""
        now = self._clock()
        wait = _LONGEST_SLEEP if due is None else (due - now).total_seconds()
        wait = min(max(wait, _SHORTEST_SLEEP), _LONGEST_SLEEP)
        at = now + timedelta(seconds=wait)
        if self._alarm is not None:
            if self._alarm_at is not None and now < self._alarm_at <= at:
                return
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(wait, self._ring)
        self._alarm_at = at

    def _ring(self) -> None:
        # Timers may ring a moment before the wall clock says so. Then nothing is due yet, and an
        # alarm that has rung must not be taken for one that is still to ring.
        self._alarm = None
        self._wake.set()

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless we are to stop without patience."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._impatient.wait()

    async def _wind_up(self) -> None:
        """Give back what waits, and see to the end what was begun."""
        if self._alarm is not None:
            self._alarm.cancel()
        waiting = self._all_waiting()
        await asyncio.gather(*(self._release(entry, due=self._clock()) for entry in waiting))
        while self._tasks or self._put_offs:
            await asyncio.wait(self._tasks | self._put_offs)

    async def _give_back(self) -> None:
        """Let go of what is claimed and waits for its turn: the operator is about to change it."""
        due = self._clock()
        await asyncio.gather(*(self._release(entry, due=due) for entry in self._all_waiting()))
        with suppress(TimeoutError):  # what is put off at this moment is not claimed for long
            async with asyncio.timeout(_LONGEST_PAUSE):
                while self._put_offs:
                    await asyncio.wait(self._put_offs)

    # --- one entry --------------------------------------------------------------------------------

    async def _run_one(self, entry: Entry, use: Use | None) -> None:
        """Try one claimed entry and write down what came of it.

        The claim holds until the result is committed, so a crash here delays the message and loses
        nothing. `use`: the connection that was reserved for it.
        """
        begun, started = self._clock(), self._monotonic()
        outcomes: Mapping[int, Outcome] | None = None
        took = 0.0
        try:
            entry = self._under_todays_rules(entry)
            came = await self._attempt(entry)
            took = self._monotonic() - started
            if use is not None:
                self._destinations.end(use)
            if isinstance(came, NotNow):
                outcomes = await self._not_now(entry, came)
            elif isinstance(came, datetime):
                await self._release(entry, due=came)
            else:
                outcomes = came
                await self._write_down(entry, self._settle(entry, outcomes))
        finally:
            await self._learn(entry.domain, begun, outcomes, took)

    async def _attempt(self, entry: Entry) -> Mapping[int, Outcome] | NotNow | datetime:
        """The outcomes of an attempt; why there are none; or when the entry is due, as before, where
        no attempt was made.

        Whatever goes wrong inside is our trouble and temporary: the message is not lost, nor tried
        at once.
        """
        task, begun = asyncio.current_task(), self._clock()
        assert task is not None
        self._breakable.add(task)
        try:
            return await self._attempts.run(entry, lambda: self._content(entry))
        except asyncio.CancelledError:
            task.uncancel()
            return begun
        except PolicyPending as pending:
            return pending.until
        except NotNow as came:
            return came
        except Exception as exc:
            name = type(exc).__name__
            logger.exception(
                "%s: the attempt for %s failed in us", entry.message.queue_id, entry.domain
            )
            trouble = Deferred("4.3.0", Code.NONE, "", f"internal trouble ({name})")
            return {recipient.index: trouble for recipient in entry.recipients}
        finally:
            self._breakable.discard(task)

    async def _content(self, entry: Entry) -> AsyncIterator[bytes]:
        """The content in pieces, from memory where it still is."""
        if entry.content is None:
            async for piece in self._store.read_content(entry.message.queue_id):
                yield piece
            return
        for begin in range(0, len(entry.content), CHUNK_BYTES):
            yield entry.content[begin : begin + CHUNK_BYTES]

    def _under_todays_rules(self, entry: Entry) -> Entry:
        """The entry with its settings as strict as the rules of today make them."""
        rules = self._rules()
        recipients = tuple(
            self._reconsidered(recipient, entry.message.reverse_path, rules)
            for recipient in entry.recipients
        )
        return entry if recipients == entry.recipients else replace(entry, recipients=recipients)

    def _reconsidered(
        self, recipient: QueuedRecipient, reverse_path: str, rules: PolicyRules
    ) -> QueuedRecipient:
        settings = reconsider(
            recipient.settings, rules, reverse_path=reverse_path, recipient_domain=recipient.domain
        )
        return (
            recipient if settings == recipient.settings else replace(recipient, settings=settings)
        )

    def _settle(self, entry: Entry, outcomes: Mapping[int, Outcome]) -> Settlement:
        return settle(
            entry,
            outcomes,
            schedule=self._schedule,
            now=self._clock(),
            jitter=jitter_of(entry.message.queue_id, entry.recipients[0].attempts),
            steady_since=self._look_at_clocks().steady_since,
            # Whether they are soon done, too, the store knows; it tells who is the last.
            has_others=entry.total > len(entry.recipients),
        )

    # --- hosts without room -----------------------------------------------------------------------

    async def _not_now(self, entry: Entry, came: NotNow) -> Mapping[int, Outcome] | None:
        """Let an entry wait for room at its hosts; its outcomes where it was turned away too often."""
        holder, domain = _holder(entry), entry.domain
        if came.turned_away:
            self._turned_away[holder] += 1
            if self._turned_away[holder] > _MOST_TURNED_AWAY:
                await self._write_down(entry, self._settle(entry, came.turned_away))
                return came.turned_away
        if self._stopping:
            await self._release(entry, due=self._clock())
            return None
        self._lines.bind(domain, came.names, self._monotonic() + _BOUND)
        self._lines.add(entry, self._rank(entry), at_head=True)
        return None

    def _has_room(self, name: str) -> None:
        """A destination has a connection less than before."""
        if self._lines.waiting_at(name):
            self._begin_waiting()

    async def _watch_lines(self) -> None:
        """Look again and again at what waits for a connection: whether it waits for too long, and
        whether a host has rested.
        """
        while True:
            await asyncio.sleep(_NEXT_LOOK)
            if self._lines:
                await self._shorten_lines()
                self._begin_waiting()

    async def _shorten_lines(self) -> None:
        """Let what would wait for long for a connection wait in the queue, in nobody's way."""
        if not self._lines.waits_for_room:
            return
        now, put_off = self._clock(), []
        for domain in self._lines.domains():
            names = self._lines.destinations(domain, self._monotonic())
            excess = min(map(self._excess_at, names), default=0)
            if excess <= 0:
                continue
            for entry in self._lines.pop_last(domain, excess):
                seconds = min(map(self._destinations.next_turn, names))
                due = now + timedelta(seconds=seconds)
                put_off.append(self._put_off_one(entry, due, _no_room(names)))
        if put_off:
            await self._all_of(put_off)
            self._wake.set()

    def _excess_at(self, name: str) -> int:
        """How many entries more wait for a destination than have a connection soon."""
        waiting = self._lines.waiting_at(name)
        return waiting - self._destinations.patience(name) if waiting else -1

    # --- results ----------------------------------------------------------------------------------

    async def _write_down(self, entry: Entry, settlement: Settlement) -> None:
        """Commit the result, the DSNs it owes and the events it makes; try until the store has
        taken them.
        """
        events = [
            deliverylog.settled(entry, change, now=settlement.at) for change in settlement.changes
        ]
        reports: list[NewMessage] | None = None
        pause, errors = _FIRST_PAUSE, 0
        while True:
            try:
                if reports is None:
                    reports = await self._dsns(settlement.reports, settlement.at)
                is_to_be_reported = await self._store.record(
                    settlement, reports=reports, events=events
                )
                break
            except SpoolError as exc:
                if pause == _FIRST_PAUSE:
                    logger.error(
                        "%s: a result waits to be recorded: %s", entry.message.queue_id, exc
                    )
            except Exception:
                logger.exception("%s: a result cannot be recorded", entry.message.queue_id)
                errors += 1
            if self._impatient.is_set() or errors >= _RECORD_TRIES:
                logger.error(
                    "%s: not recorded, will be tried anew after a restart", entry.message.queue_id
                )
                return
            await self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._turned_away.pop(_holder(entry), None)
        self._expect_soonest(change.recipient.next_attempt for change in settlement.changes)
        if is_to_be_reported:
            await self._pay(entry.message.queue_id)

    async def _dsns(self, reports: Iterable[Report], at: datetime) -> list[NewMessage]:
        """The DSNs of some reports, each with as much of its message as it is to return."""
        messages = []
        for report in reports:
            queue_id = report.entry.message.queue_id
            header = await self._store.read_header(queue_id)
            original = None
            if dsn.returns_content(report):
                original = b"".join([piece async for piece in self._store.read_content(queue_id)])
            messages.append(
                dsn_message(
                    report,
                    header=header,
                    original=original,
                    rules=self._rules(),
                    hostname=self._hostname,
                    now=at,
                )
            )
        return messages

    # --- debts ------------------------------------------------------------------------------------

    async def _watch_debts(self) -> None:
        """Report what nobody is left to report, or what has waited long enough for others."""
        every = min(_DEBTS_SECONDS, self._report_patience.total_seconds() / 10)
        patience = self._report_patience - timedelta(
            seconds=every
        )  # the next look would be too late
        while True:
            now = self._clock()
            with suppress(SpoolError):  # the claims tell of a store in trouble
                owing = await self._store.pending_reports(
                    now=now, pending_since=now - patience, limit=_DEBTS_PAGE
                )
                paid = await asyncio.gather(*map(self._pay, owing))
                if len(owing) == _DEBTS_PAGE and any(paid):
                    continue
            await asyncio.sleep(every)

    async def _pay(self, queue_id: str) -> bool:
        """Report what is owed about a message. What fails here stays owed, and is found again."""
        if queue_id in self._paying:
            return False
        self._paying.add(queue_id)
        try:
            debt = await self._store.pending_report(queue_id)
            if debt is not None:
                now = self._clock()
                reports = reports_about(
                    debt.message, debt.changes, schedule=self._schedule, now=now
                )
                await self._store.report(debt, await self._dsns(reports, now))
            return True
        except SpoolError as exc:
            logger.error("%s: its sender is not told yet what became of it: %s", queue_id, exc)
        except Exception:
            logger.exception("%s: its sender cannot be told what became of it", queue_id)
        finally:
            self._paying.discard(queue_id)
        return False

    async def _release(self, entry: Entry, *, due: datetime) -> None:
        """Give a claim back untried. If the store cannot, its next start does."""
        pause = _FIRST_PAUSE
        self._turned_away.pop(_holder(entry), None)
        while True:
            try:
                await self._store.release(entry, due=due)
                break
            except SpoolError as exc:
                if pause == _FIRST_PAUSE:
                    logger.error(
                        "%s: a claim cannot be given back: %s", entry.message.queue_id, exc
                    )
            if self._impatient.is_set():
                return
            await self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        if not self._stopping:
            self._expect(due)

    # --- silence ----------------------------------------------------------------------------------

    async def _learn(
        self, domain: str, begun: datetime, outcomes: Mapping[int, Outcome] | None, took: float
    ) -> None:
        """What an attempt that ended, and took so many seconds, tells about its destination."""
        pace, now = self._paces.pop(domain, pacing.NEW), self._clock()
        after = pacing.learned(
            pace,
            outcomes.values() if outcomes else (),
            begun=begun,
            now=now,
            most=self._most_per_destination,
            schedule=self._schedule,
        )
        self._paces[domain] = after
        self._forget_paces()
        if outcomes:
            is_prompt = took < pacing.LONG.total_seconds()
            self._note_proven(domain, is_prompt and after.answered_at == now)
        if after.silences > pace.silences:
            logger.info("%s does not answer, left alone until %s", domain, after.suspended_until)
        elif pace.silences and not after.silences:
            logger.info("%s answers again", domain)
        if pacing.is_suspended(after, now=now):
            await self._put_off(self._all_waiting_for(domain))

    def _forget_paces(self) -> None:
        """Keep the table of destinations short; the one longest unused goes first."""
        if len(self._paces) > _MOST_PACES:
            oldest = next(
                (domain for domain, pace in self._paces.items() if not pace.in_flight), None
            )
            if oldest is not None:
                del self._paces[oldest]

    def _all_waiting_for(self, domain: str) -> list[Entry]:
        return self._lines.pop_all(domain)

    def _all_waiting(self) -> list[Entry]:
        return [
            entry for domain in self._lines.domains() for entry in self._all_waiting_for(domain)
        ]

    async def _put_off(self, entries: Iterable[Entry]) -> None:
        """Let entries of silent destinations wait for the end of the silence."""
        now = self._clock()
        put_off = []
        for entry in entries:
            pace = self._paces.get(entry.domain, pacing.NEW)
            outcome = None if pace.silence is None else pacing.untried(pace, pace.silence)
            put_off.append(self._put_off_one(entry, pace.suspended_until or now, outcome))
        await self._all_of(put_off)

    async def _all_of(self, put_off: Iterable[Coroutine[None, None, None]]) -> None:
        under_way = set(map(asyncio.create_task, put_off))
        self._put_offs |= under_way
        for task in under_way:
            task.add_done_callback(self._put_offs.discard)
        # One who is cancelled leaves nothing claimed.
        await asyncio.shield(asyncio.gather(*under_way))

    async def _put_off_one(self, entry: Entry, until: datetime, outcome: Deferred | None) -> None:
        """Give an entry back until its destination is to be tried; settle it where it cannot wait.

        It comes again in time for what its sender is to hear: with the other domains of its
        message. `outcome`: why it was not tried.
        """
        now = self._clock()
        if outcome is not None:
            settlement = self._settle(
                entry, {recipient.index: outcome for recipient in entry.recipients}
            )
            if pacing.cannot_wait(settlement):
                await self._write_down(entry, settlement)
                return
        await self._release(
            entry,
            due=min(until, notification_due(entry, schedule=self._schedule, now=now) or until),
        )

    # --- time -------------------------------------------------------------------------------------

    def _look_at_clocks(self) -> ClockWatch:
        before = self._clocks
        self._clocks = now = watch(before, wall=self._clock(), monotonic=self._monotonic())
        if before is not None and now.steady_since != before.steady_since:
            logger.warning("the clock was set from about %s to %s", before.wall, now.wall)
            self._was_set_back |= now.wall < before.wall
            self.retry_silent()  # silences were told by the old clock
        return now

    async def _catch_up_with_clock(self) -> None:
        """After the clock was set back, nothing waits for it to come as far again."""
        if self._was_set_back:
            now = self._clock()
            try:
                await self._store.clock_set_back(
                    now=now, latest=latest_due(self._schedule, now=now)
                )
                self._was_set_back = False
            except SpoolError as exc:
                self._in_trouble(exc)

    def _expect_soonest(self, due: Iterable[datetime | None]) -> None:
        soonest = min((moment for moment in due if moment is not None), default=None)
        if soonest is not None and not self._stopping:
            self._expect(soonest)


def _holder(entry: Entry) -> Holder:
    return entry.message.queue_id, entry.domain


def _no_room(names: Sequence[str]) -> Deferred:
    """The outcome of a message that waited for a connection until its sender is due a word."""
    text = f"not tried: {' and '.join(names)} had no room for another connection"
    # RFC 3463 §3.5: X.4.5 is a mail system that is congested.
    return Deferred("4.4.5", Code.NO_CONNECTION, "", text)
