"""Connections to the server, and what its errors mean.

`Server` connects to the first of its hosts that takes writes; each host has a time of its own, so
that one that hangs costs the others nothing. `Link` is one connection that is made when it is
needed and dropped when it fails; one task at a time uses it. The kernel finds out within seconds
that the machine of a server is gone, though nothing is asked.

Neither advisory locks, nor LISTEN, nor the state of a session are used: a pooler may stand between,
and the next transaction be on another connection. So every name in SQL has its schema, and every
setting is made in the transaction that needs it.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import asyncpg

from relay.queue.server_address import ServerAddress
from relay.queue.store import QueueFull, SpoolError


class Db(Protocol):
    """What is used of a connection: the library has no types of its own."""

    async def execute(self, query: str, *args: Any) -> str: ...

    async def fetch(self, query: str, *args: Any) -> list[Any]: ...

    async def fetchrow(self, query: str, *args: Any) -> Any: ...

    async def fetchval(self, query: str, *args: Any) -> Any: ...

    def transaction(self) -> AbstractAsyncContextManager[object]: ...

    def add_log_listener(self, callback: Callable[[Any, Any], None]) -> None: ...

    def is_closed(self) -> bool: ...

    def terminate(self) -> None: ...

    async def close(self, *, timeout: float) -> None: ...


T = TypeVar("T")
P = ParamSpec("P")

ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)
"""What the library raises."""

SAFE_COMMIT = (
    "SELECT CASE WHEN current_setting('synchronous_commit') IN ('on', 'remote_apply') THEN NULL"
    " ELSE set_config('synchronous_commit', 'on', true) END,"
    " set_config('idle_in_transaction_session_timeout', '10s', true)"
)
"""In the transaction, where no pooler loses it: its commit is synced, and a node that is cut off
midway holds its locks for ten seconds.
"""

OLDEST_SERVER = 14
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 2.0
"""Between two tries of all hosts, in seconds; the half of it is drawn by lot."""
_REPEATS = 5

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 10_000),
)
"""After five seconds without an octet the kernel asks for the other end. A connection whose other
end is silent for some ten seconds has ended.
"""


class Ask(Protocol):
    """Has a function work on a connection, which is its first argument."""

    async def __call__(self, question: Callable[..., Awaitable[T]], /, *args: Any) -> T: ...


class NoServer(SpoolError):
    """No host of the address took a connection for writing. It may do so later."""


class StartRefused(SpoolError):
    """The server is there and cannot be used like this: waiting would change nothing."""


class Superseded(SpoolError):
    """Another process is this node now, or the tables belong to a newer relay: this one has to
    end.
    """


class Server:
    """The server at an address. `password`: what `queue.password_file` says now."""

    def __init__(
        self, address: ServerAddress, *, name: str, password: Callable[[], str | None]
    ) -> None:
        self.address = address
        self._name = name
        self._password = password
        self._last = 0
        self._pause = 0.0
        self._not_before = 0.0
        self._failure: tuple[type[SpoolError], str] = NoServer, ""

    async def connect(self) -> Db:
        """A connection to the primary. Right after a failure it fails at once.

        Raises `NoServer`, or `StartRefused` where every host refuses it for good. One of several
        that does so may be an old primary that was fenced.
        """
        if time.monotonic() < self._not_before:
            raise self._as_before()
        failures: list[str] = []
        is_refused = True
        hosts = self.address.hosts
        for turn in range(len(hosts)):
            number = (self._last + turn) % len(hosts)
            try:
                db = await self._connect_to(*hosts[number])
            except (*ERRORS, NoServer) as exc:
                is_refused = is_refused and is_final(exc)
                failures.append(f"{hosts[number][0]}: {_text(exc)}")
                continue
            self._last, self._pause = number, 0.0
            return db
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        self._not_before = time.monotonic() + self._pause * random.uniform(0.5, 1.0)
        said = "; ".join(failures)
        if is_refused:
            self._failure = StartRefused, said
        else:
            self._failure = NoServer, f"no server takes the queue ({said})"
        raise self._as_before()

    def _as_before(self) -> SpoolError:
        kind, text = self._failure
        return kind(text)

    async def _connect_to(self, host: str, port: int) -> Db:
        address = self.address
        async with asyncio.timeout(address.connect_seconds):
            db: Db = await asyncpg.connect(
                address.tls_url(),
                host=host,
                port=port,
                user=address.user,
                password=self._password() or address.password,
                database=address.database,
                statement_cache_size=100 if address.prepared_statements else 0,
                max_cached_statement_lifetime=0,
                server_settings={"application_name": self._name},
                timeout=address.connect_seconds,
            )
            try:
                _keep_alive(db)
                is_standby = await db.fetchval("SELECT pg_is_in_recovery()")
            except BaseException:
                db.terminate()
                raise
        if is_standby:
            db.terminate()
            raise NoServer("it is a standby, which takes no writes")
        return db


def _keep_alive(db: Any) -> None:
    # The library has no public way to the socket.
    sock = db._transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        for level, option, value in _KEEPALIVE:
            sock.setsockopt(level, option, value)


def changed_rows(status: str) -> int:
    """How many rows a statement changed, of what `Db.execute` returned."""
    return int(status.rpartition(" ")[2])


def is_final(exc: BaseException) -> bool:
    """Whether an error of connecting stays the same until a person changes something."""
    return isinstance(
        exc,
        asyncpg.InvalidAuthorizationSpecificationError  # and a wrong password
        | asyncpg.InvalidCatalogNameError
        | asyncpg.InsufficientPrivilegeError,
    )


class Link:
    """One connection. `seconds`: how long one question may take."""

    def __init__(self, server: Server, *, seconds: float) -> None:
        self._server = server
        self._seconds = seconds
        self._db: Db | None = None
        self._lock = asyncio.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a question waits or is under way."""
        return self._lock.locked()

    async def ask(
        self, question: Callable[Concatenate[Db, P], Awaitable[T]], *args: P.args, **named: P.kwargs
    ) -> T:
        """The answer of `question(connection, …)`; once more where another node was in the way."""
        async with self._lock:
            for repeat in range(_REPEATS):
                try:
                    return await self._ask(question, *args, **named)
                except ERRORS as exc:
                    if not may_repeat(exc) or repeat == _REPEATS - 1:
                        raise translated(exc) from exc
            raise AssertionError("the last repeat raises")

    async def _ask(
        self, question: Callable[Concatenate[Db, P], Awaitable[T]], *args: P.args, **named: P.kwargs
    ) -> T:
        if self._db is None or self._db.is_closed():
            self._db = await self._server.connect()
        db = self._db
        # A question that is cancelled would wait for a server that says nothing: its transaction
        # is rolled back first. So the connection is ended instead, and the question with it.
        late = asyncio.get_running_loop().call_later(self._seconds, db.terminate)
        try:
            return await question(db, *args, **named)
        except asyncpg.PostgresError as exc:
            if is_lost(exc):
                self.drop()
            raise
        except SpoolError:
            raise
        except BaseException as exc:
            # Nobody knows what the server does: the next question is another connection's.
            self.drop()
            if late.when() <= asyncio.get_running_loop().time() and isinstance(exc, ERRORS):
                raise TimeoutError from exc
            raise
        finally:
            late.cancel()

    def drop(self) -> None:
        """Let the connection go at once."""
        db, self._db = self._db, None
        if db is not None:
            db.terminate()

    async def close(self) -> None:
        """Let the connection go in order."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(*ERRORS):
                await db.close(timeout=2.0)


def is_lost(exc: BaseException) -> bool:
    """Whether the connection is of no more use: it ended, or the server is no primary any more."""
    return isinstance(
        exc,
        asyncpg.PostgresConnectionError
        | asyncpg.ReadOnlySQLTransactionError
        | asyncpg.OperatorInterventionError
        | asyncpg.InvalidSQLStatementNameError  # a pooler that does not keep what is prepared
        | asyncpg.InterfaceError
        | OSError
        | TimeoutError,
    )


def may_repeat(exc: BaseException) -> bool:
    """Whether the same transaction may succeed at once: another one was in the way."""
    return isinstance(exc, asyncpg.SerializationError | asyncpg.DeadlockDetectedError)


def translated(exc: BaseException) -> SpoolError:
    """Our error for what the library raised."""
    if isinstance(exc, SpoolError):
        return exc
    if isinstance(exc, asyncpg.DiskFullError):
        return QueueFull(f"the disk of the database is full: {_text(exc)}")
    if isinstance(exc, asyncpg.UniqueViolationError):
        return SpoolError(f"another message has this queue id ({_text(exc)})")
    return SpoolError(f"the database failed: {_text(exc)}")


def _text(exc: BaseException) -> str:
    """An error in one line; a message of the server may quote a row, so only its first line."""
    if isinstance(exc, TimeoutError) and not str(exc):
        return "no answer in time"
    lines = str(exc).splitlines()
    return lines[0] if lines else type(exc).__name__
