"""An hour at half load: `make bench ARGS=soak`, or `ARGS="soak minutes=N"`.

The relay gets the mail of `benchmarks.mixture`: new destinations all the time, slow and dead ones.
First the mixture is sent as fast as it goes; half that rate is then offered evenly until the end.
Mail for dead hosts is tried every minute and returned after three, so that the queue is as long
after five minutes as at the end. What differs then has grown.

Each minute is a line: what the relay holds, and how long its replies took, and its deliveries to
hosts that are well. At the end minute 5 (or the middle of a shorter run) and the last minute stand
side by side.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.hops import DEAD, OwnSink, own_sink, serving, silence
from benchmarks.meter import cpu_seconds, tree
from benchmarks.mixture import DEAD_ZONES, ZONES, arriving
from benchmarks.report import table
from relay.sandbox.dns import DnsServer
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process

__all__ = ["Minute", "comparison", "reference", "soak"]

_ROOT = Path(__file__).parents[1]
_SESSIONS = 20
_WARM_UP = 1000
_CALIBRATION = 3000
_PATIENCE = 300.0
_REFERENCE = 5
"""The minute that the last one is compared with."""


@dataclass(frozen=True)
class Minute:
    """What the relay held at the end of a minute, and how it did in it.

    `events_each`: rows in the event table for each message so far; the table itself grows until
    `log.keep_events` is reached.
    """

    rss_mib: float
    handles: int
    threads: int
    wal_mib: float
    queued: int
    events: int
    events_each: float
    cpu_per_thousand: float
    reply_p50_ms: float
    reply_p99_ms: float
    delivery_p50_ms: float
    delivery_p99_ms: float


_TITLES = {
    "rss_mib": "resident memory, MiB",
    "handles": "file handles",
    "threads": "threads",
    "wal_mib": "write-ahead log, MiB",
    "queued": "messages in the queue",
    "events": "rows in the event table",
    "events_each": "the same, for each message so far",
    "cpu_per_thousand": "CPU s/1000",
    "reply_p50_ms": "250, ms: p50",
    "reply_p99_ms": "250, ms: p99",
    "delivery_p50_ms": "delivery, ms: p50",
    "delivery_p99_ms": "delivery, ms: p99",
}


def reference(minutes: int) -> int:
    """Which minute the last one is compared with, counted from 1."""
    return min(_REFERENCE, max(minutes // 2, 1))


def comparison(minutes: Sequence[Minute]) -> str:
    """That minute and the last one, in Markdown."""
    number = reference(len(minutes))
    early, late = minutes[number - 1], minutes[-1]
    rows = []
    for field in fields(Minute):
        before, after = float(getattr(early, field.name)), float(getattr(late, field.name))
        ratio = f"{after / before:.2f}" if before else ""
        rows.append([_TITLES[field.name], f"{before:.5g}", f"{after:.5g}", ratio])
    return table(["", f"minute {number}", f"minute {len(minutes)}", "ratio"], rows)


def soak(directory: Path, minutes: int) -> list[Minute]:
    """One value for each minute; each one is printed as it ends."""
    with _started(directory) as (relay, sinks):
        _send(relay, first=0, messages=_WARM_UP)
        _wait_for(sinks, arriving(range(_WARM_UP)))
        rate = _half_rate(relay, sinks)
        print(f"offered: {rate:.0f} messages a second, for {minutes} minutes", flush=True)
        found = []
        sent = _WARM_UP + _CALIBRATION
        each = max(round(60 * rate), 100)
        for number in range(1, minutes + 1):
            sinks[0].report()  # what arrived before this minute does not count
            cpu = cpu_seconds(relay.pid)
            replies = _send(relay, first=sent, messages=each, rate=rate)
            sent += each
            arrivals = sinks[0].report()["seconds"]
            cpu = cpu_seconds(relay.pid) - cpu
            one = _looked_at(relay, sent, 1000 * cpu / each, replies, arrivals)
            print(f"minute {number:3}  {_line(one)}", flush=True)
            found.append(one)
        relay.stop()
        return found


def _half_rate(relay: Relay, sinks: Sequence[OwnSink]) -> float:
    before, began = _arrived(sinks), time.monotonic()
    _send(relay, first=_WARM_UP, messages=_CALIBRATION)
    _wait_for(sinks, before + arriving(range(_WARM_UP, _WARM_UP + _CALIBRATION)))
    return _CALIBRATION / (time.monotonic() - began) / 2


def _arrived(sinks: Sequence[OwnSink]) -> int:
    return sum(sink.taken() for sink in sinks)


def _wait_for(sinks: Sequence[OwnSink], messages: int) -> None:
    wait_until(
        lambda: _arrived(sinks) >= messages,
        seconds=_PATIENCE,
        what=f"the arrival of {messages} messages",
    )


def _send(relay: Relay, *, first: int, messages: int, rate: float = 0.0) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.client", str(relay.port)]
    command += ["--messages", str(messages), "--sessions", str(_SESSIONS)]
    command += ["--mixture", str(first), "--rate", str(rate)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _looked_at(
    relay: Relay,
    sent: int,
    cpu_per_thousand: float,
    replies: Sequence[float],
    arrivals: Sequence[float],
) -> Minute:
    pids = tree(relay.pid)
    queued, events = _rows(relay.directory / "spool/queue.db")
    return Minute(
        sum(_status(pid, "VmRSS") for pid in pids) / 1024,
        sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        sum(_status(pid, "Threads") for pid in pids),
        (relay.directory / "spool/queue.db-wal").stat().st_size / 2**20,
        queued,
        events,
        events / sent,
        cpu_per_thousand,
        *_percentiles(replies),
        *_percentiles(arrivals),
    )


def _status(pid: int, key: str) -> int:
    """A number of /proc/PID/status; memory is in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1])


def _rows(database: Path) -> tuple[int, int]:
    """Messages in the queue, and events. The connection only reads, as all but the relay's must."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        [queued] = db.execute("SELECT count(*) FROM message").fetchone()
        [events] = db.execute("SELECT count(*) FROM event").fetchone()
    return queued, events


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return 1000 * cuts[49], 1000 * cuts[98]


def _line(one: Minute) -> str:
    return (
        f"{one.rss_mib:6.1f} MiB {one.handles:4} handles {one.threads:3} threads"
        f"  WAL {one.wal_mib:5.1f} MiB {one.queued:6} queued {one.events:8} events"
        f" {one.cpu_per_thousand:5.2f} CPU s/1000"
        f"  250: {one.reply_p50_ms:.1f} {one.reply_p99_ms:.1f} ms"
        f"  delivery: {one.delivery_p50_ms:.1f} {one.delivery_p99_ms:.1f} ms"
    )


@contextlib.contextmanager
def _started(directory: Path) -> Iterator[tuple[Relay, Sequence[OwnSink]]]:
    """A relay, and next hops that count: those that are well, and one that takes 0.2 s a reply. Two
    dead ones do not count, and neither does the one that gets the reports on their mail.
    """
    wells = [f"127.0.34.{number + 1}" for number in range(ZONES)]
    slow, refusing, sender = "127.0.35.1", "127.0.36.1", "127.0.37.1"
    port = free_port(wells[0])
    dns = DnsServer()
    for number, address in enumerate(wells):
        dns.a(f"*.new{number}.example", address)
    dns.a("*.known.example", wells[0])
    dns.a("client.example", sender)
    dns.a("*.slow.example", slow)
    for zone, address in zip(DEAD_ZONES, (DEAD, refusing), strict=True):
        dns.a(f"*.{zone}.example", address)
    with (
        serving(dns),
        silence(port),
        own_sink(wells, port) as well,
        own_sink([slow], port, delay=0.2) as late,
        own_sink([sender], port),
        relay_process(
            directory,
            dns=dns.nameserver,
            delivery_port=port,
            start=False,
            limits={"connections": 2000, "connections_per_client": 2000},
            delivery={"timeouts": {"connect": "5s"}},
            queue={"retry": ["1m"], "lifetime": "3m", "warn_after": "never"},
        ) as relay,
    ):
        relay.start()
        wait_until(lambda: "ready: " in relay.stderr, what="the relay")
        yield relay, (well, late)
