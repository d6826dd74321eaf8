"""Nodes and their server killed at random under load, again and again: no 250 is lost, nothing is
invented, and only what was past MAIL comes twice.

`make torture` kills two hundred times. RELAY_SEED repeats a sweep.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import LARGE, Ledger, listed, tokens
from tests.rigs.nodes import LEASE_SECONDS, accepts, check_both_ends, health, node
from tests.rigs.ports import accepts_connections, wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay
from tests.rigs.sink import sink

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(3000)]

IS_LONG = os.environ.get("RELAY_LONG") == "1"
FAULTS, NODES = (200, 3) if IS_LONG else (8, 2)
AT_ONCE = 5
"""Connections to the host that a node has at most."""


class Chaos:
    """Draws the next fault by lot. A node that was killed starts again; nobody waits for it."""

    def __init__(self, server: Postgres, relays: list[Relay], lot: random.Random) -> None:
        self.server, self.relays, self.lot = server, relays, lot
        self.done: Counter[str] = Counter()

    def next(self) -> None:
        up = [one for one in self.relays if accepts_connections("127.0.0.1", one.port)]
        if not up:
            time.sleep(0.5)
            return
        relay = self.lot.choice(up)
        weights: dict[Callable[[Relay], None], int] = {
            self.kill: 6,
            self.stop_briefly: 2,
            self.stop_past_the_lease: 1,
            self.crash_server: 2,
            self.hang_server: 1,
        }
        [fault] = self.lot.choices(list(weights), list(weights.values()))
        fault(relay)
        self.done[fault.__name__] += 1

    def kill(self, relay: Relay) -> None:
        relay.kill()
        relay.launch()

    def stop_briefly(self, relay: Relay) -> None:
        self._stop(relay, self.lot.uniform(0.1, 1.0))

    def stop_past_the_lease(self, relay: Relay) -> None:
        self._stop(relay, LEASE_SECONDS * 1.5)

    def _stop(self, relay: Relay, seconds: float) -> None:
        assert relay.process is not None
        process = relay.process
        process.send_signal(signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

        threading.Timer(seconds, go_on).start()

    def crash_server(self, _: Relay) -> None:
        self.server.stop(signal.SIGQUIT)
        time.sleep(self.lot.uniform(0, 2))
        self.server.start()

    def hang_server(self, _: Relay) -> None:
        stopped = self.server.pause()
        time.sleep(self.lot.uniform(0.5, 4))
        self.server.go_on(stopped)


@contextlib.contextmanager
def client_of(relay: Relay, ledger: Ledger) -> Iterator[None]:
    """A client that sends mail while the body of the `with` runs, whenever the relay is there."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.1):
            if accepts_connections("127.0.0.1", relay.port):
                ledger.hand_in(relay, tokens(10), tenth=LARGE)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=patient(120))
        assert not thread.is_alive(), "a client hangs"


def wait_for_some(ledger: Ledger, lot: random.Random) -> None:
    """Some messages come between two faults, however slow the machine is."""
    enough = len(ledger.accepted) + lot.randrange(1, 15)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: len(ledger.accepted) >= enough, seconds=20)


def is_ready(relay: Relay) -> bool:
    with contextlib.suppress(OSError):
        return health(relay, "/readyz") == 200
    return False


@pytest.mark.torture
def test_no_250_is_lost_and_nothing_invented_however_nodes_and_server_are_killed(tmp_path, server):
    seed = int(os.environ.get("RELAY_SEED", "0")) or random.randrange(1, 1 << 30)
    lot, ledger = random.Random(seed), Ledger()
    delivery = {"concurrency_per_destination": AT_ONCE}
    with sink() as mx, contextlib.ExitStack() as opened:
        relays = [
            opened.enter_context(node(tmp_path, server, mx, name, delivery=delivery, start=False))
            for name in "abc"[:NODES]
        ]
        for relay in relays:
            relay.launch()
        for relay in relays:
            wait_until(
                partial(accepts_connections, "127.0.0.1", relay.port), seconds=200, what="the start"
            )
        chaos = Chaos(server, relays, lot)
        with contextlib.ExitStack() as crowds:
            for relay in relays * 2:
                crowds.enter_context(client_of(relay, ledger))
            while chaos.done.total() < FAULTS:
                wait_for_some(ledger, lot)
                chaos.next()
                if chaos.done.total() % 20 == 0:
                    print(f"{dict(chaos.done)}, {len(ledger.accepted)} messages", flush=True)
        for relay in relays:
            wait_until(partial(is_ready, relay), seconds=120, what="readiness")
            wait_until(partial(accepts, relay, ledger), what="mail")
        wait_until(lambda: listed(relays[0]) == [], seconds=120, what="an empty queue")
        codes = Counter(ledger.codes.values())
        print(f"seed {seed}: {dict(chaos.done)}, answers {dict(codes)},", end=" ")
        print(f"{ledger.duplicates(mx)} came twice")
        # A fault of the server is one of all nodes.
        ends = sum(n * (NODES if "server" in what else 1) for what, n in chaos.done.items())
        check_both_ends(relays, mx, ledger, twice=ends * AT_ONCE, seconds=120)
        assert ledger.accepted
