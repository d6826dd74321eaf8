"""Counts what the relay does, and writes the numbers for Prometheus.

Each worker has a `Metrics`. Its methods only add numbers, so a call costs about a microsecond.
`render` makes the text when Prometheus asks, with a `Snapshot` of the present state (`gauges`).

Labels are words of the relay or of its configuration, never of a peer, so that no stranger can add
series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from relay.mail.memory import DowngradeAlarm, Shown
from relay.mail.outcome import Deferred, PolicyResult, PolicyType
from relay.queue.entry import State
from relay.queue.settle import Change, Settlement
from relay.report.gauges import Snapshot, gauges

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_COMMIT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_SESSION = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_DELAY = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 86400, 5 * 86400)
_ROUTE = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)

_RESULTS = {
    State.DELIVERED: "delivered",
    State.DEFERRED: "deferred",
    State.BOUNCED: "bounced",
    State.EXPIRED: "expired",
}


class _Histogram:
    """Observations by upper bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """The cumulative buckets, in Prometheus' form."""
        total = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


class Metrics:
    """The numbers of one relay, from its start."""

    def __init__(self) -> None:
        self._accepted: dict[str, int] = defaultdict(int)
        self._accepted_bytes = 0
        self._deliveries: dict[tuple[State, bool | None, bool | None], int] = defaultdict(int)
        self._downgrades: dict[str, int] = defaultdict(int)
        self._unmet = 0
        self._dsns = 0
        self.results_refused = 0
        self._session = _Histogram(_SESSION)
        self._delay = _Histogram(_DELAY)
        self._commits = {"accept": _Histogram(_COMMIT), "result": _Histogram(_COMMIT)}
        self._route = _Histogram(_ROUTE)
        self._unrouted = 0
        self._sts_fetches: dict[str, int] = defaultdict(int)
        # Present from the start: Prometheus sees no increase in a counter that begins with 1.
        self._downgrade_alarms = {
            (before, now): 0 for before in Shown for now in Shown if now.rank < before.rank
        }
        self._policy_failures: dict[tuple[PolicyType, PolicyResult], int] = defaultdict(int)
        self._tls_reports = {
            (transport, result): 0
            for transport in ("mail", "https")
            for result in ("sent", "failed", "given-up")
        }
        self._token_requests: dict[tuple[str, str], int] = {}
        self._logins_refused: dict[str, int] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._collector = _Collector(self)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)

    @property
    def mean_commit_seconds(self) -> float | None:
        """The mean time until a result was committed and synced; None before the first."""
        histogram = self._commits["result"]
        count = sum(histogram.counts)
        return histogram.sum / count if count else None

    # --- counting ---------------------------------------------------------------------------------

    def accepted(self, origin: str, size_bytes: int, seconds: float) -> None:
        """A message was committed, after so many seconds in the store."""
        self._accepted[origin] += 1
        self._accepted_bytes += size_bytes
        self._commits["accept"].observe(seconds)

    def settled(self, settlement: Settlement, seconds: float) -> None:
        """The result of an attempt was committed."""
        self._commits["result"].observe(seconds)
        for change in settlement.changes:
            self._count_change(change, settlement)

    def refused(self, count: int) -> None:
        """So many results are not recorded, since another node has the message."""
        self.results_refused += count

    def reported(self, count: int) -> None:
        """So many DSNs were queued."""
        self._dsns += count

    def routed(self, seconds: float, *, found: bool) -> None:
        """A domain's mail hosts were looked up."""
        self._route.observe(seconds)
        if not found:
            self._unrouted += 1

    def policy_fetched(self, result: str) -> None:
        """A fetch of an MTA-STS policy has ended: "ok", or its failure's type (RFC 8460 §4.3)."""
        self._sts_fetches[result] += 1

    def downgrade_alarm(self, alarm: DowngradeAlarm) -> None:
        """A host shows less TLS than before."""
        self._downgrade_alarms[alarm.before, alarm.now] += 1

    def tls_report(self, transport: str, result: str) -> None:
        """A report on TLS was tried by "mail" or "https": "sent", "failed" or "given-up"."""
        self._tls_reports[transport, result] += 1

    def expect_logins(self, sources: Iterable[str], next_hops: Iterable[str]) -> None:
        """The configuration has these `oauth2` and next hops: their counters begin with 0."""
        for name in sources:
            for result in ("granted", "refused", "unavailable"):
                self._token_requests.setdefault((name, result), 0)
        for name in next_hops:
            self._logins_refused.setdefault(name, 0)

    def token_request(self, name: str, result: str) -> None:
        """A token was asked for: "granted", "refused" or "unavailable"."""
        self._token_requests[name, result] = self._token_requests.get((name, result), 0) + 1

    def login_refused(self, next_hop: str) -> None:
        """A next hop refused the relay's login."""
        self._logins_refused[next_hop] = self._logins_refused.get(next_hop, 0) + 1

    def _count_change(self, change: Change, settlement: Settlement) -> None:
        state, session = change.recipient.state, change.outcome.session
        policy = session.policy if session is not None else change.outcome.policy
        if policy is not None and policy.result is not None:
            self._policy_failures[policy.type, policy.result] += 1
        if session is None:
            self._deliveries[state, None, None] += 1
        else:
            self._deliveries[state, session.tls, session.certificate_verified] += 1
            self._session.observe(session.seconds)
            if session.downgrade is not None:
                self._downgrades[session.downgrade.reason.value] += 1
        if state is State.DELIVERED:
            self._delay.observe((settlement.at - settlement.entry.message.arrived).total_seconds())
        elif isinstance(change.outcome, Deferred) and change.outcome.tls_unmet:
            self._unmet += 1

    # --- the text for Prometheus ------------------------------------------------------------------

    def render(self, snapshot: Snapshot) -> bytes:
        """Everything, in Prometheus' text format."""
        self._collector.snapshot = snapshot
        return generate_latest(self._registry)

    def counters(self) -> Iterator[Metric]:
        """All that was counted."""
        yield from self._mail_counters()
        yield from self._tls_counters()
        yield from self._histograms()

    def _mail_counters(self) -> Iterator[Metric]:
        text = "Messages taken responsibility for."
        yield _counter("relay_messages_accepted", text, "origin", self._accepted)
        text = "Octets of content accepted."
        yield CounterMetricFamily("relay_accepted_bytes", text, value=self._accepted_bytes)
        yield _counter_by(
            "relay_deliveries",
            "Attempts by their result, one for each recipient; tls and verified are empty where no "
            "session took place.",
            ("result", "tls", "verified"),
            (
                ((_RESULTS.get(state, "other"), _truth(tls), _truth(verified)), count)
                for (state, tls, verified), count in self._deliveries.items()
            ),
        )
        text = "Delivery status notifications queued."
        yield CounterMetricFamily("relay_dsns", text, value=self._dsns)
        text = "Results that are not recorded, since another node has or had the message."
        yield CounterMetricFamily("relay_results_refused", text, value=self.results_refused)
        text = "Lookups that found no host to try."
        yield CounterMetricFamily("relay_routes_failed", text, value=self._unrouted)

    def _tls_counters(self) -> Iterator[Metric]:
        text = "Attempts made in clear after TLS was tried."
        yield _counter("relay_tls_downgrades", text, "reason", self._downgrades)
        text = "Attempts in which no host could give the TLS that was required."
        yield CounterMetricFamily("relay_tls_unmet", text, value=self._unmet)
        text = "Fetches of MTA-STS policies by their result."
        yield _counter("relay_sts_fetches", text, "result", self._sts_fetches)
        yield _counter_by(
            "relay_policy_failures",
            "Attempts at hosts that failed what the recipient's domain asks for, by TLSA records "
            "or by an MTA-STS policy, enforced or not; one for each recipient.",
            ("policy", "result"),
            self._policy_failures.items(),
        )
        yield _counter_by(
            "relay_downgrade_alarms",
            "Hosts that showed less TLS than before, told once a day for each host and levels.",
            ("before", "now"),
            self._downgrade_alarms.items(),
        )
        yield _counter_by(
            "relay_tls_reports",
            "Reports on TLS (RFC 8460) by transport and result of each try.",
            ("transport", "result"),
            self._tls_reports.items(),
        )
        yield _counter_by(
            "relay_token_requests",
            "Requests for access tokens (OAuth 2.0) by what came of them; refused: until a person "
            "corrects something, no mail goes with this login.",
            ("oauth2", "result"),
            self._token_requests.items(),
        )
        yield _counter(
            "relay_logins_refused",
            "Logins that a next hop refused: password or token are wrong.",
            "next_hop",
            self._logins_refused,
        )

    def _histograms(self) -> Iterator[Metric]:
        yield _histogram("relay_delivery_seconds", "From the connect to the answer.", self._session)
        yield _histogram("relay_delay_seconds", "From acceptance to delivery.", self._delay)
        text = "Until it was committed and synced."
        commits = HistogramMetricFamily("relay_store_commit_seconds", text, labels=("operation",))
        for operation, histogram in self._commits.items():
            commits.add_metric((operation,), histogram.buckets(), histogram.sum)
        yield commits
        text = "Finding a domain's hosts: DNS, or its cache."
        yield _histogram("relay_route_seconds", text, self._route)


class _Collector(Collector):
    """The counters and the latest snapshot, for the registry of `prometheus_client`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.snapshot = Snapshot()

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics.counters()
        yield from gauges(self.snapshot)


def _truth(truth: bool | None) -> str:
    return "" if truth is None else "true" if truth else "false"


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    return _counter_by(name, text, (label,), (((value,), count) for value, count in counts.items()))


def _counter_by(
    name: str, text: str, labels: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]
) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in sorted(counts):
        family.add_metric(values, count)
    return family


def _histogram(name: str, text: str, histogram: _Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.sum)
