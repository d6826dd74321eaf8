"""Files with a secret: passwords, client secrets, keys, refresh tokens. †

A name that begins with `$CREDENTIALS_DIRECTORY` is a file that systemd gives to the service
(`LoadCredential=`). `SecretFileError` says what is wrong with a file, and never what is in it.

A refresh token that its server replaced is written with `replace_secret`: into a file beside it,
synced, renamed over it. `reserve` makes that file before the server is asked, so that a full disk
or a directory that cannot be written is found while the old token still counts; it stays for the
next time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from relay.mail.files import sync_directory

Stamp = tuple[int, int, int]
"""Time of the last change, size and inode: another stamp means that the file may be another."""

_VARIABLE = "CREDENTIALS_DIRECTORY"
_LONGEST_LINE = 64 * 1024
_LONGEST_TEXT = 256 * 1024
_RESERVED_BYTES = 16 * 1024
_MODE = 0o600
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_LOOKS_SECONDS = 0.05


class SecretFileError(Exception):
    """A file with a secret cannot be used; the text names it and says why."""


def place_of(path: str) -> Path:
    """The file that a key of the configuration names."""
    for begin in (f"${_VARIABLE}/", f"${{{_VARIABLE}}}/"):
        if path.startswith(begin):
            directory = os.environ.get(_VARIABLE)
            if not directory:
                text = f"{path}: ${_VARIABLE} is not set; systemd sets it for LoadCredential="
                raise SecretFileError(text)
            return Path(directory, path[len(begin) :])
    return Path(path)


def shown_path(path: str) -> str:
    """The name of a file as a message quotes it. What is clearly no path may be the secret itself,
    pasted in its place, and is not shown. Secrets in base64 have "/" in them, but seldom begin with
    it.
    """
    is_path = path.startswith(("/", "./", "../", f"${_VARIABLE}/", f"${{{_VARIABLE}}}/"))
    return path if is_path else "the file (its name is shown only if it begins with / or ./)"


def stamp_of(path: str) -> Stamp | None:
    """The stamp of a file, None where there is none to be seen."""
    try:
        status = place_of(path).stat()
    except (OSError, SecretFileError):
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def read_line(path: str) -> str:
    """The first line of a file, without its end."""
    line = _read(path, _LONGEST_LINE).partition("\n")[0].rstrip("\r")
    if not line:
        raise SecretFileError(f"{shown_path(path)}: its first line is empty")
    return line


def read_text(path: str) -> str:
    """All of a file."""
    text = _read(path, _LONGEST_TEXT + 1)
    if len(text) > _LONGEST_TEXT:
        raise SecretFileError(f"{shown_path(path)}: it has more than {_LONGEST_TEXT} characters")
    return text


@asynccontextmanager
async def locked(path: str, *, seconds: float) -> AsyncIterator[None]:
    """Hold the lock of a file, against other processes; TimeoutError where one of them holds it for
    longer. The lock ends with its process, however that ends.
    """
    import asyncio  # 30 ms, which a command that only looks at the files does not need

    with _errors(path):
        whole = place_of(path)
        fd = os.open(whole.with_name(f".{whole.name}.lock"), _FLAGS, _MODE)
        _owned_as(fd, whole.parent)
    try:
        async with asyncio.timeout(seconds):
            while not _lock(fd):  # noqa: ASYNC110 - no event tells of another process
                await asyncio.sleep(_LOCK_LOOKS_SECONDS)
        yield
    finally:
        os.close(fd)


def reserve(path: str) -> None:
    """Make sure that `replace_secret` will have room on the disk."""
    with _errors(path):
        fd = os.open(_beside(place_of(path)), _FLAGS, _MODE)
        try:
            _owned_as(fd, _beside(place_of(path)).parent)
            os.posix_fallocate(fd, 0, _RESERVED_BYTES)
        finally:
            os.close(fd)


def replace_secret(path: str, secret: str) -> None:
    """Write a secret in the place of the one before; on disk when this returns. Only the owner of
    the directory may read it.
    """
    with _errors(path):
        whole = place_of(path)
        beside = _beside(whole)
        fd = os.open(beside, _FLAGS, _MODE)
        try:
            _overwrite(fd, f"{secret}\n".encode())
            os.fchmod(fd, _MODE)
            _owned_as(fd, whole.parent)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(beside, whole)
        sync_directory(whole.parent)


def _read(path: str, most: int) -> str:
    # "utf-8-sig": editors of Windows put a byte order mark first, which is no part of a secret.
    try:
        with _errors(path), place_of(path).open(encoding="utf-8-sig", newline="") as file:
            return file.read(most)
    except UnicodeDecodeError:
        # Not its text, and not as the cause: it quotes the octets.
        raise SecretFileError(f"{shown_path(path)}: it is not text in UTF-8") from None


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SecretFileError(f"{shown_path(path)}: {error.strerror or error}") from None


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _overwrite(fd: int, octets: bytes) -> None:
    """Write over the reserved octets, which are on disk already: new ones might find no room."""
    written = 0
    while written < len(octets):
        written += os.pwrite(fd, octets[written:], written)
    os.ftruncate(fd, len(octets))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _owned_as(fd: int, directory: Path) -> None:
    """Give a file to the owner of its directory, where we may: root writes for the relay."""
    with suppress(OSError):
        owner = directory.stat()
        os.fchown(fd, owner.st_uid, owner.st_gid)
