"""A day's reports on TLS from two workers: one for each domain, with the delivery log's numbers.

So it is whatever is killed meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import dkim
import pytest

from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.policy_host import WebAnswer, policy
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from relay.sign.keys import new_key
from tests.fakes.waiting import patient
from tests.rigs.policies import World, open_world
from tests.rigs.relay import workers_of
from tests.rigs.report_receiver import ReportReceiver
from tests.rigs.tlsrpt import ReportMail, read_mail

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Counts = Counter[tuple[str, str, str]]
"""Sessions by domain, policy type and result ("" for success)."""

_ONE_MESSAGE = {"CONTENT": ScriptedReply("250 2.0.0 OK", then=Then.CLOSE)}
"""A host that ends the connection behind each message: each has a session of its own."""

HOSTS = {
    "good": Script(replies=_ONE_MESSAGE),
    "clear": Script(starttls=StartTls.ABSENT, replies=_ONE_MESSAGE),
    "expired": Script(certificate=Kind.EXPIRED, replies=_ONE_MESSAGE),
    "stranger": Script(certificate=Kind.SELF_SIGNED, replies=_ONE_MESSAGE),
}
_MESSAGES = 4
_BY_DOWNGRADE = {"starttls-not-offered": "starttls-not-supported"}
_BY_KIND = {"expired": "certificate-expired", "stranger": "certificate-not-trusted"}


class Reporting:
    """A relay that reports, the receivers, and its clock."""

    def __init__(self, world: World, receivers: AsyncExitStack) -> None:
        self.world = world
        self.sandbox = world.sandbox
        self.day: date = datetime.now(UTC).date() + timedelta(days=1)
        self.web: list[ReportReceiver] = []
        self._receivers = receivers
        self._clock = world.sandbox.directory / "clock"
        self._mail: MxServer | None = None
        self.key = new_key(world.sandbox.directory / "dkim.pem", kind="ed25519")
        self.at(time(12))

    def at(self, hour: time, *, days: int = 0) -> None:
        """Set the relay's clock, on the day or so many days later."""
        wanted = datetime.combine(self.day + timedelta(days=days), hour, UTC)
        seconds = (wanted - datetime.now(UTC)).total_seconds()
        self._clock.write_text(str(seconds))

    def now(self) -> datetime:
        """What the relay takes for the time."""
        return datetime.now(UTC) + timedelta(seconds=float(self._clock.read_text()))

    async def start(self, workers: int = 2) -> None:
        self._mail = await self.sandbox.domain("reports.test")
        relay = await self.sandbox.prepare(
            dkim={"domains": {"us.test": {"selector": "s", "key_file": "dkim.pem"}}},
            tls_reports={
                "send": True,
                "from": "tls@us.test",
                "organization": "Us",
                "contact": "tls@us.test",
            },
        )
        relay.config["workers"] = workers
        relay.program = ("tests.rigs.report_relay", str(self._clock), str(self.world.port))
        await asyncio.to_thread(relay.start)

    async def receiver(self, number: int, *statuses: int, **how: Any) -> ReportReceiver:
        """A web server that takes reports, `web1.test` and so on."""
        receiver = ReportReceiver(
            f"web{number}.test",
            *statuses,
            authority=self.sandbox.authority,
            address=f"127.14.0.{number}",
            port=self.world.port,
            **how,
        )
        await self._receivers.enter_async_context(receiver)
        self.sandbox.dns.a(receiver.name, receiver.address)
        self.web.append(receiver)
        return receiver

    def asks(self, domain: str, *places: str) -> None:
        places = places or (f"mailto:{domain}@reports.test",)
        self.sandbox.dns.txt(f"_smtp._tls.{domain}", f"v=TLSRPTv1; rua={','.join(places)}")

    def mails(self) -> list[ReportMail]:
        assert self._mail is not None
        return [read_mail(one.content) for one in self._mail.messages]

    def raw_mails(self) -> list[bytes]:
        assert self._mail is not None
        return [one.content for one in self._mail.messages]

    def documents(self) -> list[tuple[str, dict[str, Any]]]:
        """All reports that arrived, each with the domain that it is about."""
        found = [(one.message["TLS-Report-Domain"], one.document) for one in self.mails()]
        for receiver in self.web:
            for document in receiver.documents:
                found.append((document["policies"][0]["policy"]["policy-domain"], document))
        return found

    async def until(self, happened: Callable[[], bool], *, seconds: float = 90) -> None:
        async with asyncio.timeout(patient(seconds)):
            while not happened():
                await asyncio.sleep(0.02)

    def logged(self) -> Counts:
        """The sessions of the day as the delivery log has them."""
        counts: Counts = Counter()
        for event in self.sandbox.events():
            at = datetime.fromtimestamp(event["timestamp"], UTC)
            if event["event"] == "accepted" or at.date() != self.day:
                continue
            status, domain = event["delivery-status"], event["recipient-domain"]
            result = status["policy-result"] or ""
            if (downgrade := status["downgrade"]) and not result:
                kind = domain.partition(".")[0].rstrip("0123456789")
                result = _BY_DOWNGRADE.get(downgrade["reason"]) or _BY_KIND[kind]
            counts[domain, status["policy-type"], result] += 1
        return counts


def told(document: dict[str, Any], domain: str) -> Counts:
    """The sessions that a report tells of; its sums are those of its details."""
    counts: Counts = Counter()
    for one in document["policies"]:
        kind, summary = one["policy"]["policy-type"], one["summary"]
        if summary["total-successful-session-count"]:
            counts[domain, kind, ""] += summary["total-successful-session-count"]
        failures = one.get("failure-details", [])
        for failure in failures:
            counts[domain, kind, failure["result-type"]] += failure["failed-session-count"]
        total = sum(failure["failed-session-count"] for failure in failures)
        assert summary["total-failure-session-count"] == total
    return counts


@asynccontextmanager
async def open_reporting(directory: Path) -> AsyncIterator[Reporting]:
    async with open_world(directory) as world, AsyncExitStack() as receivers:
        yield Reporting(world, receivers)


async def send_mail(reporting: Reporting, domains: list[str], messages: int = _MESSAGES) -> None:
    """Messages over many connections, so that both workers get some; until each was tried."""
    sandbox = reporting.sandbox
    recipients = [f"r{n}@{domain}" for domain in domains for n in range(messages)]
    for start in range(0, len(recipients), 20):
        some = recipients[start : start + 20]
        await asyncio.gather(*(sandbox.submit("a@us.test", one) for one in some))
    found = await sandbox.all_attempted(set(recipients), seconds=90)
    assert all(found.values())


@pytest.mark.parametrize("killed", ["all", "the worker that sends"])
async def test_a_days_reports_of_two_workers_survive_a_kill_and_have_the_logs_numbers(
    tmp_path: Path, killed: str
) -> None:
    async with open_reporting(tmp_path) as reporting:
        domains = []
        for kind, script in HOSTS.items():
            for number in range(5):
                domains.append(domain := f"{kind}{number}.test")
                await reporting.sandbox.domain(domain, script)
                if number == 0:
                    await reporting.world.publish(domain, policy(f"mx.{domain}"))
                reporting.asks(domain)
        for number in range(1, 5):  # slow receivers, so that there is a middle
            await reporting.receiver(number, seconds=1.0)
            reporting.asks(f"good{number}.test", f"https://web{number}.test/tls")
            reporting.asks(f"clear{number}.test", f"https://web{number}.test/tls")
        await reporting.start()
        await send_mail(reporting, domains)
        relay = reporting.sandbox.relay
        assert relay is not None
        for name in ("spool/queue.db", "spool/worker-1/queue.db"):
            assert await _sessions_in(tmp_path / name), f"{name} counted something"
        expected = reporting.logged()

        reporting.at(time(4, 30), days=1)
        await reporting.until(lambda: len(reporting.documents()) >= 2)
        if killed == "all":
            await asyncio.to_thread(relay.kill_all)
        else:
            os.kill(workers_of(relay)[0], signal.SIGKILL)
        before = len(reporting.documents())
        assert before < len(domains), "it was killed in the middle"
        if killed == "all":
            await asyncio.to_thread(relay.start)
        await reporting.until(lambda: {d for d, _ in reporting.documents()} >= set(domains))
        await reporting.until(lambda: _states(relay, reporting.day) == {"sent"})
        await asyncio.sleep(1)

        mailed = Counter(one.message["TLS-Report-Domain"] for one in reporting.mails())
        assert set(mailed.values()) == {1}, "no domain has two mails"
        by_domain: dict[str, dict[str, str]] = {}
        for domain, document in reporting.documents():
            by_domain.setdefault(domain, {})[document["report-id"]] = json.dumps(document)
        assert by_domain.keys() == set(domains)
        assert all(len(reports) == 1 for reports in by_domain.values()), "one report each"
        received: Counts = Counter()
        for domain, reports in by_domain.items():
            [text] = reports.values()
            received.update(told(json.loads(text), domain))
        assert received == expected
        assert sum(expected.values()) == len(domains) * _MESSAGES

        for content in reporting.raw_mails():
            with pytest.MonkeyPatch.context() as patch:  # a signature of the future counts for none
                patch.setattr(dkim.time, "time", lambda: reporting.now().timestamp())
                assert _is_signed(content, reporting.key.record_text().encode())
        for day in (reporting.day, reporting.day + timedelta(days=1)):
            done = await asyncio.to_thread(
                relay.run, "tls-report", "show", "reports.test", "--day", day.isoformat()
            )
            assert done.returncode == 1, "sessions that carry reports are not counted"


def _states(relay: Any, day: date) -> set[str]:
    done = relay.run("tls-report", "list", "--json")
    assert done.returncode == 0, done.stderr
    return {one["state"] for one in json.loads(done.stdout) if one["day"] == day.isoformat()}


def _is_signed(content: bytes, public: bytes) -> bool:
    """Whether a mail has a good signature, over the fields of its report too (RFC 8460 §3)."""
    fields = content.partition(b"bh=")[0].partition(b"h=")[2].lower()
    assert b"tls-report-domain" in fields
    assert b"tls-report-submitter" in fields
    return bool(dkim.verify(content, dnsfunc=lambda name, timeout=5: public))


async def _sessions_in(path: Path) -> int:
    import sqlite3

    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return int(db.execute("SELECT coalesce(sum(number), 0) FROM tls_session").fetchone()[0])
    finally:
        db.close()


async def test_the_operator_looks_at_a_report_and_sends_it(tmp_path: Path) -> None:
    async with open_reporting(tmp_path) as reporting:
        await reporting.sandbox.domain("good1.test", HOSTS["good"])
        await reporting.world.publish("good1.test", WebAnswer(status=500))
        await reporting.receiver(1, 500, 302, 202)
        reporting.asks("good1.test", "https://web1.test/tls")
        await reporting.start(workers=1)
        await send_mail(reporting, ["good1.test"], 2)
        relay = reporting.sandbox.relay
        assert relay is not None

        def run(*arguments: str) -> tuple[int, str, str]:
            done = relay.run("tls-report", *arguments)
            return done.returncode, done.stdout, done.stderr

        async def ran(*arguments: str) -> tuple[int, str, str]:
            return await asyncio.to_thread(run, *arguments)

        day = reporting.day.isoformat()
        code, out, _ = await ran("show", "good1.test")
        assert code == 0
        assert told(json.loads(out), "good1.test") == {
            ("good1.test", "no-policy-found", ""): 2,
            ("good1.test", "sts", "sts-policy-fetch-error"): 1,
        }
        code, _, err = await ran("show", "other.test")
        assert (code, err) == (1, "other.test: no session was counted (today, UTC)\n")
        code, out, _ = await ran("list")
        assert out.startswith(f"{day} so-far     good1.test  2 successful, 1 failed  from ")
        code, _, err = await ran("send", "--day", day)
        assert (code, err) == (1, f"{day} is not over: its report would not be complete\n")
        assert await ran("send") == (0, "No report was left to send.\n", "")

        reporting.at(time(0, 1), days=1)
        for status in (500, 302):
            code, out, _ = await ran("send", "good1.test")
            assert code == 1
            assert f"web1.test answers with status {status}" in out
        code, out, _ = await ran("send", "--day", day)
        assert (code, out) == (0, f"{day} sent       good1.test\n")
        assert await ran("send") == (0, "No report was left to send.\n", "")
        [receiver] = reporting.web
        assert len(set(receiver.octets)) == 1
        assert len(receiver.octets) == 3
        reporting.at(time(5), days=1)
        await asyncio.sleep(1)
        assert len(receiver.octets) == 3, "a day sent is never sent again"
        metrics = await asyncio.to_thread(relay.run, "health")
        assert metrics.returncode == 0


async def test_an_https_receiver_has_to_prove_who_it_is(tmp_path: Path) -> None:
    async with open_reporting(tmp_path) as reporting:
        await reporting.sandbox.domain("good1.test", HOSTS["good"])
        await reporting.receiver(1, kind=Kind.WRONG_NAME)
        reporting.asks("good1.test", "https://web1.test/tls")
        await reporting.start(workers=1)
        await send_mail(reporting, ["good1.test"], 1)
        reporting.at(time(0, 1), days=1)
        relay = reporting.sandbox.relay
        assert relay is not None
        done = await asyncio.to_thread(relay.run, "tls-report", "send", "good1.test")
        assert done.returncode == 1
        assert "due" in done.stdout
        assert reporting.web[0].octets == []


async def test_nothing_is_counted_where_no_reports_are_sent(tmp_path: Path) -> None:
    async with open_reporting(tmp_path) as reporting:
        await reporting.sandbox.domain("good1.test", HOSTS["good"])
        relay = await reporting.sandbox.start()
        await send_mail(reporting, ["good1.test"], 1)
        done = await asyncio.to_thread(relay.run, "tls-report", "list")
        assert done.returncode == 1
        assert "tls_reports.send is false" in done.stderr
        assert await _sessions_in(tmp_path / "spool/queue.db") == 0
