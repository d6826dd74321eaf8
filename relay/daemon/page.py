"""What the page is given to work with."""

from __future__ import annotations

from functools import partial

import yaml

from relay import __version__
from relay.api import Api
from relay.config.document import as_document
from relay.daemon.assemble import Parts
from relay.daemon.status import Status
from relay.web.state import Facts, Web


def make_page(parts: Parts, status: Status, api: Api) -> Web:
    """The page of a relay: it asks what the HTTP interface asks, and works on the same operator."""
    return Web(
        api.operator,
        hostname=parts.config.hostname,
        options=lambda: parts.config.admin.web,
        rules=parts.rules,
        facts=partial(_facts, parts, status, api),
        policies=parts.policies,
        write_event=parts.store.write_event,
        configuration=lambda: yaml.safe_dump(as_document(parts.config), sort_keys=False),
        locations=lambda: parts.locations,
        last_reload=lambda: parts.last_reload,
        failures=parts.failures,
        caught=parts.caught,
        note=lambda: parts.config.admin.web.note,
    )


async def _facts(parts: Parts, status: Status, api: Api) -> Facts:
    """How the relay is: this worker's numbers, and what is wrong with any."""
    relay = api.operator.running()
    snapshot, health, deliveries = (
        await status.snapshot(),
        await relay.health(),
        await relay.status(),
    )
    trouble = [*health["liveness"], *health["readiness"]]
    return Facts(
        version=__version__,
        workers=parts.worker.workers,
        started=parts.started,
        free_bytes=snapshot.spool_free_bytes,
        log_lag_events=snapshot.log_lag_events,
        certificates=snapshot.certificates,
        trouble=list(dict.fromkeys(trouble)),
        commit_seconds=parts.metrics.mean_commit_seconds,
        in_flight=deliveries.in_flight,
        silent=deliveries.silent,
        nameservers=parts.config.resolver.nameservers,
        validates=parts.resolver.last_validated,
    )
