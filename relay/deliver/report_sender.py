"""Reports results to senders: makes the DSNs, and sends the pending reports. †

The report about an entry commits with its result (`relay.deliver.recorder`). If a message has
recipients in several domains, its report stays pending in the store until its other attempts that
are due soon have ended, so that its sender gets one report: the last attempt to settle sends it.
Every half minute the sender of reports looks in the store for reports that have been pending for
nearly `REPORT_PATIENCE`, or since before a restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta

from relay.deliver.reports import dsn_message
from relay.policy.rules import PolicyRules
from relay.queue.retry import RetrySchedule
from relay.queue.settle import Report, reports_about
from relay.queue.store import DeliveryQueue, NewMessage, SpoolError
from relay.report import dsn
from relay.report.metrics import Metrics

logger = logging.getLogger(__name__)

REPORT_PATIENCE = timedelta(minutes=5)
"""The longest that a report waits for attempts at other domains of its message."""

_LOOK_SECONDS = 30.0
_PAGE = 100
"""Reports that are sent at once."""


class ReportSender:
    """Makes and sends reports. `patience`: as `REPORT_PATIENCE`."""

    def __init__(
        self,
        store: DeliveryQueue,
        *,
        schedule: RetrySchedule,
        rules: Callable[[], PolicyRules],
        hostname: str,
        clock: Callable[[], datetime],
        patience: timedelta = REPORT_PATIENCE,
        metrics: Metrics | None = None,
    ) -> None:
        self._store = store
        self._schedule = schedule
        self._rules = rules
        self._hostname = hostname
        self._clock = clock
        self._patience = patience
        self._metrics = metrics or Metrics()
        self._sending: set[str] = set()

    async def dsns(self, reports: Iterable[Report], at: datetime) -> list[NewMessage]:
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

    async def send_pending(self, queue_id: str) -> bool:
        """Send the pending report about a message. What fails here stays pending and is found
        again.
        """
        if queue_id in self._sending:
            return False
        self._sending.add(queue_id)
        try:
            pending = await self._store.pending_report(queue_id)
            if pending is not None:
                now = self._clock()
                reports = reports_about(
                    pending.message, pending.changes, schedule=self._schedule, now=now
                )
                dsns = await self.dsns(reports, now)
                await self._store.report(pending, dsns)
                self._metrics.reported(len(dsns))
            return True
        except SpoolError as exc:
            logger.error("%s: its sender is not told yet what became of it: %s", queue_id, exc)
        except Exception:
            logger.exception("%s: its sender cannot be told what became of it", queue_id)
        finally:
            self._sending.discard(queue_id)
        return False

    async def watch(self) -> None:
        """Send the reports that no attempt is left to send, and those that have waited for long
        enough.
        """
        every = min(_LOOK_SECONDS, self._patience.total_seconds() / 10)
        # A report that is a little younger now would be too old at the next look.
        patience = self._patience - timedelta(seconds=every)
        while True:
            now = self._clock()
            with suppress(SpoolError):  # the claims tell of a store in trouble
                pending = await self._store.pending_reports(
                    now=now, pending_since=now - patience, limit=_PAGE
                )
                sent = await asyncio.gather(*map(self.send_pending, pending))
                if len(pending) == _PAGE and any(sent):
                    continue
            await asyncio.sleep(every)
