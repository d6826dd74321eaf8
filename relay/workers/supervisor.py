"""`workers: N`: the parent that forks the workers, and has no other work.

    start      open the listening sockets, fork the workers; READY when all of them are
    dead       a worker that ends is forked again; one that is not well for a while is killed
    SIGHUP     look at the file; if it is right all workers reload, and new ones begin with it
    SIGTERM    the workers' lines end, and they drain; SIGINT the same. One that hangs is killed
    again      end at once: what is under way is tried anew after the next start, nothing is lost

Each worker has a socket of its own at each port (SO_REUSEPORT), so that the kernel spreads the
connections; the supervisor opened them and keeps them open. A client whose worker has just died
waits in its socket for the next one, and is not turned away. A UNIX socket, or one that systemd
opened, is shared: whoever is free takes the connection.

A worker is forked, not executed: what was imported is in memory once. So nothing here may have
a thread, an event loop or a database, and the program's log is stopped around each fork.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from relay import __version__
from relay.config import Config, ConfigError, load
from relay.config.reload import changes, taken_over
from relay.workers.programlog import ProgramLog
from relay.workers.shared_counters import SharedCounters
from relay.workers.shared_limits import SharedLimits
from relay.workers.shared_rests import SharedRests
from relay.workers.shared_settings import SharedSettings
from relay.workers.sockets import ListeningSockets
from relay.workers.systemd import Systemd
from relay.workers.worker import BEAT, READY, Worker

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_LOOK_SECONDS = 1.0
_UNWELL_SECONDS = 60.0
"""How long a worker may say nothing before it is taken for stuck."""
_AWAY_SECONDS = 10.0
"""A longer time between two looks: the supervisor was stopped, and the workers with it."""
_ENDING_SECONDS = 80.0
"""How long its end may take: clients and deliveries under way have 70 seconds. systemd's 90 are not
over yet then.
"""
_STARTING_SECONDS = 300.0
"""How long its start may take: a long queue is recovered, or that of another worker taken over."""
_LONGEST_PAUSE = 30.0
_A_GOOD_RUN = 60.0


@dataclass
class _Child:
    """A worker's process, as its parent sees it. `again_at`: when it is to be forked again."""

    number: int
    pid: int = 0
    line: socket.socket | None = None
    is_ready: bool = False
    began: float = 0.0
    heard: float = 0.0
    again_at: float = 0.0
    failures: int = field(default=0)


class Supervisor:
    """`run` until a signal ends it; the exit code. `work`: a worker's life, to its exit code."""

    def __init__(
        self,
        config: Config,
        path: Path,
        environ: Mapping[str, str],
        own_log: ProgramLog,
        work: Callable[[Config, Worker], int],
    ) -> None:
        self._config = config
        self._path = path
        self._environ = environ
        self._own_log = own_log
        self._work = work
        self._systemd = Systemd(environ)
        self._children = [_Child(number) for number in range(config.workers)]
        self._counters = SharedCounters(config.workers)
        self._limits = SharedLimits(config.workers)
        self._shared_settings = SharedSettings()
        self._shared_rests = SharedRests()
        self._is_ending = False
        self._killed_at = math.inf
        self._was_ready = False
        self._exit_code = 0
        self._answered = 0.0
        self._looked = 0.0

    def run(self) -> int:
        """Open, fork, watch, end."""
        with contextlib.ExitStack() as stack:
            self._sockets = stack.enter_context(ListeningSockets(self._config, self._environ))
            self._awake, self._alarm = stack.enter_context(_wake_ups())
            self._inherited = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            self._spare_the_collector()
            # The first alone: it may have the queues of workers to take over that are no more.
            self._fork(self._children[0])
            while any(child.pid for child in self._children) or not self._is_ending:
                self._step()
            log.info("ended")
            return self._exit_code

    def _step(self) -> None:
        for number in self._wait():
            self._obey(number)
        self._read_lines()
        self._reap()
        if self._is_ending:
            self._kill_who_has_not_ended()
        else:
            self._kill_the_stuck()
            self._fork_who_is_due()
            self._answer_watchdog()

    def _wait(self) -> bytes:
        """Sleep until a signal or a worker's message comes, or a look is due; the signals."""
        lines = [child.line for child in self._children if child.line is not None]
        readable, _, _ = select.select([self._awake, *lines], [], [], _LOOK_SECONDS)
        if self._awake not in readable:
            return b""
        with contextlib.suppress(BlockingIOError):
            return self._awake.recv(1024)
        return b""

    def _obey(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._end(signal.Signals(number).name)
        elif number == signal.SIGHUP:
            self._reload()

    # --- workers ----------------------------------------------------------------------------------

    def _fork_who_is_due(self) -> None:
        if not self._children[0].is_ready and not self._was_ready:
            return
        for child in self._children:
            if not child.pid and time.monotonic() >= child.again_at:
                self._fork(child)

    def _fork(self, child: _Child) -> None:
        ours, theirs = socket.socketpair()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._own_log.stop()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._become(child, theirs)
        self._own_log.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._inherited)
        theirs.close()
        ours.setblocking(False)
        child.pid, child.line, child.is_ready = pid, ours, False
        child.began = child.heard = time.monotonic()

    def _become(self, child: _Child, line: socket.socket) -> None:
        """The rest of a worker's life. Signals wait until it listens to them itself."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for other in self._children:
                if other.line is not None:
                    other.line.close()
            for end in (self._awake, self._alarm):
                end.close()
            line.setblocking(False)
            worker = Worker(
                child.number,
                len(self._children),
                sockets=self._sockets.keep(child.number),
                line=line,
                counters=self._counters.row(child.number),
                shared_settings=self._shared_settings,
                shared_rests=self._shared_rests,
                hop_limits=self._limits.of_worker(child.number),
            )
            self._own_log.start()
            code = self._work(self._config, worker)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            # Not `sys.exit`: the parent's half of this stack is not ours to unwind.
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)

    def _read_lines(self) -> None:
        """Read what the workers have sent."""
        for child in self._children:
            if child.line is None:
                continue
            with contextlib.suppress(BlockingIOError, OSError):
                words = child.line.recv(1024)
                if READY in words:
                    child.is_ready = True
                    self._say_ready()
                if READY in words or BEAT in words:
                    child.heard = time.monotonic()

    def _say_ready(self) -> None:
        if not self._was_ready and all(child.is_ready for child in self._children):
            self._was_ready = True
            log.info("relay %s ready: %s", __version__, self._summary())
            self._systemd.ready(self._summary())

    def _summary(self) -> str:
        name, count = self._config.hostname, len(self._children)
        return f"{name} relays with {count} workers from {self._sockets}"

    def _reap(self) -> None:
        """See which workers have ended; they are forked again, unless the relay ends."""
        for child in self._children:
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            self._counters.clear(child.number)
            self._limits.clear(child.number)
            if child.line is not None:
                child.line.close()
            child.pid, child.line = 0, None
            if not self._is_ending:
                self._on_worker_exit(child, status)
            elif os.waitstatus_to_exitcode(status):
                self._exit_code = 1

    def _on_worker_exit(self, child: _Child, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        if not self._was_ready and not child.is_ready:
            # The worker has logged why. If a worker cannot start at the start, the relay cannot.
            log.error("worker %d %s before it was ready", child.number, how)
            self._exit_code = 1
            self._drain()
            return
        lasted = time.monotonic() - child.began
        child.failures = 0 if lasted >= _A_GOOD_RUN else child.failures + 1
        pause = min(2.0 ** (child.failures - 2), _LONGEST_PAUSE) if child.failures > 1 else 0.0
        child.again_at = time.monotonic() + pause
        log.error(
            "worker %d %s: starting it again%s",
            child.number,
            how,
            f" in {pause:g} s" if pause else "",
        )

    def _kill_the_stuck(self) -> None:
        now = time.monotonic()
        if now - self._looked > _AWAY_SECONDS:
            # A frozen container: the workers get their time again from where it was thawed.
            for child in self._children:
                child.heard = now
        self._looked = now
        for child in self._children:
            patience = _UNWELL_SECONDS if child.is_ready else _STARTING_SECONDS
            if child.pid and now - child.heard > patience:
                log.error(
                    "worker %d has not been well for %g s: killing it", child.number, patience
                )
                child.heard = now
                os.kill(child.pid, signal.SIGKILL)

    def _kill_who_has_not_ended(self) -> None:
        if time.monotonic() < self._killed_at:
            return
        self._killed_at = math.inf
        for child in self._children:
            if child.pid:
                log.error(
                    "worker %d has not ended in %g s: killing it", child.number, _ENDING_SECONDS
                )
                os.kill(child.pid, signal.SIGKILL)

    def _answer_watchdog(self) -> None:
        seconds = self._systemd.watchdog_seconds
        if seconds is not None and time.monotonic() - self._answered > seconds / 3:
            self._answered = time.monotonic()
            self._systemd.alive()

    def _spare_the_collector(self) -> None:
        """What is there before a fork stays shared, since the collector does not write on it."""
        gc.collect()
        gc.freeze()

    # --- signals ----------------------------------------------------------------------------------

    def _reload(self) -> None:
        try:
            new = load(self._path, self._environ)
        except ConfigError as error:
            for mistake in error.mistakes:
                log.error("reload: %s", mistake)
            log.error("reload: the configuration in force is kept")
            return
        log.info("reload: %s", changes(self._config, new))
        self._config = taken_over(self._config, new)
        self._own_log.set_level(self._config.log.level)
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGHUP)

    def _end(self, name: str) -> None:
        if not self._is_ending:
            log.info("%s: draining", name)
            self._systemd.stopping()
            self._drain()
            return
        log.warning("%s again: ending at once", name)
        self._exit_code = 1
        for child in self._children:
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)

    def _drain(self) -> None:
        """Close the listening sockets; the end of its line has every worker drain."""
        self._is_ending = True
        self._killed_at = time.monotonic() + _ENDING_SECONDS
        self._sockets.close()
        for child in self._children:
            if child.line is not None:
                child.line.close()
                child.line = None


@contextlib.contextmanager
def _wake_ups() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket that is readable once a signal came, with its number."""
    awake, alarm = socket.socketpair()
    for end in (awake, alarm):
        end.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    try:
        yield awake, alarm
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        awake.close()
        alarm.close()
