"""What a look at a host tells, and that it gives nothing away."""

from __future__ import annotations

import pytest

from relay.deliver.negotiate import SessionOptions
from relay.deliver.probe import HostReport, probe, probe_all
from relay.route.floor import HostFloor
from relay.route.next_hop import TlsMode
from relay.route.security import Action as Next
from relay.route.security import SecurityOptions, Situation
from relay.sandbox.certificates import Kind
from relay.sandbox.script import TLS_1_0_ONLY, Script, ScriptedReply, StartTls, Then
from tests.unit.deliver.conftest import QUICK


async def look(rig, script: Script, **host) -> HostReport:
    mx = await rig.mx(script, **host)
    report = await probe(
        rig.hosts[0], SessionOptions("relay.example", QUICK, rig.contexts), SecurityOptions()
    )
    for connection in mx.connections:
        assert set(connection.verbs) <= {"EHLO", "HELO", "STARTTLS", "QUIT"}
    return report


def sends(report: HostReport) -> list[bool]:
    return [verdict.forecast.is_sent for verdict in report.verdicts]


async def test_a_good_host_is_good_under_every_rule(rig):
    report = await look(rig, Script())
    assert (report.trouble, report.tls_offered, report.verified, report.why_not_verified) == (
        "",
        True,
        True,
        "",
    )
    assert report.tls_version == "TLSv1.3"
    assert report.tls_cipher
    assert report.certificate is not None
    assert report.certificate.names == ("mx1.dest.example",)
    assert report.certificate.subject == "CN=mx1.dest.example"
    assert report.certificate.issuer == "CN=Relay test CA"
    assert report.certificate.not_after > report.certificate.not_before
    assert [verdict.forecast.step.action for verdict in report.verdicts] == [Next.SEND_IN_TLS] * 4


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Kind.EXPIRED, "certificate has expired"),
        (Kind.SELF_SIGNED, "self-signed certificate"),
        (Kind.WRONG_NAME, "Hostname mismatch, certificate is not valid for 'mx1.dest.example'"),
        (Kind.SHORT_KEY, "EE certificate key too weak"),
    ],
)
async def test_a_certificate_that_does_not_verify_is_shown_with_the_reason(rig, kind, why):
    report = await look(rig, Script(certificate=kind))
    assert not report.verified
    assert why in report.why_not_verified
    assert report.certificate is not None
    assert [(v.forecast.step.action, v.forecast.step.unmet) for v in report.verdicts] == [
        (Next.RECONNECT_IN_CLEAR, ""),
        (Next.SEND_IN_TLS, ""),
        (Next.NEXT_HOST, "4.7.5"),
        (Next.SEND_IN_TLS, ""),
    ]


async def test_probe_of_a_host_without_tls_reports_none(rig):
    report = await look(rig, Script(starttls=StartTls.ABSENT))
    assert (report.tls_offered, report.tls_version, report.certificate) == (False, None, None)
    assert sends(report) == [True, True, False, False]
    assert {verdict.forecast.situation for verdict in report.verdicts} == {Situation.NOT_OFFERED}


async def test_host_with_old_tls_is_good_only_without_requirement_and_verification(rig):
    report = await look(rig, TLS_1_0_ONLY)
    assert (report.tls_offered, report.verified, report.tls_version) == (True, False, "TLSv1")
    assert [v.forecast.situation is Situation.SECURED for v in report.verdicts] == [
        False,
        True,
        False,
        False,
    ]
    assert sends(report) == [True, True, False, False]


async def test_a_host_whose_handshake_fails_offers_tls_all_the_same(rig):
    report = await look(rig, Script(starttls=StartTls.GARBAGE))
    assert (report.tls_offered, report.verified) == (True, False)
    assert "handshake failed" in report.why_not_verified


async def test_probe_of_a_host_with_implicit_tls_reports_tls(rig):
    report = await look(
        rig, Script(implicit_tls=True, certificate=Kind.EXPIRED), tls=TlsMode.IMPLICIT
    )
    assert (report.tls_offered, report.verified) == (True, False)
    assert sends(report) == [False, True, False, True]


@pytest.mark.parametrize(
    ("greeting", "told"),
    [
        ("554 5.7.1 go away", "answered the greeting with 554"),
        (ScriptedReply(None, then=Then.CLOSE), "closed the conn"),
    ],
)
async def test_host_that_does_not_talk_is_trouble(rig, greeting, told):
    report = await look(rig, Script(replies={"GREETING": greeting}))
    assert told in report.trouble
    assert report.verdicts == ()


async def test_several_hosts_are_reported_in_their_order(rig):
    for script in (Script(), Script(starttls=StartTls.ABSENT), Script(certificate=Kind.EXPIRED)):
        await rig.mx(script)
    closed = rig.servers[2]
    await closed.close()
    reports = await probe_all(
        [(host, HostFloor(), lambda needed: needed) for host in rig.hosts],
        SessionOptions("relay.example", QUICK, rig.contexts),
        SecurityOptions(),
    )
    assert [report.host.name for report in reports] == [mx.name for mx in rig.servers]
    assert [report.tls_offered for report in reports] == [True, False, False]
    assert "Connection refused" in reports[2].trouble
