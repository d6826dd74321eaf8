"""Next hops whose operator has limited connections and messages, against all of delivery."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import timedelta

import pytest

from relay.daemon.measuring import next_hops
from relay.queue.entry import State
from relay.report.gauges import NextHopNow
from relay.route.next_hop import Host, NextHop, Rate
from tests.fakes.queue import MemoryQueue
from tests.fakes.waiting import idle_seconds, until
from tests.rigs.limited_host import LimitedHost
from tests.unit.deliver.delivering import SLOW, at, delivering, fill


def hop(**limits: object) -> NextHop:
    return NextHop("provider", (("hop.example",),), **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("domains", [1, 150])
@pytest.mark.parametrize("most", [1, 10])
async def test_next_hop_never_has_more_connections_than_its_operator_allows(
    contexts, domains, most
):
    queue, limited = fill(200, domains), hop(max_connections=most)
    async with LimitedHost(most, seconds=0.005) as host:
        async with delivering(
            queue, lambda _: [at(host)], contexts, timeouts=SLOW, hop_of=lambda _: limited
        ):
            await until(lambda: len(queue.settlements) >= 200)
        assert host.most == most
        assert not host.turned_away
    assert queue.states() == {State.DELIVERED: 200}


async def test_connection_that_is_being_closed_counts_until_the_host_has_closed_it(contexts):
    queue, limited = fill(40), hop(max_connections=2, max_messages_per_connection=1)
    async with LimitedHost(2, farewell=0.02) as host:
        async with delivering(
            queue, lambda _: [at(host)], contexts, timeouts=SLOW, hop_of=lambda _: limited
        ):
            await until(lambda: len(queue.settlements) >= 40)
        assert host.most == 2
        assert host.connections == 40
    assert queue.states() == {State.DELIVERED: 40}


async def test_connection_without_a_session_counts_until_the_host_has_closed_it(contexts):
    queue, limited = fill(1), hop(max_connections=1)
    async with (
        LimitedHost(99, hello="554 5.7.1 go away", farewell=0.2) as bad,
        LimitedHost(99) as well,
    ):
        most = 0

        def is_delivered() -> bool:
            nonlocal most
            most = max(most, bad.open + well.open)
            return bool(queue.settlements) and not bad.open

        hosts = [replace(at(bad), name="mx1.example"), replace(at(well), preference=1)]
        async with delivering(
            queue, lambda _: hosts, contexts, timeouts=SLOW, hop_of=lambda _: limited
        ):
            await until(is_delivered)
        assert bad.connections == 1
        assert most == 1
    assert queue.states() == {State.DELIVERED: 1}


@pytest.mark.parametrize("most", [1, 7])
async def test_connection_carries_no_more_messages_than_its_operator_allows(contexts, most):
    queue, limited = fill(30), hop(max_messages_per_connection=most)
    queue.add("BIG", *(f"r{n}@d0.example" for n in range(250)))  # three transactions
    async with (
        LimitedHost(99) as host,
        delivering(queue, lambda _: [at(host)], contexts, hop_of=lambda _: limited),
    ):
        await until(lambda: len(queue.settlements) >= 31)
    assert queue.states() == {State.DELIVERED: 280}
    assert max(host.messages_of) <= most
    assert sum(host.messages_of) == 33


async def test_messages_over_the_rate_wait_and_are_neither_deferred_nor_logged(contexts, caplog):
    caplog.set_level(logging.DEBUG, "relay")
    queue, limited = fill(40, 40), hop(rate=Rate(600, 60))
    async with (
        LimitedHost(99) as host,
        delivering(queue, lambda _: [at(host)], contexts, hop_of=lambda _: limited),
    ):
        began = idle_seconds()
        took = await until(lambda: len(queue.settlements) >= 40)
        idle = idle_seconds() - began
    times = sorted(host.taken_at.values())
    assert queue.states() == {State.DELIVERED: 40}
    assert took >= 2.5
    assert idle <= 5
    assert max(sum(begin <= at < begin + 1 for at in times) for begin in times) <= 21
    assert [r.message for r in caplog.records if r.levelno >= logging.INFO] == []
    assert {change.recipient.attempts for s in queue.settlements for change in s.changes} == {1}


async def test_transactions_of_one_message_are_messages_of_the_rate(contexts):
    queue, limited = MemoryQueue(), hop(rate=Rate(60, 60))
    queue.add("BIG", *(f"r{n}@d0.example" for n in range(250)))
    async with (
        LimitedHost(99) as host,
        delivering(queue, lambda _: [at(host)], contexts, timeouts=SLOW, hop_of=lambda _: limited),
    ):
        took = await until(lambda: len(queue.settlements) >= 1)
    assert took >= 2
    assert sum(host.messages_of) == 3


@pytest.mark.parametrize("limits", [{"rate": Rate(60, 60)}, {"max_connections": 1}])
async def test_mail_for_others_does_not_wait_for_a_limited_next_hop(contexts, limits):
    # 3,000 messages to 3,000 domains, and a page is 200.
    queue, limited = fill(3000, 3000, "bulk"), hop(**limits)
    async with LimitedHost(99, seconds=0.2) as host, LimitedHost(99) as well:

        def hosts_of(domain: str) -> list[Host]:
            return [at(host)] if "bulk" in domain else [at(well)]

        def hop_of(domain: str) -> NextHop | None:
            return limited if "bulk" in domain else None

        async with delivering(queue, hosts_of, contexts, timeouts=SLOW, hop_of=hop_of) as delivery:
            await until(lambda: len(queue.released) >= 2900)
            trips = []
            for n in range(40):
                await asyncio.sleep(0.05)
                began, recipient = idle_seconds(), f"w@well{n}.example"
                queue.add(f"W{n}", recipient)
                await until(lambda: recipient in well.taken_at)  # noqa: B023
                trips.append(idle_seconds() - began)
                assert delivery.scheduler.in_flight <= 10
        claims = queue.claims
    print(f"worst {max(trips):.3f} s, {claims} claims, {len(queue.released)} releases")
    assert max(trips) < 1
    assert len(host.taken) >= 2
    assert State.DEFERRED not in queue.states()


@pytest.mark.parametrize(
    ("limits", "now"),
    [
        ({"rate": Rate(1, 3600)}, NextHopNow(1, waiting_for_rate=29)),
        ({"max_connections": 1}, NextHopNow(1, waiting_for_connection=29)),
    ],
)
async def test_operator_sees_how_many_wait_for_a_next_hop_and_for_what(contexts, limits, now):
    queue, limited = fill(30, 30), hop(**limits)
    async with (
        LimitedHost(99, seconds=5) as host,
        delivering(
            queue, lambda _: [at(host)], contexts, timeouts=SLOW, hop_of=lambda _: limited
        ) as delivery,
    ):
        await until(lambda: next_hops(delivery.destinations) == {"provider": now})


async def test_reload_that_raises_a_rate_frees_the_mail_that_waits(contexts):
    queue = fill(20, 20)
    limited = [hop(rate=Rate(1, 3600))]
    async with (
        LimitedHost(99) as host,
        delivering(queue, lambda _: [at(host)], contexts, hop_of=lambda _: limited[0]) as delivery,
    ):
        await until(lambda: len(host.taken) == 1)
        await asyncio.sleep(0.5)
        assert len(host.taken) == 1
        limited[0] = hop(rate=Rate(6000, 60))
        delivery.scheduler.routes_changed()
        await until(lambda: len(queue.settlements) >= 20)


async def test_silent_next_hop_is_asked_again_after_15_seconds_and_its_mail_waits(contexts):
    queue, limited = fill(100, 100), hop(rate=Rate(6000, 60))
    async with LimitedHost(0, "close") as dead:
        async with delivering(
            queue, lambda _: [at(dead)], contexts, hop_of=lambda _: limited
        ) as delivery:
            await until(lambda: bool(delivery.scheduler.silent_domains()))
            await asyncio.sleep(0.2)
            [(name, until_)] = delivery.scheduler.silent_domains().items()
        assert dead.connections <= 10
    assert name == "next hop provider"
    first = min(settlement.at for settlement in queue.settlements)
    assert timedelta(seconds=13) < until_ - first < timedelta(seconds=17)
