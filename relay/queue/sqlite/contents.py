"""Large content, each in a file of its own beside the database.

In the database each octet would be written twice, to the write-ahead log and to its place, in
pages of 4 KiB. A file is written once, from front to back:

    append     pieces, as they come in; nothing is promised about them yet
    complete   the rest; the file and its name are synced before the commit that tells of them
    remove     after the commit that let the message go, or instead of one

So a crash may leave a file that no message has, which `sweep` removes at the next start, and
never a message without its file.

What is done to one file is done in order, on one thread of a few: a disk that is slow to sync
one message keeps neither small ones nor the event loop waiting.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

from relay.mail.files import sync_directory, write_all
from relay.queue.sqlite.disk import Spool, translated
from relay.queue.sqlite.files import CONTENT, create
from relay.queue.store import QueueFull, SpoolError

log = logging.getLogger(__name__)

_THREADS = 4


class Contents:
    """The files of a running relay's queue."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._directory = spool.directory / CONTENT
        self._being_written: dict[str, int] = {}
        self._left: deque[str] = deque()
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix="queue-content-writer")
            for _ in range(_THREADS)
        ]

    def make_directory(self) -> None:
        """Have a place for the files, for our eyes only."""
        with suppress(FileExistsError):
            self._directory.mkdir(mode=0o700)
            sync_directory(self._spool.directory)

    def path_of(self, queue_id: str) -> Path:
        """The file of a message."""
        return self._directory / queue_id

    def sweep(self, wanted: Collection[str]) -> set[str]:
        """Remove every file but those of `wanted`; returns which of `wanted` have none."""
        present = set(os.listdir(self._directory))
        for queue_id in present.difference(wanted):
            os.unlink(self.path_of(queue_id))
        return set(wanted) - present

    async def append(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece at the end of a file that has `offset` octets; at 0 the file is made."""
        await self._in_order(queue_id, self._append, queue_id, offset, piece)

    async def complete(self, queue_id: str, offset: int, rest: bytes) -> None:
        """Write the last piece; on return the whole file is on the disk, under its name."""
        await self._in_order(queue_id, self._complete, queue_id, offset, rest)

    def remove(self, queue_ids: Iterable[str]) -> None:
        """Have these files removed, those there are, and those that could not be removed before."""
        wanted = list(queue_ids)
        with suppress(IndexError):  # another thread takes of them, too
            for _ in range(len(self._left)):
                wanted.append(self._left.popleft())
        with suppress(RuntimeError):  # closed: what stays goes at the next start
            for queue_id in wanted:
                self._thread_of(queue_id).submit(self._remove, queue_id)

    def close(self) -> None:
        """Finish what was begun."""
        for thread in self._threads:
            thread.shutdown(wait=True)
        for fd in self._being_written.values():
            os.close(fd)
        self._being_written.clear()

    def _thread_of(self, queue_id: str) -> ThreadPoolExecutor:
        return self._threads[crc32(queue_id.encode()) % _THREADS]

    async def _in_order(self, queue_id: str, work: Callable[..., None], *args: object) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread_of(queue_id), work, *args)
        except (OSError, RuntimeError) as exc:  # RuntimeError: closed
            raise translated(exc) from exc

    # On the threads.

    def _append(self, queue_id: str, offset: int, piece: bytes) -> None:
        if self._spool.free_bytes() < self._spool.reserve_bytes + len(piece):
            raise QueueFull("too little space left for the queue")
        if not offset:
            self._being_written[queue_id] = create(self.path_of(queue_id))
        # It stays open: only so a write-back that fails is sure to be told by the sync at the end.
        fd = self._being_written.get(queue_id)
        if fd is None or os.fstat(fd).st_size != offset:
            raise SpoolError(
                f"{queue_id}: what is before octet {offset} of its content is not there"
            )
        write_all(fd, piece)

    def _complete(self, queue_id: str, offset: int, rest: bytes) -> None:
        self._append(queue_id, offset, rest)
        with self._taken(queue_id) as fd:
            os.fdatasync(fd)
        sync_directory(self._directory)

    def _remove(self, queue_id: str) -> None:
        try:
            if queue_id in self._being_written:
                with self._taken(queue_id):
                    pass
            with suppress(FileNotFoundError):
                os.unlink(self.path_of(queue_id))
        except OSError as exc:
            self._left.append(queue_id)
            log.warning("%s: could not remove its content yet: %s", queue_id, exc.strerror)

    @contextmanager
    def _taken(self, queue_id: str) -> Iterator[int]:
        """The descriptor, for the last time."""
        fd = self._being_written.pop(queue_id)
        try:
            yield fd
        finally:
            os.close(fd)
