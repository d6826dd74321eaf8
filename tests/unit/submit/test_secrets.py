"""Guesses are few, and somebody else's right password does not wait for them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from argon2 import PasswordHasher

from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker, SecretVerdict
from tests.fakes.waiting import patient

NOW = datetime(2026, 11, 20, tzinfo=UTC)
NEIGHBOUR = "192.0.2.1"


@cache
def hashed(secret: str) -> str:
    return PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(secret)


class Desk:
    """Secrets of users whose password is their name, and what was looked at."""

    def __init__(self) -> None:
        self.now = NOW
        self.failures = Failures()
        self.secrets = SecretChecker(self.failures, clock=lambda: self.now)
        self.looked: list[bytes] = []
        self.may_look = threading.Event()
        self.may_look.set()
        verify = self.secrets._matching

        def watched(secret: bytes, hashes: list[str]) -> str | None:
            assert secret.startswith(b"app") or self.may_look.wait(patient(10))
            self.looked.append(secret)
            return verify(secret, hashes)

        self.secrets._matching = watched  # type: ignore[method-assign, assignment]

    async def judge(self, name: str, secret: str, client: str = NEIGHBOUR) -> SecretVerdict:
        exists = name.startswith("app")
        hashes = [hashed(name if exists else "nobody knows this")]
        return await self.secrets.judge(
            secret.encode(), hashes, client=client, name=name, exists=exists
        )


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    desk.may_look.set()
    desk.secrets.close()


async def test_password_is_right_for_its_user_only(desk: Desk) -> None:
    async def judge(known: str | None, password: bytes) -> SecretVerdict:
        return await desk.secrets.judge_user(password, known, client=NEIGHBOUR, name="app1")

    assert await judge(hashed("app1"), b"app1") is SecretVerdict.RIGHT
    assert await judge(hashed("app1"), b"app2") is SecretVerdict.WRONG
    assert await judge(hashed("app1"), b"") is SecretVerdict.WRONG
    assert await judge(hashed("app1"), b"app1\xff") is SecretVerdict.WRONG
    assert await judge(None, b"app1") is SecretVerdict.WRONG
    assert await judge("no hash", b"app1") is SecretVerdict.WRONG


async def test_password_that_was_right_is_forgotten_with_its_hash(desk: Desk) -> None:
    hashes = (hashed("app1"), hashed("app1"), hashed("app2"), None)
    verdicts = [
        await desk.secrets.judge_user(b"app1", known, client=NEIGHBOUR, name="x")
        for known in hashes
    ]
    assert verdicts == [
        SecretVerdict.RIGHT,
        SecretVerdict.RIGHT,
        SecretVerdict.WRONG,
        SecretVerdict.WRONG,
    ]


async def test_ten_of_many_simultaneous_guesses_are_checked(desk: Desk) -> None:
    verdicts = await asyncio.gather(*(desk.judge("app1", f"guess{n}") for n in range(120)))
    assert (verdicts.count(SecretVerdict.WRONG), verdicts.count(SecretVerdict.WAIT)) == (10, 110)
    assert len(desk.looked) == 10


async def test_few_of_many_guesses_with_many_names_are_checked(desk: Desk) -> None:
    guesses = (desk.judge(f"{kind}{n}", "guess") for n in range(300) for kind in ("x", "app"))
    verdicts = await asyncio.gather(*guesses)
    assert verdicts.count(SecretVerdict.WRONG) == 30
    # Then each name that exists has a turn, and all that do not have one together.
    assert len(desk.looked) == 30 + 285 + 1


async def test_names_that_do_not_exist_have_one_turn_together(desk: Desk) -> None:
    await asyncio.gather(*(desk.judge(f"x{n}", "guess") for n in range(300)))
    assert len(desk.looked) == 31


async def test_a_right_password_that_is_remembered_passes_beside_any_number_of_guesses(
    desk: Desk,
) -> None:
    assert await desk.judge("app1", "app1") is SecretVerdict.RIGHT
    desk.may_look.clear()
    guesses = [asyncio.ensure_future(desk.judge("app1", f"guess{n}")) for n in range(120)]
    await asyncio.sleep(0)
    assert await desk.judge("app1", "app1") is SecretVerdict.RIGHT
    desk.may_look.set()
    await asyncio.gather(*guesses)
    assert await desk.judge("app1", "guess") is SecretVerdict.WAIT
    assert await desk.judge("app1", "app1") is SecretVerdict.RIGHT


async def test_a_right_password_that_is_new_passes_beside_guesses_at_other_names(
    desk: Desk,
) -> None:
    guesses = [desk.judge(f"x{n}", "guess") for n in range(60)]
    guesses += [desk.judge("app1", f"guess{n}") for n in range(60)]
    await asyncio.gather(*guesses)
    assert await desk.judge("app1", "guess") is SecretVerdict.WAIT
    assert await desk.judge("app2", "app2") is SecretVerdict.RIGHT


async def test_a_right_password_that_is_new_passes_beside_guesses_at_its_name_when_it_comes_again(
    desk: Desk,
) -> None:
    await asyncio.gather(*(desk.judge("app1", f"guess{n}") for n in range(60)))
    assert await desk.judge("app1", "app1") is SecretVerdict.WAIT
    await asyncio.gather(*(desk.judge("app1", f"more{n}") for n in range(60)))
    assert await desk.judge("app1", "app1") is SecretVerdict.RIGHT


async def test_wrong_password_of_a_client_that_has_to_wait_gets_the_same_answer(desk: Desk) -> None:
    await asyncio.gather(*(desk.judge("app1", f"guess{n}") for n in range(10)))
    desk.now += timedelta(seconds=10)
    looked = len(desk.looked)
    assert await desk.judge("app1", "guess") is SecretVerdict.WAIT
    assert len(desk.looked) == looked + 1


async def test_a_right_password_does_not_wait_for_the_guesses_of_others(desk: Desk) -> None:
    strangers = [f"198.51.100.{n}" for n in range(200)]
    await asyncio.gather(*(desk.judge("x", "guess", stranger) for stranger in strangers))
    desk.may_look.clear()
    guesses = [asyncio.ensure_future(desk.judge("x", "more", stranger)) for stranger in strangers]
    await asyncio.sleep(0)
    async with asyncio.timeout(patient(9)):
        assert await desk.judge("app1", "app1") is SecretVerdict.RIGHT
    desk.may_look.set()
    await asyncio.gather(*guesses)


async def test_many_connections_with_one_right_password_cost_one_hash(desk: Desk) -> None:
    verdicts = await asyncio.gather(*(desk.judge("app1", "app1") for _ in range(50)))
    assert set(verdicts) == {SecretVerdict.RIGHT}
    assert len(desk.looked) == 1


async def test_many_right_passwords_at_once_are_all_right(desk: Desk) -> None:
    names = [f"app{n}" for n in range(50)]
    assert {await desk.judge(name, name) for name in names} == {SecretVerdict.RIGHT}
    assert not desk.failures.has_failed(NEIGHBOUR, NOW)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness")
async def test_hashing_gives_way_to_mail(desk):
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    await desk.judge("app1", "app1")
    hashing = desk.secrets._pool.submit(niceness).result(patient(10))
    assert hashing >= min(niceness() + 10, 19)
