"""A relay at work: it starts its parts, takes a new configuration over, and ends.

start     the delivery log, the control socket, deliveries, HTTP, and last the listeners
reload    all that may fail first, then all that cannot
stop      the listeners first: no client connects, deliveries under way end, what was committed is
          written to the log, and the store lets its files go
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path

from relay.api import HttpServer
from relay.config import Config, ConfigError, load, locations
from relay.config.parts import logged_in_at, route_options
from relay.config.reload import changes, taken_over
from relay.daemon.assemble import Parts, assemble
from relay.daemon.files import FileBudget
from relay.daemon.interfaces import make_caller, make_operator, open_control, open_http
from relay.daemon.lately import names_to_look_up, served_lately
from relay.daemon.status import Status
from relay.daemon.tls_reports import make_reporter
from relay.queue.store import SpoolError
from relay.queue.tls_sessions import day_of
from relay.receive.listener import start_listener
from relay.receive.spec import ListenerTls, parse_address
from relay.route.report_time import KEPT
from relay.sign.keys import KeyFileError, load_keys
from relay.submit.certificates import CertificateError, ServerTls
from relay.web.state import Caught
from relay.workers.programlog import ProgramLog
from relay.workers.systemd import Systemd
from relay.workers.worker import ALONE, StartError, Worker
from relay.workers.worker_config import worker_config

log = logging.getLogger(__name__)

CLIENT_GRACE = timedelta(seconds=10)
"""For clients in the middle of a message, at the end."""

DELIVERY_GRACE = timedelta(seconds=60)
"""For deliveries under way, at the end."""

_CLEANING = timedelta(minutes=10)
_RESOLVER_LOOKS = timedelta(hours=1)


class Relay:
    """One relay. `Relay.start`, then wait until something is over, then `stop`."""

    def __init__(
        self,
        parts: Parts,
        opened: AsyncExitStack,
        *,
        path: Path,
        environ: Mapping[str, str],
        systemd: Systemd,
        own_log: ProgramLog | None = None,
    ) -> None:
        self._parts = parts
        self._opened = opened
        self._path = path
        self._environ = environ
        self._systemd = systemd
        self._own_log = own_log
        self._http: HttpServer | None = None
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.status = Status(parts)

    # --- start ------------------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        config: Config,
        *,
        worker: Worker = ALONE,
        path: Path,
        environ: Mapping[str, str],
        files: FileBudget,
        systemd: Systemd,
        own_log: ProgramLog | None = None,
        caught: Caught | None = None,
    ) -> Relay:
        """A relay whose listeners are open. On `StartError` nothing is left open."""
        opened = AsyncExitStack()
        try:
            parts = await assemble(config, worker=worker, files=files, opened=opened)
            parts.caught = caught
            relay = cls(parts, opened, path=path, environ=environ, systemd=systemd, own_log=own_log)
            await relay._start_parts()
        except BaseException:
            await opened.aclose()
            raise
        return relay

    async def _start_parts(self) -> None:
        parts, opened = self._parts, self._opened
        parts.store.when_superseded(self._leave)
        parts.locations = locations(self._path, self._environ)
        self._run("delivery log", parts.delivery_log.run())
        opened.push_async_callback(parts.delivery_log.close)
        operator = make_operator(parts, self.status, opened)
        reporter = make_reporter(parts, operator.view)
        await open_control(parts, operator, reporter, opened)
        served = await served_lately(parts.store, now=parts.clock())
        parts.resolver.note_prompt(names_to_look_up(served))
        parts.scheduler.note_proven(one.domain for one in served)
        self._run("scheduler", parts.scheduler.run())
        opened.push_async_callback(parts.scheduler.drain, timedelta(0))
        self._run("cleaning", self._clean())
        self._run("resolver", self._watch_resolver())
        self._run("memory", parts.memory.run(purges=parts.worker.is_first))
        if parts.worker.is_first:
            self._run("policies", parts.policies.run())
        if reporter is not None:
            self._run("reports on TLS", reporter.run())
            opened.push_async_callback(reporter.close)
        caller, targets = make_caller(parts)
        self._run("webhooks", caller.run())
        self._http = await open_http(parts, operator, caller, targets, self.status, opened)
        self.status.serves_http = self._http is not None
        await self._open_listeners()

    async def _open_listeners(self) -> None:
        """Open every listener; only when all are open, mail is taken at any."""
        parts = self._parts
        for spec in parts.config.listeners:
            sock = parts.worker.sockets.get(str(parse_address(spec.address)))
            try:
                listener = await start_listener(
                    spec, parts.reception, passwords=parts.passwords, sock=sock
                )
            except (CertificateError, OSError) as error:
                raise StartError.at(f"listener {spec.address}", error) from error
            parts.listeners.append(listener)
            self._opened.push_async_callback(listener.close)
            if parts.worker.is_first:
                log.info("listening at %s", listener.address)

    def _run(self, name: str, part: Coroutine[object, object, None]) -> None:
        """Run a part beside the others. One that ends of itself breaks the relay."""
        task = asyncio.create_task(part, name=name)
        task.add_done_callback(self._has_ended)
        self.status.tasks.append(task)

    def _leave(self, why: str) -> None:
        """The queue is left to others: this relay drains and ends."""
        log.error("%s: %s", self._parts.config.queue.location.key, why)
        if not self._broken.done():
            self._broken.set_result(why)

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
        listeners = ", ".join(str(one.address) for one in self._parts.listeners) or "no listener"
        return f"{self._parts.config.hostname} relays from {listeners}"

    async def reload(self) -> None:
        """Take over what the file says now, all of it or nothing."""
        self._systemd.reloading()
        parts, worker = self._parts, self._parts.worker
        try:
            # Off the event loop: files are read, and this machine may be asked for its name.
            new = await asyncio.to_thread(load, self._path, self._environ)
            self._take_over(worker_config(new, worker.number, worker.workers))
        except ConfigError as error:
            for mistake in error.mistakes:
                log.error("reload: %s", mistake)
            log.error("reload: the configuration in force is kept")
            parts.reload_failed = True
        except (CertificateError, KeyFileError) as error:
            log.error("reload: %s; the configuration in force is kept", error)
            parts.reload_failed = True
        parts.delivery_log.reopen()
        self._systemd.ready(self.summary())

    def _take_over(self, new: Config) -> None:
        parts = self._parts
        # What may fail comes first: after it, nothing does.
        for listener in parts.listeners:
            if listener.spec.tls is not ListenerTls.NONE and listener.spec.certificate is not None:
                ServerTls(listener.spec.certificate, listener.spec.key)
        signing_keys = load_keys(new.dkim.domains)
        show_certificate = self._http.read_certificate() if self._http is not None else None
        changed = changes(parts.config, new)
        for listener in parts.listeners:
            listener.reload_certificate()
        if show_certificate is not None:
            show_certificate()
        parts.config = taken_over(parts.config, new)
        parts.signing_keys = signing_keys
        parts.reloaded, parts.reload_failed = parts.clock(), False
        parts.last_reload = parts.reloaded, str(changed)
        parts.locations = locations(self._path, self._environ)
        parts.router.reload(route_options(parts.config))
        parts.destinations.retry_silent()  # the configuration may have been what was wrong
        parts.scheduler.routes_changed()
        parts.tokens.forget_pauses()
        parts.metrics.expect_logins(parts.config.oauth2, logged_in_at(parts.config))
        if self._own_log is not None:
            self._own_log.set_level(new.log.level)
        if parts.worker.is_first:
            for warning in new.warnings:
                log.warning("%s", warning)
        log.log(
            logging.INFO if parts.worker.line is None else logging.DEBUG, "reloaded: %s", changed
        )

    async def _watch_resolver(self) -> None:
        """Find out at the start, and once an hour, whether the resolver validates: it says so where
        not.
        """
        while True:
            await self._parts.resolver.validates()
            await asyncio.sleep(_RESOLVER_LOOKS.total_seconds())

    async def _clean(self) -> None:
        """Now and then, forget events and counts that are older than they are kept."""
        store, clock = self._parts.store, self._parts.clock
        while True:
            kept = self._parts.config.log
            try:
                if await store.purge_events(before=clock() - kept.keep_events):
                    log.debug("events older than log.keep_events were removed")
                await store.purge_statistics(before=clock() - kept.keep_statistics)
                await store.purge_tls_sessions(before=day_of(clock() - KEPT))
            except SpoolError as error:
                log.warning("old events cannot be removed: %s", error)
            await asyncio.sleep(_CLEANING.total_seconds())

    # --- end --------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Drain: the listeners, then deliveries, then the log and the store."""
        scheduler, tasks = self._parts.scheduler, self.status.tasks
        self.status.is_draining = True
        self._systemd.stopping()
        closing = [listener.close(CLIENT_GRACE) for listener in self._parts.listeners]
        if self._http is not None:
            closing.append(self._http.close())
        await asyncio.gather(*closing)
        log.info("no more mail is taken; deliveries under way: %d", scheduler.in_flight)
        await scheduler.drain(DELIVERY_GRACE)
        await self._opened.aclose()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
