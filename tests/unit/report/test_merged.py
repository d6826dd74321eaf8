"""The metrics of several workers, told as those of one relay."""

from __future__ import annotations

from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from relay.report.gauges import Snapshot
from relay.report.merged import merged
from relay.report.metrics import Metrics


def _text(accepted: int, *, oldest: float, free: int) -> bytes:
    metrics = Metrics()
    for _ in range(accepted):
        metrics.accepted("smtp", 100, 0.002)
    snapshot = Snapshot(
        version="1.2.3",
        queue={"queued": accepted},
        oldest_seconds=oldest,
        spool_free_bytes=free,
        connections={"127.0.0.1:25": 3},
        reloaded=datetime(2030, 1, 1, tzinfo=UTC),
    )
    return metrics.render(snapshot)


def _samples(text: bytes) -> dict[tuple[str, str], float]:
    return {
        (
            sample.name,
            ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "version"),
        ): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counters_of_workers_add_up_and_a_maximum_stays_a_maximum() -> None:
    found = _samples(merged([_text(3, oldest=10, free=900), _text(4, oldest=70, free=1000)]))
    assert found["relay_messages_accepted_total", "origin=smtp"] == 7
    assert found["relay_accepted_bytes_total", ""] == 700
    assert found["relay_queue_messages", "state=queued"] == 7
    assert found["relay_client_connections", "listener=127.0.0.1:25"] == 6
    assert found["relay_queue_oldest_seconds", ""] == 70
    assert found["relay_spool_free_bytes", ""] == 900
    assert found["relay_info", ""] == 1
    assert found["relay_store_commit_seconds_count", "operation=accept"] == 7
    assert found["relay_store_commit_seconds_bucket", "le=0.0025,operation=accept"] == 7


def test_every_series_of_one_worker_is_there_with_one_as_with_two() -> None:
    text = _text(3, oldest=10, free=900)
    assert set(_samples(merged([text]))) == set(_samples(text))
    assert _samples(merged([text]))["relay_delivery_seconds_count", ""] == 0
