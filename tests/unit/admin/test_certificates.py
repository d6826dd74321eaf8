"""What of a host's certificate does not match, in words."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.admin.certificates import as_json, faults
from relay.mail.outcome import CertificateFacts

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
GOOD = CertificateFacts(
    "CN=mx.dest.example",
    "CN=Some CA",
    ("mx.dest.example", "*.mail.dest.example"),
    NOW - timedelta(days=1),
    NOW + timedelta(days=1),
    "00ff",
)


@pytest.mark.parametrize(
    ("changed", "host", "found"),
    [
        ({}, "mx.dest.example", []),
        ({}, "MX.dest.example", []),
        ({}, "a.mail.dest.example", []),
        (
            {},
            "a.b.mail.dest.example",
            ["it is for mx.dest.example, *.mail.dest.example, not for a.b.mail.dest.example"],
        ),
        ({"not_after": NOW - timedelta(hours=1)}, "mx.dest.example", ["it expired on 2026-11-20"]),
        (
            {"not_before": NOW + timedelta(hours=1)},
            "mx.dest.example",
            ["it is not valid before 2026-11-20"],
        ),
        ({"names": ()}, "mx.dest.example", ["it is for no host name"]),
        (
            {"issuer": "CN=mx.dest.example"},
            "mx.dest.example",
            ["it is signed by itself, not by an authority"],
        ),
    ],
)
def test_mismatch_of_a_certificate_is_explained_in_words(
    changed: dict[str, Any], host: str, found: list[str]
) -> None:
    assert faults(as_json(replace(GOOD, **changed)), host, at=NOW) == found


def test_name_that_the_log_may_have_left_out_is_not_held_against_a_certificate() -> None:
    assert faults(as_json(GOOD), "mx6.dest.example", at=NOW, has_all_names=False) == []
