"""What is told to Prometheus: every attempt once, under the right words, and cheap."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay.mail.outcome import (
    Bounced,
    Deferred,
    Delivered,
    Downgrade,
    DowngradeReason,
    HopSession,
    Level,
    VerifiedBy,
)
from relay.queue.retry import RetrySchedule
from relay.queue.settle import Settlement, settle
from relay.report.gauges import NextHopNow, Snapshot
from relay.report.metrics import Metrics
from tests.fakes.mail import ARRIVED, entry

VERIFIED = HopSession(
    "mx1.dest.example", "192.0.2.7", tls=True, verified_by=VerifiedBy.PKIX, seconds=0.2
)
IN_CLEAR = HopSession(
    "mx1.dest.example",
    "192.0.2.7",
    tls=False,
    downgrade=Downgrade(Level.ENCRYPTED, DowngradeReason.HANDSHAKE_FAILED, "no\nreason"),
    seconds=3,
)


def settlement(outcome: Delivered | Deferred | Bounced, *, after: float = 2) -> Settlement:
    now = ARRIVED + timedelta(seconds=after)
    return settle(entry(), {0: outcome}, schedule=RetrySchedule(), now=now)


def told(metrics: Metrics, snapshot: Snapshot | None = None) -> dict[str, float]:
    """What Prometheus reads, by name and labels."""
    text = metrics.render(snapshot or Snapshot()).decode()
    return {
        sample.name + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_attempt_is_counted_by_its_result_and_by_how_it_was_protected() -> None:
    metrics = Metrics()
    metrics.settled(settlement(Delivered("2.0.0", 250, "ok", session=VERIFIED)), 0.001)
    metrics.settled(settlement(Delivered("2.0.0", 250, "ok", session=IN_CLEAR)), 0.001)
    metrics.settled(settlement(Bounced("5.1.1", 550, "no", session=IN_CLEAR)), 0.001)
    metrics.settled(settlement(Deferred("4.7.5", 0, "", tls_unmet=True)), 0.001)
    metrics.settled(settlement(Deferred("4.4.1", 680, ""), after=6 * 86400), 0.001)
    numbers = told(metrics)
    deliveries = {
        key.split(" ", 1)[1]: n
        for key, n in numbers.items()
        if key.startswith("relay_deliveries_t")
    }
    assert deliveries == {
        "result=delivered tls=true verified=true": 1,
        "result=delivered tls=false verified=false": 1,
        "result=bounced tls=false verified=false": 1,
        "result=deferred tls= verified=": 1,
        "result=expired tls= verified=": 1,
    }
    assert numbers["relay_tls_unmet_total"] == 1
    assert numbers["relay_tls_downgrades_total reason=handshake-failed"] == 2
    assert numbers["relay_store_commit_seconds_count operation=result"] == 5


def test_times_are_cumulative_histograms() -> None:
    metrics = Metrics()
    for seconds in (0.0001, 0.003, 0.003, 99):
        metrics.accepted("smtp", 1000, seconds)
    metrics.settled(settlement(Delivered("2.0.0", 250, "ok", session=VERIFIED), after=2), 0.001)
    numbers = told(metrics)
    assert numbers["relay_messages_accepted_total origin=smtp"] == 4
    assert numbers["relay_accepted_bytes_total"] == 4000
    commit = "relay_store_commit_seconds_bucket"
    assert numbers[f"{commit} le=0.0005 operation=accept"] == 1
    assert numbers[f"{commit} le=0.005 operation=accept"] == 3
    assert numbers[f"{commit} le=5 operation=accept"] == 3
    assert numbers[f"{commit} le=+Inf operation=accept"] == 4
    assert numbers["relay_delay_seconds_sum"] == pytest.approx(2)
    assert numbers["relay_delivery_seconds_sum"] == pytest.approx(0.2)


def test_gauges_are_reported() -> None:
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    snapshot = Snapshot(
        version="1.2",
        queue={"queued": 3, "deferred": 2, "held": 0},
        oldest_seconds=77,
        certificates={"/etc/relay/tls.pem": expires},
        auth_failures=4,
    )
    numbers = told(Metrics(), snapshot)
    assert numbers["relay_info version=1.2"] == 1
    assert numbers["relay_queue_messages state=deferred"] == 2
    assert numbers["relay_queue_oldest_seconds"] == 77
    assert numbers["relay_auth_failures_total"] == 4
    file = "relay_certificate_expiry_timestamp_seconds file=/etc/relay/tls.pem"
    assert numbers[file] == expires.timestamp()
    assert numbers["process_open_fds"] > 0


def test_next_hop_tells_its_connections_and_who_waits_for_what() -> None:
    hops = {"m365": NextHopNow(3, waiting_for_rate=20), "ses": NextHopNow(waiting_for_connection=1)}
    found = told(Metrics(), Snapshot(next_hops=hops))
    assert found["relay_next_hop_connections next_hop=m365"] == 3
    assert found["relay_next_hop_waiting_for_rate next_hop=m365"] == 20
    assert found["relay_next_hop_waiting_for_connection next_hop=m365"] == 0
    assert found["relay_next_hop_waiting_for_connection next_hop=ses"] == 1


def test_a_stranger_cannot_make_the_number_of_series_grow() -> None:
    metrics = Metrics()
    sizes = []
    for n in (1, 200):
        for i in range(n):
            session = replace(VERIFIED, mx_host=f"mx{i}.dest.example", tls_cipher=f"C{i}")
            metrics.settled(settlement(Delivered("2.0.0", 250, f"id {i}", session=session)), 0.001)
        sizes.append(len(told(metrics)))
    assert sizes[0] == sizes[1]


def test_metric_names_follow_the_convention_of_prometheus() -> None:
    text = Metrics().render(Snapshot()).decode()
    for name, kind in re.findall(r"^# TYPE (relay_\S+) (\S+)$", text, re.MULTILINE):
        assert kind != "counter" or name.endswith("_total"), name
        assert kind != "histogram" or name.endswith("_seconds"), name
        assert f"# HELP {name} " in text


def test_counting_a_message_costs_microseconds() -> None:
    metrics, done = Metrics(), settlement(Delivered("2.0.0", 250, "ok", session=VERIFIED))
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for _ in range(1000):
            metrics.accepted("smtp", 1000, 0.002)
            metrics.settled(done, 0.002)
        best = min(best, time.process_time() - began)
    assert best / 1000 < 20e-6, f"{best / 1000 * 1e6:.2f} µs a message"


def test_tries_of_reports_on_tls_are_counted_by_transport_and_result() -> None:
    metrics = Metrics()
    assert told(metrics)["relay_tls_reports_total result=sent transport=mail"] == 0
    metrics.tls_report("mail", "sent")
    metrics.tls_report("https", "given-up")
    counts = told(metrics)
    assert counts["relay_tls_reports_total result=sent transport=mail"] == 1
    assert counts["relay_tls_reports_total result=given-up transport=https"] == 1
    assert counts["relay_tls_reports_total result=failed transport=https"] == 0
