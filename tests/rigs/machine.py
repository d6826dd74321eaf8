"""A bare Debian in a directory: what an administrator has before and after `apt install`.

`Machine` is made by debootstrap from the mirror that this machine uses. bubblewrap runs commands in
it, with its files and its users and the network of the machine around it. No service manager runs
there: `systemctl` records its calls, does those that only change files, and shows the unit's
settings. `Service` starts the unit's program under the restrictions of the installed unit file.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyseccomp

from tests.fakes.waiting import patient
from tests.rigs import service
from tests.rigs.ports import wait_until

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SYSTEMCTL = """#!/bin/sh
echo "$*" >>/systemctl.log
case "$*" in show*)
    echo LoadState=loaded
    exec grep -E '^(Protect|ReadWritePaths|.*Directory=)' /usr/lib/systemd/system/relay.service ;;
esac
case "$*" in *start*|*stop*|*is-active*|*daemon-reload*) exit 0 ;; esac
SYSTEMD_OFFLINE=1 exec /bin/systemctl "$@"
"""

_ENTER = """
import ctypes, json, os, sys
os.umask(0o077)
libc = ctypes.CDLL(None, use_errno=True)
code = open("/enter.bpf", "rb").read()
octets = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
program = Program(len(code) // 8, ctypes.cast(octets, ctypes.c_void_p))
libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE: MemoryDenyWriteExecute=
if libc.prctl(22, 2, ctypes.byref(program), 0, 0) != 0:  # PR_SET_SECCOMP: SystemCallFilter=
    sys.exit("no seccomp")
os.execv(sys.argv[1], sys.argv[1:])
"""


class Machine:
    """A Debian of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def command(self, *command: str) -> list[str]:
        """A command of root's, as its line outside."""
        sandbox = ["bwrap", "--bind", str(self.root), "/", "--proc", "/proc", "--dev", "/dev"]
        plain = {
            "PATH": PATH,
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
            "HOME": "/root",
        }
        settings = [word for name, value in plain.items() for word in ("--setenv", name, value)]
        return [*sandbox, "--cap-add", "ALL", "--clearenv", *settings, "--", *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=600, check=False
        )

    def __call__(self, *command: str) -> str:
        """Run a command that has to end well; what it wrote."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def path(self, inside: str) -> Path:
        return self.root / inside.lstrip("/")

    def read(self, inside: str) -> str:
        return self.path(inside).read_text()

    def asked_of_systemd(self) -> list[str]:
        """What systemctl was asked since the last time."""
        log = self.path("/systemctl.log")
        asked = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [one.replace("--quiet ", "").replace("--system ", "") for one in asked]


@contextmanager
def debian(suite: str) -> Iterator[Machine]:
    """A bare machine; `RELAY_DEBIAN_ROOTS` names a directory that keeps them between runs."""
    with tempfile.TemporaryDirectory(prefix=f"relay-{suite}-", dir="/var/tmp") as directory:
        kept = os.environ.get("RELAY_DEBIAN_ROOTS")
        origin = Path(kept or directory) / (suite if kept else "bare")
        if not origin.exists():
            _debootstrap(suite, origin)
        root = Path(directory) / "root"
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", str(origin), str(root)], check=True)
        root.chmod(0o755)
        systemctl = root / "usr/local/sbin/systemctl"
        systemctl.write_text(_SYSTEMCTL)
        systemctl.chmod(0o755)
        # apt has a PATH of its own, in which ours is not.
        (root / "etc/apt/apt.conf.d/90path").write_text(f'DPkg::Path "{PATH}";\n')
        (root / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        machine = Machine(root)
        machine("apt-get", "update", "-qq")
        yield machine


def _debootstrap(suite: str, into: Path) -> None:
    mirror = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    # Under its name only once it is whole.
    growing = into.with_name(f"{into.name}.{os.getpid()}")
    command = ["debootstrap", "--variant=minbase", suite, str(growing), mirror]
    subprocess.run(command, capture_output=True, check=True)
    growing.rename(into)


class Service:
    """The installed unit's program, under the unit's restrictions, without a service manager."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        unit = machine.path("/usr/lib/systemd/system/relay.service")
        self._settings = service.settings(unit)
        self._process: subprocess.Popen[bytes] | None = None
        self.stderr = machine.root.parent / "service.stderr"

    def start(self) -> None:
        """Start it, and wait until it says that it is ready."""
        self.stderr.write_bytes(b"")
        with self.stderr.open("ab") as stderr:
            self._process = subprocess.Popen(self._command(), stderr=stderr)
        wait_until(
            lambda: " ready: " in self.stderr.read_text() or not self.is_running,
            seconds=60,
            what="the relay's start",
        )
        assert self.is_running, self.stderr.read_text()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """What systemd does at `systemctl stop`; it has to end well."""
        assert self._process is not None
        for pid in _below(self._process.pid):
            os.kill(pid, signal.SIGTERM)
        assert self._process.wait(timeout=patient(90)) == 0, self.stderr.read_text()

    def reload(self) -> None:
        """The unit's ExecReload=, line after line; all of them have to end well."""
        assert self._process is not None
        check, _hang_up = self._settings["ExecReload"]
        self._machine(*check.split())
        for pid in _below(self._process.pid):
            os.kill(pid, signal.SIGHUP)

    def kill(self) -> None:
        if self.is_running:
            assert self._process is not None
            self._process.kill()
            self._process.wait()

    def _command(self) -> list[str]:
        root, one = self._machine.root, {key: value[0] for key, value in self._settings.items()}
        writable = []
        for kind, above in (("State", "var/lib"), ("Logs", "var/log"), ("Runtime", "run")):
            place = root / above / one[f"{kind}Directory"]
            place.mkdir(exist_ok=True)
            self._machine("chown", f"{one['User']}:{one['Group']}", f"/{place.relative_to(root)}")
            place.chmod(int(one[f"{kind}DirectoryMode"], 8))
            writable += ["--bind", str(place), f"/{place.relative_to(root)}"]
        for more in one.get("ReadWritePaths", "").split():
            writable += ["--bind", f"{root}{more}", more]
        (root / "enter.py").write_text(_ENTER)
        (root / "enter.bpf").write_bytes(_filter(service.allowed_system_calls()))
        capability = one["AmbientCapabilities"].removeprefix("CAP_").lower()
        only = f"-all,+{capability}"
        return [
            *("prlimit", "--nofile=4096:4096", "bwrap", "--ro-bind", str(root), "/"),
            *(*writable, "--proc", "/proc", "--dev", "/dev"),
            *("--tmpfs", "/tmp", "--tmpfs", "/home", "--unshare-ipc", "--unshare-uts"),
            *("--die-with-parent", "--clearenv", "--cap-add", "ALL"),
            *("--chdir", one["WorkingDirectory"], "--"),
            *("setpriv", f"--reuid={one['User']}", f"--regid={one['Group']}", "--init-groups"),
            *("--no-new-privs", f"--bounding-set={only}", f"--inh-caps={only}"),
            *(f"--ambient-caps={only}", "python3", "/enter.py", *one["ExecStart"].split()),
        ]


def _filter(allowed: list[str]) -> bytes:
    """SystemCallFilter= as the kernel reads it."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for name in allowed:
        try:
            rules.add_rule(pyseccomp.ALLOW, name)
        except (OSError, RuntimeError, ValueError):
            continue  # another architecture's
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _below(pid: int) -> list[int]:
    """The last processes of those that began with `pid`."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in below for found in _below(int(child))] or [pid]
