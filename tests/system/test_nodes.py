"""Several relays with one queue on PostgreSQL: nodes that are killed, stopped or mistaken, and what
an operator sees. `test_node_faults` has the faults of the server, and of the way to it.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.rigs.ledger import Ledger, listed, tokens
from tests.rigs.nodes import LEASE_SECONDS, accepts, arrived, node, states
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay
from tests.rigs.sink import sink
from tests.system.test_http_workers import Api, Ear

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]


def test_mail_of_a_killed_node_is_delivered_by_another_and_once(tmp_path, server):
    words, ledger = tokens(40), Ledger()
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a") as one,
        node(tmp_path, server, mx, "b") as two,
    ):
        mx.gate.clear()  # no attempt comes past MAIL
        ledger.stream(one, words)
        assert ledger.accepted == set(words)
        one.kill()
        killed = time.monotonic()
        mx.gate.set()
        wait_until(lambda: arrived(mx, words), what="all mail at the other node")
        assert time.monotonic() - killed < LEASE_SECONDS + 10
        assert sorted(mx.tokens(set(words))) == sorted(words)

        def told(event: str) -> set[str]:
            """By the logs of both nodes together."""
            events = [*one.events(event=event), *two.events(event=event)]
            return {one["queue-id"] for one in events}

        wait_until(lambda: told("accepted") == told("delivered") == ledger.queue_ids())


def test_killed_node_that_starts_again_takes_its_mail_back_at_once(tmp_path, server):
    words, ledger = tokens(10), Ledger()
    with sink() as mx, node(tmp_path, server, mx, "a") as relay:
        relay.stop()
        relay.config["queue"]["lease"] = "5m"
        relay.start()
        mx.gate.clear()
        ledger.hand_in(relay, words)
        relay.kill()
        mx.gate.set()
        relay.start()
        wait_until(lambda: arrived(mx, words), seconds=60, what="the mail, before the lease ends,")
        assert sorted(mx.tokens(set(words))) == sorted(words)


def test_node_stopped_for_longer_than_its_lease_sends_nothing_under_it(tmp_path, server):
    words, ledger, after = tokens(20), Ledger(), Ledger()
    with sink() as mx, node(tmp_path, server, mx, "a") as one, node(tmp_path, server, mx, "b"):
        mx.gate.clear()
        ledger.stream(one, words)
        one.signal(signal.SIGSTOP)
        wait_until(lambda: states(one_of_two(tmp_path))["a"] == "lost", what="the loss")
        mx.gate.set()
        wait_until(lambda: arrived(mx, words), what="the mail at the other node")
        one.signal(signal.SIGCONT)
        wait_until(lambda: "it begins anew" in one.stderr, what="its return")
        # It comes back as itself, without a restart.
        more = tokens(5)
        wait_until(lambda: accepts(one, after), what="mail taken by it")
        after.hand_in(one, more)
        assert after.accepted >= set(more)
        wait_until(lambda: arrived(mx, more), what="that mail")
        assert sorted(mx.tokens(set(words))) == sorted(words), "nothing was sent twice"


def one_of_two(directory: Path) -> Relay:
    """The other node, to be asked."""
    home = directory / "b"
    return Relay(home, {}, 0)


def test_second_process_of_a_name_exits_and_says_so(tmp_path, server):
    with sink() as mx, node(tmp_path, server, mx, "a"):
        again = tmp_path / "again"
        again.mkdir()
        with node(again, server, mx, "a", start=False) as second:
            with pytest.raises(AssertionError, match="the relay ended at its start"):
                second.start()
            assert "another process is node a" in second.stderr
            assert "queue.node" in second.stderr


def test_operator_sees_one_queue_from_any_node(tmp_path, server):
    words, ledger = tokens(6), Ledger()
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a") as one,
        node(tmp_path, server, mx, "b") as two,
    ):
        mx.gate.clear()
        ledger.hand_in(one, words)
        listed = json.loads(two.run("queue", "list", "--json").stdout)
        assert {message["queue-id"] for message in listed} == ledger.queue_ids()
        assert states(two) == {"a": "live", "b": "live"}
        mx.gate.set()
        wait_until(lambda: arrived(mx, words), what="the mail")
        log = two.run("log", "--json", "--event", "delivered").stdout
        assert {json.loads(line)["queue-id"] for line in log.splitlines()} == ledger.queue_ids()
        assert one.stop() == 0
        assert states(two) == {"a": "left", "b": "live"}


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
                ear.gate.wait(60)
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
    made = HeldEar()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.gate.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_calls_that_a_killed_node_owes_are_made_by_another(tmp_path, server, ear):
    api, ledger, words = Api(free_port()), Ledger(), tokens(40)
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", admin=api.admin) as one,
        node(tmp_path, server, mx, "b", admin={**api.admin, "http": None}),
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


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://relay@/nothing?host={dir}&port={port}", 'database "nothing" does not exist'),
        ("mysql://relay@localhost/relay", "write postgresql://USER@HOST/DATABASE"),
        ("postgresql://relay:secret@/x?host={dir}&speed=9", "there is no option 'speed'"),
    ],
)
def test_start_names_the_mistake_in_the_address_and_shows_no_password(tmp_path, server, url, says):
    with sink() as mx, node(tmp_path, server, mx, "a", start=False) as relay:
        relay.config["queue"]["url"] = url.format(dir=server.directory, port=server.port)
        with pytest.raises(AssertionError, match="the relay ended at its start"):
            relay.start()
        assert "queue.url" in relay.stderr
        assert says in relay.stderr
        assert "secret" not in relay.stderr
