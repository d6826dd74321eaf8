"""The bounds of the statistics in SQLite, and that a queue taken over brings its own along."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from relay.mail.event import Event
from relay.queue import statistics
from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.store import SqliteStore
from relay.queue.statistics import OTHER, CountFilter
from tests.contract.store.test_statistics import DAY, _event, _write
from tests.fakes.queued import NOW, opened

LATER = NOW + timedelta(hours=1)


def _of(recipient: str) -> CountFilter:
    return CountFilter(DAY.begin, DAY.end, recipient_domain=recipient)


async def test_beyond_the_bound_of_pairs_the_rest_is_counted_as_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "PAIRS_AN_HOUR", 3)
    async with opened(tmp_path) as store:
        await _write(store, *(_event(n, recipient=f"{n}.example") for n in range(2)))
    async with opened(tmp_path) as store:  # the bound holds over a start
        await _write(store, *(_event(n, recipient=f"{n}.example") for n in range(9)))
        await _write(store, _event(20, at=LATER, recipient="8.example"))
        assert [one.number for one in await store.count_mail(_of("0.example"))] == [2]
        assert [one.number for one in await store.count_mail(_of(OTHER))] == [6]
        assert [one.first for one in await store.count_mail(_of("8.example"))] == [LATER]
        assert [one.number for one in await store.count_mail(DAY)] == [12]


async def test_sums_of_sender_domains_are_made_of_what_a_queue_of_the_version_before_counted(
    tmp_path: Path,
) -> None:
    sender = replace(DAY, sender_domain="a.example")
    async with opened(tmp_path) as store:
        await _write(store, *(_event(n, recipient=f"{n}.example") for n in range(3)))
        await store._write(
            lambda db: (
                db.execute(
                    "DELETE FROM statistic WHERE recipient_domain = '' AND sender_domain > ''"
                )
                and db.execute("PRAGMA user_version = 8")
            )
        )
    async with opened(tmp_path) as store:
        await _write(store, _event(9, recipient="9.example"))
        assert sum(one.number for one in await store.count_mail(sender)) == 4
        assert sum(one.number for one in await store.count_mail(DAY)) == 4


async def test_beyond_the_bound_exceptions_are_counted_and_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "EXCEPTIONS_AN_HOUR", 4)
    monkeypatch.setattr(statistics, "EXCEPTIONS_OF_PAIR", 3)
    async with opened(tmp_path) as store:
        for recipient in ("b.example", "c.example"):
            events = (_event(n, recipient=recipient, exception="why") for n in range(100, 110))
            await _write(store, *(_renamed(event, recipient) for event in events))
        assert len(await store.find_exceptions(_of("b.example"))) == 3
        assert len(await store.find_exceptions(_of("c.example"))) == 1
        assert [one.number for one in await store.count_mail(DAY)] == [20]


def _renamed(event: Event, recipient: str) -> Event:
    return replace(event, id=f"{event.id}.{recipient}")


async def test_statistics_of_a_worker_that_is_no_more_are_added(tmp_path: Path) -> None:
    for path in (tmp_path / "worker-1", tmp_path):
        async with opened(path) as store:
            await _write(store, _renamed(_event(1, exception="why"), path.name))
    found = orphans(tmp_path, "worker-", present=())
    store = await SqliteStore.open(tmp_path, now=NOW, synchronous="OFF", adopting=found)
    try:
        assert [one.number for one in await store.count_mail(DAY)] == [2]
        assert len(await store.find_exceptions(DAY)) == 2
    finally:
        await store.close()
