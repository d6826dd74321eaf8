"""Other servers beside the relay and Postfix: `make bench ARGS=peers`.

Exim and OpenSMTPD are Debian's packages, Haraka is npm's. The packages conflict with an installed
Postfix, so they are not installed: they are unpacked into a directory, and a server sees their
files, a configuration, a user and a spool of its own in a mount namespace. A process namespace ends
all of its processes with it, and keeps those whose parent has gone below the server, so that their
CPU is counted.

Each server keeps its own settings, except those that stop a test: limits of messages for each
session. Whether it syncs a message before it says 250 is looked at with strace, in a run of its
own, in which nothing is timed. (perf loses sight of Exim's processes: they start a program that is
set-user-ID. And Exim does not wait for those that deliver, so that the CPU of those that ended is
not known: its number is a lower bound.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hops import NextHop, next_hop
from benchmarks.meter import tree
from benchmarks.report import faster_postfix, median, rounded, table, timed
from benchmarks.run import Result
from benchmarks.scenarios import SCENARIOS, Scenario
from benchmarks.sides import AS_INSTALLED, Side, postfix_side, relay_side
from tests.rigs.ports import accepts_connections, free_port, wait_until

__all__ = [
    "Durability",
    "Program",
    "installed",
    "is_measured",
    "read_trace",
    "start_peers",
    "tables",
    "trace_all",
]

_SCENARIOS = ("standing", "single", "series", "100k")
_UID = 64980
"""The first of three user ids that Debian gives to nobody."""
_TRACED_MESSAGES = 20
_PAUSE = 0.3


@dataclass(frozen=True)
class Program:
    """A server that is there: its files are below `files`."""

    name: str
    version: str
    files: Path


# --- their files ----------------------------------------------------------------------------------


def installed(directory: Path) -> list[Program]:
    """The servers that can be had here; the reason is printed for each that cannot."""
    found = []
    for name, install in _INSTALL.items():
        files = directory / name
        files.mkdir()
        try:
            version = install(files)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            print(f"{name} is left out: {said.strip()}", flush=True)
            continue
        found.append(Program(name, version, files))
    return found


def _debian(package: str, *others: str) -> Callable[[Path], str]:
    """Unpacks a package, those it has its programs in, and the libraries that are missing here."""

    def install(files: Path) -> str:
        wanted = [package, *others]
        for name in wanted:
            archive = _download(name, files)
            _run("dpkg-deb", "-x", str(archive), str(files))
            depends = _run("dpkg-deb", "-f", str(archive), "Depends")
            wanted += [one for one in _missing_libraries(depends) if one not in wanted]
        for name in ("lib", "bin", "sbin"):  # as in every Debian since 12, links into /usr
            if (files / name).is_dir():
                shutil.copytree(files / name, files / "usr" / name, dirs_exist_ok=True)
        [archive] = files.glob(f"{package}_*.deb")
        return _run("dpkg-deb", "-f", str(archive), "Version").strip()

    return install


def _download(package: str, directory: Path) -> Path:
    _run("apt-get", "download", "-qq", package, cwd=directory)
    [archive] = directory.glob(f"{package}_*.deb")
    return archive


def _missing_libraries(depends: str) -> list[str]:
    names = re.findall(r"(?:^|, )(lib[a-z0-9.+-]+)", depends)
    return [name for name in names if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout == "installed"


def _npm(files: Path) -> str:
    _run("npm", "install", "--omit=optional", "--no-audit", "--no-fund", "Haraka@3", cwd=files)
    text = (files / "node_modules/Haraka/package.json").read_text()
    return str(json.loads(text)["version"])


_INSTALL: dict[str, Callable[[Path], str]] = {
    "Exim": _debian("exim4-daemon-light", "exim4-base"),
    "OpenSMTPD": _debian("opensmtpd"),
    "Haraka": _npm,
}


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout


# --- the servers ----------------------------------------------------------------------------------


def is_measured(scenario: Scenario) -> bool:
    """Whether the other servers take part in a scenario."""
    return scenario.name in _SCENARIOS


@contextlib.contextmanager
def start_peers(
    directory: Path, scenario: Scenario, hop: NextHop, *, programs: Sequence[Program]
) -> Iterator[Sequence[Side]]:
    """Start the relay, Postfix in its two forms, and the others."""
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(relay_side(directory / "relay", scenario, hop)),
            stack.enter_context(postfix_side(directory, scenario, hop)),
            stack.enter_context(postfix_side(directory, scenario, hop, name=AS_INSTALLED)),
        ]
        for program in programs:
            try:
                side = _SIDES[program.name](directory, program, hop)
                sides.append(stack.enter_context(side))
            except (AssertionError, subprocess.CalledProcessError) as error:
                print(f"{program.name} is left out of {scenario.name}: {error}", flush=True)
        yield sides


@contextlib.contextmanager
def _exim(directory: Path, program: Program, hop: NextHop) -> Iterator[Side]:
    port = free_port()
    etc, spool = directory / "exim-etc", directory / "exim-spool"
    (etc / "exim4").mkdir(parents=True)
    (spool / "exim4").mkdir(parents=True)
    _add_users(etc, ["Debian-exim"])
    shutil.chown(spool / "exim4", _UID, _UID)
    (etc / "exim4/exim4.conf").write_text(_EXIM.format(port=port, hop=hop))
    command = ["/usr/sbin/exim4", "-bdf", "-q30m"]
    over = {"/usr": program.files / "usr", "/etc": etc}
    with _apart(directory, program.name, command, port, over, {"/var/spool": spool}) as side:
        yield side


_EXIM = """\
primary_hostname = exim.bench.example
spool_directory = /var/spool/exim4
log_file_path = /var/spool/exim4/%slog
daemon_smtp_ports = {port}
local_interfaces = 127.0.0.1
pid_file_path = /var/spool/exim4/pid
acl_smtp_rcpt = accept
# Otherwise the eleventh message of a session waits for the next run of the queue.
smtp_accept_queue_per_connection = 0
smtp_accept_max = 200
begin routers
all:
  driver = manualroute
  route_list = * {hop.address}
  self = send
  transport = smtp
begin transports
smtp:
  driver = smtp
  port = {hop.port}
begin retry
* * F,2h,15m
"""


@contextlib.contextmanager
def _opensmtpd(directory: Path, program: Program, hop: NextHop) -> Iterator[Side]:
    port = free_port()
    etc, spool, lib = (directory / f"opensmtpd-{name}" for name in ("etc", "spool", "lib"))
    etc.mkdir()
    (spool / "smtpd").mkdir(parents=True)
    (spool / "smtpd").chmod(0o711)
    (lib / "opensmtpd/empty").mkdir(parents=True)
    _add_users(etc, ["opensmtpd", "opensmtpq"])
    (etc / "smtpd.conf").write_text(_OPENSMTPD.format(port=port, hop=hop))
    over = {"/usr": program.files / "usr", "/etc": etc, "/var/lib": lib}
    bound = {"/var/spool": spool, "/run": directory}
    with _apart(directory, program.name, ["/usr/sbin/smtpd", "-d"], port, over, bound) as side:
        yield side


_OPENSMTPD = """\
smtp limit max-mails 1000000
listen on 127.0.0.1 port {port} hostname smtpd.bench.example
action "relay" relay host smtp://{hop.address}:{hop.port}
match from any for any action "relay"
"""


@contextlib.contextmanager
def _haraka(directory: Path, program: Program, hop: NextHop) -> Iterator[Side]:
    port = free_port()
    home, code = directory / "haraka", program.files / "node_modules/Haraka"
    _run("node", str(code / "bin/haraka"), "-i", str(home))
    (home / "queue").mkdir(exist_ok=True)
    shutil.chown(home / "queue", "nobody", "nogroup")
    (home / "config/smtp.ini").write_text(f"listen=127.0.0.1:{port}\nuser=nobody\ngroup=nogroup\n")
    (home / "config/outbound.ini").write_text("local_mx_ok=true\n")
    (home / "config/log.ini").write_text("[main]\nlevel=notice\n")
    (home / "config/plugins").write_text("everything\n")
    (home / "plugins").mkdir(exist_ok=True)
    (home / "plugins/everything.js").write_text(_HARAKA.format(hop=hop))
    command = ["node", str(code / "haraka.js"), "-c", str(home)]
    with _apart(directory, program.name, command, port, {}, {}, HARAKA=str(home)) as side:
        yield side


_HARAKA = """\
exports.hook_connect = (next, connection) => {{ connection.relaying = true; next(); }};
exports.hook_rcpt = (next) => next(OK);
exports.hook_get_mx = (next) => next(OK, {{ exchange: '{hop.address}', port: {hop.port} }});
"""

_SIDES: dict[str, Callable[[Path, Program, NextHop], contextlib.AbstractContextManager[Side]]] = {
    "Exim": _exim,
    "OpenSMTPD": _opensmtpd,
    "Haraka": _haraka,
}


def _add_users(etc: Path, names: Sequence[str]) -> None:
    """The machine's users and groups, and these."""
    for file, line in (
        ("passwd", "{0}:x:{1}:{1}::/:/usr/sbin/nologin\n"),
        ("group", "{0}:x:{1}:\n"),
    ):
        added = (line.format(name, _UID + number) for number, name in enumerate(names))
        (etc / file).write_text(Path("/etc", file).read_text() + "".join(added))


@contextlib.contextmanager
def _apart(
    directory: Path,
    name: str,
    command: Sequence[str],
    port: int,
    over: dict[str, Path],
    bound: dict[str, Path],
    **environment: str,
) -> Iterator[Side]:
    """A server that sees each directory of `over` on top of the machine's own, and each of `bound`
    in place of it.
    """
    steps = ["set -e"]
    steps += [
        f"mount -t overlay o -o lowerdir={path}:{place} {place}" for place, path in over.items()
    ]
    steps += [f"mount --bind {path} {place}" for place, path in bound.items()]
    steps.append('exec "$@"')
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    output = directory / f"{name}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*unshare, "sh", "-c", "\n".join(steps), "sh", *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )

    def is_ready() -> bool:
        said = output.read_text(errors="replace")[-500:]
        assert process.poll() is None, f"{name} ended at its start: {said}"
        return accepts_connections("127.0.0.1", port)

    try:
        wait_until(is_ready, what=f"the start of {name}")
        yield Side(name, port, process.pid)
    finally:
        # With the first process of a process namespace all others of it end.
        for pid in tree(process.pid)[1:2]:
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)


# --- whether they sync ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Durability:
    """Syncs a message: between the client's last line and the 250 that accepts it, and in all."""

    before_reply: float
    in_all: float


def trace_all(parent: Path, programs: Sequence[Program]) -> dict[str, Durability]:
    """Look at each server with strace while it takes a few messages, one after the other."""
    [scenario] = (one for one in SCENARIOS if one.name == "series")
    found = {}
    with (
        next_hop(parent, scenario) as hop,
        start_peers(parent, scenario, hop, programs=programs) as sides,
    ):
        for side in sides:
            hop.send(scenario, [side.port], _TRACED_MESSAGES)  # its processes are there then
            time.sleep(_PAUSE)
            try:
                found[side.name] = _trace(parent / "trace", scenario, side, hop)
            except (AssertionError, OSError) as error:
                print(f"{side.name} is not traced: {error}", flush=True)
    return found


def _trace(output: Path, scenario: Scenario, side: Side, hop: NextHop) -> Durability:
    pids = tree(side.root)
    command = ["strace", "-f", "-qq", "-s", "8", "-o", str(output), "-e", f"trace={_CALLS}"]
    strace = subprocess.Popen([*command, "-p", ",".join(map(str, pids))], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: strace.poll() is None and _is_traced(pids[-1]), what="strace")
        time.sleep(_PAUSE)
        for _ in range(_TRACED_MESSAGES):
            hop.send(scenario, [side.port], 1)
            time.sleep(_PAUSE)  # what belongs to this message does not count for the next one
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(timeout=30)
    return read_trace(output.read_text(errors="replace").splitlines())


def _is_traced(pid: int) -> bool:
    try:
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


_CALLS = "fsync,fdatasync,syncfs,write,writev,sendto,sendmsg"
_SYNCED = re.compile(
    r"^\d+ +(?:(?:fsync|fdatasync|syncfs)\(.*\)|<\.\.\. \w*sync\w* resumed>.*) += 0"
)
_SAID = re.compile(r'^\d+ +(?:write|writev|sendto|sendmsg)\([^"]*"(250|354)[ -]')


def read_trace(lines: Iterable[str]) -> Durability:
    """What a trace of strace says: 354 asks for a message, and the next 250 accepts it."""
    messages = before_reply = in_all = since_asked = 0
    is_asked = False
    for line in lines:
        if _SYNCED.match(line):
            in_all += 1
            since_asked += 1
        elif said := _SAID.match(line):
            if said[1] == "354":
                is_asked, since_asked = True, 0
            elif is_asked:
                is_asked = False
                messages += 1
                before_reply += since_asked
    assert messages, "no message was seen"
    return Durability(before_reply / messages, in_all / messages)


# --- the tables -----------------------------------------------------------------------------------


def tables(
    results: Sequence[Result], durabilities: Mapping[str, Durability], programs: Sequence[Program]
) -> str:
    """The rates and their ratios to Postfix's; then what each promises, and what it costs."""
    sides = list(dict.fromkeys(result.side for result in results))
    scenarios = [one for one in SCENARIOS if any(one.name == each.scenario for each in results)]
    head = [""]
    for scenario in scenarios:
        head += [f"{scenario.title}: copies/s", "ratio"]
    rates = table(head, [[side, *_rates(results, scenarios, side)] for side in sides])
    head = ["", "syncs of a single message before its 250", "in all", "CPU s/1000", "MiB"]
    costs = table(head, [[side, *_costs(results, durabilities, side)] for side in sides])
    versions = ", ".join(f"{one.name} {one.version}" for one in programs)
    return "\n\n".join(part for part in (rates, costs, versions) if part)


def _rates(results: Sequence[Result], scenarios: Iterable[Scenario], side: str) -> Iterator[str]:
    for scenario in scenarios:
        mine = [result for result in results if result.scenario == scenario.name]
        rate, postfix = (
            median(one.rate for one in timed(mine, name)) for name in (side, faster_postfix(mine))
        )
        yield rounded(rate)
        yield f"{rate / postfix:.2f}" if rate == rate and postfix == postfix else ""


def _costs(
    results: Sequence[Result], durabilities: Mapping[str, Durability], side: str
) -> list[str]:
    mine = [result for result in results if result.scenario == "standing"]
    metered = timed(mine, side, metered=True)
    durability = durabilities.get(side)
    cpu = rounded(median(one.cpu_per_thousand for one in timed(mine, side)))
    return [
        f"{durability.before_reply:.1f}" if durability else "",
        f"{durability.in_all:.1f}" if durability else "",
        f"at least {cpu}" if side == "Exim" else cpu,
        rounded(median((one.peak_bytes or 0) >> 20 for one in metered)),
    ]
