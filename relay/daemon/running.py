"""A relay at work: its parts, put together in the order in which they may fail.

    store ─► resolver, router ─► attempt ─► scheduler ─► delivery log ─► control ─► listeners

The doors open last, when everything behind them stands, and close first. The end goes the
other way: nobody gets in, deliveries under way end, what was committed is written to the log,
and the store lets its files go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from relay import __version__
from relay.admin.control import Control
from relay.admin.control_socket import SocketTaken, start_control
from relay.admin.domain_settings import SettingsElsewhere, SettingsInForce
from relay.admin.operator import Operator
from relay.api import Api, Caller, HttpError, HttpOptions, HttpServer, Targets, start_http
from relay.config import Config, ConfigError, load
from relay.config.document import fingerprints
from relay.config.parts import resolver_options, route_options
from relay.config.reload import changes, taken_over
from relay.config.words import host_and_port
from relay.daemon.files import FileBudget
from relay.daemon.policies import make_policies
from relay.daemon.probing import probe_domain
from relay.daemon.watching import (
    MeteredQueue,
    MeteredSink,
    connections,
    expiries,
    heart_beats,
    log_lag,
    metered,
    oldest_age,
    room_at,
)
from relay.deliver.attempt import Attempt
from relay.deliver.options import security_options
from relay.deliver.pool import Pool, PoolLimits
from relay.deliver.scheduler import Scheduler
from relay.deliver.signing import Signer
from relay.deliver.sts_fetch import AT_ONCE, Fetched, FetchFailed
from relay.deliver.sts_policies import StsPolicies
from relay.deliver.tls import TlsContexts
from relay.policy.rules import PolicyRules
from relay.queue.engine import WORKER_SPOOL, open_beside, open_policies, open_store, orphans
from relay.queue.retry import latest_due
from relay.queue.store import SpoolError, Store
from relay.receive.certificates import CertificateError, ServerTls
from relay.receive.intake import Reception
from relay.receive.limits import Connections
from relay.receive.listener import Listener, start_listener
from relay.receive.passwords import Passwords
from relay.receive.spec import ListenerTls, TcpAddress, parse_address
from relay.report.deliverylog import DeliveryLog
from relay.report.metrics import Metrics, Snapshot
from relay.route.dns import DnsResolver, ResolverError
from relay.route.router import Router
from relay.sign.keys import KeyFileError, load_keys
from relay.sign.signature import SigningKey
from relay.submit.failures import Failures
from relay.workers.all_queues import AllQueues
from relay.workers.all_workers import AllWorkers
from relay.workers.peer import Peer
from relay.workers.programlog import ProgramLog
from relay.workers.systemd import Systemd
from relay.workers.worker import ALONE, StartError, Worker
from relay.workers.worker_config import (
    control_socket,
    part,
    shared_spool,
    spool,
    worker_config,
)

__all__ = ["Relay"]

log = logging.getLogger(__name__)

CLIENT_GRACE = timedelta(seconds=10)
"""For clients in the middle of a message, at the end."""

DELIVERY_GRACE = timedelta(seconds=60)
"""For deliveries under way, at the end."""

_CLEANING = timedelta(minutes=10)
_PROBE_PATIENCE = timedelta(seconds=15)


def now() -> datetime:
    """The clock of every part."""
    return datetime.now(UTC)


class Relay:
    """The parts of one relay. `start`, then `run_until` something is over, then `stop`."""

    def __init__(
        self,
        config: Config,
        *,
        worker: Worker = ALONE,
        path: Path,
        environ: Mapping[str, str],
        files: FileBudget,
        systemd: Systemd,
        own_log: ProgramLog | None = None,
    ) -> None:
        self.config = config
        self._worker = worker
        self._path = path
        self._environ = environ
        self._files = files
        self._systemd = systemd
        self._own_log = own_log
        self._listeners: list[Listener] = []
        self._http: HttpServer | None = None
        self._set_elsewhere: SettingsElsewhere | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._undo = contextlib.AsyncExitStack()
        self._metrics = Metrics()
        self._signing_keys: dict[str, SigningKey] = {}
        self._reloaded = now()
        self._reload_failed = False
        self._is_draining = False

    # --- start ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Put the parts together and open the doors. On `StartError` nothing is left open."""
        try:
            await self._start_parts()
        except BaseException:
            await self._undo.aclose()
            raise

    async def _start_parts(self) -> None:
        config, files = self.config, self._files
        self._signing_keys = self._load_signing_keys()
        self.store = await self._open_store()
        self._sink = MeteredSink(self.store, self._metrics)
        self._api_state = self.store.api_state
        await self._read_settings()
        self._router = self._make_router()
        self._tls = TlsContexts(config.tls.ca_file)
        self._policies = await self._open_policies()
        delivery = replace(
            config.delivery, concurrency=min(config.delivery.concurrency, files.deliveries)
        )
        self._pool = Pool(PoolLimits(connections=delivery.concurrency))
        attempt = Attempt(
            metered(self._router.route, self._metrics),
            hostname=config.hostname,
            delivery=delivery,
            tls=config.tls,
            pool=self._pool,
            contexts=self._tls,
            signer=Signer(lambda: self._signing_keys, clock=now),
        )
        self._undo.push_async_callback(attempt.close)
        self._scheduler = Scheduler(
            MeteredQueue(self.store, self._metrics),
            attempt,
            schedule=config.queue.schedule,
            options=delivery,
            rules=self._rules,
            hostname=config.hostname,
            clock=now,
        )
        self._delivery_log = DeliveryLog(Path(config.log.delivery), self.store)
        self._start("delivery log", self._delivery_log.run())
        self._undo.push_async_callback(self._delivery_log.close)
        await self._start_control()
        self._start("scheduler", self._scheduler.run())
        self._undo.push_async_callback(self._scheduler.drain, timedelta(0))
        self._start("cleaning", self._clean())
        if self._worker.is_first:
            self._start("policies", self._policies.run())
        await self._start_http()
        await self._open_doors()

    async def _read_settings(self) -> None:
        """What was set over HTTP: the first worker keeps it, and tells the others."""
        shared = self._worker.shared_settings
        if shared is not None and not self._worker.is_first:
            self._set_elsewhere = SettingsElsewhere(shared)
            return
        self._set_over_http = SettingsInForce(self._api_state, shared)
        await self._set_over_http.load()

    def _rules(self) -> PolicyRules:
        """The rules in force: the file's, with what was set over HTTP above them."""
        settings = self._set_elsewhere or self._set_over_http
        return settings.over(self.config.policy)

    def _load_signing_keys(self) -> dict[str, SigningKey]:
        try:
            return load_keys(self.config.dkim.domains)
        except KeyFileError as error:
            raise StartError(f"dkim.domains: {error}") from error

    async def _open_store(self) -> Store:
        directory = Path(self.config.queue.path)
        at = now()
        max_wait = latest_due(self.config.queue.schedule, now=at) - at
        try:
            store = await open_store(
                directory, now=at, max_wait=max_wait, adopting=self._orphans(directory)
            )
        except (SpoolError, OSError) as error:
            raise StartError(f"queue.path: {error}") from error
        self._undo.push_async_callback(store.close)
        return store

    async def _open_policies(self) -> StsPolicies:
        """The MTA-STS policies that all workers share, and who fetches them."""
        number, config = self._worker.number, self.config
        try:
            cache = await open_policies(Path(shared_spool(config.queue.path, number)))
        except SpoolError as error:
            raise StartError(f"queue.path: {error}") from error
        self._undo.push_async_callback(cache.close)
        policies = make_policies(
            config,
            cache,
            resolver=self._resolver,
            router=self._router,
            contexts=self._tls,
            clock=now,
            at_once=max(1, part(AT_ONCE, number, self._worker.workers)),
            told=self._policy_fetched,
        )
        self._undo.push_async_callback(policies.close)
        return policies

    def _policy_fetched(self, domain: str, found: Fetched | FetchFailed) -> None:
        self._metrics.policy_fetched(found.error.value if isinstance(found, FetchFailed) else "ok")

    def _orphans(self, directory: Path) -> list[Path]:
        """The queues of workers that are no more: the first worker sees to them."""
        if not self._worker.is_first:
            return []
        present = {f"{WORKER_SPOOL}{number}" for number in range(1, self._worker.workers)}
        return orphans(directory, WORKER_SPOOL, present=present)

    def _make_operator(self) -> Operator:
        """What the operator may ask and change: of all workers at the first, of itself at another."""
        others = range(1, self._worker.workers) if self._worker.is_first else range(0)
        if not others:
            return Operator(self.store, now, self.store, self)
        path, socket = self.config.queue.path, self.config.admin.socket
        readers = [open_beside(Path(spool(path, number))) for number in others]
        for reader in readers:
            self._undo.push_async_callback(reader.close)
        peers = [Peer(number, Path(control_socket(socket, number))) for number in others]
        every = AllWorkers(self.store, self, peers)
        return Operator(AllQueues([self.store, *readers]), now, every, every)

    def _make_router(self) -> Router:
        options = replace(resolver_options(self.config), concurrency=self._files.queries)
        try:
            resolver = self._resolver = DnsResolver(options)
        except ResolverError as error:
            raise StartError(f"resolver.nameservers: {error}") from error
        return Router(
            resolver,
            route_options(self.config),
            hostname=self.config.hostname,
            listening=self._listening,
            random=random.SystemRandom(),
        )

    def _listening(self) -> list[tuple[str, int]]:
        """Where we listen, so that mail is never delivered to ourselves."""
        addresses = (listener.address for listener in self._listeners)
        return [
            (address.host, address.port) for address in addresses if isinstance(address, TcpAddress)
        ]

    async def _start_control(self) -> None:
        self._operator = self._make_operator()
        control = Control(
            self._operator,
            self._api_state,
            in_force=lambda: fingerprints(self.config),
            policies=self._policies,
        )
        try:
            admin = self.config.admin
            server = await start_control(control, Path(admin.socket), group=admin.socket_group)
        except (OSError, SocketTaken) as error:
            raise StartError(f"admin.socket: {_sentence(error)}") from error
        self._undo.push_async_callback(server.close)

    async def _start_http(self) -> None:
        """Serve the HTTP interface, where there is a key to use it with."""
        config, admin = self.config, self.config.admin
        elsewhere = self._set_elsewhere
        targets = Targets(self._resolver.addresses, lambda: self.config.admin.webhook_networks)
        caller = Caller(
            self.store,
            self._api_state,
            signing_key=self._signing_key,
            clock=now,
            targets=targets,
            elsewhere=elsewhere.webhooks if elsewhere is not None else None,
        )
        self._start("webhooks", caller.run())
        if not admin.http or not admin.serves_http:
            return
        api = Api(
            self._operator,
            hostname=config.hostname,
            sink=self._sink,
            state=self._api_state,
            settings=self._set_over_http,
            options=self._http_options,
            rules=self._rules,
            route=self._router.route,
            security=security_options(config.delivery, config.tls),
            message_size_bytes=config.limits.message_size_bytes,
            recipients=config.limits.recipients,
            received_hops=config.limits.received_hops,
            request_seconds=config.limits.transaction.total_seconds(),
            probe=self._probe,
            webhook_objection=targets.objection,
            webhooks_changed=caller.changed,
        )
        try:
            self._http = await start_http(
                api,
                host_and_port(admin.http),
                certificate=admin.certificate,
                key=admin.key,
                connections=self._files.http,
            )
        except HttpError as error:
            raise StartError(f"admin.http: {error}") from error
        self._undo.push_async_callback(self._http.close)
        log.info("HTTP interface at %s:%d", *self._http.address)

    def _http_options(self) -> HttpOptions:
        admin = self.config.admin
        return HttpOptions(admin.api_keys, admin.domains, admin.webhook_signing_key)

    def _signing_key(self) -> str | None:
        return self.config.admin.webhook_signing_key

    def retry_silent(self) -> None:
        """Destinations that did not answer are tried again."""
        self._scheduler.retry_silent()

    async def status(self) -> dict[str, Any]:
        """Deliveries under way, and destinations that do not answer."""
        silent = self._scheduler.silent_destinations()
        return {
            "in-flight": self._scheduler.in_flight,
            "silent-destinations": {
                name: until.isoformat() for name, until in list(silent.items())[:1000]
            },
        }

    async def _probe(self, domain: str) -> dict[str, Any]:
        return await probe_domain(
            domain,
            route=self._router.route,
            hostname=self.config.hostname,
            delivery=self.config.delivery,
            tls=self.config.tls,
            patience=_PROBE_PATIENCE,
        )

    async def _open_doors(self) -> None:
        """Open every listener; only when all are open, mail is taken at any."""
        self._reception = reception = Reception(
            hostname=self.config.hostname,
            store=self._sink,
            policy=self._rules,
            access=lambda: self.config.access,
            clock=now,
            limits=replace(
                self.config.limits,
                connections=min(self.config.limits.connections, self._files.clients),
            ),
            connections=Connections(self._worker.elsewhere),
        )
        self._failures = Failures(elsewhere=self._worker.failed_elsewhere)
        passwords = Passwords(self._failures, clock=now)
        for spec in self.config.listeners:
            try:
                sock = self._worker.sockets.get(str(parse_address(spec.address)))
                listener = await start_listener(spec, reception, passwords=passwords, sock=sock)
            except (CertificateError, OSError) as error:
                raise StartError(f"listener {spec.address}: {_sentence(error)}") from error
            self._listeners.append(listener)
            self._undo.push_async_callback(listener.close)
            if self._worker.is_first:
                log.info("listening at %s", listener.address)

    def _start(self, name: str, part: Coroutine[Any, Any, None]) -> None:
        """Run a part beside the others. One that ends of itself is broken, and the relay with it."""
        task = asyncio.create_task(part, name=name)
        task.add_done_callback(self._has_ended)
        self._tasks.append(task)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._broken.done():
            return
        if error := task.exception():
            log.error("%s broke", task.get_name(), exc_info=error)
            self._broken.set_result(task.get_name())

    # --- while it runs ----------------------------------------------------------------------------

    @property
    def broken(self) -> Awaitable[str]:
        """Done when a part has failed beyond repair, with its name."""
        return self._broken

    def summary(self) -> str:
        """One sentence on what we do."""
        doors = ", ".join(str(listener.address) for listener in self._listeners) or "no listener"
        return f"{self.config.hostname} relays from {doors}"

    async def reload(self) -> None:
        """Take over what the file says now, all of it or nothing."""
        self._systemd.reloading()
        try:
            # Off the event loop: files are read, and this machine may be asked for its name.
            self._take_over(self._share(await asyncio.to_thread(load, self._path, self._environ)))
        except ConfigError as error:
            for mistake in error.mistakes:
                log.error("reload: %s", mistake)
            log.error("reload: the configuration in force is kept")
            self._reload_failed = True
        except (CertificateError, KeyFileError, HttpError) as error:
            log.error("reload: %s; the configuration in force is kept", error)
            self._reload_failed = True
        self._delivery_log.reopen()
        self._systemd.ready(self.summary())

    def _share(self, config: Config) -> Config:
        return worker_config(config, self._worker.number, self._worker.workers)

    def _take_over(self, new: Config) -> None:
        # What may fail comes first: after it, nothing does.
        for listener in self._listeners:
            if listener.spec.tls is not ListenerTls.NONE and listener.spec.certificate is not None:
                ServerTls(listener.spec.certificate, listener.spec.key)
        signing_keys = load_keys(new.dkim.domains)
        show_certificate = self._http.read_certificate() if self._http is not None else None
        changed = changes(self.config, new)
        for listener in self._listeners:
            listener.reload_certificate()
        if show_certificate is not None:
            show_certificate()
        self.config = taken_over(self.config, new)
        self._signing_keys = signing_keys
        if self._own_log is not None:
            self._own_log.set_level(new.log.level)
        self._reloaded, self._reload_failed = now(), False
        self._router.reload(route_options(self.config))
        if self._worker.is_first:
            for warning in new.warnings:
                log.warning("%s", warning)
        log.log(
            logging.INFO if self._worker.line is None else logging.DEBUG, "reloaded: %s", changed
        )

    async def metrics(self) -> bytes:
        """Everything Prometheus may want to know of this worker."""
        return self._metrics.render(await self._snapshot())

    async def _snapshot(self) -> Snapshot:
        at = now()
        return Snapshot(
            version=__version__,
            queue={state.value: count for state, count in (await self.store.counts()).items()},
            oldest_seconds=await oldest_age(self.store, now=at),
            connections=connections(self._listeners),
            in_flight=self._scheduler.in_flight,
            kept_connections=len(self._pool),
            silent_destinations=len(self._scheduler.silent_destinations()),
            log_lag_events=await log_lag(self.store, self.store),
            log_in_trouble=self._delivery_log.is_in_trouble,
            auth_failures=self._failures.total,
            spool_free_bytes=room_at(self.config.queue.path),
            certificates=expiries(
                [
                    *(spec.certificate for spec in self.config.listeners),
                    self.config.admin.certificate if self._http is not None else None,
                ]
            ),
            reloaded=self._reloaded,
            reload_failed=self._reload_failed,
        )

    async def health(self) -> dict[str, list[str]]:
        """What is wrong with this worker."""
        return {"liveness": await self.liveness(), "readiness": await self.readiness()}

    async def liveness(self) -> list[str]:
        """What is wrong so that a restart may cure it: parts that ended, a queue that does not
        answer.
        """
        found = [f"{task.get_name()} has ended" for task in self._tasks if task.done()]
        stuck = await heart_beats(self.store, self.store)
        return [*found, stuck] if stuck else found

    async def readiness(self) -> list[str]:
        """Why no mail should be handed to us now; nothing where all is well."""
        found = await self.liveness()
        if self._is_draining:
            found.append("draining")
        if self._delivery_log.is_in_trouble:
            found.append("the delivery log cannot be written")
        return found

    async def _clean(self) -> None:
        """Now and then, forget events that are older than they are kept."""
        while True:
            try:
                count = await self.store.purge_events(before=now() - self.config.log.keep_events)
                if count:
                    log.debug("%d events older than log.keep_events forgotten", count)
                await self.store.purge_statistics(before=now() - self.config.log.keep_statistics)
            except SpoolError as error:
                log.warning("old events cannot be removed: %s", error)
            await asyncio.sleep(_CLEANING.total_seconds())

    # --- end --------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Drain: the doors, then deliveries, then the log and the store."""
        self._is_draining = True
        self._systemd.stopping()
        closing = [listener.close(CLIENT_GRACE) for listener in self._listeners]
        if self._http is not None:
            closing.append(self._http.close())
        await asyncio.gather(*closing)
        log.info("no more mail is taken; deliveries under way: %d", self._scheduler.in_flight)
        await self._scheduler.drain(DELIVERY_GRACE)
        await self._undo.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _sentence(error: Exception) -> str:
    """An error as its system's words for it, without number and history."""
    if isinstance(error, OSError) and error.errno:
        return (
            f"{os.strerror(error.errno).lower()}{f' ({error.filename})' if error.filename else ''}"
        )
    return str(error)
