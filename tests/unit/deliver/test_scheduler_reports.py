"""A sender gets one report a message, on the real queue: however many domains it went to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from relay.deliver import report_sender
from relay.mail.address import domain_of
from relay.mail.envelope import Notify
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, HopSession, VerifiedBy
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.queue_id import new_queue_id
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage, QueueFilter
from relay.report.gauges import Snapshot
from relay.report.metrics import Metrics
from tests.fakes.queue import CONTENT, DEFAULTS
from tests.fakes.scheduling import make_scheduler
from tests.fakes.waiting import patient

SESSION = HopSession("mx.b.example", "192.0.2.1", tls=True, verified_by=VerifiedBy.PKIX)
OK = Delivered("2.0.0", 250, "OK", session=SESSION)
NOBODY = Bounced("5.1.1", 550, "no such user", session=SESSION)
BUSY = Deferred("4.2.1", 450, "busy", session=SESSION)
TLS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DEFAULT))
MINUTES = RetrySchedule(waits=(timedelta(minutes=5),))
SILENCE = Deferred("4.4.1", Code.NO_CONNECTION, "", "mx.dead.example [192.0.2.9]: timed out")


class Hosts:
    """Answers by recipient domain; reports that arrive at their sender are kept."""

    def __init__(self, **answers) -> None:
        self.answers = {f"{name}.example": answer for name, answer in answers.items()}
        self.gates: dict[str, asyncio.Event] = {}
        self.reports: list[bytes] = []
        self.settings: list[TlsSettings] = []
        self.attempts: Counter[str] = Counter()

    async def run(self, entry: Entry, content, sessions):
        self.attempts[entry.domain] += 1
        if gate := self.gates.get(entry.domain):
            await gate.wait()
        await asyncio.sleep(0)
        if not entry.message.reverse_path:
            self.reports.append(b"".join([piece async for piece in content()]))
            self.settings.append(entry.settings)
        answer = self.answers.get(entry.domain, OK)
        return {recipient.index: answer for recipient in entry.recipients}

    def told_about(self) -> list[list[str]]:
        """The recipients each report names."""
        return self._fields("Final-Recipient: rfc822; ")

    def told(self) -> list[set[str]]:
        """What each report says of them."""
        return [set(actions) for actions in self._fields("Action: ")]

    def _fields(self, prefix: str) -> list[list[str]]:
        lines = [report.decode().split("\r\n") for report in self.reports]
        return [
            sorted(line.removeprefix(prefix) for line in of_one if line.startswith(prefix))
            for of_one in lines
        ]

    async def made(self, attempts: int) -> None:
        async with asyncio.timeout(patient(5)):
            while self.attempts.total() < attempts:
                await asyncio.sleep(0.01)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path, synchronous="OFF")
    yield opened
    await opened.close()


async def accept(
    store: SqliteStore, *recipients: str, notify: frozenset[Notify] = frozenset(), tls_for: str = ""
) -> None:
    now = datetime.now(UTC)
    message = QueuedMessage(new_queue_id(now), "a@a.example", now, len(CONTENT), MessageSummary())
    queued = tuple(
        QueuedRecipient(n, one, domain_of(one), TLS if one == tls_for else DEFAULTS, notify=notify)
        for n, one in enumerate(recipients)
    )
    await store.accept(NewMessage(message, queued, CONTENT))


@asynccontextmanager
async def running(
    store: SqliteStore,
    hosts: Hosts,
    *,
    patience: timedelta = timedelta(minutes=5),
    schedule: RetrySchedule = MINUTES,
    metrics: Metrics | None = None,
):
    loop = make_scheduler(
        store, hosts, schedule=schedule, report_patience=patience, metrics=metrics
    )
    task = asyncio.create_task(loop.run())
    try:
        yield
    finally:
        await loop.drain(timedelta(seconds=0.2))
        await task


async def reports(hosts: Hosts, count: int) -> None:
    async with asyncio.timeout(patient(20)):
        while len(hosts.reports) < count:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert len(hosts.reports) == count


async def is_empty(store: SqliteStore) -> bool:
    return not await store.list_messages(QueueFilter(), now=datetime.now(UTC))


async def test_recipients_in_three_domains_that_bounce_are_one_report(store):
    hosts = Hosts(b=NOBODY, c=NOBODY, d=NOBODY)
    async with running(store, hosts):
        await accept(store, "1@b.example", "2@c.example", "3@d.example", "4@fine.example")
        await reports(hosts, 1)
        assert hosts.told_about() == [["1@b.example", "2@c.example", "3@d.example"]]
        assert await is_empty(store)


async def test_forty_domains_that_answer_at_once_are_one_report_a_message(store):
    hosts = Hosts(**{f"d{number}": NOBODY for number in range(40)})
    async with running(store, hosts):
        for _ in range(5):
            await accept(store, *(f"x@d{number}.example" for number in range(40)))
        await reports(hosts, 5)
    assert [len(told) for told in hosts.told_about()] == [40] * 5
    assert await is_empty(store)


async def test_a_report_waits_for_the_first_attempts_elsewhere(store):
    hosts = Hosts(b=NOBODY, slow=NOBODY)
    hosts.gates["slow.example"] = asyncio.Event()
    async with running(store, hosts):
        await accept(store, "1@b.example", "2@slow.example")
        await asyncio.sleep(0.2)
        assert not hosts.reports
        hosts.gates["slow.example"].set()
        await reports(hosts, 1)
    assert hosts.told_about() == [["1@b.example", "2@slow.example"]]


async def test_report_waits_no_longer_than_its_window(store):
    hosts = Hosts(b=NOBODY, slow=NOBODY)
    hosts.gates["slow.example"] = asyncio.Event()
    async with running(store, hosts, patience=timedelta(seconds=0.3)):
        await accept(store, "1@b.example", "2@slow.example")
        await reports(hosts, 1)
        hosts.gates["slow.example"].set()
        await reports(hosts, 2)
    assert hosts.told_about() == [["1@b.example"], ["2@slow.example"]]


async def test_a_report_does_not_wait_for_second_attempts(store):
    hosts = Hosts(b=NOBODY, busy=BUSY)
    async with running(store, hosts):
        await accept(store, "1@b.example", "2@busy.example")
        await reports(hosts, 1)
    assert hosts.told_about() == [["1@b.example"]]


async def test_a_report_does_not_wait_for_a_destination_that_is_silent(store):
    hosts = Hosts(b=NOBODY, dead=SILENCE)
    async with running(store, hosts, patience=timedelta(seconds=0.3)):
        await accept(store, "0@dead.example")
        await asyncio.sleep(0.2)
        await accept(store, "1@b.example", "2@dead.example")
        await reports(hosts, 1)


async def test_report_that_a_stop_prevented_is_sent_at_the_next_start(store):
    hosts = Hosts(b=NOBODY, slow=BUSY)
    hosts.gates["slow.example"] = asyncio.Event()
    async with running(store, hosts):
        await accept(store, "1@b.example", "2@slow.example")
        await asyncio.sleep(0.2)
    assert not hosts.reports
    del hosts.gates["slow.example"]
    async with running(store, hosts):
        await reports(hosts, 1)
    assert hosts.told_about() == [["1@b.example"]]


async def test_success_and_failure_are_a_report_each(store):
    hosts = Hosts(b=NOBODY, c=NOBODY)
    async with running(store, hosts):
        everything = frozenset({Notify.SUCCESS, Notify.FAILURE})
        await accept(
            store, "1@b.example", "2@c.example", "3@d.example", "4@e.example", notify=everything
        )
        await reports(hosts, 2)
    assert sorted(hosts.told_about()) == [
        ["1@b.example", "2@c.example"],
        ["3@d.example", "4@e.example"],
    ]
    assert await is_empty(store)


def schedule_of(wait: float, *, warn_after: float, lifetime: float) -> RetrySchedule:
    second = timedelta(seconds=1)
    return RetrySchedule(
        (wait * second,), lifetime=lifetime * second, warn_after=warn_after * second
    )


async def test_a_message_that_ends_in_three_domains_is_one_delay_notice_and_one_bounce(store):
    """One answers, one is silent, and one is left alone for its silence when the message comes."""
    hosts = Hosts(busy=BUSY, dead=SILENCE, long=SILENCE)
    async with running(store, hosts, schedule=schedule_of(2, warn_after=0.2, lifetime=2.1)):
        await accept(store, "0@long.example", notify=frozenset({Notify.NEVER}))
        await hosts.made(1)
        await asyncio.sleep(0.1)
        await accept(store, "1@busy.example", "2@dead.example", "3@long.example", "4@fine.example")
        await reports(hosts, 1)
        assert hosts.attempts["long.example"] == 1
        await reports(hosts, 2)
        assert hosts.told() == [{"delayed"}, {"failed"}]
        assert hosts.told_about() == [["1@busy.example", "2@dead.example", "3@long.example"]] * 2
        assert await is_empty(store)


async def test_failures_of_a_later_round_are_one_report(store):
    hosts = Hosts(b=BUSY, c=BUSY, d=BUSY)
    async with running(store, hosts, schedule=schedule_of(0.5, warn_after=60, lifetime=120)):
        await accept(store, "1@b.example", "2@c.example", "3@d.example")
        await hosts.made(3)
        hosts.answers = dict.fromkeys(hosts.answers, NOBODY)
        await reports(hosts, 1)
        assert hosts.told_about() == [["1@b.example", "2@c.example", "3@d.example"]]
        assert await is_empty(store)


async def test_reports_are_counted_whether_they_waited_for_other_domains_or_not(store):
    hosts, metrics = Hosts(b=NOBODY, c=NOBODY), Metrics()
    async with running(store, hosts, metrics=metrics):
        await accept(store, "1@b.example")
        await reports(hosts, 1)
        await accept(store, "1@b.example", "2@c.example")
        await reports(hosts, 2)
    text = metrics.render(Snapshot()).decode()
    assert "relay_dsns_total 2.0" in text
    bounced = 'relay_deliveries_total{result="bounced",tls="true",verified="true"}'
    assert f"{bounced} 3.0" in text


async def test_failures_while_other_attempts_take_longer_are_one_report_of_each_kind(store):
    hosts = Hosts(b=BUSY, c=BUSY, d=BUSY)
    async with running(store, hosts, schedule=schedule_of(60, warn_after=0.5, lifetime=120)):
        await accept(store, "1@b.example", "2@c.example", "3@d.example")
        await hosts.made(3)
        hosts.answers["c.example"] = NOBODY
        await reports(hosts, 2)
    assert sorted(zip(hosts.told_about(), hosts.told(), strict=True)) == [
        (["1@b.example", "3@d.example"], {"delayed"}),
        (["2@c.example"], {"failed"}),
    ]


async def test_delay_notice_that_a_stop_prevented_is_sent_once_at_the_next_start(store):
    hosts = Hosts(b=BUSY, slow=BUSY)
    schedule = schedule_of(60, warn_after=0.3, lifetime=120)
    async with running(store, hosts, schedule=schedule):
        await accept(store, "1@b.example", "2@slow.example")
        await hosts.made(2)
        hosts.gates["slow.example"] = asyncio.Event()
        await hosts.made(4)
        await asyncio.sleep(0.1)
    assert not hosts.reports
    hosts.gates.clear()
    for _ in range(2):
        async with running(store, hosts, schedule=schedule):
            await reports(hosts, 1)
    assert hosts.told() == [{"delayed"}]
    assert "1@b.example" in hosts.told_about()[0]


async def test_a_report_is_as_well_protected_as_any_recipient_it_tells_about(store):
    hosts = Hosts(b=NOBODY, c=NOBODY)
    async with running(store, hosts):
        await accept(store, "1@b.example", "2@c.example", tls_for="1@b.example")
        await reports(hosts, 1)
    assert hosts.told_about() == [["1@b.example", "2@c.example"]]
    assert [settings.require_tls.value for settings in hosts.settings] == [True]


async def test_all_pending_reports_are_sent_at_the_next_start(store, monkeypatch):
    """A crash came between the results and the report; and it is more than one look at the store
    finds.
    """
    monkeypatch.setattr(report_sender, "_PAGE", 5)
    for number in range(12):
        await accept(store, f"{number}@b.example", f"{number}@c.example")
    now = datetime.now(UTC)
    for entry in await store.claim_due(now=now, limit=100):
        if entry.domain == "b.example":
            nobody = dict.fromkeys((one.index for one in entry.recipients), NOBODY)
            await store.record(settle(entry, nobody, schedule=MINUTES, now=now, has_others=True))
        else:
            await store.release(entry, due=now + timedelta(hours=1))
    hosts = Hosts()
    async with running(store, hosts):
        await reports(hosts, 12)
    assert sorted(hosts.told_about()) == sorted([f"{number}@b.example"] for number in range(12))
