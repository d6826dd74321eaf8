"""A Debian that runs: systemd as its first process, in a container of systemd-nspawn.

It has the network of the machine around it, so that a next hop of a test's can be reached.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.rigs.machine import Machine, debian
from tests.rigs.ports import wait_until

__all__ = ["booted_debian"]


class BootedMachine(Machine):
    """Commands run beside its services, as those of a login do."""

    def __init__(self, root: Path, first_process: int) -> None:
        super().__init__(root)
        self._first_process = first_process

    def command(self, *command: str) -> list[str]:
        plain = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root")
        namespaces = ("--mount", "--uts", "--ipc", "--pid")
        return ["nsenter", f"--target={self._first_process}", *namespaces, *plain, *command]


@contextmanager
def booted_debian(suite: str) -> Iterator[BootedMachine]:
    """A machine that has booted; it ends with the test."""
    with debian(suite) as bare:
        bare.path("/usr/local/sbin/systemctl").unlink()
        systemd = ("systemd", "systemd-sysv", "dbus", "python3")
        bare("apt-get", "install", "--yes", "--no-install-recommends", *systemd)
        command = ["systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"]
        command += ["--resolv-conf=off", f"--directory={bare.root}"]
        with (
            (bare.root.parent / "console").open("wb") as console,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console) as nspawn,
        ):
            try:
                machine = BootedMachine(bare.root, _first_process(nspawn.pid))
                running = ("systemctl", "is-system-running")
                wait_until(
                    lambda: machine.run(*running).stdout.strip() in ("running", "degraded"),
                    seconds=60,
                    what="the boot",
                )
                yield machine
                machine.run("systemctl", "poweroff")
                nspawn.wait(timeout=120)
            finally:
                nspawn.kill()


def _first_process(nspawn: int) -> int:
    children = Path(f"/proc/{nspawn}/task/{nspawn}/children")
    wait_until(lambda: bool(children.read_text().split()), what="the first process")
    return int(children.read_text().split()[0])
