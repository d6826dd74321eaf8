"""The delivery log's file: what the store committed, appended line by line. †

`DeliveryLog` follows the store. Events are committed there first; ten times a second it
looks what there is (the store has the newest in memory) and appends it off the event
loop, in one write. At most once a second the file is synced and the store told how far it
has come (`log_written`). After a crash it goes on from there: nothing is missing, and a
line may come twice with the same id.

The file may be trouble, mail may not: while it cannot be written (no room, no permission,
no directory) nothing waits for it. It is said once, tried again ever more slowly, and
when it works again the lines that are owed are read from the store.

    renamed or removed       noticed before each write; a new file is begun
    SIGHUP                   `reopen`
    copytruncate             every write goes to the end there is (O_APPEND)
    several workers          each writes under a lock on the file, so that lines do not mix
    room for half a batch    the half is taken back, so that every line is whole
    a line torn by a crash   the same, by whoever writes next; the store still owes that line
    /dev/stdout, a pipe      written as it was inherited: its name may lead to nothing that this
                             user can open (a pipe of root's, a socket of the journal's)
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

__all__ = ["OUTPUTS", "DeliveryLog", "EventSource", "NumberedEvent"]

logger = logging.getLogger(__name__)

OUTPUTS = {"/dev/stdout": 1, "/dev/stderr": 2}
"""What a process inherits open, by name."""

_BATCH = 1000
"""Lines of one write."""

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
    """What the log asks of the store."""

    async def events_after(self, seq: int, *, limit: int = 1000) -> Sequence[NumberedEvent]: ...

    async def log_written(self, seq: int) -> None: ...

    async def log_mark(self) -> int: ...


class DeliveryLog:
    """Follows a store's events into a file. `run` it as a task; `close` it before the store."""

    def __init__(
        self,
        path: Path,
        source: EventSource,
        *,
        look_every: timedelta = timedelta(milliseconds=100),
        sync_every: timedelta = timedelta(seconds=1),
    ) -> None:
        self._file = _LogFile(path)
        self._source = source
        self._look_every = look_every.total_seconds()
        self._sync_every = sync_every.total_seconds()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="delivery-log")
        self._position: int | None = None  # the last event appended
        self._synced = 0  # the last event the store knows to be in the file
        self._synced_at = 0.0
        self._hurry = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._closing = False
        self._failures = 0

    @property
    def is_in_trouble(self) -> bool:
        """Whether the file cannot be written at the moment."""
        return self._failures > 0

    def reopen(self) -> None:
        """Begin a new file if the old one was moved away (SIGHUP); a file in trouble is tried at
        once.
        """
        self._file.close_first = True
        self._hurry.set()

    async def run(self) -> None:
        """Follow until `close` or cancelled. Nothing that goes wrong ends it."""
        self._running = True
        try:
            while True:
                self._hurry.clear()
                try:
                    lines = await self._follow()
                    self._say_well()
                except Exception as exc:  # the log's trouble must not end the log, whatever it is
                    self._say_trouble(exc)
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
        """Append and sync what is committed, then let the file go; an unwritable file is not waited
        for.
        """
        self._closing = True
        self._hurry.set()
        with contextlib.suppress(Exception):  # said already; the next start writes what is owed
            async with asyncio.timeout(grace.total_seconds()):
                if self._running:
                    await self._ended.wait()
                while await self._follow():  # nothing, unless `run` was cancelled
                    pass
        self._thread.submit(self._file.close)
        self._thread.shutdown(wait=False)

    async def _follow(self) -> int:
        """Append the next batch, sync if it is time; how many lines were appended."""
        if self._position is None:
            self._position = self._synced = await self._source.log_mark()
        batch = await self._source.events_after(self._position, limit=_BATCH)
        sync = self._sync_is_due(bool(batch))
        if batch or sync or self._file.close_first:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._file.append, batch, sync)
            except _NotSynced:
                # What the kernel failed to write it may have forgotten: all since the last good
                # sync again.
                self._position = self._synced
                raise
            if batch:
                self._position = batch[-1].seq
            if sync:
                self._synced, self._synced_at = self._position, time.monotonic()
                await self._source.log_written(self._synced)
        return len(batch)

    def _sync_is_due(self, more: bool) -> bool:
        if self._position == self._synced and not more:
            return False
        return self._closing or time.monotonic() - self._synced_at >= self._sync_every

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless there is a retry_silent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    def _say_trouble(self, exc: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.warning(
                "delivery log %s cannot be written: %s; mail goes on, the lines follow later",
                self._file.path,
                exc,
            )

    def _say_well(self) -> None:
        if self._failures:
            self._failures = 0
            logger.info("delivery log %s is written again", self._file.path)


class _NotSynced(OSError):
    """The file could not be synced."""


class _LogFile:
    """The open file. Its methods block, and run on one thread of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.close_first = False
        self._fd: int | None = None
        self._identity = (0, 0)
        self._is_regular = True
        self._unsynced = False

    def append(self, batch: Sequence[NumberedEvent], sync: bool) -> None:
        """Append the lines of a batch, all or none; then sync, if asked."""
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
        """Sync what is not yet, and let the file go."""
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
            _sync_directory(
                self.path.parent
            )  # or a power cut could take the new file, synced as it was
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
            _write_all(fd, data)
            return
        with _locked(fd):
            size = _mend(fd)
            self._unsynced = True
            try:
                _write_all(fd, data)
            except OSError:
                # Nobody else writes while we hold the lock: what is beyond `size` is ours.
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


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _fdatasync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    except OSError as exc:
        raise _NotSynced(*exc.args) from exc


def _sync_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Hold the file's lock, which the other workers take too. A file system without locks has one
    writer.
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


def _mend(fd: int) -> int:
    """Make the file end with a whole line, and return its size.

    A last line without its end was torn by a crash. If it is one of ours it is taken away:
    its event is not marked as written, and comes again. Anything else is ended with LF.
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
    _write_all(fd, b"\n")
    return os.fstat(fd).st_size
