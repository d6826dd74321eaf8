"""Writes a report on TLS (RFC 8460): tells a domain of a day's sessions with its mail hosts. Pure.

    report_document   the report, as JSON has it (§4.4)
    compressed            the report in the octets that are sent
    file_name         the name of the file (§5.1)
    compose           the mail that carries it (§5.3)

A value that is not known is left out; it is never null or "". The same sessions make the same
octets: a receiver that gets a report twice, because its answer was lost, sees from the report-id
that it has this report.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from email.utils import format_datetime
from hashlib import sha256

from relay.mail.address import domain_of, in_header
from relay.mail.jsontext import JsonFields, JsonObject, to_json
from relay.mail.tls_session import JudgedBy, SessionFailure

MEDIA_TYPE = "application/tlsrpt+gzip"
"""RFC 8460 §6.5."""

_LAST_SECOND = timedelta(hours=23, minutes=59, seconds=59)
_LINE_OCTETS = 57
"""Base64 makes a line of 76 characters of these (RFC 2045 §6.8)."""

Sessions = Sequence[tuple[JudgedBy, SessionFailure | None, int]]
"""A policy, a failure (None for success), and how many sessions had both."""


@dataclass(frozen=True, slots=True)
class Submitter:
    """Who reports. `contact`: an address for questions. `sender`: the address the mail is from."""

    organization: str
    contact: str
    sender: str

    @property
    def domain(self) -> str:
        """The domain of the contact, which stands in names for the reporter (RFC 8460 §5.1)."""
        return domain_of(self.contact)


def report_document(domain: str, day: date, sessions: Sessions, submitter: Submitter) -> JsonObject:
    """The report of a day (RFC 8460 §4.4)."""
    begin, end = _range(day)
    return {
        "organization-name": submitter.organization,
        "date-range": {"start-datetime": _stamp(begin), "end-datetime": _stamp(end)},
        "contact-info": submitter.contact,
        "report-id": report_id(domain, day, submitter),
        "policies": [
            _policy(judged_by, [one[1:] for one in sessions if one[0] == judged_by])
            for judged_by in sorted({one[0] for one in sessions}, key=_order)
        ],
    }


def _order(judged_by: JudgedBy) -> tuple[str, str, tuple[str, ...]]:
    return judged_by.type.value, judged_by.domain, judged_by.strings


def _policy(
    judged_by: JudgedBy, counted: Sequence[tuple[SessionFailure | None, int]]
) -> JsonObject:
    """A policy with its sessions. `policy-domain` is always there (RFC 8460 §4.4)."""
    failures = [(failure, number) for failure, number in counted if failure is not None]
    failures.sort(key=lambda one: (-one[1], one[0].result, one[0].mx_host, one[0].mx_ip))
    successful = sum(number for failure, number in counted if failure is None)
    policy: JsonObject = {
        "policy": _without_empty(
            {
                "policy-type": judged_by.type.value,
                "policy-string": list(judged_by.strings),
                "policy-domain": judged_by.domain,
                "mx-host": list(judged_by.mx),
            }
        ),
        "summary": {
            "total-successful-session-count": successful,
            "total-failure-session-count": sum(number for _, number in failures),
        },
    }
    if failures:
        policy["failure-details"] = [_failure(failure, number) for failure, number in failures]
    return policy


def _failure(failure: SessionFailure, number: int) -> JsonObject:
    return _without_empty(
        {
            "result-type": failure.result.value,
            "sending-mta-ip": failure.sending_ip,
            "receiving-mx-hostname": failure.mx_host,
            "receiving-ip": failure.mx_ip,
            "failed-session-count": number,
            "failure-reason-code": failure.reason,
        }
    )


def _without_empty(members: JsonObject) -> JsonObject:
    return {name: value for name, value in members.items() if value not in ("", [])}


def report_id(domain: str, day: date, submitter: Submitter) -> str:
    """The name of a report, which is the same each time that the report is made."""
    digest = sha256(f"{domain} {day} {submitter.sender}".encode()).hexdigest()[:16]
    return f"{day.isoformat()}.{digest}@{submitter.domain}"


def compressed(document: JsonFields) -> bytes:
    """A report as compressed JSON. The octets are the same each time."""
    return gzip.compress(to_json(document).encode("ascii"), mtime=0)


def file_name(domain: str, day: date, submitter: Submitter) -> str:
    """RFC 8460 §5.1: sender, policy domain, begin and end in Unix seconds."""
    begin, end = (int(at.timestamp()) for at in _range(day))
    return f"{submitter.domain}!{domain}!{begin}!{end}.json.gz"


def compose(
    domain: str,
    day: date,
    document: JsonFields,
    submitter: Submitter,
    *,
    to: str,
    queue_id: str,
    now: datetime,
) -> bytes:
    """The mail that carries a report (RFC 8460 §5.3), in ASCII, with CRLF.

    `queue_id`: of this mail. It has TLS-Required: No (RFC 8689 §3), so that a domain whose TLS is
    broken gets the report.
    """
    ours, name = submitter.domain, file_name(domain, day, submitter)
    boundary = f"report/{queue_id}"
    fields = [
        f"From: <{in_header(submitter.sender)}>",
        f"To: <{in_header(to)}>",
        # Folded as in the example of RFC 8460 §5.3.
        f"Subject: Report Domain: {domain}",
        f" Submitter: {ours}",
        f" Report-ID: <{document['report-id']}>",
        f"Date: {format_datetime(now)}",
        f"Message-ID: <{queue_id}@{domain_of(submitter.sender)}>",
        f"TLS-Report-Domain: {domain}",
        f"TLS-Report-Submitter: {ours}",
        "TLS-Required: No",
        "Auto-Submitted: auto-generated",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type="tlsrpt"; boundary="{boundary}"',
    ]
    octets = compressed(document)
    lines = [
        *fields,
        "",
        "This is a MIME message with a report on TLS (RFC 8460).",
        "",
        f"--{boundary}",
        "Content-Type: text/plain; charset=us-ascii",
        "",
        *_text(domain, day, document, submitter),
        "",
        f"--{boundary}",
        f"Content-Type: {MEDIA_TYPE}",
        "Content-Transfer-Encoding: base64",
        f'Content-Disposition: attachment; filename="{name}"',
        "",
        *(
            base64.b64encode(octets[at : at + _LINE_OCTETS]).decode("ascii")
            for at in range(0, len(octets), _LINE_OCTETS)
        ),
        f"--{boundary}--",
        "",
    ]
    return "\r\n".join(lines).encode("ascii")


def _text(domain: str, day: date, document: JsonFields, submitter: Submitter) -> Iterable[str]:
    """The text for people."""
    summaries = [policy["summary"] for policy in document["policies"]]
    successful = sum(one["total-successful-session-count"] for one in summaries)
    failed = sum(one["total-failure-session-count"] for one in summaries)
    yield f"This is a report on TLS (RFC 8460) about {domain}."
    yield f"It is about {day.isoformat()} (UTC). In sessions that began on that day, TLS"
    yield f"    succeeded {_times(successful)},"
    yield f"    failed {_times(failed)}."
    yield "The attached file has the details. Your DNS asks for these reports"
    yield f"(a TXT record at _smtp._tls.{domain}). Contact: {submitter.contact}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _range(day: date) -> tuple[datetime, datetime]:
    begin = datetime.combine(day, time(), UTC)
    return begin, begin + _LAST_SECOND


def _stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
