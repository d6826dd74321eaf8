"""What reports on TLS count and which are sent, as each engine keeps it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession
from relay.queue.store import SpoolError, Store
from relay.queue.tls_sessions import CountedSessions, DomainSessions, ReportResult, day_of
from tests.contract.store.conftest import Engine
from tests.fakes.queued import DELIVERED, NOW, claim_all, new_message, settled

DAY = day_of(NOW)
URI = "mailto:tls@b.example"
NONE = JudgedBy(PolicyType.NONE, "b.example")
STS = JudgedBy(PolicyType.STS, "b.example", ("version: STSv1", "mode: enforce"), ("*.b.example",))
EXPIRED = SessionFailure(
    PolicyResult.EXPIRED, "192.0.2.1", "mx.b.example", "198.51.100.7", "it ended in 2001"
)
GOOD = TlsSession("b.example", STS)
BAD = TlsSession("b.example", STS, EXPIRED)


async def test_sessions_are_counted_with_the_result_they_belong_to(store: Store) -> None:
    await store.accept(new_message(queue_id="A"))
    [entry] = await claim_all(store)
    await store.record(settled(entry, DELIVERED), sessions=(BAD, GOOD))
    assert set(await store.tls_sessions(DAY, "b.example")) == {
        CountedSessions(STS, None, 1),
        CountedSessions(STS, EXPIRED, 1),
    }


async def test_a_result_that_is_refused_counts_no_session(store: Store) -> None:
    await store.accept(new_message(queue_id="A"))
    [entry] = await claim_all(store)
    await store.record(settled(entry, DELIVERED), sessions=(GOOD,))
    with pytest.raises(SpoolError):
        await store.record(settled(entry, DELIVERED), sessions=(GOOD,))
    await store.count_sessions([GOOD], at=NOW)
    assert await store.tls_sessions(DAY, "b.example") == [CountedSessions(STS, None, 2)]


async def test_sessions_are_counted_by_day_domain_policy_and_failure(store: Store) -> None:
    other = TlsSession("c.example", JudgedBy(PolicyType.NONE, "c.example"))
    tomorrow = NOW + timedelta(days=1)
    await store.count_sessions([GOOD, GOOD, BAD, other], at=NOW)
    await store.count_sessions([GOOD, TlsSession("b.example", NONE)], at=NOW)
    await store.count_sessions([other], at=tomorrow)
    assert await store.tls_days() == [DAY, day_of(tomorrow)]
    assert await store.tls_domains(DAY) == [
        DomainSessions("b.example", 4, 1),
        DomainSessions("c.example", 1, 0),
    ]
    assert set(await store.tls_sessions(DAY, "b.example")) == {
        CountedSessions(STS, EXPIRED, 1),
        CountedSessions(STS, None, 3),
        CountedSessions(NONE, None, 1),
    }
    assert await store.tls_sessions(day_of(tomorrow), "b.example") == []


async def test_domains_come_in_pages(store: Store) -> None:
    sessions = [replace(GOOD, domain=f"{n}.example") for n in range(5)]
    await store.count_sessions(sessions, at=NOW)
    first = await store.tls_domains(DAY, limit=3)
    rest = await store.tls_domains(DAY, after=first[-1].domain, limit=3)
    assert [one.domain for one in first + rest] == [one.domain for one in sessions]


async def test_sessions_outlive_the_program(engine: Engine) -> None:
    async with engine.opened() as store:
        await store.count_sessions([GOOD, BAD], at=NOW)
    async with engine.opened() as store:
        await store.count_sessions([GOOD, BAD], at=NOW)
        assert await store.tls_domains(DAY) == [DomainSessions("b.example", 2, 2)]


async def test_a_report_is_claimed_by_one(store: Store) -> None:
    assert await store.claim_tls_report(DAY, "b.example", URI)
    assert not await store.claim_tls_report(DAY, "b.example", URI)
    assert await store.claim_tls_report(DAY, "b.example", "https://b.example/")
    assert await store.finished_tls_reports(DAY, "b.example") == {}


async def test_a_claim_that_was_released_can_be_made_again(store: Store) -> None:
    assert await store.claim_tls_report(DAY, "b.example", URI)
    await store.release_tls_report(DAY, "b.example", URI)
    assert await store.claim_tls_report(DAY, "b.example", URI)


async def test_a_finished_report_is_not_claimed_again_nor_released(engine: Engine) -> None:
    async with engine.opened() as store:
        assert await store.claim_tls_report(DAY, "b.example", URI)
        await store.finish_tls_report(DAY, "b.example", URI, ReportResult.SENT)
        await store.release_tls_report(DAY, "b.example", URI)
    async with engine.opened() as store:
        assert not await store.claim_tls_report(DAY, "b.example", URI)
        assert await store.finished_tls_reports(DAY, "b.example") == {URI: ReportResult.SENT}


async def test_claims_end_with_the_program(engine: Engine) -> None:
    async with engine.opened() as store:
        assert await store.claim_tls_report(DAY, "b.example", URI)
    async with engine.opened() as store:
        assert await store.claim_tls_report(DAY, "b.example", URI)


async def test_the_mail_with_a_report_is_accepted_as_the_report_is_finished(store: Store) -> None:
    await store.claim_tls_report(DAY, "b.example", URI)
    message = new_message(queue_id="R")
    await store.finish_tls_report(DAY, "b.example", URI, ReportResult.SENT, message=message)
    assert await store.find_message("R") is not None
    assert [entry.message.queue_id for entry in await claim_all(store)] == ["R"]


async def test_mail_of_a_report_that_is_not_claimed_is_not_accepted(store: Store) -> None:
    with pytest.raises(SpoolError):
        await store.finish_tls_report(
            DAY, "b.example", URI, ReportResult.SENT, message=new_message(queue_id="R")
        )
    assert await store.find_message("R") is None
    await store.claim_tls_report(DAY, "b.example", URI)
    await store.finish_tls_report(DAY, "b.example", URI, ReportResult.SENT)
    with pytest.raises(SpoolError):
        await store.finish_tls_report(
            DAY, "b.example", URI, ReportResult.SENT, message=new_message(queue_id="S")
        )
    assert await store.find_message("S") is None


async def test_a_domain_is_reported_when_all_of_it_is_finished(store: Store) -> None:
    for domain, place in (("b.example", URI), ("b.example", ""), ("c.example", URI)):
        assert await store.claim_tls_report(DAY, domain, place)
        await store.finish_tls_report(DAY, domain, place, ReportResult.SENT)
    assert await store.claim_tls_report(DAY, "d.example", "")
    assert await store.domains_reported(DAY) == {"b.example"}
    assert await store.domains_reported(DAY + timedelta(days=1)) == set()


async def test_sessions_of_earlier_days_are_forgotten_on_demand(store: Store) -> None:
    await store.count_sessions([GOOD], at=NOW - timedelta(days=1))
    await store.count_sessions([GOOD], at=NOW)
    yesterday = DAY - timedelta(days=1)
    for day in (yesterday, DAY):
        await store.claim_tls_report(day, "b.example", "")
        await store.finish_tls_report(day, "b.example", "", ReportResult.NOT_WANTED)
    assert await store.purge_tls_sessions(before=DAY) > 0
    assert await store.tls_days() == [DAY]
    assert await store.domains_reported(yesterday) == set()
    assert await store.domains_reported(DAY) == {"b.example"}
    assert await store.purge_tls_sessions(before=DAY) == 0
