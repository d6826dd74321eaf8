"""The benchmarks work: how fast anything is, they say on a machine that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.waiting import patient

ROOT = Path(__file__).parents[2]


@pytest.mark.needs("postfix", "smtp-source", "smtp-sink")
def test_a_few_messages_go_through_both_sides_and_are_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--smoke"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
        capture_output=True,
        text=True,
        timeout=patient(110),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("4 KiB over 20 standing sessions", "4 KiB, verified TLS to the next hop"):
        [row] = [line for line in done.stdout.splitlines() if line.startswith(f"| {title} |")]
        assert row.count("|") == 15
    assert "nan" not in done.stdout


@pytest.mark.needs("postgresql")
@pytest.mark.timeout(320)
def test_a_few_messages_go_through_nodes_and_are_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nodes", "--smoke", "--part=series", "--part=full"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(300),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for group in ("SQLite", "1 node", "empty queue", "100,000 deferred", "nothing vacuumed"):
        [row] = [line for line in done.stdout.splitlines() if line.startswith(f"| {group} |")]
        assert row.count("|") == 12
    assert "nan" not in done.stdout


@pytest.mark.timeout(320)
def test_a_small_queue_in_place_of_a_million_is_filled_looked_at_and_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "million", "--smoke"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(300),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("disk a message", "memory afterwards, full", "page /queue?all"):
        assert f"\n{what} " in done.stdout
    assert "remove: 200 recipients" in done.stdout
