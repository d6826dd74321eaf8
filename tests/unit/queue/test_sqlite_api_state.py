"""What the HTTP interface keeps, in the queue of a relay that does not run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.queue.api_state import DomainSettings
from relay.queue.sqlite.reader import StoppedQueue
from relay.queue.sqlite.store import SqliteStore
from tests.fakes.mail import ARRIVED


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "spool", now=ARRIVED, synchronous="OFF")
    yield opened
    await opened.close()


async def test_domain_settings_are_read_from_a_stopped_queue(store, tmp_path):
    assert await store.api_state.domain_settings() == {}
    await store.api_state.set_domain_settings("a.example", DomainSettings(require_tls=True))
    both = await store.api_state.set_domain_settings(
        "a.example", DomainSettings(skip_verification=False)
    )
    assert both == DomainSettings(True, False)
    await store.close()
    async with await StoppedQueue.open(tmp_path / "spool") as stopped:
        assert await stopped.domain_settings() == {"a.example": DomainSettings(True, False)}
