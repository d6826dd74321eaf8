"""What one worker answers an operator: its health, its deliveries, its counters, and what would
happen to a message.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from relay import __version__
from relay.admin.operator import Deliveries
from relay.daemon.assemble import Parts
from relay.daemon.explaining import explain
from relay.daemon.measuring import (
    QueuedMail,
    connections,
    expiries,
    log_lag,
    next_hops,
    room_at,
    stuck_queue,
)
from relay.daemon.probing import probe_domain
from relay.deliver.options import security_options
from relay.mail.jsontext import JsonObject
from relay.policy.fields import Wishes
from relay.report.gauges import Snapshot

_LISTED_DESTINATIONS = 1000
_NO_TIME, _COUNT_STANDS = timedelta(0), timedelta(seconds=10)
_PATIENCE = timedelta(seconds=15)
"""For mail hosts, and for the policy hosts of their domains."""


class Status:
    """A `relay.admin.operator.RunningRelay`. `tasks`: the parts that run beside each other."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.tasks: list[asyncio.Task[None]] = []
        is_shared = parts.config.queue.location.is_shared
        self._queued = QueuedMail(parts.store, stands_for=_COUNT_STANDS if is_shared else _NO_TIME)
        self.serves_http = False
        self.is_draining = False

    def retry_silent(self) -> None:
        """Destinations that did not answer are tried again."""
        self._parts.scheduler.retry_silent()

    async def status(self) -> Deliveries:
        """Deliveries under way, and destinations that do not answer."""
        scheduler = self._parts.scheduler
        silent = list(scheduler.silent_domains().items())[:_LISTED_DESTINATIONS]
        return Deliveries(scheduler.in_flight, {name: until.isoformat() for name, until in silent})

    async def health(self) -> dict[str, list[str]]:
        """What is wrong."""
        liveness = await self.liveness()
        return {"liveness": liveness, "readiness": [*liveness, *self._not_ready()]}

    async def liveness(self) -> list[str]:
        """What is wrong so that a restart may cure it: parts that ended, a queue that does not
        answer.
        """
        found = [f"{task.get_name()} has ended" for task in self.tasks if task.done()]
        if self._parts.config.queue.location.is_shared:
            return found  # a restart brings no server back: that is readiness
        stuck = await stuck_queue(self._parts.store, self._parts.store)
        return [*found, stuck] if stuck else found

    def _not_ready(self) -> list[str]:
        """Why no mail should be handed to this relay though it is alive."""
        found = ["draining"] if self.is_draining else []
        if trouble := self._parts.store.not_ready():
            found.append(trouble)
        if self._parts.delivery_log.is_in_trouble:
            found.append("the delivery log cannot be written")
        return found

    async def explain(
        self,
        reverse_path: str,
        recipient: str,
        wishes: Wishes,
        *,
        requiretls: bool = False,
        tls_required_no: bool = False,
    ) -> JsonObject:
        """What would become of a message, under the rules in force."""
        parts = self._parts
        return await explain(
            reverse_path=reverse_path,
            recipient=recipient,
            wishes=wishes,
            rules=parts.rules(),
            route=parts.router.route,
            options=security_options(parts.config.delivery, parts.config.tls),
            floors=parts.floors,
            patience=_PATIENCE,
            lifetime=parts.config.queue.lifetime,
            requiretls=requiretls,
            tls_required_no=tls_required_no,
        )

    async def probe(self, domain: str) -> JsonObject:
        """What the mail hosts of a domain show of themselves."""
        parts = self._parts
        return await probe_domain(
            domain,
            route=parts.router.route,
            floors=parts.floors,
            hostname=parts.config.hostname,
            delivery=parts.config.delivery,
            tls=parts.config.tls,
            patience=_PATIENCE,
        )

    async def metrics(self) -> bytes:
        """Everything that Prometheus may want to know."""
        return self._parts.metrics.render(await self.snapshot())

    async def snapshot(self) -> Snapshot:
        """What is so now."""
        parts, config = self._parts, self._parts.config
        is_shared = config.queue.location.is_shared
        # The metrics of all workers are added up, and a shared queue is the same for each: the
        # first one tells of it.
        is_told = parts.worker.is_first or not is_shared
        queued, oldest = await self._queued.get(parts.clock()) if is_told else ({}, None)
        return Snapshot(
            version=__version__,
            queue=queued,
            oldest_seconds=oldest,
            connections=connections(parts.listeners),
            in_flight=parts.scheduler.in_flight,
            kept_connections=len(parts.pool),
            silent_destinations=len(parts.scheduler.silent_domains()),
            next_hops=next_hops(parts.destinations),
            log_lag_events=await log_lag(parts.store),
            log_in_trouble=parts.delivery_log.is_in_trouble,
            auth_failures=parts.failures.total,
            spool_free_bytes=0 if is_shared else room_at(config.queue.path),
            certificates=expiries(
                [
                    *(spec.certificate for spec in config.listeners),
                    config.admin.certificate if self.serves_http else None,
                ]
            ),
            reloaded=parts.reloaded,
            reload_failed=parts.reload_failed,
            database=await parts.store.database_state(),
        )
