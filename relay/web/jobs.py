"""Changes of the queue from the page. A change goes on when its browser is gone.

Each change is an event of the delivery log, with the operator's name, verb, filter and number.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from relay.admin.requests import RequestError
from relay.mail.newest import keep_newest
from relay.queue.store import QueueFilter, SpoolError
from relay.report import deliverylog
from relay.web.state import Web

log = logging.getLogger("relay.page")

_KEPT = 50
_AT_A_TIME = 4


@dataclass(eq=False)
class QueueJob:
    """One change. `wanted`: the filter in words. `trouble`: a sentence if it failed."""

    name: str
    user: str
    verb: str
    wanted: Mapping[str, str]
    began: datetime
    changed: int = 0
    unknown: int = 0
    trouble: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.done.is_set()


@dataclass
class Jobs:
    """The newest changes."""

    state: Web
    _jobs: dict[str, QueueJob] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def find(self, name: str) -> QueueJob | None:
        """A change by its name."""
        return self._jobs.get(name)

    def start(self, user: str, verb: str, wanted: QueueFilter, said: Mapping[str, str]) -> QueueJob:
        """Begin a change; `SpoolError` where too many are under way."""
        if len(self._tasks) >= _AT_A_TIME:
            raise SpoolError("too many changes are under way; wait until one has ended")
        job = QueueJob(secrets.token_hex(8), user, verb, said, self.state.clock())
        keep_newest(self._jobs, job.name, job, most=_KEPT)
        task = asyncio.create_task(self._run(job, wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def settled(self, job: QueueJob, seconds: float) -> None:
        """Wait until a change has ended, at most so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await job.done.wait()

    async def _run(self, job: QueueJob, wanted: QueueFilter) -> None:
        try:
            async for so_far in self.state.operator.change(job.verb, wanted):
                job.changed, job.unknown = so_far.recipients, len(so_far.unknown)
            await self.note(job.user, job.verb, job.wanted, job.changed)
        except (SpoolError, RequestError) as error:
            job.trouble = str(error)
        except Exception:
            log.exception("page: %s failed", job.verb)
            job.trouble = "an error of the relay's own; its log has it"
        job.done.set()

    async def note(self, user: str, verb: str, wanted: Mapping[str, object], count: int) -> None:
        """Write an operator's change to the log."""
        log.info("operator %s: %s, %d recipients changed", user, verb, count)
        event = deliverylog.operated(user, verb, wanted, count=count, now=self.state.clock())
        await self.state.write_event(event)
