"""The metrics of the queue: what they say, and when they say nothing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from relay.daemon.measuring import QueuedMail
from relay.queue.entry import State
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import SpoolError
from relay.report.gauges import Snapshot
from relay.report.metrics import Metrics
from tests.fakes.queued import NOW, new_message, opened

AN_HOUR = timedelta(hours=1)


async def test_age_is_of_the_oldest_message_and_grows_though_the_count_stands(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        queued = QueuedMail(store, stands_for=AN_HOUR)
        await store.accept(new_message(arrived=NOW))
        counts, age = await queued.get(NOW + AN_HOUR)
        assert (counts["queued"], age) == (1, 3600.0)
        await store.accept(new_message(arrived=NOW))
        counts, age = await queued.get(NOW + 2 * AN_HOUR)
        assert (counts["queued"], age) == (1, 7200.0)


async def test_empty_queue_has_no_age(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        counts, age = await QueuedMail(store, stands_for=timedelta(0)).get(NOW)
        assert not any(counts.values())
        assert age == 0.0


async def test_queue_that_cannot_be_read_has_no_values_and_leaves_the_other_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(store: SqliteStore) -> dict[State, int]:
        raise SpoolError("the server is away")

    async with opened(tmp_path) as store:
        monkeypatch.setattr(SqliteStore, "counts", fails)
        counts, age = await QueuedMail(store, stands_for=AN_HOUR).get(NOW)
    text = Metrics().render(Snapshot(queue=counts, oldest_seconds=age, in_flight=3)).decode()
    assert "relay_queue_oldest_seconds" not in text
    assert 'relay_queue_messages{state="queued"}' not in text
    assert "relay_deliveries_in_flight 3.0" in text
