"""The directory of a queue: who may use it, what room is left, and how its database is opened.

    lock       one relay a directory: an flock, which ends with the process, however it ends
    ballast    a file of zeros that is given up when the disk is full, so that deliveries can still
               be written down and mail can leave; laid down again when there is room
    queue.db   the database, with its -wal and -shm
    content    a directory: large content, see `contents`

Everything SQLite raises becomes `SpoolError` or `QueueFull` here.

SQLite before 3.51.3 can corrupt a WAL when two connections write or checkpoint at the same
moment: there is one writing connection in one process, and all others are read-only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

from relay.mail.files import sync_directory
from relay.queue.sqlite.files import make_directories
from relay.queue.sqlite.schema import APPLICATION_ID, MIGRATIONS, version_of
from relay.queue.store import QueueFull, SpoolError

log = logging.getLogger(__name__)

DATABASE = "queue.db"
LOCK = "lock"
BALLAST = "ballast"

PAGE_BYTES = 4096
_BUSY_WAIT_MS = 5000
_CACHE_KIB = 16 * 1024
_STATEMENTS = 512
_SMALLEST_BALLAST = 256 * 1024
_LARGEST_BALLAST = 16 * 1024 * 1024
_MIN_SQLITE = (3, 35, 0)

_FULL = frozenset({sqlite3.SQLITE_FULL})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_SYNCHRONOUS_NUMBER = {"OFF": 0, "NORMAL": 1, "FULL": 2}


def translated(exc: BaseException) -> SpoolError:
    """Our error for what SQLite or the operating system raised."""
    if isinstance(exc, SpoolError):
        return exc
    if is_full(exc):
        return QueueFull("no space left for the queue")
    return SpoolError(f"queue: {exc}")


def is_full(exc: BaseException) -> bool:
    """Whether it was for want of space."""
    if isinstance(exc, sqlite3.Error):
        return (getattr(exc, "sqlite_errorcode", 0) & 0xFF) in _FULL
    return isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)


def is_busy(exc: BaseException) -> bool:
    """Whether another process held the database locked: nothing was tried yet."""
    return isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorcode", 0) & 0xFF in _BUSY


class Spool:
    """The directory, held by this process from here to `close`.

    `reserve_bytes`: no new mail is taken while less room is left than this, counting what is
    free inside the database. By default twice the ballast, which is a sixteenth of the file
    system within bounds.
    """

    def __init__(self, directory: Path, *, reserve_bytes: int | None, lock_wait: timedelta) -> None:
        self.directory = directory
        self.path = directory / DATABASE
        self._lock_fd = -1
        self._ballast = directory / BALLAST
        try:
            self._make()
            self._lock_fd = _lock(directory / LOCK, lock_wait)
            self.ballast_bytes = self._ballast_size()
        except OSError as exc:
            self.close()
            raise SpoolError(f"queue directory {directory}: {exc.strerror}") from exc
        self.reserve_bytes = 2 * self.ballast_bytes if reserve_bytes is None else reserve_bytes
        self.has_ballast = False
        self.lay_ballast()

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock_fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._lock_fd, 0)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def free_bytes(self) -> int:
        """Room left on the file system for us; none if it cannot tell."""
        try:
            found = os.statvfs(self.directory)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize

    def drop_ballast(self) -> bool:
        """Give the ballast's room to the database; whether there was any."""
        had = self.has_ballast
        self.has_ballast = False
        with contextlib.suppress(OSError):
            os.truncate(self._ballast, 0)
        return had

    def lay_ballast(self) -> None:
        """Take the ballast's room where it is there to be taken, without pressing others."""
        if self.has_ballast:
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._ballast, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size != self.ballast_bytes:
                    if self.free_bytes() < 2 * self.ballast_bytes:
                        return
                    os.ftruncate(fd, self.ballast_bytes)
                # Also where the size is right: a crash may have left a hole.
                os.posix_fallocate(fd, 0, self.ballast_bytes)
                self.has_ballast = True
            except OSError:
                os.ftruncate(fd, 0)
            finally:
                os.close(fd)

    def create_database(self) -> bool:
        """Make an empty file with our permissions where there is none; whether it was made.

        Where a WAL lies without its database, mail was lost by other hands: that is not ours to
        hide with a new, empty queue.
        """
        with contextlib.suppress(FileExistsError):
            if self.path.with_name(f"{DATABASE}-wal").exists() and not self.path.exists():
                raise SpoolError(
                    f"{self.path} is gone, but its -wal is there: restore it before starting"
                )
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            sync_directory(self.directory)
            return True
        return False

    def wal_bytes(self) -> int:
        """The size of the write-ahead log."""
        try:
            return os.stat(f"{self.path}-wal").st_size
        except OSError:
            return 0

    def _make(self) -> None:
        """Make the directory for its owner only; one that is there keeps its permissions."""
        above = self.directory.parent
        make_directories(above)
        try:
            self.directory.mkdir(mode=0o700)
        except FileExistsError:
            # Who made it may have been killed before its name was synced. It may be a mount point
            # as well, below something that cannot be synced.
            with contextlib.suppress(OSError):
                sync_directory(above)
        else:
            self.directory.chmod(0o700)
            sync_directory(above)

    def _ballast_size(self) -> int:
        found = os.statvfs(self.directory)
        wanted = found.f_blocks * found.f_frsize // 16
        return max(_SMALLEST_BALLAST, min(_LARGEST_BALLAST, wanted)) // PAGE_BYTES * PAGE_BYTES


def _lock(path: Path, wait: timedelta) -> int:
    """Hold the lock file for this process.

    A relay that is just stopping, or a command that reads the stopped queue, is waited for.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + wait.total_seconds()
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise SpoolError(
                        f"{path.parent}: {_holder(fd)} uses this queue already"
                    ) from None
                time.sleep(0.05)
        with contextlib.suppress(
            OSError
        ):  # on a full disk: it is the lock that counts, not the name on it
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def holder(directory: Path) -> str:
    """Who holds a directory now; empty where nobody does, or where that cannot be seen."""
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(fd)
    finally:
        os.close(fd)
    return ""


def _holder(fd: int) -> str:
    pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return f"process {pid}" if pid.isdigit() else "another process"


def open_writer(path: Path, *, synchronous: str, wal_limit_bytes: int) -> sqlite3.Connection:
    """The one connection that writes. Refused unless every commit is synced.

    With WAL and synchronous=NORMAL a commit is not: a message answered 250 would be gone
    after a power cut. `synchronous` is for tests that have to see the difference.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        raise SpoolError(f"SQLite {sqlite3.sqlite_version} is too old for the queue")
    db = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_WAIT_MS / 1000,
        cached_statements=_STATEMENTS,
    )
    try:
        _refuse_a_strangers_file(db)
        db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        if not db.execute("PRAGMA application_id").fetchone()[0]:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise SpoolError(f"{path}: this file system cannot hold a database in WAL mode")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        if db.execute("PRAGMA synchronous").fetchone()[0] != _SYNCHRONOUS_NUMBER[synchronous]:
            raise SpoolError(f"{path}: SQLite does not take synchronous={synchronous}")
        # Deleted mail is not overwritten with zeros: it would double what is written.
        db.execute("PRAGMA secure_delete = OFF")
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute(f"PRAGMA journal_size_limit = {wal_limit_bytes}")
    except BaseException:
        db.close()
        raise
    return db


def _refuse_a_strangers_file(db: sqlite3.Connection) -> None:
    """A database of another program is not touched."""
    found = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if found not in (0, APPLICATION_ID) or (found == 0 and tables):
        raise SpoolError("the queue database is of another program")


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection of a running relay that cannot write."""
    db = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_WAIT_MS / 1000,
        cached_statements=_STATEMENTS,
    )
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB // 4}")
        # From here on the WAL index stays mapped: a writer that has to be opened again after a
        # failed sync then finds it, and does not recover the commit that failed.
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def open_stopped(directory: Path) -> tuple[sqlite3.Connection, int]:
    """The queue of a relay that does not run, for reading: nothing is created and nothing written.

    Returns the connection and the descriptor of the lock, which is held shared until it is closed.
    """
    path = directory / DATABASE
    fd = -1
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        db = _open_unshared(path)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise SpoolError(f"{directory}: {holder} uses this queue: ask it") from None
    except OSError as exc:
        if fd >= 0:
            os.close(fd)
        raise SpoolError(f"queue directory {directory}: {exc.strerror}") from exc
    except (sqlite3.Error, SpoolError) as exc:
        os.close(fd)
        raise translated(exc) from exc
    return db, fd


def _open_unshared(path: Path) -> sqlite3.Connection:
    """The lock file keeps all others away, so SQLite needs no locks and no -shm of its own."""
    if not path.exists():
        raise SpoolError(f"{path}: there is no queue")
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists() and wal.stat().st_size:
        # In exclusive mode the index of the WAL is kept in memory.
        db = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro&vfs=unix-none",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
    else:
        db = sqlite3.connect(
            f"file:{quote(str(path))}?mode=ro&immutable=1",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
    try:
        db.execute("PRAGMA query_only = ON")
        _refuse_a_strangers_file(db)
        if version_of(db) != len(MIGRATIONS):
            raise SpoolError(f"{path}: its tables are of another version; start the relay once")
    except BaseException:
        db.close()
        raise
    return db


def check_quickly(db: sqlite3.Connection, *, largest_bytes: int, within: timedelta) -> None:
    """Refuse a database whose pages contradict each other, as far as a short look can tell."""
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    if pages * PAGE_BYTES > largest_bytes:
        return
    deadline = time.monotonic() + within.total_seconds()
    db.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as exc:
        if exc.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return
    finally:
        db.set_progress_handler(None, 0)
    if found != "ok":
        raise SpoolError(f"the queue database is damaged: {found}")
