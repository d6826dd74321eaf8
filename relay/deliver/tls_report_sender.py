"""Sends one report on TLS to all that its domain asks for (RFC 8460). †

    record of the domain ─► each target of it: claim ─► mail, into the queue  ─► finish
                                                    └─► https, posted         ─► finish

A report by mail is accepted into the queue in the same commit that finishes it, so it is sent once,
also if the relay is killed at any moment. An https server may have taken a report without a record
of it; the relay then posts the same octets again, with the same report-id.

A few domains are handled at a time, so that a slow receiver does not delay the others for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import date, datetime
from functools import partial

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
from relay.queue.tls_sessions import ReportResult, TlsSessionsView
from relay.report import deliverylog
from relay.report.tls_report import Submitter, compose, compressed, report_document
from relay.route.answers import NoSuchName, Resolver, TxtAnswer
from relay.route.report_time import RETRIED_FOR
from relay.route.tlsrpt import ReportTarget, report_targets, tlsrpt_name

_AT_ONCE = 20
ALL_PLACES = ""
"""As a place: the report is finished for all places of its domain."""


class TlsReportSender:
    """`view`: the sessions of all workers; `reports`: the store that keeps what was sent.

    `post`: sends octets to a URL, and returns why that failed, None where it did not. `may_sign`:
    whether there is a key for mail from a domain. `on_try`: hears of each try, by transport and
    what came of it.
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
        on_try: Callable[[str, str], None] = lambda transport, result: None,
    ) -> None:
        self._view = view
        self._reports = reports
        self._resolver = resolver
        self._post = post
        self._submitter = submitter
        self._rules = rules
        self._may_sign = may_sign
        self._clock = clock
        self._on_try = on_try
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._held: set[tuple[date, str, str]] = set()
        """Claims that could not be given back: the store was in trouble."""

    async def document(self, day: date, domain: str) -> JsonDocument | None:
        """The report of a day and domain as it is so far; None: there was no session."""
        sessions = await self._view.tls_sessions(day, domain)
        return report_document(domain, day, sessions, self._submitter) if sessions else None

    async def send(self, day: date, domain: str, *, is_last: bool) -> NoAnswer | None:
        """Send a report to all its targets that do not have it; why some are left, None where none
        is. `is_last`: what fails is given up.
        """
        if ALL_PLACES in await self._reports.finished_tls_reports(day, domain):
            return None
        async with self._places:
            targets, unknown = await self._targets_of(domain)
            left: NoAnswer | None = NoAnswer(unknown) if unknown else None
            document = await self.document(day, domain)
            if document is None:  # forgotten meanwhile
                document, targets = {}, ()
            to = partial(self._send_to, day, domain, document, is_last=is_last)
            for target in (one for one in targets if one.address):
                left = _both(left, await to(target))
        for target in (one for one in targets if not one.address):
            left = _both(left, await to(target))
        if left is not None and (left.is_busy or not is_last):
            return left
        finished = (await self._reports.finished_tls_reports(day, domain)).values()
        if left is not None or targets:
            was_sent = ReportResult.SENT in finished
            result = ReportResult.SENT if was_sent else ReportResult.GIVEN_UP
        else:
            result = ReportResult.NOT_WANTED
        if await self._claim(day, domain, ALL_PLACES):
            await self._reports.finish_tls_report(day, domain, ALL_PLACES, result)
        return None

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
        self, day: date, domain: str, document: JsonDocument, target: ReportTarget, *, is_last: bool
    ) -> NoAnswer | None:
        """Send a report to one target, if nobody has; why that failed, None where it did not."""
        if target.uri in await self._reports.finished_tls_reports(day, domain):
            return None
        if not await self._claim(day, domain, target.uri):
            return NoAnswer(f"{target.uri}: it is being sent", is_busy=True)
        finish = partial(self._reports.finish_tls_report, day, domain, target.uri)
        try:
            if target.address:
                failed = await self._mail(target, day, domain, document)
            elif (failed := await self._post(target.uri, compressed(document))) is None:
                await finish(ReportResult.SENT)
            if failed is not None and is_last and not failed.is_busy:
                await finish(ReportResult.GIVEN_UP)
                self._on_try(target.transport, ReportResult.GIVEN_UP.value)
                return None
        except BaseException:
            await self._release(day, domain, target.uri)
            raise
        if failed is None:
            self._on_try(target.transport, ReportResult.SENT.value)
            return None
        await self._release(day, domain, target.uri)
        if not failed.is_busy:
            self._on_try(target.transport, "failed")
        return NoAnswer(f"{target.uri}: {failed.reason}", is_busy=failed.is_busy)

    async def _mail(
        self, target: ReportTarget, day: date, domain: str, document: JsonDocument
    ) -> NoAnswer | None:
        sender = domain_of(self._submitter.sender)
        if not self._may_sign(sender):  # RFC 8460 §3: a report is signed
            return NoAnswer(f"{sender} has no key under dkim.domains")
        message = _report_message(
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


def _report_message(
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
        index=0, address=to, domain=to_domain, settings=settings, notify=frozenset({Notify.NEVER})
    )
    events = (deliverylog.accepted(message, (recipient,)),)
    return NewMessage(message, (recipient,), content, events=events)
