"""All workers changed and asked as one relay: what cannot be read from their queues.

    retry, hold, …    done by each worker to what it has; the changes are added up, and unknown is
                      what is unknown to all
    health            what is wrong with any worker, by its number
    status            deliveries under way added up, silent destinations of any worker
    metrics           of all workers that answer
    explain, probe    this worker's: the configuration and the DNS are the same for all

A worker that does not answer (it may just be starting again) makes a change and the status end in
an error, after all others have done it. In health it is what is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from datetime import datetime

from relay.admin.operator import Deliveries, RunningRelay
from relay.admin.requests import RequestError, queue_request
from relay.mail.jsontext import JsonDocument
from relay.queue.store import ChangeStep, EventOfChange, QueueControl, QueueFilter, SpoolError
from relay.report.merged import merged
from relay.workers.other_worker import OtherWorker


class AllWorkers:
    """A `QueueControl` and a `RunningRelay`: this worker and the others."""

    def __init__(
        self, queue: QueueControl, relay: RunningRelay, others: Sequence[OtherWorker]
    ) -> None:
        self._queue = queue
        self._relay = relay
        # The verb has each of the others retry its own silent destinations.
        self.retry_silent = relay.retry_silent
        self.explain = relay.explain
        self.probe = relay.probe
        self._others = others

    async def change(
        self,
        wanted: QueueFilter,
        *,
        verb: str,
        now: datetime,
        after: str = "",
        event_of: EventOfChange | None = None,
    ) -> ChangeStep:
        """The verb, step by step in this worker's queue, then by the others to all they have."""
        own = await self._queue.change(wanted, verb=verb, now=now, after=after, event_of=event_of)
        if own.until is not None:
            return own
        filters = queue_request(wanted) or {"all": True}
        done = await _all_of(worker.ask({"verb": verb, **filters}) for worker in self._others)
        found = own.found.union(*(wanted.queue_ids.difference(one["unknown"]) for one in done))
        return ChangeStep(None, own.changed + sum(one["changed"] for one in done), found)

    async def health(self) -> Mapping[str, Sequence[str]]:
        """What is wrong with any worker."""
        found: dict[str, list[str]] = {"liveness": [], "readiness": []}
        every = await asyncio.gather(self._relay.health(), *map(_health_of, self._others))
        for number, one in enumerate(every):
            for key, sentences in found.items():
                sentences += [f"worker {number}: {sentence}" for sentence in one[key]]
        return found

    async def status(self) -> Deliveries:
        """Deliveries of all."""
        others = await _all_of(worker.ask({"verb": "status"}) for worker in self._others)
        own = await self._relay.status()
        every = [own, *(Deliveries(one["in-flight"], one["silent-destinations"]) for one in others)]
        silent = sorted(pair for one in every for pair in one.silent.items())
        # Of one destination the latest time.
        return Deliveries(sum(one.in_flight for one in every), dict(silent))

    async def metrics(self) -> bytes:
        """Those of all workers that answer."""
        others = await asyncio.gather(*map(_metrics_of, self._others))
        return merged([await self._relay.metrics(), *filter(None, others)])


async def _all_of(answers: Iterable[Awaitable[JsonDocument]]) -> list[JsonDocument]:
    """What came of requests, all made at once; each has ended before any error is raised."""
    found = await asyncio.gather(*answers, return_exceptions=True)
    for one in found:
        if isinstance(one, RequestError):
            raise SpoolError(str(one)) from one
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if not isinstance(one, BaseException)]


async def _health_of(worker: OtherWorker) -> Mapping[str, Sequence[str]]:
    try:
        return await worker.ask({"verb": "health"})
    except RequestError as error:
        return {"liveness": [str(error)], "readiness": [str(error)]}


async def _metrics_of(worker: OtherWorker) -> bytes:
    """Another worker's, or nothing where it does not answer."""
    try:
        return str((await worker.ask({"verb": "metrics"}))["text"]).encode()
    except RequestError:
        return b""
