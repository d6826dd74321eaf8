"""What an attempt comes to when each host had its say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.deliver.sessions import SessionLog
from relay.deliver.tally import Tally
from relay.mail.outcome import (
    Bounced,
    Code,
    Deferred,
    Delivered,
    HopPolicy,
    HopSession,
    PolicyMode,
    PolicyResult,
    PolicyType,
)
from relay.route.next_hop import Host
from tests.fakes.mail import entry

ONE, TWO, THREE = (Host(f"mx{n}.example", f"192.0.2.{n}", 25) for n in (1, 2, 3))
SILENT = Deferred("4.4.1", Code.NO_CONNECTION, "", "refused")
LOST = Deferred("4.4.2", Code.NONE, "", "lost")
BUSY = Deferred("4.2.1", 450, "busy")
UNMET = Deferred("4.7.4", Code.NONE, "", "no STARTTLS", tls_unmet=True)
UNMET_5 = Deferred("4.7.5", Code.NONE, "", "expired", tls_unmet=True)
REFUSED = Deferred("4.7.4", 502, "5.5.1 not implemented", "refused", tls_unmet=True)
TOO_BIG = Bounced("5.3.4", Code.NONE, "", "takes 10 octets")
NO_UTF8 = Bounced("5.6.7", Code.NONE, "", "no SMTPUTF8")
TAKEN = Delivered("2.0.0", 250, "OK")


def tally(*said: tuple[Host, Deferred | Bounced], **options) -> Tally:
    made = Tally(entry().recipients, **options)
    for host, outcome in said:
        made.go_on(host, 0, outcome)
    return made


def last(*said: tuple[Host, Deferred | Bounced], **options):
    return tally(*said, **options).outcomes()[0]


def test_settled_recipient_is_no_longer_pending_and_keeps_the_lines_about_hosts():
    made = tally((ONE, BUSY))
    made.settle(TWO, 0, TAKEN)
    assert made.pending == ()
    outcome = made.outcomes()[0]
    assert isinstance(outcome, Delivered)
    assert outcome.hosts == ("mx1.example [192.0.2.1]: 450 busy",)


def test_outcome_tells_of_the_sessions_with_hosts_tried_before():
    session = HopSession("mx1.example", "192.0.2.1")
    made = tally((ONE, replace(BUSY, session=session)), (TWO, SILENT))
    made.settle(THREE, 0, TAKEN)
    assert made.outcomes()[0].earlier == (session,)


def test_sessions_are_counted_where_the_caller_wants_them():
    sessions = SessionLog()
    assert tally(sessions=sessions).sessions is sessions
    assert tally().sessions is not sessions


def test_the_outcomes_come_in_the_order_of_the_recipients():
    made = Tally(entry("a@d.example", "b@d.example", "c@d.example").recipients)
    made.settle(ONE, 2, TAKEN)
    made.go_on(ONE, 1, BUSY)
    made.settle(ONE, 0, TAKEN)
    assert list(made.outcomes()) == [0, 1, 2]
    assert [recipient.index for recipient in made.pending] == [1]


def test_a_reply_says_more_than_silence_and_unmet_tls_more_than_both():
    assert last((ONE, BUSY), (TWO, SILENT)).code == 450
    assert last((ONE, BUSY), (TWO, LOST)).code == 450
    assert last((ONE, UNMET), (TWO, BUSY)).status == "4.7.4"
    assert last((ONE, SILENT), (TWO, UNMET), (THREE, LOST)).status == "4.7.4"


def test_among_equals_the_last_one_decides_and_the_others_are_told():
    outcome = last((ONE, UNMET), (TWO, UNMET_5))
    assert outcome.status == "4.7.5"
    assert outcome.hosts == ("mx1.example [192.0.2.1]: no STARTTLS",)


def test_unmet_tls_alone_bounces_where_that_is_wanted():
    assert isinstance(last((ONE, UNMET), bounce_unmet=False), Deferred)
    assert isinstance(last((ONE, REFUSED), bounce_unmet=True), Bounced)
    outcome = last((ONE, UNMET), (TWO, UNMET_5), bounce_unmet=True)
    assert isinstance(outcome, Bounced)
    assert outcome.status == "5.7.5"
    assert len(outcome.hosts) == 1
    assert isinstance(last((ONE, UNMET_5), (TWO, REFUSED), bounce_unmet=True), Bounced)


def test_any_other_trouble_makes_unmet_tls_temporary():
    for other in (SILENT, LOST, BUSY):
        assert isinstance(last((ONE, UNMET), (TWO, other), bounce_unmet=True), Deferred)
        assert isinstance(last((ONE, other), (TWO, UNMET), bounce_unmet=True), Deferred)
    dns = last((ONE, UNMET), bounce_unmet=True, trouble=("mx0.example: SERVFAIL",))
    assert isinstance(dns, Deferred)
    assert dns.hosts == ("mx0.example: SERVFAIL",)


@pytest.mark.parametrize(("code", "kind"), [(500, Deferred), (530, Deferred), (454, Bounced)])
def test_a_host_that_insists_on_tls_in_clear_is_no_reason_to_return_a_message(code, kind):
    insists = Deferred(
        "4.7.5", code, "Must issue a STARTTLS command first", "insists", tls_unmet=True
    )
    assert isinstance(last((ONE, insists), (TWO, UNMET), bounce_unmet=True), kind)


def test_settled_recipient_is_no_longer_pending():
    mail = entry("a@d.example", "b@d.example")
    made = Tally(mail.recipients)
    made.settle(ONE, 0, TAKEN)
    assert [made.is_pending(recipient) for recipient in mail.recipients] == [False, True]


def test_an_address_that_is_not_connected_to_is_told_and_is_no_trouble():
    outcome = last((ONE, UNMET), bounce_unmet=True, rejected=("mx0.example: 10.0.0.1 is private",))
    assert isinstance(outcome, Bounced)
    assert outcome.hosts == ("mx0.example: 10.0.0.1 is private",)


def test_message_that_no_host_can_take_bounces_with_the_status_of_the_last_host():
    outcome = last((ONE, TOO_BIG), (TWO, NO_UTF8))
    assert isinstance(outcome, Bounced)
    assert (outcome.status, outcome.hosts) == (
        "5.6.7",
        ("mx1.example [192.0.2.1]: takes 10 octets",),
    )


def test_message_that_one_host_cannot_take_waits_for_another_that_may():
    for other in (SILENT, LOST, BUSY, UNMET):
        assert last((ONE, TOO_BIG), (TWO, other)).status == other.status
        assert last((ONE, other), (TWO, TOO_BIG)).status == other.status
        assert isinstance(last((ONE, other), (TWO, TOO_BIG)), Deferred)
    dns = last((ONE, TOO_BIG), trouble=("mx0.example: SERVFAIL",))
    assert isinstance(dns, Deferred)
    assert (dns.status, dns.description) == ("4.3.4", "takes 10 octets")
    assert dns.hosts == ("mx0.example: SERVFAIL",)


def test_trouble_met_for_another_recipient_does_not_keep_back_what_no_host_can_take():
    made = Tally(entry("a@d.example", "b@d.example").recipients)
    made.go_on(ONE, 0, NO_UTF8)
    made.go_on(ONE, 1, BUSY)
    assert isinstance(made.outcomes()[0], Bounced)
    assert isinstance(made.outcomes()[1], Deferred)


def test_a_host_that_cannot_take_it_does_not_keep_unmet_tls_from_being_final():
    assert isinstance(last((ONE, UNMET), (TWO, TOO_BIG), bounce_unmet=True), Bounced)
    assert last((ONE, TOO_BIG), (TWO, UNMET), bounce_unmet=True).status == "5.7.4"


def by_policy(result: PolicyResult, type: PolicyType = PolicyType.STS) -> Deferred:
    return replace(UNMET, policy=HopPolicy(type, PolicyMode.ENFORCE, result))


def test_tlsa_records_that_are_not_known_are_a_dns_failure_and_return_no_mail():
    failed = by_policy(PolicyResult.DNSSEC_INVALID, PolicyType.TLSA)
    assert isinstance(last((ONE, failed), bounce_unmet=True), Deferred)
    assert isinstance(last((ONE, failed), (TWO, UNMET), bounce_unmet=True), Deferred)
    mismatch = by_policy(PolicyResult.VALIDATION_FAILURE, PolicyType.TLSA)
    outcome = last((ONE, mismatch), bounce_unmet=True)
    assert isinstance(outcome, Bounced)
    assert outcome.policy == mismatch.policy


def test_only_unmet_tls_of_a_pending_recipient_is_unmet_by_a_policy():
    failed = by_policy(PolicyResult.EXPIRED)
    made = tally((ONE, failed))
    assert made.is_unmet_by_policy
    made.settle(TWO, 0, TAKEN)
    assert not made.is_unmet_by_policy
    assert not tally((ONE, UNMET)).is_unmet_by_policy
    assert not tally((ONE, by_policy(PolicyResult.EXPIRED, PolicyType.TLSA))).is_unmet_by_policy
    assert not tally((ONE, replace(BUSY, policy=failed.policy))).is_unmet_by_policy


def test_pin_beside_a_failed_fetch_is_no_failure_of_the_policy():
    pinned_out = HopPolicy(PolicyType.STS, None, PolicyResult.STS_FETCH_ERROR)
    assert not tally((ONE, replace(UNMET, session=None, policy=pinned_out))).is_unmet_by_policy


def test_new_round_forgets_the_results_of_the_hosts():
    made = tally((ONE, by_policy(PolicyResult.DNSSEC_INVALID, PolicyType.TLSA)), bounce_unmet=True)
    made.begin_anew()
    made.go_on(ONE, 0, UNMET)
    outcome = made.outcomes()[0]
    assert isinstance(outcome, Bounced)
    assert outcome.hosts == ()


NO_KEYWORD = Deferred("4.7.30", Code.NONE, "", "REQUIRETLS not offered", tls_unmet=True)


@pytest.mark.parametrize(
    ("said", "status", "description"),
    [
        ([UNMET], "5.7.10", "no STARTTLS"),
        ([UNMET, UNMET_5], "5.7.10", "expired"),
        ([NO_KEYWORD], "5.7.30", "REQUIRETLS not offered"),
        ([NO_KEYWORD, UNMET], "5.7.30", "REQUIRETLS not offered"),
        ([UNMET_5, NO_KEYWORD], "5.7.30", "REQUIRETLS not offered"),
    ],
)
def test_mail_with_requiretls_is_returned_for_the_keyword_where_one_host_lacked_nothing_else(
    said: list[Deferred], status: str, description: str
):
    hosts = zip((ONE, TWO), said, strict=False)
    outcome = last(*hosts, bounce_unmet=True, requiretls=True)
    assert isinstance(outcome, Bounced)
    assert (outcome.status, outcome.description) == (status, description)
    later = last(
        (THREE, BUSY), *zip((ONE, TWO), said, strict=False), bounce_unmet=True, requiretls=True
    )
    assert isinstance(later, Deferred)
