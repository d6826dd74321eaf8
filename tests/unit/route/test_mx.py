"""From MX records to mail hosts (RFC 5321 §5.1, RFC 7505)."""

from __future__ import annotations

import pytest

from relay.mail.outcome import Bounced, Deferred
from relay.route.answers import MxAnswer, MxRecord, NoSuchName, Unanswered
from relay.route.mx import MailHost, host_name, mail_hosts
from relay.route.next_hop import NoRoute


def listed(*records, domain="example.net", hostname="relay.example"):
    answer = MxAnswer(tuple(MxRecord(preference, exchange) for preference, exchange in records))
    return mail_hosts(domain, answer, hostname=hostname)


def names(result):
    return [host.name for host in result.hosts]


def test_the_lowest_preference_comes_first():
    result = listed((30, "c.example"), (10, "a.example"), (20, "b.example"))
    assert [(host.preference, host.name) for host in result.hosts] == [
        (10, "a.example"),
        (20, "b.example"),
        (30, "c.example"),
    ]


def test_a_domain_without_mx_is_its_own_mail_host():
    assert listed().hosts == (MailHost(0, "example.net"),)


@pytest.mark.parametrize("preference", [0, 10])
def test_a_null_mx_bounces_at_once(preference):
    result = listed((preference, ""))
    assert isinstance(result, NoRoute)
    assert isinstance(result.outcome, Bounced)
    assert (result.outcome.status, result.outcome.code) == ("5.1.10", 556)
    assert "example.net" in result.outcome.description


def test_a_null_mx_among_others_is_ignored():
    assert names(listed((0, ""), (10, "mx.example"))) == ["mx.example"]


@pytest.mark.parametrize(
    ("answer", "kind", "status"),
    [
        (NoSuchName(), Bounced, "5.1.2"),
        (NoSuchName("is not a name the DNS can hold"), Bounced, "5.1.2"),
        (Unanswered("SERVFAIL"), Deferred, "4.4.3"),
    ],
)
def test_a_failed_lookup_is_judged_and_never_replaced_by_the_address_record(answer, kind, status):
    result = mail_hosts("example.net", answer, hostname="relay.example")
    assert isinstance(result, NoRoute)
    assert isinstance(result.outcome, kind)
    assert (result.outcome.status, result.outcome.code) == (status, 498)
    assert result.outcome.description.count("\n") == 0
    assert answer.reason in result.outcome.description


@pytest.mark.parametrize("spelling", ["MX.Example.NET", "mx.example.net.", "mx.example.net"])
def test_a_name_is_compared_verified_and_logged_in_one_spelling(spelling):
    assert names(listed((10, spelling))) == ["mx.example.net"]


def test_a_host_listed_twice_is_tried_once_at_its_best_preference():
    result = listed((20, "mx.example"), (10, "MX.example."), (30, "mx.example"))
    assert result.hosts == (MailHost(10, "mx.example"),)


@pytest.mark.parametrize(
    ("exchange", "why"),
    [
        ("10.0.0.1", "is an address"),
        ("127.0.0.1", "is an address"),
        ("2130706433", "is an address"),
        ("localhost", "this machine"),
        ("a.LOCALHOST", "this machine"),
        ("mail", "no dot"),
        ("[10.0.0.1]", "not a host name"),
        ("a..example", "not a host name"),
        ("x" * 64 + ".example", "not a host name"),
        ("a b.example", "not a host name"),
        (r"mx\255.example", "not a host name"),
        (("a" * 49 + ".") * 6 + "example", "not a host name"),
    ],
)
def test_a_name_nobody_can_be_reached_by_is_rejected_with_the_reason(exchange, why):
    assert names(listed((10, exchange), (20, "mx.example"))) == ["mx.example"]
    assert why in listed((10, exchange), (20, "mx.example")).rejected[0]
    alone = listed((10, exchange))
    assert isinstance(alone.outcome, Bounced)
    assert (alone.outcome.status, alone.outcome.code) == ("5.4.4", 498)
    assert why in alone.outcome.description


def test_an_underscore_in_a_host_name_is_let_through():
    assert names(listed((10, "mx_1.example"))) == ["mx_1.example"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Bücher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("example.NET.", "example.net"),
        ("straße.example", "xn--strae-oqa.example"),  # IDNA 2008: not "strasse"
        ("", None),
        (".", None),
        ("a..b", None),
        ("\u2028.example", None),
        ("\udce9.example", None),
    ],
)
def test_names_are_lower_case_a_labels_without_final_dot(text, name):
    assert host_name(text) == name


def test_hosts_of_our_own_preference_and_worse_are_dropped():
    result = listed((10, "a.example"), (20, "relay.example"), (20, "b.example"), (30, "c.example"))
    assert names(result) == ["a.example"]


def test_mail_for_which_we_are_the_best_host_would_loop():
    result = listed((10, "RELAY.example."), (10, "b.example"), (30, "c.example"))
    assert isinstance(result.outcome, Bounced)
    assert result.outcome.status == "5.4.6"


def test_mail_for_our_own_name_without_mx_would_loop():
    result = listed(domain="relay.example")
    assert result.outcome.status == "5.4.6"
