"""The relay as a process of its own, with a configuration, spool and log of a test's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from relay.admin.client import ask
from relay.cli import relay as command_line
from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, free_port, wait_until

_ROOT = Path(__file__).parents[2]


@dataclass
class Relay:
    """A relay that can be started, killed and started again on the same spool."""

    directory: Path
    config: dict[str, Any]
    port: int
    wrapper: Sequence[str] = ()
    """A command before the relay's that becomes the relay: a signal reaches one process only."""
    wrapper_stays: bool = False
    """It is the relay's parent instead, and ends it when it ends."""
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    program: Sequence[str] = ("relay",)
    """The module to run, and its arguments before `serve`."""
    python: str = sys.executable

    @property
    def config_file(self) -> Path:
        return self.directory / "relay.yaml"

    @property
    def stderr(self) -> str:
        return (self.directory / "stderr").read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def launch(self) -> None:
        """Start, and wait for nothing."""
        self.config_file.write_text(yaml.safe_dump(self.config))
        with (self.directory / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [
                    *self.wrapper,
                    self.python,
                    "-m",
                    *self.program,
                    "serve",
                    "-c",
                    str(self.config_file),
                ],
                cwd=self.directory,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONPATH": str(_ROOT),
                    **self.environment,
                },
            )

    def start(self, *, seconds: float = 60) -> None:
        """Start and wait until it takes connections."""
        self.launch()

        def listening() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the relay ended at its start:\n{self.stderr}"
            return accepts_connections("127.0.0.1", self.port)

        wait_until(listening, seconds=seconds, what="the relay's start")
        program = Path(f"/proc/{self.pid}/exe").resolve()
        assert self.wrapper_stays or program == Path(self.python).resolve(), (
            f"{program} runs the relay and is not it"
        )

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """A power cut, as far as a process can have one; its workers end when they see it."""
        workers = workers_of(self) if self.config.get("workers", 1) > 1 else []
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(timeout=patient(30))
        wait_until(lambda: not any(map(is_alive, workers)), what="the workers' end")

    def kill_all(self) -> None:
        """The same, of a relay with several workers."""
        for pid in (self.pid, *workers_of(self)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()

    def stop(self, *, seconds: float = 100) -> int:
        """SIGTERM, and the exit code. A relay has 70 seconds for what is under way."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=patient(seconds))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of `relay` with this configuration."""
        with self.begin(*arguments) as command:
            try:
                stdout, stderr = command.communicate(timeout=patient(60))
            except subprocess.TimeoutExpired:
                command.kill()
                raise
        return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """The same, under way."""
        command, *rest = arguments
        return subprocess.Popen(
            [self.python, "-m", "relay", command, "-c", str(self.config_file), *rest],
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(_ROOT), **self.environment},
        )

    def ask(self, verb: str) -> list[dict[str, Any]]:
        """What a running relay answers at its control socket, as a command would print it.

        A command is a process, which takes as long as some hundred of these questions.
        """
        socket = Path(self.config["admin"]["socket"])
        directory = os.open(self.directory / socket.parent, os.O_PATH)
        try:
            # The path of a test's directory may be longer than an address of a socket.
            lines = list(ask(Path(f"/proc/self/fd/{directory}", socket.name), {"verb": verb}))
        finally:
            os.close(directory)
        return [item for line in lines for item in line.get("items", ())]

    def events(self, **wanted: str) -> list[dict[str, Any]]:
        """The delivery log's lines whose fields are as `wanted` (`queue_id=…` means "queue-id")."""
        path = self.directory / "log/delivery.log"
        text = path.read_text(encoding="ascii") if path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be under way
        events = [json.loads(line) for line in lines]
        return [
            e
            for e in events
            if all(e.get(key.replace("_", "-")) == value for key, value in wanted.items())
        ]


def relay_config(
    *,
    port: int,
    dns: str,
    delivery_port: int,
    ca_file: Path | None = None,
    **more: Mapping[str, Any],
) -> dict[str, Any]:
    """A configuration for loopback; each of `more` is merged into the section of its name."""
    config: dict[str, Any] = {
        "hostname": "relay.test.example",
        "listeners": [{"address": f"127.0.0.1:{port}"}],
        "resolver": {"nameservers": [dns]},
        "delivery": {"port": delivery_port, "allow_networks": ["127.0.0.0/8"]},
        "queue": {"path": "spool"},
        "log": {"delivery": "log/delivery.log"},
        "admin": {"socket": "relay.sock"},
    }
    if ca_file is not None:
        config["tls"] = {"ca_file": str(ca_file)}
    for section, values in more.items():
        config[section] = {**config.get(section, {}), **values}
    return config


@contextlib.contextmanager
def relay_process(
    directory: Path,
    *,
    dns: str = "127.0.0.1:9",
    delivery_port: int = 9,
    ca_file: Path | None = None,
    wrapper: Sequence[str] = (),
    start: bool = True,
    program: Sequence[str] = ("relay",),
    **more: Mapping[str, Any],
) -> Iterator[Relay]:
    """A relay in `directory`; ended with the test, whatever happens."""
    port = free_port()
    relay = Relay(
        directory,
        relay_config(port=port, dns=dns, delivery_port=delivery_port, ca_file=ca_file, **more),
        port,
        wrapper=wrapper,
        program=program,
    )
    if start:
        relay.start()
    try:
        yield relay
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()


@contextlib.contextmanager
def relay_of(directory: Path, workers: int, **sections: Any) -> Iterator[Relay]:
    """A relay with so many workers, all of them ready; stopped with the test."""
    with relay_process(directory, start=False, **sections) as relay:
        relay.config["workers"] = workers
        relay.start()
        wait_until(lambda: "ready: " in relay.stderr, what="all workers")
        try:
            yield relay
        finally:
            if relay.process is not None and relay.process.poll() is None:
                relay.stop()


def asked(relay: Relay, command: str, *arguments: str, may_fail: bool = False) -> dict[str, Any]:
    """The command line's answer in JSON, without a process for each question."""
    runner = CliRunner(env={"RELAY__ADMIN__SOCKET": str(relay.directory / "relay.sock")})
    words = [command, "-c", str(relay.config_file), "--json", *arguments]
    done = runner.invoke(command_line, words)
    assert done.exit_code in ((0, 1) if may_fail else (0,)), done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def workers_of(relay: Relay) -> list[int]:
    """The workers' processes, oldest first; none once the relay has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text()
        return [int(pid) for pid in children.split()]
    return []


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
