"""The writer: which requests make a batch, and what becomes of them when the database fails.

One transaction is under way (`transaction`); what comes meanwhile is the next batch. A commit of
unknown outcome is asked about before anything else is written: the batch is written again if it can
never commit. Until that is known nothing else is written; after `PATIENCE` seconds who waits for
new mail hears 451, and a message that turns out to be committed is removed again, untold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import asyncpg

from relay.queue.postgres.connection import (
    ERRORS,
    Db,
    NoServer,
    Server,
    is_lost,
    may_repeat,
    translated,
)
from relay.queue.postgres.statements import Tables
from relay.queue.postgres.transaction import LeaseLost, Transactions, UnknownOutcome, undone
from relay.queue.request import Request, resolve
from relay.queue.store import QueueFull, SpoolError, StoredEvent

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""How long a request may wait for the database, in seconds."""

_BATCH_REQUESTS = 512
_BATCH_BYTES = 16 * 1024 * 1024
_PAUSE_SECONDS = 0.2
_GLANCE_SECONDS = 0.5
_REPEATS = 5


@dataclass(slots=True)
class _Doubt:
    """A batch whose outcome is unknown, and what it was written as."""

    lease: int
    n: int
    batch: list[tuple[float, Request]]


class Writer:
    """`start` it; `close` ends it after all that was submitted."""

    def __init__(
        self,
        server: Server,
        tables: Tables,
        *,
        on_events: Callable[[list[StoredEvent]], None],
        on_lease_lost: Callable[[], None],
    ) -> None:
        self._transactions = Transactions(server, tables)
        self._tables = tables
        self._on_events = on_events
        self._on_lease_lost = on_lease_lost
        self._waiting: deque[tuple[float, Request]] = deque()
        self._wake = asyncio.Event()
        self._n = 0
        self._taken: list[tuple[float, Request]] = []
        self._doubt: _Doubt | None = None
        self._trouble = ""
        self.unknown_commits = 0
        self._is_full = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="queue-writer")
        self._watch = asyncio.create_task(self._watch_patience(), name="queue-patience")

    @property
    def trouble(self) -> str:
        """What fails at the moment, "" for nothing."""
        return f"the queue's database cannot be written: {self._trouble}" if self._trouble else ""

    def submit(self, request: Request) -> None:
        """Have it written with the next batch."""
        if self._closing:
            raise SpoolError("the queue is closed")
        self._waiting.append((time.monotonic(), request))
        self._wake.set()

    async def close(self) -> None:
        """Write what was submitted, as far as the database answers, and let the connection go."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.shield(self._task)
        if self._watch is not None:
            self._watch.cancel()
        await self._transactions.close()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting or self._doubt is not None:
                try:
                    await self._step()
                except Exception:
                    log.exception("the queue's writer met a mistake of its own")
                    self._transactions.drop()
                    self._fail([one for _, one in self._taken], SpoolError("internal trouble"))
            if self._closing:
                return

    async def _step(self) -> None:
        """Write the next batch; or find out about the last one; or wait for the database."""
        if self._doubt is not None and not await self._settle_doubt():
            await self._pause()
            return
        batch: list[Request] = []
        self._taken = []
        try:
            await self._transactions.connect()  # what waits may be given up meanwhile
            if batch := self._take():
                await self._write(batch)
        except LeaseLost as exc:
            self._fail(batch, exc)
            self._on_lease_lost()
        except NoServer as exc:
            # Nothing was written. Who came a moment ago may wait for a server that comes back.
            self._tell_trouble(str(exc))
            self._put_back(self._taken)
            self._give_up_the_old(exc)
            await self._pause()
        except QueueFull as exc:
            self._tell_full(exc)
            self._fail(batch, exc)
        except SpoolError as exc:
            self._tell_trouble(str(exc))
            self._fail(batch, exc)

    def _take(self) -> list[Request]:
        self._taken = []
        size_bytes = 0
        while self._waiting and len(self._taken) < _BATCH_REQUESTS and size_bytes < _BATCH_BYTES:
            began, request = self._waiting.popleft()
            if not request.is_given_up:
                self._taken.append((began, request))
                size_bytes += request.size_bytes
        return [request for _, request in self._taken]

    async def _watch_patience(self) -> None:
        """Nobody waits longer because the server has several hosts that hang one after the other,
        or because the last outcome cannot be learned. And trouble ends though nothing comes that
        is to be written.
        """
        while True:
            await asyncio.sleep(_GLANCE_SECONDS)
            if self._closing:
                continue
            until = time.monotonic() - PATIENCE
            if not self._transactions.is_connected and any(
                began <= until for began, _ in self._waiting
            ):
                self._tell_trouble(self._trouble or "the server gives no connection")
            if self._trouble:
                self._give_up_the_old(SpoolError(self._trouble))
                if not self._waiting:
                    attempt = Request(function=_nothing)
                    attempt.future.add_done_callback(lambda future: future.exception())
                    self.submit(attempt)

    def _give_up_the_old(self, error: SpoolError) -> None:
        """Fail what has waited for too long, or everything where we are to end."""
        until = time.monotonic() - (0 if self._closing else PATIENCE)
        old = [request for began, request in self._waiting if began <= until]
        self._waiting = deque((began, one) for began, one in self._waiting if began > until)
        self._fail(old, error)
        if self._doubt is not None:
            # A result waits until its outcome is known; a client does not.
            old = [one for began, one in self._doubt.batch if began <= until]
            self._fail([one for one in old if one.takes_in or self._closing], error)
            if self._closing:
                self._doubt = None

    def _put_back(self, taken: Sequence[tuple[float, Request]]) -> None:
        """These are written with the next batch, as far as nobody was told of a failure."""
        left = [(began, request) for began, request in taken if not request.is_given_up]
        for _, request in left:
            request.error = None
            request.stored.clear()
        self._waiting.extendleft(reversed(left))

    def fail_waiting(self, error: SpoolError) -> None:
        """What waits was meant for a lease that is lost."""
        waiting, self._waiting = self._waiting, deque()
        self._fail([request for _, request in waiting], error)

    def _fail(self, batch: Sequence[Request], error: SpoolError) -> None:
        failed = [request for request in batch if not request.is_given_up]
        for request in failed:
            request.error = request.error or error
            request.is_given_up = True
        resolve(failed, self._on_events)

    async def _pause(self) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)

    def _tell_trouble(self, text: str) -> None:
        if text != self._trouble:
            self._trouble = text
            log.error("the queue's database cannot be written: %s", text)

    def _tell_full(self, error: SpoolError) -> None:
        """No trouble of this node: its clients hear of it, and no other node has more room."""
        if not self._is_full:
            self._is_full = True
            log.error("no new mail is taken: %s", error)

    def _is_well(self, batch: Sequence[Request] = ()) -> None:
        if self._is_full and any(request.takes_in for request in batch):
            self._is_full = False
            log.warning("the database's disk has room for new mail again")
        if self._trouble:
            log.warning("the queue's database works again, after: %s", self._trouble)
            self._trouble = ""

    # One batch.

    async def _write(self, batch: list[Request]) -> None:
        """Commit a batch, or leave it in doubt. Raises `SpoolError` where nothing was written."""
        for repeat in range(_REPEATS):
            await self._transactions.connect()
            lease = self._tables.lease()
            self._n += 1
            point = self._tables.point()
            try:
                await self._transactions.commit(lease, self._n, batch)
            except UnknownOutcome as exc:
                self._transactions.drop()
                self._tables.back_to(point)
                self.unknown_commits += 1
                self._doubt = _Doubt(lease, self._n, self._taken)
                self._tell_trouble(f"a commit has an unknown outcome ({exc})")
                self._wake.set()
                return
            except BaseException as exc:
                undone(self._tables, point, batch)
                if repeat < _REPEATS - 1 and (may_repeat(exc) or self._refused_mail(batch, exc)):
                    continue
                if is_lost(exc):
                    self._transactions.drop()
                    raise NoServer(str(translated(exc))) from exc
                if isinstance(exc, ERRORS):
                    raise translated(exc) from exc
                if not isinstance(exc, SpoolError):
                    log.exception("the queue's writer met a mistake of its own")
                    self._transactions.drop()
                    self._fail(batch, SpoolError(f"internal trouble ({type(exc).__name__})"))
                    return
                raise
            self._is_well(batch)
            resolve(batch, self._on_events)
            return

    def _refused_mail(self, batch: list[Request], exc: BaseException) -> bool:
        """Where the disk is full, refuse new mail, which needs room, for what leaves, which makes
        some. Whether there is both.
        """
        mail = [request for request in batch if request.takes_in]
        is_full = isinstance(exc, asyncpg.DiskFullError)
        if not is_full or not mail or len(mail) == len(batch):
            return False
        self._tell_full(translated(exc))
        self._fail(mail, translated(exc))
        batch[:] = [request for request in batch if not request.takes_in]
        self._taken = [(began, one) for began, one in self._taken if not one.takes_in]
        return True

    # Unknown outcomes.

    async def _settle_doubt(self) -> bool:
        """Find out about the last batch; whether that is done."""
        doubt = self._doubt
        assert doubt is not None
        try:
            is_void = await self._transactions.can_never_commit(doubt.lease, doubt.n)
        except (*ERRORS, SpoolError) as exc:
            self._transactions.drop()
            self._tell_trouble(str(translated(exc)))
            self._give_up_the_old(translated(exc))
            return self._doubt is None
        self._doubt = None
        if is_void:
            self._put_back(doubt.batch)
            return True
        log.warning("a commit with an unknown outcome was made")
        self._is_well()
        self._tables.go_on_from(request for _, request in doubt.batch)
        untold = [request for _, request in doubt.batch if request.is_given_up]
        resolve([one for _, one in doubt.batch if not one.is_given_up], self._on_events)
        if untold:
            removal = Request(function=lambda db: self._tables.remove_untold(db, untold))
            removal.future.add_done_callback(lambda future: future.exception())
            self._waiting.append((time.monotonic(), removal))
        return True


async def _nothing(_: Db) -> None:
    """The mark of the batch is all that is written."""
