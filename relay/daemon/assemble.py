"""Puts the parts of a worker together.

    DKIM keys ─► store ─► settings, policies, memory ─► resolver, router ─► attempt ─► scheduler
                                                                               ─► reception

`relay.daemon.running` starts the parts, and opens the listeners.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path

from relay.admin.domain_settings import SettingsElsewhere, SettingsInForce
from relay.config import Config
from relay.config.document import fingerprints
from relay.config.parts import logged_in_at, resolver_options, route_options
from relay.daemon.files import FileBudget
from relay.daemon.measuring import MeteredSink, metered
from relay.daemon.policies import make_policies
from relay.daemon.tokens import make_token_client
from relay.deliver.attempt import Attempt
from relay.deliver.destinations import Destinations
from relay.deliver.floors import Floors
from relay.deliver.hop_limits import HopLimits
from relay.deliver.memory import DowngradeMemory
from relay.deliver.parts import NodeParts
from relay.deliver.pool import Pool, PoolLimits
from relay.deliver.report_sender import ReportSender
from relay.deliver.scheduler import Scheduler
from relay.deliver.sessions import failed_fetch
from relay.deliver.signing import Signer
from relay.deliver.sts_fetch import AT_ONCE, Fetched, FetchFailed
from relay.deliver.sts_policies import StsPolicies
from relay.deliver.tls import TlsContexts
from relay.deliver.tokens import Tokens
from relay.mail.tls_session import TlsSession
from relay.policy.rules import PolicyRules
from relay.queue.division import share
from relay.queue.engine import WORKER_SPOOL, open_memory, open_policies, open_store, orphans
from relay.queue.entry import Entry
from relay.queue.memory import MemoryStore
from relay.queue.policies import PolicyCache
from relay.queue.retry import latest_due
from relay.queue.store import SpoolError, Store
from relay.receive.intake import Reception
from relay.receive.limits import Connections
from relay.receive.listener import Listener
from relay.receive.spec import TcpAddress
from relay.report.deliverylog import DeliveryLog
from relay.report.metrics import Metrics
from relay.route.credentials import RouteCredentials
from relay.route.dns import DnsResolver
from relay.route.mta_sts import KeptPolicy
from relay.route.name_servers import ResolverError
from relay.route.next_hop import NextHop
from relay.route.router import Router
from relay.sign.keys import KeyFileError, load_keys
from relay.sign.signature import SigningKey
from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker
from relay.web.state import Caught
from relay.workers.worker import StartError, Worker
from relay.workers.worker_config import shared_spool

log = logging.getLogger(__name__)

_FLOOR_SECONDS = 1.0
"""How long a floor that was looked up is used again."""

now: Callable[[], datetime] = partial(datetime.now, UTC)
"""The clock until the queue is open. Every part uses that of the queue, `Store.clock`."""


@dataclass(frozen=True, slots=True)
class Stores:
    """What a worker keeps on disk. `settings`: what was set over HTTP. All workers share `policies`
    (of MTA-STS) and `memory` (what hosts have shown of TLS).
    """

    queue: Store
    settings: SettingsInForce | SettingsElsewhere
    policies: PolicyCache
    memory: MemoryStore


class Parts:
    """All that a worker is made of.

    A reload replaces `config` and `signing_keys`, and sets `reloaded` (when), `reload_failed`,
    `last_reload` (what it changed) and `locations` (file and line of each key). `caught`: the mail
    of a demonstration. `settings`: what was set over HTTP. `listeners`: those that are open.
    """

    def __init__(
        self,
        config: Config,
        worker: Worker,
        files: FileBudget,
        *,
        signing_keys: dict[str, SigningKey],
        stores: Stores,
    ) -> None:
        self.config = config
        self.worker = worker
        self.files = files
        self.clock = stores.queue.clock
        self.signing_keys = signing_keys
        self.started = self.reloaded = self.clock()
        self.last_reload: tuple[datetime, str] | None = None
        self.locations: dict[str, str] = {}
        self.caught: Caught | None = None
        self.reload_failed = False
        self.listeners: list[Listener] = []
        self.metrics = Metrics()
        self._counting: set[asyncio.Task[None]] = set()
        self.store = stores.queue
        self.settings = stores.settings
        self.sink = MeteredSink(self.store, self.metrics)
        self.delivery_log = DeliveryLog(Path(config.log.delivery), self.store, lost=self.store.lost)
        self.resolver = _make_resolver(config, files)
        self.contexts = TlsContexts(config.tls.ca_file)
        self.metrics.expect_logins(config.oauth2, logged_in_at(config))
        self.tokens = self._make_tokens()
        self.logins = RouteCredentials(
            self.tokens, rests=worker.shared_rests, on_refusal=self.metrics.login_refused
        )
        self.router = self._make_router()
        self.policies = self._make_policies(stores.policies)
        self.memory = self._make_memory(stores.memory)
        self.floors = self._make_floors()
        self.delivery = replace(
            config.delivery, concurrency=min(config.delivery.concurrency, files.deliveries)
        )
        self.destinations = self._make_destinations()
        self.pool = Pool(PoolLimits(connections=self.delivery.concurrency))
        self.attempt = self._make_attempt()
        self.scheduler = self._make_scheduler()
        self.reception = self._make_reception()
        self.failures = Failures(elsewhere=worker.counters)
        self.passwords = SecretChecker(self.failures, clock=self.clock)

    def _make_router(self) -> Router:
        return Router(
            self.resolver,
            route_options(self.config),
            hostname=self.config.hostname,
            listening=self._listening,
            credentials=self.logins,
            random=random.SystemRandom(),
        )

    def _make_tokens(self) -> Tokens:
        client = make_token_client(
            lambda: self.config,
            resolver=self.resolver,
            judge=lambda address, port: self.router.judge(address, port),
            contexts=self.contexts,
        )
        return Tokens(
            lambda: self.config.oauth2,
            client.post,
            clock=self.clock,
            on_request=self.metrics.token_request,
        )

    def _make_policies(self, cache: PolicyCache) -> StsPolicies:
        return make_policies(
            self.config,
            cache,
            resolver=self.resolver,
            router=self.router,
            contexts=self.contexts,
            clock=self.clock,
            at_once=max(1, share(AT_ONCE, self.worker.number, self.worker.workers)),
            on_fetch=self._policy_fetched,
        )

    def _make_memory(self, store: MemoryStore) -> DowngradeMemory:
        return DowngradeMemory(
            store,
            lambda: self.config.downgrade_memory,
            clock=self.clock,
            on_alarm=self.metrics.downgrade_alarm,
        )

    def _make_floors(self) -> Floors:
        return Floors(
            self.resolver, self.policies, self.rules, seconds=_FLOOR_SECONDS, memory=self.memory
        )

    def _make_destinations(self) -> Destinations:
        most = self.delivery.concurrency_per_destination
        # Workers that are nodes divide a limit as other nodes do.
        table = None if self.config.queue.location.is_shared else self.worker.hop_limits
        return Destinations(
            most,
            self.config.queue.schedule,
            clock=time.monotonic,
            limits=HopLimits(table, clock=time.monotonic, part=self.store.part),
            parts=NodeParts(most, self.store.part, lambda domain: self.router.may_lead_to(domain)),
        )

    def _make_attempt(self) -> Attempt:
        return Attempt(
            metered(self.router.route, self.metrics),
            hostname=self.config.hostname,
            delivery=self.delivery,
            tls=self.config.tls,
            pool=self.pool,
            contexts=self.contexts,
            signer=Signer(lambda: self.signing_keys, clock=self.clock),
            destinations=self.destinations,
            logins=self.logins,
            floors=self.floors,
            counts_sessions=self.config.tls_reports.send,
            may_begin=self.store.may_begin,
        )

    def _make_scheduler(self) -> Scheduler:
        return Scheduler(
            self.store,
            self.attempt,
            self._make_report_sender(),
            schedule=self.config.queue.schedule,
            options=self.delivery,
            rules=self.rules,
            clock=self.clock,
            destinations=self.destinations,
            metrics=self.metrics,
            leads_to=self._leads_to,
        )

    def _leads_to(self, entry: Entry) -> NextHop | None:
        message = entry.message
        return self.router.leads_to(entry.domain, message.reverse_path, message.next_hop)

    def _make_report_sender(self) -> ReportSender:
        return ReportSender(
            self.store,
            schedule=self.config.queue.schedule,
            rules=self.rules,
            hostname=self.config.hostname,
            clock=self.clock,
            metrics=self.metrics,
        )

    def _make_reception(self) -> Reception:
        clients = min(self.config.limits.connections, self.files.clients)
        return Reception(
            hostname=self.config.hostname,
            store=self.sink,
            policy=self.rules,
            access=lambda: self.config.access,
            clock=self.clock,
            limits=replace(self.config.limits, connections=clients),
            connections=Connections(self.worker.counters),
        )

    def rules(self) -> PolicyRules:
        """The rules in force: the file's, with what was set over HTTP above them."""
        return self.settings.over(self.config.policy)

    def _listening(self) -> list[tuple[str, int]]:
        """Where the relay listens, so that it never delivers mail to itself."""
        addresses = (listener.address for listener in self.listeners)
        return [
            (address.host, address.port) for address in addresses if isinstance(address, TcpAddress)
        ]

    def _policy_fetched(
        self, domain: str, found: Fetched | FetchFailed, before: KeptPolicy | None
    ) -> None:
        self.metrics.policy_fetched(found.error.value if isinstance(found, FetchFailed) else "ok")
        if isinstance(found, FetchFailed) and self.config.tls_reports.send:
            now = self.clock()
            session = failed_fetch(domain, found, before, now=now)
            if session is not None:
                counting = asyncio.create_task(self._count_session(session, now))
                self._counting.add(counting)
                counting.add_done_callback(self._counting.discard)

    async def _count_session(self, session: TlsSession, at: datetime) -> None:
        """Count a session that belongs to no attempt, for reports on TLS."""
        try:
            await self.store.count_sessions([session], at=at)
        except SpoolError as error:
            log.warning("a failed fetch is not counted for reports on TLS: %s", error)


async def assemble(
    config: Config, *, worker: Worker, files: FileBudget, opened: AsyncExitStack
) -> Parts:
    """Make the parts of one worker, and put on `opened` what is to be closed.

    `StartError` says in a sentence what is missing.
    """
    signing_keys = _load_signing_keys(config)
    stores = await _open_stores(config, worker, opened)
    parts = Parts(config, worker, files, signing_keys=signing_keys, stores=stores)
    opened.push_async_callback(parts.memory.close)
    opened.push_async_callback(parts.policies.close)
    opened.push_async_callback(parts.attempt.close)
    opened.push_async_callback(parts.tokens.close)
    return parts


def _load_signing_keys(config: Config) -> dict[str, SigningKey]:
    try:
        return load_keys(config.dkim.domains)
    except KeyFileError as error:
        raise StartError(f"dkim.domains: {error}") from error


async def _open_stores(config: Config, worker: Worker, opened: AsyncExitStack) -> Stores:
    location = config.queue.location
    shared = replace(location, path=shared_spool(location.path, worker.number))
    try:
        queue = await _open_queue(config, worker)
        opened.push_async_callback(queue.close)
        settings = await _read_settings(queue, worker, is_shared=location.is_shared)
        policies = await open_policies(shared)
        opened.push_async_callback(policies.close)
        memory = await open_memory(shared)
        opened.push_async_callback(memory.close)
    except (SpoolError, OSError) as error:
        raise StartError(f"{location.key}: {error}") from error
    return Stores(queue, settings, policies, memory)


async def _open_queue(config: Config, worker: Worker) -> Store:
    """Open this worker's queue. The first takes over the queues of workers that are no more."""
    location, at = config.queue.location, now()
    max_wait = latest_due(config.queue.schedule, now=at) - at
    adopting: list[Path] = []
    if worker.is_first and not location.is_shared:
        present = {f"{WORKER_SPOOL}{number}" for number in range(1, worker.workers)}
        adopting = orphans(Path(location.path), WORKER_SPOOL, present=present)
    return await open_store(
        location,
        now=at,
        max_wait=max_wait,
        adopting=adopting,
        policy_digest=_digest(config),
        concurrency=config.delivery.concurrency,
    )


def _digest(config: Config) -> str:
    """A digest of the configuration, which nodes compare."""
    return sha256(json.dumps(fingerprints(config), sort_keys=True).encode()).hexdigest()[:12]


async def _read_settings(
    store: Store, worker: Worker, *, is_shared: bool
) -> SettingsInForce | SettingsElsewhere:
    """What was set over HTTP. The first worker keeps it, and tells the others; where several nodes
    share the queue, each worker reads it there.
    """
    shared = None if is_shared else worker.shared_settings
    if shared is not None and not worker.is_first:
        return SettingsElsewhere(shared)
    settings = SettingsInForce(store.api_state, shared)
    await settings.load()
    store.api_state.when_changed_elsewhere(settings.load)
    return settings


def _make_resolver(config: Config, files: FileBudget) -> DnsResolver:
    try:
        return DnsResolver(replace(resolver_options(config), concurrency=files.queries))
    except ResolverError as error:
        raise StartError(f"resolver.nameservers: {error}") from error
