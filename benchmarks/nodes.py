"""Several nodes with one queue on PostgreSQL, beside one relay with its queue in a directory:
`make bench ARGS=nodes`.

The server is on the same cores and the same disk, as it is installed. Each group of nodes has a
database of its own on it. All groups take part in turn in every round; the first round warms up.

    standing   4 KiB over 20 standing sessions a node: SQLite, 1, 2 and 3 nodes
    series     one sender in series: SQLite and 1 node
    full       1 node with an empty queue, with 100,000 deferred messages, and with as many dead
               rows as 10 minutes of 500 messages a second leave behind a foreign transaction that
               does not end: nothing may be vacuumed
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import asyncpg

from benchmarks.hops import NextHop, next_hop
from benchmarks.meter import cpu_seconds
from benchmarks.scenarios import Client, Scenario
from benchmarks.sides import Side, one_of_many, relay_side
from relay.queue.batch import Rows
from tests.rigs.ports import free_port
from tests.rigs.postgres import Postgres, program

__all__ = ["PARTS", "about", "measure_nodes", "postgres_on_disk", "table"]

PARTS = ("standing", "series", "full")

_DEFERRED = 100_000
_DEAD = 300_000
_CHUNK = 10_000
_SESSIONS = 20

_STANDING = Scenario(
    "nodes", "4 KiB over 20 standing sessions a node", 3000, client=Client.LOCKSTEP
)
_SERIES = replace(_STANDING, title="4 KiB, one sender in series", messages=300, sessions=1)
_FULL = replace(_STANDING, title="4 KiB over 20 standing sessions", messages=2000)


@dataclass(frozen=True)
class Group:
    """Nodes that share a queue; `database` is empty where that is a directory."""

    name: str
    nodes: Sequence[Side]
    database: str = ""


@dataclass(frozen=True)
class Measured:
    """One run. CPU is in seconds for 1,000 messages; so are commits and the octets of the
    write-ahead log, of the group's database and of the whole server.
    """

    group: str
    rate: float
    relay_cpu: float
    server_cpu: float = float("nan")
    commits: float = float("nan")
    log_bytes: float = float("nan")


@dataclass(frozen=True)
class _Bench:
    """What all groups have in common."""

    directory: Path
    hop: NextHop
    server: Postgres
    shrink: int
    """The numbers of messages are divided by this."""
    is_smoke: bool

    def messages(self, scenario: Scenario) -> int:
        return max(scenario.messages // self.shrink, 20)

    def rows(self, count: int) -> int:
        return count // 200 if self.is_smoke else count


def measure_nodes(
    directory: Path,
    *,
    parts: Collection[str],
    rounds: int,
    shrink: int,
    is_smoke: bool,
    until: float,
) -> list[tuple[Scenario, list[Measured]]]:
    """These of `PARTS`, in a directory on the disk to be measured; no round begins after `until`
    but the first two of each part.
    """
    found: list[tuple[Scenario, list[Measured]]] = []
    with next_hop(directory, _STANDING) as hop, postgres_on_disk(directory) as server:
        bench = _Bench(directory, hop, server, shrink, is_smoke)
        if not {"standing", "series"}.isdisjoint(parts):
            found += _beside_files(bench, parts, rounds, until)
        if "full" in parts:
            found.append((_FULL, _full(bench, rounds, until)))
    return found


def _beside_files(
    bench: _Bench, parts: Collection[str], rounds: int, until: float
) -> list[tuple[Scenario, list[Measured]]]:
    found = []
    with contextlib.ExitStack() as stack:
        few = [stack.enter_context(_in_directory(bench)), stack.enter_context(_nodes(bench, 1))]
        if "standing" in parts:
            more = [stack.enter_context(_nodes(bench, count)) for count in (2, 3)]
            found.append((_STANDING, _rounds(bench, _STANDING, [*few, *more], rounds, until)))
        if "series" in parts:
            found.append((_SERIES, _rounds(bench, _SERIES, few, rounds, until)))
    return found


def _full(bench: _Bench, rounds: int, until: float) -> list[Measured]:
    server = bench.server
    with contextlib.ExitStack() as stack:
        empty = stack.enter_context(_nodes(bench, 1, "empty queue"))
        full = stack.enter_context(_nodes(bench, 1, "100,000 deferred"))
        held = stack.enter_context(_nodes(bench, 1, "nothing vacuumed"))
        asyncio.run(_defer(server, full.database, bench.rows(_DEFERRED)))
        stack.enter_context(_transaction_held(server, held.database))
        asyncio.run(_leave_dead(server, held.database, bench.rows(_DEAD)))
        return _rounds(bench, _FULL, [empty, full, held], rounds, until)


def _rounds(
    bench: _Bench, scenario: Scenario, groups: Sequence[Group], rounds: int, until: float
) -> list[Measured]:
    """All groups in turn, as often as there are rounds; the first warms up."""
    found: list[Measured] = []
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            break
        for group in groups:
            measured = _run(bench, scenario, group)
            print(f"{scenario.title:40} {_line(measured)}", flush=True)
            if number:
                found.append(measured)
    return found


def _run(bench: _Bench, scenario: Scenario, group: Group) -> Measured:
    messages = bench.messages(scenario)
    if scenario.sessions > 1:
        scenario = replace(scenario, sessions=_SESSIONS * len(group.nodes))
    before, relay, server = _counters(bench, group), _relay_cpu(group), _server_cpu(bench)
    ports = [node.port for node in group.nodes]
    seconds, intake = bench.hop.send(scenario, ports, messages)
    _settle(group)
    relay, server = _relay_cpu(group) - relay, _server_cpu(bench) - server
    # Who sends in series waits for the 250, and not for the delivery.
    rate = messages / (intake if scenario.sessions == 1 else seconds)
    each = 1000 / messages
    if not group.database:
        return Measured(group.name, rate, relay * each)
    commits, log_bytes = (
        after - start for start, after in zip(before, _counters(bench, group), strict=True)
    )
    return Measured(group.name, rate, relay * each, server * each, commits * each, log_bytes * each)


def _relay_cpu(group: Group) -> float:
    return sum(cpu_seconds(node.root) for node in group.nodes)


def _server_cpu(bench: _Bench) -> float:
    process = bench.server.process
    assert process is not None
    return cpu_seconds(process.pid)


def _counters(bench: _Bench, group: Group) -> tuple[float, float]:
    """Commits of the group's mail, and octets of the server's write-ahead log, so far."""
    if not group.database:
        return 0.0, 0.0
    found = bench.server.sql(
        "SELECT sum(last), pg_current_wal_lsn() - '0/0' FROM"
        " (SELECT max(n) AS last FROM relay.batch GROUP BY lease) AS leases",
        group.database,
    )
    commits, octets = found.split("|")
    return float(commits or 0), float(octets)


def _settle(group: Group) -> None:
    """Wait until the nodes have recorded their deliveries: that is part of a message's cost."""
    for _ in range(20):
        used = _relay_cpu(group)
        time.sleep(0.25)
        if _relay_cpu(group) - used < 0.03:
            return


# --- what takes part ------------------------------------------------------------------------------


@contextlib.contextmanager
def postgres_on_disk(parent: Path) -> Iterator[Postgres]:
    """A server as it is installed, with its files below a directory."""
    directory = parent / "postgres"
    directory.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["chown", "postgres:", str(directory)], check=True)
    settings = {"shared_buffers": "128MB"}
    server = Postgres(directory, free_port(), settings)
    server.make()
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _in_directory(bench: _Bench) -> Iterator[Group]:
    with relay_side(bench.directory / "sqlite", _STANDING, bench.hop) as side:
        yield Group("SQLite", [side])


@contextlib.contextmanager
def _nodes(bench: _Bench, count: int, name: str = "") -> Iterator[Group]:
    """So many nodes, with a database of their own."""
    name = name or f"{count} node{'s' * (count > 1)}"
    database = "".join(letter if letter.isalnum() else "_" for letter in name)
    database = f"q_{database}"
    bench.server.sql(f"CREATE DATABASE {database}")
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                relay_side(
                    bench.directory / f"{database}-{number}",
                    _STANDING,
                    bench.hop,
                    name=f"{name}, {number}",
                    queue={"url": bench.server.url(database), "node": f"n{number}"},
                )
            )
            for number in range(count)
        ]
        yield Group(name, nodes, database)


async def _defer(server: Postgres, database: str, count: int) -> None:
    """Fill a queue with messages that are due later, of a thousand domains."""
    rows = Rows()
    rows.add_message(one_of_many(0), claimed=(), in_file=False)
    [(_, arrived, size, recipients, _, sender, data, content)] = rows.messages
    [(_, _, _, state, place, due, recipient)] = rows.recipients
    db = await _connect(server, database)
    try:
        await db.execute(
            """INSERT INTO relay.message
            SELECT 'later' || n, $2::bigint + n, $3, $4, false, $5, $6, $7
            FROM generate_series(1, $1::integer) AS n""",
            *(count, arrived, size, recipients, sender, data, content),
        )
        await db.execute(
            """INSERT INTO relay.recipient (queue_id, idx, domain, state, place, due, data)
            SELECT 'later' || n, 0, 'later' || n % 1000 || '.example', $2, $3, $4::bigint + n, $5
            FROM generate_series(1, $1::integer) AS n""",
            *(count, state, place, due, recipient),
        )
        await db.execute("ANALYZE")
    finally:
        await db.close()


async def _leave_dead(server: Postgres, database: str, count: int) -> None:
    """Take messages in and out again, claimed by the node there, as it does with new mail."""
    rows = Rows()
    rows.add_message(one_of_many(0), claimed=(), in_file=False)
    [(_, arrived, size, recipients, _, sender, data, _)] = rows.messages
    [(_, _, domain, _, _, due, recipient)] = rows.recipients
    db = await _connect(server, database)
    try:
        lease = await db.fetchval("SELECT max(id) FROM relay.lease")
        for first in range(0, count, _CHUNK):
            async with db.transaction():
                await db.execute(
                    """INSERT INTO relay.message
                    SELECT 'dead' || n, $3, $4, $5, false, $6, $7, 'x'
                    FROM generate_series($1::integer, $2::integer) AS n""",
                    *(first, first + _CHUNK, arrived, size, recipients, sender, data),
                )
                await db.execute(
                    """INSERT INTO relay.recipient
                    SELECT 'dead' || n, 0, $3, 0, 2, $4, $5, $6
                    FROM generate_series($1::integer, $2::integer) AS n""",
                    *(first, first + _CHUNK, domain, due, lease, recipient),
                )
                await db.execute("DELETE FROM relay.recipient WHERE queue_id LIKE 'dead%'")
                await db.execute("DELETE FROM relay.message WHERE queue_id LIKE 'dead%'")
    finally:
        await db.close()


async def _connect(server: Postgres, database: str) -> asyncpg.Connection:
    return await asyncpg.connect(server.url(database))


@contextlib.contextmanager
def _transaction_held(server: Postgres, database: str) -> Iterator[None]:
    """A transaction that has read something, and does not end."""
    psql = [program("psql") or "psql", "--no-psqlrc", "--quiet", "--tuples-only"]
    address = [f"--host={server.directory}", f"--port={server.port}", "--username=relay"]
    process = subprocess.Popen(
        [*psql, *address, f"--dbname={database}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(
        b"BEGIN ISOLATION LEVEL REPEATABLE READ;\nSELECT version FROM relay.meta;\n"
    )
    process.stdin.flush()
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


# --- the table ------------------------------------------------------------------------------------


def _line(one: Measured) -> str:
    server = (
        f"  PostgreSQL {one.server_cpu:5.2f}  {one.commits:5.0f} commits/1000"
        f"  {one.log_bytes / 1e6:5.1f} MB log/1000"
    )
    text = f"{one.group:18} {one.rate:7.0f}/s  relay {one.relay_cpu:5.2f} CPU s/1000"
    return text + (server if one.server_cpu == one.server_cpu else "")


def table(found: Sequence[tuple[Scenario, Sequence[Measured]]]) -> str:
    """Medians in Markdown; each ratio is to the first line of its table."""
    parts = []
    for scenario, measured in found:
        head = (
            f"| {scenario.title} | messages/s | ratio | wanted | relay's CPU s/1000 | ratio"
            " | wanted | PostgreSQL's | wanted | commits/1000 | log, MB/1000 |"
        )
        rows = [head, "|---" + "|---:" * 10 + "|"]
        names = list(dict.fromkeys(one.group for one in measured))
        first = [one for one in measured if one.group == names[0]]
        for name in names:
            rows.append(_row(scenario, [one for one in measured if one.group == name], first))
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _row(scenario: Scenario, mine: Sequence[Measured], first: Sequence[Measured]) -> str:
    name = mine[0].group

    def of(value: Callable[[Measured], float], those: Sequence[Measured] = mine) -> float:
        return statistics.median(value(one) for one in those)

    rate, cpu = of(lambda one: one.rate), of(lambda one: one.relay_cpu)
    is_node = of(lambda one: one.server_cpu) == of(lambda one: one.server_cpu)
    compares = mine is not first and name != first[0].group
    rate_ratio = rate / of(lambda one: one.rate, first)
    cpu_ratio = cpu / of(lambda one: one.relay_cpu, first)
    cells = [
        name,
        f"{rate:.0f}",
        f"{rate_ratio:.2f}" if compares else "",
        _WANTED_RATE.get((scenario.title, name), ""),
        f"{cpu:.2f}",
        f"{cpu_ratio:.2f}" if compares else "",
        "≤ 1.25" if scenario is _STANDING and name == "1 node" else "",
        f"{of(lambda one: one.server_cpu):.2f}" if is_node else "",
        "≤ 0.25" if scenario is _STANDING and name == "1 node" else "",
        f"{of(lambda one: one.commits):.0f}" if is_node else "",
        f"{of(lambda one: one.log_bytes) / 1e6:.1f}" if is_node else "",
    ]
    return f"| {' | '.join(cells)} |"


_WANTED_RATE = {
    (_STANDING.title, "1 node"): "≥ 0.6",
    (_STANDING.title, "3 nodes"): "≥ 0.9 of 1 node",
    (_SERIES.title, "1 node"): "≥ 0.4",
    (_FULL.title, "100,000 deferred"): "≥ 0.8",
    (_FULL.title, "nothing vacuumed"): "≥ 0.7",
}


def about(load: float) -> str:
    """When and where."""
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M}, {os.cpu_count()} cores, which the nodes, the server"
        f" and the load generator share; {load:.1f} of them busy with other work before."
    )
