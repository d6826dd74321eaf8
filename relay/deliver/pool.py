"""Connections that are kept open for the next message.

Messages share a connection only if host, address, port, next hop, login and requirement are the
same: the connection of an opportunistic message is never used for a message that requires TLS. The
key contains the host's name, because the certificate was verified for it. The result of TLS
(verified, unverified, in clear) stays with the connection, and the log line of each message has it.

A connection is used for a limited number of messages (`max_messages_per_connection` of a next hop,
or 100) and a limited time, and idles for a few seconds only: an idle connection is one less
that the host has left for others, and hosts close idle connections. It is also one of the
`concurrency` connections of the relay: where these are all taken, the one that has idled for the
longest time is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass
from datetime import timedelta

from relay.deliver.connection import Connection
from relay.mail.record import record
from relay.route.next_hop import Credentials, Host, NextHop, TlsMode
from relay.route.security import Requirement


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How long a connection may be used. `connections`: the limit, with the idle ones."""

    messages: int = 100
    age: timedelta = timedelta(minutes=5)
    idle: timedelta = timedelta(seconds=5)
    connections: int = 200


@record(frozen=True, slots=True)
class PoolKey:
    """The facts that two messages must have in common to share a connection."""

    name: str
    address: str
    port: int
    tls: TlsMode
    credentials: Credentials | None
    needed: Requirement
    destination: str
    hop: NextHop | None

    def __hash__(self) -> int:
        """The hash of the fields that differ most; the hash of a whole requirement is slow."""
        needed = self.needed
        return hash((self.name, self.address, self.port, needed.tls_required, needed.verify))


def pool_key(host: Host, needed: Requirement) -> PoolKey:
    """The key of a host's connections for messages with this requirement."""
    return PoolKey(
        host.name,
        host.address,
        host.port,
        host.tls,
        host.credentials,
        needed,
        host.destination,
        host.hop,
    )


@dataclass(eq=False, slots=True)
class _Idle:
    key: PoolKey
    connection: Connection
    domain: str
    until: float


class Pool:
    """The idle connections. A connection in use belongs to its user; the pool only counts it."""

    def __init__(self, limits: PoolLimits | None = None) -> None:
        self._limits = limits or PoolLimits()
        self._idle_seconds = self._limits.idle.total_seconds()
        self._age_seconds = self._limits.age.total_seconds()
        self._idle: dict[PoolKey, deque[_Idle]] = {}
        self._order: dict[_Idle, None] = {}
        self._in_use = 0
        self._in_use_for: Counter[str] = Counter()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        """The number of idle connections."""
        return len(self._order)

    def begin_use(self, domain: str) -> None:
        """Count a connection as in use for a recipient domain, from before it is there until
        `end_use`, after it was given back.
        """
        self._in_use += 1
        self._in_use_for[domain] += 1

    def end_use(self, domain: str) -> None:
        """The connection is not in use any more."""
        self._in_use -= 1
        left = self._in_use_for[domain] - 1
        if left:
            self._in_use_for[domain] = left
        else:
            del self._in_use_for[domain]

    def take(self, key: PoolKey) -> Connection | None:
        """A connection that seems to be open; the one that was used last comes first."""
        while (waiting := self._idle.get(key)) is not None:
            idle = waiting.pop()
            del self._order[idle]
            if not waiting:
                del self._idle[key]
            if idle.connection.is_usable and not self.is_worn_out(idle.connection):
                return idle.connection
            idle.connection.quit()
        if self._are_too_many and self._order:
            self._expire(next(iter(self._order)))
        return None

    def give_back(self, key: PoolKey, connection: Connection, domain: str) -> None:
        """Keep a connection for the next message, if it may still be used. `domain`: of the
        recipients of the last one.
        """
        usable = connection.is_usable and not self.is_worn_out(connection)
        if self._closed or not usable or self._are_too_many:
            connection.quit()
            return
        idle = _Idle(key, connection, domain, time.monotonic() + self._idle_seconds)
        self._idle.setdefault(key, deque()).append(idle)
        self._order[idle] = None
        if self._alarm is None:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(self._idle_seconds, self._expire_old)

    def kept_at(self, destination: str, address: str = "") -> int:
        """How many idle connections to a destination there are; to one address of it, those that
        the host has not closed.
        """
        idle = self._idle_at(destination)
        if not address:
            return len(idle)
        return sum(one.key.address == address and one.connection.is_usable for one in idle)

    def make_room(self, destination: str, others: int) -> None:
        """Close idle connections to a destination beyond so many: one more is about to be made."""
        idle = self._idle_at(destination)
        for one in idle[: len(idle) - others]:
            self._expire(one)

    def make_room_for(self, domain: str, most: int) -> None:
        """Close idle connections that last were a recipient domain's, wherever they lead, so that
        the domain has no more than `most` with the one that is about to be made.
        """
        idle = [idle for idle in self._order if idle.domain == domain]
        for one in idle[: max(len(idle) + self._in_use_for[domain] - most, 0)]:
            self._expire(one)

    def make_room_at_hop(self, hop: NextHop, others: int) -> None:
        """Close idle connections to an operator's next hop beyond so many."""
        idle = [idle for idle in self._order if _is_to(idle.connection, hop)]
        for one in idle[: len(idle) - others]:
            self._expire(one)

    def close_idle(self) -> None:
        """Close all idle connections."""
        for idle in list(self._order):
            self._expire(idle)

    def forget(self, key: PoolKey) -> None:
        """Close all kept connections under a key, because the host has closed one of them."""
        for idle in list(self._idle.get(key, ())):
            self._expire(idle)

    async def close(self) -> None:
        """Send QUIT on all kept connections, and keep none from now on."""
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        everyone = list(self._order)
        self.close_idle()
        await asyncio.gather(*(idle.connection.wait_closed() for idle in everyone))

    def _idle_at(self, destination: str) -> list[_Idle]:
        return [idle for idle in self._order if idle.key.destination == destination]

    @property
    def _are_too_many(self) -> bool:
        return len(self._order) + self._in_use > self._limits.connections

    def is_worn_out(self, connection: Connection) -> bool:
        """Whether a connection has carried as many messages as it may, or stood as long."""
        hop = connection.host.hop
        most = (hop and hop.max_messages_per_connection) or self._limits.messages
        age = time.monotonic() - connection.opened_at
        return connection.messages >= most or age >= self._age_seconds

    def _expire_old(self) -> None:
        """Close what has idled for long enough, the oldest first; look again when the next has."""
        self._alarm, now = None, time.monotonic()
        for idle in list(self._order):
            if idle.until > now:
                loop = asyncio.get_running_loop()
                self._alarm = loop.call_later(idle.until - now, self._expire_old)
                return
            self._expire(idle)

    def _expire(self, idle: _Idle) -> None:
        self._remove(idle)
        idle.connection.quit()

    def _remove(self, idle: _Idle) -> None:
        waiting = self._idle[idle.key]
        waiting.remove(idle)
        del self._order[idle]
        if not waiting:
            del self._idle[idle.key]


def _is_to(connection: Connection, hop: NextHop) -> bool:
    """Whether a connection leads to a next hop, by its name: a reload makes it anew."""
    return connection.host.hop is not None and connection.host.hop.name == hop.name
