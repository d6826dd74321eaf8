"""Limits of destinations that hold for all nodes of a queue together, counted by the host."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.sandbox.dns import DnsServer
from tests.rigs.ledger import Ledger, tokens
from tests.rigs.limited_host import LimitedHost, most_at_once
from tests.rigs.ports import wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay, relay_process

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(300)]

LEASE_SECONDS = 5


@contextlib.contextmanager
def node(
    directory: Path, server: Postgres, name: str, *, start: bool = True, **sections: Any
) -> Iterator[Relay]:
    """A node that calls itself by its name at a host."""
    home = directory / name
    home.mkdir()
    with relay_process(home, start=False, **sections) as relay:
        relay.config["hostname"] = f"{name}.example"
        relay.config["queue"] = {"url": server.url(), "node": name, "lease": f"{LEASE_SECONDS}s"}
        if start:
            relay.start()
        yield relay


def states(relay: Relay) -> dict[str, str]:
    return {one["name"]: one["state"] for one in relay.ask("nodes")}


async def until(question: Callable[[], bool], what: str) -> None:
    """Wait while the host, which is in this process, goes on."""
    await asyncio.to_thread(wait_until, question, seconds=90, what=what)


async def test_limit_of_a_domain_holds_over_all_nodes_while_they_come_and_go(tmp_path, server):
    limit, words, ledger = 4, tokens(300), Ledger()
    async with LimitedHost(99, seconds=0.6, address="127.0.0.61") as host, DnsServer() as dns:
        dns.mx("dest.example", (10, "mx.dest.example"))
        dns.a("mx.dest.example", host.address)
        delivery = {
            "port": host.port,
            "allow_networks": ["127.0.0.0/8"],
            "concurrency_per_destination": limit,
        }
        sections = {"dns": dns.nameserver, "delivery": delivery}
        with contextlib.ExitStack() as stack:
            a, b, c = (
                stack.enter_context(node(tmp_path, server, name, start=False, **sections))
                for name in "abc"
            )
            for relay, some in ((a, words[::2]), (b, words[1::2])):
                await asyncio.to_thread(relay.start)
                await asyncio.to_thread(ledger.stream, relay, some)
            assert ledger.accepted == set(words)
            await until(lambda: host.open == limit, "all connections of two nodes")
            await asyncio.to_thread(c.start)
            await until(lambda: clients(host) == {"a", "b", "c"}, "mail from the third node")
            c.kill()
            await until(lambda: states(a)["c"] == "lost", "the loss of the third node")
            await until(lambda: host.open == limit, "the part of the lost node in use")
            b.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            await until(lambda: states(a)["b"] == "lost", "the loss of the second node")
            await until(lambda: open_by(host, "a") == limit, "all connections by one node")
            b.signal(signal.SIGCONT)
            goes_on = time.monotonic()
            await until(lambda: begun(host, "b", goes_on), "mail from the second node again")
            # What the stopped node held stands at the host, whatever anybody does.
            held = [
                one
                for one in host.stays
                if one.client == "b.example" and one.began < stopped < one.ended
            ]
            assert most_at_once(one for one in host.stays if one not in held) == limit
            host.seconds = 0.01
            await until(lambda: len(host.taken) >= len(words), "all mail")


def clients(host: LimitedHost) -> set[str]:
    """The nodes that have a connection."""
    return {one.client.partition(".")[0] for one in host.stays if one.ended > time.monotonic()}


def open_by(host: LimitedHost, name: str) -> int:
    now = time.monotonic()
    return sum(one.client == f"{name}.example" and one.ended > now for one in host.stays)


def begun(host: LimitedHost, name: str, since: float) -> bool:
    return any(one.client == f"{name}.example" and one.began > since for one in host.stays)


@pytest.mark.parametrize("by_sender", [False, True])
async def test_mail_for_a_next_hop_of_one_connection_goes_out_by_the_node_that_has_it(
    tmp_path, server, by_sender
):
    words, ledger = tokens(30), Ledger()
    async with LimitedHost(99, seconds=0.05) as host:
        hop = {"host": f"[{host.address}]", "port": host.port, "max_connections": 1}
        routes = {"routes_by_sender": {"client.example": hop}} if by_sender else {}
        sections: dict[str, Any] = {"routes": {} if by_sender else {"*": hop}, **routes}
        with contextlib.ExitStack() as stack:
            nodes = [
                stack.enter_context(node(tmp_path, server, name, **sections)) for name in "abc"
            ]
            await until(lambda: list(states(nodes[0]).values()) == ["live"] * 3, "three nodes")
            for number, relay in enumerate(nodes):
                for word in words[number::3]:
                    recipient = f"b@d{word}.example"
                    await asyncio.to_thread(ledger.hand_in, relay, [word], recipient=recipient)
            assert ledger.accepted == set(words), ledger.texts[words[0]]
            await until(lambda: len(host.taken) == len(words), "all mail")
            assert most_at_once(host.stays) == 1
            delivered = [event for relay in nodes for event in relay.events(event="delivered")]
            assert {one["delivery-status"]["attempt-no"] for one in delivered} == {1}


async def test_rate_of_a_next_hop_holds_over_all_nodes(tmp_path, server):
    words, ledger = tokens(60), Ledger()
    async with LimitedHost(99) as host:
        hop = {"host": f"[{host.address}]", "port": host.port, "rate": "6/s"}
        with contextlib.ExitStack() as stack:
            nodes = [
                stack.enter_context(node(tmp_path, server, name, routes={"*": hop}))
                for name in "ab"
            ]
            await until(lambda: list(states(nodes[0]).values()) == ["live"] * 2, "two nodes")
            for number, relay in enumerate(nodes):
                await asyncio.to_thread(ledger.stream, relay, words[number::2])
            await until(lambda: len(host.taken) == len(words), "all mail")
            # A second's worth may be saved up (docs/routes.md).
            assert host.most_begun_within(1.0) <= 12
            assert host.most_begun_within(5.0) <= 36
