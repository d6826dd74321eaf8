"""Several nodes to the operator, to programs over HTTP and to webhooks: as one relay."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, listed, tokens
from tests.rigs.nodes import arrived, node
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay
from tests.rigs.sink import sink
from tests.system.test_http_workers import Api, Ear

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]


def test_lines_that_a_lost_node_could_not_write_are_in_the_file_of_another(tmp_path, server):
    words, ledger = tokens(40), Ledger()
    nowhere: dict[str, Any] = {"log": {"delivery": "/proc/none/delivery.log"}}
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", **nowhere) as one,
        node(tmp_path, server, mx, "b") as two,
    ):
        for relay, some in ((one, words[:20]), (two, words[20:])):
            ledger.stream(relay, some)
        one.kill()
        wait_until(lambda: arrived(mx, words), what="all mail")

        def ids_of(event: str) -> set[str]:
            return {line["queue-id"] for line in two.events(event=event)}

        wait_until(
            lambda: ids_of("accepted") == ids_of("delivered") == ledger.queue_ids(),
            what="every line in the file of the other node",
        )
        lines = two.events()
        assert {line["node"] for line in lines} == {"a", "b"}
        assert len({line["id"] for line in lines}) == len(lines)
        asked = two.run("log", "--json").stdout.splitlines()
        assert {json.loads(line)["id"] for line in asked} == {line["id"] for line in lines}
        assert "  at a" in two.run("log").stdout


class HeldEar(Ear):
    """A webhook's server that answers nobody until `gate` is set; who is gone by then, never."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        ear, hear = self, self.server.RequestHandlerClass.do_POST  # type: ignore[attr-defined]

        class Handler(self.server.RequestHandlerClass):  # type: ignore[name-defined,misc]
            def do_POST(self) -> None:
                ear.gate.wait(patient(60))
                self.connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        self.close_connection = True
                        return
                self.connection.setblocking(True)
                hear(self)

        self.server.RequestHandlerClass = Handler


@pytest.fixture
def ear() -> Iterator[HeldEar]:
    with HeldEar().listening() as made:
        yield made
        made.gate.set()


def test_calls_that_a_killed_node_owes_are_made_by_another(tmp_path, server, ear):
    api, ledger, words = Api(free_port()), Ledger(), tokens(40)
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", admin=api.admin) as one,
        node(tmp_path, server, mx, "b", admin={**api.admin, "http": f"127.0.0.1:{free_port()}"}),
    ):
        api.ask("/v3/domains/client.example/webhooks", form={"id": "accepted", "url": ear.url})
        ledger.stream(one, words, clients=8)
        one.kill()  # some events were looked at, some not; no call was answered
        ear.gate.set()
        wait_until(lambda: ear.queue_ids() == ledger.queue_ids(), what="a call for each message")
        assert len({told["id"] for told in ear.heard}) == len(words)
        assert {told["node"] for told in ear.heard} == {"a"}


def test_verb_reaches_what_another_node_has_not_begun_on(tmp_path, server):
    words, ledger = tokens(30), Ledger()
    limits: dict[str, Any] = {"delivery": {"concurrency": 4, "concurrency_per_destination": 4}}
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", **limits) as one,
        node(tmp_path, server, mx, "b", **limits) as two,
    ):
        mx.gate.clear()
        ledger.stream(one, words)
        done = two.run("queue", "hold", "--all")
        assert done.returncode == 0, done.stderr
        states = [
            message["state"] for message in json.loads(one.run("queue", "list", "--json").stdout)
        ]
        # What is being tried, up to four at each node, goes on.
        assert states.count("held") >= len(words) - 8
        mx.gate.set()
        wait_until(lambda: {one["state"] for one in listed(two)} == {"held"}, what="held mail only")
        assert one.run("queue", "release", "--all").returncode == 0
        wait_until(lambda: arrived(mx, words), what="the mail")
        assert sorted(mx.tokens(set(words))) == sorted(words)


def test_settings_over_http_are_in_force_at_every_node_and_any_shows_the_queue(tmp_path, server):
    apis = [Api(free_port()), Api(free_port())]
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", admin=apis[0].admin) as one,
        node(tmp_path, server, mx, "b", admin=apis[1].admin) as two,
    ):
        mx.gate.clear()
        path = "/v3/domains/client.example/connection"
        apis[0].ask(path, form={"require_tls": "true"}, method="PUT")

        def required_at(relay: Relay) -> bool:
            whom = ("--from", "a@client.example", "--to", "b@dest.example")
            found = json.loads(relay.run("explain", *whom, "--json").stdout)
            return bool(found["policy"]["require-tls"]["value"])

        wait_until(lambda: required_at(two), what="the setting at the other node")
        ledger = Ledger()
        ledger.stream(one, tokens(5))
        ids = sorted(ledger.queue_ids())
        for api in apis:
            assert [item["queue-id"] for item in api.ask("/relay/v1/queue")["items"]] == ids
            assert api.ask(f"/relay/v1/queue/{ids[0]}")["queue-id"] == ids[0]
