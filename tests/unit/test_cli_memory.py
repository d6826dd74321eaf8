"""`relay memory` and `relay policy suggest`, of a relay that does not run."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from relay.cli import relay
from relay.deliver.memory import DowngradeMemory
from relay.mail.memory import DowngradeAlarm, Shown
from relay.queue.sqlite.memory import SqliteMemory
from relay.queue.sqlite.store import SqliteStore
from relay.route.memory import MemoryOptions

NONE, ENCRYPTED, VERIFIED = Shown
DAY = timedelta(days=1)
MX1 = "mx1.partner.example"
CONFIG = """hostname: relay.example.net
listeners: [{address: "127.0.0.1:0"}]
queue: {path: spool}
log: {delivery: delivery.log}
admin: {socket: s, http: null}
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`relay …` beside the spool of a relay that has seen some mail."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELAY_CONFIG", "relay.yaml")
    (tmp_path / "relay.yaml").write_text(CONFIG)
    asyncio.run(fill(tmp_path / "spool"))
    return lambda *arguments: CliRunner().invoke(relay, arguments, prog_name="relay")


async def fill(directory: Path) -> None:
    queue = await SqliteStore.open(directory)
    await queue.close()
    store = await SqliteMemory.open(directory)
    now = datetime.now(UTC)
    times = [now]
    memory = DowngradeMemory(store, MemoryOptions, clock=lambda: times[0])
    for domain, host, shown, messages in (
        ("partner.example", MX1, VERIFIED, 412),
        ("fair.example", "mx.fair.example", ENCRYPTED, 50),
        ("pinned.example", "mx.pinned.example", VERIFIED, 50),
        ("clear.example", "mx.clear.example", NONE, 50),
        ("alarm.example", "mx.alarm.example", VERIFIED, 50),
        ("123.example", "mx.123.example", VERIFIED, 50),
        ("new.example", "mx.new.example", VERIFIED, 1),
    ):
        for at in [now - 30 * DAY] * (messages > 1) + [now] * (messages - (messages > 1)):
            times[0] = at
            memory.learn(domain, host, shown, VERIFIED)
    times[0] = now
    alarm = DowngradeAlarm(VERIFIED, NONE, "mx.alarm.example", now)
    await memory.ring("alarm.example", alarm, host="new.alarm.example")
    await memory.write()
    await store.close()


def test_memory_of_a_stopped_relay_is_listed(run: Run) -> None:
    result = run("memory", "list", "partner.example")
    assert result.exit_code == 0, result.stderr
    expected = (
        r"partner\.example  412 messages without exception since 30d ago\n"
        r"    verified  mx1\.partner\.example  seen \d+s ago\n"
    )
    assert re.fullmatch(expected, result.stdout)
    lines = run("memory", "list", "--alarm").stdout.splitlines()
    assert lines[0].startswith("alarm.example  50 messages")
    assert lines[2].startswith("    alarm: a new host shows none, before it was verified; first ")
    assert len(json.loads(run("memory", "list", "--json").stdout)) == 7
    nothing = run("memory", "list", "--host", "mx9.example").stdout
    assert nothing == "Nothing is remembered, or nothing of it matches.\n"


def test_forgetting_says_what_it_would_forget_and_needs_to_be_told_what(run: Run) -> None:
    result = run("memory", "forget", "partner.example", "--dry-run")
    assert result.stdout.startswith("partner.example  412 messages")
    assert result.stdout.endswith("Nothing was forgotten.\n")
    for arguments in (
        ["forget"],
        ["forget", ""],
        ["forget", "--host", ""],
        ["forget", "a", "--all"],
    ):
        assert run("memory", *arguments).exit_code == 2
    stopped = run("memory", "forget", "partner.example")
    assert stopped.exit_code == 1
    assert "start one with `relay serve`" in stopped.stderr


def test_suggested_rules_are_yaml_that_a_check_takes(run: Run, tmp_path: Path) -> None:
    rules = "policy: {destinations: {pinned.example: {mx: [mx.pinned.example]}}}\n"
    (tmp_path / "relay.yaml").write_text(CONFIG + rules)
    result = run("policy", "suggest")
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(result.stdout) == {
        "policy": {
            "destinations": {
                "123.example": {"require_tls": True},
                "fair.example": {"require_tls": True, "skip_verification": True},
                "partner.example": {"require_tls": True},
                "pinned.example": {"require_tls": True, "mx": ["mx.pinned.example"]},
            }
        }
    }
    assert "# 412 messages in 30d, all verified, by mx1.partner.example" in result.stdout
    assert "# 50 messages in 30d, all in TLS, not all verified, by" in result.stdout
    assert "pinned.example has a rule" in result.stdout
    assert sorted(result.stderr.splitlines()) == [
        "no suggestion for 1 domain (alarm.example): an alarm under way (relay memory list "
        "--alarm)",
        "no suggestion for 1 domain (clear.example): mail in clear",
        "no suggestion for 1 domain (new.example): fewer than --messages 10, or less than --age 7d "
        "from first to last",
    ]
    (tmp_path / "relay.yaml").write_text(CONFIG + result.stdout)
    checked = run("check")
    assert checked.exit_code == 0, checked.stderr
    again = run("policy", "suggest")
    assert again.stdout == ""
    named = "123.example, fair.example, partner.example, pinned.example"
    assert f"4 domains ({named}): a rule with require_tls already" in again.stderr


def test_suggested_rules_say_that_a_message_may_ask_for_less(run: Run) -> None:
    assert "With allow_override: false in the" in run("policy", "suggest").stdout


def test_all_and_a_domain_together_are_told_that_all_stands_alone(run: Run) -> None:
    result = run("memory", "forget", "--all", "partner.example")
    assert result.exit_code == 2
    assert "--all stands alone" in result.stderr


def test_suggestions_for_programs_are_json(run: Run) -> None:
    found = json.loads(run("policy", "suggest", "--json", "--messages", "100").stdout)
    assert [(one["domain"], one["rule"]) for one in found] == [
        ("partner.example", {"require_tls": True})
    ]
    assert json.loads(run("policy", "suggest", "--json", "--age", "60d").stdout) == []


def test_relay_that_has_seen_nothing_suggests_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "spool/policies.db").unlink()
    result = run("policy", "suggest")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing is remembered yet" in result.stderr
