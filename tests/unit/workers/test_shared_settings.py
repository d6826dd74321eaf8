"""What the first worker tells the others arrives whole, and with the next message."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from relay.admin.domain_settings import SettingsElsewhere, SettingsInForce
from relay.policy.rules import PolicyRules, TlsRule
from relay.queue.api_state import DomainSettings, Webhook
from relay.queue.sqlite.store import SqliteStore
from relay.workers.shared_settings import CAPACITY_BYTES, SharedSettings

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
RULES = PolicyRules()


def test_shared_settings_are_those_that_were_told_last():
    shared = SharedSettings()
    assert shared.read() is None
    for number, text in enumerate((b"a long text", b"short", b""), 1):
        shared.tell(text)
        assert shared.read() == (number, text)
    with pytest.raises(ValueError, match="more than workers can share"):
        shared.tell(b"x" * (CAPACITY_BYTES + 1))


def test_settings_are_not_read_while_they_change():
    shared = SharedSettings()
    shared.tell(b"whole")
    shared._memory[12:14] = b"??"
    assert shared.read() is None


def test_another_process_reads_the_shared_settings():
    shared = SharedSettings()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reading, 1)
        os._exit(0 if shared.read() == (1, b"told after the fork") else 1)
    shared.tell(b"told after the fork")
    os.write(writing, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_settings_of_the_first_worker_are_in_force_at_the_others_with_the_next_message(
    tmp_path: Path,
):
    store = await SqliteStore.open(tmp_path / "spool", now=NOW, synchronous="OFF")
    shared = SharedSettings()
    first, other = SettingsInForce(store.api_state, shared), SettingsElsewhere(shared)
    assert other.over(RULES).overlay == {}
    await store.api_state.set_domain_settings(
        "before.example", DomainSettings(skip_verification=True)
    )
    await first.load()
    assert other.over(RULES).overlay == {"before.example": TlsRule(None, True)}
    await first.set("a.example", DomainSettings(require_tls=True))
    assert other.over(RULES).overlay == first.over(RULES).overlay
    assert other.over(RULES) is other.over(RULES), "put together once"
    await store.api_state.set_webhook("a.example", "delivered", ["https://hooks.example"])
    await first.tell()
    assert other.webhooks() == [Webhook("a.example", "delivered", ("https://hooks.example",))]
    assert other.webhooks() is other.webhooks()
    await store.close()
