"""TLS sessions are resumed among messages with the same needs, and never among others."""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import Any

import pytest

from relay.deliver.tls import CertificateVerdict, KeptSession, TlsSessions
from relay.mail.outcome import Deferred, Delivered
from relay.route.security import OnUnverified
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script
from tests.fakes.mail import entry

RESUMES = Script(resumes_tls=True)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


class Handshakes:
    """Each handshake of a client in this test: whether it was a resumption."""

    def __init__(self, monkeypatch) -> None:
        self.resumed: list[bool] = []
        finish = ssl.SSLObject.do_handshake

        def do_handshake(this) -> None:
            finish(this)
            if not this.server_side:
                self.resumed.append(this.session_reused)

        monkeypatch.setattr(ssl.SSLObject, "do_handshake", do_handshake)


@pytest.fixture
def handshakes(monkeypatch) -> Handshakes:
    return Handshakes(monkeypatch)


@pytest.fixture
def one_by_one(rig):
    """No connection is kept, so that each message shakes hands."""
    rig.limits = replace(rig.limits, messages=1)
    return rig


@pytest.mark.parametrize("version", VERSIONS)
async def test_the_second_connection_for_the_same_needs_resumes(one_by_one, handshakes, version):
    mx = await one_by_one.mx(replace(RESUMES, maximum_tls=version))
    for _ in range(3):
        outcome = await one_by_one.send(entry(require=True))
        assert isinstance(outcome, Delivered)
        assert outcome.session is not None
        assert (outcome.session.certificate_verified, outcome.session.verified_by) == (True, "pkix")
    assert handshakes.resumed == [False, True, True]
    assert len(mx.connections) == 3


WAYS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
async def test_other_tls_needs_make_a_full_handshake(one_by_one, handshakes, first, second):
    await one_by_one.mx(RESUMES)
    for require, skip in (first, second):
        assert isinstance(await one_by_one.send(entry(require=require, skip=skip)), Delivered)
    assert handshakes.resumed == [False, first == second]


async def test_a_session_nobody_verified_never_makes_a_verified_one(one_by_one, handshakes):
    await one_by_one.mx(replace(RESUMES, certificate=Kind.EXPIRED))
    one_by_one.delivery["on_unverified"] = OnUnverified.ENCRYPTED
    for skip in (False, True, False):
        outcome = await one_by_one.send(entry(skip=skip))
        assert isinstance(outcome, Delivered)
        assert outcome.session is not None
        assert not outcome.session.certificate_verified
    outcome = await one_by_one.send(entry(require=True))
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.7.5"


async def test_a_session_is_not_offered_under_another_name(one_by_one, handshakes):
    await one_by_one.mx(RESUMES, name="mx.dest.example")
    await one_by_one.send(entry(require=True))
    one_by_one.hosts[:] = [replace(one_by_one.hosts[0], name="mx.other.example")]
    assert (await one_by_one.send(entry(require=True))).status == "4.7.5"


async def test_host_that_fails_at_resumption_is_tried_again_without(one_by_one, monkeypatch):
    await one_by_one.mx(RESUMES)
    assert isinstance(await one_by_one.send(entry()), Delivered)
    finish = ssl.SSLObject.do_handshake

    def do_handshake(this) -> None:
        finish(this)
        if not this.server_side and this.session_reused:
            raise ssl.SSLError(1, "[SSL] stumbled (_ssl.c:1)")

    monkeypatch.setattr(ssl.SSLObject, "do_handshake", do_handshake)
    outcome = await one_by_one.send(entry())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.certificate_verified


def test_only_so_many_sessions_are_kept_and_only_for_so_long():
    class Session:
        has_ticket = True
        timeout = 7200

    session: Any = Session()
    made = [KeptSession(session, CertificateVerdict()) for _ in range(3)]
    sessions = TlsSessions(most=2, age_seconds=10)
    for number, kept_session in enumerate(made):
        sessions.keep(number, kept_session, now=float(number))
    assert sessions.take(0, now=2.0) is None
    assert sessions.take(1, now=2.0) is made[1]
    assert sessions.take(1, now=2.0) is None
    assert sessions.take(2, now=13.0) is None
