"""A listener: a socket, and a `Connection` for each client that comes.

`start_listener` opens the socket that a `ListenerSpec` describes, or takes one that is bound
already (socket activation), and returns a `Listener`. `Listener.close` drains: it accepts no new
client; a client between commands gets 421 4.3.2 at once; a client that is sending a message may
finish it within the grace; a commit under way is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from relay.receive.connection import Connection
from relay.receive.intake import Reception
from relay.receive.listener_state import ListenerState
from relay.receive.spec import ListenerSpec, ListenerTls, TcpAddress, UnixAddress, parse_address
from relay.submit.certificates import CertificateError, ServerTls
from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker

log = logging.getLogger(__name__)

_BACKLOG = 1024
_NO_GRACE = timedelta(0)


class Listener:
    """A listener that is open. `address`: where it is bound, with the real port instead of 0."""

    def __init__(
        self,
        state: ListenerState,
        server: asyncio.Server,
        address: TcpAddress | UnixAddress,
        *,
        owns_path: bool = True,
    ) -> None:
        self.address = address
        self._owns_path = owns_path
        self._state = state
        self._server = server

    @property
    def spec(self) -> ListenerSpec:
        return self._state.spec

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._state.inside)

    @property
    def is_quiet(self) -> bool:
        """No client is connected, and no task that a client began still runs."""
        return not self._state.inside and not self._state.tasks

    def reload_certificate(self) -> None:
        """Read the certificate again. `CertificateError` if it is broken; the old one stays."""
        if self._state.tls is not None:
            self._state.tls.reload()

    async def close(self, grace: timedelta = _NO_GRACE) -> None:
        """Drain for at most `grace`; a commit under way is waited for in any case."""
        self._state.is_closing = True
        self._server.close()
        if isinstance(self.address, UnixAddress) and self._owns_path:
            with contextlib.suppress(OSError):
                os.unlink(self.address.path)
        for connection in list(self._state.inside):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace.total_seconds()):
                await self._state.empty.wait()
        for connection in list(self._state.inside):
            connection.abort()
        while self._state.tasks:
            await asyncio.wait(list(self._state.tasks))
        await asyncio.sleep(0)


async def start_listener(
    spec: ListenerSpec,
    reception: Reception,
    *,
    passwords: SecretChecker | None = None,
    sock: socket.socket | None = None,
) -> Listener:
    """Open a listener. `CertificateError` and `OSError` say why it cannot be opened."""
    tls = None
    if spec.tls is not ListenerTls.NONE:
        if spec.certificate is None:
            raise CertificateError(f"{spec.address}: tls: {spec.tls} needs a certificate")
        tls = ServerTls(spec.certificate, spec.key, spec.min_tls)
    passwords = passwords or SecretChecker(Failures(), clock=reception.clock)
    state = ListenerState(spec, reception, tls, passwords)
    loop = asyncio.get_running_loop()
    address = parse_address(spec.address)

    def connection() -> Connection:
        return Connection(state)

    if sock is not None:
        server = await _serve_socket(loop, connection, sock)
    elif isinstance(address, UnixAddress):
        remove_stale(address.path)
        server = await loop.create_unix_server(connection, address.path, backlog=_BACKLOG)
        admit(address.path, spec)
    else:
        server = await loop.create_server(connection, address.host, address.port, backlog=_BACKLOG)
    _watch_for_dead_clients(server, reception.limits.idle)
    return Listener(state, server, _bound(server), owns_path=sock is None)


async def _serve_socket(
    loop: asyncio.AbstractEventLoop, connection: Callable[[], Connection], sock: socket.socket
) -> asyncio.Server:
    if sock.family == socket.AF_UNIX:
        return await loop.create_unix_server(connection, sock=sock, backlog=_BACKLOG)
    return await loop.create_server(connection, sock=sock, backlog=_BACKLOG)


def _watch_for_dead_clients(server: asyncio.Server, idle: timedelta) -> None:
    """Let the kernel end connections whose peer is gone; accepted sockets inherit the option."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    for listening in server.sockets:
        if listening.family != socket.AF_UNIX:
            milliseconds = int(idle.total_seconds() * 1000)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _bound(server: asyncio.Server) -> TcpAddress | UnixAddress:
    return _named(server.sockets[0].getsockname())


def bound_address(sock: socket.socket) -> str:
    """Where a socket listens, in the form of a `ListenerSpec`."""
    return str(_named(sock.getsockname()))


def _named(name: Any) -> TcpAddress | UnixAddress:
    return TcpAddress(name[0], name[1]) if isinstance(name, tuple) else UnixAddress(str(name))


def admit(path: str, spec: ListenerSpec) -> None:
    """Set group and mode of a UNIX socket; the group first, because the mode is meant for it."""
    if spec.socket_group is not None and Path(path).group() != spec.socket_group:
        shutil.chown(path, group=spec.socket_group)
    os.chmod(path, int(spec.socket_mode, 8))


def remove_stale(path: str) -> None:
    """Remove the socket file of a process that is gone, unless a process answers at it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) != 0:
                os.unlink(path)
