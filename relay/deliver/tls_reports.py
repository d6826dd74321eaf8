"""Reports on TLS to recipients' domains: one for each domain, day and target (RFC 8460). †

    a day is over ─► sessions of all workers ─► record of the domain ─► each target of it:
                                                    claim ─► mail, into the queue  ─► finish
                                                         └─► https, posted         ─► finish

One worker does it for all. A report by mail is accepted into the queue in the same commit that
finishes it, so it is sent once, also if the relay is killed at any moment. An https server may have
taken a report without a record of it; the relay then posts the same octets again, with the same
report-id.

A domain's report is due at its own time (`relay.route.report_time`). A few domains are handled at a
time, so that a slow receiver does not delay the others for long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial
from itertools import islice

from relay.deliver.https import NoAnswer
from relay.mail.address import domain_of
from relay.mail.envelope import Notify
from relay.mail.header import split_content
from relay.mail.jsontext import JsonDocument
from relay.mail.section import HeaderSection
from relay.policy.fields import NO_WISHES, tls_wishes
from relay.policy.rules import PolicyRules, resolve
from relay.queue.entry import TLS_REPORT, QueuedMessage, QueuedRecipient, Terms
from relay.queue.queue_id import new_queue_id
from relay.queue.store import NewMessage, SpoolError, TlsReports
from relay.queue.summary import summarise
from relay.queue.tls_sessions import (
    DomainSessions,
    ListedReport,
    ReportResult,
    ReportState,
    SentReport,
    TlsSessionsView,
    day_of,
)
from relay.report import deliverylog
from relay.report.tls_report import Submitter, compose, compressed, report_document
from relay.route.answers import NoSuchName, Resolver, TxtAnswer
from relay.route.report_time import RETRIED_FOR, next_try, report_due, reports_begin
from relay.route.tlsrpt import ReportTarget, report_targets, tlsrpt_name

__all__ = ["TlsReporter", "report_message"]

log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
_AT_ONCE = 20
_MOST_UNDER_WAY = 500
_PAGE = 500
_A_MINUTE = timedelta(minutes=1)
_ALL_PLACES = ""


@dataclass(slots=True)
class _Planned:
    """A report that is to be sent. `first`: when it was tried first."""

    due: datetime
    first: datetime | None = None
    tries: int = 0


class TlsReporter:
    """`view`: the sessions of all workers; `reports`: the store that keeps what was sent.

    `post`: sends octets to a URL, and returns why that failed, None where it did not. `may_sign`:
    whether there is a key for mail from a domain. `told`: hears of each try, by transport and what
    came of it.
    """

    def __init__(
        self,
        view: TlsSessionsView,
        reports: TlsReports,
        resolver: Resolver,
        *,
        post: Callable[[str, bytes], Awaitable[NoAnswer | None]],
        submitter: Submitter,
        rules: Callable[[], PolicyRules],
        may_sign: Callable[[str], bool],
        clock: Callable[[], datetime],
        told: Callable[[str, str], None] = lambda transport, result: None,
    ) -> None:
        self._view = view
        self._reports = reports
        self._resolver = resolver
        self._post = post
        self._submitter = submitter
        self._rules = rules
        self._may_sign = may_sign
        self._clock = clock
        self._told = told
        self._planned: dict[date, dict[str, _Planned]] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._under_way: dict[tuple[date, str], asyncio.Task[None]] = {}
        self._is_closed = False
        self._held: set[tuple[date, str, str]] = set()
        """Claims that could not be given back: the store was in trouble."""

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
        day = day or self._today()
        sessions = await self._view.tls_sessions(day, domain)
        return report_document(domain, day, sessions, self._submitter) if sessions else None

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
        if _ALL_PLACES in finished:
            return ListedReport(day, sessions, ReportState(finished[_ALL_PLACES].value))
        planned = self._planned.get(day, {}).get(domain)
        due = planned.due if planned is not None else report_due(day, domain)
        return ListedReport(day, sessions, ReportState.DUE, due)

    async def _send_now(self, day: date, domain: str) -> SentReport:
        settled = (await self._reports.finished_tls_reports(day, domain)).get(_ALL_PLACES)
        if settled is not None:
            return SentReport(day, domain, ReportState(settled.value), was_settled=True)
        left = await self._send(day, domain, is_last=False)
        if left is not None:
            return SentReport(day, domain, ReportState.DUE, left.reason)
        finished = await self._reports.finished_tls_reports(day, domain)
        found = finished.get(_ALL_PLACES)
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

    # --- one report -------------------------------------------------------------------------------

    async def _send(self, day: date, domain: str, *, is_last: bool) -> NoAnswer | None:
        """Send a report to all its targets that do not have it; why some are left, None where none
        is. `is_last`: what fails is given up.
        """
        if _ALL_PLACES in await self._reports.finished_tls_reports(day, domain):
            self._forget_plan(day, domain)
            return None
        left: NoAnswer | None = None
        async with self._places:
            targets, unknown = await self._targets_of(domain)
            left = NoAnswer(unknown) if unknown else None
            document = await self.document(domain, day)
            if document is None:  # forgotten meanwhile
                targets = ()
            for target in (one for one in targets if one.address):
                assert document is not None
                found = await self._send_to(target, day, domain, document, is_last=is_last)
                left = _both(left, found)
        for target in (one for one in targets if not one.address):
            assert document is not None
            found = await self._send_to(target, day, domain, document, is_last=is_last)
            left = _both(left, found)
        if left is not None and (left.is_busy or not is_last):
            return left
        finished = (await self._reports.finished_tls_reports(day, domain)).values()
        if left is not None or targets:
            was_sent = ReportResult.SENT in finished
            result = ReportResult.SENT if was_sent else ReportResult.GIVEN_UP
        else:
            result = ReportResult.NOT_WANTED
        if await self._claim(day, domain, _ALL_PLACES):
            await self._reports.finish_tls_report(day, domain, _ALL_PLACES, result)
        self._forget_plan(day, domain)
        return None

    def _forget_plan(self, day: date, domain: str) -> None:
        self._planned.get(day, {}).pop(domain, None)

    async def _targets_of(self, domain: str) -> tuple[tuple[ReportTarget, ...], str]:
        """Where a domain wants its reports; or none, and why that is not known."""
        found = await self._resolver.txt(tlsrpt_name(domain))
        match found:
            case TxtAnswer(texts=texts):
                return report_targets(texts), ""
            case NoSuchName():
                return (), ""
        return (), f"{tlsrpt_name(domain)}: {found.reason}"

    async def _send_to(
        self,
        target: ReportTarget,
        day: date,
        domain: str,
        document: JsonDocument,
        *,
        is_last: bool,
    ) -> NoAnswer | None:
        """Send a report to one target, if nobody has; why that failed, None where it did not."""
        if target.uri in await self._reports.finished_tls_reports(day, domain):
            return None
        if not await self._claim(day, domain, target.uri):
            return NoAnswer(f"{target.uri}: it is being sent", is_busy=True)
        try:
            if target.address:
                failed = await self._mail(target, day, domain, document)
            else:
                failed = await self._post(target.uri, compressed(document))
                if failed is None:
                    await self._reports.finish_tls_report(
                        day, domain, target.uri, ReportResult.SENT
                    )
            if failed is not None and is_last and not failed.is_busy:
                result = ReportResult.GIVEN_UP
                await self._reports.finish_tls_report(day, domain, target.uri, result)
                self._told(target.transport, result.value)
                return None
        except BaseException:
            await self._release(day, domain, target.uri)
            raise
        if failed is None:
            self._told(target.transport, ReportResult.SENT.value)
            return None
        await self._release(day, domain, target.uri)
        if not failed.is_busy:
            self._told(target.transport, "failed")
        return NoAnswer(f"{target.uri}: {failed.reason}", is_busy=failed.is_busy)

    async def _mail(
        self, target: ReportTarget, day: date, domain: str, document: JsonDocument
    ) -> NoAnswer | None:
        sender = domain_of(self._submitter.sender)
        if not self._may_sign(sender):  # RFC 8460 §3: a report is signed
            return NoAnswer(f"{sender} has no key under dkim.domains")
        message = report_message(
            domain,
            day,
            document,
            self._submitter,
            to=target.address,
            rules=self._rules(),
            now=self._clock(),
        )
        await self._reports.finish_tls_report(
            day, domain, target.uri, ReportResult.SENT, message=message
        )
        return None

    async def _claim(self, day: date, domain: str, target: str) -> bool:
        key = day, domain, target
        if key in self._held:
            self._held.discard(key)
            return True
        return await self._reports.claim_tls_report(day, domain, target)

    async def _release(self, day: date, domain: str, target: str) -> None:
        self._held.add((day, domain, target))
        with suppress(SpoolError):
            await self._reports.release_tls_report(day, domain, target)
            self._held.discard((day, domain, target))


def _both(one: NoAnswer | None, other: NoAnswer | None) -> NoAnswer | None:
    """Why targets are left: a failure before one that was not tried."""
    return one if one is not None and (other is None or not one.is_busy) else other


def report_message(
    domain: str,
    day: date,
    document: JsonDocument,
    submitter: Submitter,
    *,
    to: str,
    rules: PolicyRules,
    now: datetime,
) -> NewMessage:
    """The mail that carries a report, ready for the queue.

    It says TLS-Required: No, so that what is broken does not keep the report away (RFC 8460
    §5.3.1). It is given up after a day (§5.5), and nobody is told of that.
    """
    queue_id = new_queue_id(now)
    content = compose(domain, day, document, submitter, to=to, queue_id=queue_id, now=now)
    header, _ = split_content(content)
    wishes, says_no = tls_wishes(NO_WISHES, requiretls=False, says_no=True)
    message = QueuedMessage(
        queue_id=queue_id,
        reverse_path=submitter.sender,
        arrived=now,
        size_bytes=len(content),
        summary=summarise(HeaderSection(header)),
        origin=TLS_REPORT,
        terms=Terms(lifetime=RETRIED_FOR),
        tls_required_no=says_no,
    )
    to_domain = domain_of(to)
    settings = resolve(
        rules, reverse_path=submitter.sender, recipient_domain=to_domain, wishes=wishes
    )
    recipient = QueuedRecipient(
        index=0,
        address=to,
        domain=to_domain,
        settings=settings,
        notify=frozenset({Notify.NEVER}),
    )
    events = (deliverylog.accepted(message, (recipient,)),)
    return NewMessage(message, (recipient,), content, events=events)
