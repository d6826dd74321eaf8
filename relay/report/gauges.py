"""The present state of a worker as numbers for Prometheus; `metrics` has what was counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from relay.queue.nodes import DatabaseState


@dataclass(frozen=True, slots=True)
class NextHopNow:
    """A next hop at the moment: its connections, idle ones too, and how many messages wait for one,
    or for its rate.
    """

    connections: int = 0
    waiting_for_connection: int = 0
    waiting_for_rate: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The present state. Ages are seconds, 0 where there is nothing."""

    version: str = ""
    queue: Mapping[str, int] = field(default_factory=dict)
    """Recipients by state."""
    oldest_seconds: float | None = 0.0
    """None, as an empty `queue`, where the queue cannot be read."""
    connections: Mapping[str, int] = field(default_factory=dict)
    """Clients connected, by listener."""
    in_flight: int = 0
    kept_connections: int = 0
    silent_destinations: int = 0
    next_hops: Mapping[str, NextHopNow] = field(default_factory=dict)
    """The operator's next hops that have had mail, by name."""
    log_lag_events: int = 0
    log_in_trouble: bool = False
    auth_failures: int = 0
    spool_free_bytes: int = 0
    certificates: Mapping[str, datetime] = field(default_factory=dict)
    """When each certificate of the relay expires, by file."""
    reloaded: datetime | None = None
    """When the configuration was last taken over, at the start or by a reload."""
    reload_failed: bool = False
    database: DatabaseState | None = None
    """Where several nodes share the queue, and its database answers."""


def gauges(now: Snapshot) -> Iterator[Metric]:
    """The present state, for Prometheus."""
    yield InfoMetricFamily("relay", "The program.", value={"version": now.version})
    text = "Recipients that wait for a message, by state."
    yield _gauge("relay_queue_messages", text, "state", now.queue)
    text = "Clients connected, by listener."
    yield _gauge("relay_client_connections", text, "listener", now.connections)
    text = "Connections to a next hop of the configuration, with idle ones."
    hops = now.next_hops
    connections = {name: one.connections for name, one in hops.items()}
    yield _gauge("relay_next_hop_connections", text, "next_hop", connections)
    text = "Messages that wait for a connection to a next hop of the configuration."
    waiting = {name: one.waiting_for_connection for name, one in hops.items()}
    yield _gauge("relay_next_hop_waiting_for_connection", text, "next_hop", waiting)
    text = "Messages that wait because of the rate of a next hop."
    waiting = {name: one.waiting_for_rate for name, one in hops.items()}
    yield _gauge("relay_next_hop_waiting_for_rate", text, "next_hop", waiting)
    yield CounterMetricFamily("relay_auth_failures", "Wrong passwords.", value=now.auth_failures)
    expiry = {path: at.timestamp() for path, at in now.certificates.items()}
    text = "When a certificate of the relay expires."
    yield _gauge("relay_certificate_expiry_timestamp_seconds", text, "file", expiry)
    reloaded = now.reloaded.timestamp() if now.reloaded else 0
    for name, text, value in (
        ("queue_oldest_seconds", "Age of the oldest message in the queue.", now.oldest_seconds),
        ("deliveries_in_flight", "Attempts under way.", now.in_flight),
        ("kept_connections", "Idle connections kept for the next message.", now.kept_connections),
        (
            "silent_destinations",
            "Domains that do not answer, and are not tried for a while.",
            now.silent_destinations,
        ),
        ("log_lag_events", "Events committed and not yet in the log's file.", now.log_lag_events),
        ("log_in_trouble", "1 while the delivery log cannot be written.", now.log_in_trouble),
        ("spool_free_bytes", "Room left where the queue is.", now.spool_free_bytes),
        (
            "config_reload_timestamp_seconds",
            "When the configuration was last taken over.",
            reloaded,
        ),
        (
            "config_reload_failed",
            "1 after a reload that kept the old configuration.",
            now.reload_failed,
        ),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"relay_{name}", text, value=float(value))
    yield from _database_gauges(now.database)


_OF_DATABASE = {
    "standby_lag_bytes": "Write-ahead log that the standby furthest behind has not synced.",
    "dead_rows": "Removed rows of the queue's tables that were not vacuumed yet.",
    "oldest_xmin_age_transactions": "Transactions begun since the oldest one whose view of the data"
    " is still kept.",
    "oldest_transaction_seconds": "How long the oldest transaction has been open.",
}


def _database_gauges(now: DatabaseState | None) -> Iterator[Metric]:
    """Of a queue that several nodes share; without a value for any other."""
    nodes: dict[str, float] = {}
    standbys: dict[str, float] = {}
    values: dict[str, float] = {}
    if now is not None:
        nodes = {"live": now.live, "lost": now.lost}
        standbys = {
            "synchronous": now.synchronous_standbys,
            "asynchronous": now.asynchronous_standbys,
        }
        values = {
            "standby_lag_bytes": now.standby_lag_bytes,
            "dead_rows": now.dead_rows,
            "oldest_xmin_age_transactions": now.oldest_xmin_age,
            "oldest_transaction_seconds": now.oldest_transaction_seconds,
        }
    text = "Nodes that share the queue; lost: another node has taken their mail over."
    yield _gauge("relay_nodes", text, "state", nodes)
    text = "Standbys of the queue's database that follow it, by whether a commit waits for them."
    yield _gauge("relay_database_standbys", text, "mode", standbys)
    for name, text in _OF_DATABASE.items():
        family = GaugeMetricFamily(f"relay_database_{name}", text, labels=())
        if name in values:
            family.add_metric((), values[name])
        yield family
    text = "Commits whose outcome had to be asked for."
    commits = CounterMetricFamily("relay_unknown_commits", text, labels=())
    if now is not None:
        commits.add_metric((), now.unknown_commits)
    yield commits


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family
