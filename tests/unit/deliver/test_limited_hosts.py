"""Hosts that take few connections or none, against all of delivery with real sockets."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import timedelta

import pytest

from relay.deliver.tls import TlsContexts
from relay.queue.entry import State
from relay.route.next_hop import Host
from tests.fakes.queue import MemoryQueue
from tests.fakes.waiting import idle_seconds, until
from tests.rigs.limited_host import LimitedHost
from tests.unit.deliver.conftest import QUICK
from tests.unit.deliver.delivering import SLOW, at, delivering, fill


async def deliver_all(
    host: LimitedHost, contexts: TlsContexts, domains: int
) -> tuple[MemoryQueue, float]:
    """200 messages to a host; the queue afterwards, and the seconds that took."""
    queue = fill(200, domains)
    timeouts = QUICK if host.manner == "silence" else SLOW
    async with delivering(queue, lambda _: [at(host)], contexts, timeouts=timeouts):
        took = await until(lambda: len(queue.settlements) >= 200, within=40)
    return queue, took


@pytest.mark.parametrize("domains", [1, 40])
@pytest.mark.parametrize("manner", ["421", "421 at MAIL", "close", "reset", "refuse", "silence"])
async def test_the_rest_of_a_host_that_takes_three_connections_is_not_deferred(
    contexts, manner, domains
):
    async with LimitedHost(3, manner) as host:
        queue, took = await deliver_all(host, contexts, domains)
    states = queue.states()
    assert states[State.DELIVERED] >= 180
    assert len(set(host.taken)) == len(host.taken) == states[State.DELIVERED]
    assert host.turned_away <= 30
    print(f"{manner}, {domains} domains: {took:.2f} s, {states}")


@pytest.mark.parametrize("domains", [1, 40])
@pytest.mark.parametrize("manner", ["421", "close", "reset"])
async def test_a_host_that_takes_three_connections_takes_at_most_twice_the_time_of_any_other(
    contexts, manner, domains
):
    for _ in range(3):  # what else the machine does may fall into one of the two
        async with LimitedHost(1000) as host:
            _, without = await deliver_all(host, contexts, domains)
        async with LimitedHost(3, manner) as host:
            _, took = await deliver_all(host, contexts, domains)
        if took <= 2 * without + 0.5:
            break
    else:
        pytest.fail(f"{took:.2f} s, and {without:.2f} s without a limit")


async def test_a_host_that_takes_one_connection_gets_one(contexts):
    async with LimitedHost(1) as host:
        queue, _ = await deliver_all(host, contexts, 40)
    assert queue.states()[State.DELIVERED] >= 180


@pytest.mark.parametrize("refusal", ["450 4.3.0 later", "550 5.7.1 not from you"])
async def test_a_host_that_takes_no_message_gets_no_more_connections_than_a_new_one(
    contexts, refusal
):
    queue = fill(200, 200)
    async with LimitedHost(1000, rate=(0, 60), over_rate=refusal) as host:
        async with delivering(queue, lambda _: [at(host)], contexts, timeouts=SLOW):
            await until(lambda: len(queue.settlements) >= 200)
        assert host.most <= 5 + 1  # one may be closing
    assert not host.taken


@pytest.mark.parametrize("domains", [1, 150])
async def test_a_host_that_domains_are_routed_to_gets_its_connections_and_no_more(
    contexts, domains
):
    queue = fill(300, domains)
    async with LimitedHost(1000, seconds=0.02) as host:
        hosts = [at(host, "hop.example:25")]
        # No time-out: a connection that was given up may stand at the host for a moment.
        async with delivering(
            queue, lambda _: hosts, contexts, timeouts=SLOW, concurrency_per_destination=7
        ):
            await until(lambda: len(queue.settlements) >= 300)
        assert host.most == 7
    assert queue.states() == {State.DELIVERED: 300}


async def test_addresses_of_one_next_hop_are_counted_together(contexts):
    queue = fill(60, 60)
    async with LimitedHost(99, seconds=0.02) as one, LimitedHost(99, seconds=0.02) as other:
        hosts = [at(one, "hop.example:25"), at(other, "hop.example:25")]

        def hosts_of(domain: str) -> Sequence[Host]:
            return hosts if len(domain) % 2 else hosts[::-1]

        async with delivering(queue, hosts_of, contexts, concurrency_per_destination=6):
            most = 0
            while len(queue.settlements) < 60:
                most = max(most, one.open + other.open)
                await asyncio.sleep(0.001)
        assert most <= 6 + 2  # of each one connection may be closing
        assert one.taken
        assert other.taken


async def test_a_busy_host_is_waited_for_and_its_backup_is_not_used(contexts):
    queue = fill(60, 60)
    async with LimitedHost(99, seconds=0.02) as first, LimitedHost(99) as backup:
        hosts = [at(first), Host("mx2.example", backup.address, backup.port, preference=20)]
        async with delivering(queue, lambda _: hosts, contexts):
            await until(lambda: len(queue.settlements) >= 60)
    assert len(first.taken) == 60
    assert not backup.connections


async def test_a_host_without_a_greeting_holds_five_places_whatever_names_lead_to_it(contexts):
    queue = fill(200, 200, "dead")
    async with LimitedHost(0, "silence") as dead, LimitedHost(99) as well:
        hosts = {True: [at(dead)], False: [at(well)]}

        def hosts_of(domain: str) -> Sequence[Host]:
            return hosts["dead" in domain]

        async with delivering(queue, hosts_of, contexts, timeouts=SLOW) as delivery:
            await until(lambda: dead.connections == 5)
            for n in range(20):
                queue.add(f"W{n}", f"w@well{n}.example")
                await queue.until(n + 1, within=timedelta(seconds=1))
            await until(lambda: len(queue.claimed) <= 10)  # the others wait in the queue
            assert delivery.scheduler.in_flight == 5
        assert dead.connections == 5
    assert len(queue.settlements) == 20


async def test_silence_of_a_host_counts_for_all_its_names(contexts):
    queue = fill(100, 100, "dead")
    async with LimitedHost(0, "silence") as dead:
        async with delivering(queue, lambda _: [at(dead)], contexts, timeouts=QUICK) as delivery:
            await until(lambda: delivery.destinations.silence_of(at(dead).destination) is not None)
            await until(lambda: len(queue.settlements) >= 50)
        assert dead.connections <= 10
    assert queue.states() == {State.DEFERRED: len(queue.settlements)}
    told = [change.outcome.description for s in queue.settlements for change in s.changes]
    assert sum(text.startswith("not tried, it gave no answer") for text in told) >= 40


async def test_a_silent_host_is_no_reason_to_leave_its_backup_alone(contexts):
    queue = fill(40, 40)
    async with LimitedHost(0, "silence") as dead, LimitedHost(99) as backup:
        hosts = [at(dead), Host("mx2.example", backup.address, backup.port, preference=20)]
        async with delivering(queue, lambda _: hosts, contexts, timeouts=QUICK):
            await until(lambda: len(queue.settlements) >= 40)
    assert queue.states() == {State.DELIVERED: 40}
    assert dead.connections <= 5


async def test_a_host_that_was_full_is_not_left_alone_for_the_sender_to_hear_of_it(contexts):
    # What waits for a connection does not wait for longer than its sender is patient.
    queue = MemoryQueue()
    async with LimitedHost(0, "silence") as dead:
        for n in range(20):
            queue.add(f"Q{n}", f"a@d{n}.example")
        async with delivering(queue, lambda _: [at(dead)], contexts, timeouts=SLOW):
            await until(lambda: dead.connections == 5)
            await until(lambda: bool(queue.released))
    assert not queue.settlements


async def test_a_connection_that_takes_no_more_messages_is_replaced(contexts):
    queue = fill(40)
    async with (
        LimitedHost(99, messages=3) as host,
        delivering(queue, lambda _: [at(host)], contexts),
    ):
        await until(lambda: len(queue.settlements) >= 40)
    assert queue.states() == {State.DELIVERED: 40}
    assert host.connections >= 13


async def test_mail_delivered_before_a_host_turned_away_is_not_sent_again(contexts):
    queue = fill(1)
    async with (
        LimitedHost(99, messages=2) as host,
        delivering(queue, lambda _: [at(host)], contexts),
    ):
        await queue.until(1)
        host.takes = 0  # no new connection from now on
        queue.add("BIG", *(f"r{n}@d0.example" for n in range(150)))
        await queue.until(2)
        await asyncio.sleep(0.1)
        assert len(host.taken) == 2
    assert queue.states() == {State.DELIVERED: 101, State.DEFERRED: 50}


@pytest.mark.parametrize("domains", [1, 150])
async def test_host_that_becomes_faster_does_not_idle_while_mail_waits(contexts, domains):
    queue = fill(300, domains)
    async with LimitedHost(1000, seconds=1.0) as host:
        hosts = [at(host)]
        async with delivering(
            queue, lambda _: hosts, contexts, timeouts=SLOW, concurrency_per_destination=7
        ):
            await until(lambda: len(queue.settlements) >= 14)
            host.seconds = 0.0
            before = idle_seconds()
            await until(lambda: len(queue.settlements) >= 300, within=100)
            idle = idle_seconds() - before
    print(f"{idle:.1f} s idle")
    assert idle < 15


async def test_connections_of_a_domain_are_counted_at_all_its_hosts_together(contexts):
    queue, rng = fill(80), random.Random(1)
    async with (
        LimitedHost(99, seconds=0.02) as one,
        LimitedHost(99, seconds=0.02) as other,
        LimitedHost(99, seconds=0.02) as third,
    ):
        hosts = [at(one), at(other), at(third)]

        def hosts_of(domain: str) -> Sequence[Host]:
            return rng.sample(hosts, 3)

        async with delivering(
            queue, hosts_of, contexts, timeouts=SLOW, concurrency_per_destination=4
        ):
            most = 0
            while len(queue.settlements) < 80:
                most = max(most, one.open + other.open + third.open)
                await asyncio.sleep(0.001)
    assert queue.states() == {State.DELIVERED: 80}
    assert most <= 4 + 1  # one may be closing
