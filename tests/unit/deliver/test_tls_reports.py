"""Reports on TLS go out once, to whom asks for them, whatever breaks (RFC 8460 §4.1, §5)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import pytest

from relay.deliver.https import NoAnswer
from relay.deliver.tls_report_sender import TlsReportSender
from relay.deliver.tls_reports import TlsReporter
from relay.mail.envelope import Notify
from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession
from relay.policy.rules import DestinationRule, PolicyRules
from relay.queue.entry import TLS_REPORT
from relay.queue.store import NewMessage, QueuedItem, QueueFilter, SpoolError
from relay.queue.tls_sessions import ReportResult, ReportState, SentReport
from relay.report.tls_report import Submitter, compressed
from relay.route.answers import Unanswered
from relay.route.report_time import KEPT, next_try, report_due, reports_begin
from tests.fakes.dns import FakeDns
from tests.fakes.memory_store import MemoryStore
from tests.fakes.waiting import patient
from tests.rigs.tlsrpt import read_document, read_mail

DAY = date(2026, 3, 1)
NOON = datetime.combine(DAY, time(12), UTC)
AFTER = datetime.combine(DAY, time(), UTC) + timedelta(days=1, hours=4)
US = Submitter("Example Inc.", "tls@contact.example", "postmaster@relay.example")
MAIL = "mailto:tls@b.example"
WEB = "https://b.example/tls"
FAILURE = SessionFailure(PolicyResult.EXPIRED, mx_host="mx.b.example")


def session(domain: str = "b.example", failure: SessionFailure | None = None) -> TlsSession:
    return TlsSession(domain, JudgedBy(PolicyType.NONE, domain), failure)


def record(*uris: str) -> list[bytes]:
    return [f"v=TLSRPTv1; rua={','.join(uris)}".encode()]


class TroubledStore(MemoryStore):
    """`trouble`: the names of calls that fail."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trouble: set[str] = set()

    async def finish_tls_report(
        self,
        day: date,
        domain: str,
        place: str,
        result: ReportResult,
        *,
        message: NewMessage | None = None,
    ) -> None:
        if "finish" in self.trouble:
            raise SpoolError("the disk is full")
        await super().finish_tls_report(day, domain, place, result, message=message)

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        if "release" in self.trouble:
            raise SpoolError("the disk is full")
        await super().release_tls_report(day, domain, place)


@dataclass
class World:
    """A store with sessions, domains with records, and receivers behind https."""

    now: datetime = NOON
    dns: FakeDns = field(default_factory=lambda: FakeDns(texts={}))
    store: TroubledStore = field(default_factory=lambda: TroubledStore(now=NOON))
    posted: list[tuple[str, bytes]] = field(default_factory=list)
    objection: str = ""
    is_busy: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    told: list[tuple[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=lambda: {"relay.example"})
    rules: PolicyRules = field(default_factory=PolicyRules)

    def asks(self, domain: str, *uris: str) -> None:
        self.dns.texts = {**self.dns.texts, f"_smtp._tls.{domain}": record(*uris)}

    async def post(self, url: str, octets: bytes) -> NoAnswer | None:
        if self.is_busy:
            return NoAnswer("there is no place now", is_busy=True)
        self.posted.append((url, octets))
        if "slow" in url:
            await self.gate.wait()
        return NoAnswer(self.objection) if self.objection else None

    def reporter(self) -> TlsReporter:
        sender = TlsReportSender(
            self.store,
            self.store,
            self.dns,
            post=self.post,
            submitter=US,
            rules=lambda: self.rules,
            may_sign=self.keys.__contains__,
            clock=lambda: self.now,
            on_try=lambda transport, result: self.told.append((transport, result)),
        )
        return TlsReporter(self.store, self.store, sender, clock=lambda: self.now)

    async def mails(self) -> list[QueuedItem]:
        listed = await self.store.list_messages(QueueFilter(), now=self.now)
        found = [await self.store.find_message(one.queue_id) for one in listed]
        return [one for one in found if one is not None]

    async def content(self, queue_id: str) -> bytes:
        return b"".join([piece async for piece in self.store.read_content(queue_id)])

    async def state(self, reporter: TlsReporter) -> ReportState:
        [found] = [
            one
            async for page in reporter.listing()
            for one in page
            if one.sessions.domain == "b.example"
        ]
        return found.state


@pytest.fixture
async def world() -> World:
    world = World()
    await world.store.count_sessions([session(), session(failure=FAILURE)], at=NOON)
    return world


async def test_a_domain_that_asks_for_it_gets_a_mail_about_the_day_before(world: World) -> None:
    world.asks("b.example", MAIL)
    reporter = world.reporter()
    world.now = AFTER
    await reporter.send_due()
    [item] = await world.mails()
    mail = read_mail(await world.content(item.message.queue_id))
    assert mail.document == await reporter.document("b.example", DAY)
    assert mail.document["policies"][0]["summary"] == {
        "total-successful-session-count": 1,
        "total-failure-session-count": 1,
    }
    assert world.told == [("mail", "sent")]


async def test_the_mail_waives_policies_and_is_given_up_after_a_day_in_silence(
    world: World,
) -> None:
    world.asks("b.example", MAIL)
    world.now = AFTER
    await world.reporter().send_due()
    [item] = await world.mails()
    message, [recipient] = item.message, item.recipients
    assert message.origin == TLS_REPORT
    assert message.tls_required_no
    assert message.reverse_path == "postmaster@relay.example"
    assert message.terms is not None
    assert message.terms.lifetime == timedelta(hours=24)
    assert recipient.address == "tls@b.example"
    assert recipient.notify == {Notify.NEVER}
    assert not recipient.settings.require_tls.value


async def test_a_locked_rule_of_the_operator_holds_for_reports_too(world: World) -> None:
    locked = DestinationRule(require_tls=True, allow_override=False)
    world.rules = PolicyRules(destinations={"b.example": locked})
    world.asks("b.example", MAIL)
    world.now = AFTER
    await world.reporter().send_due()
    [item] = await world.mails()
    assert item.recipients[0].settings.require_tls.value


async def test_a_report_is_posted_to_an_https_target(world: World) -> None:
    world.asks("b.example", WEB)
    world.now = AFTER
    reporter = world.reporter()
    await reporter.send_due()
    [(url, octets)] = world.posted
    assert url == WEB
    assert read_document(octets) == await reporter.document("b.example", DAY)
    assert world.told == [("https", "sent")]


async def test_a_report_goes_to_all_places_once(world: World) -> None:
    world.asks("b.example", MAIL, WEB, "https://c.example/")
    world.now = AFTER
    for reporter in (world.reporter(), world.reporter()):  # a restart
        await reporter.send_due()
        await reporter.send_due()
        world.store = TroubledStore(now=world.now, after=world.store)
    assert len(await world.mails()) == 1
    assert sorted(url for url, _ in world.posted) == [WEB, "https://c.example/"]


async def test_two_who_send_at_the_same_moment_send_one(world: World) -> None:
    world.asks("b.example", MAIL, WEB)
    world.now = AFTER
    await asyncio.gather(*(world.reporter().send_due() for _ in range(5)))
    assert len(await world.mails()) == 1
    assert len(world.posted) == 1


async def test_nothing_is_sent_before_the_day_is_over_and_its_moment_has_come(world: World) -> None:
    world.asks("b.example", MAIL)
    reporter, due = world.reporter(), report_due(DAY, "b.example")
    for at in (NOON, reports_begin(DAY) - timedelta(minutes=4), due - timedelta(seconds=1)):
        world.now = at
        await reporter.send_due()
        assert await world.mails() == []
    world.now = due
    await reporter.send_due()
    assert len(await world.mails()) == 1


async def test_a_domain_that_asks_for_nothing_is_looked_at_once(world: World) -> None:
    reporter = world.reporter()
    world.now = AFTER
    for _ in range(3):
        await reporter.send_due()
        world.now += timedelta(hours=1)
    assert world.dns.asked == ["TXT _smtp._tls.b.example"]
    assert await world.state(reporter) is ReportState.NOT_WANTED
    assert world.told == []


async def test_a_record_that_cannot_be_looked_up_is_asked_for_again(world: World) -> None:
    world.dns.texts = {"_smtp._tls.b.example": Unanswered("SERVFAIL")}
    reporter = world.reporter()
    world.now = AFTER
    await reporter.send_due()
    assert await world.state(reporter) is ReportState.DUE
    world.asks("b.example", MAIL)
    await reporter.send_due()
    assert await world.mails() == []  # not at once
    world.now += timedelta(minutes=10)
    await reporter.send_due()
    assert len(await world.mails()) == 1


async def test_a_receiver_that_does_not_take_it_is_tried_for_24_hours(world: World) -> None:
    world.asks("b.example", WEB)
    world.objection = "b.example answers with status 500"
    reporter = world.reporter()
    began = world.now = AFTER
    for _ in range(60 * 30):
        await reporter.send_due()
        world.now += timedelta(minutes=1)
    assert 5 <= len(world.posted) <= 12
    assert len({octets for _, octets in world.posted}) == 1
    assert await world.state(reporter) is ReportState.GIVEN_UP
    assert world.told[-1] == ("https", "given-up")
    assert set(world.told[:-1]) == {("https", "failed")}
    assert world.now - began > timedelta(hours=24)


async def test_a_server_without_a_place_is_asked_a_minute_later_and_not_given_up(
    world: World,
) -> None:
    world.asks("b.example", WEB)
    world.is_busy = True
    reporter = world.reporter()
    world.now = AFTER
    for _ in range(3):
        await reporter.send_due()
        world.now += timedelta(hours=20)
    assert world.told == []
    world.is_busy = False
    world.now += timedelta(minutes=1)
    await reporter.send_due()
    assert world.told == [("https", "sent")]


async def test_slow_servers_keep_no_other_domain_waiting(world: World) -> None:
    slow = [session(f"{n}.slow.example") for n in range(60)]
    await world.store.count_sessions(slow, at=NOON)
    for one in slow:
        world.asks(one.domain, f"https://{one.domain}/")
    world.asks("b.example", MAIL)
    world.now = AFTER
    sending = asyncio.create_task(world.reporter().send_due())
    async with asyncio.timeout(patient(10)):
        while not (len(world.posted) == len(slow) and await world.mails()):
            await asyncio.sleep(0.01)
    assert not sending.done()
    world.gate.set()
    await sending


async def test_report_that_is_being_sent_at_the_end_is_broken_off(world: World) -> None:
    world.asks("b.example", "https://slow.example/")
    reporter = world.reporter()
    world.now = AFTER
    sending = asyncio.create_task(reporter.send_due())
    async with asyncio.timeout(patient(10)):
        while not world.posted:
            await asyncio.sleep(0.01)
    await reporter.close()
    await asyncio.gather(sending, return_exceptions=True)
    await reporter.send_due()  # nothing begins any more
    assert len(world.posted) == 1
    assert await world.store.claim_tls_report(DAY, "b.example", "https://slow.example/")


async def test_a_place_that_fails_does_not_have_the_others_written_to_again(world: World) -> None:
    world.asks("b.example", WEB, MAIL)
    world.objection = "b.example answers with status 500"
    reporter = world.reporter()
    world.now = AFTER
    await reporter.send_due()
    assert len(await world.mails()) == 1
    world.objection = ""
    world.now += timedelta(minutes=10)
    await reporter.send_due()
    assert len(world.posted) == 2
    assert len(await world.mails()) == 1
    assert await world.state(reporter) is ReportState.SENT


@pytest.mark.parametrize("trouble", [{"finish"}, {"finish", "release"}])
async def test_a_store_in_trouble_delays_a_report_and_doubles_none(
    world: World, trouble: set[str]
) -> None:
    world.asks("b.example", MAIL)
    reporter = world.reporter()
    world.store.trouble = trouble
    world.now = AFTER
    await reporter.send_due()
    assert await world.mails() == []
    world.store.trouble = set()
    for _ in range(3):
        world.now += timedelta(minutes=10)
        await reporter.send_due()
    assert len(await world.mails()) == 1
    assert await world.state(reporter) is ReportState.SENT


async def test_a_report_that_cannot_be_signed_is_not_mailed(world: World) -> None:
    world.keys.clear()
    world.asks("b.example", MAIL)
    reporter = world.reporter()
    world.now = AFTER
    await reporter.send_due()
    assert await world.mails() == []
    assert await world.state(reporter) is ReportState.DUE


async def test_a_report_that_was_missed_is_sent_later(world: World) -> None:
    world.asks("b.example", MAIL)
    world.now = AFTER + timedelta(days=3)
    await world.reporter().send_due()
    assert len(await world.mails()) == 1


async def test_each_domain_and_day_has_a_report_of_its_own(world: World) -> None:
    world.asks("b.example", MAIL)
    world.asks("c.example", "mailto:tls@c.example")
    await world.store.count_sessions([session("c.example")], at=NOON)
    await world.store.count_sessions([session()], at=NOON + timedelta(days=1))
    world.now = AFTER + timedelta(days=1)
    await world.reporter().send_due()
    documents = [
        read_mail(await world.content(one.message.queue_id)) for one in await world.mails()
    ]
    told = {
        (one.message["TLS-Report-Domain"], one.document["date-range"]["start-datetime"][:10])
        for one in documents
    }
    assert len(documents) == 3
    assert told == {
        ("b.example", "2026-03-01"),
        ("b.example", "2026-03-02"),
        ("c.example", "2026-03-01"),
    }


# --- the operator ---------------------------------------------------------------------------------


async def sent(reporter: TlsReporter, *what: Any) -> list[SentReport]:
    return [one async for one in reporter.send(*what)]


async def test_the_operator_has_all_days_that_are_over_sent_at_once(world: World) -> None:
    world.asks("b.example", MAIL)
    await world.store.count_sessions([session()], at=NOON + timedelta(days=1))
    world.now = datetime.combine(DAY, time(0, 0, 1), UTC) + timedelta(days=1)
    reporter = world.reporter()
    assert await sent(reporter) == [SentReport(DAY, "b.example", ReportState.SENT)]
    assert await sent(reporter) == []
    assert await sent(reporter, "b.example") == [
        SentReport(DAY, "b.example", ReportState.SENT, was_settled=True)
    ]
    world.now = AFTER
    await reporter.send_due()
    assert len(await world.mails()) == 1


async def test_a_report_that_the_operator_sends_as_it_becomes_due_is_sent_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.asks("b.example", MAIL)
    world.now = AFTER
    reporter = world.reporter()
    await asyncio.gather(sent(reporter, "b.example"), reporter.send_due(), sent(reporter))
    assert len(await world.mails()) == 1
    assert "ERROR" not in caplog.text


async def test_the_operator_has_one_domain_or_day_sent(world: World) -> None:
    world.asks("b.example", MAIL)
    world.asks("c.example", "mailto:tls@c.example")
    await world.store.count_sessions([session("c.example")], at=NOON)
    await world.store.count_sessions([session()], at=NOON + timedelta(days=1))
    world.now = AFTER + timedelta(days=1)
    reporter = world.reporter()
    assert [one.domain for one in await sent(reporter, "c.example")] == ["c.example"]
    assert [one.day for one in await sent(reporter, "", DAY)] == [DAY]
    assert await sent(reporter, "d.example") == []


async def test_the_operator_hears_why_a_report_was_not_sent(world: World) -> None:
    world.asks("b.example", WEB)
    world.objection = "b.example answers with status 404"
    world.now = AFTER
    reporter = world.reporter()
    [found] = await sent(reporter, "b.example")
    assert found == SentReport(
        DAY, "b.example", ReportState.DUE, f"{WEB}: b.example answers with status 404"
    )


async def test_the_report_so_far_is_shown(world: World) -> None:
    reporter = world.reporter()
    document = await reporter.document("b.example")
    assert document is not None
    read_document(compressed(document))
    assert await reporter.document("c.example") is None
    world.now += timedelta(days=1)
    assert await reporter.document("b.example") is None
    assert await world.state(reporter) is ReportState.DUE


# --- when -----------------------------------------------------------------------------------------


def test_reports_are_spread_over_four_hours_of_the_night() -> None:
    dues = sorted(report_due(DAY, f"{n}.example") for n in range(500))
    midnight = datetime.combine(DAY, time(), UTC) + timedelta(days=1)
    assert dues[0] >= midnight + timedelta(minutes=5)
    assert dues[-1] < midnight + timedelta(hours=4)
    assert dues[250] - midnight > timedelta(hours=1)
    assert report_due(DAY, "b.example") == report_due(DAY, "b.example")


def test_waits_grow_and_the_last_try_is_after_24_hours() -> None:
    first = at = AFTER
    waits = []
    tries = 1
    while (then := next_try(tries, first=first, now=at)) is not None:
        waits.append(then - at)
        at, tries = then, tries + 1
    assert at == first + timedelta(hours=24)
    assert waits[:4] == [timedelta(minutes=10 * 2**n) for n in range(4)]
    assert timedelta(hours=28) < KEPT
