"""A DSN as a message of the queue: its reverse-path, its recipient, and its rules."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from relay.deliver.reports import dsn_message
from relay.mail.envelope import Body, Ret
from relay.mail.outcome import Bounced
from relay.policy.rules import DestinationRule, PolicyRules, TlsRule
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.retry import RetrySchedule
from relay.queue.settle import Report, settle
from relay.queue.store import NewMessage
from relay.report.dsn import returns_content

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LAX = TlsSettings(Setting(False, Source.MESSAGE), Setting(True, Source.MESSAGE))
STRICT = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.MESSAGE))
HEADER = b"From: a@a.example\r\nSubject: hello\r\nX-Require-TLS: yes\r\n\r\n"


def report(sender: str = "a@A.example", settings: TlsSettings = LAX, **fields: Any) -> Report:
    message = QueuedMessage(
        "Q1", sender, NOW, 100, MessageSummary(), smtputf8=not sender.isascii(), **fields
    )
    recipient = QueuedRecipient(0, "b@b.example", "b.example", settings)
    entry = Entry(message, (recipient,))
    outcome = Bounced("5.1.1", 550, "no such user")
    return settle(entry, {0: outcome}, schedule=RetrySchedule(), now=NOW).reports[0]


def made(about: Report, rules: PolicyRules | None = None) -> NewMessage:
    return dsn_message(
        about, header=HEADER, rules=rules or PolicyRules(), hostname="relay.example.net", now=NOW
    )


def test_dsn_goes_from_the_null_reverse_path_to_the_sender():
    new = made(report())
    assert (new.message.reverse_path, new.message.origin, new.message.arrived) == ("", "dsn", NOW)
    [recipient] = new.recipients
    assert (recipient.address, recipient.domain) == ("a@A.example", "a.example")
    assert (new.message.body, new.message.eight_bit, new.message.smtputf8) == (
        Body.SEVEN_BIT,
        False,
        False,
    )
    assert new.message.summary.auto_submitted
    assert new.message.size_bytes == len(new.content)
    [event] = new.events
    assert event.queue_id == new.message.queue_id
    assert json.loads(event.line)["about"] == "Q1"


def test_a_dsn_to_an_address_in_utf8_needs_smtputf8():
    new = made(report("jörg@bücher.example"))
    assert new.message.smtputf8
    assert new.recipients[0].domain == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("settings", "rules", "require", "skip"),
    [
        (LAX, PolicyRules(), False, False),
        (STRICT, PolicyRules(default=TlsRule(False, True)), True, False),
        (LAX, PolicyRules(destinations={"a.example": DestinationRule(True)}), True, False),
        (LAX, PolicyRules(domains={"a.example": TlsRule(True)}), False, False),
        (LAX, PolicyRules(default=TlsRule(False, True)), False, True),
    ],
)
def test_a_dsn_follows_the_rules_of_the_null_reverse_path_and_is_never_weaker_than_its_message(
    settings, rules, require, skip
):
    found = made(report(settings=settings), rules).recipients[0].settings
    assert (found.require_tls.value, found.skip_verification.value) == (require, skip)


def test_no_dsn_is_made_for_the_null_reverse_path():
    about = report()
    message = QueuedMessage("Q2", "", NOW, 100, MessageSummary())
    with pytest.raises(ValueError, match="null reverse-path"):
        made(Report(about.kind, Entry(message, about.entry.recipients), about.changes))


def test_a_dsn_of_a_message_with_requiretls_is_as_safe_and_returns_the_header_only():
    about = report(settings=STRICT, requiretls=True, ret=Ret.FULL)
    assert not returns_content(about)
    new = made(about)
    assert new.message.requiretls
    [recipient] = new.recipients
    settings = recipient.settings
    assert (settings.require_tls.value, settings.skip_verification.value) == (True, False)


def test_a_dsn_of_a_message_that_requires_no_tls_is_under_the_rules_of_a_dsn():
    new = made(report(tls_required_no=True))
    assert not new.message.tls_required_no
