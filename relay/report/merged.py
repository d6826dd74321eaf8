"""Adds up the metrics of several workers as those of one relay. Pure.

Counters, histograms and most gauges are added. Of some gauges the worst value counts: the age of
the oldest message of any worker, the earliest expiry of a certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector, CollectorRegistry

_HIGHEST = frozenset(
    {
        "relay_queue_oldest_seconds",
        "relay_log_in_trouble",
        "relay_config_reload_failed",
        "relay_info",
        "relay_nodes",
        "relay_database_standbys",
        "relay_database_standby_lag_bytes",
        "relay_database_dead_rows",
        "relay_database_oldest_xmin_age_transactions",
        "relay_database_oldest_transaction_seconds",
    }
)
_LOWEST = frozenset(
    {
        "relay_spool_free_bytes",
        "relay_certificate_expiry_timestamp_seconds",
        "relay_config_reload_timestamp_seconds",
        "process_start_time_seconds",
        "process_max_fds",
    }
)

Key = tuple[str, tuple[tuple[str, str], ...]]


def merged(texts: Sequence[bytes]) -> bytes:
    """The texts of the workers as one, in Prometheus' format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Sum(texts))
    return generate_latest(registry)


class _Sum(Collector):
    def __init__(self, texts: Sequence[bytes]) -> None:
        self.texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, list[Metric]] = {}
        for text in self.texts:
            for family in text_string_to_metric_families(text.decode()):
                families.setdefault(family.name, []).append(family)
        for several in families.values():
            yield _one(several)


def _one(several: Sequence[Metric]) -> Metric:
    first = several[0]
    values: dict[Key, list[float]] = {}
    for family in several:
        for sample in family.samples:
            values.setdefault((sample.name, tuple(sample.labels.items())), []).append(sample.value)
    result = Metric(first.name, first.documentation, first.type)
    for (name, labels), numbers in values.items():
        result.add_sample(name, dict(labels), _together(name, numbers))
    return result


def _together(name: str, numbers: Iterable[float]) -> float:
    if name in _HIGHEST:
        return max(numbers)
    return min(numbers) if name in _LOWEST else sum(numbers)
