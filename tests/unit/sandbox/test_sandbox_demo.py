"""`relay demo` plays every outcome, tells the truth about it, and leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from relay.sandbox import demo, demo_rules
from relay.sandbox.script import Script


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_demo_goes_as_the_rules_say_and_leaves_no_file(
    capsys: pytest.CaptureFixture[str], temporary_files: Path
) -> None:
    assert demo.main() == 0
    told = capsys.readouterr()
    assert "36 of 36 messages went as the rules say" in told.out
    for host, kind in demo_rules.HOSTS.items():
        assert f"{host:<13}  {kind.meaning[:30]}" in told.out
    assert told.err == ""
    assert list(temporary_files.iterdir()) == []


def test_a_program_gets_each_line_of_the_delivery_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(as_json=True) == 0
    cells = json.loads(capsys.readouterr().out)
    assert len(cells) == 36
    (strict,) = [
        cell
        for cell in cells
        if (cell["require-tls"], cell["skip-verification"], cell["host"])
        == (True, False, "expired")
    ]
    assert strict["became"] == "deferred"
    assert strict["event"]["delivery-status"]["enhanced-code"] == "4.7.5"
    assert "expired" in strict["why"]


def test_demo_exits_with_1_where_a_host_breaks_the_rules(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(demo_rules.HOSTS["expired"], script=Script())
    monkeypatch.setattr(demo, "HOSTS", {**demo_rules.HOSTS, "expired": other})
    assert demo.main() == 1
    told = capsys.readouterr().out
    assert "not as ruled: no / no at expired: expected: sent in clear" in told
    assert "34 of 36" in told


async def test_demo_detects_a_log_that_says_more_than_the_host_received() -> None:
    cell = (await demo.run())[0]
    assert cell.is_as_ruled
    assert not replace(cell, seen_by_host=False).is_as_ruled


def test_demo_uses_routes_where_loopback_has_one_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_has_many_addresses", lambda: False)
    assert demo.main() == 0
    told = capsys.readouterr().out
    assert "routes instead of MX" in told
    assert "16 of 16 messages" in told


@pytest.mark.parametrize(
    ("host", "result", "word"),
    [
        ("dane", "sent in TLS, verified", "dane-ee"),
        ("dane-mismatch", "deferred", "matches no TLSA record"),
        ("mta-sts", "sent in TLS, verified", "pkix"),
        ("mta-sts-other", "deferred", "not named by the MTA-STS policy"),
        ("pinned-other", "deferred", "none of the hosts that the configuration allows"),
    ],
)
async def test_published_policy_holds_with_all_settings(host: str, result: str, word: str) -> None:
    cells = [cell for cell in await demo.run() if cell.host == host]
    assert [(cell.result, word in cell.why) for cell in cells] == [(result, True)] * 4
