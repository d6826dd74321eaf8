"""What each line of the delivery log says."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.memory import DowngradeAlarm, Shown
from relay.mail.outcome import (
    Bounced,
    CertificateFacts,
    Deferred,
    Delivered,
    Downgrade,
    DowngradeReason,
    HopPolicy,
    HopSession,
    Level,
    NamedBy,
    Routing,
    VerifiedBy,
)
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, LastAttempt, MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.report.deliverylog import accepted, removed, settled
from relay.report.deliverylog.counting import counted_out

NOON = datetime(2026, 3, 1, 12, 0, 0, 123000, tzinfo=UTC)
SETTINGS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DEFAULT))
LAX = TlsSettings(Setting(False, Source.DEFAULT), Setting(True, Source.DESTINATION))
SESSION = HopSession(
    "mx1.example.net",
    "192.0.2.7",
    tls=True,
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_256_GCM_SHA384",
    verified_by=VerifiedBy.PKIX,
    seconds=0.4371,
)
MESSAGE = QueuedMessage(
    "Q1",
    "a@example.com",
    NOON,
    586,
    MessageSummary("1@example.com", "A <a@example.com>", "b", "Hi"),
)
BOB = QueuedRecipient(0, "b@example.net", "example.net", SETTINGS)
OK = Delivered("2.0.0", 250, "2.0.0 OK", session=SESSION)
CLEAR = HopSession(
    "mx1.example.net",
    "192.0.2.7",
    tls=False,
    downgrade=Downgrade(Level.VERIFIED, DowngradeReason.UNVERIFIED, "certificate has expired"),
)


def line_of(outcome, *, after=timedelta(seconds=1)):
    entry, now = Entry(MESSAGE, (BOB,)), NOON + after
    settlement = settle(entry, {0: outcome}, schedule=RetrySchedule(), now=now)
    return json.loads(settled(entry, settlement.changes[0], now=now).line)


@given(st.integers(0, 10**16))
def test_timestamp_of_an_event_has_six_decimals_at_most(microseconds):
    at = NOON + timedelta(microseconds=microseconds)
    line = accepted(replace(MESSAGE, arrived=at), (BOB,)).line
    assert re.search(r'"timestamp":\d+\.\d{1,6},', line)


def test_event_of_a_delivery_has_every_field():
    line = line_of(OK)
    assert line.pop("id").endswith("-Q1-0.1")
    assert line == {
        "event": "delivered",
        "timestamp": NOON.timestamp() + 1,
        "log-level": "info",
        "queue-id": "Q1",
        "envelope": {"transport": "smtp", "sender": "a@example.com", "targets": "b@example.net"},
        "message": {
            "headers": {
                "message-id": "1@example.com",
                "from": "A <a@example.com>",
                "to": "b",
                "subject": "Hi",
            },
            "size": 586,
        },
        "recipient": "b@example.net",
        "recipient-domain": "example.net",
        "policy": {
            "require-tls": True,
            "skip-verification": False,
            "require-tls-source": "message",
            "skip-verification-source": "default",
            "requiretls": False,
            "tls-required-no": False,
        },
        "delivery-status": {
            "tls": True,
            "certificate-verified": True,
            "mx-host": "mx1.example.net",
            "code": 250,
            "description": "",
            "session-seconds": 0.437,
            "message": "2.0.0 OK",
            "attempt-no": 1,
            "enhanced-code": "2.0.0",
            "utf8": False,
            "requiretls": False,
            "mx-ip": "192.0.2.7",
            "tls-version": "TLSv1.3",
            "tls-cipher": "TLS_AES_256_GCM_SHA384",
            "verified-by": "pkix",
            "auth": None,
            "downgrade": None,
            "policy-type": "no-policy-found",
            "policy-mode": None,
            "policy-result": None,
            "mx-secure": False,
            "waived": None,
            "memory": None,
            "first-delivery-attempt-seconds": 0.563,
        },
    }


def test_a_message_that_went_in_clear_says_what_was_wanted_and_why_not():
    status = line_of(replace(OK, session=CLEAR, description="sent in clear"))["delivery-status"]
    assert status["tls"] is False
    assert status["certificate-verified"] is False
    assert status["tls-version"] is None
    assert status["description"] == "sent in clear"
    assert status["downgrade"] == {
        "from": "verified",
        "reason": "certificate-unverified",
        "error": "certificate has expired",
    }


@pytest.mark.parametrize(
    ("outcome", "after", "expected"),
    [
        (OK, timedelta(0), ("delivered", None, None, "info")),
        (Deferred("4.2.1", 450, "busy"), timedelta(0), ("failed", "temporary", "generic", "warn")),
        (
            Bounced("5.1.1", 550, "unknown"),
            timedelta(0),
            ("failed", "permanent", "bounce", "error"),
        ),
        (
            Deferred("4.2.1", 450, "busy"),
            timedelta(days=5),
            ("failed", "permanent", "old", "error"),
        ),
    ],
)
def test_a_failure_says_whether_it_is_for_good_and_why(outcome, after, expected):
    line = line_of(outcome, after=after)
    assert (line["event"], line.get("severity"), line.get("reason"), line["log-level"]) == expected


def test_event_without_a_session_has_no_fields_about_one():
    status = line_of(Deferred("4.4.1", 680, "", description="no answer from any host"))[
        "delivery-status"
    ]
    assert [status[name] for name in ("tls", "certificate-verified", "mx-host")] == [
        None,
        None,
        None,
    ]
    assert not {"mx-ip", "tls-version", "session-seconds", "downgrade", "utf8"} & set(status)
    assert (status["code"], status["retry-seconds"]) == (680, 300)


def test_event_of_an_expired_recipient_has_the_last_answer():
    status = line_of(
        Deferred("4.2.1", 450, "4.2.1 busy", session=SESSION), after=timedelta(days=5)
    )["delivery-status"]
    assert (status["code"], status["enhanced-code"]) == (602, "4.4.7")
    assert (status["last-code"], status["last-message"]) == (450, "4.2.1 busy")
    assert status["description"] == "given up after 5 days: 4.2.1 busy"
    assert "retry-seconds" not in status


def test_event_says_that_a_host_may_have_the_message():
    assert line_of(Deferred("4.4.2", 0, "", in_doubt=True))["delivery-status"]["in-doubt"] is True


def test_a_message_is_accepted_in_one_line():
    event = accepted(replace(MESSAGE, client="app [192.0.2.9]"), [BOB])
    line = json.loads(event.line)
    assert line["event"] == event.name == "accepted"
    assert line["recipient"] == event.recipient == "b@example.net"
    assert line["policy"]["require-tls-source"] == "message"
    assert line["client"] == "app [192.0.2.9]"
    assert line["timestamp"] == NOON.timestamp()


def test_accepted_message_tells_the_tls_and_the_user_of_its_client():
    message = replace(MESSAGE, client_tls="TLSv1.3, TLS_AES_256_GCM_SHA384", client_user="app1")
    line = json.loads(accepted(message, [BOB]).line)
    assert line["client-tls"] == "TLSv1.3, TLS_AES_256_GCM_SHA384"
    assert line["client-user"] == "app1"
    assert not {"client-tls", "client-user", "about"} & set(
        json.loads(accepted(MESSAGE, [BOB]).line)
    )


def test_attempt_tells_where_it_could_go_and_in_which_order():
    routing = Routing(NamedBy.MX, True, ("10 mx1.example.net [192.0.2.7]", "20 x [2001:db8::1]"))
    assert line_of(replace(OK, routing=routing))["delivery-status"]["routing"] == {
        "named-by": "mx",
        "authentic": True,
        "hosts": ["10 mx1.example.net [192.0.2.7]", "20 x [2001:db8::1]"],
    }


def test_attempt_tells_the_next_hop_of_the_operator_and_none_where_there_is_none():
    routing = Routing(NamedBy.ROUTE, True, ("a [192.0.2.7]:25",), next_hop="provider")
    assert line_of(replace(OK, routing=routing))["delivery-status"]["route"] == "provider"
    routing = Routing(NamedBy.MX, True, ("10 mx1.example.net [192.0.2.7]",))
    assert "route" not in line_of(replace(OK, routing=routing))["delivery-status"]


def test_attempt_tells_what_a_host_tried_before_had_shown():
    certificate = CertificateFacts("CN=mx0", "CN=ca", ("mx0.example.net",), NOON, NOON, "00ff")
    before = HopSession("mx0.example.net", "192.0.2.6", certificate=certificate)
    line = line_of(replace(OK, hosts=("mx0.example.net: expired",), earlier=(before,)))
    [earlier] = line["delivery-status"]["earlier"]
    assert (earlier["mx-host"], earlier["tls"]) == ("mx0.example.net", False)
    assert earlier["certificate"]["sha256"] == "00ff"


def test_a_message_to_several_domains_tells_each_policy_where_they_differ():
    carol = replace(BOB, index=1, address="c@other.example", domain="other.example", settings=LAX)
    line = json.loads(accepted(MESSAGE, [BOB, carol]).line)
    assert line["envelope"]["targets"] == "b@example.net,c@other.example"
    assert "policy" not in line
    assert line["policies"]["other.example"]["skip-verification-source"] == "destination"
    alike = json.loads(accepted(MESSAGE, [BOB, replace(carol, settings=SETTINGS)]).line)
    assert alike["policy"]["require-tls"] is True
    assert "policies" not in alike


def test_a_thousand_recipients_make_no_endless_line():
    crowd = [
        replace(
            BOB,
            index=i,
            address=f"{'x' * 60}@{i}.example",
            domain=f"{i}.example",
            settings=(SETTINGS, LAX)[i % 2],
        )
        for i in range(1000)
    ]
    event = accepted(MESSAGE, crowd)
    assert len(event.line) < 20_000
    assert json.loads(event.line)["recipients"] == 1000


def test_message_that_the_operator_removes_has_a_last_event():
    last = LastAttempt(NOON, 450, "4.2.1", "busy")
    line = json.loads(removed(MESSAGE, replace(BOB, attempts=3, last=last), now=NOON).line)
    assert (line["event"], line["severity"], line["reason"]) == ("failed", "permanent", "removed")
    assert line["delivery-status"]["attempt-no"] == 3
    assert line["delivery-status"]["last-message"] == "busy"


def test_removed_recipient_is_counted_as_its_line_says():
    for sender in ("a@example.com", "b@example.org", ""):
        message = replace(MESSAGE, reverse_path=sender)
        for recipient in (BOB, replace(BOB, settings=LAX), replace(BOB, domain="example.org")):
            event = removed(message, recipient, now=NOON)
            assert event.counted == (counted_out(json.loads(event.line), message, recipient),)


def test_ids_sort_by_time_and_differ_by_recipient_and_attempt():
    entry = Entry(MESSAGE, (BOB, replace(BOB, index=1)))
    busy = Deferred("4.2.1", 450, "busy")
    ids = [accepted(MESSAGE, [BOB]).id]
    for hours in (1, 2):
        now = NOON + timedelta(hours=hours)
        settlement = settle(entry, {0: busy, 1: busy}, schedule=RetrySchedule(), now=now)
        ids += [settled(entry, change, now=now).id for change in settlement.changes]
        entry = Entry(MESSAGE, tuple(change.recipient for change in settlement.changes))
    assert len(set(ids)) == 5
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    "text", ["\udce9", "\u2028", "\x1b]0;title\x07", "a\r\nb", "\x7f", "\x00", '"}{"', "é" * 5000]
)
def test_no_text_of_a_peer_breaks_a_line(text):
    hostile = replace(OK, message=text, session=replace(SESSION, mx_host=text))
    entry = Entry(
        replace(MESSAGE, reverse_path=text, summary=MessageSummary(text, text, text, text)), (BOB,)
    )
    settlement = settle(entry, {0: hostile}, schedule=RetrySchedule(), now=NOON)
    line = settled(entry, settlement.changes[0], now=NOON).line
    assert line.isascii()
    assert line.isprintable()
    json.dumps(json.loads(line), ensure_ascii=False).encode(
        "utf-8"
    )  # no lone surrogate comes out of it
    assert len(line) < 60_000


@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=50))
def test_every_line_is_printable_ascii_and_strict_json(text):
    hostile = Bounced(
        "5.0.0", 550, text, description=text, hosts=(text,), session=replace(SESSION, mx_ip=text)
    )
    entry = Entry(MESSAGE, (replace(BOB, address=text, domain=text),))
    settlement = settle(entry, {0: hostile}, schedule=RetrySchedule(), now=NOON)
    line = settled(entry, settlement.changes[0], now=NOON).line
    assert line.isascii()
    assert line.isprintable()
    assert json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")


def test_a_host_that_shows_less_than_before_is_told_with_whose_memory_it_is():
    since = datetime(2030, 1, 31, 12, tzinfo=UTC)
    alarm = DowngradeAlarm(Shown.VERIFIED, Shown.NONE, "mx1.example.net", since)
    session = replace(CLEAR, policy=HopPolicy(memory=alarm))
    expected = {
        "before": "verified",
        "now": "none",
        "host": "mx1.example.net",
        "since": "2030-01-31T12:00:00+00:00",
    }
    assert line_of(replace(OK, session=session))["delivery-status"]["memory"] == expected
    assert line_of(replace(OK, session=CLEAR))["delivery-status"]["memory"] is None
