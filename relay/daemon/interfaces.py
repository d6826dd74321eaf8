"""The ways in for operators and programs: the control socket and the HTTP interface.

Both work on one `Operator`. The first worker's is one for all workers.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from relay.admin.control import Control
from relay.admin.control_socket import SocketTaken, start_control
from relay.admin.domain_settings import SettingsElsewhere, SettingsInForce
from relay.admin.operator import Operator, RunningRelay
from relay.api import HAS_KEY, Api, Caller, HttpError, HttpOptions, HttpServer, Targets, start_http
from relay.config.document import fingerprints
from relay.config.words import host_and_port
from relay.daemon.assemble import Parts
from relay.daemon.page import make_page
from relay.daemon.status import Status
from relay.deliver.tls_reports import TlsReporter
from relay.queue.engine import open_beside
from relay.submit.certificates import CertificateError
from relay.web.site import install
from relay.workers.all_queues import AllQueues
from relay.workers.all_workers import AllWorkers
from relay.workers.other_worker import OtherWorker
from relay.workers.worker import StartError
from relay.workers.worker_config import control_socket, spool

log = logging.getLogger("relay.daemon.running")


def make_operator(parts: Parts, relay: RunningRelay, opened: AsyncExitStack) -> Operator:
    """What the operator may ask and change: of all workers at the first, of itself at another."""
    store, worker = parts.store, parts.worker
    others = range(1, worker.workers) if worker.is_first else range(0)
    if not others:
        return Operator(store, parts.clock, store, relay)
    path, socket = parts.config.queue.path, parts.config.admin.socket
    workers = [OtherWorker(number, Path(control_socket(socket, number))) for number in others]
    every = AllWorkers(store, relay, workers)
    if parts.config.queue.location.is_shared:
        return Operator(store, parts.clock, store, every)
    readers = [open_beside(Path(spool(path, number))) for number in others]
    for reader in readers:
        opened.push_async_callback(reader.close)
    return Operator(AllQueues([store, *readers]), parts.clock, every, every)


async def open_control(
    parts: Parts, operator: Operator, reporter: TlsReporter | None, opened: AsyncExitStack
) -> None:
    """Listen at the control socket."""
    control = Control(
        operator,
        parts.store.api_state,
        in_force=lambda: fingerprints(parts.config),
        policies=parts.policies,
        tls_reports=reporter,
        memory=parts.memory,
    )
    admin = parts.config.admin
    try:
        server = await start_control(control, Path(admin.socket), group=admin.socket_group)
    except (OSError, SocketTaken) as error:
        raise StartError.at("admin.socket", error) from error
    opened.push_async_callback(server.close)


def make_caller(parts: Parts) -> tuple[Caller, Targets]:
    """Calls the webhooks for this worker's events, at addresses that may be called."""
    targets = Targets(parts.resolver.addresses, lambda: parts.config.admin.webhook_networks)
    settings = parts.settings
    caller = Caller(
        parts.store,
        parts.store.api_state,
        signing_key=lambda: parts.config.admin.webhook_signing_key,
        clock=parts.clock,
        targets=targets,
        elsewhere=settings.webhooks if isinstance(settings, SettingsElsewhere) else None,
    )

    async def changed() -> None:
        caller.changed()

    parts.store.api_state.when_changed_elsewhere(changed)
    return caller, targets


async def open_http(
    parts: Parts,
    operator: Operator,
    caller: Caller,
    targets: Targets,
    status: Status,
    opened: AsyncExitStack,
) -> HttpServer | None:
    """Serve the HTTP interface, where there is a key to use it with, and the page for its users."""
    config, admin, settings = parts.config, parts.config.admin, parts.settings
    if not (admin.http and admin.serves_http and isinstance(settings, SettingsInForce)):
        return None
    api = Api(
        operator,
        hostname=config.hostname,
        sink=parts.sink,
        state=parts.store.api_state,
        settings=settings,
        options=partial(_http_options, parts),
        rules=parts.rules,
        message_size_bytes=config.limits.message_size_bytes,
        recipients=config.limits.recipients,
        received_hops=config.limits.received_hops,
        request_seconds=config.limits.transaction.total_seconds(),
        webhook_objection=targets.objection,
        webhooks_changed=caller.changed,
    )
    try:
        server = await start_http(
            api,
            host_and_port(admin.http),
            certificate=admin.certificate,
            key=admin.key,
            connections=parts.files.http,
            also=partial(install, state=make_page(parts, status, api), known=HAS_KEY)
            if admin.web.users
            else lambda _: None,
        )
    except (CertificateError, HttpError) as error:
        raise StartError(f"admin.http: {error}") from error
    opened.push_async_callback(server.close)
    log.info("HTTP interface at %s:%d", *server.address)
    return server


def _http_options(parts: Parts) -> HttpOptions:
    admin = parts.config.admin
    return HttpOptions(admin.api_keys, admin.domains, admin.webhook_signing_key)
