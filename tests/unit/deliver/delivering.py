"""All of delivery with real sockets and a queue in memory, for tests of hosts with limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from relay.deliver.attempt import Attempt
from relay.deliver.destinations import Destinations
from relay.deliver.options import DeliveryOptions, Timeouts, TlsOptions
from relay.deliver.scheduler import Scheduler
from relay.deliver.tls import TlsContexts
from relay.queue.retry import RetrySchedule
from relay.route.next_hop import Host, Hosts, NextHop, Route
from tests.fakes.floors import Published, floors_of
from tests.fakes.queue import MemoryQueue
from tests.fakes.scheduling import make_scheduler
from tests.rigs.limited_host import LimitedHost

SCHEDULE = RetrySchedule(waits=(timedelta(minutes=5), timedelta(hours=1)))

SLOW = Timeouts(
    connect=timedelta(seconds=20), greeting=timedelta(seconds=60), command=timedelta(seconds=60)
)


HostsOf = Callable[[str], Sequence[Host]]


@dataclass
class Delivery:
    """The parts of delivery that a test may look at."""

    destinations: Destinations
    scheduler: Scheduler


@asynccontextmanager
async def delivering(
    queue: MemoryQueue,
    hosts_of: HostsOf,
    contexts: TlsContexts,
    *,
    timeouts: Timeouts = SLOW,
    hop_of: Callable[[str], NextHop | None] = lambda domain: None,
    **options: Any,
) -> AsyncIterator[Delivery]:
    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Route:
        hop = hop_of(domain)
        return Hosts(tuple(replace(host, hop=hop or host.hop) for host in hosts_of(domain)))

    delivery = DeliveryOptions(timeouts=timeouts, **options)
    most = delivery.concurrency_per_destination
    destinations = Destinations(most, SCHEDULE, clock=time.monotonic)
    attempt = Attempt(
        route,
        floors=floors_of(Published()),
        hostname="relay.example",
        delivery=delivery,
        tls=TlsOptions(),
        contexts=contexts,
        destinations=destinations,
    )
    scheduler = make_scheduler(
        queue,
        attempt,
        schedule=SCHEDULE,
        options=delivery,
        destinations=destinations,
        leads_to=lambda entry: hop_of(entry.domain),
    )
    task = asyncio.create_task(scheduler.run())
    try:
        yield Delivery(destinations, scheduler)
    finally:
        await scheduler.drain(timedelta(0))
        await task
        await attempt.close()
        assert not queue.claimed


def fill(count: int, domains: int = 1, prefix: str = "d") -> MemoryQueue:
    """So many messages, each for one recipient, over so many domains."""
    queue = MemoryQueue()
    for n in range(count):
        queue.add(f"{prefix}{n}", f"r{n}@{prefix}{n % domains}.example")
    return queue


def at(host: LimitedHost, next_hop: str = "") -> Host:
    return Host(
        "mx.example",
        host.address,
        host.port,
        hop=NextHop(next_hop, ((next_hop,),)) if next_hop else None,
    )
