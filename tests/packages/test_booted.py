"""The installed service in a Debian that runs: what systemd makes of the unit, as an administrator
sees it.

`make packages-test` runs it too, where systemd-nspawn is installed (Debian: systemd-container).
"""

from __future__ import annotations

import os
import smtplib
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.packages.test_packages import ROOT, deb, install
from tests.rigs.booted import booted_debian
from tests.rigs.machine import Machine
from tests.rigs.ports import free_port, wait_until
from tests.rigs.sink import Sink, sink

pytestmark = [
    pytest.mark.needs("debootstrap", "bwrap", "systemd-nspawn", "nsenter", "root"),
    pytest.mark.skipif(os.environ.get("RELAY_PACKAGES") is None, reason="`make packages-test`"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", params=os.environ.get("RELAY_PACKAGES", "bookworm").split())
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with booted_debian(request.param) as found:
        done = install(found, deb())
        assert done.returncode == 0, done.stdout + done.stderr
        yield found


@pytest.fixture
def next_hop() -> Iterator[Sink]:
    with sink() as found:
        yield found


def edit(machine: Machine, next_hop: Sink, port: int) -> None:
    """The file as it was installed, with a listener and a next hop of this test's own."""
    settings = yaml.safe_load((ROOT / "systemd/relay.yaml").read_text()) | {
        "hostname": "relay.test.example",
        "listeners": [{"address": f"127.0.0.1:{port}"}],
        "routes": next_hop.route,
        "delivery": {"allow_networks": ["127.0.0.0/8"]},
    }
    machine.path("/etc/relay/relay.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def send(port: int, subject: str) -> None:
    client = smtplib.SMTP("127.0.0.1", port, timeout=60)
    try:
        content = f"Subject: {subject}\r\n\r\nhello\r\n"
        client.sendmail("a@client.example", "b@dest.example", content)
    finally:
        client.close()  # what QUIT is answered does not matter


def send_again_after_421(port: int, subject: str) -> None:
    while True:
        try:
            return send(port, subject)
        except smtplib.SMTPResponseException as error:
            if error.smtp_code != 421:
                raise
        except smtplib.SMTPServerDisconnected:  # smtplib hides the 421 of a later command
            pass
        time.sleep(0.1)


def journal(machine: Machine, *, since: str = "") -> str:
    """What systemd and the relay said of the service, since a cursor."""
    more = (f"--after-cursor={since}",) if since else ()
    return machine("journalctl", "--unit=relay.service", "--output=cat", "--no-pager", *more)


def cursor(machine: Machine) -> str:
    machine("journalctl", "--sync")
    shown = machine("journalctl", "--lines=1", "--show-cursor", "--no-pager")
    return shown.rpartition("-- cursor: ")[2].strip()


def main_process(machine: Machine) -> str:
    return machine("systemctl", "show", "--property=MainPID", "--value", "relay").strip()


def is_active(machine: Machine) -> bool:
    return machine.run("systemctl", "is-active", "relay").stdout == "active\n"


def test_service_runs_reloads_and_comes_back(machine: Machine, next_hop: Sink) -> None:
    assert is_active(machine), "it starts at its installation"
    port = free_port()
    edit(machine, next_hop, port)
    begin = cursor(machine)
    machine("systemctl", "restart", "relay")
    said = journal(machine, since=begin)
    assert "relay.test.example relays from" in said
    for complaint in ("already exists but", "Unknown", "Failed", "denied", "not permitted"):
        assert complaint not in said, said
    send(port, "first")
    wait_until(lambda: bool(next_hop.tokens({"first"})), what="the delivery")
    wait_until(lambda: "delivered" in machine("relay", "log"), what="its line in the log")

    file = machine.path("/etc/relay/relay.yaml")
    whole, process = file.read_text(), main_process(machine)
    file.write_text(f"{whole}nonsense: 1\n")
    broken = machine.run("systemctl", "reload", "relay")
    assert broken.returncode == 1, "a broken file fails visibly"
    assert "nonsense: unknown key" in journal(machine, since=begin)
    assert (is_active(machine), main_process(machine)) == (True, process), "and the relay goes on"
    file.write_text(whole)
    mended = machine.run("systemctl", "reload", "relay")
    assert mended.returncode == 0, journal(machine, since=begin)
    wait_until(lambda: "reloaded: " in journal(machine, since=begin), what="the reload")

    machine("sh", "-c", f"kill -9 {process}")
    wait_until(
        lambda: is_active(machine) and main_process(machine) not in (process, "0"),
        seconds=60,
        what="its return",
    )
    send(port, "second")
    wait_until(lambda: bool(next_hop.tokens({"second"})), what="the delivery")
    machine("systemctl", "stop", "relay")
    assert "ended" in journal(machine, since=begin)


def test_port_stays_open_while_the_relay_restarts_behind_its_socket(
    machine: Machine, next_hop: Sink
) -> None:
    """A client waits in the queue of the port, or has come just before the end, and hears 421."""
    port = free_port()
    machine("systemctl", "stop", "relay")
    edit(machine, next_hop, port)
    drop_in = machine.path("/etc/systemd/system/relay.socket.d/test.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n")
    machine("systemctl", "daemon-reload")
    machine("systemctl", "start", "relay.socket")
    assert not is_active(machine)
    send(port, "mail 0")
    assert is_active(machine), "the first client starts it"
    processes = {main_process(machine)}
    for number in range(1, 7):
        if number % 2:
            machine("systemctl", "restart", "--no-block", "relay")
        send_again_after_421(port, f"mail {number}")
        wait_until(lambda: is_active(machine), seconds=60, what="the restart")
        processes.add(main_process(machine))
    assert len(processes) == 4
    sent = {f"mail {number}" for number in range(7)}
    wait_until(lambda: set(next_hop.tokens(sent)) == sent, seconds=60, what="all of it")
    assert len(next_hop.tokens(sent)) == len(sent), "and nothing twice"
    machine("systemctl", "stop", "relay.socket", "relay")
