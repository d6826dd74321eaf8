"""The relay as an operator sees it, for the control socket, HTTP, page and command line.

There is an `Operator` for all workers together (`relay.workers.all_workers`), for one worker, and
for a relay that does not run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from relay.admin.operations import Changed, change_in_steps
from relay.admin.requests import RequestError
from relay.mail.jsontext import JsonObject
from relay.policy.fields import Wishes
from relay.queue.store import QueueControl, QueueFilter, QueueView


@dataclass(frozen=True, slots=True)
class Deliveries:
    """How many deliveries are under way, and until when a silent destination is not tried."""

    in_flight: int
    silent: Mapping[str, str]

    def as_json(self) -> JsonObject:
        return {"in-flight": self.in_flight, "silent-destinations": self.silent}


class RunningRelay(Protocol):
    """The questions and verbs that only a running relay can answer."""

    def retry_silent(self) -> None:
        """Allow new attempts at destinations that did not answer."""

    async def health(self) -> Mapping[str, Sequence[str]]:
        """What is wrong, in sentences: "liveness" a restart may cure, "readiness" stops mail."""

    async def status(self) -> Deliveries:
        """The deliveries under way, and the destinations that do not answer."""

    async def metrics(self) -> bytes:
        """All metrics, in Prometheus' format."""

    async def explain(
        self,
        reverse_path: str,
        recipient: str,
        wishes: Wishes,
        *,
        requiretls: bool = False,
        tls_required_no: bool = False,
    ) -> JsonObject:
        """What would happen to a message. The relay connects to no mail host for this."""

    async def probe(self, domain: str) -> JsonObject:
        """Connect to the mail hosts of a domain, and return what they show of TLS."""


@dataclass(frozen=True, slots=True)
class Operator:
    """`queue` and `relay` are None where no relay is running. Its queue can only be read then."""

    view: QueueView
    clock: Callable[[], datetime]
    queue: QueueControl | None = None
    relay: RunningRelay | None = None

    def running(self) -> RunningRelay:
        """The running relay; `RequestError` if none is running."""
        if self.relay is None:
            raise RequestError("no relay is running")
        return self.relay

    async def change(self, verb: str, wanted: QueueFilter) -> AsyncIterator[Changed]:
        """Do a verb to all messages that match. The last value is the result."""
        if self.queue is None:
            raise RequestError(f"{verb}: no relay is running")
        if verb == "retry" and self.relay is not None:
            # First, or the mail for silent destinations would be deferred again at once.
            self.relay.retry_silent()
        async for so_far in change_in_steps(self.queue, wanted, verb=verb, now=self.clock()):
            yield so_far
