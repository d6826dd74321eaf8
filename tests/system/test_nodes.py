"""Several relays with one queue on PostgreSQL: what holds when a node or the server fails."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rigs.ledger import Ledger, tokens
from tests.rigs.ports import wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink, sink

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]

LEASE_SECONDS = 6


@contextlib.contextmanager
def node(
    directory: Path, server: Postgres, mx: Sink, name: str, *, start: bool = True, **more: Any
) -> Iterator[Relay]:
    """A relay that is a node of the queue on the server; it has a directory of its own."""
    home = directory / name
    home.mkdir()
    with relay_process(home, start=False, routes=mx.route, **more) as relay:
        relay.config["queue"] = {
            "url": server.url(),
            "node": name,
            "lease": f"{LEASE_SECONDS}s",
            "retry": ["1s"],
        }
        if start:
            relay.start()
        yield relay


def nodes_of(relay: Relay) -> dict[str, str]:
    found = json.loads(relay.run("queue", "nodes", "--json").stdout)
    return {one["name"]: one["state"] for one in found}


def arrived(mx: Sink, words: list[str]) -> bool:
    return len(set(mx.tokens(set(words)))) == len(words)


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
        wait_until(lambda: nodes_of(one_of_two(tmp_path))["a"] == "lost", what="the loss")
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


def accepts(relay: Relay, ledger: Ledger) -> bool:
    word = tokens(1)
    ledger.hand_in(relay, word)
    return bool(ledger.accepted & set(word))


def test_server_that_crashes_costs_no_mail_and_no_restart(tmp_path, server):
    words, ledger = tokens(20), Ledger()
    with sink() as mx, node(tmp_path, server, mx, "a") as relay:
        ledger.hand_in(relay, words)
        server.stop(signal.SIGQUIT)
        down, refused = tokens(1), Ledger()
        began = time.monotonic()
        refused.hand_in(relay, down)
        assert refused.codes[down[0]] == 451
        assert time.monotonic() - began < 15
        health = relay.run("health")
        assert health.returncode == 0, "a restart would bring no server back"
        server.start()
        began = time.monotonic()
        wait_until(lambda: accepts(relay, refused), what="mail again")
        assert time.monotonic() - began < 10
        everything = [*words, *refused.accepted]
        wait_until(lambda: arrived(mx, everything), what="all mail")
        assert not mx.tokens(set(down)), "what was refused is not delivered"
        assert sorted(mx.tokens(set(words))) == sorted(words)


def test_server_that_hangs_keeps_no_client_waiting_for_long(tmp_path, server):
    with sink() as mx, node(tmp_path, server, mx, "a") as relay:
        ledger = Ledger()
        assert accepts(relay, ledger)
        stopped = server.pause()
        try:
            word = tokens(1)
            began = time.monotonic()
            ledger.hand_in(relay, word)
            assert ledger.codes[word[0]] == 451
            assert time.monotonic() - began < 30
        finally:
            server.go_on(stopped)
        wait_until(lambda: accepts(relay, ledger), what="mail again")
        wait_until(lambda: arrived(mx, sorted(ledger.accepted)), what="all that was accepted")
        assert not mx.tokens(ledger.refused)


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
        assert nodes_of(two) == {"a": "live", "b": "live"}
        mx.gate.set()
        wait_until(lambda: arrived(mx, words), what="the mail")
        log = two.run("log", "--json", "--event", "delivered").stdout
        assert {json.loads(line)["queue-id"] for line in log.splitlines()} == ledger.queue_ids()
        assert one.stop() == 0
        assert nodes_of(two) == {"a": "left", "b": "live"}


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
