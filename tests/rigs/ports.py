"""Ports and directories of a test's own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at `address` right now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def open_directory(prefix: str, parent: str = "/tmp") -> Iterator[Path]:
    """A new directory that servers running under their own user may enter; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def wait_until(question: Callable[[], T], *, seconds: float = 30, what: str = "it") -> T:
    """The first true answer; an AssertionError that names `what` when none comes in time."""
    deadline = time.monotonic() + seconds
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
