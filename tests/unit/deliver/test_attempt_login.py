"""Logins at a next hop, by access token above all."""

from __future__ import annotations

import asyncio
from base64 import b64decode, b64encode
from dataclasses import replace

import pytest

from relay.mail.outcome import Code, Deferred, Delivered, HopLogin
from relay.route.credentials import CredentialsError, HeldToken, RouteCredentials
from relay.route.next_hop import Auth, AuthMechanism, Credentials, NextHop
from relay.sandbox.script import Script, ScriptedReply, Then
from tests.fakes.mail import entry

TOKEN = "EwBwA8l6BAAUO9chh8cJscQLmU+LSWpbnr0vmwwAAeuN"
HOP = NextHop("m365", (("smtp.example",),), auth=Auth(username="us@example.com", oauth2="app"))
STALE = Credentials("us@example.com", token=f"{TOKEN}-1")
FRESH = replace(STALE, is_fresh=True)
CHALLENGE = b64encode(f'{{"status":"401","token":"{TOKEN}-1"}}'.encode()).decode()
OFFERS = ("AUTH XOAUTH2", "PIPELINING")
REFUSED = "535 5.7.139 Authentication unsuccessful"


class Tokens:
    """What a token server would give. `trouble`: raised in its place."""

    def __init__(self, trouble: CredentialsError | None = None) -> None:
        self.trouble = trouble
        self.asked: list[str] = []

    async def token(self, name: str) -> HeldToken:
        raise AssertionError("an attempt brings its token")

    async def anew(self, name: str, refused: str) -> HeldToken:
        self.asked.append(refused)
        if self.trouble is not None:
            raise self.trouble
        return HeldToken(f"{TOKEN}-{len(self.asked) + 1}", is_fresh=True)


def use(rig, tokens: Tokens | None = None) -> Tokens:
    tokens = tokens or Tokens()
    rig.logins = RouteCredentials(tokens)
    return tokens


def tokens_said(connection) -> list[str]:
    """The tokens that a connection brought, in order."""
    return [
        b64decode(line.split(" ")[-1]).decode().split("Bearer ")[1].rstrip("\1")
        for _, line in connection.commands
        if line.startswith("AUTH XOAUTH2 ")
    ]


async def test_message_goes_after_a_login_by_token(rig):
    use(rig)
    mx = await rig.mx(Script(offers=OFFERS), hop=HOP, credentials=STALE)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.login == HopLogin("XOAUTH2", "us@example.com")
    assert tokens_said(mx.connections[0]) == [f"{TOKEN}-1"]
    assert b"AUTH" not in mx.connections[0].clear


@pytest.mark.parametrize(
    "auth",
    [[REFUSED, "235 2.7.0 OK"], [f"334 {CHALLENGE}", "235 2.7.0 OK"]],
    ids=["at-once", "after-a-challenge"],
)
async def test_token_that_expired_is_replaced_and_the_message_goes(rig, auth):
    tokens = use(rig)
    mx = await rig.mx(
        Script(offers=OFFERS, replies={"AUTH": auth, "": REFUSED}), hop=HOP, credentials=STALE
    )
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert tokens.asked == [f"{TOKEN}-1"]
    (connection,) = mx.connections
    assert tokens_said(connection) == [f"{TOKEN}-1", f"{TOKEN}-2"]


async def test_host_that_hangs_up_after_535_gets_the_new_token_over_a_new_connection(rig):
    use(rig)
    closing = Script(offers=OFFERS, replies={"AUTH": ScriptedReply(REFUSED, then=Then.CLOSE)})
    mx = await rig.mx(closing, Script(offers=OFFERS), hop=HOP, credentials=STALE)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert [tokens_said(each) for each in mx.connections][-1] == [f"{TOKEN}-2"]


@pytest.mark.parametrize(("credentials", "asked"), [(STALE, 1), (FRESH, 0)])
async def test_token_fetched_for_the_attempt_is_not_fetched_again(rig, credentials, asked):
    tokens = use(rig)
    script = Script(offers=OFFERS, replies={"AUTH": REFUSED})
    mx = await rig.mx(script, hop=HOP, credentials=credentials)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.7.8", 535)
    assert "Authentication unsuccessful" in outcome.description
    assert len(tokens.asked) == asked
    assert mx.connections[0].verbs.count("AUTH") == asked + 1
    # The host is dead, and then the login rests: the next message does not even connect.
    outcome = await rig.send(entry())
    assert (outcome.status, outcome.code) == ("4.7.8", 535)
    rig.attempt._destinations.hosts.retry()
    outcome = await rig.send(entry())
    assert (outcome.status, outcome.code) == ("4.7.8", Code.NONE)
    assert "Authentication unsuccessful" in outcome.description
    assert len(mx.connections) == 1


async def test_token_server_that_fails_leaves_the_answer_of_its_own(rig):
    use(rig, Tokens(CredentialsError("login.example gives no token for oauth2.app", "4.7.0")))
    script = Script(offers=OFFERS, replies={"AUTH": REFUSED})
    await rig.mx(script, hop=HOP, credentials=STALE)
    outcome = await rig.send(entry())
    assert (outcome.status, outcome.code) == ("4.7.0", Code.NONE)
    assert "login.example gives no token" in outcome.description


async def test_password_that_is_refused_is_tried_once_at_each_host(rig):
    login = Credentials("us", "open sesame")
    use(rig)
    script = Script(offers=("AUTH PLAIN",), replies={"AUTH": "535 5.7.8 wrong"})
    first = await rig.mx(script, hop=HOP, credentials=login)
    second = await rig.mx(script, hop=HOP, credentials=login)
    outcome = await rig.send(entry())
    assert outcome.status == "4.7.8"
    assert (len(first.connections), len(second.connections)) == (1, 1)
    rig.attempt._destinations.hosts.retry()
    outcomes = await asyncio.gather(*(rig.send(entry()) for _ in range(10)))
    assert {each.status for each in outcomes} == {"4.7.8"}
    assert (len(first.connections), len(second.connections)) == (1, 1)


async def test_ten_messages_try_a_wrong_password_once(rig):
    login = Credentials("us", "open sesame")
    use(rig)
    script = Script(
        offers=("AUTH PLAIN",), replies={"AUTH": ScriptedReply("535 5.7.8 wrong", delay=0.1)}
    )
    mx = await rig.mx(script, hop=HOP, credentials=login)
    outcomes = await asyncio.gather(*(rig.send(entry(f"b@{n}.example")) for n in range(5)))
    assert {each.status for each in outcomes} == {"4.7.8"}
    assert sum(each.verbs.count("AUTH") for each in mx.connections) == 1


@pytest.mark.parametrize("reply", ["454 4.7.0 later", "421 4.3.0 going down", "432 4.7.12 later"])
async def test_login_that_fails_for_now_does_not_rest(rig, reply):
    use(rig)
    script = Script(offers=OFFERS, replies={"AUTH": [reply]})
    mx = await rig.mx(script, Script(offers=OFFERS), hop=HOP, credentials=FRESH)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert outcome.code == int(reply[:3])
    rig.attempt._destinations.hosts.retry()  # the host is dead for a moment all the same
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 2


@pytest.mark.parametrize(
    "replies",
    [
        {"AUTH": f"535 5.7.8 token {TOKEN}-1 refused"},
        {"AUTH": f"334 {CHALLENGE}", "": "535 5.7.8 no"},
        {"AUTH": f"454 4.7.0 {b64encode(TOKEN.encode()).decode()}"},
        {"AUTH": ScriptedReply(f"hello {TOKEN}-1")},
        {"MAIL": f"451 4.3.0 who logged in with {TOKEN}?"},
        {"CONTENT": f"451 4.3.0 {TOKEN[:20]}"},
        {"MAIL": ScriptedReply(f"{TOKEN}", then=Then.CLOSE)},
        {"MAIL": f"334 {TOKEN}"},
        {"AUTH": f"334 {CHALLENGE}", "": f"334 {CHALLENGE}", "*": f"334 {CHALLENGE}"},
    ],
    ids=["535", "challenge", "base64", "none", "mail", "content", "garbage", "334", "endless"],
)
async def test_token_that_the_host_repeats_is_in_no_text(rig, replies, caplog):
    caplog.set_level("DEBUG")
    use(rig)
    await rig.mx(Script(offers=OFFERS, replies=replies), hop=HOP, credentials=FRESH)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    for text in (repr(outcome), caplog.text):
        assert TOKEN[:12] not in text
        assert b64encode(TOKEN.encode()).decode()[:12] not in text
    if "AUTH" in replies or "MAIL" in replies:
        assert "***" in outcome.description


async def test_client_certificate_is_a_login_by_external(rig):
    hop = NextHop("partner", (("smtp.example",),), auth=Auth(mechanism=AuthMechanism.EXTERNAL))
    rig.logins = RouteCredentials()
    mx = await rig.mx(
        Script(offers=("AUTH EXTERNAL PLAIN",)),
        hop=hop,
        credentials=Credentials("", mechanism=AuthMechanism.EXTERNAL),
    )
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.login == HopLogin("EXTERNAL", "")
    assert "AUTH EXTERNAL =" in [line for _, line in mx.connections[0].commands]


async def test_kept_connection_is_used_with_the_token_of_an_hour_later(rig):
    use(rig)
    mx = await rig.mx(Script(offers=OFFERS), hop=HOP, credentials=STALE)
    await rig.send(entry())
    rig.hosts[0] = replace(rig.hosts[0], credentials=replace(STALE, token="another"))
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 1
