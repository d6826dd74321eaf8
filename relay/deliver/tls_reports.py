"""Reports on TLS to recipients' domains: one for each domain, day and target (RFC 8460). †

One worker does it for all, when a day is over. A domain's report is due at its own time
(`relay.route.report_time`); `tls_report_sender` sends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial
from itertools import islice

from relay.deliver.https import NoAnswer
from relay.deliver.tls_report_sender import ALL_PLACES, TlsReportSender
from relay.mail.jsontext import JsonDocument
from relay.queue.store import SpoolError, TlsReports
from relay.queue.tls_sessions import (
    DomainSessions,
    ListedReport,
    ReportState,
    SentReport,
    TlsSessionsView,
    day_of,
)
from relay.route.report_time import RETRIED_FOR, next_try, report_due, reports_begin

log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
_MOST_UNDER_WAY = 500
_PAGE = 500
_A_MINUTE = timedelta(minutes=1)


@dataclass(slots=True)
class _Planned:
    """A report that is to be sent. `first`: when it was tried first."""

    due: datetime
    first: datetime | None = None
    tries: int = 0


class TlsReporter:
    """`view`: the sessions of all workers; `reports`: the store that keeps what was sent."""

    def __init__(
        self,
        view: TlsSessionsView,
        reports: TlsReports,
        sender: TlsReportSender,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._view = view
        self._reports = reports
        self._sender = sender
        self._clock = clock
        self._planned: dict[date, dict[str, _Planned]] = {}
        self._under_way: dict[tuple[date, str], asyncio.Task[None]] = {}
        self._is_closed = False

    async def run(self) -> None:
        """Send what is due, for ever. Other workers may still be starting when this one does."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._begin_due()

    async def send_due(self) -> None:
        """Send what is due now."""
        await self._begin_due()
        await asyncio.gather(*self._under_way.values())

    async def close(self) -> None:
        """Break off what is being sent, and begin nothing any more."""
        self._is_closed = True
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _begin_due(self) -> None:
        if self._is_closed:
            return
        try:
            await self._plan()
        except SpoolError as error:
            log.warning("reports on TLS are not sent: %s", error)
            return
        now = self._clock()
        due = (
            (day, domain)
            for day, domains in self._planned.items()
            for domain, planned in domains.items()
            if planned.due <= now and (day, domain) not in self._under_way
        )
        for day, domain in islice(due, _MOST_UNDER_WAY - len(self._under_way)):
            task = asyncio.create_task(self._send_planned(day, domain))
            self._under_way[day, domain] = task
            task.add_done_callback(partial(self._ended, (day, domain)))

    def _ended(self, key: tuple[date, str], task: asyncio.Task[None]) -> None:
        del self._under_way[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the report on TLS for %s of %s is not sent", *reversed(key), exc_info=error)

    # --- for the operator -------------------------------------------------------------------------

    async def document(self, domain: str, day: date | None = None) -> JsonDocument | None:
        """The report of a domain and day as it is so far, today's by default; None: there was no
        session.
        """
        return await self._sender.document(day or self._today(), domain)

    async def listing(self) -> AsyncIterator[list[ListedReport]]:
        """All domains and days with sessions, the newest day first, in pages."""
        for day in reversed(await self._view.tls_days()):
            async for page in self._domains(day):
                yield [await self._listed(day, one) for one in page]

    async def send(self, domain: str = "", day: date | None = None) -> AsyncIterator[SentReport]:
        """Send now what was not sent: of all days that are over, or of one; of all domains, or of
        one. What was sent before is not sent again, and passed over unless it is named.
        """
        days = [day] if day is not None else [*await self._days_over()]
        for one in days:
            reported = await self._reports.domains_reported(one)
            async for page in self._domains(one):
                for sessions in page:
                    name = sessions.domain
                    if domain in ("", name) and (domain or name not in reported):
                        yield await self._send_now(one, name)

    def is_over(self, day: date) -> bool:
        """Whether a day is over, so that its report is whole."""
        return day < self._today()

    async def _listed(self, day: date, sessions: DomainSessions) -> ListedReport:
        domain = sessions.domain
        if not self.is_over(day):
            return ListedReport(day, sessions, ReportState.SO_FAR, report_due(day, domain))
        finished = await self._reports.finished_tls_reports(day, domain)
        if ALL_PLACES in finished:
            return ListedReport(day, sessions, ReportState(finished[ALL_PLACES].value))
        planned = self._planned.get(day, {}).get(domain)
        due = planned.due if planned is not None else report_due(day, domain)
        return ListedReport(day, sessions, ReportState.DUE, due)

    async def _send_now(self, day: date, domain: str) -> SentReport:
        settled = (await self._reports.finished_tls_reports(day, domain)).get(ALL_PLACES)
        if settled is not None:
            return SentReport(day, domain, ReportState(settled.value), was_settled=True)
        left = await self._send(day, domain, is_last=False)
        if left is not None:
            return SentReport(day, domain, ReportState.DUE, left.reason)
        finished = await self._reports.finished_tls_reports(day, domain)
        found = finished.get(ALL_PLACES)
        return SentReport(day, domain, ReportState(found.value) if found else ReportState.DUE)

    # --- what is due ------------------------------------------------------------------------------

    def _today(self) -> date:
        return day_of(self._clock())

    async def _days_over(self) -> list[date]:
        return [day for day in await self._view.tls_days() if self.is_over(day)]

    async def _domains(self, day: date) -> AsyncIterator[list[DomainSessions]]:
        """The domains that had sessions in a day, in pages."""
        after: str | None = ""
        while after is not None:
            page = await self._view.tls_domains(day, after=after, limit=_PAGE)
            after = page[-1].domain if len(page) == _PAGE else None
            yield page

    async def _plan(self) -> None:
        """Note each day that is over since, with the domains that are not reported to yet."""
        days, now = await self._days_over(), self._clock()
        for day in days:
            if day not in self._planned and now >= reports_begin(day):
                reported = await self._reports.domains_reported(day)
                domains = [one.domain async for page in self._domains(day) for one in page]
                self._planned[day] = {
                    domain: _Planned(report_due(day, domain))
                    for domain in domains
                    if domain not in reported
                }
        for day in [day for day in self._planned if day not in days]:
            del self._planned[day]  # it is older than sessions are kept

    async def _send_planned(self, day: date, domain: str) -> None:
        """Send one report, and note when to try again if that fails."""
        planned = self._planned.get(day, {}).get(domain)
        if planned is None:
            return  # the operator had it sent meanwhile
        # For the case that an error of ours ends this: not at once again.
        now, planned.due = self._clock(), self._clock() + _A_MINUTE
        is_last = planned.first is not None and now >= planned.first + RETRIED_FOR
        try:
            left = await self._send(day, domain, is_last=is_last)
        except SpoolError as error:
            left = NoAnswer(str(error))
        if left is None or left.is_busy:
            return
        planned.first = planned.first or now
        planned.tries += 1
        again = next_try(planned.tries, first=planned.first, now=self._clock())
        planned.due = again or planned.due
        log.log(
            logging.INFO if again is not None else logging.WARNING,
            "the report on TLS for %s of %s is not sent: %s",
            domain,
            day,
            left.reason,
        )

    async def _send(self, day: date, domain: str, *, is_last: bool) -> NoAnswer | None:
        left = await self._sender.send(day, domain, is_last=is_last)
        if left is None:
            self._planned.get(day, {}).pop(domain, None)
        return left
