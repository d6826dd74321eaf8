"""Limits for one client, and for all clients together. Pure.

`Limits` holds the limits that the operator sets; the constants need no setting. `Connections`
counts the connections of a node, for all listeners together, and refuses one beyond the limit
before it costs more than a line of text. Where several workers share a port, each counts its own
connections and sees those of the others (`Elsewhere`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from relay.mail.option import Size
from relay.mail.reply import Reply
from relay.submit.failures import client_key

COMMAND_LINE_OCTETS = 4096
"""RFC 5321 §4.5.3.1.4 asks for 512, and extensions add to it (RFC 3461 §5.4 alone adds 1000)."""

AUTH_LINE_OCTETS = 12288
"""RFC 4954 §4: the longest line of an AUTH exchange."""

UNPRODUCTIVE_COMMANDS_PER_SESSION = 100
"""Commands that bring no message nearer (refused, unknown, NOOP, RSET, VRFY…), without a message
accepted between them.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """`transaction`: from MAIL to the end of data. `idle`: how long a command or more data may
    take.
    """

    message_size_bytes: Size = 50 * 1024 * 1024
    recipients: int = 1000
    connections: int = 1000
    connections_per_client: int = 200
    idle: timedelta = timedelta(minutes=5)
    received_hops: int = 100
    transaction: timedelta = timedelta(minutes=30)
    idle_seconds: float = field(init=False, repr=False, compare=False)
    transaction_seconds: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "idle_seconds", self.idle.total_seconds())
        object.__setattr__(self, "transaction_seconds", self.transaction.total_seconds())


TOO_MANY_CONNECTIONS = Reply(421, "4.3.2", "Too many connections, try again later")
TOO_MANY_FROM_CLIENT = Reply(421, "4.7.0", "Too many connections from your address")


class Elsewhere(Protocol):
    """The connections that other workers of this node have."""

    def total(self) -> int:
        """The number of all of them."""

    def of(self, client: str) -> int:
        """The number from one client."""

    def changed(self, client: str, by: int) -> None:
        """Tell the other workers of one connection more or less here."""


class Connections:
    """How many connections are open, in all and from each client; limits hold for the node."""

    def __init__(self, elsewhere: Elsewhere | None = None) -> None:
        self.total = 0
        self._by_client: dict[str, int] = {}
        self._elsewhere = elsewhere

    def admit(self, client: str, limits: Limits) -> Reply | None:
        """Count a new connection, or return why it is refused. A UNIX socket has no own limit."""
        key = client_key(client)
        count = self._by_client.get(key, 0)
        elsewhere = self._elsewhere
        if self.total + (elsewhere.total() if elsewhere else 0) >= limits.connections:
            return TOO_MANY_CONNECTIONS
        if key and count + (elsewhere.of(key) if elsewhere else 0) >= limits.connections_per_client:
            return TOO_MANY_FROM_CLIENT
        self._count(key, 1)
        return None

    def leave(self, client: str) -> None:
        """Count the end of an admitted connection."""
        self._count(client_key(client), -1)

    def of(self, client: str) -> int:
        """How many connections a client has."""
        return self._by_client.get(client_key(client), 0)

    def _count(self, key: str, by: int) -> None:
        self.total += by
        count = self._by_client.get(key, 0) + by
        if count:
            self._by_client[key] = count
        else:
            del self._by_client[key]
        if self._elsewhere is not None:
            self._elsewhere.changed(key, by)
