"""Every cell of the table of TLS rules, and what surrounds it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.mail.memory import Shown
from relay.mail.outcome import Level
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.floor import Floor, Proof
from relay.route.next_hop import Auth, Credentials, Host, NextHop, TlsMode
from relay.route.security import (
    DOWNGRADE_REASONS,
    Action,
    OnTlsUnmet,
    OnUnverified,
    Requirement,
    SecurityOptions,
    Situation,
    TlsVersion,
    at_host,
    held_to,
    instead,
    is_below,
    next_step,
    requirement,
    under,
)

OPTIONS = SecurityOptions()
HOST = Host("mx.example", "192.0.2.1", 25)

TLS = (Action.SEND_IN_TLS, "")
CLEAR = (Action.SEND_IN_CLEAR, "")
NEW_CLEAR = (Action.RECONNECT_IN_CLEAR, "")
NEW_UNVERIFIED = (Action.RECONNECT_UNVERIFIED, "")
NOT_SUPPORTED = (Action.NEXT_HOST, "4.7.4")
FAILED = (Action.NEXT_HOST, "4.7.5")


def settings(require: bool, skip: bool) -> TlsSettings:
    return TlsSettings(Setting(require, Source.DEFAULT), Setting(skip, Source.DEFAULT))


def needs(require: bool, skip: bool, options: SecurityOptions = OPTIONS) -> Requirement:
    return requirement(settings(require, skip), options)


@pytest.mark.parametrize(
    ("require", "skip", "situation", "expected"),
    [
        (False, False, Situation.SECURED, TLS),
        (False, False, Situation.UNVERIFIED, NEW_CLEAR),
        (False, False, Situation.NOT_OFFERED, CLEAR),
        (False, False, Situation.REFUSED, CLEAR),
        (False, False, Situation.HANDSHAKE_FAILED, NEW_CLEAR),
        (False, True, Situation.SECURED, TLS),
        (False, True, Situation.UNVERIFIED, TLS),
        (False, True, Situation.NOT_OFFERED, CLEAR),
        (False, True, Situation.REFUSED, CLEAR),
        (False, True, Situation.HANDSHAKE_FAILED, NEW_CLEAR),
        (True, False, Situation.SECURED, TLS),
        (True, False, Situation.UNVERIFIED, FAILED),
        (True, False, Situation.NOT_OFFERED, NOT_SUPPORTED),
        (True, False, Situation.REFUSED, NOT_SUPPORTED),
        (True, False, Situation.HANDSHAKE_FAILED, FAILED),
        (True, True, Situation.SECURED, TLS),
        (True, True, Situation.UNVERIFIED, TLS),
        (True, True, Situation.NOT_OFFERED, NOT_SUPPORTED),
        (True, True, Situation.REFUSED, NOT_SUPPORTED),
        (True, True, Situation.HANDSHAKE_FAILED, FAILED),
    ],
)
@pytest.mark.parametrize("on_unverified", list(OnUnverified))
@pytest.mark.parametrize("on_unmet", list(OnTlsUnmet))
def test_each_cell_of_the_table(require, skip, situation, expected, on_unverified, on_unmet):
    needed = needs(
        require, skip, SecurityOptions(on_tls_unmet=on_unmet, on_unverified=on_unverified)
    )
    if on_unverified is OnUnverified.ENCRYPTED and (require, skip) == (False, False):
        expected = NEW_UNVERIFIED if situation is Situation.UNVERIFIED else expected
    step = next_step(needed, situation)
    assert (step.action, step.unmet) == expected


@pytest.mark.parametrize(
    ("require", "skip", "verify", "level", "version"),
    [
        (False, False, True, 2, TlsVersion.TLS_1_2),
        (False, True, False, 0, TlsVersion.TLS_1_0),
        (True, False, True, 2, TlsVersion.TLS_1_2),
        (True, True, False, 2, TlsVersion.TLS_1_2),
    ],
)
def test_old_tls_is_accepted_only_where_clear_text_is_the_alternative(
    require, skip, verify, level, version
):
    needed = needs(require, skip)
    assert (needed.tls_required, needed.verify) == (require, verify)
    assert (needed.security_level, needed.min_version) == (level, version)
    assert needed.wanted is (Level.VERIFIED if verify else Level.ENCRYPTED)


def test_the_configured_versions_are_the_ones_asked_for():
    options = SecurityOptions(
        min_version=TlsVersion.TLS_1_3, opportunistic_min_version=TlsVersion.TLS_1_1
    )
    assert needs(True, False, options).min_version is TlsVersion.TLS_1_3
    assert needs(False, True, options).min_version is TlsVersion.TLS_1_1
    assert needs(False, False, options).unlooked.min_version is TlsVersion.TLS_1_1


def test_a_session_that_stopped_looking_is_still_as_required_as_before():
    unlooked = needs(False, False, SecurityOptions(on_unverified=OnUnverified.ENCRYPTED)).unlooked
    assert (unlooked.tls_required, unlooked.verify, unlooked.security_level) == (False, False, 0)
    assert next_step(unlooked, Situation.UNVERIFIED).action is Action.SEND_IN_TLS


@pytest.mark.parametrize("require", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_credentials_never_go_over_a_session_that_is_not_verified(require, skip):
    host = replace(HOST, credentials=Credentials("relay", "secret"))
    needed = at_host(needs(require, skip), host, OPTIONS)
    assert (needed.tls_required, needed.verify) == (True, True)
    assert (needed.security_level, needed.min_version) == (2, TlsVersion.TLS_1_2)
    for situation in set(Situation) - {Situation.SECURED}:
        assert next_step(needed, situation).action is Action.NEXT_HOST


@pytest.mark.parametrize("skip", [False, True])
def test_port_with_implicit_tls_gets_no_clear_text(skip):
    needed = at_host(needs(False, skip), replace(HOST, tls=TlsMode.IMPLICIT), OPTIONS)
    assert needed.tls_required
    assert needed.verify is not skip
    assert next_step(needed, Situation.HANDSHAKE_FAILED).action is Action.NEXT_HOST


@pytest.mark.parametrize("require", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("tls", list(TlsMode))
def test_requirement_of_a_next_hop_makes_no_message_bounce(require, skip, login, tls):
    host = replace(HOST, tls=tls, credentials=Credentials("relay", "secret") if login else None)
    for on_unmet in OnTlsUnmet:
        needed = needs(require, skip, SecurityOptions(on_tls_unmet=on_unmet))
        there = at_host(needed, host, OPTIONS)
        asks_more = login or (tls is TlsMode.IMPLICIT and not require)
        assert there.bounces_unmet is (require and on_unmet is OnTlsUnmet.BOUNCE and not asks_more)
        assert (there == needed) is not asks_more
        assert there.tls_required is (require or login or tls is TlsMode.IMPLICIT)


# From the rules: a login, a client certificate or a pin demands verified TLS, whatever the message
# says, and unmet it defers. The other keys demand nothing.
HOP = NextHop("partner", (("mx.example",),))
PIN = "x5tzvhDQ/MpGNoPNO4Q9xGQpsRAd5ndjUDS1QqHmHUk="


@pytest.mark.parametrize("on_unmet", list(OnTlsUnmet))
@pytest.mark.parametrize("requiretls", [False, True])
@pytest.mark.parametrize("require", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("keys", "demands", "proof"),
    [
        ({"auth": Auth(username="us")}, True, Proof.PKIX),
        ({"certificate": "/us.pem"}, True, Proof.PKIX),
        ({"pin_sha256": (PIN,)}, True, Proof.PKIX),
        ({"pin_sha256": (PIN,), "ca_file": "none"}, True, Proof.PIN),
        ({"pin_sha256": (PIN,), "ca_file": "/ca.pem"}, True, Proof.PKIX),
        ({"ca_file": "/ca.pem"}, False, None),
        ({"verify_name": "other.example"}, False, None),
        ({"source_address": "192.0.2.1", "hello": "us.example"}, False, None),
        ({}, False, None),
    ],
)
def test_each_proof_of_a_next_hop_against_the_settings(
    keys, demands, proof, require, skip, requiretls, on_unmet
):
    host = replace(HOST, hop=replace(HOP, **keys))
    options = SecurityOptions(on_tls_unmet=on_unmet)
    plain = requirement(settings(require, skip), options, requiretls=requiretls)
    needed = at_host(plain, host, options)
    if not demands:
        assert needed == plain
        return
    assert needed.proof is proof
    assert (needed.min_version, needed.security_level) == (TlsVersion.TLS_1_2, 2)
    assert needed.pins == keys.get("pin_sha256", ())
    assert not needed.bounces_unmet
    steps = [next_step(needed, situation) for situation in Situation]
    assert [(step.action, step.unmet) for step in steps] == [
        TLS,
        FAILED,
        NOT_SUPPORTED,
        NOT_SUPPORTED,
        FAILED,
    ]


@pytest.mark.parametrize(
    ("floor", "proof"),
    [
        (Floor(Proof.DANE), Proof.DANE),
        (Floor(Proof.PKIX), Proof.PKIX),
        (Floor(Proof.ENCRYPTED), Proof.PIN),
        (Floor(Proof.DANE, is_enforced=False), Proof.PIN),
    ],
)
def test_floor_of_a_host_holds_besides_a_pin_that_stands_alone(floor, proof):
    host = replace(HOST, hop=replace(HOP, pin_sha256=(PIN,), ca_file="none"))
    needed = under(at_host(needs(False, False), host, OPTIONS), floor, OPTIONS)
    assert (needed.proof, needed.pins) == (proof, (PIN,))
    assert next_step(needed, Situation.UNVERIFIED).action is Action.NEXT_HOST


@pytest.mark.parametrize("skip", [False, True])
def test_only_a_login_asks_for_newer_tls_than_the_message(skip):
    implicit = at_host(needs(False, skip), replace(HOST, tls=TlsMode.IMPLICIT), OPTIONS)
    assert implicit.min_version is needs(False, skip).min_version
    assert implicit.security_level == needs(False, skip).security_level


def test_an_ordinary_host_changes_nothing():
    for require in (False, True):
        for skip in (False, True):
            assert at_host(needs(require, skip), HOST, OPTIONS) == needs(require, skip)


@pytest.mark.parametrize("skip", [False, True])
def test_only_a_message_that_requires_tls_is_ever_returned_for_want_of_it(skip):
    for on_unmet in OnTlsUnmet:
        options = SecurityOptions(on_tls_unmet=on_unmet)
        assert not needs(False, skip, options).bounces_unmet
        assert needs(True, skip, options).bounces_unmet is (on_unmet is OnTlsUnmet.BOUNCE)


def test_different_needs_are_never_equal_so_that_no_connection_is_shared():
    kinds = [needs(require, skip) for require in (False, True) for skip in (False, True)]
    assert len(set(kinds)) == 4


def test_every_way_into_clear_text_has_a_name_in_the_log():
    assert {reason.value for reason in DOWNGRADE_REASONS.values()} == {
        "starttls-not-offered",
        "starttls-refused",
        "handshake-failed",
        "certificate-unverified",
    }
    assert set(DOWNGRADE_REASONS) == set(Situation) - {Situation.SECURED}


# --- held to what the host has shown before -------------------------------------------------------

HELD_CELLS = {
    Shown.ENCRYPTED: [TLS, NEW_UNVERIFIED, NOT_SUPPORTED, NOT_SUPPORTED, FAILED],
    Shown.VERIFIED: [TLS, FAILED, NOT_SUPPORTED, NOT_SUPPORTED, FAILED],
}


@pytest.mark.parametrize("on_unverified", list(OnUnverified))
@pytest.mark.parametrize("remembered", HELD_CELLS)
@pytest.mark.parametrize(("number", "situation"), list(enumerate(Situation)))
def test_mail_that_is_held_to_what_was_shown_goes_with_as_much_or_not(
    number, situation, remembered, on_unverified
):
    plain = needs(False, False, SecurityOptions(on_unverified=on_unverified))
    held = held_to(plain, remembered)
    step = next_step(held, situation)
    assert (step.action, step.unmet) == HELD_CELLS[remembered][number]
    assert held.must_encrypt
    assert (held.min_version, held.security_level) == (plain.min_version, plain.security_level)
    assert held != plain  # so no connection is shared with mail that is not held


@pytest.mark.parametrize(("number", "situation"), list(enumerate(Situation)))
def test_mail_that_does_not_look_is_held_to_tls_however_old(number, situation):
    held = held_to(needs(False, True), Shown.ENCRYPTED)
    step = next_step(held, situation)
    expected = [TLS, TLS, NOT_SUPPORTED, NOT_SUPPORTED, FAILED][number]
    assert (step.action, step.unmet) == expected
    assert held.min_version is TlsVersion.TLS_1_0
    assert not held.looks


@pytest.mark.parametrize("remembered", Shown)
@pytest.mark.parametrize("situation", Situation)
@pytest.mark.parametrize(("require", "skip"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("on_unverified", list(OnUnverified))
def test_instead_is_what_the_settings_alone_would_do(
    require, skip, situation, remembered, on_unverified
):
    plain = needs(require, skip, SecurityOptions(on_unverified=on_unverified))
    match next_step(plain, situation).action:
        case Action.NEXT_HOST:
            expected = None
        case Action.SEND_IN_TLS | Action.RECONNECT_UNVERIFIED:
            expected = Shown.ENCRYPTED
        case _:
            expected = Shown.NONE
    assert instead(held_to(plain, remembered), situation) is expected


def test_memory_lowers_no_requirement():
    strict = needs(True, False)
    for remembered in Shown:
        assert held_to(strict, remembered).proof is strict.proof


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3", None, "TLSv9"])
@pytest.mark.parametrize(("least", "below"), [("TLSv1.2", 2), ("TLSv1.3", 3), ("TLSv1", 0)])
def test_version_below_the_least_is_one_that_required_tls_does_not_go_with(version, least, below):
    options = SecurityOptions(min_version=TlsVersion(least))
    is_older = version in ["TLSv1", "TLSv1.1", "TLSv1.2"][:below]
    assert is_below(version, options) is is_older
