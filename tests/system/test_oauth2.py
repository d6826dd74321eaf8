"""Logins by access token, with a real relay, a token server over TLS and a Dovecot that asks it.

Whatever fails, no message is lost or returned, the log says why it waits, and no secret is in any
file or answer of the relay but where it is kept.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, StartTls
from tests.fakes.waiting import patient
from tests.rigs.dovecot import Dovecot, submission
from tests.rigs.ports import free_port
from tests.rigs.relay import Relay
from tests.rigs.sandbox import Event, Sandbox
from tests.rigs.token_server import CLIENT_ID, CLIENT_SECRET, Failure, TokenServer, service_key

pytestmark = [pytest.mark.needs("dovecot", "root"), pytest.mark.timeout(180)]

HOST = "smtp.test.example"
USER = "relay@test.example"
ADDRESS = "127.8.0.1"


class Provider:
    """A provider with a token server and a Dovecot for submission; `taken` is what it took."""

    def __init__(self, sandbox: Sandbox, stack: AsyncExitStack) -> None:
        self.sandbox = sandbox
        self.stack = stack
        self.secrets: set[str] = set()

    async def open(self, **server: Any) -> None:
        sandbox = self.sandbox
        self.taken = MxServer(
            Script(starttls=StartTls.ABSENT), name="inside", authority=sandbox.authority
        )
        await self.stack.enter_async_context(self.taken)
        self.tokens = TokenServer(sandbox.authority, user=USER, **server)
        await self.stack.enter_async_context(self.tokens)
        self.port = free_port(ADDRESS)
        sandbox.dns.a(HOST, ADDRESS)
        sandbox.dns.a(self.tokens.name, self.tokens.address)

    async def listen(self, **options: Any) -> Dovecot:
        dovecot = submission(
            name=HOST,
            certificate=self.sandbox.authority.leaf(HOST),
            address=ADDRESS,
            port=self.port,
            relay_port=self.taken.port,
            introspection_url=self.tokens.introspection_url,
            **options,
        )
        self.stack.callback(_exit_of(dovecot))
        return await asyncio.to_thread(dovecot.__enter__)

    def file(self, name: str, text: str) -> str:
        path = self.sandbox.directory / name
        path.write_text(text)
        path.chmod(0o600)
        return str(path)

    def source(self, grant: str) -> dict[str, Any]:
        """`oauth2.app` of the configuration."""
        keys: dict[str, Any] = {"grant": grant, "token_url": self.tokens.url, "scope": "mail"}
        if grant == "service_account":
            keys |= {"key_file": self.file("key.json", service_key(self.tokens)), "subject": USER}
            return keys
        keys["client_id"] = CLIENT_ID
        if grant == "client_credentials":
            keys["client_secret_file"] = self.file("secret", f"{CLIENT_SECRET}\n")
        else:
            token = min(self.tokens.refresh_tokens, default="none")
            keys["refresh_token_file"] = self.file("own.token", f"{token}\n")
            keys["device_url"] = self.tokens.device_url
        return keys

    async def relay(
        self, grant: str = "client_credentials", mechanism: str = "auto", **sections: Any
    ) -> Relay:
        """A relay that is not started yet, whose mail all goes to the Dovecot."""
        relay = await self.sandbox.prepare(**{"queue": {"retry": ["1s"]}, **sections})
        relay.config["routes"] = {"*": "provider"}
        relay.config["next_hops"] = {
            "provider": {
                "hosts": [HOST],
                "port": self.port,
                "auth": {"mechanism": mechanism, "username": USER, "oauth2": "app"},
            }
        }
        relay.config["oauth2"] = {"app": self.source(grant)}
        return relay

    async def delivered(self, recipient: str, *, seconds: float = 60) -> Event:
        """The event of a message's delivery."""
        async with asyncio.timeout(patient(seconds)):
            while True:
                found = self.sandbox.events(recipient=recipient, event="delivered")
                if found:
                    return found[0]
                await asyncio.sleep(0.1)

    def requests(self, grant: str) -> int:
        return sum(one.get("grant_type") == grant for one in self.tokens.requests)

    def nothing_is_shown(self, *texts: str) -> None:
        """No file of the relay but those with the secrets, and none of `texts`, has a secret."""
        self.secrets |= set(self.tokens.secrets)
        directory = self.sandbox.directory
        kept = {"secret", "key.json", "own.token"}
        said = {
            str(path): path.read_bytes().decode("utf-8", "replace")
            for path in directory.rglob("*")
            if path.is_file() and path.name not in kept
        }
        assert said
        for name, text in [*said.items(), *(("an answer", text) for text in texts)]:
            for secret in self.secrets:
                for form in (secret, b64encode(secret.encode()).decode()):
                    assert form[:24] not in text, f"{name} shows a secret"


def _exit_of(manager: Any) -> Callable[[], None]:
    return lambda: manager.__exit__(None, None, None)


@pytest.fixture
async def provider(sandbox: Sandbox) -> AsyncIterator[Provider]:
    async with AsyncExitStack() as stack:
        yield Provider(sandbox, stack)


def statuses(events: list[Event]) -> set[tuple[str, str]]:
    return {(each["event"], each["delivery-status"]["enhanced-code"]) for each in events}


@pytest.fixture(autouse=True)
def no_message_is_returned(sandbox: Sandbox) -> Iterator[None]:
    yield
    assert not [each for each in sandbox.events() if each.get("severity") == "permanent"]


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grant", ["client_credentials", "refresh_token", "service_account"])
@pytest.mark.parametrize("mechanism", ["xoauth2", "oauthbearer"])
async def test_mail_goes_through_a_dovecot_with_a_token(
    provider: Provider, grant: str, mechanism: str
) -> None:
    await provider.open()
    dovecot = await provider.listen()
    relay = await provider.relay(grant, mechanism)
    await asyncio.to_thread(relay.start)
    token = await provider.sandbox.submit("a@test.example", "b@dest.example")
    event = await provider.delivered("b@dest.example")
    assert event["delivery-status"]["auth"] == {"mechanism": mechanism.upper(), "user": USER}
    assert event["delivery-status"]["certificate-verified"] is True
    assert token.encode() in provider.taken.messages[0].content
    assert dovecot.logins(f"method={mechanism.upper()}", f"<{USER}>")
    provider.nothing_is_shown()


async def test_token_that_expired_during_a_session_is_replaced_for_the_next(
    provider: Provider,
) -> None:
    await provider.open()
    dovecot = await provider.listen()
    relay = await provider.relay()
    await asyncio.to_thread(relay.start)
    submit = provider.sandbox.submit
    await submit("a@test.example", "first@dest.example")
    await provider.delivered("first@dest.example")
    provider.tokens.expire_all()
    # The session that stands is logged in, and goes on.
    await submit("a@test.example", "second@dest.example")
    await provider.delivered("second@dest.example")
    assert len(provider.tokens.requests) == 1
    await asyncio.sleep(6)  # a kept connection idles for five seconds
    await submit("a@test.example", "third@dest.example")
    event = await provider.delivered("third@dest.example")
    assert event["delivery-status"]["attempt-no"] == 1
    assert len(provider.tokens.requests) == 2
    assert len(dovecot.logins()) == 2
    provider.nothing_is_shown()


async def test_a_thousand_messages_that_wait_make_one_request(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    slow = Failure(status=503, seconds=4)
    relay = await provider.relay(queue={"retry": ["5s"]})
    provider.tokens.failures.append(slow)
    await asyncio.to_thread(relay.start)
    async with provider.sandbox.client() as client:
        for number in range(1000):
            content = b"From: a@test.example\r\nTo: b@dest.example\r\nSubject: x\r\n\r\nx\r\n"
            await client.sendmail("a@test.example", [f"b{number}@d{number % 50}.example"], content)
    async with asyncio.timeout(patient(150)):
        while len(provider.taken.messages) < 1000:
            await asyncio.sleep(0.5)
    taken = {message.forward_paths[0] for message in provider.taken.messages}
    assert len(taken) == len(provider.taken.messages) == 1000
    assert len(provider.tokens.requests) == 2, "one that failed, and one"
    provider.nothing_is_shown()


async def test_workers_share_a_refresh_token_that_counts_once(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    provider.tokens.lives = 2.0
    relay = await provider.relay("refresh_token")
    relay.config["workers"] = 3
    await asyncio.to_thread(relay.start)
    for number in range(40):
        await provider.sandbox.submit("a@test.example", f"b{number}@d{number}.example")
        await asyncio.sleep(0.25)
    for number in range(40):
        await provider.delivered(f"b{number}@d{number}.example")
    assert "refuses" not in relay.stderr
    assert provider.requests("refresh_token") > 3
    kept = (provider.sandbox.directory / "own.token").read_text().strip()
    assert kept in provider.tokens.refresh_tokens
    provider.nothing_is_shown()


# --- what fails -----------------------------------------------------------------------------------

_ECHO = f'{{"error": "server_error", "error_description": "{CLIENT_SECRET}"}}'.encode()
_TROUBLE = {
    "429": (Failure(429, headers={"Retry-After": "3"}), "status 429"),
    "500": (Failure(500, _ECHO), "status 500, server_error (***)"),
    "silent": (Failure(seconds=12), "took longer than 10 s"),
    "no-json": (Failure(200, b"<html>login</html>"), "status 200 and no JSON"),
    "redirect": (Failure(302, headers={"Location": "/token"}), "redirect (302)"),
}


@pytest.mark.parametrize("case", list(_TROUBLE))
async def test_mail_waits_while_the_token_server_is_in_trouble(
    provider: Provider, case: str
) -> None:
    failure, words = _TROUBLE[case]
    await provider.open()
    await provider.listen()
    relay = await provider.relay(log={"level": "debug"})
    provider.tokens.failures.append(failure)
    await asyncio.to_thread(relay.start)
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    await provider.delivered("b@dest.example")
    waited = provider.sandbox.events(recipient="b@dest.example", event="failed")
    assert statuses(waited) == {("failed", "4.7.0")}
    assert words in waited[0]["delivery-status"]["description"]
    assert words in relay.stderr
    assert len(provider.tokens.requests) == 2
    provider.nothing_is_shown()


async def test_silent_token_server_holds_up_no_mail_that_goes_elsewhere(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    elsewhere = await provider.sandbox.domain("elsewhere.example")
    relay = await provider.relay(delivery={"concurrency": 20}, queue={"retry": ["5s"]})
    relay.config["routes"] = {"*.dest.example": "provider"}
    provider.tokens.failures += [Failure(seconds=30)] * 3
    await asyncio.to_thread(relay.start)
    async with provider.sandbox.client() as client:
        content = b"From: a@test.example\r\nTo: b@dest.example\r\nSubject: x\r\n\r\nx\r\n"
        for number in range(200):
            await client.sendmail("a@test.example", [f"b@d{number}.dest.example"], content)
    while not provider.tokens.requests:
        await asyncio.sleep(0.05)
    await provider.sandbox.submit("a@test.example", "b@elsewhere.example")
    await provider.delivered("b@elsewhere.example", seconds=8)
    assert len(elsewhere.messages) == 1
    assert not provider.taken.messages, "the token server was asked too late to show anything"


@pytest.mark.parametrize("kind", [Kind.EXPIRED, Kind.WRONG_NAME, Kind.UNKNOWN_CA])
async def test_token_server_with_a_bad_certificate_gets_no_secret(
    provider: Provider, kind: Kind
) -> None:
    await provider.open(kind=kind)
    await provider.listen()
    relay = await provider.relay()
    await asyncio.to_thread(relay.start)
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    [first, *_] = await provider.sandbox.attempts("b@dest.example")
    assert first["delivery-status"]["enhanced-code"] == "4.7.0"
    assert "certificate" in first["delivery-status"]["description"].lower()
    assert not provider.tokens.requests
    provider.nothing_is_shown()


async def test_token_server_in_a_network_that_is_not_allowed_is_not_asked(
    provider: Provider,
) -> None:
    await provider.open()
    relay = await provider.relay()
    relay.config["delivery"]["allow_networks"] = [f"{ADDRESS}/32"]
    await asyncio.to_thread(relay.start)
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    [first, *_] = await provider.sandbox.attempts("b@dest.example")
    assert first["delivery-status"]["enhanced-code"] == "4.7.0"
    assert "loopback" in first["delivery-status"]["description"]
    assert not provider.tokens.requests


async def corrected(provider: Provider, what: Callable[[], Awaitable[None]]) -> Event:
    """A message waits with 4.7.8; somebody corrects what is wrong; it goes. The event before."""
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    [first, *_] = await provider.sandbox.attempts("b@dest.example")
    assert first["delivery-status"]["enhanced-code"] == "4.7.8"
    await provider.sandbox.attempts("b@dest.example", 3)
    await what()
    await provider.delivered("b@dest.example")
    return first


async def test_wrong_client_secret_waits_for_a_person(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay()
    provider.file("secret", "wrong-secret-of-nobody\n")
    provider.secrets.add("wrong-secret-of-nobody")
    await asyncio.to_thread(relay.start)

    async def correct() -> None:
        assert len(provider.tokens.requests) == 1
        provider.file("secret", CLIENT_SECRET)

    first = await corrected(provider, correct)
    words = "invalid_client (not ***); check client_id and client_secret_file of oauth2.app"
    assert words in first["delivery-status"]["description"]
    assert words in relay.stderr
    metrics = await asyncio.to_thread(relay.run, "health", "--metrics")
    provider.nothing_is_shown(metrics.stdout)


async def test_wrong_clock_is_refused_and_mail_goes_when_it_is_right(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay("service_account")
    provider.tokens.clock_is_ahead = 7200
    await asyncio.to_thread(relay.start)

    async def correct() -> None:
        provider.tokens.clock_is_ahead = 0
        (provider.sandbox.directory / "key.json").touch()

    first = await corrected(provider, correct)
    assert "invalid_grant (Invalid JWT" in first["delivery-status"]["description"]
    provider.nothing_is_shown()


async def test_revoked_refresh_token_waits_until_a_person_logs_in(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay("refresh_token")
    provider.secrets |= set(provider.tokens.secrets)
    provider.tokens.revoke_all()
    await asyncio.to_thread(relay.start)
    said: list[str] = []

    async def log_in() -> None:
        login = asyncio.create_task(asyncio.to_thread(relay.run, "login", "app"))
        await asyncio.sleep(2)
        provider.tokens.agree()
        done = await login
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)

    first = await corrected(provider, log_in)
    assert "run `relay login app`" in first["delivery-status"]["description"]
    assert "/activate and type in the code WDJB-MJHT" in said[0]
    assert provider.requests("refresh_token") == 2
    provider.nothing_is_shown(*said)


async def test_relay_killed_between_answer_and_file_loses_no_mail(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay("refresh_token")
    relay.program = ("tests.rigs.killed_at_token",)
    await asyncio.to_thread(relay.start)
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    assert relay.process is not None
    await asyncio.to_thread(relay.process.wait, 60)
    assert provider.requests("refresh_token") == 1
    relay.program = ("relay",)
    await asyncio.to_thread(relay.start)
    [first, *_] = await provider.sandbox.attempts("b@dest.example")
    assert first["delivery-status"]["enhanced-code"] == "4.7.8"
    assert "run `relay login app`" in first["delivery-status"]["description"]
    provider.tokens.agree()
    done = await asyncio.to_thread(relay.run, "login", "app")
    assert done.returncode == 0, done.stderr
    await provider.delivered("b@dest.example")
    assert len(provider.taken.messages) == 1
    provider.nothing_is_shown(done.stdout)


async def test_wrong_password_is_tried_once_and_then_rests(provider: Provider) -> None:
    await provider.open()
    dovecot = await provider.listen(password="the-right-password")
    relay = await provider.relay()
    path = provider.file("secret", "the-wrong-password\n")
    provider.secrets |= {"the-right-password", "the-wrong-password"}
    relay.config["next_hops"]["provider"]["auth"] = {"username": USER, "password_file": path}
    await asyncio.to_thread(relay.start)
    for number in range(20):
        await provider.sandbox.submit("a@test.example", f"b{number}@d{number}.example")

    async def correct() -> None:
        assert dovecot.log.count("Password mismatch") == 1, dovecot.log
        provider.file("secret", "the-right-password\n")

    first = await corrected(provider, correct)
    assert "535" in first["delivery-status"]["description"]
    for number in range(20):
        await provider.delivered(f"b{number}@d{number}.example")
    provider.nothing_is_shown()


# --- the operator's commands ----------------------------------------------------------------------


async def test_route_test_says_each_step(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay("refresh_token")
    await asyncio.to_thread(relay.start)
    done = await asyncio.to_thread(relay.run, "route", "test", "provider")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == [HOST, f"[{ADDRESS}]:{provider.port}"]
    assert [words[0] for words in lines[1:]] == ["connect", "TLS", "login", "QUIT"]
    assert "certificate verified (pkix)" in done.stdout
    assert f"OAUTHBEARER as {USER}, accepted" in done.stdout
    provider.nothing_is_shown(done.stdout, done.stderr)


async def test_route_test_says_why_a_login_fails(provider: Provider) -> None:
    await provider.open()
    await provider.listen(mechanisms="plain login")
    relay = await provider.relay()
    await asyncio.to_thread(relay.start)
    done = await asyncio.to_thread(relay.run, "route", "test", "provider")
    assert done.returncode == 1
    assert "neither AUTH OAUTHBEARER nor XOAUTH2 is offered" in done.stdout
    provider.tokens.failures.append(Failure(400, b'{"error": "invalid_scope"}'))
    done = await asyncio.to_thread(relay.run, "route", "test", "provider")
    assert done.returncode == 1
    assert "invalid_scope; check oauth2.app" in done.stdout
    provider.nothing_is_shown(done.stdout, done.stderr)


async def test_no_command_shows_a_secret(provider: Provider) -> None:
    await provider.open()
    await provider.listen()
    relay = await provider.relay(log={"level": "debug"})
    await asyncio.to_thread(relay.start)
    await provider.sandbox.submit("a@test.example", "b@dest.example")
    await provider.delivered("b@dest.example")
    said = []
    for command in (
        ("check",),
        ("explain", "--from", "a@test.example", "--to", "b@dest.example"),
        ("route", "show", "provider"),
        ("route", "list"),
        ("log",),
        ("probe", "dest.example"),
    ):
        done = await asyncio.to_thread(relay.run, *command)
        said += [done.stdout, done.stderr]
    assert not [text for text in said if "Traceback" in text]
    provider.nothing_is_shown(*said)
