"""When a login may be tried."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from relay.route.credentials import CredentialsError, HeldToken, RouteCredentials
from relay.route.next_hop import Auth, AuthMechanism, Credentials, NextHop
from relay.workers.shared_rests import SharedRests
from tests.fakes.waiting import patient

HOST = "smtp.example"
WORDS = "smtp.example [192.0.2.1] refuses the login: 535 5.7.8 no"


class Rig:
    def __init__(self, directory: Path) -> None:
        self.now = 0.0
        self.told: list[str] = []
        self.logins = RouteCredentials(clock=lambda: self.now, on_refusal=self.told.append)
        self.file = directory / "password"
        self.file.write_text("open sesame\nsecond line\n")
        auth = Auth(username="us", password_file=str(self.file))
        self.hop = NextHop("provider", ((HOST,),), auth=auth)

    async def login(self) -> Credentials:
        found = await self.logins.of(self.hop)
        assert found is not None
        return found


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


async def test_password_is_the_first_line_and_read_again_when_the_file_changes(rig: Rig) -> None:
    assert (await rig.login()).password == "open sesame"
    rig.file.write_text("another\r\n")
    assert (await rig.login()).password == "another"


@pytest.mark.parametrize("octets", [b"\xef\xbb\xbfopen sesame\r\n", b"\xef\xbb\xbfopen sesame"])
async def test_byte_order_mark_is_no_part_of_a_password(rig: Rig, octets: bytes) -> None:
    rig.file.write_bytes(octets)
    assert (await rig.login()).password == "open sesame"


async def test_name_of_a_password_file_that_may_be_the_password_is_not_shown(rig: Rig) -> None:
    hop = replace(rig.hop, auth=Auth(username="us", password_file="hunter2"))
    with pytest.raises(CredentialsError, match="No such file") as error:
        await rig.logins.of(hop)
    assert "hunter2" not in str(error.value)


async def test_refused_login_rests_for_1_5_15_minutes(rig: Rig) -> None:
    for minutes in (1, 5, 15, 15):
        rig.logins.refused(rig.hop, await rig.login(), HOST, WORDS)
        for later in (0.0, minutes * 60 - 1.5):
            rig.now += later
            with pytest.raises(CredentialsError) as error:
                await rig.login()
            assert error.value.status == "4.7.8"
            assert WORDS in str(error.value)
            rig.now -= later
        rig.now += minutes * 60
    assert rig.told == ["provider"] * 4


async def test_login_rests_at_the_host_that_refused_it(rig: Rig) -> None:
    rig.hop = replace(rig.hop, hosts=((HOST, "b.example"), ("c.example",)))
    login = await rig.login()
    for host in (HOST, "b.example"):
        rig.logins.refused(rig.hop, login, host, WORDS)
        assert WORDS in rig.logins.rest(rig.hop, login, host)
        assert rig.logins.rest(rig.hop, login, "c.example") == ""
        assert await rig.login() == login
    rig.logins.refused(rig.hop, login, "c.example", WORDS)
    with pytest.raises(CredentialsError):
        await rig.login()


async def test_refusals_of_connections_at_the_same_time_count_once(rig: Rig) -> None:
    login = await rig.login()
    for _ in range(5):
        rig.logins.refused(rig.hop, login, HOST, WORDS)
    assert len(rig.told) == 1
    rig.now += 60
    assert await rig.login() == login


async def test_accepted_login_rests_for_a_minute_when_it_is_refused_again(rig: Rig) -> None:
    login = await rig.login()
    rig.logins.refused(rig.hop, login, HOST, WORDS)
    rig.now += 60
    rig.logins.accepted(rig.hop, login, HOST)
    rig.logins.refused(rig.hop, login, HOST, WORDS)
    rig.now += 60
    assert await rig.login() == login


async def test_password_that_was_corrected_does_not_rest(rig: Rig) -> None:
    rig.logins.refused(rig.hop, await rig.login(), HOST, WORDS)
    rig.file.write_text("the right one\n")
    assert (await rig.login()).password == "the right one"


async def test_reload_ends_a_rest(rig: Rig) -> None:
    rig.logins.refused(rig.hop, await rig.login(), HOST, WORDS)
    rig.logins.forget()
    await rig.login()


async def test_unproven_login_is_tried_by_one_connection_at_a_time(rig: Rig) -> None:
    login = await rig.login()
    tried: list[int] = []

    async def one(number: int) -> None:
        with contextlib.suppress(CredentialsError):
            async with rig.logins.turn(rig.hop, login, HOST):
                tried.append(number)
                await asyncio.sleep(0.01)
                rig.logins.refused(rig.hop, login, HOST, WORDS)

    await asyncio.gather(*map(one, range(20)))
    assert tried == [0]


async def test_proven_login_is_used_by_all_connections_at_once(rig: Rig) -> None:
    login = await rig.login()
    rig.logins.accepted(rig.hop, login, HOST)
    async with asyncio.timeout(patient(5)):
        async with rig.logins.turn(rig.hop, login, HOST), rig.logins.turn(rig.hop, login, HOST):
            pass


async def test_login_without_password_token_or_certificate_is_a_mistake(rig: Rig) -> None:
    hop = NextHop("provider", (("smtp.example",),), auth=Auth(username="us"))
    with pytest.raises(CredentialsError, match="has no password_file") as error:
        await rig.logins.of(hop)
    assert error.value.status == "4.3.5"


@pytest.mark.parametrize(
    ("auth", "certificate"),
    [(Auth(mechanism=AuthMechanism.EXTERNAL), None), (Auth(username="us"), "us.pem")],
)
async def test_login_by_certificate_needs_no_password(
    rig: Rig, auth: Auth, certificate: str | None
) -> None:
    hop = NextHop("provider", (("smtp.example",),), auth=auth, certificate=certificate)
    assert await rig.logins.of(hop) == Credentials(auth.username or "", mechanism=auth.mechanism)


Workers = tuple[RouteCredentials, RouteCredentials]


@pytest.fixture
def workers(rig: Rig) -> Workers:
    """The logins of two workers."""
    rests = SharedRests()
    one, other = (RouteCredentials(rests=rests, clock=lambda: rig.now) for _ in range(2))
    return one, other


async def test_workers_share_the_rest_of_a_login_and_its_turn(rig: Rig, workers: Workers) -> None:
    one, other = workers
    login = await rig.login()
    tried: list[int] = []

    async def try_it(number: int) -> None:
        logins = workers[number % 2]
        with contextlib.suppress(CredentialsError):
            async with logins.turn(rig.hop, login, HOST):
                tried.append(number)
                await asyncio.sleep(0.02)
                logins.refused(rig.hop, login, HOST, WORDS)

    await asyncio.gather(*map(try_it, range(10)))
    assert tried == [0]
    with pytest.raises(CredentialsError, match="as the log of another worker says"):
        await other.of(rig.hop)
    rig.now += 60
    assert await other.of(rig.hop) == login
    other.accepted(rig.hop, login, HOST)
    one.refused(rig.hop, login, HOST, WORDS)
    rig.now += 60
    assert await one.of(rig.hop) == login, "the first refusal of a new row"


async def test_corrected_password_does_not_rest_in_another_worker(
    rig: Rig, workers: Workers
) -> None:
    one, other = workers
    one.refused(rig.hop, await rig.login(), HOST, WORDS)
    rig.file.write_text("the right one\n")
    found = await other.of(rig.hop)
    assert found is not None
    assert found.password == "the right one"


async def test_reload_of_one_worker_ends_the_rest_for_all(rig: Rig, workers: Workers) -> None:
    one, other = workers
    login = await rig.login()
    one.refused(rig.hop, login, HOST, WORDS)
    one.forget()
    assert await other.of(rig.hop) == login


async def test_worker_that_hangs_while_it_tries_holds_up_no_other_for_ever(
    rig: Rig, workers: Workers
) -> None:
    one, other = workers
    login = await rig.login()
    async with one.turn(rig.hop, login, HOST):
        waiting = asyncio.create_task(other.turn(rig.hop, login, HOST).__aenter__())
        await asyncio.sleep(0.15)
        assert not waiting.done()
        rig.now += 31
        await asyncio.wait_for(waiting, patient(5))


async def test_attempt_cancelled_while_another_worker_tries_keeps_no_turn(
    rig: Rig, workers: Workers
) -> None:
    one, other = workers
    login = await rig.login()
    async with one.turn(rig.hop, login, HOST):
        waiting = asyncio.create_task(other.turn(rig.hop, login, HOST).__aenter__())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(patient(5)), other.turn(rig.hop, login, HOST):
        pass


class Held:
    """Gives one token after the other."""

    def __init__(self) -> None:
        self.count = 1

    async def token(self, name: str) -> HeldToken:
        return HeldToken(f"{name}-{self.count}")

    async def anew(self, name: str, refused: str) -> HeldToken:
        self.count += refused == f"{name}-{self.count}"
        return HeldToken(f"{name}-{self.count}", is_fresh=True)


async def test_login_by_token_asks_for_it_and_for_another_one() -> None:
    logins = RouteCredentials(Held())
    hop = NextHop("m365", (("smtp.example",),), auth=Auth(username="us", oauth2="app"))
    first = await logins.of(hop)
    assert first is not None
    assert (first.token, first.is_fresh) == ("app-1", False)
    second = await logins.anew(hop, first)
    assert (second.token, second.is_fresh, second.username) == ("app-2", True, "us")


@pytest.mark.parametrize("mechanism", [AuthMechanism.PLAIN, AuthMechanism.LOGIN])
async def test_login_by_password_asks_for_no_token(rig: Rig, mechanism: AuthMechanism) -> None:
    auth = Auth(mechanism, "us", str(rig.file), "app")
    found = await RouteCredentials(Held()).of(replace(rig.hop, auth=auth))
    assert found is not None
    assert (found.password, found.token) == ("open sesame", None)


async def test_login_without_a_source_of_tokens_has_its_user_name_and_no_token() -> None:
    hop = NextHop("m365", (("smtp.example",),), auth=Auth(username="us", oauth2="app"))
    assert await RouteCredentials().of(hop) == Credentials("us")
