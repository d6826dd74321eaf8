"""What systemd wants to hear from a service of Type=notify, and the sockets it hands over.

sd_notify(3); sd_listen_fds(3).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from sdnotify import SystemdNotifier

__all__ = ["Systemd", "passed_sockets"]

_FIRST_PASSED = 3
"""Descriptors handed over begin here."""


class Systemd:
    """The service manager's ear; silent where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._notifier = SystemdNotifier() if environ.get("NOTIFY_SOCKET") else None
        self.watchdog_seconds = _watchdog_seconds(environ)

    def ready(self, status: str) -> None:
        """All doors are open; after a reload, too."""
        self._tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1\nSTATUS=draining")

    def alive(self) -> None:
        """Said at least twice a `watchdog_seconds`, or we are taken for dead."""
        self._tell("WATCHDOG=1")

    def _tell(self, words: str) -> None:
        if self._notifier is not None:
            self._notifier.notify(words)


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """The watchdog's patience with this process, None without one (sd_watchdog_enabled(3))."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that the service manager opened for this process."""
    count, pid = environ.get("LISTEN_FDS", ""), environ.get("LISTEN_PID", "")
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    found = []
    for number in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
        os.set_inheritable(number, False)
        passed = socket.socket(fileno=number)
        passed.setblocking(False)
        found.append(passed)
    return found
