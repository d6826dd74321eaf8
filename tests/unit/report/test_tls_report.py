"""A report on TLS, held against RFC 8460, and read by a program that others wrote."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any

import jsonschema_rs
import pytest

from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure
from relay.report.tls_report import (
    Submitter,
    _text,
    compose,
    compressed,
    file_name,
    report_document,
    report_id,
)
from tests.rigs.tlsrpt import read_document, read_mail

DAY = date(2026, 3, 1)
NOW = datetime(2026, 3, 2, 1, 2, 3, tzinfo=UTC)
US = Submitter("Example Inc.", "tls@contact.example", "postmaster@relay.example")
LINES = ("version: STSv1", "mode: enforce", "mx: *.b.example", "max_age: 86400")
STS = JudgedBy(PolicyType.STS, "b.example", LINES, ("*.b.example",))
TLSA = JudgedBy(PolicyType.TLSA, "mx.b.example", ("3 1 1 " + "ab" * 32,))
NONE = JudgedBy(PolicyType.NONE, "b.example")
EXPIRED = SessionFailure(PolicyResult.EXPIRED, "192.0.2.1", "mx.b.example", "198.51.100.7")
UNTRUSTED = SessionFailure(
    PolicyResult.NOT_TRUSTED, "2001:db8::1", "mx.b.example", "2001:db8::7", "self-signed"
)
FETCH = SessionFailure(PolicyResult.STS_FETCH_ERROR)
SESSIONS = [
    (STS, None, 5326),
    (STS, EXPIRED, 100),
    (STS, UNTRUSTED, 203),
    (STS, FETCH, 1),
    (TLSA, None, 7),
    (NONE, SessionFailure(PolicyResult.STARTTLS_NOT_SUPPORTED, mx_host="mx.b.example"), 3),
]


def the_document() -> dict[str, Any]:
    return read_document(compressed(report_document("b.example", DAY, SESSIONS, US)))


def test_report_says_once_of_a_single_session() -> None:
    document = report_document("b.example", DAY, [(STS, None, 1), (STS, EXPIRED, 2)], US)
    words = "\n".join(_text("b.example", DAY, document, US))
    assert "succeeded once," in words
    assert "failed 2 times." in words


def test_report_on_tls_covers_exactly_one_day() -> None:
    document = the_document()
    assert document["organization-name"] == "Example Inc."
    assert document["contact-info"] == "tls@contact.example"
    assert document["date-range"] == {
        "start-datetime": "2026-03-01T00:00:00Z",
        "end-datetime": "2026-03-01T23:59:59Z",
    }
    assert document["report-id"].endswith("@contact.example")


def test_each_policy_has_its_sessions_and_failures() -> None:
    none, sts, tlsa = the_document()["policies"]
    assert sts == {
        "policy": {
            "policy-type": "sts",
            "policy-string": list(LINES),
            "policy-domain": "b.example",
            "mx-host": ["*.b.example"],
        },
        "summary": {"total-successful-session-count": 5326, "total-failure-session-count": 304},
        "failure-details": [
            {
                "result-type": "certificate-not-trusted",
                "sending-mta-ip": "2001:db8::1",
                "receiving-mx-hostname": "mx.b.example",
                "receiving-ip": "2001:db8::7",
                "failed-session-count": 203,
                "failure-reason-code": "self-signed",
            },
            {
                "result-type": "certificate-expired",
                "sending-mta-ip": "192.0.2.1",
                "receiving-mx-hostname": "mx.b.example",
                "receiving-ip": "198.51.100.7",
                "failed-session-count": 100,
            },
            {"result-type": "sts-policy-fetch-error", "failed-session-count": 1},
        ],
    }
    assert tlsa == {
        "policy": {
            "policy-type": "tlsa",
            "policy-string": ["3 1 1 " + "ab" * 32],
            "policy-domain": "mx.b.example",
        },
        "summary": {"total-successful-session-count": 7, "total-failure-session-count": 0},
    }
    assert none["policy"] == {"policy-type": "no-policy-found", "policy-domain": "b.example"}


def test_the_schema_refuses_what_the_rfc_has_no_place_for() -> None:
    """The judge of the other tests can fail."""
    document = report_document("b.example", DAY, SESSIONS, US)
    spoils: list[dict[str, Any]] = [
        {"report-id": None},
        {"organization-name": ""},
        {"policies": []},
        {"more": 1},
        {"date-range": {"start-datetime": "2026-03-01", "end-datetime": "2026-03-01"}},
    ]
    for spoil in spoils:
        with pytest.raises(jsonschema_rs.ValidationError):
            read_document(compressed(document | spoil))


def test_report_of_the_same_sessions_has_the_same_octets() -> None:
    backwards = SESSIONS[::-1]
    assert compressed(report_document("b.example", DAY, SESSIONS, US)) == compressed(
        report_document("b.example", DAY, backwards, US)
    )


def test_octets_of_a_report_do_not_depend_on_the_time() -> None:
    octets = compressed(report_document("b.example", DAY, SESSIONS, US))
    assert octets[4:8] == bytes(4)  # RFC 1952 §2.3.1: MTIME


def test_reports_of_other_days_and_domains_have_other_names() -> None:
    names = {
        report_id(domain, day, US)
        for domain in ("b.example", "c.example")
        for day in (DAY, date(2026, 3, 2))
    }
    assert len(names) == 4


def test_a_file_is_called_by_sender_domain_begin_and_end() -> None:
    assert (
        file_name("b.example", DAY, US) == "contact.example!b.example!1772323200!1772409599.json.gz"
    )


def the_mail() -> bytes:
    document = report_document("b.example", DAY, SESSIONS, US)
    return compose("b.example", DAY, document, US, to="tls@b.example", queue_id="1ABC", now=NOW)


def test_mail_contains_the_report_on_tls() -> None:
    mail = read_mail(the_mail())
    assert mail.document == report_document("b.example", DAY, SESSIONS, US)
    assert mail.file_name == file_name("b.example", DAY, US)
    fields = mail.message
    assert fields["From"] == "postmaster@relay.example"
    assert fields["To"] == "tls@b.example"
    assert fields["TLS-Report-Domain"] == "b.example"
    assert fields["TLS-Report-Submitter"] == "contact.example"
    assert fields["TLS-Required"] == "No"
    assert fields["Auto-Submitted"] == "auto-generated"
    assert fields["Subject"] == (
        "Report Domain: b.example Submitter: contact.example"
        f" Report-ID: <{mail.document['report-id']}>"
    )


def test_mail_with_a_report_is_valid_with_any_names() -> None:
    long = ".".join(["a" * 60] * 4)
    us = Submitter("Grüße 組織", f"tls@{long}", "postmaster@relay.example")
    document = report_document(long, DAY, [(JudgedBy(PolicyType.NONE, long), None, 1)], us)
    content = compose(long, DAY, document, us, to=f"tls@{long}", queue_id="1ABC", now=NOW)
    assert max(map(len, content.split(b"\r\n"))) <= 998
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert read_mail(content).document["organization-name"] == "Grüße 組織"


def test_mail_with_a_report_is_read_by_parsedmarc() -> None:
    parsedmarc = pytest.importorskip("parsedmarc")
    found = parsedmarc.parse_report_email(the_mail().decode("ascii"), offline=True)
    assert found["report_type"] == "smtp_tls"
    report = found["report"]
    assert report["organization_name"] == "Example Inc."
    assert report["report_id"] == report_id("b.example", DAY, US)
    told = {one["policy_type"]: one for one in report["policies"]}
    assert {kind: one["successful_session_count"] for kind, one in told.items()} == {
        "sts": 5326,
        "tlsa": 7,
        "no-policy-found": 0,
    }
    assert told["sts"]["policy_strings"] == list(LINES)
    failures = told["sts"]["failure_details"]
    assert [one["failed_session_count"] for one in failures] == [203, 100, 1]
    assert failures[0]["result_type"] == "certificate-not-trusted"
    assert json.dumps(failures[0]).count("2001:db8::7") == 1
