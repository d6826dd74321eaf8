"""The directory between two queues: who has it, and how its files get there whole.

A file is written under another name, synced, and then gets its name, which is synced too; so an
import reads no file that is half written. One process at a time writes or reads a directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from relay.mail.files import sync_directory
from relay.queue.move_file import (
    END_BYTES,
    LONGEST_HEAD_BYTES,
    MESSAGE_SUFFIX,
    DamagedFile,
    MovedMessage,
    end_of,
    read_message,
)
from relay.queue.rows import BadRow
from relay.queue.store import CHUNK_BYTES, SpoolError

NOTE = ".relay-queue-export"
"""The file that holds the name of a directory, and its lock."""

_UNFINISHED = ".tmp"


@dataclass(frozen=True, slots=True)
class Target:
    """The directory that messages go to: by the name that is in it, and by its place."""

    name: str
    place: str

    def __str__(self) -> str:
        return f"{self.name} {self.place}"

    def is_meant(self, noted: str) -> bool:
        """Whether a note in a queue is of this directory."""
        name, _, place = noted.partition(" ")
        return name == self.name or place == self.place

    def other_places(self, noted: Iterable[str]) -> list[str]:
        """The places of the directories that some notes in a queue are of, but for this one."""
        return [one.partition(" ")[2] for one in noted if not self.is_meant(one)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message in a file that is whole. `digest`: the SHA-256 of its content."""

    message: MovedMessage
    path: Path
    content_bytes: int
    digest: str
    begins: int

    def content(self) -> Iterator[bytes]:
        """The content in pieces of at most `CHUNK_BYTES`."""
        with self.path.open("rb") as file:
            file.seek(self.begins)
            left = self.content_bytes
            while left:
                piece = file.read(min(CHUNK_BYTES, left))
                if not piece:
                    raise SpoolError(f"{self.path}: it has become shorter")
                left -= len(piece)
                yield piece

    def is_same(self, other: MovedMessage, digest: str) -> bool:
        """Whether a message of the queue, with content of this SHA-256, is the one in the file.
        One that is damaged is another.
        """
        try:
            return digest == self.digest and other.envelope == self.message.envelope
        except BadRow:
            return False


@contextlib.contextmanager
def held_to_write(directory: Path) -> Iterator[Target]:
    """The directory, for this process alone: made if it is not there, and known to be writable."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
        sync_directory(directory.parent)
    with _locked(directory) as note:
        name = os.pread(note, 64, 0).decode("ascii", "replace").strip()
        if not name:
            name = secrets.token_hex(8)
            os.pwrite(note, f"{name}\n".encode("ascii"), 0)
            os.fsync(note)
            sync_directory(directory)
        for path in directory.glob(f"*{_UNFINISHED}"):
            path.unlink()
        yield Target(name, f"{socket.gethostname()}:{directory.resolve()}")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    fd = os.open(directory / NOTE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolError(f"{directory}: another process moves messages there") from None
        yield fd
    finally:
        os.close(fd)


def _other_name(path: Path) -> Path:
    return path.with_name(f"{path.name}{_UNFINISHED}")


def give_name(path: Path) -> None:
    """Give a file that was written its name; one that was there before has it."""
    with contextlib.suppress(FileNotFoundError):
        _other_name(path).rename(path)


@contextlib.contextmanager
def written(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A file under a name that no import reads, whole and synced at the end."""
    digest = hashlib.sha256()
    path = _other_name(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb", CHUNK_BYTES) as file:

            def write(octets: bytes) -> None:
                digest.update(octets)
                file.write(octets)

            yield write
            file.write(end_of(digest.hexdigest()))
            file.flush()
            os.fdatasync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


@contextlib.contextmanager
def held_to_read(directory: Path) -> Iterator[None]:
    """The directory, for this process alone. `SpoolError` where there is none."""
    if not directory.is_dir():
        raise SpoolError(f"{directory}: there is no such directory")
    with _locked(directory):
        yield


def files_of(directory: Path, suffix: str) -> list[Path]:
    """The files of a directory, oldest message first."""
    return sorted(path for path in directory.glob(f"*{suffix}") if path.is_file())


def read_files(directory: Path) -> Iterator[Arrival | str]:
    """The messages in a directory, and what is wrong with a file that is damaged."""
    for path in files_of(directory, MESSAGE_SUFFIX):
        try:
            yield read_arrival(path)
        except DamagedFile as error:
            yield f"{path}: {error}"


def read_arrival(path: Path) -> Arrival:
    """A message whose file is whole. `DamagedFile`."""
    head, content_bytes, digest = read_whole(path)
    message = read_message(head)
    if path.name != f"{message.queue_id}{MESSAGE_SUFFIX}":
        raise DamagedFile(f"it is of the message {message.queue_id}: its name is wrong")
    return Arrival(message, path, content_bytes, digest, len(head))


def read_whole(path: Path) -> tuple[bytes, int, str]:
    """The first line of a file, the size of what follows, and the SHA-256 of that."""
    whole, content = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.readline(LONGEST_HEAD_BYTES)
        content_bytes = left = size - len(head) - END_BYTES
        if left < 0 or not head.endswith(b"\n"):
            raise DamagedFile("it is cut short")
        whole.update(head)
        while left:
            piece = file.read(min(CHUNK_BYTES, left))
            if not piece:
                raise DamagedFile("it is cut short")
            left -= len(piece)
            whole.update(piece)
            content.update(piece)
        if file.read() != end_of(whole.hexdigest()):
            raise DamagedFile("its SHA-256 is another: it is damaged, or cut short")
    return head, content_bytes, content.hexdigest()
