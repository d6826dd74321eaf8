"""The relay as a service: what its unit promises, and that mail flows under all of it."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from relay.cli.manual import man_page
from relay.config import MACHINE_FILE, load
from tests.fakes.waiting import patient
from tests.rigs import service
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_config, relay_process
from tests.rigs.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = ROOT / "systemd"


@pytest.mark.needs("systemd-analyze")
def test_systemd_rates_the_unit_as_safe() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(service.UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"Overall exposure level for relay.service: ([0-9.]+)", done.stdout)
    assert exposure, done.stdout + done.stderr
    assert float(exposure[1]) <= 1.5


@pytest.mark.needs("systemd-analyze", "man")
def test_systemd_reports_no_mistake_in_the_units(tmp_path: Path) -> None:
    (tmp_path / "man/man1").mkdir(parents=True)
    (tmp_path / "man/man1/relay.1").write_text(man_page())
    for name in ("relay.service", "relay.socket"):
        # The one thing that is not there before an installation.
        text = (SYSTEMD / name).read_text().replace("/opt/relay/bin/relay", "/bin/true")
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            str(tmp_path / "relay.service"),
            str(tmp_path / "relay.socket"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MANPATH": str(tmp_path / "man"), "SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_line_of_the_unit_is_exercised_or_said_not_to_be() -> None:
    assert set(service.settings()) == service.EXERCISED | set(service.NOT_EXERCISED)
    assert not service.EXERCISED & set(service.NOT_EXERCISED)


@pytest.mark.needs("root", "bwrap", "setpriv", "systemd-analyze")
async def test_mail_flows_under_the_services_user_capability_and_sandbox(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    low = "127.0.0.125:25"
    config = relay_config(
        port=free_port(), dns=sandbox.dns.nameserver, delivery_port=sandbox.delivery_port
    )
    config["listeners"].append({"address": low})
    config["tls"] = {"ca_file": "/etc/relay/ca.pem"}
    for section, keys in yaml.safe_load((SYSTEMD / "relay.yaml").read_text()).items():
        if section != "listeners":
            config[section] |= keys
    del config["admin"]["socket_group"]  # an installation makes it; there is none here
    directory = sandbox.directory
    (directory / "ca.pem").write_bytes(sandbox.authority.ca_pem)
    (directory / "ca.pem").chmod(0o644)
    (directory / "relay.yaml").touch(mode=0o644)
    (directory / "relay.yaml").chmod(0o644)
    relay = Relay(directory, config, int(config["listeners"][0]["address"].rpartition(":")[2]))
    relay.wrapper, relay.wrapper_stays = service.restricted(directory), True
    sandbox.relay = relay
    await asyncio.to_thread(relay.start)
    try:
        await sandbox.submit("a@client.example", "b@dest.example", body="x" * 400_000)
        await mx.wait_for_messages(1)
        [event] = await sandbox.attempts("b@dest.example")
        assert event["delivery-status"]["certificate-verified"] is True
        reader, writer = await asyncio.open_connection("127.0.0.125", 25)
        assert (await reader.readline()).startswith(b"220 "), "a port below 1024"
        writer.close()
        [pid] = relays_below(relay.pid)
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Uid"].split() == [str(service.UID)] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 1 << 10, (
            "CAP_NET_BIND_SERVICE"
        )
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert not (directory / "spool/spool/relay.sock").exists()
        assert (directory / "run/relay.sock").is_socket()
        assert "not exercised" not in relay.stderr
        os.kill(pid, signal.SIGTERM)
        assert await asyncio.to_thread(relay.process.wait, 30) == 0  # type: ignore[union-attr]
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()


def relays_below(pid: int) -> list[int]:
    """The relay among the processes that began with `pid`: the last of them."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in below for found in relays_below(int(child))] or [pid]


def test_service_and_commands_read_one_configuration_with_absolute_paths() -> None:
    """What the unit says in an environment of its own the shell would not know."""
    assert not {"Environment", "EnvironmentFile", "PassEnvironment"} & set(service.settings())
    config = load(SYSTEMD / "relay.yaml", {}, look=None)
    state = {
        key: f"{root}/{service.settings()[key][0]}/"
        for key, root in (
            ("StateDirectory", "/var/lib"),
            ("LogsDirectory", "/var/log"),
            ("RuntimeDirectory", "/run"),
        )
    }
    assert config.queue.path.startswith(state["StateDirectory"])
    assert config.log.delivery.startswith(state["LogsDirectory"])
    assert config.admin.socket.startswith(state["RuntimeDirectory"])
    assert f"-c {service.CONFIG}" in service.settings()["ExecStart"][0]
    assert str(MACHINE_FILE) == service.CONFIG


def test_a_reload_with_a_broken_file_fails_before_the_relay_is_asked(tmp_path: Path) -> None:
    checks, signals = service.settings()["ExecReload"]
    assert signals == '/bin/sh -c "kill -HUP $MAINPID"'
    text = (SYSTEMD / "relay.yaml").read_text()
    own_group = grp.getgrgid(os.getegid()).gr_name
    text = text.replace("socket_group: relay", f"socket_group: {own_group}")
    (tmp_path / "relay.yaml").write_text(text)
    command = checks.replace("/opt/relay/bin/relay", f"{sys.executable} -m relay")
    command = command.replace(service.CONFIG, str(tmp_path / "relay.yaml"))
    for broken, code in ((False, 0), (True, 1)):
        if broken:
            (tmp_path / "relay.yaml").write_text("queue: {lifetime: soon}\n")
        done = subprocess.run(
            command.split(), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "relay.yaml:1: queue.lifetime: " in done.stderr


# --- socket activation ----------------------------------------------------------------------------


AS_SYSTEMD = (
    "import os, sys\n"
    "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'}\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'relay', 'serve', '-c', sys.argv[1]])\n"
)
"""What systemd does for a socket unit: descriptors from 3 on, and says so in the environment."""


def activated(relay: Relay) -> list[str]:
    """A relay begun as systemd begins one."""
    relay.config_file.write_text(json.dumps(relay.config))
    return [sys.executable, "-c", AS_SYSTEMD, str(relay.config_file)]


def test_ports_that_systemd_holds_outlive_the_relay(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        relay_process(tmp_path, start=False) as relay,
    ):
        relay.port = held.getsockname()[1]
        relay.config["listeners"] = [{"address": f"127.0.0.1:{relay.port}"}]

        def start() -> subprocess.Popen[bytes]:
            with (tmp_path / "stderr").open("ab") as stderr:
                return subprocess.Popen(
                    activated(relay),
                    preexec_fn=lambda: os.dup2(held.fileno(), 3),
                    close_fds=False,
                    cwd=tmp_path,
                    stderr=stderr,
                )

        relay.process = start()
        wait_until(lambda: " ready: " in relay.stderr, what="the relay's start")
        assert greeting(relay.port) == b"220"
        assert relay.stop() == 0
        with socket.create_connection(("127.0.0.1", relay.port), timeout=patient(30)) as waiting:
            relay.process = start()  # who came between the two is served by the second
            assert waiting.recv(3) == b"220"
        assert relay.stop() == 0


def greeting(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=patient(10)) as client:
        return client.recv(3)


def test_relay_does_not_start_with_a_systemd_port_that_no_listener_names(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        relay_process(tmp_path, start=False) as relay,
    ):
        done = subprocess.run(
            activated(relay),
            preexec_fn=lambda: os.dup2(held.fileno(), 3),
            close_fds=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=patient(30),
            check=False,
        )
        assert done.returncode == 1
        address = f"127.0.0.1:{held.getsockname()[1]}"
        assert (
            f"systemd hands over a socket at {address}, and no listener has that address"
            in done.stderr
        )


# --- health ---------------------------------------------------------------------------------------


def test_health_answers_while_the_relay_runs_and_not_after(tmp_path: Path) -> None:
    with relay_process(tmp_path) as relay:
        assert (relay.run("health").stdout, relay.run("health", "--ready").stdout) == (
            "healthy\n",
            "ready\n",
        )
        relay.stop()
        done = relay.run("health")
        assert done.returncode == 1
        assert "no relay answers" in done.stderr


def test_a_peer_that_hangs_up_sends_no_signal(tmp_path: Path) -> None:
    with relay_process(tmp_path) as relay:
        status = Path(f"/proc/{relay.pid}/status").read_text()
        [ignored] = re.findall(r"^SigIgn:\s*(\w+)$", status, re.MULTILINE)
        assert int(ignored, 16) & (1 << (signal.SIGPIPE - 1)), "SIGPIPE would end the relay"
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m relay log -c {relay.config_file} | true"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


# --- the log's rotation ---------------------------------------------------------------------------


@pytest.mark.needs("logrotate", "root")
def test_logrotate_moves_the_delivery_log_and_no_line_is_lost(tmp_path: Path) -> None:
    with relay_process(tmp_path) as relay:
        first = submit(relay)
        log = tmp_path / "log/delivery.log"
        wait_until(lambda: log.exists() and first in log.read_text(), what="the first line")
        text = (SYSTEMD / "relay.logrotate").read_text()
        text = text.replace("/var/log/relay/delivery.log", str(log)).replace(
            "su relay relay", "su root root"
        )
        text = re.sub(r"/bin/systemctl kill .*", f"kill -HUP {relay.pid}", text)
        (tmp_path / "rotate.conf").write_text(text)
        (tmp_path / "rotate.conf").chmod(0o644)
        logrotate = shutil.which("logrotate", path=f"{os.environ['PATH']}:/usr/sbin")
        subprocess.run(
            [
                str(logrotate),
                "--force",
                "--state",
                str(tmp_path / "state"),
                str(tmp_path / "rotate.conf"),
            ],
            check=True,
            capture_output=True,
        )
        wait_until(lambda: "reloaded" in relay.stderr, what="the reload")
        second = submit(relay)
        wait_until(
            lambda: log.exists() and second in log.read_text(), what="a line in the new file"
        )
        [old] = (tmp_path / "log").glob("delivery.log-*")
        assert first in old.read_text()
        assert second not in old.read_text()


def submit(relay: Relay) -> str:
    import smtplib

    with smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20)) as client:
        client.ehlo("client.example")
        client.mail("a@client.example")
        client.rcpt("b@dest.example")
        code, text = client.data("Subject: hello\r\n\r\nbody\r\n")
    assert code == 250, text
    return text.decode().split()[-1]
