"""What only a start would find: taken ports, directories that cannot be written, silent name
servers. †

`relay check` tries what `relay serve` would do, and leaves nothing behind. Where a relay runs with
this configuration already (it answers at admin.socket), what that one holds is not wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from relay.config.consider import Remark
from relay.config.parts import resolver_options
from relay.config.sections import Config
from relay.receive.spec import TcpAddress, UnixAddress, parse_address
from relay.route.answers import Unanswered
from relay.route.dns import DnsResolver, ResolverError

__all__ = ["try_out"]

_PROBE_NAME = "relay-check.invalid"
"""RFC 6761 §6.4: a name that is nobody's. Any answer shows that somebody answers."""


def try_out(config: Config) -> Iterator[Remark]:
    """What would keep a relay with this configuration from starting, or from delivering."""
    is_running = _answers(config.admin.socket)
    if not is_running:
        yield from _try_ports(config)
    yield from _try_directories(config)
    yield from _try_resolver(config)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            return probe.connect_ex(path) == 0
        except OSError:
            return False


# --- ports ----------------------------------------------------------------------------------------


def _try_ports(config: Config) -> Iterator[Remark]:
    for i, listener in enumerate(config.listeners):
        address = parse_address(listener.address)
        key = f"listeners.{i}.address"
        if isinstance(address, TcpAddress):
            yield from _try_port(key, address)
        else:
            yield from _try_directory(key, Path(address.path).parent)
            if _answers(address.path):
                yield Remark(
                    key, f"somebody answers at {address.path} already", "choose another path"
                )
    if config.admin.http and config.admin.serves_http:
        http = parse_address(config.admin.http)
        if isinstance(http, UnixAddress):
            yield from _try_directory("admin.http", Path(http.path).parent)
        else:
            yield from _try_port("admin.http", http)


_CURES = {
    errno.EADDRINUSE: "stop what listens there (`ss -ltnp` names it), or choose another port",
    errno.EACCES: "choose a port from 1024, or start by the service, which may use it (CAP_NET_BIND_SERVICE)",
    errno.EADDRNOTAVAIL: "write an address this machine has (`ip address` lists them), or 0.0.0.0",
}


def _try_port(key: str, address: TcpAddress) -> Iterator[Remark]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
            probe.listen(1)
        except OSError as error:
            words = (os.strerror(error.errno) if error.errno else str(error)).lower()
            yield Remark(
                key, f"{address}: {words}", _CURES.get(error.errno or 0, "choose another address")
            )


# --- directories ----------------------------------------------------------------------------------


def _try_directories(config: Config) -> Iterator[Remark]:
    yield from _try_directory("queue.path", Path(config.queue.path))
    yield from _try_directory("log.delivery", Path(config.log.delivery).parent)
    if Path(config.log.delivery).is_dir():
        yield Remark("log.delivery", f"{config.log.delivery} is a directory", "name a file")
    yield from _try_directory("admin.socket", Path(config.admin.socket).parent)


def _try_directory(key: str, path: Path) -> Iterator[Remark]:
    """A directory that is there takes a file; one that is not can be made."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".relay-check-"):
            pass
    except OSError as error:
        words = (error.strerror or str(error)).lower()
        cure = f"let the relay's user write in {there}, or name another place"
        yield Remark(key, f"{there}: {words}", cure)


# --- name servers ---------------------------------------------------------------------------------


def _try_resolver(config: Config) -> Iterator[Remark]:
    """One question; mail that is accepted while nobody answers waits in the queue, so it is a
    warning.
    """
    try:
        trouble = asyncio.run(_ask(config))
    except ResolverError as error:
        yield Remark("resolver.nameservers", str(error), "name one that can be reached")
        return
    if trouble:
        servers = ", ".join(config.resolver.nameservers) or "those of /etc/resolv.conf"
        cure = "name one that answers; until then mail waits in the queue"
        yield Remark("resolver.nameservers", f"{servers}: {trouble}", cure, is_fatal=False)


async def _ask(config: Config) -> str:
    resolver = DnsResolver(resolver_options(config))
    try:
        found = await resolver.mx(_PROBE_NAME)
    finally:
        with contextlib.suppress(Exception):
            await resolver.close()
    return found.reason if isinstance(found, Unanswered) else ""
