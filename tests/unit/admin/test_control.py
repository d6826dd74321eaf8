"""The control socket, on a real store: what the operator asks, and what he is told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relay.admin import control_socket, operations
from relay.admin.client import NotRunning, RelayError, ask
from relay.admin.control import Control
from relay.admin.control_socket import ControlServer, SocketTaken, start_control
from relay.admin.operator import Operator
from relay.mail.outcome import Deferred
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage
from relay.report import deliverylog
from tests.fakes.client import Client
from tests.fakes.running import QuietRelay
from tests.fakes.waiting import patient, until

NOW = datetime(2030, 1, 31, 12, 0, tzinfo=UTC)
SETTINGS = TlsSettings(Setting(True, Source.DOMAIN, "example.com"), Setting(False, Source.DEFAULT))


def new_message(queue_id: str, *recipients: str, sender: str = "a@example.com") -> NewMessage:
    content = b"Subject: hello\r\nX-Bad: \x1b[2J\r\n\r\nbody\r\n"
    message = QueuedMessage(
        queue_id, sender, NOW - timedelta(hours=2), len(content), MessageSummary(subject="hello")
    )
    queued = tuple(
        QueuedRecipient(i, address, address.partition("@")[2], SETTINGS)
        for i, address in enumerate(recipients)
    )
    return NewMessage(message, queued, content, events=(deliverylog.accepted(message, queued),))


def control_of(store: SqliteStore) -> Control:
    return Control(Operator(store, lambda: NOW, store))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "spool", now=NOW, synchronous="OFF")
    yield opened
    await opened.close()


@pytest.fixture
async def server(store: SqliteStore, tmp_path: Path) -> AsyncIterator[ControlServer]:
    started = await start_control(control_of(store), tmp_path / "relay.sock")
    yield started
    await started.close()


async def asked(server: ControlServer, **request: Any) -> list[dict[str, Any]]:
    return await asyncio.to_thread(lambda: list(ask(server.path, request, seconds=patient(10))))


async def items(server: ControlServer, **request: Any) -> list[dict[str, Any]]:
    *pages, _ = await asked(server, verb="list", **request)
    return [item for page in pages for item in page["items"]]


async def test_the_queue_is_listed_as_the_interface_spells_it(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    [entry] = await store.claim_due(now=NOW, limit=10)
    outcome = Deferred("4.2.1", 450, "mailbox busy", session=None)
    settlement = settle(entry, {0: outcome}, schedule=RetrySchedule(), now=NOW)
    await store.record(settlement)
    [item] = await items(server)
    assert item == {
        "queue-id": "M1",
        "state": "deferred",
        "sender": "a@example.com",
        "size": 37,
        "arrived": "2030-01-31T10:00:00Z",
        "recipients": [
            {
                "address": "b@example.net",
                "state": "deferred",
                "attempts": 1,
                "next-attempt": "2030-01-31T12:05:00Z",
                "last": {
                    "at": "2030-01-31T12:00:00Z",
                    "code": 450,
                    "status": "4.2.1",
                    "message": "mailbox busy",
                    "host": "",
                },
            }
        ],
    }


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ["M1", "M2", "M3"]),
        ({"domain": "example.org"}, ["M2", "M3"]),
        ({"domain": "Example.ORG."}, ["M2", "M3"]),
        ({"domain": "example.or"}, []),
        ({"sender": "c@example.com"}, ["M3"]),
        ({"sender": "<C@Example.com>"}, ["M3"]),
        ({"sender": "<>"}, ["M2"]),
        ({"older-than": 3600}, ["M1", "M2", "M3"]),
        ({"older-than": 86400}, []),
        ({"state": "held"}, []),
        ({"ids": ["M2", "M9"]}, ["M2"]),
    ],
)
async def test_the_queue_is_searched(
    server: ControlServer, store: SqliteStore, wanted: dict[str, Any], found: list[str]
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    await store.accept(new_message("M2", "b@example.net", "b@example.org", sender=""))
    await store.accept(new_message("M3", "b@example.org", sender="c@example.com"))
    assert [item["queue-id"] for item in await items(server, **wanted)] == found


async def test_queue_longer_than_a_page_is_listed_completely(
    server: ControlServer, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PAGE", 3)
    monkeypatch.setattr("relay.queue.change_steps._STEP", 3)
    names = [f"M{number}" for number in range(10)]
    for name in names:
        await store.accept(new_message(name, "b@example.net"))
    assert [len(line["items"]) for line in (await asked(server, verb="list"))[:-1]] == [3, 3, 3, 1]
    assert [item["queue-id"] for item in await items(server)] == names
    assert [item["queue-id"] for item in await items(server, ids=[*names, "M99"])] == names
    *on_the_way, done = await asked(server, verb="hold", domain="example.net")
    assert [line["so-far"]["changed"] for line in on_the_way] == [3, 6, 9]
    assert done["done"]["changed"] == 10


@pytest.mark.parametrize("count", [2000, 2300, 2600])  # around what the system's buffers hold
async def test_slow_reader_gets_the_complete_answer(
    server: ControlServer, store: SqliteStore, count: int
) -> None:
    recipients = [f"{number}@example.net" for number in range(count)]
    await store.accept(new_message("M1", *recipients))

    def read_late() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(server.path))
            client.sendall(b'{"verb": "list"}\n')
            time.sleep(0.3)
            with client.makefile("rb") as answers:
                return answers.read()

    answer = await asyncio.to_thread(read_late)
    page, done = map(json.loads, answer.splitlines())
    assert len(page["items"][0]["recipients"]) == count
    assert done == {"done": {"count": 1}}


async def test_a_message_is_shown_with_its_settings_and_header(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    [line, done] = await asked(server, verb="show", id="M1")
    assert line["item"]["header"].startswith("Subject: hello\r\n")
    assert line["item"]["settings"][0]["require-tls-rule"] == "example.com"
    assert done == {"done": {"unknown": []}}


async def test_an_unknown_message_is_said_to_be_unknown(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    assert await asked(server, verb="show", id="M9") == [{"done": {"unknown": ["M9"]}}]
    assert await asked(server, verb="hold", ids=["M9", "M1"]) == [
        {"done": {"changed": 1, "unknown": ["M9"]}}
    ]


async def test_held_mail_is_not_claimed_until_it_is_released(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    await asked(server, verb="hold", ids=["M1"])
    assert await store.claim_due(now=NOW, limit=10) == []
    [item] = await items(server)
    assert (item["state"], item["recipients"][0]["next-attempt"]) == ("held", None)
    await asked(server, verb="release", ids=["M1"])
    assert len(await store.claim_due(now=NOW, limit=10)) == 1


async def test_retry_has_silent_destinations_tried_again_and_no_other_verb_has(
    store: SqliteStore,
) -> None:
    relay = QuietRelay()
    control = Control(Operator(store, lambda: NOW, store, relay))
    for verb in ("hold", "release", "remove", "retry"):
        assert relay.retried == 0
        assert [line async for line in control.answer({"verb": verb, "all": True})]
    assert relay.retried == 1


async def test_removed_mail_is_written_down_in_the_delivery_log(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net", "c@example.org"))
    assert await asked(server, verb="remove", domain="example.org") == [
        {"done": {"changed": 1, "unknown": []}}
    ]
    lines = [json.loads(stored.event.line) for stored in await store.events_after(0)]
    assert [(line["event"], line.get("recipient")) for line in lines[1:]] == [
        ("failed", "c@example.org")
    ]
    assert lines[1]["reason"] == "removed"
    await asked(server, verb="remove", all=True)
    assert await items(server) == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"verb": "destroy"}, "no such verb"),
        ({}, "no such verb"),
        ({"verb": "remove"}, "remove what"),
        ({"verb": "list", "ids": "M1"}, "ids is a list"),
        ({"verb": "list", "ids": [1]}, "ids is a list"),
        ({"verb": "list", "state": "lost"}, "no such state"),
        ({"verb": "list", "older-than": "1h"}, "older-than is a number"),
        ({"verb": "list", "domain": 5}, "domain is a text"),
        ({"verb": "log", "since": "yesterday"}, "since is a time"),
        ({"verb": "log", "since": "2030-01-31T12:00:00"}, "name its zone"),
        ({"verb": "log", "limit": 0}, "limit is a number"),
        ({"verb": "log", "events": "failed"}, "events is a list"),
        ({"verb": "list", "older-than": True}, "older-than is a number"),
        ({"verb": "list", "domian": "example.net"}, "no such filter: domian"),
        ({"verb": "log", "recipent": "a@example.net"}, "no such filter: recipent"),
        ({"verb": "remove", "all": True, "sender": "a@example.com"}, "remove what"),
        ({"verb": "remove", "all": "no", "sender": "a@example.com"}, "all is true"),
        ({"verb": "list", "sender": "\ud800"}, "sender is not UTF-8"),
        ({"verb": "log", "id": "\ud800"}, "id is not UTF-8"),
        ({"verb": "remove", "ids": ["M1", "\ud800"]}, "ids is not UTF-8"),
        ({"verb": "log", "limit": True}, "limit is a number"),
    ],
)
async def test_request_that_makes_no_sense_gets_an_error(
    server: ControlServer, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(RelayError, match=said):
        await asked(server, **request_)


@pytest.mark.parametrize("verb", ["list", "retry", "hold", "release", "remove"])
@pytest.mark.parametrize(
    "empty",
    [
        {"sender": ""},
        {"sender": " "},
        {"domain": ""},
        {"domain": "example.net", "sender": ""},
        {"ids": [], "domain": "example.net"},
        {"ids": [""], "domain": "example.net"},
        {"ids": None, "domain": "example.net"},
        {"older-than": None, "domain": "example.net"},
        {"state": None, "domain": "example.net"},
        {"state": "", "domain": "example.net"},
    ],
)
async def test_empty_filter_of_the_queue_matches_no_message(
    server: ControlServer, store: SqliteStore, verb: str, empty: dict[str, Any]
) -> None:
    before = await items(server)
    with pytest.raises(RelayError, match=r"is empty|no such state|is a (list|number)"):
        await asked(server, verb=verb, **empty)
    assert await items(server) == before


@pytest.mark.parametrize(
    "empty", [{"sender": ""}, {"recipient": ""}, {"id": ""}, {"events": []}, {"since": None}]
)
async def test_an_empty_filter_of_the_log_is_a_mistake(
    server: ControlServer, empty: dict[str, Any]
) -> None:
    with pytest.raises(RelayError, match=r"is empty|since is a time"):
        await asked(server, verb="log", **empty)


@pytest.mark.parametrize(
    "octets", [b"\n", b"hello\n", b"[1]\n", b"[" * 100_000 + b"\n", b"\xff\n", b"{" + b" " * 2**21]
)
async def test_invalid_request_is_refused_without_endless_reading(
    server: ControlServer, octets: bytes
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(octets)
    answer = await asyncio.wait_for(reader.readline(), patient(10))
    assert json.loads(answer)["error"].startswith("not a request")
    writer.close()


async def test_client_that_sends_nothing_is_disconnected(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "REQUEST_SECONDS", 0.1)
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    assert await asyncio.wait_for(reader.read(), patient(10)) == b""
    writer.close()


async def test_client_that_sends_more_after_its_request_gets_its_answer(
    server: ControlServer,
) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b'{"verb": "list"}\r\n\r\n')
    assert b"done" in await asyncio.wait_for(reader.readline(), patient(10))
    writer.close()


async def test_more_clients_than_are_served_at_a_time_are_told_to_come_again(
    server: ControlServer,
) -> None:
    silent = [await Client.connect_unix(str(server.path)) for _ in range(control_socket.AT_A_TIME)]
    await until(lambda: len(server._clients) == control_socket.AT_A_TIME)
    with pytest.raises(RelayError, match="too many requests"):
        await asked(server, verb="list")
    for connection in silent:
        await connection.close()
    await until(lambda: not server._clients)
    assert await asked(server, verb="list") == [{"done": {"count": 0}}]


def test_client_that_is_told_to_come_again_before_it_has_asked_hears_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_hung_up = threading.Event()

    def late(request: dict[str, Any]) -> str:
        assert has_hung_up.wait(patient(10))
        return json.dumps(request)

    monkeypatch.setattr("relay.admin.client.json", SimpleNamespace(dumps=late))
    path = tmp_path / "relay.sock"
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as client:
        listening.bind(os.fspath(path))
        listening.listen()
        asking = client.submit(lambda: list(ask(path, {"verb": "list"})))
        served, _ = listening.accept()
        with served:
            served.sendall(b'{"error": "too many requests at a time, try again"}\n')
        has_hung_up.set()
        with pytest.raises(RelayError, match="too many requests"):
            asking.result(patient(10))


async def test_log_is_listed_and_followed(server: ControlServer, store: SqliteStore) -> None:
    for number in range(5):
        await store.accept(new_message(f"M{number}", "b@example.net"))
    lines = await asked(server, verb="log", limit=2)
    assert [json.loads(line["line"])["queue-id"] for line in lines[:-1]] == ["M3", "M4"]
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(
        json.dumps({"verb": "log", "follow": True, "limit": 1, "events": ["accepted"]}).encode()
        + b"\n"
    )
    assert b"M4" in await reader.readline()
    assert json.loads(await reader.readline()) == {"following": {}}
    await store.accept(new_message("M5", "b@example.net"))
    assert b"M5" in await asyncio.wait_for(reader.readline(), patient(10))
    writer.close()


async def test_following_begins_with_what_is_new_where_nothing_matches_yet(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.accept(new_message("M1", "b@example.net"))
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(
        json.dumps({"verb": "log", "follow": True, "recipient": "new@example.net"}).encode() + b"\n"
    )
    assert json.loads(await asyncio.wait_for(reader.readline(), patient(10))) == {"following": {}}
    await store.accept(new_message("M2", "new@example.net"))
    assert b"M2" in await asyncio.wait_for(reader.readline(), patient(10))
    writer.close()


async def test_client_that_hangs_up_while_following_is_forgotten(server: ControlServer) -> None:
    _, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b'{"verb": "log", "follow": true}\n')
    await until(lambda: len(server._clients) == 1)
    writer.close()
    await until(lambda: not server._clients)


async def test_only_its_owner_may_open_the_socket(server: ControlServer) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


@pytest.mark.needs("root")
async def test_a_group_may_open_the_socket_where_one_is_named(
    store: SqliteStore, tmp_path: Path
) -> None:
    control = control_of(store)
    server = await start_control(control, tmp_path / "group.sock", group="mail")
    assert server.path.group() == "mail"
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o660
    await server.close()


async def test_the_socket_of_a_relay_that_is_gone_is_replaced(
    store: SqliteStore, tmp_path: Path
) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with pytest.raises(NotRunning):
        list(ask(path, {"verb": "list"}))
    server = await start_control(control_of(store), path)
    assert await asked(server, verb="list") == [{"done": {"count": 0}}]
    await server.close()
    assert not path.exists()


async def test_socket_of_a_running_relay_is_not_removed(
    server: ControlServer, store: SqliteStore
) -> None:
    with pytest.raises(SocketTaken, match="another relay answers"):
        await start_control(control_of(store), server.path)
    assert await asked(server, verb="list") == [{"done": {"count": 0}}]


async def test_file_in_the_place_of_the_socket_is_not_removed(
    store: SqliteStore, tmp_path: Path
) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(SocketTaken, match="is no socket"):
        await start_control(control_of(store), path)
    assert path.read_text() == "data"


async def test_broken_queue_is_reported_and_the_socket_keeps_working(
    server: ControlServer, store: SqliteStore
) -> None:
    await store.close()
    with pytest.raises(RelayError, match="queue cannot be read"):
        await asked(server, verb="list")
