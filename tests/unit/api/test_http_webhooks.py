"""Webhooks are told, signed, and told again, by a real server on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from relay.api.caller import Caller
from relay.api.targets import NoTarget, Targets
from relay.mail.event import Event
from relay.queue.api_state import Webhook
from relay.queue.sqlite.store import SqliteStore
from relay.report import webhook
from relay.report.webhook import kind_of, next_try, payload
from relay.route.answers import AddressAnswer, AddressLookup, NoSuchName, Unanswered
from tests.fakes.accepted import accept
from tests.fakes.waiting import patient

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
KEY = "signs"
DNS: dict[str, AddressLookup] = {
    "well.example": AddressAnswer(("127.0.0.1",)),
    "inside.example": AddressAnswer(("10.0.0.5", "fd00::5")),
    "both.example": AddressAnswer(("169.254.169.254", "93.184.215.14")),
    "public.example": AddressAnswer(("93.184.215.14",)),
    "late.example": Unanswered("no answer"),
}


async def look_up(name: str) -> AddressLookup:
    return DNS.get(name, NoSuchName())


PUBLIC = Targets(look_up, tuple)
LOOPBACK = Targets(look_up, lambda: [ip_network("127.0.0.0/8")])


class Ear:
    """A webhook's server: answers as it is told, and remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.answers: list[int] = []
        self.now = NOW
        self.key: str | None = KEY
        self.url = ""

    async def listen(self, request: web.Request) -> web.Response:
        self.heard.append(await request.json())
        status = self.answers.pop(0) if self.answers else 200
        headers = {"Location": "/elsewhere"} if 300 <= status < 400 else {}
        return web.Response(status=status, headers=headers)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(patient(30)):
            while len(self.heard) < count:
                await asyncio.sleep(0.01)


@pytest.fixture
async def ear() -> AsyncIterator[Ear]:
    made = Ear()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", made.listen)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/mail"))
        yield made


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "spool", now=NOW, synchronous="OFF")
    yield opened
    await opened.close()


@asynccontextmanager
async def calling(
    store: SqliteStore,
    ear: Ear,
    *,
    targets: Targets = LOOPBACK,
    elsewhere: Callable[[], list[Webhook] | None] | None = None,
) -> AsyncIterator[Caller]:
    """A caller that runs."""
    made = Caller(
        store,
        store.api_state,
        signing_key=lambda: ear.key,
        clock=lambda: ear.now,
        targets=targets,
        elsewhere=elsewhere,
    )
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def caller(store: SqliteStore, ear: Ear) -> AsyncIterator[Caller]:
    async with calling(store, ear) as made:
        yield made


async def _settled(store: SqliteStore, due: datetime | None) -> None:
    """Until the next call is due then."""
    async with asyncio.timeout(patient(30)):
        while await store.api_state.next_call_due() != due:
            await asyncio.sleep(0.01)


async def test_webhook_gets_each_event_once_and_signed(
    store: SqliteStore, ear: Ear, caller: Caller
) -> None:
    await accept(store, "Q0", "ann@example.com")
    await store.api_state.set_webhook("example.com", "accepted", [ear.url])
    caller.changed()
    await accept(store, "Q1", "ann@example.com")
    await accept(store, "Q2", "ann@other.example")
    await ear.until(1)
    await _settled(store, None)
    [told] = ear.heard
    assert told["event-data"]["queue-id"] == "Q1", "what came before the webhook is not told"
    signature = told["signature"]
    signed = hmac.new(
        KEY.encode(), f"{signature['timestamp']}{signature['token']}".encode(), hashlib.sha256
    )
    assert signature["signature"] == signed.hexdigest()
    assert int(signature["timestamp"]) == int(NOW.timestamp())


async def test_webhook_that_answers_an_error_is_called_again_later(
    store: SqliteStore, ear: Ear, caller: Caller
) -> None:
    ear.answers = [500, 302]
    await store.api_state.set_webhook("example.com", "accepted", [ear.url])
    caller.changed()
    await accept(store, "Q1", "ann@example.com")
    await ear.until(1)
    await _settled(store, NOW + timedelta(minutes=5))
    ear.now = NOW + timedelta(minutes=5)
    await ear.until(2)
    await _settled(store, ear.now + timedelta(minutes=10))
    ear.now += timedelta(minutes=10)
    await ear.until(3)
    await _settled(store, None)
    assert len({told["event-data"]["id"] for told in ear.heard}) == 1
    assert len({told["signature"]["token"] for told in ear.heard}) == 3


async def test_pending_webhook_call_is_made_after_a_restart(store: SqliteStore, ear: Ear) -> None:
    await store.api_state.set_webhook("example.com", "accepted", [ear.url])
    await accept(store, "Q1", "ann@example.com")
    async with calling(store, ear):
        await ear.until(1)
        await _settled(store, None)
    await accept(store, "Q2", "ann@example.com")
    async with calling(store, ear):
        await ear.until(2)
        await _settled(store, None)
    assert [told["event-data"]["queue-id"] for told in ear.heard] == ["Q1", "Q2"]


async def test_webhook_406_is_final_and_no_answer_is_retried(
    store: SqliteStore, ear: Ear, caller: Caller
) -> None:
    ear.answers = [406]
    await store.api_state.set_webhook("example.com", "accepted", [ear.url, "http://127.0.0.1:9/"])
    caller.changed()
    await accept(store, "Q1", "ann@example.com")
    await _settled(store, NOW + timedelta(minutes=5))
    assert [
        call.url for call in await store.api_state.calls_due(now=NOW + timedelta(hours=1), limit=9)
    ] == ["http://127.0.0.1:9/"]


@pytest.mark.parametrize(
    ("status", "attempts", "wait"),
    [
        (200, 0, None),
        (204, 0, None),
        (406, 0, None),
        (500, 0, timedelta(minutes=5)),
        (None, 1, timedelta(minutes=10)),
        (404, 2, timedelta(minutes=15)),
        (302, 3, timedelta(hours=1)),
        (429, 4, timedelta(hours=2)),
        (None, 5, timedelta(hours=4)),
        (None, 6, None),
    ],
)
def test_next_webhook_call_follows_the_status_and_the_number_of_attempts(
    status: int | None, attempts: int, wait: timedelta | None
) -> None:
    expected = None if wait is None else NOW + wait
    assert next_try(status, attempts=attempts, now=NOW) == expected


@pytest.mark.parametrize(
    ("name", "line", "kind"),
    [
        ("accepted", "{}", "accepted"),
        ("delivered", "{}", "delivered"),
        ("failed", '{"severity":"temporary"}', "temporary_fail"),
        ("failed", '{"severity":"permanent"}', "permanent_fail"),
    ],
)
def test_every_event_is_of_a_kind_that_can_be_asked_for(name: str, line: str, kind: str) -> None:
    assert kind_of(Event("1", NOW, name, "Q1", "a@b.example", "", line)) == kind
    assert kind in webhook.KINDS


def test_payload_is_json_with_any_event() -> None:
    told = json.loads(payload('{"a":"\\u2028\\ud800"}', signing_key="ü", timestamp=1, token="t"))
    assert told["event-data"] == {"a": "\u2028\ud800"}


async def test_a_worker_tells_the_webhooks_that_another_keeps(store: SqliteStore, ear: Ear) -> None:
    await store.api_state.set_webhook("example.com", "delivered", ["https://gone.example"])
    await accept(store, "Q0", "ann@example.com")
    told: list[list[Webhook]] = [[]]
    async with calling(store, ear, elsewhere=lambda: told[0]):
        async with asyncio.timeout(patient(30)):
            while await store.api_state.webhooks():
                await asyncio.sleep(0.01)
            told[0] = [Webhook("example.com", "accepted", (ear.url,))]
            while not await store.api_state.webhooks():
                await asyncio.sleep(0.01)
        await accept(store, "Q1", "ann@example.com")
        await ear.until(1)
        await _settled(store, None)
    assert [one["event-data"]["queue-id"] for one in ear.heard] == ["Q1"]


# --- where a webhook may lead ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1/", "loopback"),
        ("http://[::1]:8025/", "loopback"),
        ("http://localhost/", "loopback"),
        ("http://x.localhost./", "loopback"),
        ("http://169.254.169.254/latest/meta-data/", "link-local"),
        ("http://[fe80::1]/", "link-local"),
        ("http://10.1.2.3/", "private"),
        ("http://192.168.0.1:25/", "private"),
        ("http://[fd00::1]/", "private"),
        ("http://[::ffff:127.0.0.1]/", "IPv4-mapped"),
        ("http://[64:ff9b::7f00:1]/", "loopback"),
        ("http://0.0.0.0/", "unspecified"),
        ("http://2130706433/", "neither a name"),
        ("http://127.1/", "neither a name"),
        ("http://0x7f.0.0.1/", "neither a name"),
        ("http://a\x80\u3002127.1/", "neither a name"),
        ("http://[fe80::1%\xa0]/", "link-local"),
        ("http://inside.example/", "private"),
        ("https://public.example/", ""),
        ("https://both.example/", ""),
        ("https://93.184.215.14/", ""),
        ("https://late.example/", ""),
        ("https://nowhere.example/", ""),
    ],
)
async def test_a_webhook_into_our_own_network_is_not_made(url: str, said: str) -> None:
    objection = await PUBLIC.objection(url)
    assert said in objection
    assert bool(said) == bool(objection)
    assert objection.isprintable()
    assert objection.isascii()


async def test_only_addresses_that_passed_are_handed_on() -> None:
    assert await PUBLIC.addresses("both.example") == ["93.184.215.14"]
    assert await LOOPBACK.addresses("localhost") == ["127.0.0.1"]
    for name in ("inside.example", "nowhere.example", "late.example", "localhost", "127.0.0.1"):
        with pytest.raises(NoTarget):
            await PUBLIC.addresses(name)


async def test_a_name_is_judged_with_each_call_and_exactly_what_passed_is_connected_to(
    store: SqliteStore, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making and the call the name's owner may say another address (rebinding)."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    networks = [ip_network("127.0.0.0/8")]
    port = ear.url.rpartition(":")[2]
    await store.api_state.set_webhook("example.com", "accepted", [f"http://well.example:{port}"])
    async with calling(store, ear, targets=Targets(look_up, lambda: networks)):
        await accept(store, "Q1", "ann@example.com")
        await ear.until(1)
        await _settled(store, None)
        networks.clear()
        await accept(store, "Q2", "ann@example.com")
        await _settled(store, NOW + timedelta(minutes=5))
    assert [told["event-data"]["queue-id"] for told in ear.heard] == ["Q1"]


@pytest.fixture
async def silent() -> AsyncIterator[tuple[list[asyncio.StreamWriter], int]]:
    """Hosts that take connections and say nothing: their connections, and their port."""
    held: list[asyncio.StreamWriter] = []

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await asyncio.sleep(3600)

    server = await asyncio.start_server(say_nothing, "0.0.0.0", 0)
    yield held, server.sockets[0].getsockname()[1]
    for writer in held:
        writer.transport.abort()
    server.close()


async def test_a_webhook_that_never_answers_holds_up_no_call_to_another(
    store: SqliteStore, ear: Ear, caller: Caller, silent: tuple[list[asyncio.StreamWriter], int]
) -> None:
    """Sixty calls are owed to a host that takes connections and says nothing."""
    held, port = silent
    urls = [f"http://127.0.0.2:{port}/{number}" for number in range(3)]
    await store.api_state.set_webhook("silent.example", "accepted", urls)
    await store.api_state.set_webhook("example.com", "accepted", [ear.url])
    caller.changed()
    for number in range(20):
        await accept(store, f"S{number}", "ann@silent.example")
    async with asyncio.timeout(patient(30)):
        while len(held) < 3:
            await asyncio.sleep(0.01)
    begun = asyncio.get_running_loop().time()
    for number in range(20):
        await accept(store, f"Q{number}", "ann@example.com")
    await ear.until(20)
    assert asyncio.get_running_loop().time() - begun < 25, "the silent ones end after 30 s"
    assert len(held) == 3, "three places of fifty"


async def test_thirty_hosts_that_never_answer_hold_up_no_call_to_one_that_answered(
    store: SqliteStore, ear: Ear, caller: Caller, silent: tuple[list[asyncio.StreamWriter], int]
) -> None:
    held, port = silent
    for number in range(10):
        urls = [f"http://127.0.2.{number * 3 + n}:{port}/" for n in (1, 2, 3)]
        await store.api_state.set_webhook(f"silent{number}.example", "accepted", urls)
    await store.api_state.set_webhook("example.com", "accepted", [ear.url])
    caller.changed()
    await accept(store, "Q0", "ann@example.com")
    await ear.until(1)
    for number in range(30):
        await accept(store, f"S{number}", f"ann@silent{number % 10}.example")
    async with asyncio.timeout(patient(30)):
        while len(held) < 38:
            await asyncio.sleep(0.01)
    begun = asyncio.get_running_loop().time()
    for number in range(20):
        await accept(store, f"R{number}", "ann@example.com")
    await ear.until(21)
    assert asyncio.get_running_loop().time() - begun < 25, "the silent ones end after 30 s"
    assert len(held) == 38
