"""The listening sockets that a worker does not open itself: from systemd, or from the supervisor.

They are opened before any worker is forked, bound and not listening yet: a worker listens when it
is ready. `ListeningSockets` has, at each TCP address, one for each worker.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Self

from relay.config import Config
from relay.receive.listener import admit, bound_address, remove_stale
from relay.receive.spec import ListenerSpec, TcpAddress, UnixAddress, parse_address
from relay.workers.systemd import passed_sockets
from relay.workers.worker import StartError


def sockets_from_systemd(config: Config, environ: Mapping[str, str]) -> dict[str, socket.socket]:
    """The sockets systemd opened for us, by address; each has to be that of a listener."""
    passed = {bound_address(sock): sock for sock in passed_sockets(environ)}
    wanted = {str(parse_address(spec.address)) for spec in config.listeners}
    for address in passed:
        if address not in wanted:
            raise StartError(
                f"systemd hands over a socket at {address}, and no listener has that address"
            )
    return passed


class ListeningSockets:
    """Where several workers listen. Closed at the end of the `with`, or before."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = environ
        self._by_worker: list[dict[str, socket.socket]] = [{} for _ in range(config.workers)]
        self._paths: list[str] = []

    def __enter__(self) -> Self:
        try:
            passed = sockets_from_systemd(self._config, self._environ)
            for spec in self._config.listeners:
                address = parse_address(spec.address)
                sock = passed.get(str(address))
                if sock is not None:
                    self._share(str(address), sock)
                else:
                    self._open(address, spec)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return ", ".join(map(bound_address, self._by_worker[0].values())) or "no listener"

    def keep(self, worker: int) -> Mapping[str, socket.socket]:
        """In a worker: its own, by the address in the configuration.

        The others are let go of, or they would stay open after their worker.
        """
        own = self._by_worker[worker]
        for sockets in self._by_worker:
            for address, sock in sockets.items():
                if sock is not own.get(address):
                    sock.close()
        return own

    def close(self) -> None:
        """Let go of all; a worker has its own hold on them until it closes its listeners."""
        for sockets in self._by_worker:
            for sock in sockets.values():
                sock.close()
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._paths.clear()

    def _share(self, address: str, sock: socket.socket) -> None:
        for sockets in self._by_worker:
            sockets[address] = sock

    def _open(self, address: TcpAddress | UnixAddress, spec: ListenerSpec) -> None:
        try:
            if isinstance(address, UnixAddress):
                self._share(str(address), _unix_socket(address.path))
                self._paths.append(address.path)
                admit(address.path, spec)
            else:
                self._open_port(address)
        except OSError as error:
            raise StartError(
                f"listener {address}: {(error.strerror or str(error)).lower()}"
            ) from error

    def _open_port(self, address: TcpAddress) -> None:
        """One socket for each worker; for port 0 the first says which port it is."""
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for sockets in self._by_worker:
            sock = sockets[str(address)] = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(where)
            where = sock.getsockname()


def _unix_socket(path: str) -> socket.socket:
    remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.bind(path)
    return sock
