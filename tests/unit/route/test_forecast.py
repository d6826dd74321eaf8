"""What is told beforehand of a message at a host, for people and for programs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.mail.memory import Shown
from relay.mail.outcome import DowngradeReason
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.forecast import describe, forecast, forecasts, sentence
from relay.route.next_hop import Auth, Credentials, Host, NextHop, TlsMode
from relay.route.security import (
    OnTlsUnmet,
    OnUnverified,
    Requirement,
    SecurityOptions,
    Situation,
    at_host,
    held_to,
    next_step,
    requirement,
)

HOST = Host("mx.example", "192.0.2.1", 25)
IMPLICIT = replace(HOST, tls=TlsMode.IMPLICIT)
LOGIN = replace(HOST, credentials=Credentials("relay", "secret"))
BOUNCE = SecurityOptions(on_tls_unmet=OnTlsUnmet.BOUNCE)
ENCRYPTED = SecurityOptions(on_unverified=OnUnverified.ENCRYPTED)

SECURED, UNVERIFIED, NOT_OFFERED, REFUSED, FAILED = Situation

VERIFIED_TLS = "sent in TLS, verified"
TLS = "sent in TLS, unverified"
NEW_TLS = "sent in TLS, unverified, over a new connection"
CLEAR = "sent in clear on the same connection"
NEW_CLEAR = "sent in clear over a new connection"
D4, D5 = (f"not sent here; deferred 4.7.{n} if no other host has better" for n in (4, 5))
B4, B5 = (f"not sent here; bounced 5.7.{n} if no other host has better" for n in (4, 5))


def needs(require: bool, skip: bool, options: SecurityOptions, host: Host) -> Requirement:
    said_so = TlsSettings(Setting(require, Source.DEFAULT), Setting(skip, Source.DEFAULT))
    return at_host(requirement(said_so, options), host, options)


PLAIN = SecurityOptions()

# fmt: off
WORDS = [
    # require skip  options   secured     unverified  not offered refused     handshake failed
    (False, False, PLAIN,     (VERIFIED_TLS, NEW_CLEAR,  CLEAR,      CLEAR,      NEW_CLEAR)),
    (False, True,  PLAIN,     (TLS,          TLS,        CLEAR,      CLEAR,      NEW_CLEAR)),
    (True,  False, PLAIN,     (VERIFIED_TLS, D5,         D4,         D4,         D5)),
    (True,  True,  PLAIN,     (TLS,          TLS,        D4,         D4,         D5)),
    (False, False, BOUNCE,    (VERIFIED_TLS, NEW_CLEAR,  CLEAR,      CLEAR,      NEW_CLEAR)),
    (False, True,  BOUNCE,    (TLS,          TLS,        CLEAR,      CLEAR,      NEW_CLEAR)),
    (True,  False, BOUNCE,    (VERIFIED_TLS, B5,         B4,         B4,         B5)),
    (True,  True,  BOUNCE,    (TLS,          TLS,        B4,         B4,         B5)),
    (False, False, ENCRYPTED, (VERIFIED_TLS, NEW_TLS,    CLEAR,      CLEAR,      NEW_CLEAR)),
    (True,  False, ENCRYPTED, (VERIFIED_TLS, D5,         D4,         D4,         D5)),
]
# fmt: on


@pytest.mark.parametrize(("require", "skip", "options", "words"), WORDS)
def test_each_cell_of_the_table_is_told_in_words(require, skip, options, words):
    needed = needs(require, skip, options, HOST)
    assert tuple(sentence(each) for each in forecasts(needed, HOST)) == words


@pytest.mark.parametrize(("require", "skip", "options", "words"), WORDS)
def test_json_of_a_forecast_has_the_fields_of_the_log(require, skip, options, words):
    needed = needs(require, skip, options, HOST)
    for each, word in zip(forecasts(needed, HOST), words, strict=True):
        assert each.situation is not None
        assert each.step == next_step(needed, each.situation)
        assert each == forecast(needed, each.situation)
        assert each.is_sent is word.startswith("sent")
        assert each.tls is {"sent in T": True, "sent in c": False}.get(word[:9])
        assert each.verified is (word == VERIFIED_TLS if each.is_sent else None)
        assert each.at_last == (word.split()[4] if not each.is_sent else "")


@pytest.mark.parametrize(
    ("situation", "downgrade"),
    [
        (UNVERIFIED, DowngradeReason.UNVERIFIED),
        (NOT_OFFERED, DowngradeReason.NOT_OFFERED),
        (REFUSED, DowngradeReason.REFUSED),
        (FAILED, DowngradeReason.HANDSHAKE_FAILED),
    ],
)
def test_forecast_of_clear_text_has_the_reason_of_the_log(situation, downgrade):
    assert forecast(needs(False, False, BOUNCE, HOST), situation).downgrade is downgrade
    assert forecast(needs(True, False, BOUNCE, HOST), situation).downgrade is None


def test_forecast_of_kept_tls_mentions_no_downgrade():
    assert forecast(needs(False, False, ENCRYPTED, HOST), UNVERIFIED).downgrade is None
    assert forecast(needs(False, False, BOUNCE, HOST), SECURED).downgrade is None


@pytest.mark.parametrize("options", [SecurityOptions(), BOUNCE])
def test_forecast_of_implicit_tls_does_not_mention_starttls(options):
    met = {
        each.situation: sentence(each)
        for each in forecasts(needs(False, False, options, IMPLICIT), IMPLICIT)
    }
    assert met == {
        SECURED: VERIFIED_TLS,
        UNVERIFIED: D5,
        FAILED: D5,
    }  # the route asks, not the message


def test_forecast_with_a_login_needs_verified_tls():
    needed = needs(False, True, BOUNCE, LOGIN)
    assert [sentence(each) for each in forecasts(needed, LOGIN)] == [VERIFIED_TLS, D5, D4, D4, D5]


def test_forecast_says_looked_at_where_no_certificate_is_required():
    told = describe(needs(False, False, PLAIN, HOST), HOST)
    assert told[1].startswith("its certificate is looked at: ")


def test_forecast_names_the_proof_before_the_consequences():
    assert describe(needs(True, False, BOUNCE, HOST), HOST) == (
        "the host must offer TLS, TLSv1.2 or later",
        "its certificate must be in date, for its own name, from a trusted authority",
        f"the certificate verifies: {VERIFIED_TLS}",
        f"the certificate does not verify: {B5}",
        f"no STARTTLS offered: {B4}",
        f"STARTTLS refused: {B4}",
        f"the handshake fails: {B5}",
    )


def test_certificate_that_is_not_verified_is_mentioned_once():
    assert describe(needs(False, True, BOUNCE, HOST), HOST) == (
        "the host is asked for TLS, TLSv1 or later, and may have none",
        "its certificate is not looked at",
        f"TLS with any certificate: {TLS}",
        f"no STARTTLS offered: {CLEAR}",
        f"STARTTLS refused: {CLEAR}",
        f"the handshake fails: {NEW_CLEAR}",
    )


def test_a_host_that_asks_for_more_than_the_message_says_why():
    first, *_ = describe(needs(False, True, BOUNCE, IMPLICIT), IMPLICIT)
    assert first == "TLS comes first there: nothing is said to it in clear, whatever the settings"
    both = replace(LOGIN, tls=TlsMode.IMPLICIT)
    first, second, *_ = describe(needs(False, True, BOUNCE, both), both)
    assert (
        first == "we log in there: nothing is said to it but in verified TLS, whatever the settings"
    )
    assert second == "the host must offer TLS, TLSv1.2 or later"


@pytest.mark.parametrize(
    ("remembered", "proof", "words"),
    [
        (Shown.NONE, "nothing", None),
        (Shown.ENCRYPTED, "encrypted", "the host has shown TLS before, and mail is held to that"),
        (
            Shown.VERIFIED,
            "pkix",
            "the host has shown verified TLS before, and mail is held to that",
        ),
    ],
)
def test_mail_that_is_held_to_what_was_shown_before_hears_so(remembered, proof, words):
    needed = held_to(needs(False, False, BOUNCE, HOST), remembered)
    told = describe(needed, HOST)
    assert needed.proof == proof
    assert any("shown" in line for line in told) is (words is not None)
    if words is not None:
        assert told[0] == f"{words} (downgrade_memory)"


HOP = NextHop("partner", (("mx.example",),))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"pin_sha256": ("AAA=", "BBB=")},
            (
                "its key is pinned: nothing is said to it but in verified TLS, whatever the"
                " settings",
                "the host must offer TLS, TLSv1.2 or later",
                "its certificate must be in date, for its own name, from a trusted authority",
                "its key must be pinned: AAA= or BBB= (pin_sha256)",
                "the certificate verifies: sent in TLS, verified",
            ),
        ),
        (
            {"pin_sha256": ("AAA=",), "ca_file": "none"},
            (
                "its key is pinned: nothing is said to it but in verified TLS, whatever the"
                " settings",
                "the host must offer TLS, TLSv1.2 or later",
                "its certificate may be from anybody and for any name (ca_file: none)",
                "its key must be pinned: AAA= (pin_sha256)",
                "its key is pinned: sent in TLS, verified",
            ),
        ),
        (
            {"auth": Auth(username="us"), "certificate": "us.pem", "ca_file": "ca.pem"},
            (
                "we log in there and we show it a certificate: nothing is said to it but in"
                " verified TLS, whatever the settings",
                "the host must offer TLS, TLSv1.2 or later",
                "its certificate must be in date, for its own name, from an authority in ca.pem"
                " (ca_file)",
                "the certificate verifies: sent in TLS, verified",
            ),
        ),
        (
            {"verify_name": "gate.example"},
            (
                "the host is asked for TLS, TLSv1.2 or later, and may have none",
                "its certificate is looked at: whether it is in date, for the name gate.example"
                " (verify_name), from a trusted authority",
                "the certificate verifies: sent in TLS, verified",
            ),
        ),
    ],
)
def test_forecast_says_what_a_next_hop_asks_for(keys, words):
    host = replace(HOST, hop=replace(HOP, **keys))
    assert describe(needs(False, False, PLAIN, host), host)[: len(words)] == words
