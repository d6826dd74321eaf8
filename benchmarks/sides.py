"""The two that are measured, each a server of its own on loopback with its spool in a directory of its own.

Both hand everything on to the same next hop, sync what they answer for, and look into no content. Postfix is
given what its tuning guide gives a busy host: as many processes and connections to a destination as
the relay may make, no limit of sessions a client, no inflow delay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hops import DEAD, HOP_NAME, NextHop
from benchmarks.scenarios import Scenario
from tests.rigs.ports import free_port
from tests.rigs.postfix import postfix
from tests.rigs.relay import relay_process

__all__ = ["Side", "postfix_side", "relay_side"]




@dataclass(frozen=True)
class Side:
    """A running server: where it listens, and the process above all of its own."""

    name: str
    port: int
    root: int


@contextlib.contextmanager
def relay_side(
    directory: Path, scenario: Scenario, hop: NextHop, *, program: tuple[str, ...] = ("relay",), workers: int = 1
) -> Iterator[Side]:
    """A relay. `program`: the module to run, for a launcher that is not the product."""
    sections: dict[str, Any] = {
        "limits": {"connections": 2000, "connections_per_client": 2000},
        "delivery": {
            "concurrency": max(scenario.concurrency, 200),
            "concurrency_per_destination": scenario.concurrency,
            "timeouts": {"connect": "5s"},
        },
        "admin": {"http": "127.0.0.1:" + str(free_port())},
    }
    routes: dict[str, Any] = {"*": {"host": f"[{hop.address}]", "port": hop.port}}
    for number in range(scenario.dead):
        routes[f"d{number}.example"] = {"host": f"[{DEAD}]", "port": hop.dead_port}
    if scenario.tls_out:
        routes["*"] = {"host": HOP_NAME, "port": hop.port}
        sections["policy"] = {"default": {"require_tls": True}}
    with relay_process(directory, dns=hop.dns, ca_file=hop.ca_file, start=False, routes=routes, **sections) as relay:
        relay.program = program
        relay.config["workers"] = workers
        if scenario.tls_in:
            relay.config["listeners"][0] |= {"tls": "starttls", "certificate": str(hop.certificate)}
        relay.start()
        yield Side("relay", relay.port, relay.pid)
        relay.stop()


@contextlib.contextmanager
def postfix_side(directory: Path, scenario: Scenario, hop: NextHop) -> Iterator[Side]:
    """A Postfix."""
    port = free_port()
    settings = {
        "relayhost": f"[{hop.address}]:{hop.port}",
        "default_process_limit": str(max(scenario.concurrency, 200)),
        "default_destination_concurrency_limit": str(scenario.concurrency),
        "initial_destination_concurrency": "20",
        "smtpd_client_connection_count_limit": "0",
        "smtpd_relay_restrictions": "permit_mynetworks, reject",
        "in_flow_delay": "0",
        "smtp_connect_timeout": "5s",
        "disable_dns_lookups": "yes",
        "smtputf8_enable": "no",
    }
    if scenario.dead:
        table = directory / "transport"
        table.write_text(
            "".join(f"d{number}.example smtp:[{DEAD}]:{hop.dead_port}\n" for number in range(scenario.dead))
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
        settings |= {"smtpd_tls_security_level": "may", "smtpd_tls_chain_files": str(hop.certificate)}
    with postfix(settings, port=port, parent=str(directory)) as running:
        pid = int((running.directory / "queue/pid/master.pid").read_text().split()[0])
        yield Side("Postfix", port, pid)


