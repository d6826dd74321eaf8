"""A scheduler as the daemon puts it together, with what a test does not care about filled in."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from relay.deliver.options import DeliveryOptions
from relay.deliver.report_sender import REPORT_PATIENCE, ReportSender
from relay.deliver.runner import Attempts
from relay.deliver.scheduler import Scheduler
from relay.policy.rules import PolicyRules
from relay.queue.retry import RetrySchedule
from relay.queue.store import DeliveryQueue
from relay.report.metrics import Metrics


def make_scheduler(
    store: DeliveryQueue,
    attempts: Attempts,
    *,
    schedule: RetrySchedule,
    options: DeliveryOptions | None = None,
    rules: Callable[[], PolicyRules] = PolicyRules,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    report_patience: timedelta = REPORT_PATIENCE,
    metrics: Metrics | None = None,
    **settings: Any,
) -> Scheduler:
    """More settings are the scheduler's own."""
    reports = ReportSender(
        store,
        schedule=schedule,
        rules=rules,
        hostname="relay.example.net",
        clock=clock,
        patience=report_patience,
        metrics=metrics,
    )
    return Scheduler(
        store,
        attempts,
        reports,
        schedule=schedule,
        options=options or DeliveryOptions(),
        rules=rules,
        clock=clock,
        metrics=metrics,
        **settings,
    )
