"""What is asked of an engine's writer, and how it is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.queue.batch import Rows
from relay.queue.store import QueueFull, SpoolError, StoredEvent

log = logging.getLogger(__name__)


class Refused(SpoolError):
    """A request asks for what the queue's state does not allow: that request fails and no other."""


@dataclass(slots=True, eq=False)
class Request:
    """`rows` to be written, or a `function` of a connection that does the writing, whose value is
    the result.

    `on_commit` or `on_failure` runs on the event loop before the task that awaits the future goes
    on. `stored` are the events it has written. `is_given_up`: who asked was told that it failed,
    whatever comes of it.
    `function_bytes`: about how much a function that writes many rows has written.
    """

    rows: Rows | None = None
    function: Callable[..., Any] | None = None
    on_commit: Callable[[Any], None] | None = None
    on_failure: Callable[[], None] | None = None
    result: Any = None
    error: BaseException | None = None
    is_given_up: bool = False
    function_bytes: int = 0
    stored: list[StoredEvent] = field(default_factory=list)
    future: asyncio.Future[Any] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def takes_in(self) -> bool:
        """Whether it is mail from outside, which is refused when room gets short."""
        return self.rows is not None and self.rows.takes_in

    @property
    def is_result(self) -> bool:
        """Whether it is what an attempt left: no client waits for it."""
        return self.rows is not None and not self.rows.takes_in

    @property
    def size_bytes(self) -> int:
        """How much content it brings, or how much its function has written."""
        return self.rows.size_bytes if self.rows is not None else self.function_bytes


def resolve(batch: list[Request], on_events: Callable[[list[StoredEvent]], None]) -> None:
    """Answer the requests of a batch."""
    stored = [event for request in batch if request.error is None for event in request.stored]
    if stored:
        stored.sort(key=lambda one: one.seq)
        on_events(stored)
    for request in batch:
        future = request.future
        if future.done():
            continue
        if request.error is None:
            future.set_result(request.result)
        else:
            future.set_exception(request.error)
    # Those who wait go on when this turn of the event loop has ended: clients get their replies
    # before the scheduler, which these calls wake, begins to deliver.
    for request in batch:
        if request.error is not None:
            if request.on_failure is not None:
                request.on_failure()
        elif request.on_commit is not None:
            request.on_commit(request.result)


def settled_messages(requests: Iterable[Request]) -> list[tuple[Request, str]]:
    """The requests that ask whether a message's pending report is due, with its queue id."""
    return [(one, one.rows.settled) for one in requests if one.rows and one.rows.settled]


def answer_settled(settled: Sequence[tuple[Request, str]], due: set[str]) -> None:
    """Whether a request's pending report is due: decided in the commit, so that one attempt gets
    True. Of the attempts for one message that are written together it is the last.
    """
    left = set(due)
    for request, queue_id in reversed(settled):
        request.result = queue_id in left
        left.discard(queue_id)


def without_new_mail(batch: list[Request], reason: str) -> list[Request]:
    """The requests that may go on where there is no room."""
    for request in batch:
        if request.takes_in:
            request.error = QueueFull(reason)
    return [request for request in batch if not request.takes_in]


def log_failure(future: asyncio.Future[Any]) -> None:
    """For claims whose release no task awaits."""
    if not future.cancelled() and (exc := future.exception()) is not None:
        log.error("claims could not be given back; they are due after a restart: %s", exc)
