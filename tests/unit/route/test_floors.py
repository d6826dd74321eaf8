"""What a recipient's domain asks of a host: every cell of the table of floors, and which floor a
host is under.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from relay.deliver.sessions import SessionLog
from relay.mail.outcome import HopPolicy, Level, PolicyMode, PolicyResult, PolicyType, Waived
from relay.mail.tls_session import TlsSession
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.floor import (
    NO_FLOOR,
    NO_STS,
    DaneFloor,
    DaneState,
    Floor,
    HostFloor,
    Proof,
    StsFloor,
    Tlsa,
    floor_at,
    not_named,
)
from relay.route.forecast import describe, forecast, forecasts, not_used, sentence
from relay.route.mta_sts import PolicyError, StsMode
from relay.route.next_hop import Credentials, Host, TlsMode
from relay.route.security import (
    Action,
    OnTlsUnmet,
    OnUnverified,
    Requirement,
    SecurityOptions,
    Situation,
    TlsVersion,
    at_host,
    next_step,
    policy_result,
    requirement,
    under,
)

NAME = "mx.example"
HOST = Host(NAME, "192.0.2.1", 25)
OPTIONS = SecurityOptions()
SETTINGS = list(itertools.product((False, True), repeat=2))
RECORD = Tlsa(3, 1, 1, b"d" * 32)

USABLE = DaneFloor(DaneState.USABLE, base=NAME, records=(RECORD,))
UNUSABLE = DaneFloor(DaneState.UNUSABLE, base=NAME, records=(Tlsa(0, 0, 1, b""),))
FAILED = DaneFloor(DaneState.FAILED, error="SERVFAIL from 127.0.0.1")
ENFORCE = StsFloor("example", StsMode.ENFORCE, "1", (NAME,))
ELSEWHERE = replace(ENFORCE, mx=("mx.elsewhere.example",))


def as_test(floor):
    """The same, only looked at: testing."""
    if isinstance(floor, DaneFloor):
        return replace(floor, is_enforced=False)
    return replace(floor, mode=StsMode.TESTING)


def needs(require: bool, skip: bool, options: SecurityOptions = OPTIONS) -> Requirement:
    said_so = TlsSettings(Setting(require, Source.DEFAULT), Setting(skip, Source.DEFAULT))
    return requirement(said_so, options)


def floor_of(dane=USABLE, sts=NO_STS) -> Floor:
    return floor_at(NAME, dane=dane, sts=sts).floor


DANE, UNUSABLE_FLOOR = floor_of(), floor_of(UNUSABLE)
STS = floor_of(DaneFloor(), ENFORCE)

TLS = (Action.SEND_IN_TLS, "")
KEPT = (Action.RECONNECT_UNVERIFIED, "")
U4, U5 = (Action.NEXT_HOST, "4.7.4"), (Action.NEXT_HOST, "4.7.5")

# --- the table --------------------------------------------------------------------------------

# fmt: off
CELLS = [
    # floor           settings                       secured unverified absent  refused handshake
    (DANE,            SETTINGS,                       (TLS,  U5,        U4,         U4,     U5)),
    (STS,             SETTINGS,                       (TLS,  U5,        U4,         U4,     U5)),
    (UNUSABLE_FLOOR,  [(True, False)],                (TLS,  U5,        U4,         U4,     U5)),
    (UNUSABLE_FLOOR,  [(False, False)],               (TLS,  KEPT,      U4,         U4,     U5)),
    (UNUSABLE_FLOOR,  [(False, True), (True, True)],  (TLS,  TLS,       U4,         U4,     U5)),
]
# fmt: on


@pytest.mark.parametrize(("floor", "settings", "cells"), CELLS)
@pytest.mark.parametrize("on_unverified", list(OnUnverified))
@pytest.mark.parametrize("on_unmet", list(OnTlsUnmet))
def test_each_cell_of_the_table_of_floors(floor, settings, cells, on_unverified, on_unmet):
    options = SecurityOptions(on_tls_unmet=on_unmet, on_unverified=on_unverified)
    for require, skip in settings:
        needed = under(needs(require, skip, options), floor, options)
        steps = [next_step(needed, situation) for situation in Situation]
        assert [(step.action, step.unmet) for step in steps] == list(cells)


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("floor", [DANE, STS, UNUSABLE_FLOOR])
@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("tls", list(TlsMode))
def test_mail_under_a_floor_never_goes_in_clear(require, skip, floor, login, tls):
    host = replace(HOST, tls=tls, credentials=Credentials("relay", "x") if login else None)
    needed = under(at_host(needs(require, skip), host, OPTIONS), floor, OPTIONS)
    assert needed.must_encrypt
    for each in (needed, needed.unlooked):
        actions = {next_step(each, situation).action for situation in Situation}
        assert actions <= {Action.SEND_IN_TLS, Action.NEXT_HOST, Action.RECONNECT_UNVERIFIED}
        assert (each.min_version, each.security_level) == (TlsVersion.TLS_1_2, 2)


def test_a_certificate_that_is_kept_though_it_does_not_verify_is_not_looked_at_again():
    unlooked = under(needs(False, False), UNUSABLE_FLOOR, OPTIONS).unlooked
    assert not unlooked.looks
    assert next_step(unlooked, Situation.UNVERIFIED).action is Action.SEND_IN_TLS


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
def test_a_login_goes_over_verified_tls_only_whatever_the_floor(require, skip):
    host = replace(HOST, credentials=Credentials("relay", "x"))
    for floor in (DANE, STS, UNUSABLE_FLOOR, NO_FLOOR):
        needed = under(at_host(needs(require, skip), host, OPTIONS), floor, OPTIONS)
        assert next_step(needed, Situation.UNVERIFIED).action is Action.NEXT_HOST


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize(
    ("dane", "sts"),
    [(USABLE, NO_STS), (UNUSABLE, NO_STS), (FAILED, NO_STS), (DaneFloor(), ENFORCE)],
)
def test_testing_floor_changes_no_step(require, skip, dane, sts):
    floor = floor_of(as_test(dane), as_test(sts) if sts is ENFORCE else sts)
    for options in (OPTIONS, SecurityOptions(on_unverified=OnUnverified.ENCRYPTED)):
        plain = needs(require, skip, options)
        needed = under(plain, floor, options)
        for situation in Situation:
            assert next_step(needed, situation) == next_step(plain, situation)
        assert replace(needed, floor=NO_FLOOR) == plain
        assert needed.unlooked.min_version is plain.unlooked.min_version


def test_no_floor_changes_nothing():
    for require, skip in SETTINGS:
        assert under(needs(require, skip), NO_FLOOR, OPTIONS) == needs(require, skip)


# fmt: off
PROOFS = [
    #                (F, F)           (F, T)           (T, F)      (T, T)
    (NO_FLOOR,       (Proof.NOTHING,   Proof.NOTHING,   Proof.PKIX, Proof.ENCRYPTED)),
    (UNUSABLE_FLOOR, (Proof.ENCRYPTED, Proof.ENCRYPTED, Proof.PKIX, Proof.ENCRYPTED)),
    (STS,            (Proof.PKIX,) * 4),
    (DANE,           (Proof.DANE,) * 4),
]
# fmt: on


@pytest.mark.parametrize(("floor", "proofs"), PROOFS)
def test_host_has_to_prove_what_its_floor_and_the_settings_ask(floor, proofs):
    for (require, skip), proof in zip(SETTINGS, proofs, strict=True):
        needed = under(needs(require, skip), floor, OPTIONS)
        looks = proof in (Proof.PKIX, Proof.DANE) or not skip
        assert (needed.proof, needed.looks) == (proof, looks)
        assert needed.must_encrypt is (proof is not Proof.NOTHING)
        assert needed.wanted is (Level.VERIFIED if looks else Level.ENCRYPTED)


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("floor", [DANE, STS, UNUSABLE_FLOOR])
def test_only_what_requires_tls_by_its_own_settings_is_returned_at_once(require, skip, floor):
    for on_unmet in OnTlsUnmet:
        options = SecurityOptions(on_tls_unmet=on_unmet)
        needed = under(needs(require, skip, options), floor, options)
        assert needed.bounces_unmet is (require and on_unmet is OnTlsUnmet.BOUNCE)


def test_the_configured_version_holds_under_a_floor():
    options = SecurityOptions(min_version=TlsVersion.TLS_1_3)
    assert under(needs(False, True, options), DANE, options).min_version is TlsVersion.TLS_1_3


def test_messages_under_different_floors_share_no_connection():
    other_records = floor_of(replace(USABLE, records=(replace(RECORD, data=b"e" * 32),)))
    other_base = floor_of(replace(USABLE, base="final.example"))
    other_policy = floor_of(DaneFloor(), replace(ENFORCE, id="2"))
    other_domain = floor_of(DaneFloor(), replace(ENFORCE, domain="example.org"))
    floors = [NO_FLOOR, DANE, STS, UNUSABLE_FLOOR, other_records, other_base, other_policy]
    floors += [other_domain, floor_of(as_test(USABLE)), floor_of(DaneFloor(), as_test(ENFORCE))]
    for require, skip in SETTINGS:
        assert len({under(needs(require, skip), floor, OPTIONS) for floor in floors}) == len(floors)


# --- which floor a host is under --------------------------------------------------------------

TLSA, BY_STS, NOBODY = PolicyType
NO_POLICY_MODE = None
E, T = PolicyMode.ENFORCE, PolicyMode.TESTING
NONE = DaneFloor()

BAD_TLSA, NO_DNSSEC = PolicyResult.TLSA_INVALID, PolicyResult.DNSSEC_INVALID
NOT_NAMED = PolicyResult.VALIDATION_FAILURE

# fmt: off
FOUND = [
    # dane              sts                 asks             held   used   type    mode  result
    (NONE,              NO_STS,             Proof.NOTHING,   True,  True,  NOBODY, None, None),
    (USABLE,            NO_STS,             Proof.DANE,      True,  True,  TLSA,   E,    None),
    (as_test(USABLE),   NO_STS,             Proof.DANE,      False, True,  TLSA,   T,    None),
    (UNUSABLE,          NO_STS,             Proof.ENCRYPTED, True,  True,  TLSA,   E,    BAD_TLSA),
    (as_test(UNUSABLE), NO_STS,             Proof.ENCRYPTED, False, True,  TLSA,   T,    BAD_TLSA),
    (FAILED,            NO_STS,             Proof.NOTHING,   True,  False, TLSA,   E,    NO_DNSSEC),
    (as_test(FAILED),   NO_STS,             Proof.NOTHING,   True,  True,  TLSA,   T,    NO_DNSSEC),
    (NONE,              ENFORCE,            Proof.PKIX,      True,  True,  BY_STS, E,    None),
    (NONE,              as_test(ENFORCE),   Proof.PKIX,      False, True,  BY_STS, T,    None),
    (NONE,              ELSEWHERE,          Proof.NOTHING,   True,  False, BY_STS, E,    NOT_NAMED),
    (NONE,              as_test(ELSEWHERE), Proof.NOTHING,   True,  True,  BY_STS, T,    NOT_NAMED),
    # DANE judges, and the name has to be in the policy all the same.
    (USABLE,            ENFORCE,            Proof.DANE,      True,  True,  TLSA,   E,    None),
    (USABLE,            ELSEWHERE,          Proof.NOTHING,   True,  False, BY_STS, E,    NOT_NAMED),
    (USABLE,            as_test(ELSEWHERE), Proof.DANE,      True,  True,  TLSA,   E,    None),
    (UNUSABLE,          ENFORCE,            Proof.PKIX,      True,  True,  BY_STS, E,    None),
    (UNUSABLE,          as_test(ENFORCE),   Proof.ENCRYPTED, True,  True,  TLSA,   E,    BAD_TLSA),
    (FAILED,            ENFORCE,            Proof.NOTHING,   True,  False, TLSA,   E,    NO_DNSSEC),
    # What holds mail comes before what is looked at.
    (as_test(USABLE),   ENFORCE,            Proof.PKIX,      True,  True,  BY_STS, E,    None),
    (as_test(FAILED),   ENFORCE,            Proof.PKIX,      True,  True,  BY_STS, E,    None),
    (as_test(USABLE),   as_test(ENFORCE),   Proof.DANE,      False, True,  TLSA,   T,    None),
]
# fmt: on


@pytest.mark.parametrize(("dane", "sts", "asks", "held", "used", "kind", "mode", "result"), FOUND)
@pytest.mark.parametrize("mx_secure", [False, True])
@pytest.mark.parametrize("waived", [None, Waived.DESTINATION])
def test_host_is_under_the_floor_that_dane_and_mta_sts_give(
    dane, sts, asks, held, used, kind, mode, result, mx_secure, waived
):
    found = floor_at(NAME, dane=dane, sts=sts, mx_secure=mx_secure, waived=waived)
    assert (found.floor.asks, found.floor.is_enforced) == (asks, held)
    assert (found.not_used == "") is used
    assert found.policy == HopPolicy(kind, mode, result, mx_secure, waived)
    assert found.floor.dane in (dane, NONE)


@pytest.mark.parametrize(
    "state", [DaneState.NONE, DaneState.INSECURE, DaneState.IGNORED, DaneState.OFF]
)
def test_a_host_without_tlsa_records_is_under_no_floor_of_dane(state):
    assert floor_at(NAME, dane=DaneFloor(state)) == HostFloor()


@pytest.mark.parametrize("error", list(PolicyError))
def test_a_policy_that_cannot_be_had_is_logged_and_holds_no_mail(error):
    found = floor_at(NAME, sts=StsFloor("example", error=error))
    assert (found.floor, found.not_used) == (NO_FLOOR, "")
    assert found.policy == HopPolicy(BY_STS, None, PolicyResult(error.value))


def test_a_policy_in_force_holds_though_a_newer_one_cannot_be_had():
    found = floor_at(NAME, sts=replace(ENFORCE, error=PolicyError.FETCH))
    assert found.floor.holds is Proof.PKIX
    assert found.policy == HopPolicy(BY_STS, E, None)


def test_a_policy_of_mode_none_is_no_policy():
    found = floor_at(NAME, sts=StsFloor("example", StsMode.NONE, "1"))
    assert found == HostFloor(policy=HopPolicy(NOBODY, PolicyMode.NONE))


@pytest.mark.parametrize("sts", [NO_STS, ENFORCE, ELSEWHERE, as_test(ELSEWHERE)])
@pytest.mark.parametrize("dane", [NONE, USABLE, UNUSABLE, FAILED])
def test_a_host_that_is_not_pinned_is_not_connected_to(sts, dane):
    found = floor_at(NAME, dane=dane, sts=sts, pins=("mx.partner.example", "*.a.b.example"))
    assert found.not_used == (
        "is none of the hosts that the configuration allows for this domain: "
        "mx.partner.example, *.a.b.example"
    )
    assert found.policy == HopPolicy()
    assert found.floor == NO_FLOOR


@pytest.mark.parametrize("pins", [(NAME,), ("*.example",), ("a.example", NAME)])
def test_a_host_that_is_pinned_is_under_its_floors(pins):
    assert floor_at(NAME, dane=USABLE, pins=pins) == floor_at(NAME, dane=USABLE)
    assert not_named(NAME, NO_STS, pins) == ""


def test_a_host_that_no_pin_allows_is_known_before_its_tlsa_records_are_asked_for():
    assert not_named(NAME, NO_STS, ()) != ""
    assert not_named(NAME, ELSEWHERE, (NAME,)) == (
        "is not named by the MTA-STS policy of example, which names mx.elsewhere.example"
    )
    assert not_named(NAME, as_test(ELSEWHERE), None) == ""
    many = tuple(f"mx{n}.example" for n in range(7))
    assert not_named(NAME, NO_STS, many).endswith("mx4.example, …")
    assert not_named(NAME, NO_STS, many[:5]).endswith("mx4.example")


# --- what is held against a host --------------------------------------------------------------


@pytest.mark.parametrize("floor", [DANE, STS, UNUSABLE_FLOOR, replace(DANE, is_enforced=False)])
def test_policy_result_names_why_a_host_fails_its_floor(floor):
    found = {
        each: policy_result(floor, each, PolicyResult.EXPIRED if each == "unverified" else None)
        for each in Situation
    }
    looks = floor.asks is not Proof.ENCRYPTED
    assert found == {
        Situation.SECURED: None,
        Situation.UNVERIFIED: PolicyResult.EXPIRED if looks else None,
        Situation.NOT_OFFERED: PolicyResult.STARTTLS_NOT_SUPPORTED,
        Situation.REFUSED: PolicyResult.STARTTLS_NOT_SUPPORTED,
        Situation.HANDSHAKE_FAILED: PolicyResult.VALIDATION_FAILURE,
    }


@pytest.mark.parametrize("floor", [DANE, STS, UNUSABLE_FLOOR, replace(STS, is_enforced=False)])
def test_old_tls_is_held_against_a_host_although_the_session_is_secured(floor):
    fault = PolicyResult.VALIDATION_FAILURE
    assert policy_result(floor, Situation.SECURED, fault) is fault


def test_host_without_a_floor_has_no_failure():
    for situation in Situation:
        assert policy_result(NO_FLOOR, situation, PolicyResult.EXPIRED) is None


# --- what is told beforehand ------------------------------------------------------------------


@pytest.mark.parametrize("floor", [DANE, STS])
@pytest.mark.parametrize(("require", "skip"), SETTINGS)
def test_message_under_an_enforced_floor_goes_verified_or_not_at_all(floor, require, skip):
    needed = under(needs(require, skip), floor, OPTIONS)
    assert [sentence(each) for each in forecasts(needed, HOST)] == [
        "sent in TLS, verified",
        *(f"not sent here; deferred 4.7.{n} if no other host has better" for n in (5, 4, 4, 5)),
    ]


def test_host_with_unusable_records_and_an_invalid_certificate_keeps_its_tls():
    needed = under(needs(False, False), UNUSABLE_FLOOR, OPTIONS)
    assert sentence(forecast(needed, Situation.UNVERIFIED)) == (
        "sent in TLS, unverified, over a new connection"
    )
    needed = under(needs(False, True), UNUSABLE_FLOOR, OPTIONS)
    assert sentence(forecast(needed, Situation.SECURED)) == "sent in TLS, unverified"


@pytest.mark.parametrize(
    ("floor", "first", "last"),
    [
        (
            DANE,
            "the host has TLSA records (DANE): they hold whatever the settings",
            f"its certificate must match a TLSA record of {NAME}",
        ),
        (
            UNUSABLE_FLOOR,
            "the host has TLSA records (DANE), and none that is usable: they hold whatever the"
            " settings",
            "its certificate is not looked at",
        ),
        (
            STS,
            "the domain has an MTA-STS policy that names the host: it holds whatever the settings",
            "its certificate must be in date, for its own name, from a trusted authority",
        ),
    ],
)
def test_sentence_about_a_host_begins_with_who_asks_for_the_proof(floor, first, last):
    told = describe(under(needs(False, True), floor, OPTIONS), HOST)
    assert told[:3] == (first, "the host must offer TLS, TLSv1.2 or later", last)


def test_a_certificate_under_dane_is_told_of_by_its_records():
    told = describe(under(needs(False, True), DANE, OPTIONS), HOST)
    assert told[3:5] == (
        "its certificate matches a TLSA record: sent in TLS, verified",
        "its certificate matches none: not sent here; deferred 4.7.5 if no other host has better",
    )


def test_testing_floor_says_so():
    floor = replace(STS, is_enforced=False)
    told = describe(under(needs(False, True), floor, OPTIONS), HOST)
    assert told[0] == (
        "the domain has an MTA-STS policy that names the host: looked at only, no mail is held to"
        " it"
    )
    assert told[1:] == describe(needs(False, True), HOST)


@pytest.mark.parametrize("bounces", [True, False])
def test_outcome_of_a_message_at_a_host_that_may_not_be_connected_to(bounces: bool):
    options = replace(OPTIONS, on_tls_unmet=OnTlsUnmet.BOUNCE if bounces else OnTlsUnmet.DEFER)
    told = not_used(needs(True, False, options))
    assert not told.is_sent
    assert (told.situation, told.step.unmet) == (None, "4.7.5")
    assert told.at_last == ("5.7.5" if bounces else "4.7.5")
    assert sentence(told).startswith(
        f"not sent here; {'bounced 5.7.5' if bounces else 'deferred 4.7.5'}"
    )


def test_mail_with_requiretls_is_foretold_to_be_returned_at_once():
    needed = requirement(
        TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.MESSAGE)),
        OPTIONS,
        requiretls=True,
    )
    ends = {each.at_last for each in forecasts(needed, HOST) if not each.is_sent}
    assert ends == {"5.7.10"}
    assert "the host must offer REQUIRETLS inside TLS" in describe(needed, HOST)
    assert not_used(needed).at_last == "5.7.10"


def test_pin_that_keeps_a_host_out_keeps_the_error_of_the_policy():
    failed = StsFloor("example", error=PolicyError.CERTIFICATE)
    found = floor_at(NAME, sts=failed, pins=("mx.elsewhere.example",))
    found = replace(found, told="example")
    assert found.not_used
    assert found.policy == HopPolicy(PolicyType.STS, None, PolicyResult("sts-webpki-invalid"))
    sessions: list[TlsSession] = []
    log = SessionLog(sessions)
    log.refused(HOST, found)
    log.end()
    assert sessions == []  # the domain hears of the fetch, and not of our pin
