"""One worker among several: what it was given at its fork, and its line to the supervisor.

The line is a pair of sockets. Over it the worker says that it is ready, and from then on, every few
seconds, that it is well (`BEAT`). The supervisor sends nothing over it: end of file means "drain".
The worker sees it also where the supervisor was killed; a worker without a supervisor would keep
the port for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

from relay.workers.shared_counters import WorkerCounters
from relay.workers.shared_limits import LimitsOfWorker
from relay.workers.shared_rests import SharedRests
from relay.workers.shared_settings import SharedSettings

READY = b"r"
BEAT = b"."
BEAT_SECONDS = 5.0


class StartError(Exception):
    """The relay cannot start; the text says why, in a sentence for the administrator."""

    @classmethod
    def at(cls, place: str, error: Exception) -> Self:
        """What went wrong with a key or a listener, in the system's words, without number."""
        if isinstance(error, OSError) and error.errno:
            name = f" ({error.filename})" if error.filename else ""
            return cls(f"{place}: {os.strerror(error.errno).lower()}{name}")
        return cls(f"{place}: {error}")


@dataclass(frozen=True)
class Worker:
    """`sockets`: those it listens at, by the address in the configuration. `line`: to the
    supervisor.

    The others are memory that the workers share. `counters`: connections and wrong passwords.
    `shared_settings`: what was set over HTTP. `hop_limits`: how much of the limits of next hops is
    used. `shared_rests`: the logins that a next hop refused.
    """

    number: int = 0
    workers: int = 1
    sockets: Mapping[str, socket.socket] = field(default_factory=dict)
    line: socket.socket | None = None
    counters: WorkerCounters | None = None
    shared_settings: SharedSettings | None = None
    hop_limits: LimitsOfWorker | None = None
    shared_rests: SharedRests | None = None

    @property
    def is_first(self) -> bool:
        """Whether it is the one the operator talks to."""
        return self.number == 0

    def watch_line(self, drain: Callable[[], None]) -> None:
        """Have `drain` called when the line ends."""
        if self.line is not None:
            loop = asyncio.get_running_loop()
            line = self.line
            loop.add_reader(line, lambda: _ended(loop, line, drain))

    async def report(self, liveness: Callable[[], Awaitable[list[str]]]) -> None:
        """Say that we are ready, and then, as long as it is true, that we are well."""
        if self.line is None:
            return
        self._say(READY)
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if not await liveness():
                self._say(BEAT)

    def _say(self, word: bytes) -> None:
        assert self.line is not None
        with contextlib.suppress(OSError):
            self.line.send(word)


def _ended(loop: asyncio.AbstractEventLoop, line: socket.socket, drain: Callable[[], None]) -> None:
    try:
        if line.recv(16):
            return
    except BlockingIOError:
        return
    except OSError:
        pass  # a supervisor was killed that had not read our last words
    loop.remove_reader(line)
    drain()


ALONE = Worker()
"""The only worker, without a supervisor."""
