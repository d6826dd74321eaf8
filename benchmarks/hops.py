"""The next hop that both sides deliver to.

It is `benchmarks.lockstep`, which is the client, too; Postfix's smtp-sink; or `benchmarks.sink`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from asyncio import new_event_loop
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.scenarios import Beside, Client, Scenario
from relay.sandbox.certificates import Authority
from relay.sandbox.dns import DnsServer
from relay.sandbox.policy_host import PolicyHost, policy
from tests.rigs.ports import accepts_connections, free_port, wait_until

__all__ = ["DEAD", "HOP_NAME", "NextHop", "OwnSink", "next_hop", "own_sink", "serving", "silence"]

HOP_NAME = "mx.bench.example"
_ADDRESS = "127.0.0.32"

DEAD = "127.0.0.66"
"""A connection to this address is neither refused nor answered."""

_ROOT = Path(__file__).parents[1]
_AS_NOBODY = ["-u", "nobody"] if os.geteuid() == 0 else []


class _Counter(Protocol):
    def taken(self) -> int: ...

    def report(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NextHop:
    """A running next hop with the DNS name `HOP_NAME`. `certificate`: its chain and its key.
    `policy_port`: where its MTA-STS policy is fetched.
    """

    address: str
    port: int
    dead_port: int
    policy_port: int
    dns: str
    ca_file: Path
    certificate: Path
    counter: _Counter

    def taken(self) -> int:
        """Recipients served since the start."""
        return self.counter.taken()

    def report(self) -> dict[str, Any]:
        """Of the last run: the most transactions at a time, and the seconds of each message."""
        return self.counter.report()

    def send(self, scenario: Scenario, ports: Sequence[int], messages: int) -> tuple[float, float]:
        """Have the next hop send messages to one server, or several, and take them back: the
        seconds until it had them all, and until the servers had.
        """
        assert isinstance(self.counter, _Lockstep)
        return self.counter.send(scenario, ports, messages)


@contextlib.contextmanager
def next_hop(directory: Path, scenario: Scenario) -> Iterator[NextHop]:
    """The next hop a scenario needs."""
    authority = Authority()
    leaf = authority.leaf(HOP_NAME)
    ca_file, certificate = directory / "ca.pem", directory / "hop.pem"
    ca_file.write_bytes(authority.ca_pem)
    certificate.write_bytes(leaf.key_pem + leaf.chain_pem)
    certificate.chmod(0o644)
    port, policy_port = free_port(_ADDRESS), free_port(_ADDRESS)
    publisher = PolicyHost(
        HOP_NAME, policy(HOP_NAME), authority=authority, address=_ADDRESS, port=policy_port
    )
    with _dns(publisher) as dns, silence() as dead_port, contextlib.ExitStack() as stack:
        counter: _Counter
        if scenario.client is Client.LOCKSTEP:
            counter = stack.enter_context(_lockstep(port))
        elif scenario.needs_own_hop:
            own = own_sink([_ADDRESS], port, certificate=certificate, delay=scenario.reply_delay)
            counter = stack.enter_context(own)
        else:
            counter = stack.enter_context(_smtp_sink(directory, scenario, port))
        wait_until(lambda: accepts_connections(_ADDRESS, port), what="the next hop")
        yield NextHop(_ADDRESS, port, dead_port, policy_port, dns, ca_file, certificate, counter)
    if scenario.beside is Beside.NO_POLICY:
        assert publisher.requests, "the policy was not fetched"


class _SmtpSink:
    """Counts with smtp-sink -c: a message has one end of data for all its recipients."""

    def __init__(self, output: Path, recipients: int) -> None:
        self._output, self._recipients = output, recipients

    def taken(self) -> int:
        with self._output.open("rb") as file:
            file.seek(max(self._output.stat().st_size - 200, 0))
            found = re.findall(rb"mesg=(\d+)\r", file.read())
        return int(found[-1]) * self._recipients if found else 0

    def report(self) -> dict[str, Any]:
        return {"most": 0, "seconds": []}


@contextlib.contextmanager
def _smtp_sink(directory: Path, scenario: Scenario, port: int) -> Iterator[_SmtpSink]:
    output = directory / "sink.out"
    command = ["smtp-sink", "-c", *_AS_NOBODY, "-m", "2000", f"{_ADDRESS}:{port}", "2000"]
    with output.open("wb") as file, _running(command, stdout=file):
        yield _SmtpSink(output, scenario.recipients)


class _Lockstep:
    """Asks `benchmarks.lockstep`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def _ask(self, question: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the generator gave up"
        said: dict[str, Any] = json.loads(answer)
        return said

    def taken(self) -> int:
        return int(self._ask(b"")["taken"])

    def report(self) -> dict[str, Any]:
        return {"most": 0, "seconds": []}

    def send(self, scenario: Scenario, ports: Sequence[int], messages: int) -> tuple[float, float]:
        wanted = {
            "ports": list(ports),
            "messages": messages,
            "sessions": scenario.sessions,
            "size": scenario.size,
            "standing": scenario.standing,
        }
        said = self._ask(json.dumps(wanted).encode())
        assert "failed" not in said, said["failed"]
        return said["seconds"], said["intake_seconds"]


@contextlib.contextmanager
def _lockstep(port: int) -> Iterator[_Lockstep]:
    command = [sys.executable, "-m", "benchmarks.lockstep", _ADDRESS, str(port)]
    with _running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield _Lockstep(process)


class OwnSink:
    """Asks `benchmarks.sink`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._seconds: list[float] = []
        self._most = 0

    def taken(self) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"?\n")
        self._process.stdin.flush()
        said = json.loads(self._process.stdout.readline())
        self._seconds += said["seconds"]
        self._most = max(self._most, said["most"])
        return int(said["taken"])

    def report(self) -> dict[str, Any]:
        self.taken()
        seconds, most = self._seconds, self._most
        self._seconds, self._most = [], 0
        return {"most": most, "seconds": seconds}


@contextlib.contextmanager
def own_sink(
    addresses: Sequence[str], port: int, *, certificate: Path | None = None, delay: float = 0.0
) -> Iterator[OwnSink]:
    """A next hop on some addresses; each of its replies takes `delay` seconds."""
    command = [sys.executable, "-m", "benchmarks.sink", ",".join(addresses), str(port)]
    command += [str(certificate)] if certificate is not None else []
    command += ["--delay", str(delay)]
    with _running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield OwnSink(process)


@contextlib.contextmanager
def _running(command: list[str], **files: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=_ROOT, **files)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _dns(publisher: PolicyHost) -> Iterator[str]:
    """A name server that knows the next hop and its MTA-STS policy, and the policy host, in a
    thread.
    """
    server = DnsServer()
    server.a(HOP_NAME, _ADDRESS)
    server.a(publisher.name, _ADDRESS)
    server.txt(f"_mta-sts.{HOP_NAME}", "v=STSv1; id=1;", ttl=300)
    with serving(server, publisher):
        yield server.nameserver


@contextlib.contextmanager
def serving(*servers: contextlib.AbstractAsyncContextManager[Any]) -> Iterator[None]:
    """Servers of this process, in a thread with an event loop of its own."""
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    for server in servers:
        loop.run_until_complete(server.__aenter__())
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for server in reversed(servers):
            loop.run_until_complete(server.__aexit__(None, None, None))
        loop.close()


@contextlib.contextmanager
def silence(port: int = 0) -> Iterator[int]:
    """A port of `DEAD` that accepts no connection, because its backlog is full."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((DEAD, port), backlog=0))
        address = listening.getsockname()
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield address[1]
