"""What only a start would find: taken ports, directories that cannot be written, silent name
servers. †

`relay check` tries what `relay serve` would do, and leaves nothing behind. Where a relay runs with
this configuration already (it answers at admin.socket), what that one holds is not wrong.

All is tried with the rights of the user in force, who may be the service's (`acting_as`). Ports
alone are tried with the rights of who called: the service gets those below 1024 from its unit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pwd
import socket
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from relay.config.consider import consider
from relay.config.parts import resolver_options
from relay.config.remark import Remark
from relay.config.sections import Config
from relay.queue.engine import holder
from relay.receive.spec import ListenerTls, TcpAddress, UnixAddress, parse_address
from relay.report.deliverylog.file import OUTPUTS
from relay.route.answers import Unanswered
from relay.route.dns import DnsResolver
from relay.route.name_servers import ResolverError

_PROBE_NAME = "relay-check.invalid"
"""RFC 6761 §6.4: a name that is nobody's. Any answer shows that somebody answers."""


def try_start(config: Config) -> Iterator[Remark]:
    """What would keep a relay with this configuration from starting, or from delivering.

    On top of what `consider` finds, and only where that is nothing fatal.
    """
    considered = list(consider(config))
    yield from considered
    if any(remark.is_fatal for remark in considered):
        return
    is_running = _answers(config.admin.socket)
    if not is_running:
        yield from _try_ports(config)
    yield from _try_directories(config)
    if not config.queue.location.is_shared:
        yield from _try_queue(Path(config.queue.path), is_running=is_running)
    yield from _try_certificates(config)
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
    errno.EACCES: (
        "choose a port from 1024, or start by the service, which may use it (CAP_NET_BIND_SERVICE)"
    ),
    errno.EADDRNOTAVAIL: "write an address this machine has (`ip address` lists them), or 0.0.0.0",
}


def _try_port(key: str, address: TcpAddress) -> Iterator[Remark]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            with _as_caller():
                probe.bind((address.host, address.port))
            probe.listen(1)
        except OSError as error:
            words = (os.strerror(error.errno) if error.errno else str(error)).lower()
            yield Remark(
                key, f"{address}: {words}", _CURES.get(error.errno or 0, "choose another address")
            )


# --- directories ----------------------------------------------------------------------------------


def _try_directories(config: Config) -> Iterator[Remark]:
    if not config.queue.location.is_shared:
        yield from _try_directory("queue.path", Path(config.queue.path))
    yield from _try_log(Path(config.log.delivery))
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


def _try_log(path: Path) -> Iterator[Remark]:
    if str(path) in OUTPUTS:
        return  # the relay inherits its own, which are not those of this command
    with contextlib.suppress(PermissionError):  # which is said of its directory
        if path.is_dir():
            yield Remark("log.delivery", f"{path} is a directory", "name a file")
            return
        if path.exists() and not _may_write(path):
            yield _not_ours("log.delivery", path, path)
            return
        if path.exists() and not path.is_file():
            return  # a device: nothing is made in its directory
    yield from _try_directory("log.delivery", path.parent)


def _try_queue(directory: Path, *, is_running: bool) -> Iterator[Remark]:
    """Whether the queue that is there can be opened, and by nobody but us."""
    try:
        foreign = [one for one in sorted(directory.iterdir()) if not _may_write(one)]
    except OSError:
        return  # there is none yet, or its directory has been spoken of
    if foreign:
        yield _not_ours("queue.path", foreign[0], directory)
        return
    user = "" if is_running else holder(directory)
    if user:
        cure = "stop that one, or name another directory"
        yield Remark("queue.path", f"{directory}: {user} uses this queue already", cure)


def _may_write(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK, effective_ids=True)


def _not_ours(key: str, path: Path, whole: Path) -> Remark:
    user = _user_name()
    cure = f"give it to the relay's user: `chown --recursive {user}: {whole}`"
    return Remark(key, f"{path}: {user} may not write it", cure)


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# --- users ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def acting_as(user: pwd.struct_passwd) -> Iterator[None]:
    """Root, with the rights of another user and of that one's groups meanwhile."""
    groups, group = os.getgroups(), os.getegid()
    os.setgroups(os.getgrouplist(user.pw_name, user.pw_gid))
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(os.getuid())
        os.setegid(group)
        os.setgroups(groups)


@contextlib.contextmanager
def _as_caller() -> Iterator[None]:
    user = os.geteuid()
    os.seteuid(os.getuid())
    try:
        yield
    finally:
        os.seteuid(user)


# --- certificates ---------------------------------------------------------------------------------


def _try_certificates(config: Config) -> Iterator[Remark]:
    """What `consider` found readable and fit for its key, and clients would refuse all the same."""
    shown = {
        f"listeners.{i}.certificate": one.certificate
        for i, one in enumerate(config.listeners)
        if one.tls is not ListenerTls.NONE
    }
    for key, path in {**shown, "admin.certificate": config.admin.certificate}.items():
        trouble = _untimely(Path(path)) if path is not None else ""
        if trouble:
            yield Remark(key, f"{path}: {trouble}", "renew it: clients that verify refuse it")


def _untimely(path: Path) -> str:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if certificate.not_valid_before_utc > now:
        return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    return ""


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
