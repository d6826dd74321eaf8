"""One run of one scenario on one side, timed until the next hop has every message."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hops import NextHop
from benchmarks.meter import counted_syncs, cpu_seconds, peak_memory
from benchmarks.scenarios import Client, Scenario
from benchmarks.sides import Side

__all__ = ["Result", "hand_in", "run"]

_ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.02
_PATIENCE = 60.0


@dataclass(frozen=True)
class Result:
    """The result of one run.

    `seconds`: until the next hop had every message; `intake_seconds`: until the client's last 250.
    `peak_bytes`, `syncs`: only of a metered run. Its times do not count: to count syncs, and to add
    up the memory of two hundred processes, takes time of the side that has them.
    """

    scenario: str
    side: str
    messages: int
    copies: int
    seconds: float
    intake_seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None
    syncs: int | None = None
    is_metered: bool = False
    most_at_once: int = 0
    reply_seconds: list[float] = field(default_factory=list)
    arrival_seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Copies a second, end to end."""
        return self.copies / self.seconds

    @property
    def cpu_per_thousand(self) -> float:
        """CPU seconds per 1,000 copies."""
        return 1000 * self.cpu_seconds / self.copies

    @property
    def syncs_per_thousand(self) -> float:
        """Syncs per 1,000 messages; not a number where they were not counted."""
        return float("nan") if self.syncs is None else 1000 * self.syncs / self.messages


def run(
    scenario: Scenario, side: Side, hop: NextHop, *, messages: int = 0, metered: bool = False
) -> Result:
    """Do one run; AssertionError where some messages do not arrive in time."""
    messages = messages or scenario.messages
    copies = scenario.copies * messages // scenario.messages
    hop.report()
    before = hop.taken()
    with contextlib.ExitStack() as stack:
        syncs = stack.enter_context(counted_syncs(side.root)) if metered else None
        memory = stack.enter_context(peak_memory(side.root)) if metered else None
        began, cpu = time.monotonic(), cpu_seconds(side.root)
        reply_seconds: list[float] = []
        if scenario.client is Client.LOCKSTEP:
            seconds, intake = hop.send(scenario, [side.port], messages)
        else:
            reply_seconds = hand_in(scenario, side, messages)
            intake = time.monotonic() - began
            while hop.taken() - before < copies:
                if time.monotonic() - began > _PATIENCE:
                    raise AssertionError(f"{side.name}: {hop.taken() - before} of {copies} arrived")
                time.sleep(_POLL_SECONDS)
            seconds = time.monotonic() - began
        _settle(side)
        cpu = cpu_seconds(side.root) - cpu
    told = hop.report()
    return Result(
        scenario=scenario.name,
        side=side.name,
        messages=messages,
        copies=copies,
        seconds=seconds,
        intake_seconds=intake,
        cpu_seconds=cpu,
        peak_bytes=memory.peak if memory is not None else None,
        syncs=syncs.count if syncs is not None else None,
        is_metered=metered,
        most_at_once=told["most"],
        reply_seconds=reply_seconds,
        arrival_seconds=told["seconds"],
    )


def _settle(side: Side) -> None:
    """Wait until the side has recorded its deliveries, which belong to the cost of a message."""
    while True:
        used = cpu_seconds(side.root)
        time.sleep(0.25)
        if cpu_seconds(side.root) - used < 0.02:
            return


def hand_in(scenario: Scenario, side: Side, messages: int) -> list[float]:
    """Send so many messages. Returns the seconds to each 250, if the client measures them."""
    if scenario.client is Client.OWN:
        return _own_client(scenario, side, messages)
    if scenario.domains == 1:
        _wait_for([_source(scenario, side, messages, f"b@d{scenario.dead}.example")])
        return []
    share = messages // scenario.domains
    _wait_for(
        [
            _source(scenario, side, share, f"b@d{number}.example")
            for number in range(scenario.domains)
        ]
    )
    return []


def _source(
    scenario: Scenario, side: Side, messages: int, recipient: str
) -> subprocess.Popen[bytes]:
    sessions = max(scenario.sessions // scenario.domains, 1)
    command = ["smtp-source", "-s", str(sessions), "-m", str(messages), "-l", str(scenario.size)]
    command += ["-f", "a@client.example", "-t", recipient, "-M", "client.example"]
    command += ["-d"] if scenario.standing else []
    command += ["-r", str(scenario.recipients)] if scenario.recipients > 1 else []
    return subprocess.Popen([*command, f"127.0.0.1:{side.port}"], stderr=subprocess.PIPE)


def _wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _, said = process.communicate(timeout=_PATIENCE)
        assert process.returncode == 0, said.decode()


def _own_client(scenario: Scenario, side: Side, messages: int) -> list[float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.client",
        str(side.port),
        "--messages",
        str(messages),
    ]
    command += [
        "--sessions",
        str(scenario.sessions),
        "--size",
        str(scenario.size),
        "--rate",
        str(scenario.rate),
    ]
    command += ["--tls", "--each", "10"] if scenario.tls_in else []
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, timeout=_PATIENCE, check=False)
    assert done.returncode == 0, done.stderr.decode()
    seconds: list[float] = json.loads(done.stdout)
    return seconds
