"""The packages, in bare machines: installed, edited, started, upgraded, broken, purged.

`make packages-test` makes the packages and a Debian for each release (debootstrap), so it needs
root and the network. No systemd runs there: `tests/rigs/machine.py` takes its place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import smtplib
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from relay import __version__
from tests.rigs.machine import PATH, Machine, Service, debian
from tests.rigs.ports import free_port, wait_until
from tests.rigs.sink import Sink, sink

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/packages"
NEWER = "99.0.0"
DKIM_KEY = "/etc/relay/dkim/client.example.pem"

pytestmark = [
    pytest.mark.needs("debootstrap", "bwrap", "dpkg-deb", "lintian", "rpm", "root"),
    pytest.mark.skipif(os.environ.get("RELAY_PACKAGES") is None, reason="`make packages-test`"),
    pytest.mark.timeout(1800),
]


def deb() -> Path:
    [found] = BUILT.glob(f"relay-smarthost_{__version__}_*.deb")
    return found


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same package as a later version; its programs say so, too."""
    directory = tmp_path_factory.mktemp("newer")
    shutil.chown(directory, "root")
    unpacked = directory / "unpacked"
    subprocess.run(["dpkg-deb", "--raw-extract", str(deb()), str(unpacked)], check=True)
    control = unpacked / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}", f"Version: {NEWER}"))
    program = unpacked / "opt/relay/lib/python3/site-packages/relay/__init__.py"
    program.write_text(program.read_text().replace(__version__, NEWER))
    made = directory / f"relay-smarthost_{NEWER}.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", str(unpacked)]
    subprocess.run([*command, str(made)], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module", params=os.environ.get("RELAY_PACKAGES", "bookworm").split())
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with debian(request.param) as found:
        yield found


def install(machine: Machine, package: Path) -> subprocess.CompletedProcess[str]:
    shutil.copy(package, machine.path("/root"))
    command = ["apt-get", "install", "--yes", "--no-install-recommends", f"/root/{package.name}"]
    return machine.run(*command)


class Relay:
    """The installed relay as its administrator sees it."""

    def __init__(self, machine: Machine, next_hop: Sink) -> None:
        self.machine = machine
        self.service = Service(machine)
        self.port = free_port()
        self.next_hop = next_hop

    def edit(self, **keys: object) -> None:
        """The file as it was installed, with a few keys of this test's own."""
        file = self.machine.path("/etc/relay/relay.yaml")
        settings = yaml.safe_load((ROOT / "systemd/relay.yaml").read_text()) | {
            "hostname": "relay.test.example",
            "listeners": [{"address": f"127.0.0.1:{self.port}"}],
            "routes": self.next_hop.route,
            "delivery": {"allow_networks": ["127.0.0.0/8"]},
        }
        file.write_text(yaml.safe_dump(settings | keys, sort_keys=False))

    def send(self, subject: str, more: str = "") -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=30) as client:
            content = f"{more}To: b,\r\n c\r\nSubject: {subject}\r\n\r\nhello\r\n"
            client.sendmail("a@client.example", "b@dest.example", content)

    def queued(self) -> list[str]:
        """The subjects of what is queued."""
        ids = [
            one["queue-id"] for one in json.loads(self.machine("relay", "queue", "list", "--json"))
        ]
        shown = [self.machine("relay", "queue", "show", queue_id) for queue_id in ids]
        return re.findall(r"^Subject: (.*)$", "\n".join(shown), re.MULTILINE)

    def arrived(self, subject: str) -> bool:
        return bool(self.next_hop.tokens({subject}))


def test_installed_deb_relays_mail_and_is_removed_completely(machine: Machine, newer: Path) -> None:
    done = install(machine, deb())
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine("relay", "--version").startswith(f"relay {__version__}\n")
    assert "start relay.service" in machine.asked_of_systemd()
    is_enabled = "/etc/systemd/system/multi-user.target.wants/relay.service"
    assert machine.path(is_enabled).is_symlink()
    the_directories_are_for_the_service(machine)
    with sink() as next_hop:
        relay = Relay(machine, next_hop)
        try:
            mail_flows(relay)
            a_user_without_the_group_hears_so(machine)
            a_key_made_by_root_signs(relay)
            a_broken_file_stops_an_upgrade_and_not_the_relay(relay, newer)
            an_upgrade_keeps_the_queue_and_the_file(relay, newer)
            the_queue_moves_as_documented(relay)
            a_purge_keeps_mail_and_a_second_installation_delivers_it(relay, newer)
            a_purge_with_an_empty_queue_leaves_nothing(relay)
        finally:
            relay.service.kill()


def the_directories_are_for_the_service(machine: Machine) -> None:
    owners = {
        "/etc/relay": "root relay 750",
        "/etc/relay/dkim": "root relay 750",
        "/etc/relay/relay.yaml": "root relay 640",
        "/opt/relay/lib/python3/site-packages/relay/__init__.py": "root root 644",
    }
    for path, owner in owners.items():
        assert machine("stat", "--format", "%U %G %a", path).strip() == owner, path
    home = machine("getent", "passwd", "relay").strip().split(":")
    assert home[5:] == ["/var/lib/relay", "/usr/sbin/nologin"]
    contents = subprocess.run(
        ["dpkg-deb", "--contents", str(deb())], capture_output=True, text=True, check=True
    ).stdout
    for page in ("man1/relay.1.gz", "man5/relay.yaml.5.gz"):
        # minbase drops manual pages at installation on some releases; the package has them.
        assert f"./usr/share/man/{page}" in contents


def mail_flows(relay: Relay) -> None:
    machine = relay.machine
    relay.edit()
    checked = machine.run("relay", "check", "--quiet")
    assert checked.returncode == 0, checked.stderr
    for command in ("queue list", "queue list --json", "log", "health"):
        before = machine.run("relay", *command.split())
        assert (before.returncode, before.stdout) == (1, ""), "no queue was looked at"
        assert before.stderr.startswith("no relay answers at /run/relay/relay.sock")
    relay.service.start()
    assert machine("relay", "health") == "healthy\n"
    relay.send("first")
    wait_until(lambda: relay.arrived("first"), what="the delivery")
    wait_until(lambda: "delivered" in machine("relay", "log"), what="its line in the log")
    assert relay.queued() == []
    [content] = relay.next_hop.contents
    assert content.endswith(b"\r\nTo: b,\r\n c\r\nSubject: first\r\n\r\nhello\r\n")
    relay.send("secret", "X-Require-TLS: yes\r\n")
    wait_until(lambda: "not sent: TLS required" in machine("relay", "log"), what="the attempt")
    assert relay.queued() == ["secret"]
    assert not relay.arrived("secret")
    machine("relay", "queue", "remove", "--all", "--yes")
    assert '"delivered"' in machine.read("/var/log/relay/delivery.log")
    checked = machine.run("relay", "check", "--quiet")
    assert checked.returncode == 0, f"what the running relay holds is not wrong: {checked.stderr}"


def a_user_without_the_group_hears_so(machine: Machine) -> None:
    machine("useradd", "ann")
    as_ann = ["setpriv", "--reuid=ann", "--regid=ann", "--init-groups", "relay", "queue", "list"]
    refused = machine.run(*as_ann)
    assert (refused.returncode, refused.stdout) == (1, "")
    command = "`usermod --append --groups relay ann`"
    said = (
        "/etc/relay/relay.yaml: permission denied; run this as root, or join the group relay"
        f" ({command}"
    )
    assert refused.stderr.startswith(said)
    machine("usermod", "--append", "--groups", "relay", "ann")
    assert machine(*as_ann) == "The queue is empty, or nothing in it matches.\n"


def a_key_made_by_root_signs(relay: Relay) -> None:
    relay.machine("relay", "dkim-key", "client.example", "--selector", "s1", "--out", DKIM_KEY)
    relay.edit(dkim={"domains": {"client.example": {"selector": "s1", "key_file": DKIM_KEY}}})
    relay.machine("relay", "check", "--quiet")
    relay.service.reload()
    wait_until(lambda: "reloaded: " in relay.service.stderr.read_text(), what="the reload")
    relay.send("signed", "From: a@client.example\r\n")
    wait_until(lambda: relay.arrived("signed"), what="the delivery")
    assert relay.next_hop.contents[-1].startswith(b"DKIM-Signature: ")


def a_broken_file_stops_an_upgrade_and_not_the_relay(relay: Relay, newer: Path) -> None:
    machine = relay.machine
    relay.next_hop.gate.clear()
    relay.send("second")
    relay.edit(queue={"path": "/var/lib/relay/spool", "lifetime": "soon"})
    machine.asked_of_systemd()
    done = install(machine, newer)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert 'queue.lifetime: "soon" is not a duration' in said
    assert "Nothing was changed, a running relay goes on. Mend the file" in said
    state = machine("dpkg-query", "--show", "--showformat=${Status} ${Version}", "relay-smarthost")
    assert state == f"install ok installed {__version__}"
    assert not [one for one in machine.asked_of_systemd() if "start" in one or "stop" in one]
    assert relay.service.is_running
    relay.send("third")


def an_upgrade_keeps_the_queue_and_the_file(relay: Relay, newer: Path) -> None:
    machine = relay.machine
    relay.edit()
    written = machine.read("/etc/relay/relay.yaml")
    done = install(machine, newer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert machine("relay", "--version").startswith(f"relay {NEWER}\n")
    assert "restart relay.service" in machine.asked_of_systemd()
    assert machine.read("/etc/relay/relay.yaml") == written
    assert stat.S_IMODE(machine.path("/etc/relay/relay.yaml").stat().st_mode) == 0o640
    relay.service.stop()
    assert sorted(relay.queued()) == ["second", "third"], "and root may look at the stopped queue"
    relay.service.start()
    relay.next_hop.gate.set()
    machine("relay", "queue", "retry", "--all")
    wait_until(lambda: relay.arrived("second") and relay.arrived("third"), what="what was queued")
    assert f"relay {NEWER} ready" in relay.service.stderr.read_text()


def the_queue_moves_as_documented(relay: Relay) -> None:
    machine = relay.machine
    relay.next_hop.gate.clear()
    relay.send("moved")
    relay.service.stop()
    machine("mv", "/var/lib/relay/spool", "/srv/relay-spool")
    relay.edit(queue={"path": "/srv/relay-spool"})
    checked = machine.run("relay", "check", "--quiet")
    assert checked.returncode == 1
    assert "write [Service] and ReadWritePaths=/srv/relay-spool" in checked.stderr
    unit = machine.path("/usr/lib/systemd/system/relay.service")
    before = unit.read_text()
    unit.write_text(before.replace("[Service]", "[Service]\nReadWritePaths=/srv/relay-spool"))
    machine("relay", "check", "--quiet")
    relay.service = Service(machine)
    relay.service.start()
    assert relay.queued() == ["moved"]
    relay.service.stop()
    unit.write_text(before)
    machine("mv", "/srv/relay-spool", "/var/lib/relay/spool")
    relay.edit()
    relay.service = Service(machine)


def a_purge_keeps_mail_and_a_second_installation_delivers_it(relay: Relay, newer: Path) -> None:
    machine = relay.machine
    done = machine.run("apt-get", "purge", "--yes", "relay-smarthost")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mail is still queued in /var/lib/relay/spool, and stays there" in done.stdout
    assert machine.path("/var/lib/relay/spool/queue.db").exists()
    assert not machine.path("/opt/relay").exists()
    assert not machine.path("/etc/relay/relay.yaml").exists()
    assert machine.path(DKIM_KEY).exists(), "keys are the administrator's own"
    assert install(machine, newer).returncode == 0
    relay.edit()
    relay.service.start()
    relay.next_hop.gate.set()
    machine("relay", "queue", "retry", "--all")
    wait_until(lambda: relay.arrived("moved"), what="mail from before the purge")
    wait_until(lambda: relay.queued() == [], what="an empty queue")
    relay.service.stop()


def a_purge_with_an_empty_queue_leaves_nothing(relay: Relay) -> None:
    machine = relay.machine
    machine("rm", DKIM_KEY)
    machine("apt-get", "purge", "--yes", "relay-smarthost")
    for path in ("/opt/relay", "/etc/relay", "/var/lib/relay", "/var/log/relay", "/usr/bin/relay"):
        assert not os.path.lexists(machine.path(path)), path
    wanted = machine.path("/etc/systemd/system/multi-user.target.wants/relay.service")
    assert not os.path.lexists(wanted)


def test_the_rpm_serves_too_and_its_scripts_do_what_those_of_the_deb_do(machine: Machine) -> None:
    """Debian's rpm, which knows nothing of what dpkg has installed: so without its dependencies."""
    [rpm] = BUILT.glob(f"relay-smarthost-{__version__}-*.rpm")
    shutil.copy(rpm, machine.path("/root"))
    needed = ["rpm", "python3"]
    if machine.run("sh", "-c", "command -v systemd-sysusers").returncode != 0:
        needed += ["systemd-standalone-sysusers", "systemd-standalone-tmpfiles"]
    machine("apt-get", "install", "--yes", "--no-install-recommends", *needed)
    # Debian's rpm up to 12 refuses to install without the option, the one of 13 does not know it.
    knows = machine.run("rpm", "--force-debian", "--version").returncode == 0
    force = ["--force-debian"] if knows else []

    def run_rpm(*arguments: str) -> subprocess.CompletedProcess[str]:
        # rpm has a PATH of its own, in which our systemctl is not.
        path = f"--define=_install_script_path {PATH}"
        return machine.run("rpm", *force, "--nodeps", path, *arguments)

    done = run_rpm("--install", f"/root/{rpm.name}")
    assert done.returncode == 0, done.stderr
    the_directories_are_for_the_service(machine)
    machine.asked_of_systemd()
    with sink() as next_hop:
        relay = Relay(machine, next_hop)
        try:
            relay.edit()
            relay.service.start()
            next_hop.gate.clear()
            relay.send("by rpm")
            relay.edit(queue={"path": "/var/lib/relay/spool", "lifetime": "soon"})
            again = ("--upgrade", "--replacepkgs", f"/root/{rpm.name}")
            done = run_rpm(*again)
            assert done.returncode != 0
            assert "Nothing was changed, a running relay goes on" in done.stdout + done.stderr
            assert machine.asked_of_systemd() == []
            relay.edit()
            done = run_rpm(*again)
            assert done.returncode == 0, done.stderr
            assert "try-restart relay.service" in machine.asked_of_systemd()
            assert "relay.test.example" in machine.read("/etc/relay/relay.yaml")
            relay.service.stop()
            relay.service.start()
            next_hop.gate.set()
            machine("relay", "queue", "retry", "--all")
            wait_until(lambda: relay.arrived("by rpm"), what="mail from before the upgrade")
            relay.service.stop()
        finally:
            relay.service.kill()
    done = run_rpm("--erase", "relay-smarthost")
    assert done.returncode == 0, done.stderr
    assert "disable --now relay.socket relay.service" in " ".join(machine.asked_of_systemd())
    assert not machine.path("/usr/bin/relay").exists()
    assert not machine.path("/opt/relay/lib").exists()
    assert machine.path("/var/lib/relay/spool").exists(), "mail is never removed by an erase"


# --- the files themselves -------------------------------------------------------------------------


def test_lintian_finds_nothing_but_what_is_overridden_by_name() -> None:
    done = subprocess.run(
        ["lintian", "--no-cfg", "--allow-root", "--fail-on=error,warning", str(deb())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_packages_name_who_makes_them_or_say_that_there_is_no_address() -> None:
    [rpm] = BUILT.glob(f"relay-smarthost-{__version__}-*.rpm")
    of_deb = ["dpkg-deb", "--field", str(deb()), "Maintainer"]
    of_rpm = ["rpm", "--query", "--package", "--queryformat", "%{PACKAGER}\n", str(rpm)]
    name = os.environ.get("DEBFULLNAME") or "The contributors of relay-smarthost"
    address = os.environ.get("DEBEMAIL") or "no-address@relay-smarthost.invalid"
    for asked in (of_deb, of_rpm):
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        assert said == f"{name} <{address}>\n"


def test_the_rpm_has_the_files_of_the_deb_and_asks_for_what_it_needs() -> None:
    [rpm] = BUILT.glob(f"relay-smarthost-{__version__}-*.rpm")

    def asked(*arguments: str) -> str:
        command = ["rpm", "--query", "--package", *arguments, str(rpm)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    contents = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", str(deb())], capture_output=True, check=True
    ).stdout
    listed = subprocess.run(
        ["tar", "--list"], input=contents, capture_output=True, check=True
    ).stdout.decode()
    of_deb = {name.removeprefix(".") for name in listed.splitlines() if not name.endswith("/")}
    of_rpm = set(asked("--list").splitlines())
    other = {name for name in of_deb - of_rpm if not re.search(r"lintian|zsh|changelog.gz$", name)}
    assert not other
    assert "python3 >= 3.11" in asked("--requires")
    assert set(asked("--configfiles").split()) == {
        "/etc/relay/relay.yaml",
        "/etc/logrotate.d/relay",
    }
    for when in ("preinstall", "postinstall", "preuninstall", "postuninstall"):
        assert f"{when} scriptlet (using /bin/sh)" in asked("--scripts")
