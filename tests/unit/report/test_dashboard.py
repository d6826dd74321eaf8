"""What watches the relay asks for numbers the relay tells."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from relay.report.gauges import Snapshot
from relay.report.metrics import Metrics

DOCS = Path(__file__).resolve().parents[3] / "docs"


def expressions() -> list[str]:
    board = json.loads((DOCS / "grafana-dashboard.json").read_text())
    rules = yaml.safe_load((DOCS / "alerts.yml").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_that_the_dashboard_asks_for_exists(expression: str) -> None:
    snapshot = Snapshot(
        queue={"queued": 1},
        connections={"127.0.0.1:25": 1},
        certificates={"tls.pem": datetime.now(UTC)},
    )
    metrics = Metrics()
    told = set(re.findall(r"^# TYPE (\S+)", metrics.render(snapshot).decode(), re.MULTILINE))
    for name in re.findall(r"\b(?:relay|process)_\w+", expression):
        assert name in told or re.sub(r"_(bucket|sum|count)$", "", name) in told, name
    assert expression.count("(") == expression.count(")")
