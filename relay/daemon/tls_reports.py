"""Reports on TLS, put together: who posts them, in whose name, and from which counts."""

from __future__ import annotations

from datetime import timedelta

import aiohttp
from yarl import URL

from relay.daemon.assemble import Parts
from relay.deliver.https import HttpsClient, NoAnswer
from relay.deliver.tls_report_sender import TlsReportSender
from relay.deliver.tls_reports import TlsReporter
from relay.queue.tls_sessions import TlsSessionsView
from relay.report.tls_report import MEDIA_TYPE

_AT_ONCE = 20
_TIMEOUT = timedelta(minutes=1)


def make_reporter(parts: Parts, view: TlsSessionsView) -> TlsReporter | None:
    """Who sends the reports of all workers; None where none are sent, or another worker does it."""
    config = parts.config
    if not (config.tls_reports.send and parts.worker.is_first):
        return None
    https = HttpsClient(
        parts.resolver,
        judge=parts.router.judge,
        context=lambda: parts.contexts.verifying(config.tls.min_version),
        timeout=_TIMEOUT,
        at_once=_AT_ONCE,
    )

    async def post(url: str, octets: bytes) -> NoAnswer | None:
        try:
            where = URL(url)
        except ValueError as error:
            return NoAnswer(str(error))
        headers = {"Content-Type": MEDIA_TYPE}
        return await https.ask(where, _objection, headers=headers, body=octets, waits=False)

    sender = TlsReportSender(
        view,
        parts.store,
        parts.resolver,
        post=post,
        submitter=config.tls_reports.submitter(config.hostname),
        rules=parts.rules,
        may_sign=lambda domain: domain in parts.signing_keys,
        clock=parts.clock,
        on_try=parts.metrics.tls_report,
    )
    return TlsReporter(view, parts.store, sender, clock=parts.clock)


async def _objection(answer: aiohttp.ClientResponse) -> NoAnswer | None:
    """Why a report was not taken; None: it was (RFC 8460 §5.4)."""
    if 200 <= answer.status < 300:
        return None
    return NoAnswer(f"{answer.url.host} answers with status {answer.status}")
