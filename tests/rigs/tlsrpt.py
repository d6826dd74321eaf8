"""Reads reports on TLS as a receiver does: mail, file name, JSON held against RFC 8460 §4.4."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any

import jsonschema_rs

_SCHEMA = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "tlsrpt.schema.json").read_text(encoding="utf-8")
)
_VALIDATOR = jsonschema_rs.Draft202012Validator(_SCHEMA)


@dataclass(frozen=True)
class ReportMail:
    """A mail with a report: its header fields, the name of its file, and what the file says."""

    message: EmailMessage
    file_name: str
    document: dict[str, Any]


def read_document(octets: bytes) -> dict[str, Any]:
    """The JSON of a report, which is as the RFC describes it."""
    document: dict[str, Any] = json.loads(gzip.decompress(octets))
    _VALIDATOR.validate(document)
    return document


def read_mail(content: bytes) -> ReportMail:
    """The report that a mail carries."""
    message = message_from_bytes(content, policy=SMTP)
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "tlsrpt"
    text, file = message.iter_parts()
    assert text.get_content_type() == "text/plain"
    assert file.get_content_type() == "application/tlsrpt+gzip"
    assert file.get_content_disposition() == "attachment"
    octets = file.get_payload(decode=True)
    assert isinstance(octets, bytes)
    return ReportMail(message, file.get_filename() or "", read_document(octets))
