"""A queue of a million beside an empty one: what each costs.

`make bench ARGS=million`, or `python -m benchmarks million [--shrink N] [--directory D]`.

Of the messages nine tenths are for one domain whose host is dead, and a tenth for another; all of
them were tried and failed, and they come due over the next hour, as after a long outage. Disk, the
time of a start, memory, 4 KiB mail for a host that is well (in turns, the empty queue first), the
first page of `relay queue list`, the web pages, and the removal of one domain's mail are measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher

from benchmarks.hops import DEAD, NextHop, next_hop
from benchmarks.meter import cpu_seconds, memory_bytes
from benchmarks.run import run
from benchmarks.scenarios import SCENARIOS
from benchmarks.sides import Side, deferred_message
from relay.queue.sqlite.store import SqliteStore
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process

__all__ = ["measure"]

_DEAD_DOMAIN, _OTHER_DOMAIN = "dead.example", "other.example"
_MESSAGES = 1_000_000
_AT_ONCE = 1000
_SENT = 3000
_SENT_AT_LEAST = 60
_SHOWN = 40
_ROUNDS = 3
_HOUR = timedelta(hours=1)
_PASSWORD = "a password for this run"
_PAGES = (
    "/",
    "/log",
    "/queue",
    "/queue?all",
    f"/queue?domain={_DEAD_DOMAIN}",
    f"/queue?domain={_OTHER_DOMAIN}",
    "/queue?sender=absent@client.example",
    f"/destination/{_DEAD_DOMAIN}",
    "/report",
    "/health",
)


def measure(parent: Path, *, shrink: int = 1) -> None:
    """Fill, start, measure, print. `parent`: a directory on the disk to be measured; `shrink`:
    divides the numbers of messages.
    """
    messages = _MESSAGES // shrink
    scenario = replace(SCENARIOS[0], messages=max(_SENT // shrink, _SENT_AT_LEAST))
    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-", dir=parent))
        )
        directory.chmod(0o755)
        hop = stack.enter_context(next_hop(directory, scenario))
        began = time.monotonic()
        asyncio.run(_fill(directory / "full/spool", messages))
        _say("filled", f"{time.monotonic() - began:.0f} s, without syncs")
        octets = sum(path.stat().st_size for path in (directory / "full/spool").rglob("*"))
        _say("disk a message", f"{octets / messages:.0f} octets")
        empty = stack.enter_context(_started(directory / "empty", hop))
        full = stack.enter_context(_started(directory / "full", hop))
        rates: dict[str, list[float]] = {}
        replies: dict[str, list[float]] = {}
        for _ in range(_ROUNDS):
            for name, relay in (("empty", empty), ("full", full)):
                result = run(scenario, Side(name, relay.port, relay.pid), hop)
                rates.setdefault(name, []).append(result.rate)
                replies.setdefault(name, []).append(result.messages / result.intake_seconds)
        for what, by_name in (("end to end", rates), ("intake", replies)):
            one, million = (statistics.median(by_name[name]) for name in ("empty", "full"))
            _say(what, f"{one:.0f}/s empty, {million:.0f}/s full, {million / one:.2f}")
        for name, relay in (("empty", empty), ("full", full)):
            _say(f"memory afterwards, {name}", f"{memory_bytes(relay.pid) / 2**20:.0f} MiB")
        _first_lines(full)
        _first_lines(full, "--domain", _OTHER_DOMAIN)
        _pages(full)
        _remove(full)


async def _fill(path: Path, messages: int) -> None:
    store = await SqliteStore.open(path, synchronous="OFF")
    now = datetime.now(UTC)
    for first in range(0, messages, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, messages))
        await asyncio.gather(
            *(
                store.accept(
                    deferred_message(
                        _OTHER_DOMAIN if number % 10 == 0 else _DEAD_DOMAIN,
                        due=now + number * _HOUR / messages + timedelta(minutes=3),
                    )
                )
                for number in numbers
            )
        )
    await store.close()


@contextlib.contextmanager
def _started(directory: Path, hop: NextHop) -> Iterator[Relay]:
    """A relay with its page; says how long its start took, and its memory."""
    directory.mkdir(exist_ok=True)
    hashed = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(_PASSWORD)
    admin: dict[str, Any] = {
        "socket": "relay.sock",
        "http": f"127.0.0.1:{free_port()}",
        "web": {"users": {"olga": {"password": hashed, "role": "operator"}}},
    }
    dead = {"host": f"[{DEAD}]", "port": hop.dead_port}
    with relay_process(
        directory,
        dns=hop.dns,
        start=False,
        admin=admin,
        limits={"connections": 2000, "connections_per_client": 2000},
        delivery={"timeouts": {"connect": "5s"}},
        routes={
            "*": {"host": f"[{hop.address}]", "port": hop.port},
            _DEAD_DOMAIN: dead,
            _OTHER_DOMAIN: dead,
        },
    ) as relay:
        began = time.monotonic()
        relay.start(seconds=120)
        wait_until(lambda: "ready: " in relay.stderr, what="the relay")
        took = time.monotonic() - began
        _say(f"start, {directory.name}", f"{took:.2f} s, {memory_bytes(relay.pid) / 2**20:.0f} MiB")
        yield relay
        relay.stop()


def _first_lines(relay: Relay, *filters: str) -> None:
    """What `relay queue list | head` takes, the start of the program included."""
    began = time.monotonic()
    with relay.begin("queue", "list", *filters) as command:
        assert command.stdout is not None
        first = [command.stdout.readline() for _ in range(_SHOWN)]
        took = time.monotonic() - began
        command.stdout.close()
    assert all(first), f"{len(first)} lines"
    _say(" ".join(("relay queue list", *filters)), f"{took:.2f} s to line {_SHOWN}")


def _remove(relay: Relay) -> None:
    began, cpu = time.monotonic(), cpu_seconds(relay.pid)
    answer = relay.run("queue", "remove", "--domain", _OTHER_DOMAIN, "--yes")
    took = time.monotonic() - began
    assert not answer.returncode, answer.stderr
    cpu = cpu_seconds(relay.pid) - cpu
    said = answer.stdout.strip()
    _say(f"remove --domain {_OTHER_DOMAIN}", f"{took:.2f} s, {cpu:.2f} s of CPU: {said}")


def _pages(relay: Relay) -> None:
    base = f"http://{relay.config['admin']['http']}"
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    form = urllib.parse.urlencode({"name": "olga", "password": _PASSWORD}).encode()
    opener.open(f"{base}/login", form, timeout=30).read()
    for page in _PAGES:
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            opener.open(base + page, timeout=60).read(1)
            seconds.append(time.monotonic() - began)
        _say(f"page {page}", f"{1000 * statistics.median(seconds):.0f} ms")


def _say(what: str, value: str) -> None:
    print(f"{what:48} {value}", flush=True)
