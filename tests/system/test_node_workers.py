"""Several workers of one relay whose queue is on PostgreSQL: each is a node."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.admin.client import ask
from tests.rigs.ledger import Ledger, check_log, listed, tokens
from tests.rigs.ports import wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay, relay_process, workers_of
from tests.rigs.sink import Sink, sink

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(180)]


@contextlib.contextmanager
def workers(
    directory: Path, server: Postgres, mx: Sink, *, lease: str = "6s", **more: Any
) -> Iterator[Relay]:
    """A relay with three workers, all of them ready."""
    with relay_process(directory, start=False, routes=mx.route, **more) as relay:
        relay.config["workers"] = 3
        relay.config["queue"] = {"url": server.url(), "node": "a", "lease": lease, "retry": ["1s"]}
        relay.start()
        wait_until(lambda: "ready: " in relay.stderr, what="all workers")
        yield relay


def nodes_of(relay: Relay) -> dict[str, str]:
    return {one["name"]: one["state"] for one in relay.ask("nodes")}


def messages(relay: Relay) -> float:
    """How many recipients the metrics of all workers say are queued."""
    [found] = ask(relay.directory / "relay.sock", {"verb": "metrics"})
    text = found["done"]["text"]
    numbers = [
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("relay_queue_messages{")
    ]
    return sum(numbers)


def test_each_worker_is_a_node_and_the_operator_sees_one_queue(tmp_path, server):
    words, ledger = tokens(30), Ledger()
    with sink() as mx, workers(tmp_path, server, mx) as relay:
        assert nodes_of(relay) == {"a": "live", "a.1": "live", "a.2": "live"}
        mx.gate.clear()
        ledger.stream(relay, words, clients=12)
        assert ledger.accepted == set(words)
        assert {one["queue-id"] for one in listed(relay)} == ledger.queue_ids()
        assert messages(relay) == len(words)
        assert relay.run("health").stdout.strip() == "healthy"
        held = relay.run("queue", "hold", "--all")
        assert held.returncode == 0, held.stderr
        mx.gate.set()
        assert relay.run("queue", "release", "--all").returncode == 0
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        assert ledger.duplicates(mx) == 0
        assert relay.stop() == 0
    check_log(relay)


def test_worker_that_is_killed_comes_back_under_its_name_before_its_lease_ends(tmp_path, server):
    words, ledger = tokens(30), Ledger()
    with sink() as mx, workers(tmp_path, server, mx, lease="5m") as relay:
        mx.gate.clear()
        ledger.stream(relay, words, clients=12)
        assert ledger.accepted == set(words)
        before = workers_of(relay)
        for pid in before[1:]:
            os.kill(pid, signal.SIGKILL)
        mx.gate.set()
        ledger.settle(relay, mx)
        wait_until(lambda: len(workers_of(relay)) == 3, what="the new workers")
        wait_until(lambda: set(nodes_of(relay).values()) == {"live"}, what="all nodes")
        assert set(nodes_of(relay)) == {"a", "a.1", "a.2"}
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        assert "another process is node" not in relay.stderr
