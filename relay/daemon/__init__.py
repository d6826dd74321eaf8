"""`relay serve`: one process from its start to its end.

    start     read the configuration, raise the limit of open files, start the parts, say READY
    SIGHUP    reload, all or nothing
    SIGTERM   drain and end, exit 0; SIGINT the same
    again     end at once: what is under way is tried anew after the next start, nothing is lost

With `workers: N` this process is the supervisor (`relay.workers.supervisor`) of N such processes.

Where it cannot start it says why in one sentence, without a traceback, and the exit code is 1.
Everything it writes is its own: umask 077.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

from relay import __version__
from relay.api import CONNECTIONS
from relay.config import Config, ConfigError, load
from relay.daemon.files import FileBudget, budget, files_needed, raise_limit
from relay.daemon.running import Relay
from relay.web.state import Caught
from relay.workers.programlog import ProgramLog, is_journal
from relay.workers.sockets import sockets_from_systemd
from relay.workers.supervisor import SIGNALS, Supervisor
from relay.workers.systemd import Systemd
from relay.workers.worker import StartError, Worker
from relay.workers.worker_config import worker_config

log = logging.getLogger(__name__)

QUERIES = 100
"""DNS queries at a time."""


@dataclass(frozen=True)
class Demonstration:
    """What `relay demo --run` adds.

    `caught`: what the page shows of mail that a host on this machine received. `announce` is called
    once the relay can be reached.
    """

    caught: Caught
    announce: Callable[[], None]


def serve(path: Path, environ: Mapping[str, str], *, demo: Demonstration | None = None) -> int:
    """Run a relay until a signal ends it; the exit code."""
    os.umask(0o077)
    try:
        config = load(path, environ)
    except ConfigError as error:
        own_log = _start_log("info", environ, as_json=False)
        for mistake in error.mistakes:
            log.error("%s", mistake)
        own_log.stop()
        return 1
    own_log = _start_log(config.log.level, environ, as_json=config.log.format == "json")

    def work(config: Config, worker: Worker) -> int:
        return _work(config, worker, path, environ, own_log, demo)

    try:
        if config.workers > 1:
            return Supervisor(config, path, environ, own_log, work).run()
        return work(config, Worker(sockets=sockets_from_systemd(config, environ)))
    except StartError as error:
        log.error("cannot start: %s", error)
        return 1
    finally:
        own_log.stop()


def _start_log(level: str, environ: Mapping[str, str], *, as_json: bool) -> ProgramLog:
    own_log = ProgramLog(level=level, as_json=as_json, to_journal=is_journal(environ))
    own_log.start()
    return own_log


def _work(
    config: Config,
    worker: Worker,
    path: Path,
    environ: Mapping[str, str],
    own_log: ProgramLog,
    demo: Demonstration | None,
) -> int:
    """What a worker does, the only one or one of several."""
    try:
        return _run(_serve(config, worker, path, environ, own_log, demo))
    except StartError as error:
        log.error("cannot start: %s", error)
        return 1
    finally:
        if worker.line is not None:
            own_log.stop()


def _run(main: Coroutine[object, object, int]) -> int:
    """Run on uvloop, where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def _serve(
    config: Config,
    worker: Worker,
    path: Path,
    environ: Mapping[str, str],
    own_log: ProgramLog,
    demo: Demonstration | None,
) -> int:
    if worker.is_first:
        for warning in config.warnings:
            log.warning("%s", warning)
    # Where there is a supervisor, only that notifies the service manager.
    systemd = Systemd(environ if worker.line is None else {})
    over, hangup = asyncio.Event(), asyncio.Event()
    signals = _Signals(over, hangup, own_log, is_patient=worker.line is not None)
    signals.listen()
    worker.watch_line(over.set)
    relay = await Relay.start(
        worker_config(config, worker.number, worker.workers),
        worker=worker,
        path=path,
        environ=environ,
        files=_open_files(config),
        systemd=systemd,
        own_log=own_log,
        caught=demo.caught if demo is not None else None,
    )
    _spare_the_collector()
    if worker.line is None:
        log.info("relay %s ready: %s", __version__, relay.summary())
    systemd.ready(relay.summary())
    if demo is not None:
        demo.announce()
    watchdog = asyncio.create_task(_answer_watchdog(systemd, relay))
    reporting = asyncio.create_task(worker.report(relay.status.liveness))
    reloading = asyncio.create_task(_reload_when_told(hangup, relay))
    broken = asyncio.ensure_future(relay.broken)
    await asyncio.wait(
        {broken, asyncio.ensure_future(over.wait())}, return_when=asyncio.FIRST_COMPLETED
    )
    signals.no_way_back()
    reloading.cancel()
    await relay.stop()
    watchdog.cancel()
    reporting.cancel()
    log.info("ended") if worker.line is None else log.debug("worker %d ended", worker.number)
    return 1 if broken.done() else 0


class _Signals:
    """SIGTERM and SIGINT end, a second one at once; SIGHUP reloads.

    `is_patient`: a second one changes nothing. A worker leaves that to its supervisor: a service
    manager may send the first to both, and then the supervisor has the worker drain, too.
    """

    def __init__(
        self, over: asyncio.Event, hangup: asyncio.Event, own_log: ProgramLog, *, is_patient: bool
    ) -> None:
        self._is_patient = is_patient
        self._over = over
        self._hangup = hangup
        self._own_log = own_log
        self._ends = False

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, signal.Signals(number).name)
        # One that comes while starting or reloading is kept, and answered after.
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        # A supervisor held them back until somebody listens.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def no_way_back(self) -> None:
        """The end has begun, whoever asked for it: the next signal is the second."""
        self._ends = True

    def _end(self, name: str) -> None:
        if self._is_patient:
            self._over.set()
            return
        if self._ends:
            log.warning("%s again: ending at once", name)
            self._own_log.stop_within(1.0)
            # Nothing that was answered for is only in memory: the next start goes on from here.
            os._exit(1)
        log.info("%s: draining", name)
        self._ends = True
        self._over.set()


async def _reload_when_told(hangup: asyncio.Event, relay: Relay) -> None:
    """One reload after the other; what comes during one is answered by the next."""
    while True:
        await hangup.wait()
        hangup.clear()
        try:
            await relay.reload()
        except Exception:
            log.exception("reload failed; the configuration in force is kept")


async def _answer_watchdog(systemd: Systemd, relay: Relay) -> None:
    """Notify the service manager while the loop turns, all parts run and the queue answers."""
    if systemd.watchdog_seconds is None:
        return
    while True:
        liveness = await relay.status.liveness()
        if liveness:
            log.error("the watchdog is not answered: %s", "; ".join(liveness))
        else:
            systemd.alive()
        await asyncio.sleep(systemd.watchdog_seconds / 3)


def _spare_the_collector() -> None:
    """What is there now stays: the garbage collector need not look at it for each thousand
    messages.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _open_files(config: Config) -> FileBudget:
    """The limit of open files, raised as far as it goes, and divided."""
    http = CONNECTIONS if config.admin.serves_http else 0
    if config.admin.web.users:
        http *= 2  # pages that follow the log keep a connection each
    shares = {
        "clients": config.limits.connections,
        "deliveries": config.delivery.concurrency,
        "queries": QUERIES,
        "http": http,
    }
    wanted = files_needed(**shares)
    limit = raise_limit(wanted)
    files = budget(limit, **shares)
    if files.is_short:
        log.warning(
            "only %d files may be open and %d are needed (LimitNOFILE, ulimit -n): "
            "taking at most %d connections and making at most %d",
            limit,
            wanted,
            files.clients,
            files.deliveries,
        )
    return files
