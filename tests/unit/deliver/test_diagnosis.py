"""The table between later and never."""

from __future__ import annotations

import pytest

from relay.deliver.diagnosis import (
    Answer,
    CannotBeSent,
    Stage,
    cannot_take,
    demands_tls,
    for_good,
    host_line,
    judge,
    shown,
    too_many_recipients,
    unmet,
    worth_another_host,
)
from relay.mail.outcome import Bounced, Code, Deferred, Delivered
from relay.mail.reply import Reply, parse_reply
from relay.route.next_hop import Host, NextHop

HOST = Host("mx.example", "192.0.2.1", 25)
ALL_STAGES = list(Stage)
ABOUT_THE_MESSAGE = [Stage.MAIL, Stage.RCPT, Stage.DATA, Stage.CONTENT, Stage.FINAL_DOT]
ABOUT_US = [Stage.GREETING, Stage.EHLO, Stage.AUTH]


def reply(text: str) -> Reply:
    return parse_reply(int(text[:3]), text[4:])


@pytest.mark.parametrize("stage", ABOUT_THE_MESSAGE + ABOUT_US)
def test_4yz_defers_and_another_host_may_be_tried(stage):
    answer = Answer(stage, reply("450 4.2.1 busy"))
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code, outcome.message) == ("4.2.1", 450, "4.2.1 busy")
    assert outcome.description == f"mx.example [192.0.2.1] answered {stage} with 450 4.2.1 busy"
    assert not outcome.in_doubt
    assert worth_another_host(answer, HOST)


@pytest.mark.parametrize("stage", ABOUT_THE_MESSAGE)
def test_5yz_about_the_message_bounces(stage):
    answer = Answer(stage, reply("550 5.7.1 no"))
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Bounced)
    assert (outcome.status, outcome.code) == ("5.7.1", 550)
    assert not worth_another_host(answer, HOST)


@pytest.mark.parametrize("stage", ABOUT_US)
def test_5yz_about_us_or_the_host_defers(stage):
    answer = Answer(stage, reply("554 5.7.1 go away"))
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.7.1", 554)
    assert worth_another_host(answer, HOST)


@pytest.mark.parametrize(
    "text", ["250 2.0.0 OK", "250 OK", "251 2.0.0 OK", "200 OK", "299 OK", "250 4.0.0 OK"]
)
def test_2yz_to_the_final_dot_is_delivered_by_its_first_digit(text):
    answer = Answer(Stage.FINAL_DOT, reply(text))
    outcome = judge(answer, HOST, dsn_passed_on=True)
    assert isinstance(outcome, Delivered)
    assert (outcome.status, outcome.description, outcome.dsn_passed_on) == ("2.0.0", "", True)
    assert not worth_another_host(answer, HOST)


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.FINAL_DOT])
def test_2yz_to_anything_else_delivers_nothing(stage):
    answer = Answer(stage, reply("250 2.0.0 OK"))
    assert isinstance(judge(answer, HOST), Deferred)
    assert worth_another_host(answer, HOST)


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_silence_defers(stage):
    answer = Answer(stage, None, "no answer within 300 s")
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert outcome.status == ("4.4.1" if stage is Stage.CONNECT else "4.4.2")
    no_connection = stage in (Stage.CONNECT, Stage.GREETING)
    assert outcome.code == (Code.NO_CONNECTION if no_connection else Code.NONE)
    assert outcome.in_doubt is (stage is Stage.FINAL_DOT)
    assert worth_another_host(answer, HOST) is (stage is not Stage.FINAL_DOT)
    assert "no answer within 300 s" in outcome.description


@pytest.mark.parametrize("code", [100, 334, 354])
def test_invalid_reply_to_the_final_dot_leaves_the_message_in_doubt(code):
    answer = Answer(Stage.FINAL_DOT, Reply(code, "", "hm"))
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert outcome.in_doubt
    assert "may arrive twice" in outcome.description
    assert not worth_another_host(answer, HOST)


def test_552_to_rcpt_is_452():
    answer = Answer(Stage.RCPT, reply("552 5.5.3 too many"))
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.5.3", 552)
    assert worth_another_host(answer, HOST)
    assert too_many_recipients(answer)
    assert not too_many_recipients(Answer(Stage.MAIL, reply("552 5.3.4 too big")))
    assert not too_many_recipients(Answer(Stage.RCPT, reply("450 4.2.1 busy")))
    assert too_many_recipients(Answer(Stage.RCPT, reply("452 4.5.3 too many")))
    assert isinstance(judge(Answer(Stage.MAIL, reply("552 5.3.4 too big")), HOST), Bounced)
    assert isinstance(judge(Answer(Stage.FINAL_DOT, reply("552 5.3.4 too big")), HOST), Bounced)


@pytest.mark.parametrize(
    ("text", "kind", "status", "is_too_many"),
    [
        ("552 too many", Deferred, "4.5.3", True),
        ("552 5.0.0 too many", Deferred, "4.5.3", True),
        ("552 5.2.2 mailbox full", Deferred, "4.2.2", False),
        ("552 4.2.2 mailbox full", Deferred, "4.2.2", False),
        ("552 4.5.3 too many", Deferred, "4.5.3", True),
        ("552 5.3.1 disk full", Deferred, "4.3.1", False),
        ("552 5.7.1 no", Deferred, "4.7.1", False),
        ("552 5.2.3 message too large for the mailbox", Bounced, "5.2.3", False),
        ("552 5.3.4 message too large", Bounced, "5.3.4", False),
        ("452 too many", Deferred, "4.0.0", True),
        ("452 4.5.3 too many", Deferred, "4.5.3", True),
        ("452 4.2.2 mailbox full", Deferred, "4.2.2", False),
        ("452 4.3.1 disk full", Deferred, "4.3.1", False),
    ],
)
def test_452_and_552_to_rcpt_keep_the_meaning_of_their_enhanced_status(
    text, kind, status, is_too_many
):
    answer = Answer(Stage.RCPT, reply(text))
    outcome = judge(answer, HOST)
    assert (type(outcome), outcome.status) == (kind, status)
    assert too_many_recipients(answer) is is_too_many


@pytest.mark.parametrize(
    ("text", "status"), [("550 no", "5.0.0"), ("450 no", "4.0.0"), ("550 4.1.1 no", "5.0.0")]
)
def test_reply_without_an_enhanced_status_of_its_class_gets_the_general_one(text, status):
    assert judge(Answer(Stage.RCPT, reply(text)), HOST).status == status


def test_trouble_of_the_relay_is_no_refusal_by_a_host():
    answer = Answer(Stage.CONTENT, None, "disk on fire", ours=True)
    outcome = judge(answer, HOST)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.3.0", False)
    assert not worth_another_host(answer, HOST)


@pytest.mark.parametrize(
    ("text", "demands"),
    [
        ("530 5.7.0 Must issue a STARTTLS command first", True),
        ("530 go away", True),
        ("530 5.7.0 Authentication required", False),
        ("530 5.7.0 Must issue STARTTLS before AUTH", True),
        ("550 5.7.10 Encryption Needed", True),
        ("550 5.7.1 TLS required", True),
        ("554 5.7.1 we only accept mail over tls", True),
        ("523 5.7.10 encryption needed", True),
        ("550 5.7.1 Sender policy requires encrypted transport", True),
        ("503 5.5.1 plain text sessions are refused, use SSL", True),
        ("550 5.1.1 starttls@x: user unknown, must exist", False),
        ("550 5.7.1 required field missing", False),
        ("550 no tls", False),
        ("454 4.7.0 TLS required", False),
        ("250 2.0.0 TLS required", False),
    ],
)
def test_a_refusal_that_asks_for_tls_is_known_by_its_words(text, demands):
    assert demands_tls(Answer(Stage.MAIL, reply(text))) is demands


def test_silence_does_not_demand_tls():
    assert not demands_tls(Answer(Stage.MAIL, None, "TLS required"))


def test_unmet_tls_says_so_and_may_be_made_final():
    outcome = unmet("4.7.4", "STARTTLS refused: 454 4.7.0 no", HOST, None, reply("454 4.7.0 no"))
    assert (outcome.status, outcome.code, outcome.message, outcome.tls_unmet) == (
        "4.7.4",
        454,
        "4.7.0 no",
        True,
    )
    assert unmet("4.7.5", "certificate has expired", HOST, None).code == 0
    final = for_good(outcome)
    assert (final.status, final.code, final.description) == ("5.7.4", 454, outcome.description)


def test_message_that_no_host_can_take_bounces():
    outcome = cannot_take(CannotBeSent("5.3.4", "takes 10 octets and no more"), HOST, None)
    assert (outcome.status, outcome.code) == ("5.3.4", Code.NONE)
    assert outcome.description == "mx.example [192.0.2.1] takes 10 octets and no more"


def test_a_line_about_a_host_names_it_once():
    assert host_line(HOST, judge(Answer(Stage.MAIL, reply("450 x")), HOST)).count("mx.example") == 1
    assert host_line(HOST, Deferred("4.0.0", 450, "busy")) == "mx.example [192.0.2.1]: 450 busy"


def test_long_texts_are_cut():
    assert len(shown(Reply(550, "5.0.0", "x" * 30_000))) == 2000


OWN_HOST = Host("smtp.example", "192.0.2.5", 587, hop=NextHop("provider", (("smtp.example",),)))


@pytest.mark.parametrize("stage", ABOUT_THE_MESSAGE)
@pytest.mark.parametrize(
    "text",
    [
        "530 5.7.1 Authentication required",
        "530 5.7.57 Client not authenticated to send mail",
        "530 no",
        "550 5.7.57 Client was not authenticated",
        "550 5.7.64 TenantAttribution; Relay Access Denied",
        "503 AUTH first",
        "503 5.5.4 Error: send auth command first",
    ],
)
def test_next_hop_that_asks_for_a_login_defers_and_an_mx_that_does_bounces(stage, text):
    answer = Answer(stage, reply(text))
    outcome = judge(answer, OWN_HOST)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code, outcome.message) == ("4.7.8", int(text[:3]), text[4:])
    assert text in outcome.description
    assert worth_another_host(answer, OWN_HOST)
    assert isinstance(judge(answer, HOST), Bounced)
    assert not worth_another_host(answer, HOST)


@pytest.mark.parametrize(
    "text",
    [
        "550 5.1.1 no such user",
        "550 5.7.1 not authorized to send as this sender",
        "503 5.5.1 need RCPT first",
        "554 5.7.1 spam",
    ],
)
def test_next_hop_that_refuses_the_message_bounces_it(text):
    assert isinstance(judge(Answer(Stage.RCPT, reply(text)), OWN_HOST), Bounced)


def test_next_hop_that_is_busy_and_speaks_of_a_login_keeps_its_status():
    outcome = judge(Answer(Stage.MAIL, reply("450 4.3.2 authentication server is down")), OWN_HOST)
    assert outcome.status == "4.3.2"
