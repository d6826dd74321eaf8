"""PostgreSQL servers of a test's own, on a UNIX socket and, if wanted, on loopback.

A server refuses to run as root: then it runs as the system's user `postgres`. Its files are in
memory where that is possible, so that a sync costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, free_port, wait_until
from tests.rigs.small_disk import small_disk

_SHARED_MEMORY = Path("/dev/shm")
_USER = "postgres"
_PATH = "/usr/sbin:/usr/bin:/usr/local/sbin"


def program(name: str) -> str | None:
    """Where a program of the server is: Debian has none of them in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@dataclass
class Postgres:
    """A server. `directory` has its socket, its files and its log."""

    directory: Path
    port: int = 5432
    settings: dict[str, str] = field(default_factory=dict)
    init: Sequence[str] = ()
    """More options of initdb."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def url(self, database: str = "postgres", **options: str) -> str:
        """Where a relay finds a database, over the socket."""
        more = "".join(f"&{name}={value}" for name, value in options.items())
        return f"postgresql://relay@/{database}?host={self.directory}&port={self.port}{more}"

    def tcp_url(self, database: str = "postgres", *, port: int | None = None) -> str:
        """The same, over loopback; `port`: of something that stands between."""
        return f"postgresql://relay@127.0.0.1:{port or self.port}/{database}"

    def make(self) -> None:
        """Make the files of the server."""
        _run(
            [
                program("initdb") or "initdb",
                f"--pgdata={self.data}",
                "--username=relay",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "--no-instructions",
                *self.init,
            ]
        )
        self.configure()

    def configure(self) -> None:
        """Add its own settings to what is there."""
        settings = {
            "listen_addresses": "'127.0.0.1'",
            "port": str(self.port),
            "unix_socket_directories": f"'{self.directory}'",
            "shared_buffers": "32MB",
            "max_connections": "100",
            "fsync": "on",
            "log_min_messages": "warning",
        } | self.settings
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(lines)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = (self.directory / "server.log").open("ab")
        self.process = subprocess.Popen(
            _as_user([program("postgres") or "postgres", "-D", str(self.data)]),
            stdout=log,
            stderr=log,
        )
        log.close()
        wait_until(self.answers, what="PostgreSQL")

    def answers(self) -> bool:
        """Whether it takes connections."""
        done = subprocess.run(
            [
                program("pg_isready") or "pg_isready",
                f"--host={self.directory}",
                f"--port={self.port}",
                "--quiet",
            ],
            check=False,
            env={**os.environ, "PYTEST_CURRENT_TEST": ""},
        )
        return done.returncode == 0

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: in order; SIGQUIT: at once, as a crash."""
        if self.process is not None:
            os.kill(self._postmaster(), how)
            self.process.wait(timeout=patient(30))
            self.process = None

    def _postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def pause(self) -> list[int]:
        """Stop all its processes where they are; which."""
        pids = [self._postmaster(), *self._children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return pids

    def _children(self) -> list[int]:
        path = Path(f"/proc/{self._postmaster()}/task/{self._postmaster()}/children")
        return [int(pid) for pid in path.read_text().split()]

    def go_on(self, pids: list[int]) -> None:
        """Have stopped processes go on."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def require_password(self, role: str) -> None:
        """Have a role log in with its password."""
        file = self.data / "pg_hba.conf"
        file.write_text(f"host all {role} all scram-sha-256\n{file.read_text()}")
        self.sql("SELECT pg_reload_conf()")

    def drop_queue(self) -> None:
        """Remove the tables of the relay, as if none had ever run here."""
        self.sql("DROP SCHEMA IF EXISTS relay CASCADE")

    def sql(self, statements: str, database: str = "postgres") -> str:
        """What psql prints for some statements."""
        done = subprocess.run(
            [
                program("psql") or "psql",
                "--no-psqlrc",
                "--quiet",
                "--tuples-only",
                "--no-align",
                "--set=ON_ERROR_STOP=1",
                f"--host={self.directory}",
                f"--port={self.port}",
                "--username=relay",
                f"--dbname={database}",
                "--command",
                statements,
            ],
            check=True,
            capture_output=True,
            text=True,
            # The name of a test may be longer than an environment may be.
            env={**os.environ, "PYTEST_CURRENT_TEST": ""},
        )
        return done.stdout.strip()


def _as_user(command: list[str]) -> list[str]:
    if os.geteuid() != 0:
        return command
    return ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", "--", *command]


def _run(command: list[str]) -> None:
    done = subprocess.run(_as_user(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def server_directory() -> Iterator[Path]:
    """A directory that the server's user may write to; its name is short enough for a socket."""
    where = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="relay-pg-", dir=where))
    try:
        if os.geteuid() == 0:
            user = pwd.getpwnam(_USER)
            os.chown(directory, user.pw_uid, user.pw_gid)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def postgres_on_small_disk(size: str, **settings: str) -> Iterator[Postgres]:
    """A server whose data, no larger than it has to be, is on a disk of its own. Its socket and its
    log are elsewhere.
    """
    user = pwd.getpwnam(_USER)
    options = f"size={size},uid={user.pw_uid},gid={user.pw_gid},mode=700"
    small = {"min_wal_size": "2MB", "max_wal_size": "6MB"}
    with server_directory() as directory, small_disk(directory / "data", options):
        server = Postgres(directory, free_port(), small | settings, init=["--wal-segsize=1"])
        server.make()
        server.start()
        try:
            yield server
        finally:
            _end(server)


@contextlib.contextmanager
def postgres(**settings: str) -> Iterator[Postgres]:
    """A server that runs."""
    with server_directory() as directory:
        server = Postgres(directory, free_port(), settings)
        server.make()
        server.start()
        try:
            yield server
        finally:
            _end(server)


def _end(server: Postgres) -> None:
    if server.process is None:
        return
    server.stop(signal.SIGQUIT)


@contextlib.contextmanager
def standby(primary: Postgres) -> Iterator[Postgres]:
    """A server that follows another, until it is promoted."""
    with server_directory() as directory:
        server = Postgres(directory, free_port())
        _run(
            [
                program("pg_basebackup") or "pg_basebackup",
                f"--pgdata={server.data}",
                f"--host={primary.directory}",
                f"--port={primary.port}",
                "--username=relay",
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            ]
        )
        server.configure()
        server.start()
        try:
            yield server
        finally:
            _end(server)


_POOLER = """\
[databases]
* = host={directory} port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 5
logfile = {directory}/pgbouncer.log
pidfile = {directory}/pgbouncer.pid
"""


@contextlib.contextmanager
def pooler(server: Postgres) -> Iterator[int]:
    """A pgbouncer before a server, which pools transactions; its port."""
    port = free_port()
    file = server.directory / "pgbouncer.ini"
    text = _POOLER.format(directory=server.directory, server_port=server.port, port=port)
    # Every client is this user of the server.
    file.write_text(text.replace("* = host", "* = user=relay host"))
    file.chmod(0o644)
    process = subprocess.Popen(
        _as_user([shutil.which("pgbouncer", path=_PATH) or "pgbouncer", "-q", str(file)]),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: accepts_connections("127.0.0.1", port), what="pgbouncer")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=patient(30))
