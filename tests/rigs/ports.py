"""Ports and directories of a test's own."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tests.fakes.waiting import patient

T = TypeVar("T")


_SLOT = 1000
_SLOTS = 20


@functools.cache
def _own_ports() -> Iterator[int]:
    """The ports of this process, one after the other.

    They are below those that the kernel gives to clients and to port 0: nobody takes one between
    the moment it is found free and the moment its server listens, which may be seconds.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    begin = max(ephemeral - _SLOTS * _SLOT, 1024) + _own_slot() * _SLOT
    return itertools.cycle(range(begin, min(begin + _SLOT, ephemeral)))


def _own_slot() -> int:
    """Processes of one run of tests have different slots; those of two runs mostly."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return os.getpid() % _SLOTS
    return (os.getppid() * 4 + int(worker.removeprefix("gw"))) % _SLOTS


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at `address`, and nobody but this process will soon."""
    for port in itertools.islice(_own_ports(), _SLOT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            return port
    raise OSError(f"none of {_SLOT} ports of {address} is free")


@contextlib.contextmanager
def open_directory(prefix: str, parent: str = "/tmp") -> Iterator[Path]:
    """A new directory that servers running under their own user may enter; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait_until(question: Callable[[], T], *, seconds: float = 60, what: str = "it") -> T:
    """The first true answer; an AssertionError that names `what` when none comes in time."""
    deadline = time.monotonic() + patient(seconds)
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def accepts_connections(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex((address, port)) != 0:
            return False
        # Where nobody listens, a socket that happens to get this very port connects to itself.
        return bool(probe.getsockname() != probe.getpeername())
