"""The bounds of counted sessions in SQLite, what they cost, and that a queue taken over brings its
own along."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession
from relay.queue import tls_sessions
from relay.queue.sqlite.adopt import orphans
from relay.queue.store import SpoolError
from relay.queue.tls_sessions import CountedSessions, DomainSessions, ReportResult
from tests.contract.store.test_tls_sessions import BAD, DAY, EXPIRED, GOOD, NONE, STS
from tests.fakes.queued import NOW, opened


def _failing(number: int) -> TlsSession:
    return replace(BAD, failure=replace(EXPIRED, mx_host=f"mx{number}.b.example"))


async def test_failures_beyond_the_bound_are_counted_by_their_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_sessions, "FAILURES_OF_DOMAIN", 3)
    async with opened(tmp_path) as store:
        await store.count_sessions([_failing(n) for n in range(2)], at=NOW)
    async with opened(tmp_path) as store:  # the bound holds over a start
        await store.count_sessions([_failing(n) for n in range(9)], at=NOW)
        found = {one.failure: one.number for one in await store.tls_sessions(DAY, "b.example")}
    assert found == {
        _failing(0).failure: 2,
        _failing(1).failure: 2,
        _failing(2).failure: 1,
        SessionFailure(PolicyResult.EXPIRED): 6,
    }


async def test_policies_beyond_the_bound_are_counted_by_their_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_sessions, "POLICIES_OF_DOMAIN", 2)
    many = [replace(GOOD, judged_by=replace(STS, strings=(str(n),))) for n in range(5)]
    async with opened(tmp_path) as store:
        await store.count_sessions(many, at=NOW)
        found = {one.judged_by: one.number for one in await store.tls_sessions(DAY, "b.example")}
    assert found == {
        many[0].judged_by: 1,
        many[1].judged_by: 1,
        JudgedBy(PolicyType.STS, "b.example"): 3,
    }


async def test_domains_beyond_the_bound_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls_sessions, "DOMAINS_A_DAY", 2)
    many = [replace(GOOD, domain=f"{n}.example") for n in range(5)]
    async with opened(tmp_path) as store:
        await store.count_sessions([*many, *many], at=NOW)
        assert await store.tls_domains(DAY) == [
            DomainSessions("0.example", 2, 0),
            DomainSessions("1.example", 2, 0),
        ]
        await store.count_sessions(many[4:], at=NOW + timedelta(days=1))
        assert len(await store.tls_domains(DAY + timedelta(days=1))) == 1


async def test_a_policy_too_long_to_keep_is_counted_without_its_text(tmp_path: Path) -> None:
    long = replace(GOOD, judged_by=replace(STS, strings=("x" * 20_000,)))
    async with opened(tmp_path) as store:
        await store.count_sessions([long], at=NOW)
        found = await store.tls_sessions(DAY, "b.example")
    assert found == [CountedSessions(JudgedBy(PolicyType.STS, "b.example"), None, 1)]


async def test_sessions_of_a_transaction_that_was_rolled_back_are_written_by_the_next(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        # Both are in one batch, which is undone for the sake of the second.
        counted, refused = await asyncio.gather(
            store.count_sessions([GOOD], at=NOW),
            store.finish_tls_report(DAY, "b.example", "", ReportResult.SENT),
            return_exceptions=True,
        )
        assert counted is None
        assert isinstance(refused, SpoolError)
        assert await store.tls_sessions(DAY, "b.example") == [CountedSessions(STS, None, 1)]


async def test_a_batch_of_results_costs_one_statement_more(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.count_sessions([GOOD, BAD, TlsSession("b.example", NONE)], at=NOW)
        said: list[str] = []
        await store._write(lambda db: db.set_trace_callback(said.append))
        await store.count_sessions([GOOD, BAD, TlsSession("b.example", NONE)] * 20, at=NOW)
        about = [one for one in said if "tls_" in one]
        assert len(about) == 1
        assert about[0].startswith("INSERT INTO tls_session")


async def test_sessions_of_a_worker_that_is_no_more_are_added(tmp_path: Path) -> None:
    for path in (tmp_path / "worker-1", tmp_path):
        async with opened(path) as store:
            await store.count_sessions([GOOD, BAD], at=NOW)
    found = orphans(tmp_path, "worker-", present=())
    async with opened(tmp_path, adopting=found) as store:
        assert set(await store.tls_sessions(DAY, "b.example")) == {
            CountedSessions(STS, None, 2),
            CountedSessions(STS, EXPIRED, 2),
        }


async def test_a_queue_of_the_version_before_gets_the_tables(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store._write(
            lambda db: (
                [
                    db.execute(f"DROP TABLE {one}")
                    for one in ("tls_policy", "tls_session", "tls_report")
                ]
                and db.execute("PRAGMA user_version = 7")
            )
        )
    async with opened(tmp_path) as store:
        await store.count_sessions([GOOD], at=NOW)
        assert await store.tls_days() == [DAY]
