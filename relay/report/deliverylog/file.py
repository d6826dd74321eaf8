"""The file of the delivery log: appends the events that the store has committed. †

Events are committed in the store first. Ten times a second `DeliveryLog` asks the store for new
events (the newest are in memory) and appends them in one write, in a thread. At most once a second
it syncs the file and tells the store up to which event the file is written (`log_written`). After a
crash it continues from there: no line is missing, and a line may come twice with the same id.

Mail does not wait for the file. While the file cannot be written (no room, no permission, no
directory), the relay logs that once and tries again, with growing pauses. Then it reads the lines
that are missing from the store.

    renamed or removed       the relay notices it before each write, and begins a new file
    SIGHUP                   `reopen`
    copytruncate             every write goes to the present end of the file (O_APPEND)
    several workers          each writes under a lock on the file, so that lines do not mix
    several nodes            each has its own events in its own file; what a lost node's file does
                             not have, one of the others appends to its own
    room for half a batch    the half is removed, so that every line is complete
    a line torn by a crash   the next writer removes it; the store has that event still
    /dev/stdout, a pipe      the inherited descriptor is used: this user may not be allowed to open
                             the file by its name (a pipe of root's, a socket of the journal's)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from relay.mail.event import Event
from relay.mail.files import sync_directory, write_all

logger = logging.getLogger(__name__)

OUTPUTS = {"/dev/stdout": 1, "/dev/stderr": 2}
"""Descriptors that a process inherits, by name."""

_BATCH = 1000
"""Lines in one write."""

_LONGEST_PAUSE = 30.0
_LOCK_PATIENCE = 2.0
_LINE_BEGINS = b'{"event":"'
_LONGEST_LINE_BYTES = 1024 * 1024


class NumberedEvent(Protocol):
    """An event as the store keeps it."""

    @property
    def seq(self) -> int: ...

    @property
    def event(self) -> Event: ...


class EventSource(Protocol):
    """The part of the store that the log uses."""

    async def events_after(self, seq: int, *, limit: int = 1000) -> Sequence[NumberedEvent]: ...

    async def log_written(self, seq: int) -> None: ...

    async def log_mark(self) -> int: ...


class LostEvents(Protocol):
    """Events of nodes that are lost, which no file has yet; for one node of those that live."""

    async def lost_events(self, *, limit: int = 1000) -> tuple[int, Sequence[NumberedEvent]]:
        """The number of a lost node, and its next events; no events where there is no such node."""

    async def lost_written(self, node: int, seq: int) -> None:
        """Remember that a file holds, synced, all events of a lost node up to `seq`."""


class DeliveryLog:
    """Writes the events of a store to a file. `run` is a task; `close` it before the store."""

    def __init__(
        self,
        path: Path,
        source: EventSource,
        *,
        lost: LostEvents | None = None,
        look_every: timedelta = timedelta(milliseconds=100),
        look_for_lost_every: timedelta = timedelta(seconds=5),
        sync_every: timedelta = timedelta(seconds=1),
    ) -> None:
        self._file = _LogFile(path)
        self._source = source
        self._lost = lost
        self._look_for_lost_every = look_for_lost_every.total_seconds()
        self._looked_for_lost_at = 0.0
        self._look_every = look_every.total_seconds()
        self._sync_every = sync_every.total_seconds()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="delivery-log")
        self._position: int | None = None  # the last event appended
        self._synced = 0  # the last event the store knows to be in the file
        self._synced_at = 0.0
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._closing = False
        self._failures = 0

    @property
    def is_in_trouble(self) -> bool:
        """Whether the file cannot be written at the moment."""
        return self._failures > 0

    def reopen(self) -> None:
        """Begin a new file if the old one was renamed (SIGHUP). A file that could not be written
        is tried at once.
        """
        self._file.close_first = True
        self._wake.set()

    async def run(self) -> None:
        """Write new events until `close` or until cancelled. No error ends it."""
        self._running = True
        try:
            while True:
                self._wake.clear()
                try:
                    lines = await self._follow()
                    if lines < _BATCH and not self._closing:
                        await self._follow_lost()
                    self._report_recovery()
                except Exception as exc:  # no error of one write may end the log
                    self._report_failure(exc)
                    if self._closing:
                        return
                    await self._pause(min(0.25 * 2 ** min(self._failures, 10), _LONGEST_PAUSE))
                    continue
                if self._closing and not lines:
                    return
                if lines < _BATCH and not self._closing:
                    await self._pause(self._look_every)
        finally:
            self._ended.set()

    async def close(self, *, grace: timedelta = timedelta(seconds=10)) -> None:
        """Append and sync all committed events, and close the file. A file that cannot be written
        is waited for at most as long as `grace`.
        """
        self._closing = True
        self._wake.set()
        with contextlib.suppress(Exception):  # logged already; the next start adds what is missing
            async with asyncio.timeout(grace.total_seconds()):
                if self._running:
                    await self._ended.wait()
                while await self._follow():  # 0 unless `run` was cancelled
                    pass
        self._thread.submit(self._file.close)
        self._thread.shutdown(wait=False)

    async def _follow(self) -> int:
        """Append the next batch, and sync if that is due. Returns how many lines were appended."""
        if self._position is None:
            self._position = self._synced = await self._source.log_mark()
        batch = await self._source.events_after(self._position, limit=_BATCH)
        sync = self._sync_is_due(bool(batch))
        if batch or sync or self._file.close_first:
            await self._append(batch, sync)
            if batch:
                self._position = batch[-1].seq
            if sync:
                self._synced, self._synced_at = self._position, time.monotonic()
                await self._source.log_written(self._synced)
        return len(batch)

    async def _follow_lost(self) -> None:
        """Append the events of lost nodes that no file has, every few seconds."""
        now = time.monotonic()
        if self._lost is None or now - self._looked_for_lost_at < self._look_for_lost_every:
            return
        node, batch = await self._lost.lost_events(limit=_BATCH)
        if batch:
            await self._append(batch, True)
            await self._lost.lost_written(node, batch[-1].seq)
        if len(batch) < _BATCH:
            self._looked_for_lost_at = now

    async def _append(self, batch: Sequence[NumberedEvent], sync: bool) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, self._file.append, batch, sync)
        except _NotSynced:
            # The kernel may have dropped the pages that it failed to write (fsync(2)), so all lines
            # since the last good sync are written again.
            self._position = self._synced
            raise

    def _sync_is_due(self, more: bool) -> bool:
        if self._position == self._synced and not more:
            return False
        return self._closing or time.monotonic() - self._synced_at >= self._sync_every

    async def _pause(self, seconds: float) -> None:
        """Wait so many seconds, or until `reopen` or `close`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _report_failure(self, exc: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.warning(
                "delivery log %s cannot be written: %s; mail goes on, the lines follow later",
                self._file.path,
                exc,
            )

    def _report_recovery(self) -> None:
        if self._failures:
            self._failures = 0
            logger.info("delivery log %s is written again", self._file.path)


class _NotSynced(OSError):
    """The file could not be synced."""


class _LogFile:
    """The open file. Its methods block, and run in one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.close_first = False
        self._fd: int | None = None
        self._identity = (0, 0)
        self._is_regular = True
        self._unsynced = False

    def append(self, batch: Sequence[NumberedEvent], sync: bool) -> None:
        """Append the lines of a batch, all or none; then sync if `sync`."""
        if self._fd is not None and (self.close_first or self._was_moved()):
            self.close()
        self.close_first = False
        if self._fd is None:
            self._fd = self._open()
        if batch:
            lines = "".join([f"{numbered.event.line}\n" for numbered in batch])
            self._write(self._fd, lines.encode("ascii", "backslashreplace"))
        if sync:
            self._sync()

    def close(self) -> None:
        """Sync and close the file."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            if self._unsynced and self._is_regular:
                _fdatasync(fd)
            self._unsynced = False
        finally:
            os.close(fd)

    def _open(self) -> int:
        inherited = OUTPUTS.get(str(self.path))
        if inherited is not None and not stat.S_ISREG(os.fstat(inherited).st_mode):
            fd = os.dup(inherited)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
            fd = os.open(self.path, flags, 0o640)
        facts = os.fstat(fd)
        self._identity = (facts.st_dev, facts.st_ino)
        self._is_regular = stat.S_ISREG(facts.st_mode)
        if self._is_regular:
            # Without this a power cut could remove the new file, though its content was synced.
            with contextlib.suppress(OSError):  # not every file system can sync a directory
                sync_directory(self.path.parent)
        return fd

    def _was_moved(self) -> bool:
        """Whether the path leads to another file now, or to none."""
        try:
            facts = os.stat(self.path)
        except OSError:
            return True
        return (facts.st_dev, facts.st_ino) != self._identity

    def _write(self, fd: int, data: bytes) -> None:
        if not self._is_regular:
            write_all(fd, data)
            return
        with _locked(fd):
            size = _repair_end(fd)
            self._unsynced = True
            try:
                write_all(fd, data)
            except OSError:
                # No other worker writes while this one has the lock: all beyond `size` is torn.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise

    def _sync(self) -> None:
        if self._fd is None or not self._unsynced:
            return
        if self._is_regular:
            try:
                _fdatasync(self._fd)
            except OSError:
                os.close(self._fd)
                self._fd = None
                raise
        self._unsynced = False


def _fdatasync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    except OSError as exc:
        raise _NotSynced(*exc.args) from exc


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Hold the lock on the file, which every worker takes. On a file system without locks there is
    no lock.
    """
    until = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.002)
            continue
        except OSError:
            yield
            return
        break
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def _repair_end(fd: int) -> int:
    """Make the file end with a complete line, and return its size.

    A last line without its end was torn by a crash. If the relay wrote it, it is removed: the store
    does not count its event as written, and gives it again. Any other text gets a LF.
    """
    size = os.fstat(fd).st_size
    if not size or os.pread(fd, 1, size - 1) == b"\n":
        return size
    piece = os.pread(fd, _LONGEST_LINE_BYTES, max(size - _LONGEST_LINE_BYTES, 0))
    torn = piece[piece.rfind(b"\n") + 1 :]
    is_whole_piece = len(torn) == len(piece) and size > len(piece)
    if not is_whole_piece and (torn.startswith(_LINE_BEGINS) or _LINE_BEGINS.startswith(torn)):
        try:
            os.ftruncate(fd, size - len(torn))
        except OSError:
            pass
        else:
            return size - len(torn)
    write_all(fd, b"\n")
    return os.fstat(fd).st_size
