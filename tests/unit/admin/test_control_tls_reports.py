"""The operator's verbs for reports on TLS, over the control socket's requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast

import pytest

from relay.admin.control import Control
from relay.admin.operator import Operator
from relay.admin.requests import RequestError
from relay.queue.store import Store
from relay.queue.tls_sessions import DomainSessions, ListedReport, ReportState, SentReport

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
TODAY, YESTERDAY = NOW.date(), NOW.date() - timedelta(days=1)
DOCUMENT = {"report-id": "1@us.example"}


class Reports:
    """As `relay.deliver.tls_reports.TlsReporter`, with one domain."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, date | None]] = []
        self.reason = ""

    async def document(self, domain: str, day: date | None = None) -> dict[str, Any] | None:
        self.asked.append((domain, day))
        return DOCUMENT if domain == "b.example" else None

    async def listing(self) -> AsyncIterator[list[ListedReport]]:
        sessions = DomainSessions("b.example", 5, 2)
        yield [ListedReport(TODAY, sessions, ReportState.SO_FAR, NOW)]
        yield [ListedReport(YESTERDAY, sessions, ReportState.SENT)]

    async def send(self, domain: str = "", day: date | None = None) -> AsyncIterator[SentReport]:
        self.asked.append((domain, day))
        if domain in ("", "b.example"):
            state = ReportState.DUE if self.reason else ReportState.SENT
            yield SentReport(YESTERDAY, "b.example", state, self.reason)

    def is_over(self, day: date) -> bool:
        return day < TODAY


@pytest.fixture
def reports() -> Reports:
    return Reports()


async def ask(reports: Reports | None, verb: str, **request: Any) -> list[dict[str, Any]]:
    nothing = cast(Store, None)
    control = Control(Operator(nothing, lambda: NOW), tls_reports=reports)
    return [line async for line in control.answer({"verb": f"tls-report-{verb}", **request})]


async def test_reports_are_listed_with_their_state(reports: Reports) -> None:
    first, second, done = await ask(reports, "list")
    assert first["items"] == [
        {
            "day": "2030-01-31",
            "domain": "b.example",
            "successful": 5,
            "failed": 2,
            "state": "so-far",
            "due": "2030-01-31T12:00:00+00:00",
        }
    ]
    assert (second["items"][0]["state"], second["items"][0]["due"]) == ("sent", None)
    assert done == {"done": {"unknown": []}}


async def test_a_report_is_shown_as_it_is_so_far(reports: Reports) -> None:
    item, done = await ask(reports, "show", domain="B.example.")
    assert (item, done) == ({"item": DOCUMENT}, {"done": {"unknown": []}})
    await ask(reports, "show", domain="b.example", day="2030-01-30")
    assert reports.asked == [("b.example", None), ("b.example", YESTERDAY)]


@pytest.mark.parametrize("verb", ["show", "send"])
async def test_a_domain_without_sessions_is_unknown(reports: Reports, verb: str) -> None:
    assert await ask(reports, verb, domain="c.example") == [{"done": {"unknown": ["c.example"]}}]


async def test_reports_are_sent_on_demand(reports: Reports) -> None:
    item, done = await ask(reports, "send")
    assert item["item"] == {
        "day": "2030-01-30",
        "domain": "b.example",
        "state": "sent",
        "reason": "",
        "was-settled": False,
    }
    assert done == {"done": {"unknown": []}}
    reports.reason = "why"
    item, _ = await ask(reports, "send", domain="b.example", day="2030-01-30")
    assert (item["item"]["state"], item["item"]["reason"]) == ("due", "why")
    assert reports.asked == [("", None), ("b.example", YESTERDAY)]


@pytest.mark.parametrize(
    ("verb", "request_", "said"),
    [
        ("send", {"day": "2030-01-31"}, "2030-01-31 is not over"),
        ("send", {"day": "2031-01-31"}, "is not over"),
        ("send", {"day": "yesterday"}, "day is a day of UTC"),
        ("show", {}, "name a domain"),
        ("show", {"domain": "a b"}, "domain"),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused(
    reports: Reports, verb: str, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        await ask(reports, verb, **request_)
    assert reports.asked == []


async def test_the_operator_hears_that_no_reports_are_sent() -> None:
    with pytest.raises(RequestError, match=r"tls_reports\.send is false"):
        await ask(None, "list")
