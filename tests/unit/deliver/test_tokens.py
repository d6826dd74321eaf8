"""Access tokens, asked for with a scripted server and real files."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from relay.deliver.https import NoAnswer
from relay.deliver.tokens import Tokens
from relay.route.credentials import CredentialsError
from relay.route.next_hop import Grant, TokenSource
from relay.route.oauth2 import HttpAnswer, TokenRequest
from relay.route.secret_files import locked

URL = "https://login.example/token"


class Server:
    """Answers in turn; the last answer repeats."""

    def __init__(self, *answers: HttpAnswer | NoAnswer) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, str]] = []
        self.holds = asyncio.Event()
        self.holds.set()

    async def post(self, request: TokenRequest) -> HttpAnswer | NoAnswer:
        self.asked.append({name: one[0] for name, one in parse_qs(request.body.decode()).items()})
        await self.holds.wait()
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Rig:
    def __init__(self, directory: Path) -> None:
        self.now = 1000.0
        self.wall = datetime(2026, 11, 28, tzinfo=UTC)
        self.directory = directory
        self.sources: dict[str, TokenSource] = {}
        self.told: list[str] = []

    def write(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)

    def client(self) -> None:
        secret = self.write("secret", "secret-of-the-client\n")
        self.sources["m365"] = TokenSource(
            "m365", Grant.CLIENT_CREDENTIALS, URL, client_id="app", client_secret_file=secret
        )

    def own(self, token: str = "refresh-token-1") -> Path:
        path = self.write("own.token", f"{token}\n")
        self.sources["own"] = TokenSource(
            "own", Grant.REFRESH_TOKEN, URL, client_id="app", refresh_token_file=path
        )
        return Path(path)

    def tokens(self, server: Server) -> Tokens:
        return Tokens(
            lambda: self.sources,
            server.post,
            monotonic=lambda: self.now,
            clock=lambda: self.wall,
            on_request=lambda name, result: self.told.append(result),
        )


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def answer(status: int = 200, retry_after: str = "", **said: Any) -> HttpAnswer:
    return HttpAnswer(status, json.dumps(said).encode(), retry_after)


def granted(token: str, **said: Any) -> HttpAnswer:
    return answer(access_token=token, token_type="Bearer", expires_in=3600, **said)


REFUSED = answer(400, error="invalid_client")


async def failure(tokens: Tokens, name: str = "m365") -> tuple[str, str]:
    with pytest.raises(CredentialsError) as error:
        await tokens.token(name)
    return error.value.status, str(error.value)


async def test_a_thousand_who_wait_make_one_request(rig: Rig) -> None:
    rig.client()
    server = Server(granted("token-1"))
    server.holds.clear()
    tokens = rig.tokens(server)
    waiting = [asyncio.create_task(tokens.token("m365")) for _ in range(1000)]
    await asyncio.sleep(0.05)
    server.holds.set()
    held = await asyncio.gather(*waiting)
    assert {one.access for one in held} == {"token-1"}
    assert all(one.is_fresh for one in held)
    assert len(server.asked) == 1
    assert server.asked[0]["client_secret"] == "secret-of-the-client"


async def test_token_at_hand_is_used_and_said_not_to_be_fresh(rig: Rig) -> None:
    rig.client()
    server = Server(granted("token-1"))
    tokens = rig.tokens(server)
    await tokens.token("m365")
    held = await tokens.token("m365")
    assert (held.access, held.is_fresh) == ("token-1", False)
    assert len(server.asked) == 1


async def test_token_is_renewed_while_messages_use_the_old_one(rig: Rig) -> None:
    rig.client()
    server = Server(granted("token-1"), granted("token-2"))
    tokens = rig.tokens(server)
    await tokens.token("m365")
    rig.now += 3300
    assert (await tokens.token("m365")).access == "token-1"
    await tokens.close()
    assert (await tokens.token("m365")).access == "token-2"
    assert len(server.asked) == 2


async def test_token_that_cannot_be_renewed_is_used_until_it_expires(rig: Rig) -> None:
    rig.client()
    tokens = rig.tokens(Server(granted("token-1"), answer(503)))
    await tokens.token("m365")
    rig.now += 3400
    assert (await tokens.token("m365")).access == "token-1"
    await tokens.close()
    rig.now += 199
    assert (await tokens.token("m365")).access == "token-1"
    await tokens.close()
    rig.now += 1
    assert (await failure(tokens))[0] == "4.7.0"


async def test_jump_of_the_wall_clock_neither_ends_nor_keeps_a_token(rig: Rig) -> None:
    rig.client()
    server = Server(granted("token-1"), granted("token-2"))
    tokens = rig.tokens(server)
    await tokens.token("m365")
    rig.wall = rig.wall.replace(year=2036)
    assert (await tokens.token("m365")).access == "token-1"
    rig.wall = rig.wall.replace(year=2016)
    rig.now += 3600
    assert (await tokens.token("m365")).access == "token-2"


@pytest.mark.parametrize(
    ("one", "status", "waits"),
    [
        (REFUSED, "4.7.8", [60.0, 300.0, 900.0]),
        (answer(503), "4.7.0", [5.0, 10.0, 20.0]),
        (answer(429, retry_after="77"), "4.7.0", [77.0, 77.0]),
        (answer(429, retry_after="0"), "4.7.0", [5.0, 10.0, 20.0]),
        (NoAnswer("login.example took longer than 10 s"), "4.7.0", [5.0, 10.0, 20.0]),
    ],
    ids=["refused", "503", "429", "at-once", "silent"],
)
async def test_server_that_failed_is_not_asked_again_before_its_time(
    rig: Rig, one: HttpAnswer | NoAnswer, status: str, waits: list[float]
) -> None:
    rig.client()
    server = Server(one)
    tokens = rig.tokens(server)
    for count, wait in enumerate(waits, start=1):
        found, words = await failure(tokens)
        assert (found, "oauth2.m365" in words) == (status, True)
        rig.now += wait - 0.5
        assert await failure(tokens) == (found, words)
        assert len(server.asked) == count
        rig.now += 0.5


async def test_log_says_that_a_long_retry_after_is_not_obeyed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.client()
    await failure(rig.tokens(Server(answer(503, retry_after="86400"))))
    assert "asked again in 1:00:00 (its Retry-After, 1 day, 0:00:00, is too long)" in caplog.text


async def test_secret_that_was_corrected_counts_at_once(rig: Rig) -> None:
    rig.client()
    server = Server(REFUSED, granted("token-1"))
    tokens = rig.tokens(server)
    await failure(tokens)
    rig.write("secret", "the-right-secret")
    assert (await tokens.token("m365")).access == "token-1"
    assert server.asked[1]["client_secret"] == "the-right-secret"
    assert rig.told == ["refused", "granted"]


async def test_reload_lets_a_server_be_asked_again(rig: Rig) -> None:
    rig.client()
    tokens = rig.tokens(Server(REFUSED, granted("token-1")))
    await failure(tokens)
    tokens.forget_pauses()
    assert (await tokens.token("m365")).access == "token-1"


async def test_source_that_changed_in_the_configuration_gives_another_token(rig: Rig) -> None:
    rig.client()
    tokens = rig.tokens(Server(granted("token-1"), granted("token-2")))
    await tokens.token("m365")
    rig.sources["m365"] = TokenSource("m365", Grant.CLIENT_CREDENTIALS, URL, client_id="other")
    assert (await tokens.token("m365")).access == "token-2"


async def test_unknown_source_is_a_mistake_of_the_configuration(rig: Rig) -> None:
    assert await failure(rig.tokens(Server(REFUSED)), "none") == (
        "4.3.5",
        "there is no oauth2.none in the configuration",
    )


@pytest.mark.parametrize("break_it", [os.remove, lambda path: Path(path).write_text("\n")])
async def test_file_that_cannot_be_read_is_named(
    rig: Rig, break_it: Callable[[str], object]
) -> None:
    rig.client()
    path = rig.directory / "secret"
    break_it(str(path))
    server = Server(granted("token-1"))
    status, words = await failure(rig.tokens(server))
    assert status == "4.7.8"
    assert words.startswith(f"oauth2.m365: {path}: ")
    assert not server.asked


async def test_token_that_a_host_refused_is_asked_for_anew_once(rig: Rig) -> None:
    rig.client()
    server = Server(granted("token-1"), granted("token-2"))
    tokens = rig.tokens(server)
    await tokens.token("m365")
    fresh = await asyncio.gather(*(tokens.anew("m365", "token-1") for _ in range(50)))
    assert {(one.access, one.is_fresh) for one in fresh} == {("token-2", True)}
    late = await tokens.anew("m365", "token-1")
    assert (late.access, late.is_fresh) == ("token-2", True)
    assert len(server.asked) == 2


# --- refresh tokens -------------------------------------------------------------------------------


async def test_rotated_refresh_token_replaces_the_one_in_the_file(rig: Rig) -> None:
    path = rig.own()
    server = Server(
        granted("token-1", refresh_token="refresh-token-2"), granted("token-2", refresh_token="x")
    )
    tokens = rig.tokens(server)
    await tokens.token("own")
    assert path.read_text() == "refresh-token-2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rig.now += 3600
    await tokens.token("own")
    assert [one["refresh_token"] for one in server.asked] == ["refresh-token-1", "refresh-token-2"]
    assert not list(rig.directory.glob(".own.token.new"))


async def test_refresh_token_that_stays_is_not_written(rig: Rig) -> None:
    path = rig.own()
    before = path.stat().st_ino
    await rig.tokens(Server(granted("token-1", refresh_token="refresh-token-1"))).token("own")
    assert (path.stat().st_ino, path.read_text()) == (before, "refresh-token-1\n")


async def test_two_processes_never_ask_with_the_same_refresh_token(rig: Rig) -> None:
    rig.own()
    server = Server(
        granted("token-1", refresh_token="refresh-token-2"),
        granted("token-2", refresh_token="refresh-token-3"),
    )
    one, other = rig.tokens(server), rig.tokens(server)
    held = await asyncio.gather(one.token("own"), other.token("own"))
    assert {each.access for each in held} == {"token-1", "token-2"}
    assert [each["refresh_token"] for each in server.asked] == [
        "refresh-token-1",
        "refresh-token-2",
    ]


async def test_refresh_waits_for_the_lock_of_another_process(rig: Rig) -> None:
    path = rig.own()
    server = Server(granted("token-1"))
    tokens = rig.tokens(server)
    async with locked(str(path), seconds=1.0):
        waiting = asyncio.create_task(tokens.token("own"))
        await asyncio.sleep(0.2)
        assert not server.asked
    assert (await waiting).access == "token-1"


async def test_server_is_not_asked_where_a_new_refresh_token_could_not_be_written(rig: Rig) -> None:
    rig.own()
    (rig.directory / ".own.token.new").mkdir()  # root, too, may not write there
    server = Server(granted("token-1"))
    status, words = await failure(rig.tokens(server), "own")
    assert (status, server.asked) == ("4.7.8", [])
    assert "Is a directory" in words


async def test_refresh_token_that_could_not_be_written_is_used_from_memory(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = rig.own()
    server = Server(
        granted("token-1", refresh_token="refresh-token-2"), granted("token-2"), granted("token-3")
    )
    tokens = rig.tokens(server)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        await tokens.token("own")
    assert path.read_text() == "refresh-token-1\n"
    assert "the new refresh token is not written" in caplog.text
    assert "refresh-token" not in caplog.text.replace("new refresh token", "")
    rig.now += 3600
    await tokens.token("own")
    assert server.asked[1]["refresh_token"] == "refresh-token-2"
    assert path.read_text() == "refresh-token-2\n"


async def test_login_anew_is_used_from_the_next_request_on(rig: Rig) -> None:
    rig.own()
    server = Server(answer(400, error="invalid_grant"), granted("token-1"))
    tokens = rig.tokens(server)
    _, words = await failure(tokens, "own")
    assert "run `relay login own`" in words
    rig.write("own.token", "refresh-token-of-a-person\n")
    assert (await tokens.token("own")).access == "token-1"
    assert server.asked[1]["refresh_token"] == "refresh-token-of-a-person"


async def test_no_log_line_has_a_secret(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    rig.client()
    rig.own()
    server = Server(
        answer(401, error="invalid_client", error_description="secret-of-the-client is wrong"),
        NoAnswer("login.example: refresh-token-1 is not HTTP"),
    )
    tokens = rig.tokens(server)
    words = [(await failure(tokens))[1], (await failure(tokens, "own"))[1]]
    for text in (caplog.text, *words):
        assert "secret-of-the-client" not in text
        assert "refresh-token-1" not in text
    assert [text.count("***") for text in words] == [1, 1]
    assert len(caplog.records) == 2


async def test_mistake_of_the_relay_is_not_repeated_for_each_message_and_quotes_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Server):
        async def post(self, request: TokenRequest) -> HttpAnswer | NoAnswer:
            await super().post(request)
            raise KeyError("secret-of-the-client")

    rig.client()
    server = Broken(REFUSED)
    tokens = rig.tokens(server)
    for _ in range(3):
        status, words = await failure(tokens)
        assert status == "4.7.0"
        assert words.endswith("no token: the request failed in the relay itself (KeyError)")
    assert len(server.asked) == 1
    assert "secret-of-the-client" not in caplog.text


async def test_secret_of_the_credentials_directory_is_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.write("secret", "secret-of-systemd\n")
    rig.sources["m365"] = TokenSource(
        "m365", Grant.CLIENT_CREDENTIALS, URL, client_secret_file="$CREDENTIALS_DIRECTORY/secret"
    )
    server = Server(granted("token-1"))
    tokens = rig.tokens(server)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert "$CREDENTIALS_DIRECTORY is not set" in (await failure(tokens))[1]
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(rig.directory))
    assert (await tokens.token("m365")).access == "token-1"
    assert server.asked[0]["client_secret"] == "secret-of-systemd"
