"""Messages to systemd from a service of Type=notify, and the sockets that systemd hands over.

sd_notify(3); sd_listen_fds(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

_FIRST_PASSED = 3
"""Descriptors handed over begin here."""


class Systemd:
    """Notifies the service manager; does nothing where there is none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog_seconds = _watchdog_seconds(environ)

    def ready(self, status: str) -> None:
        """All listeners are open; sent after a reload, too."""
        self._tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._tell("STOPPING=1\nSTATUS=draining")

    def alive(self) -> None:
        """To be sent at least twice in `watchdog_seconds`; otherwise systemd restarts the relay."""
        self._tell("WATCHDOG=1")

    def _tell(self, words: str) -> None:
        if not self._address:
            return
        # "@": a name in the abstract namespace, which begins with a NUL for the kernel (unix(7)).
        address = self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address
        # A manager that does not listen must not end a relay that works.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(words.encode(), address)


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
