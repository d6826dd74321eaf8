"""Every cell of the table of TLS rules against a real mail host: what it saw, what we say of it."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

import pytest

from relay.mail.outcome import Bounced, Deferred, Delivered, DowngradeReason, Level, Outcome
from relay.route.security import OnTlsUnmet, OnUnverified
from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.fakes.mail import CONTENT, entry

BOTH_WAYS = [(False, False), (False, True), (True, False), (True, True)]

UNVERIFIABLE = [kind for kind in Kind if kind not in (Kind.GOOD, Kind.WILDCARD)]
NOT_OFFERED = [Script(starttls=StartTls.ABSENT), Script(no_ehlo=True)]
REFUSED = [
    Script(starttls=mode)
    for mode in (StartTls.REFUSED_454, StartTls.REFUSED_502, StartTls.REPLY_354)
]
SPOILED = [
    Script(starttls=mode)
    for mode in (
        StartTls.CLOSE,
        StartTls.SILENCE,
        StartTls.GARBAGE,
        StartTls.HANG,
        StartTls.RESET,
        StartTls.CLOSE_IN_HANDSHAKE,
    )
]


class End(StrEnum):
    VERIFIED = "in TLS, verified"
    ENCRYPTED = "in TLS, unverified"
    CLEAR_SAME = "in clear on the same connection"
    CLEAR_NEW = "in clear on a new connection"
    UNMET_474 = "4.7.4"
    UNMET_475 = "4.7.5"


def column(name: str, scripts: list[Script], *ends: End) -> list[object]:
    return [
        pytest.param(require, skip, script, name, end, id=f"{require}-{skip}-{name}-{number}")
        for (require, skip), end in zip(BOTH_WAYS, ends, strict=True)
        for number, script in enumerate(scripts)
    ]


V, E, SAME, NEW, U4, U5 = End
CASES = [
    *column("good", [Script(), Script(certificate=Kind.WILDCARD)], V, E, V, E),
    *column("certificate-unverified", [Script(certificate=k) for k in UNVERIFIABLE], NEW, E, U5, E),
    *column("starttls-not-offered", NOT_OFFERED, SAME, SAME, U4, U4),
    *column("starttls-refused", REFUSED, SAME, SAME, U4, U4),
    *column("handshake-failed", SPOILED, NEW, NEW, U5, U5),
    *column("handshake-failed", [TLS_1_0_ONLY], NEW, E, U5, U5),
]


def hop(outcome: Outcome):
    assert outcome.session is not None
    return outcome.session


def assert_nothing_of_the_message_in_clear(mx: MxServer) -> None:
    for connection in mx.connections:
        assert set(connection.clear_verbs) <= {"EHLO", "HELO", "STARTTLS", "QUIT"}
        assert b"bob" not in connection.clear + connection.in_handshake


@pytest.mark.parametrize(("require", "skip", "script", "column", "end"), CASES)
async def test_each_cell_of_the_table(rig, require, skip, script, column, end):
    mx = await rig.mx(script)
    outcome = await rig.send(entry(require=require, skip=skip))
    session = hop(outcome)
    assert (session.mx_host, session.mx_ip) == (mx.name, mx.address)
    assert session.seconds > 0
    if end in (U4, U5):
        assert isinstance(outcome, Deferred)
        assert (outcome.status, outcome.tls_unmet) == (end.value, True)
        assert outcome.code == {
            StartTls.REFUSED_454: 454,
            StartTls.REFUSED_502: 502,
            StartTls.REPLY_354: 354,
        }.get(script.starttls, 0)
        assert (session.tls, session.certificate_verified, session.downgrade) == (
            False,
            False,
            None,
        )
        assert mx.messages == []
        assert len(mx.connections) == 1
        assert_nothing_of_the_message_in_clear(mx)
        return
    assert isinstance(outcome, Delivered)
    (message,) = mx.messages
    assert message.content == CONTENT
    assert message.in_tls is (end in (V, E)) is session.tls
    assert session.certificate_verified is (end is V)
    assert session.verified_by == ("pkix" if end is V else None)
    assert len(mx.connections) == (2 if end is NEW else 1)
    if session.tls:
        assert session.tls_version == message.tls_version
        assert session.tls_cipher
        assert session.downgrade is None
        assert message.sni == mx.name
        assert_nothing_of_the_message_in_clear(mx)
        assert message.connection.in_tls.startswith(b"EHLO ")
    else:
        assert session.downgrade is not None
        assert session.downgrade.reason == DowngradeReason(column)
        assert session.downgrade.wanted is (Level.ENCRYPTED if skip else Level.VERIFIED)
        assert session.downgrade.error
        assert "STARTTLS" not in mx.connections[1].verbs if end is NEW else True


async def test_the_error_that_led_into_clear_text_is_told_in_its_own_words(rig):
    await rig.mx(Script(certificate=Kind.EXPIRED))
    downgrade = hop(await rig.send(entry())).downgrade
    assert downgrade.error == "certificate not verified: certificate has expired"


@pytest.mark.parametrize("require", [False, True])
async def test_certificate_that_does_not_verify_is_told_though_no_session_used_it(rig, require):
    await rig.mx(Script(certificate=Kind.EXPIRED))
    session = hop(await rig.send(entry(require=require)))
    assert not session.tls
    assert session.certificate is not None
    assert session.certificate.not_after < datetime.now(UTC)
    assert session.certificate.names == (session.mx_host,)


async def test_host_that_failed_before_another_is_told_with_its_certificate(rig):
    await rig.mx(Script(certificate=Kind.WRONG_NAME), preference=5)
    good = await rig.mx(Script(), preference=10, name="mx2.dest.example")
    outcome = await rig.send(entry(require=True))
    assert hop(outcome).mx_host == good.name
    [earlier] = outcome.earlier
    assert earlier.certificate is not None
    assert earlier.mx_host not in earlier.certificate.names
    assert outcome.routing is not None
    assert [line.partition(" [")[0] for line in outcome.routing.hosts] == [
        f"5 {earlier.mx_host}",
        f"10 {good.name}",
    ]


@pytest.mark.parametrize("kind", UNVERIFIABLE)
async def test_on_unverified_encrypted_keeps_to_tls(rig, kind):
    mx = await rig.mx(Script(certificate=kind))
    rig.delivery["on_unverified"] = OnUnverified.ENCRYPTED
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    session = hop(outcome)
    assert (session.tls, session.certificate_verified, session.downgrade) == (True, False, None)
    assert_nothing_of_the_message_in_clear(mx)


async def test_on_unverified_encrypted_still_goes_in_clear_where_there_is_no_tls(rig):
    await rig.mx(Script(certificate=Kind.EXPIRED), Script(starttls=StartTls.HANG), Script())
    rig.delivery["on_unverified"] = OnUnverified.ENCRYPTED
    session = hop(await rig.send(entry()))
    assert not session.tls
    assert session.downgrade.reason is DowngradeReason.HANDSHAKE_FAILED
    assert session.downgrade.wanted is Level.VERIFIED
    assert "certificate has expired" in session.downgrade.error


async def test_required_tls_passes_over_bad_hosts_to_a_good_one(rig):
    bad = [
        await rig.mx(Script(starttls=StartTls.ABSENT)),
        await rig.mx(Script(certificate=Kind.SELF_SIGNED)),
        await rig.mx(Script(starttls=StartTls.REFUSED_454)),
    ]
    good = await rig.mx()
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Delivered)
    assert hop(outcome).mx_host == good.name
    assert [line.partition(" ")[0] for line in outcome.hosts] == [mx.name for mx in bad]
    for mx in bad:
        assert mx.messages == []
        assert_nothing_of_the_message_in_clear(mx)


async def test_deferral_names_the_reason_of_every_host(rig):
    await rig.mx(Script(starttls=StartTls.ABSENT))
    await rig.mx(Script(certificate=Kind.EXPIRED))
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.7.5"
    assert "has expired" in outcome.description
    (line,) = outcome.hosts
    assert "STARTTLS not offered" in line


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (Script(certificate=Kind.EXPIRED), "5.7.5"),
        (Script(starttls=StartTls.HANG), "5.7.5"),
        (Script(starttls=StartTls.ABSENT), "5.7.4"),
        (Script(starttls=StartTls.REFUSED_454), "5.7.4"),
        (Script(starttls=StartTls.REFUSED_502), "5.7.4"),
    ],
)
async def test_on_tls_unmet_bounce_bounces_after_the_last_host(rig, script, status):
    await rig.mx(script)
    await rig.mx(script)
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Bounced)
    assert outcome.status == status
    assert len(outcome.hosts) == 1


@pytest.mark.parametrize("order", [0, 1])
async def test_on_tls_unmet_bounce_waits_while_any_host_had_other_trouble(rig, order):
    await rig.mx(Script(certificate=Kind.EXPIRED))
    mx = await rig.mx()
    await mx.close()
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    if order:
        rig.hosts.reverse()
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.tls_unmet) == ("4.7.5", True)


async def test_on_tls_unmet_bounce_waits_while_the_dns_had_trouble(rig):
    await rig.mx(Script(certificate=Kind.EXPIRED))
    rig.trouble = ("mx0.dest.example: SERVFAIL",)
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Deferred)
    assert outcome.hosts == rig.trouble


INSISTS = "530 5.7.0 Must issue a STARTTLS command first"


@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA", "CONTENT"])
@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "reply",
    [
        INSISTS,
        "550 5.7.10 Encryption needed",
        "554 5.7.1 TLS is required here",
        "503 use STARTTLS first",
    ],
)
@pytest.mark.parametrize("mode", [StartTls.ABSENT, StartTls.REFUSED_454, StartTls.OK])
async def test_a_host_that_wants_tls_in_clear_has_not_refused_the_mail(
    rig, verb, pipelining, reply, mode
):
    offers = ("PIPELINING",) if pipelining else ()
    script = Script(
        certificate=Kind.EXPIRED, starttls=mode, replies_in_clear={verb: reply}, offers=offers
    )
    await rig.mx(script)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.7.5", int(reply[:3]))
    assert reply[10:] in outcome.description
    assert any(
        word in outcome.description for word in ("not offered", "STARTTLS refused", "expired")
    )


@pytest.mark.parametrize(
    "reply",
    [
        "200 2.0.0 sure",
        "250 2.0.0 OK",
        "334 ",
        "354 go on",
        "454 4.7.0 later",
        "500 what",
        "550 5.7.1 no",
    ],
)
@pytest.mark.parametrize(("require", "skip"), BOTH_WAYS)
async def test_any_answer_to_starttls_but_220_is_a_refusal(rig, reply, require, skip):
    mx = await rig.mx(Script(replies_in_clear={"STARTTLS": reply}))
    outcome = await rig.send(entry(require=require, skip=skip))
    assert len(mx.connections) == 1
    if require:
        assert isinstance(outcome, Deferred)
        assert (outcome.status, outcome.code) == ("4.7.4", int(reply[:3]))
        assert_nothing_of_the_message_in_clear(mx)
    else:
        assert isinstance(outcome, Delivered)
        assert hop(outcome).downgrade.reason is DowngradeReason.REFUSED


@pytest.mark.parametrize(("require", "skip"), BOTH_WAYS)
async def test_invalid_reply_to_starttls_spoils_the_connection(rig, require, skip):
    mx = await rig.mx(Script(replies_in_clear={"STARTTLS": "ready when you are"}))
    outcome = await rig.send(entry(require=require, skip=skip))
    if require:
        assert isinstance(outcome, Deferred)
        assert outcome.status == "4.7.5"
        assert_nothing_of_the_message_in_clear(mx)
    else:
        assert isinstance(outcome, Delivered)
        assert hop(outcome).downgrade.reason is DowngradeReason.HANDSHAKE_FAILED
        assert len(mx.connections) == 2


@pytest.mark.parametrize("reply", ["550 5.1.1 no such user", "451 4.3.0 later"])
async def test_refusal_in_clear_says_why_the_session_was_in_clear(rig, reply):
    await rig.mx(Script(starttls=StartTls.ABSENT, replies={"RCPT": reply}))
    session = hop(await rig.send(entry()))
    assert not session.tls
    assert session.downgrade.reason is DowngradeReason.NOT_OFFERED


async def test_after_a_host_that_wants_tls_in_clear_the_next_one_is_tried(rig):
    await rig.mx(Script(certificate=Kind.EXPIRED, replies_in_clear={"MAIL": INSISTS}))
    good = await rig.mx()
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert hop(outcome).mx_host == good.name
    assert len(outcome.hosts) == 1


async def test_octets_injected_before_the_handshake_are_discarded(rig):
    inject = (
        b"250-evil\r\n250 PIPELINING\r\n250 2.1.0 OK\r\n250 2.1.5 OK\r\n354 go on\r\n"
        b"250 2.0.0 taken\r\n"
    )
    mx = await rig.mx(Script(inject=inject, offers_in_tls=("8BITMIME",)))
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Delivered)
    assert outcome.message == "2.0.0 OK"
    assert len(mx.messages) == 1
    assert mx.connections[0].verbs == ["EHLO", "STARTTLS", "EHLO", "MAIL", "RCPT", "DATA"]


async def test_only_extensions_offered_inside_tls_count(rig):
    mx = await rig.mx(
        Script(offers=("PIPELINING", "SIZE 10", "DSN"), offers_in_tls=("SIZE 1000000",))
    )
    outcome = await rig.send(entry(require=True))
    assert isinstance(outcome, Delivered)
    assert not outcome.dsn_passed_on
    assert len(mx.messages) == 1


async def test_session_tells_of_the_certificate_that_the_host_showed(rig):
    mx = await rig.mx()
    outcome = await rig.send(entry(require=True))
    assert outcome.session is not None
    facts = outcome.session.certificate
    assert facts.names == (mx.name,)
    assert len(facts.sha256) == 64
    assert facts.not_before < facts.not_after
    again = await rig.send(entry(require=True, skip=True))
    assert again.session.certificate is facts  # read once
