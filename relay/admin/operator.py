"""What the operator may ask of a relay and change in it, whichever way the request comes.

Socket, HTTP and command line have the same `Operator`. It is one for all workers
(`relay.workers.all_workers`), or of one worker, or of a relay that does not run.
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

__all__ = ["Deliveries", "Operator", "RunningRelay"]


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Deliveries under way, and the destinations that get none, each with the time until when."""

    in_flight: int
    silent: Mapping[str, str]

    def as_json(self) -> JsonObject:
        return {"in-flight": self.in_flight, "silent-destinations": self.silent}


class RunningRelay(Protocol):
    """What only a relay that runs can say or do."""

    def retry_silent(self) -> None:
        """Destinations that did not answer are tried again."""

    async def health(self) -> Mapping[str, Sequence[str]]:
        """What is wrong, in sentences: "liveness" a restart may cure, "readiness" no mail now."""

    async def status(self) -> Deliveries:
        """Deliveries under way, and destinations that do not answer."""

    async def metrics(self) -> bytes:
        """Everything that is counted, in Prometheus' format."""

    async def explain(
        self,
        reverse_path: str,
        recipient: str,
        wishes: Wishes,
        *,
        requiretls: bool = False,
        tls_required_no: bool = False,
    ) -> JsonObject:
        """What would become of a message. No mail host is connected to."""

    async def probe(self, domain: str) -> JsonObject:
        """What the mail hosts of a domain show of themselves; they are connected to."""


@dataclass(frozen=True, slots=True)
class Operator:
    """`queue` and `relay` None: no relay is running, and its queue can only be looked at."""

    view: QueueView
    clock: Callable[[], datetime]
    queue: QueueControl | None = None
    relay: RunningRelay | None = None

    def running(self) -> RunningRelay:
        """The relay that runs; `RequestError` where none does."""
        if self.relay is None:
            raise RequestError("no relay is running")
        return self.relay

    async def change(self, verb: str, wanted: QueueFilter) -> AsyncIterator[Changed]:
        """A verb on all that matches, told step by step; the last telling is the result."""
        if self.queue is None:
            raise RequestError(f"{verb}: no relay is running")
        if verb == "retry" and self.relay is not None:
            # First: what is left alone would be put off again before we are through.
            self.relay.retry_silent()
        async for so_far in change_in_steps(self.queue, wanted, verb=verb, now=self.clock()):
            yield so_far
