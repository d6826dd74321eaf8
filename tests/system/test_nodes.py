"""Several relays with one queue on PostgreSQL: nodes that are killed, stopped or mistaken, and what
an operator sees. `test_node_faults` has the faults of the server, and of the way to it.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.rigs.ledger import Ledger, tokens
from tests.rigs.nodes import LEASE_SECONDS, accepts, arrived, node, states
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay
from tests.rigs.sink import sink

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
    return Relay(home, {"admin": {"socket": "relay.sock"}}, 0)


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
