"""Ends the claims of the scheduler: writes results into the store, or gives entries back. †

The recorder keeps the result of an attempt until the store has taken it, however long that takes:
a lost result would deliver the message twice. The events of the delivery log commit with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime

from relay.deliver import pacing
from relay.deliver.clocks import Clocks
from relay.deliver.report_sender import ReportSender
from relay.mail.outcome import Deferred, Delivered, Outcome
from relay.mail.tls_session import TlsSession
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule, jitter_of
from relay.queue.settle import Settlement, notification_due, settle
from relay.queue.store import ClaimLost, DeliveryQueue, NewMessage, SpoolError
from relay.report import deliverylog
from relay.report.metrics import Metrics

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 5.0
"""The longest pause between two tries of a store in trouble, in seconds.

It is short, so that mail flows soon after the store has recovered.
"""

_MOST_ERRORS = 5
"""How often the relay repeats a write that fails because of a bug, before it gives up."""


class Recorder:
    """Ends claims. `on_end` hears of each entry whose claim has ended, and when it is due again."""

    def __init__(
        self,
        store: DeliveryQueue,
        reports: ReportSender,
        clocks: Clocks,
        *,
        schedule: RetrySchedule,
        metrics: Metrics | None = None,
        on_end: Callable[[Entry, datetime | None], None],
    ) -> None:
        self._store = store
        self._reports = reports
        self._clocks = clocks
        self._schedule = schedule
        self._metrics = metrics or Metrics()
        self._on_end = on_end
        self._put_offs: set[asyncio.Task[None]] = set()
        self._has_given_up = asyncio.Event()

    # --- one entry --------------------------------------------------------------------------------

    async def record(
        self, entry: Entry, outcomes: Mapping[int, Outcome], sessions: Sequence[TlsSession] = ()
    ) -> None:
        """Write down what an attempt came to, and its sessions."""
        await self._write(self._settle(entry, outcomes), sessions)

    async def count(self, sessions: Sequence[TlsSession]) -> None:
        """Count the sessions of an attempt that came to nothing, if there were any."""
        if sessions:
            try:
                await self._store.count_sessions(sessions, at=self._clocks.now())
            except SpoolError as exc:
                logger.warning("sessions are not counted for reports on TLS: %s", exc)

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """Give a claim back untried. If the store cannot, its next start does."""

        async def release() -> bool:
            await self._store.release(entry, due=due)
            return True

        try:
            is_released = await self._until_taken(entry, "a claim waits to be given back", release)
        except ClaimLost:
            self._on_end(entry, None)  # whoever has it now delivers it
            return
        if is_released:
            self._on_end(entry, due)

    def _settle(self, entry: Entry, outcomes: Mapping[int, Outcome]) -> Settlement:
        # Only a recipient that is tried again needs what follows of its age.
        waits = len(outcomes) < len(entry.recipients) or not all(
            isinstance(one, Delivered) for one in outcomes.values()
        )
        jitter = jitter_of(entry.message.queue_id, entry.recipients[0].attempts) if waits else 0.0
        return settle(
            entry,
            outcomes,
            schedule=self._schedule,
            now=self._clocks.now(),
            jitter=jitter,
            steady_since=self._clocks.steady_since() if waits else None,
            # Whether they are soon done, too, the store knows; it tells who is the last.
            has_others=entry.total > len(entry.recipients),
        )

    async def _write(self, settlement: Settlement, sessions: Sequence[TlsSession] = ()) -> None:
        """Commit the result, the DSNs about it, its events and its sessions."""
        entry = settlement.entry
        events = [
            deliverylog.settled(entry, change, now=settlement.at) for change in settlement.changes
        ]
        reports: list[NewMessage] | None = None

        async def record() -> bool:
            nonlocal reports
            if reports is None:
                reports = (
                    await self._reports.dsns(settlement.reports, settlement.at)
                    if settlement.reports
                    else []
                )
            began = time.perf_counter()
            is_to_be_reported = await self._store.record(
                settlement, reports=reports, events=events, sessions=sessions
            )
            self._metrics.settled(settlement, time.perf_counter() - began)
            self._metrics.reported(len(reports))
            return is_to_be_reported

        try:
            is_to_be_reported = await self._until_taken(
                entry, "a result waits to be recorded", record
            )
        except ClaimLost as lost:
            self._refused(settlement, lost)
            return
        if is_to_be_reported is None:
            return
        dues = [change.recipient.next_attempt for change in settlement.changes]
        self._on_end(entry, min(filter(None, dues), default=None))
        if is_to_be_reported:
            await self._reports.send_pending(entry.message.queue_id)

    def _refused(self, settlement: Settlement, lost: ClaimLost) -> None:
        """Say what an attempt came to that is not written: another node has, or had, the entry."""
        entry = settlement.entry
        for change in settlement.changes:
            outcome = change.outcome
            logger.warning(
                "%s: the result for %s is not recorded (%s): host %s answered %s %s",
                entry.message.queue_id,
                change.recipient.address,
                lost,
                outcome.session.mx_host if outcome.session is not None else "none",
                outcome.code,
                outcome.message or outcome.description,
            )
        self._metrics.refused(len(settlement.changes))
        self._on_end(entry, None)

    async def _until_taken(
        self, entry: Entry, what: str, write: Callable[[], Awaitable[bool]]
    ) -> bool | None:
        """Write until the store has taken it, and return its answer; None: that was given up.
        Raises `ClaimLost`.
        """
        queue_id = entry.message.queue_id
        pause, errors = FIRST_PAUSE, 0
        while True:
            try:
                return await write()
            except ClaimLost:
                raise
            except SpoolError as exc:
                if pause == FIRST_PAUSE:
                    logger.error("%s: %s: %s", queue_id, what, exc)
            except Exception:
                logger.exception("%s: %s", queue_id, what)
                errors += 1
            if self._has_given_up.is_set() or errors >= _MOST_ERRORS:
                logger.error("%s: not recorded, will be tried anew after a restart", queue_id)
                return None
            await self.pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    # --- entries that are not tried ---------------------------------------------------------------

    async def put_off(self, entries: Iterable[tuple[Entry, datetime, Deferred | None]]) -> None:
        """Give entries back until their destinations are to be tried, and why they were not.

        Even where the caller is cancelled, nothing of them stays claimed.
        """
        under_way = {asyncio.create_task(self._put_off(*each)) for each in entries}
        self._put_offs |= under_way
        for task in under_way:
            task.add_done_callback(self._put_offs.discard)
        await asyncio.shield(asyncio.gather(*under_way))

    async def _put_off(self, entry: Entry, until: datetime, outcome: Deferred | None) -> None:
        """Give an entry back, or settle it where it cannot wait.

        It comes again in time for what its sender is to hear: with the other domains of its
        message.
        """
        if outcome is not None:
            settlement = self._settle(
                entry, {recipient.index: outcome for recipient in entry.recipients}
            )
            if pacing.cannot_wait(settlement):
                await self._write(settlement)
                return
        now = self._clocks.now()
        notification = notification_due(entry, schedule=self._schedule, now=now)
        await self.release(entry, due=min(until, notification or until))

    async def wait_for_put_offs(self) -> None:
        """Return when no entry is being put off."""
        while self._put_offs:
            await asyncio.wait(self._put_offs)

    # --- a store in trouble -----------------------------------------------------------------------

    async def pause(self, seconds: float) -> None:
        """Sleep, unless we are to stop without patience."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_given_up.wait()

    def give_up(self) -> None:
        """From now on what the store does not take at once waits for its next start."""
        self._has_given_up.set()
