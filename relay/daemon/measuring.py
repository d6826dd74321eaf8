"""Measures a running relay: counters, current values, and whether the queue answers.

Wrappers of the store (`MeteredSink`) and of the router (`metered`) count; results are counted where
they are recorded (`relay.deliver.recorder`). The others return the current values for
`relay.report.metrics`; `relay.daemon.status` calls them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from cryptography import x509

from relay.deliver.destinations import Destinations
from relay.queue.event_search import newest_seq
from relay.queue.rows import moment
from relay.queue.store import EventLog, MessageSink, NewMessage, QueueFilter, QueueView, SpoolError
from relay.receive.listener import Listener
from relay.report.gauges import NextHopNow
from relay.report.metrics import Metrics
from relay.route.next_hop import NoRoute, Route, RouteFinder

_A_BEAT_SECONDS = 10.0
"""How long the store's threads may take to answer before they count as stuck."""

_EPOCH = datetime.fromtimestamp(0, UTC)


class MeteredSink:
    """A sink whose accepted messages are counted and timed."""

    def __init__(self, sink: MessageSink, metrics: Metrics) -> None:
        self._sink = sink
        self._metrics = metrics
        self.stage = sink.stage
        self.discard = sink.discard

    async def accept(self, new: NewMessage) -> None:
        began = time.perf_counter()
        await self._sink.accept(new)
        self._metrics.accepted(
            new.message.origin, new.message.size_bytes, time.perf_counter() - began
        )


def metered(route: RouteFinder, metrics: Metrics) -> RouteFinder:
    """A router whose lookups are counted and timed."""

    async def measured(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Route:
        began = time.perf_counter()
        found = await route(domain, reverse_path, next_hop)
        metrics.routed(time.perf_counter() - began, found=not isinstance(found, NoRoute))
        return found

    return measured


async def stuck_queue(view: QueueView, events: EventLog) -> str:
    """Whether the threads that read and write the queue answer; "" or what is wrong.

    A store in trouble answers too: a full disk is not cured by a restart.
    """
    try:
        async with asyncio.timeout(_A_BEAT_SECONDS):
            await events.purge_events(before=_EPOCH)
            await newest_seq(view)
    except TimeoutError:
        return f"the queue has not answered for {_A_BEAT_SECONDS:g} s"
    except SpoolError:
        pass
    return ""


class QueuedMail:
    """How much mail is in the queue, as metrics tell it: recipients by state, and the age of the
    oldest message in seconds, 0 for an empty queue. No value where the queue cannot be read.

    `stands_for`: an answer is given again for so long. A server looks through a whole table to
    count, and it is asked by every node and page.
    """

    def __init__(self, view: QueueView, *, stands_for: timedelta) -> None:
        self._view = view
        self._seconds = stands_for.total_seconds()
        self._until = 0.0
        self._counts: Mapping[str, int] = {}
        self._oldest: datetime | None = None

    async def get(self, now: datetime) -> tuple[Mapping[str, int], float | None]:
        """The recipients, and the age."""
        if time.monotonic() >= self._until:
            try:
                counts = await self._view.counts()
                first = await self._view.list_messages(QueueFilter(), now=now, limit=1)
            except SpoolError:
                return {}, None
            self._counts = {state.value: count for state, count in counts.items()}
            self._oldest = moment(first[0].arrived) if first else None
            self._until = time.monotonic() + self._seconds
        if self._oldest is None:
            return self._counts, 0.0
        return self._counts, max((now - self._oldest).total_seconds(), 0.0)


async def log_lag(events: EventLog) -> int:
    """How many committed events the log's file does not have yet."""
    return max(await events.last_seq() - await events.log_mark(), 0)


def room_at(directory: str) -> int:
    """The room left where a directory is, in octets; 0 where nobody can tell."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def expiries(paths: Iterable[str | None]) -> dict[str, datetime]:
    """When the certificate in each of some files expires; None is a place that shows none."""
    return {path: at for path in paths if path is not None and (at := _expiry(path)) is not None}


def _expiry(path: str) -> datetime | None:
    try:
        return _parsed_expiry(path, os.stat(path).st_mtime_ns)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=64)
def _parsed_expiry(path: str, _: int) -> datetime:
    with open(path, "rb") as file:
        return x509.load_pem_x509_certificates(file.read())[0].not_valid_after_utc


def next_hops(destinations: Destinations) -> dict[str, NextHopNow]:
    """What is so at the next hops of the configuration that have had mail."""
    found = {}
    for name, one in destinations.limits.known.items():
        waiting = destinations.waiting_for(one.hop)
        found[name] = NextHopNow(
            one.open,
            waiting_for_connection=0 if one.waits_for_rate else waiting,
            waiting_for_rate=waiting if one.waits_for_rate else 0,
        )
    return found


def connections(listeners: Iterable[Listener]) -> dict[str, int]:
    """The clients inside, by listener."""
    return {str(listener.address): listener.connections for listener in listeners}
