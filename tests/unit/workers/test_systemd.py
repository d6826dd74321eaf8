"""What the service manager is told, at an address of either kind."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import pytest

from relay.workers.systemd import Systemd


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_the_manager_hears_at_a_file_and_at_an_abstract_name(tmp_path: Path, kind: str) -> None:
    bound = str(tmp_path / "notify") if kind == "file" else f"\0{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(bound)
        Systemd({"NOTIFY_SOCKET": bound.replace("\0", "@")}).ready("up")
        assert manager.recv(1000) == b"READY=1\nSTATUS=up"


def test_manager_that_does_not_listen_is_no_error(tmp_path: Path) -> None:
    absent = str(tmp_path / "nobody")
    Systemd({"NOTIFY_SOCKET": absent}).stopping()  # raises nothing
    Systemd({}).stopping()
    assert not Path(absent).exists()


def test_manager_that_does_not_read_does_not_block_the_relay(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        systemd = Systemd({"NOTIFY_SOCKET": path})
        for _ in range(10_000):
            systemd.alive()
        manager.setblocking(False)
        waiting = 0
        with suppress(BlockingIOError):
            while manager.recv(1000) == b"WATCHDOG=1":
                waiting += 1
        assert 0 < waiting < 10_000, "what the full socket did not take was given up"
