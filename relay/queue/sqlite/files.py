"""Files that hold content: how one is written, read, and made to last under its name.

What is written is on the disk only when the file was synced, and is found again only when the
directory was. A file is written once, from front to back, and never changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from relay.mail.files import sync_directory, write_all
from relay.queue.store import CHUNK_BYTES, SpoolError

CONTENT = "content"
"""The directory of these files, within that of the queue."""


def read_piece(path: Path, offset: int, size_bytes: int) -> bytes:
    """What begins at `offset` of content that has `size_bytes` in all. `SpoolError` where it has
    not.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SpoolError(f"{path.name}: its content, the file {path}, is gone") from None
    try:
        found_bytes = os.fstat(fd).st_size
        if found_bytes != size_bytes:
            raise SpoolError(
                f"{path.name}: its content, {path}, has {found_bytes} octets of {size_bytes}"
            )
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)


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
