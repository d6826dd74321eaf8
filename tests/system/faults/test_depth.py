"""Many messages for a host that is dead: nobody else notices, whatever their number."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, tokens
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink

pytestmark = [pytest.mark.needs("smtp-source"), pytest.mark.torture]

DEAD = {"host": "[127.0.0.31]", "port": 9}


def rss(pid: int) -> int:
    """The memory a process has now, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmRSS")


def fill(relay: Relay, count: int) -> float:
    """So many messages for the dead host; how many of them a second."""
    began = time.monotonic()
    subprocess.run(
        [
            *("smtp-source", "-s", "20", "-m", str(count), "-l", "1024"),
            *("-f", "a@client.example", "-t", "b@dead.example", f"127.0.0.1:{relay.port}"),
        ],
        check=True,
        timeout=patient(900),
    )
    return count / (time.monotonic() - began)


def latency(relay: Relay, mx: Sink, *, count: int = 15) -> float:
    """Milliseconds from handing in a message to its arrival elsewhere: the median of some."""
    seconds = []
    for _ in range(count):
        ledger = Ledger()
        began = time.monotonic()
        ledger.hand_in(relay, tokens(1))
        while not mx.tokens(ledger.accepted):
            assert time.monotonic() - began < 20, f"not delivered: {ledger.texts}"
            time.sleep(0.0005)
        seconds.append(time.monotonic() - began)
        mx.contents.clear()
    return statistics.median(seconds) * 1000


def start_seconds(relay: Relay) -> float:
    began = time.monotonic()
    relay.start(seconds=120)
    return time.monotonic() - began


@pytest.mark.timeout(3000)
def test_mail_for_a_dead_host_does_not_slow_other_mail(
    tmp_path: Path, mx: Sink, long_form: bool
) -> None:
    total, step = (100_000, 10_000) if long_form else (3_000, 1_000)
    routes: dict[str, Any] = {"dead.example": DEAD, **mx.route}
    with relay_process(tmp_path, routes=routes, limits={"connections_per_client": 200}) as relay:
        latency(relay, mx, count=5)
        empty = {"rss": rss(relay.pid), "latency": latency(relay, mx)}
        relay.stop()
        empty["start"] = start_seconds(relay)
        rates = [fill(relay, step) for _ in range(total // step)]
        full = {"rss": rss(relay.pid), "latency": latency(relay, mx)}
        relay.kill()
        full["start"] = start_seconds(relay)
        again = {"rss": rss(relay.pid), "latency": latency(relay, mx)}
        began = time.monotonic()
        assert relay.run("queue", "list", "--json").stdout.count('"queue-id"') == total
        list_seconds = time.monotonic() - began
        sys.stderr.write(
            f"\n{total} for a dead host: taken in at {rates[0]:.0f}/s first, {rates[-1]:.0f}/s last"
            f" (all: {' '.join(f'{rate:.0f}' for rate in rates)})\n"
            f"  memory {empty['rss']} MiB empty, {full['rss']} MiB full, {again['rss']} MiB after"
            " a start\n"
            f"  to another domain {empty['latency']:.1f} ms empty, {full['latency']:.1f} ms full,"
            f" {again['latency']:.1f} ms after a start\n"
            f"  start {empty['start']:.2f} s empty, {full['start']:.2f} s full; list"
            f" {list_seconds:.1f} s\n"
        )
        assert rates[-1] > rates[0] / 2
        assert full["rss"] - empty["rss"] < 100
        assert full["latency"] < 3 * empty["latency"] + 20
        assert again["latency"] < 3 * empty["latency"] + 20
        assert full["start"] < empty["start"] + (10 if long_form else 2)


def test_mail_for_a_dead_host_leaves_when_it_is_back(tmp_path: Path, mx: Sink) -> None:
    """With as few attempts meanwhile as it takes to see that it is dead."""
    routes: dict[str, Any] = {"dead.example": DEAD}
    with relay_process(tmp_path, routes=routes, queue={"retry": ["2s"]}) as relay:
        fill(relay, 500)
        wait_until(lambda: relay.events(event="failed"), what="an attempt")
        assert len(relay.events(event="failed")) < 100
        relay.stop()
        relay.config["routes"] = mx.route
        relay.start()
        wait_until(lambda: len(mx.contents) == 500, seconds=60, what="all of them arriving")
