"""What reports on TLS count of attempts at real mail hosts (RFC 8460 §4)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.deliver.destinations import NotNow
from relay.deliver.sessions import failed_fetch
from relay.deliver.sts_fetch import FetchFailed
from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession
from relay.policy.rules import DestinationRule, PolicyRules
from relay.policy.settings import FloorUse
from relay.queue.entry import TLS_REPORT
from relay.route.answers import Unanswered
from relay.route.floor import StsFloor
from relay.route.mta_sts import KeptPolicy, PolicyError, StsMode, parse_policy
from relay.route.next_hop import Hosts, Naming
from relay.route.security import OnUnverified
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script
from tests.fakes.floors import Published, floors_of
from tests.fakes.mail import entry
from tests.unit.deliver.test_attempt_floors import HOSTS, Met, key_record, tlsa

LINES = ("version: STSv1", "mode: enforce", "mx: mx1.dest.example", "max_age: 86400")
STS = StsFloor("dest.example", StsMode.ENFORCE, "1", ("mx1.dest.example",), LINES)
BY_STS = JudgedBy(PolicyType.STS, "dest.example", LINES, ("mx1.dest.example",))
BY_NONE = JudgedBy(PolicyType.NONE, "dest.example")
BASE = "mx1.dest.example"
RECORDS = "_{port}._tcp.mx1.dest.example"

FAULTS = {
    "wrong-name": PolicyResult.HOST_MISMATCH,
    "expired": PolicyResult.EXPIRED,
    "self-signed": PolicyResult.NOT_TRUSTED,
    "absent": PolicyResult.STARTTLS_NOT_SUPPORTED,
    "refused": PolicyResult.STARTTLS_NOT_SUPPORTED,
    "garbage": PolicyResult.VALIDATION_FAILURE,
    "closed": PolicyResult.VALIDATION_FAILURE,
}


def counting(rig: Any, published: Published | None = None, **rules: Any) -> None:
    rig.counts_sessions = True
    rig.floors = floors_of(published or Published(), PolicyRules(**rules))


def the_one(rig: Any) -> TlsSession:
    [session] = rig.sessions
    assert isinstance(session, TlsSession)
    return session


def result(session: TlsSession) -> PolicyResult | None:
    return session.failure.result if session.failure is not None else None


@pytest.mark.parametrize("met", HOSTS, ids=lambda met: met.name)
@pytest.mark.parametrize("require", [False, True])
async def test_a_host_without_policy_is_counted_once_by_its_first_handshake(
    rig: Any, met: Met, require: bool
) -> None:
    await rig.mx(met.script)
    counting(rig)
    await rig.deliver(entry(require=require))
    session = the_one(rig)
    assert (session.domain, session.judged_by) == ("dest.example", BY_NONE)
    assert result(session) == FAULTS.get(met.name)


@pytest.mark.parametrize("met", HOSTS, ids=lambda met: met.name)
@pytest.mark.parametrize("use", [FloorUse.ENFORCE, FloorUse.TESTING])
async def test_a_host_under_mta_sts_is_counted_under_the_policy(
    rig: Any, met: Met, use: FloorUse
) -> None:
    await rig.mx(met.script)
    mode = StsMode.ENFORCE if use is FloorUse.ENFORCE else StsMode.TESTING
    counting(rig, Published(sts=[replace(STS, mode=mode)]))
    await rig.deliver(entry(skip=use is FloorUse.TESTING))
    session = the_one(rig)
    assert session.judged_by == BY_STS
    assert result(session) == FAULTS.get(met.name)


async def test_a_failure_says_who_met_whom_and_why(rig: Any) -> None:
    await rig.mx(Script(certificate=Kind.SELF_SIGNED))
    counting(rig)
    await rig.deliver(entry())
    failure = the_one(rig).failure
    assert failure == SessionFailure(
        PolicyResult.NOT_TRUSTED,
        "127.0.0.1",
        "mx1.dest.example",
        "127.0.1.1",
        "certificate not verified: self-signed certificate",
    )


async def test_a_host_with_tlsa_records_is_counted_under_its_base_domain(rig: Any) -> None:
    mx = await rig.mx(Script(), tlsa_bases=(BASE,))
    record = key_record(rig, Kind.GOOD)
    name = RECORDS.format(port=mx.port)
    counting(rig, Published(tlsa={name: tlsa(record)}))
    await rig.deliver(entry())
    text = f"3 1 1 {record[3:].hex()}"
    assert the_one(rig) == TlsSession(
        "dest.example", JudgedBy(PolicyType.TLSA, "mx1.dest.example", (text,))
    )


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (tlsa(bytes([3, 1, 1]) + bytes(32)), PolicyResult.VALIDATION_FAILURE),
        (tlsa(bytes([1, 1, 1]) + bytes(32)), PolicyResult.TLSA_INVALID),
        (Unanswered("SERVFAIL"), PolicyResult.DNSSEC_INVALID),
    ],
)
async def test_tlsa_records_that_are_not_met_are_a_failure(
    rig: Any, records: Any, expected: PolicyResult
) -> None:
    mx = await rig.mx(Script(), tlsa_bases=(BASE,))
    counting(rig, Published(tlsa={RECORDS.format(port=mx.port): records}))
    await rig.deliver(entry())
    session = the_one(rig)
    assert result(session) == expected
    assert (session.judged_by.type, session.judged_by.domain) == (PolicyType.TLSA, BASE)


async def test_hosts_that_the_policy_does_not_name_are_counted_once_each(rig: Any) -> None:
    """Each address is a host of its own in routing; the domain has named one host."""
    for name in ("other.example", "other.example", "mx1.dest.example"):
        await rig.mx(Script(), name=name)
    counting(rig, Published(sts=[STS]))
    await rig.deliver(entry())
    refused, used = sorted(rig.sessions, key=lambda one: one.failure is None)
    assert used == TlsSession("dest.example", BY_STS)
    assert refused.judged_by == BY_STS
    assert refused.failure is not None
    assert refused.failure.reason.startswith("it is not named by the MTA-STS policy")
    assert replace(refused.failure, reason="") == SessionFailure(
        PolicyResult.VALIDATION_FAILURE, mx_host="other.example"
    )


async def test_a_host_that_only_the_operator_excludes_is_not_counted(rig: Any) -> None:
    await rig.mx(Script())
    rule = DestinationRule(mx=("elsewhere.example",))
    counting(rig, destinations={"dest.example": rule})
    await rig.deliver(entry())
    assert rig.sessions == []


async def test_a_host_that_does_not_come_as_far_as_ehlo_is_not_counted(rig: Any) -> None:
    await rig.mx(Script(replies={"GREETING": "554 5.3.2 go away"}))
    await rig.mx(Script(replies={"EHLO": "550 no", "HELO": "550 no"}))
    counting(rig)
    await rig.deliver(entry())
    assert rig.sessions == []


async def test_a_host_that_breaks_off_inside_tls_had_good_tls(rig: Any) -> None:
    await rig.mx(
        Script(
            replies={"EHLO": "421 busy", "HELO": "421 busy"},
            replies_in_clear={"EHLO": "250-x\r\n250 STARTTLS"},
        )
    )
    counting(rig)
    await rig.deliver(entry())
    assert the_one(rig).failure is None


async def test_a_second_connection_that_does_not_look_at_the_certificate_is_not_counted(
    rig: Any,
) -> None:
    mx = await rig.mx(Script(certificate=Kind.EXPIRED))
    rig.delivery = {"on_unverified": OnUnverified.ENCRYPTED}
    counting(rig)
    await rig.deliver(entry())
    assert len(mx.connections) == 2
    assert mx.messages[0].in_tls
    assert result(the_one(rig)) == PolicyResult.EXPIRED


async def test_a_connection_that_is_used_again_is_not_counted_again(rig: Any) -> None:
    mx = await rig.mx(Script())
    counting(rig)
    await rig.deliver(entry())
    await rig.deliver(entry())
    assert len(mx.messages) == 2
    assert len(rig.sessions) == 1


async def test_mail_that_carries_a_report_is_not_counted(rig: Any) -> None:
    await rig.mx(Script())
    counting(rig)
    report = entry()
    await rig.deliver(replace(report, message=replace(report.message, origin=TLS_REPORT)))
    assert rig.sessions == []


async def test_nothing_is_counted_where_no_reports_are_sent(rig: Any) -> None:
    await rig.mx(Script())
    rig.floors = floors_of(Published())
    await rig.deliver(entry())
    assert rig.sessions == []


async def test_mail_by_a_route_is_told_to_the_host_of_the_route(rig: Any) -> None:
    await rig.mx(Script())
    counting(rig)
    rig.attempt._route = _by_route(rig, "smarthost.example")
    await rig.deliver(entry())
    assert the_one(rig).domain == "smarthost.example"


async def test_mail_by_a_route_to_an_address_is_told_to_nobody(rig: Any) -> None:
    await rig.mx(Script())
    counting(rig)
    rig.attempt._route = _by_route(rig, "192.0.2.1")
    await rig.deliver(entry())
    assert rig.sessions == []


def _by_route(rig: Any, host: str) -> Any:
    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        return Hosts(tuple(rig.hosts), naming=Naming(is_secure=True, route_host=host))

    return route


async def test_a_host_is_not_counted_as_refused_while_another_keeps_the_mail_waiting(
    rig: Any,
) -> None:
    """The attempt is made again at once, and refuses the host again."""
    await rig.mx(Script(), name="other.example")
    await rig.mx(Script(replies={"GREETING": "421 4.3.2 too many"}), name="mx1.dest.example")
    counting(rig, Published(sts=[STS]))
    try:
        await rig.deliver(entry())
    except NotNow:
        assert rig.sessions == []
    else:
        assert [result(one) for one in rig.sessions] == [PolicyResult.VALIDATION_FAILURE]


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def _kept(mode: str, age: timedelta) -> KeptPolicy:
    body = f"version: STSv1\nmode: {mode}\nmx: mx1.dest.example\nmax_age: 86400\n"
    return KeptPolicy("dest.example", "1", parse_policy(body.encode()), NOW - age, NOW)


@pytest.mark.parametrize(
    ("before", "by"),
    [
        (None, JudgedBy(PolicyType.STS, "dest.example")),
        (_kept("enforce", timedelta(hours=1)), BY_STS),
        (_kept("enforce", timedelta(days=2)), JudgedBy(PolicyType.STS, "dest.example")),
    ],
)
def test_a_failed_fetch_is_a_failure_of_the_policy_in_force(
    before: KeptPolicy | None, by: JudgedBy
) -> None:
    found = FetchFailed(PolicyError.CERTIFICATE, "why")
    failure = SessionFailure(PolicyResult.STS_WEBPKI_INVALID)
    assert failed_fetch("dest.example", found, before, now=NOW) == TlsSession(
        "dest.example", by, failure
    )


def test_a_domain_that_gave_its_policy_up_does_not_hear_of_failed_fetches() -> None:
    found = FetchFailed(PolicyError.FETCH, "why")
    assert failed_fetch("dest.example", found, _kept("none", timedelta()), now=NOW) is None
