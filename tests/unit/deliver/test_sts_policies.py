"""Which policy holds for an attempt: record, what is kept, and fetches (RFC 8461 §3.3, §5.1)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from relay.deliver import sts_policies
from relay.deliver.sts_fetch import Fetched, FetchFailed
from relay.deliver.sts_policies import PolicyPending, StsPolicies
from relay.policy.settings import FloorUse
from relay.queue.policies import StoredPolicy
from relay.queue.sqlite.policies import SqlitePolicyCache
from relay.queue.store import SpoolError
from relay.route.answers import NoSuchName, TxtLookup, Unanswered
from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import PolicyError, StsMode, parse_policy
from relay.sandbox.policy_host import policy
from tests.fakes.dns import FakeDns
from tests.fakes.waiting import patient

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
DOMAIN = "example.net"
FETCH_ERROR = FetchFailed(PolicyError.FETCH, "mta-sts.example.net answers with status 500")


def fetched(text: bytes) -> Fetched:
    return Fetched(parse_policy(text), text)


class World:
    """A DNS, a policy host and a clock, as values; a real store."""

    def __init__(self, cache: SqlitePolicyCache) -> None:
        self.dns = FakeDns()
        self.cache = cache
        self.answer: Fetched | FetchFailed = fetched(policy("mx.example.net"))
        self.fetches: list[str] = []
        self.told: list[str] = []
        self.now = NOW
        self.gate = asyncio.Event()
        self.gate.set()
        self.policies = self.worker()

    def worker(self) -> StsPolicies:
        return StsPolicies(
            self.dns,
            self.cache,
            self._fetch,
            clock=lambda: self.now,
            monotonic=lambda: self.now.timestamp(),
            random=Random(1),
            on_fetch=lambda domain, found, before: self.told.append(domain),
        )

    async def _fetch(self, domain: str) -> Fetched | FetchFailed:
        self.fetches.append(domain)
        await self.gate.wait()
        return self.answer

    def record(self, id: str | None, domain: str = DOMAIN) -> None:
        texts: TxtLookup | list[bytes] = (
            NoSuchName() if id is None else [f"v=STSv1; id={id};".encode()]
        )
        self.dns.texts = {**self.dns.texts, f"_mta-sts.{domain}": texts}

    def later(self, **how_much: float) -> None:
        self.now += timedelta(**how_much)

    async def floor(self, use: FloorUse = FloorUse.ENFORCE, *, anew: bool = False) -> StsFloor:
        return await self.policies.floor(DOMAIN, use, anew=anew)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(sts_policies, "_PATIENCE", 60.0)  # short where it is the claim
    cache = await SqlitePolicyCache.open(tmp_path)
    world = World(cache)
    yield world
    world.gate.set()
    await world.policies.close()
    await cache.close()


# --- the first attempt ----------------------------------------------------------------------------


async def test_a_record_has_the_policy_fetched_and_kept(world: World) -> None:
    world.record("1")
    floor = await world.floor()
    assert (floor.mode, floor.id, floor.mx) == (StsMode.ENFORCE, "1", ("mx.example.net",))
    assert floor.expires == NOW + timedelta(weeks=1)
    assert floor.was_fetched
    assert floor.lines[0] == "version: STSv1"
    again = await world.floor()
    assert again == replace(floor, was_fetched=False)
    assert world.fetches == world.told == [DOMAIN]


@pytest.mark.parametrize("answer", [NoSuchName(), Unanswered("SERVFAIL"), [b"v=STSv1; id=!;"]])
async def test_without_a_record_nothing_is_fetched(
    world: World, answer: TxtLookup | list[bytes]
) -> None:
    world.dns.texts = {f"_mta-sts.{DOMAIN}": answer}
    assert await world.floor() == StsFloor(DOMAIN)
    assert not world.fetches


@pytest.mark.parametrize("error", list(PolicyError))
async def test_without_a_policy_there_is_no_floor_but_the_reason(
    world: World, error: PolicyError
) -> None:
    world.record("1")
    world.answer = FetchFailed(error, "…")
    assert await world.floor() == StsFloor(DOMAIN, error=error)
    assert not (await world.floor()).is_looked_at


@pytest.mark.parametrize(("seconds", "asked"), [(0.1, 2), (10.0, 1)])
async def test_record_that_name_servers_are_silent_about_is_asked_for_once_a_minute(
    world: World, monkeypatch: pytest.MonkeyPatch, seconds: float, asked: int
) -> None:
    questions = []

    async def txt(name: str, *, anew: bool = False) -> TxtLookup:
        questions.append(name)
        world.later(seconds=seconds)
        return Unanswered("no answer")

    monkeypatch.setattr(world.dns, "txt", txt)
    assert await world.floor() == await world.floor() == StsFloor(DOMAIN)
    assert len(questions) == asked
    world.later(minutes=1)
    await world.floor()
    await world.floor(anew=True)
    assert len(questions) == asked + 2


async def test_ignored_policy_is_not_looked_up(world: World) -> None:
    world.record("1")
    assert await world.floor(FloorUse.IGNORE) is NO_STS
    assert await world.policies.floor("") is NO_STS  # an address has no policy
    assert not world.dns.asked


async def test_the_operators_testing_spares_mail_and_changes_no_policy(world: World) -> None:
    world.record("1")
    spared = await world.floor(FloorUse.TESTING)
    assert (spared.mode, spared.published) == (StsMode.TESTING, StsMode.ENFORCE)
    assert (await world.floor()).mode is StsMode.ENFORCE


# --- a policy that is kept ------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [NoSuchName(), Unanswered("SERVFAIL"), [b"v=STSv1; id=!;"], []])
async def test_a_policy_holds_although_its_record_is_gone(
    world: World, answer: TxtLookup | list[bytes]
) -> None:
    world.record("1")
    first = await world.floor()
    world.dns.texts = {f"_mta-sts.{DOMAIN}": answer}
    world.later(days=6)
    assert await world.floor() == replace(first, was_fetched=False)


async def test_a_policy_holds_after_a_restart(world: World) -> None:
    world.record("1")
    first = await world.floor()
    world.record(None)
    assert await world.worker().floor(DOMAIN) == replace(first, was_fetched=False)
    assert len(world.fetches) == 1


async def test_another_id_has_the_policy_fetched_at_once(world: World) -> None:
    world.record("1")
    await world.floor()
    world.record("2")
    world.answer = fetched(policy("mx2.example.net"))
    floor = await world.floor()
    assert (floor.id, floor.mx) == ("2", ("mx2.example.net",))
    assert (await world.floor()).id == "2"
    assert len(world.fetches) == 2


async def test_a_policy_holds_while_a_newer_one_cannot_be_fetched(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.record("1")
    await world.floor()
    world.record("2")
    world.answer = FETCH_ERROR
    floor = await world.floor()
    assert (floor.mode, floor.id, floor.error) == (StsMode.ENFORCE, "1", None)
    [line] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "status 500" in line.message
    assert "holds until 2030-02-07" in line.message


async def test_a_policy_of_mode_none_ends_without_a_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.record("1")
    await world.floor()
    world.record("2")
    world.answer = fetched(policy(mode="none"))
    assert (await world.floor()).mode is StsMode.NONE
    assert not (await world.floor()).is_looked_at
    world.record("3")
    world.answer = FETCH_ERROR
    await world.floor()
    world.later(days=8)
    await world.floor()
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


async def test_max_age_0_holds_for_one_attempt(world: World) -> None:
    world.record("1")
    await world.floor()
    world.record("2")
    world.answer = fetched(policy("mx2.example.net", max_age=0))
    assert (await world.floor()).mx == ("mx2.example.net",)
    world.record(None)
    assert await world.floor() == StsFloor(DOMAIN)
    assert await world.cache.policies() == []


async def test_an_expired_policy_is_fetched_anew(world: World) -> None:
    world.record("1")
    await world.floor()
    world.later(days=7)
    floor = await world.floor()
    assert floor.was_fetched
    assert floor.expires == NOW + timedelta(weeks=2)


@pytest.mark.parametrize("record", ["1", None])
async def test_an_expired_policy_that_cannot_be_fetched_is_no_floor_and_one_warning(
    world: World, record: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    world.record("1")
    await world.floor()
    world.record(record)
    world.answer = FETCH_ERROR
    world.later(days=7)
    for _ in range(3):
        assert not (await world.floor()).is_looked_at
    assert await world.cache.policies() == []
    warnings = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert [DOMAIN in line and "has expired" in line for line in warnings] == [True]


async def test_a_store_that_cannot_be_read_lowers_no_floor(world: World) -> None:
    world.record("1")

    async def broken(domain: str) -> StoredPolicy | None:
        raise SpoolError("disk I/O error")

    world.cache.policy = broken  # type: ignore[method-assign]
    with pytest.raises(SpoolError):
        await world.floor()


async def test_a_policy_that_cannot_be_kept_holds_in_memory(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def full(policy: StoredPolicy) -> None:
        raise SpoolError("no space left")

    world.cache.keep = full  # type: ignore[method-assign]
    world.record("1")
    assert (await world.floor()).holds
    world.record(None)
    world.later(minutes=4)
    assert (await world.floor()).holds
    assert "cannot be kept: no space left" in caplog.text


# --- fetching -------------------------------------------------------------------------------------


async def test_after_a_failure_the_policy_host_is_left_alone_for_five_minutes(world: World) -> None:
    world.record("1")
    world.answer = FETCH_ERROR
    for _ in range(3):
        assert (await world.floor()).error is PolicyError.FETCH
    world.later(minutes=4, seconds=59)
    await world.floor()
    assert len(world.fetches) == 1
    world.answer = fetched(policy("mx.example.net"))
    world.later(seconds=1)
    assert (await world.floor()).holds
    assert len(world.fetches) == 2


async def test_ten_thousand_messages_wait_for_one_fetch(world: World) -> None:
    world.record("1")
    world.gate.clear()
    waiting = [asyncio.create_task(world.floor()) for _ in range(10_000)]
    await asyncio.sleep(0.2)
    world.gate.set()
    floors = await asyncio.gather(*waiting)
    assert world.fetches == [DOMAIN]
    assert all(floor.holds for floor in floors)


async def test_nobody_waits_long_for_a_slow_policy_host(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sts_policies, "_PATIENCE", 0.1)
    world.record("1")
    world.gate.clear()
    with pytest.raises(PolicyPending) as pending:
        await world.floor()
    assert pending.value.until == NOW + timedelta(seconds=15)
    monkeypatch.setattr(sts_policies, "_PATIENCE", 60.0)
    world.later(seconds=60)
    async with asyncio.timeout(patient(30)):
        with pytest.raises(PolicyPending):
            await world.floor()  # it has been waited for already
    assert await world.floor(FloorUse.TESTING) == StsFloor(DOMAIN)  # which never holds mail
    world.gate.set()
    await asyncio.sleep(0.05)
    assert (await world.floor()).holds
    assert len(world.fetches) == 1


async def test_a_policy_in_force_holds_while_a_newer_one_is_slow_to_come(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sts_policies, "_PATIENCE", 0.1)
    world.record("1")
    await world.floor()
    world.record("2")
    world.gate.clear()
    floor = await world.floor()
    assert (floor.id, floor.holds) == ("1", True)


async def test_cancelled_attempt_does_not_end_the_fetch_for_others(world: World) -> None:
    world.record("1")
    world.gate.clear()
    one, other = (asyncio.create_task(world.floor()) for _ in range(2))
    await asyncio.sleep(0.1)
    one.cancel()
    world.gate.set()
    assert (await other).holds


async def test_policy_that_another_worker_fetched_is_not_fetched_again(world: World) -> None:
    other = world.worker()
    world.record("1")
    await other.floor(DOMAIN)
    await world.floor()
    assert len(world.fetches) == 1
    world.record("2")
    await other.floor(DOMAIN)
    assert (await world.floor()).id == "2"  # although the older one was at hand
    assert len(world.fetches) == 2


async def test_the_record_is_looked_up_anew_before_mail_is_bounced(world: World) -> None:
    world.record("1")
    await world.floor()
    await world.floor(anew=True)
    assert world.dns.asked == ["TXT _mta-sts.example.net", "TXT _mta-sts.example.net anew"]


# --- in the background ----------------------------------------------------------------------------


async def test_a_policy_is_refetched_each_day_although_its_id_is_the_same(world: World) -> None:
    world.record("1")
    await world.floor()
    world.later(hours=12)
    await world.policies.refetch_due()
    assert len(world.fetches) == 1
    world.later(hours=12)
    await world.policies.refetch_due()
    assert len(world.fetches) == 2
    [kept] = await world.cache.policies()
    assert kept.fetched == world.now  # success extends it
    await world.policies.refetch_due()
    assert len(world.fetches) == 2


async def test_a_policy_whose_record_is_gone_is_refetched_too(world: World) -> None:
    world.record("1")
    await world.floor()
    world.record(None)
    world.later(days=1)
    await world.policies.refetch_due()
    [kept] = await world.cache.policies()
    assert (kept.id, kept.fetched) == ("1", world.now)


async def test_a_refetch_that_fails_is_a_warning_and_tried_again_another_day(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.record("1")
    await world.floor()
    world.answer = FETCH_ERROR
    world.later(days=1)
    await world.policies.refetch_due()
    await world.policies.refetch_due()
    assert len(world.fetches) == 2
    [line] = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert "status 500" in line
    [kept] = await world.cache.policies()
    assert timedelta(hours=12) <= kept.refresh_at - world.now <= timedelta(days=1)
    assert (await world.floor()).holds


async def test_an_expired_policy_that_cannot_be_refetched_is_forgotten(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.record("1")
    await world.floor()
    world.answer = FETCH_ERROR
    world.later(days=8)
    await world.policies.refetch_due()
    assert await world.cache.policies() == []
    assert "has expired" in caplog.text


# --- the operator ---------------------------------------------------------------------------------


async def test_the_operator_refreshes_at_once_whatever_failed_before(world: World) -> None:
    world.record("1")
    world.answer = FETCH_ERROR
    await world.floor()
    assert (await world.policies.refresh(DOMAIN)).reason == FETCH_ERROR.reason
    world.answer = fetched(policy("mx.example.net"))
    found = await world.policies.refresh(DOMAIN)
    assert found.kept is not None
    assert (await world.floor()).holds
    assert len(world.fetches) == 3


async def test_a_refresh_that_fails_leaves_the_policy_in_force(world: World) -> None:
    world.record("1")
    await world.floor()
    world.answer = FETCH_ERROR
    found = await world.policies.refresh(DOMAIN)
    assert found.kept is not None
    assert found.reason == FETCH_ERROR.reason


async def test_a_domain_without_a_record_has_nothing_to_refresh(world: World) -> None:
    found = await world.policies.refresh(DOMAIN)
    assert (found.kept, found.reason) == (None, "example.net has no record at _mta-sts.example.net")


async def test_policy_the_operator_forgets_is_forgotten_by_all_workers_within_seconds(
    world: World,
) -> None:
    other = world.worker()
    world.record("1")
    await world.floor()
    await other.floor(DOMAIN)
    world.record(None)
    await world.policies.forget(DOMAIN)
    assert not (await world.floor()).holds
    world.later(seconds=10)
    assert not (await other.floor(DOMAIN)).holds
