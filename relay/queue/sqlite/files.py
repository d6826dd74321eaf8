"""Files that hold content: how one is written, read, and made to last under its name.

What is written is on the disk only when the file was synced, and is found again only when the
directory was. A file is written once, from front to back, and never changed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from relay.mail.files import sync_directory, write_all
from relay.queue.store import CHUNK_BYTES, SpoolError

CONTENT = "content"
"""The directory of these files, within that of the queue."""


_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""Of Linux. Other systems have no read that does not wait for the disk."""
_NOT_NOW = (errno.EAGAIN, errno.EOPNOTSUPP)
"""The system would have to wait for the disk; or the file system does not know how not to wait."""


class WholeFile:
    """The file of content that has `size_bytes`, open for reading. `SpoolError` where it has not
    so many.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self.size_bytes = size_bytes
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SpoolError(f"{path.name}: its content, the file {path}, is gone") from None
        try:
            self._check(os.fstat(self._fd).st_size)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def read(self, offset: int, count: int = CHUNK_BYTES) -> bytes:
        """What begins at `offset`, at most `count`; there must be some."""
        piece = os.pread(self._fd, count, offset)
        if not piece:
            self._check(offset)
        return piece

    def read_at_once(self, offset: int) -> bytes:
        """The same, as far as the system has it in memory; b"": the disk has to be read first.

        What was written a moment ago is in memory, as a rule.
        """
        if not _NOWAIT:
            return b""
        piece = bytearray(min(CHUNK_BYTES, self.size_bytes - offset))
        try:
            count = os.preadv(self._fd, [piece], offset, _NOWAIT)
        except OSError as error:
            if error.errno in _NOT_NOW:
                return b""
            raise
        with memoryview(piece) as read:
            return bytes(read[:count])

    def is_in_memory(self, offset: int, count: int) -> bool:
        """Whether the system has these octets in memory, as far as one of each `CHUNK_BYTES`, and
        the last one, tell.
        """
        end = min(offset + count, self.size_bytes)
        return all(map(self._has_one, (*range(offset, end, CHUNK_BYTES), end - 1)))

    def _has_one(self, offset: int) -> bool:
        if not _NOWAIT:
            return False
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, _NOWAIT) == 1
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)

    def _check(self, found_bytes: int) -> None:
        if found_bytes != self.size_bytes:
            raise SpoolError(
                f"{self._path.name}: its content, {self._path}, has {found_bytes} octets of"
                f" {self.size_bytes}"
            )


def pieces_of(path: Path, size_bytes: int) -> Iterator[bytes]:
    """The content in pieces; it waits for the disk."""
    with closing(WholeFile(path, size_bytes)) as file:
        offset = 0
        while offset < size_bytes:
            piece = file.read(offset)
            offset += len(piece)
            yield piece


def write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file anew and sync it; its name is for the caller to sync."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = create(path)
    try:
        for piece in pieces:
            write_all(fd, piece)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def link_all(source: Path, target: Path) -> None:
    """Give every file of one directory a second name in another, and sync the names."""
    for path in source.iterdir():
        with suppress(FileNotFoundError):
            os.unlink(target / path.name)
        os.link(path, target / path.name)
    sync_directory(target)


def create(path: Path) -> int:
    """A new file, to be written from front to back."""
    try:
        return os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    except FileExistsError:
        raise SpoolError(f"{path.name}: another message has this queue id") from None


def make_directories(directory: Path) -> None:
    """Have a directory and all above it; the name of each that was made is durable."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another worker was quicker
            path.mkdir()
        sync_directory(path.parent)
