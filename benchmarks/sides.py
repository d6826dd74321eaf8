"""The servers that are compared, each on loopback with its queue in a directory of its own.

All of them send everything to the same next hop. The relay and Postfix sync each message that they
accept, and do not examine content. There are two of Postfix: as it is installed, and with the
settings of its tuning guide for a busy host: as many processes and connections to a destination as
the relay may have, no limit of sessions for each client, no inflow delay. Which is the faster one
depends on the scenario: many processes are in each other's way where one sender waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.hops import DEAD, HOP_NAME, NextHop
from benchmarks.scenarios import Beside, Client, Scenario
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.queue_id import new_queue_id
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage
from tests.rigs.ports import accepts_connections, free_port, wait_until
from tests.rigs.postfix import postfix
from tests.rigs.relay import relay_process

__all__ = [
    "AS_INSTALLED",
    "Code",
    "Side",
    "deferred_message",
    "one_of_many",
    "postfix_side",
    "relay_side",
    "start_sides",
]

AS_INSTALLED = "Postfix as installed"

_ROOT = Path(__file__).parents[1]
_QUEUED = 100_000


@dataclass(frozen=True)
class Side:
    """A running server: its port, and the process that is the parent of all others."""

    name: str
    port: int
    root: int


@dataclass(frozen=True)
class Code:
    """A tree of the relay's code, and an interpreter that has the libraries it needs."""

    python: str
    tree: Path


@contextlib.contextmanager
def start_sides(directory: Path, scenario: Scenario, hop: NextHop) -> Iterator[Sequence[Side]]:
    """Start all servers that a scenario compares."""
    with contextlib.ExitStack() as stack:
        fetching = "tests.rigs.policy_relay", str(hop.policy_port)
        program = fetching if scenario.beside is Beside.NO_POLICY else ("relay",)
        first = relay_side(directory / "relay", scenario, hop, program=program)
        sides = [stack.enter_context(first)]
        match scenario.beside:
            case Beside.POSTFIX:
                two = relay_side(
                    directory / "relay2", scenario, hop, name="relay, 2 workers", workers=2
                )
                sides.append(stack.enter_context(two))
                sides.append(stack.enter_context(postfix_side(directory, scenario, hop)))
                if scenario.client is Client.LOCKSTEP:
                    installed = postfix_side(directory, scenario, hop, name=AS_INSTALLED)
                    sides.append(stack.enter_context(installed))
            case Beside.FULL_QUEUE:
                asyncio.run(_fill(directory / "full/spool"))
                full = relay_side(directory / "full", scenario, hop, name=scenario.beside)
                sides.append(stack.enter_context(full))
            case Beside.NO_SYNC:
                program = ("benchmarks.undurable",)
                careless = relay_side(
                    directory / "off", scenario, hop, name=scenario.beside, program=program
                )
                sides.append(stack.enter_context(careless))
            case Beside.NO_POLICY:
                free = relay_side(
                    directory / "free", scenario, hop, name=scenario.beside, mta_sts="ignore"
                )
                sides.append(stack.enter_context(free))
            case Beside.LIBRARIES:
                sides.append(stack.enter_context(_libraries(hop)))
        yield sides


@contextlib.contextmanager
def relay_side(
    directory: Path,
    scenario: Scenario,
    hop: NextHop,
    *,
    name: str = "relay",
    program: tuple[str, ...] = ("relay",),
    workers: int = 1,
    mta_sts: str = "enforce",
    queue: Mapping[str, str] | None = None,
    code: Code | None = None,
) -> Iterator[Side]:
    """A relay; `queue`: that section of its configuration, if it is not in its directory; `code`:
    another one than this checkout's.
    """
    directory.mkdir(exist_ok=True)
    sections: dict[str, Any] = {
        "limits": {"connections": 2000, "connections_per_client": 2000},
        "delivery": {
            "concurrency": max(scenario.concurrency, 200),
            "concurrency_per_destination": scenario.concurrency,
            "timeouts": {"connect": "5s"},
        },
    }
    routes: dict[str, Any] = {"*": {"host": f"[{hop.address}]", "port": hop.port}}
    for number in range(scenario.dead):
        routes[f"d{number}.example"] = {"host": f"[{DEAD}]", "port": hop.dead_port}
    if scenario.tls_out:
        routes["*"] = {"host": HOP_NAME, "port": hop.port}
        sections["policy"] = {"default": {"require_tls": True}, "mta_sts": mta_sts}
    started = relay_process(
        directory,
        dns=hop.dns,
        ca_file=hop.ca_file,
        start=False,
        program=program,
        routes=routes,
        **sections,
    )
    with started as relay:
        relay.config["workers"] = workers
        if code is not None:
            relay.python, relay.environment = code.python, {"PYTHONPATH": str(code.tree)}
        if queue is not None:
            relay.config["queue"] = dict(queue)
        if scenario.tls_in:
            relay.config["listeners"][0] |= {"tls": "starttls", "certificate": str(hop.certificate)}
        relay.start(seconds=60)
        wait_until(lambda: "ready: " in relay.stderr, what="the relay")
        yield Side(name, relay.port, relay.pid)
        relay.stop()


@contextlib.contextmanager
def postfix_side(
    directory: Path, scenario: Scenario, hop: NextHop, *, name: str = "Postfix"
) -> Iterator[Side]:
    """A Postfix: as it is installed, or, under its shorter name, set up for a busy host."""
    port = free_port()
    settings = {
        "relayhost": f"[{hop.address}]:{hop.port}",
        "smtpd_relay_restrictions": "permit_mynetworks, reject",
        "disable_dns_lookups": "yes",
    }
    if name != AS_INSTALLED:
        settings |= {
            "default_process_limit": str(max(scenario.concurrency, 200)),
            "default_destination_concurrency_limit": str(scenario.concurrency),
            "initial_destination_concurrency": "20",
            "smtpd_client_connection_count_limit": "0",
            "in_flow_delay": "0",
            "smtp_connect_timeout": "5s",
            "smtputf8_enable": "no",
        }
    if scenario.dead:
        table = directory / "transport"
        table.write_text(
            "".join(
                f"d{number}.example smtp:[{DEAD}]:{hop.dead_port}\n"
                for number in range(scenario.dead)
            )
        )
        settings["transport_maps"] = f"texthash:{table}"
    if scenario.tls_out:
        settings |= {
            "smtp_tls_security_level": "secure",
            "smtp_tls_secure_cert_match": HOP_NAME,
            "smtp_tls_CAfile": str(hop.ca_file),
            "smtp_tls_session_cache_database": "btree:{dir}/data/smtp_scache",
            "smtp_tls_connection_reuse": "yes",
        }
    if scenario.tls_in:
        settings |= {
            "smtpd_tls_security_level": "may",
            "smtpd_tls_chain_files": str(hop.certificate),
        }
    with postfix(settings, port=port, parent=str(directory)) as running:
        pid = int((running.directory / "queue/pid/master.pid").read_text().split()[0])
        yield Side(name, port, pid)


@contextlib.contextmanager
def _libraries(hop: NextHop) -> Iterator[Side]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.bare", str(port), hop.address, str(hop.port)]
    process = subprocess.Popen(command, cwd=_ROOT)
    try:
        wait_until(lambda: accepts_connections("127.0.0.1", port), what="the libraries")
        yield Side(Beside.LIBRARIES, port, process.pid)
    finally:
        process.kill()
        process.wait()


async def _fill(path: Path) -> None:
    """Fill a queue with deferred messages that are not due yet."""
    store = await SqliteStore.open(path, synchronous="OFF")
    for first in range(0, _QUEUED, 1000):
        await asyncio.gather(*(store.accept(one_of_many(first + number)) for number in range(1000)))
    await store.close()


def one_of_many(number: int) -> NewMessage:
    """A deferred message for one of a thousand domains, due in two hours."""
    due = datetime.now(UTC) + timedelta(hours=2)
    return deferred_message(f"later{number % 1000}.example", due=due)


def deferred_message(domain: str, *, due: datetime) -> NewMessage:
    """A message of 1 KB that was tried in vain, and will be tried again when it is due."""
    now = datetime.now(UTC)
    settings = TlsSettings(Setting(False, Source.DEFAULT), Setting(False, Source.DEFAULT))
    content = b"Subject: later\r\n\r\n" + b"z" * 1000
    message = QueuedMessage(
        new_queue_id(now), "a@client.example", now, len(content), MessageSummary()
    )
    recipient = QueuedRecipient(
        0, f"b@{domain}", domain, settings, state=State.DEFERRED, next_attempt=due
    )
    return NewMessage(message, (recipient,), content)
