"""Several workers asked through one socket answer as one relay would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.admin.client import RelayError, ask
from relay.admin.control import Control
from relay.admin.control_socket import ControlServer, start_control
from relay.admin.operator import Deliveries, Operator
from relay.mail.event import Event
from relay.queue.entry import State
from relay.queue.sqlite.reader import Reader
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import QueueFilter, SpoolError
from relay.workers.all_queues import AllQueues
from relay.workers.all_workers import AllWorkers
from relay.workers.other_worker import OtherWorker
from tests.fakes.queued import NOW, new_message
from tests.fakes.running import QuietRelay
from tests.fakes.waiting import patient


def told(queue_id: str, seconds: float) -> Event:
    at = NOW + timedelta(seconds=seconds)
    line = json.dumps({"event": "accepted", "timestamp": at.timestamp(), "queue-id": queue_id})
    return Event(f"{queue_id}.a", at, "accepted", queue_id, "a@example.com", "", line)


class Busy(QuietRelay):
    """A worker in trouble, with deliveries under way."""

    async def health(self) -> dict[str, list[str]]:
        return {"liveness": ["stuck"], "readiness": []}

    async def status(self) -> Deliveries:
        return Deliveries(2, {"mx.example": "2026-03-01T12:00:00+00:00"})


class Workers:
    """Three of them; the first answers for all at `socket`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stores: list[SqliteStore] = []
        self.servers: list[ControlServer] = []

    async def start(self) -> None:
        self.relays = [Busy() for _ in range(3)]
        for number, relay in enumerate(self.relays):
            directory = self.directory / f"spool{number}"
            store = await SqliteStore.open(directory, now=NOW, synchronous="OFF")
            self.stores.append(store)
            if number:
                control = Control(Operator(store, lambda: NOW, store, relay))
                path = self.directory / f"sock.{number}"
                self.servers.append(await start_control(control, path))
        self.readers = [Reader.of(self.directory / f"spool{number}") for number in (1, 2)]
        others = [OtherWorker(number, self.directory / f"sock.{number}") for number in (1, 2)]
        self.every = AllWorkers(self.stores[0], self.relays[0], others)
        view = AllQueues([self.stores[0], *self.readers])
        control = Control(Operator(view, lambda: NOW, self.every, self.every))
        self.servers.append(await start_control(control, self.directory / "sock"))

    async def stop(self) -> None:
        for server in reversed(self.servers):
            await server.close()
        for reader in self.readers:
            await reader.close()
        for store in self.stores:
            await store.close()

    async def take(self, worker: int, queue_id: str, *, seconds: float = 0.0) -> None:
        await self.stores[worker].accept(
            new_message(queue_id=queue_id, events=(told(queue_id, seconds),))
        )

    async def ask(self, **request: Any) -> list[dict[str, Any]]:
        return await asyncio.to_thread(
            lambda: list(ask(self.directory / "sock", request, seconds=patient(10)))
        )


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Workers]:
    some = Workers(tmp_path)
    await some.start()
    yield some
    await some.stop()


async def test_the_queue_is_listed_in_the_order_of_arrival_whoever_has_it(workers: Workers) -> None:
    for number, queue_id in enumerate(["M1", "M2", "M3", "M4", "M5", "M6"]):
        await workers.take((number * 2) % 3, queue_id)
    answer = await workers.ask(verb="list")
    [page, done] = answer
    assert [item["queue-id"] for item in page["items"]] == ["M1", "M2", "M3", "M4", "M5", "M6"]
    assert done == {"done": {"count": 6}}


async def test_a_message_is_shown_wherever_it_is(workers: Workers) -> None:
    await workers.take(2, "M1")
    answer = await workers.ask(verb="show", id="M1")
    assert answer[0]["item"]["queue-id"] == "M1"
    assert (await workers.ask(verb="show", id="M2"))[-1] == {"done": {"unknown": ["M2"]}}


async def test_verb_is_done_by_all_workers_and_an_id_is_unknown_if_none_has_it(
    workers: Workers,
) -> None:
    for worker in range(3):
        await workers.take(worker, f"M{worker}")
    answer = await workers.ask(verb="hold", ids=["M0", "M2", "M9"])
    assert answer[-1] == {"done": {"changed": 2, "unknown": ["M9"]}}
    answer = await workers.ask(verb="remove", all=True)
    assert answer[-1] == {"done": {"changed": 3, "unknown": []}}


async def test_the_log_is_told_in_the_order_of_time(workers: Workers) -> None:
    for number in range(9):
        await workers.take(number % 3, f"M{number}", seconds=number)
    lines = [json.loads(line["line"]) for line in (await workers.ask(verb="log"))[:-1]]
    assert [line["queue-id"] for line in lines] == [f"M{number}" for number in range(9)]
    latest = [json.loads(line["line"]) for line in (await workers.ask(verb="log", limit=4))[:-1]]
    assert [line["queue-id"] for line in latest] == ["M5", "M6", "M7", "M8"]


async def test_a_log_that_is_followed_tells_of_every_worker(workers: Workers) -> None:
    await workers.take(1, "M1", seconds=1)
    reader, writer = await asyncio.open_unix_connection(workers.directory / "sock")
    writer.write(b'{"verb": "log", "follow": true, "limit": 10}\n')

    async def heard() -> str:
        async with asyncio.timeout(patient(10)):
            while True:
                line = json.loads(await reader.readline())
                if "line" in line:
                    return str(json.loads(line["line"])["queue-id"])

    assert await heard() == "M1"
    for worker in (2, 0, 1):
        await workers.take(worker, f"N{worker}", seconds=5)
        assert await heard() == f"N{worker}"
    writer.close()


async def test_trouble_of_a_worker_is_reported_with_its_number(workers: Workers) -> None:
    answer = await workers.ask(verb="health")
    assert answer[-1]["done"]["liveness"] == [
        "worker 0: stuck",
        "worker 1: stuck",
        "worker 2: stuck",
    ]


async def test_deliveries_of_all_are_told_as_those_of_one(workers: Workers) -> None:
    silent = {"mx.example": "2026-03-01T12:00:00+00:00"}
    assert await workers.ask(verb="status") == [
        {"done": {"in-flight": 6, "silent-destinations": silent}}
    ]


async def test_a_verb_of_an_interface_reaches_the_worker_that_has_the_message(
    workers: Workers,
) -> None:
    await workers.take(0, "M1")
    await workers.take(2, "M2")
    wanted = QueueFilter(queue_ids=frozenset({"M1", "M2"}))
    assert (await workers.every.change(wanted, verb="hold", now=NOW)).changed == 2
    assert (await workers.stores[2].counts())[State.HELD] == 1
    held = QueueFilter(state=State.HELD)
    assert (await workers.every.change(held, verb="release", now=NOW)).changed == 2
    await workers.servers[1].close()
    with pytest.raises(SpoolError, match="worker 2 does not answer"):
        await workers.every.change(wanted, verb="hold", now=NOW)


async def test_every_worker_retries_its_silent_destinations(workers: Workers) -> None:
    await workers.ask(verb="retry", all=True)
    assert [relay.retried for relay in workers.relays] == [1, 1, 1]


async def test_a_worker_that_does_not_answer_hides_no_mail_and_a_change_without_it_is_an_error(
    workers: Workers,
) -> None:
    for worker in range(3):
        await workers.take(worker, f"M{worker}")
    await workers.servers[1].close()  # worker 2 starts again just now
    [page, done] = await workers.ask(verb="list")
    assert [item["queue-id"] for item in page["items"]] == ["M0", "M1", "M2"]
    assert done == {"done": {"count": 3}}
    for verb in ("hold", "status"):
        with pytest.raises(RelayError, match="worker 2 does not answer"):
            await workers.ask(verb=verb, **({"all": True} if verb == "hold" else {}))
    assert (await workers.stores[1].counts())[State.HELD] == 1, "the others have done it"
    assert (await workers.ask(verb="show", id="M1"))[0]["item"]["queue-id"] == "M1"
    assert "worker 2 does not answer; try again" in str((await workers.ask(verb="health"))[-1])


async def test_a_listing_that_lacks_a_queue_ends_in_an_error(workers: Workers) -> None:
    await workers.take(0, "M1")
    await workers.readers[1].close()
    for verb in ("list", "log"):
        with pytest.raises(RelayError, match="the queue cannot be read"):
            await workers.ask(verb=verb)
    assert (await workers.ask(verb="show", id="M1"))[0]["item"]["queue-id"] == "M1"
