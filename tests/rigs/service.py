"""The relay under the restrictions of its systemd unit, without a systemd.

Reads systemd/relay.service and has bubblewrap, setpriv and libseccomp do what each line asks for:
the user, the one capability, the file system it may see and write, the system calls it may make.
`NOT_EXERCISED` names the lines that need the service manager or the kernel's cgroups, and why.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "relay.service"
UID = 62525
"""Nobody's, as the service's own user is nobody else's."""

_PARENTS = (
    "/etc",
    "/etc/relay",
    "/opt",
    "/opt/relay",
    "/opt/relay/src",
    "/run",
    "/var",
    "/var/lib",
    "/var/log",
)

CONFIG = "/etc/relay/relay.yaml"

NOT_EXERCISED = {
    "ProtectClock": "needs a device cgroup; the system calls it takes away are taken away",
    "ProtectControlGroups": "there is no /sys in the sandbox at all",
    "ProtectHostname": "a UTS namespace hides the host's name; sethostname is not among the system"
    " calls",
    "ProtectKernelLogs": "needs CAP_SYSLOG, which is not there",
    "ProtectKernelModules": "needs CAP_SYS_MODULE, which is not there",
    "ProtectKernelTunables": "/proc/sys is read-only to the service's user anyhow",
    "ProtectProc": "a PID namespace shows less still",
    "ProcSubset": "/proc is whole in the sandbox",
    "RemoveIPC": "an IPC namespace of its own is gone with the service",
    "KeyringMode": "the system calls of keyrings are not allowed",
    "DevicePolicy": "needs a device cgroup; /dev has the five devices everybody has",
    "PrivateUsers": "no, in the unit",
    "LockPersonality": "personality(2) is allowed by its name here, for one value only there",
    "RestrictAddressFamilies": "filters an argument of socket(2)",
    "RestrictNamespaces": "filters arguments of clone(2); unshare and setns are not allowed",
    "RestrictRealtime": "sched_setscheduler is not allowed",
    "RestrictSUIDSGID": "filters an argument of chmod(2)",
    "SystemCallArchitectures": "x86-64 is the only one libseccomp is told of",
    "WatchdogSec": "the test of sd_notify has it",
    "Restart": "the service manager's",
    "RestartSec": "the service manager's",
    "TimeoutStopSec": "the service manager's",
    "ExecReload": "a test runs its commands",
    "ConfigurationDirectoryMode": "the package's; the test of a booted Debian has it",
    "NotifyAccess": "the test of sd_notify has it",
    "Type": "the test of sd_notify has it",
    "RuntimeDirectoryPreserve": "the service manager's",
    "PrivateMounts": "a mount namespace it has",
    "SystemCallErrorNumber": "read with SystemCallFilter",
}

EXERCISED = {
    "ExecStart",
    "User",
    "Group",
    "WorkingDirectory",
    "StateDirectory",
    "StateDirectoryMode",
    "LogsDirectory",
    "LogsDirectoryMode",
    "RuntimeDirectory",
    "RuntimeDirectoryMode",
    "ConfigurationDirectory",
    "UMask",
    "LimitNOFILE",
    "AmbientCapabilities",
    "CapabilityBoundingSet",
    "NoNewPrivileges",
    "ProtectSystem",
    "ProtectHome",
    "PrivateTmp",
    "PrivateDevices",
    "MemoryDenyWriteExecute",
    "SystemCallFilter",
}


def settings(unit: Path = UNIT) -> dict[str, list[str]]:
    """The [Service] section: each key with its values."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def allowed_system_calls() -> list[str]:
    """What SystemCallFilter= leaves, its sets taken apart as this machine's systemd knows them."""
    allowed: set[str] = set()
    for line in settings()["SystemCallFilter"]:
        names = _flattened(line.removeprefix("~").split())
        allowed = allowed - names if line.startswith("~") else allowed | names
    return sorted(allowed | _flattened(["@default"]))


def _flattened(names: list[str]) -> set[str]:
    calls: set[str] = set()
    for name in names:
        if name.startswith("@"):
            listed = subprocess.run(
                ["systemd-analyze", "--no-pager", "syscall-filter", name],
                capture_output=True,
                text=True,
                check=True,
            )
            inner = [word.strip() for word in listed.stdout.splitlines()[1:]]
            calls |= _flattened([word for word in inner if word and not word.startswith("#")])
        else:
            calls.add(name)
    return calls


def restricted(directory: Path) -> list[str]:
    """What to put before the relay's command; its state lies in `directory`, as the unit's
    directories.
    """
    for name in ("spool", "log", "run"):
        (directory / name).mkdir(exist_ok=True)
    for path in (directory, *(directory / name for name in ("spool", "log", "run"))):
        os.chown(path, UID, UID)
    enter = directory / "enter.json"
    enter.write_text(json.dumps(allowed_system_calls()))
    enter.chmod(0o644)
    return [*_sandbox(directory, enter), *_user(), *_python(), "/opt/relay/enter.py"]


def _sandbox(directory: Path, enter: Path) -> Iterator[str]:
    [files] = settings()["LimitNOFILE"]
    most = min(int(files), resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from ("prlimit", f"--nofile={most}:{most}", "bwrap")
    for made in _PARENTS:
        yield from ("--perms", "0755", "--dir", made)
    for system in (
        "/usr",
        "/bin",
        "/sbin",
        "/lib",
        "/lib64",
        "/etc/ssl",
        "/etc/ld.so.cache",
        "/etc/hosts",
    ):
        if Path(system).is_symlink():
            yield from ("--symlink", str(Path(system).readlink()), system)
        elif Path(system).exists():
            yield from ("--ro-bind", system, system)
    # Of homes there are none but what leads to a Python that is not the system's.
    yield from (
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
        "--dir",
        "/home",
    )
    if not sys.base_prefix.startswith("/usr"):
        for parent in reversed(Path(sys.base_prefix).parents[:-1]):
            yield from ("--perms", "0755", "--dir", str(parent))
        yield from ("--ro-bind", sys.base_prefix, sys.base_prefix)
    yield from ("--ro-bind", sysconfig.get_path("purelib"), "/opt/relay/site")
    yield from ("--ro-bind", str(ROOT / "relay"), "/opt/relay/src/relay")
    yield from ("--ro-bind", str(ROOT / "tests/rigs/enter_service.py"), "/opt/relay/enter.py")
    yield from ("--ro-bind", str(enter), "/opt/relay/enter.json")
    yield from ("--bind", str(directory / "spool"), "/var/lib/relay")
    yield from ("--bind", str(directory / "log"), "/var/log/relay")
    yield from ("--bind", str(directory / "run"), "/run/relay")
    yield from ("--ro-bind", str(directory / "relay.yaml"), CONFIG)
    if (directory / "ca.pem").exists():
        yield from ("--ro-bind", str(directory / "ca.pem"), "/etc/relay/ca.pem")
    yield from ("--remount-ro", "/", "--chdir", settings()["WorkingDirectory"][0])
    yield from (
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-pid",
        "--die-with-parent",
        "--clearenv",
    )
    yield from ("--setenv", "PYTHONPATH", "/opt/relay/src:/opt/relay/site")
    yield from ("--setenv", "PYTHONDONTWRITEBYTECODE", "1", "--")


def _user() -> list[str]:
    [capability] = settings()["CapabilityBoundingSet"]
    word = capability.removeprefix("CAP_").lower()
    only = f"-all,+{word}"
    identity = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
    capabilities = [f"--bounding-set={only}", f"--inh-caps={only}", f"--ambient-caps={only}"]
    return ["setpriv", *identity, *capabilities]


def _python() -> list[str]:
    return [f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"]
