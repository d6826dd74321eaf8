"""What a recipient's domain asks for, against real mail hosts: 4 settings, floors and hosts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay.deliver.sts_policies import PolicyPending
from relay.mail.outcome import Bounced, Deferred, Delivered, HopPolicy, Outcome
from relay.policy.rules import DestinationRule, PolicyRules
from relay.policy.settings import FloorUse
from relay.route.answers import TlsaAnswer, TlsaLookup, Unanswered
from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import StsMode
from relay.route.next_hop import Hosts, Naming, NextHop
from relay.route.security import OnTlsUnmet
from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.fakes.floors import Published, floors_of
from tests.fakes.mail import CONTENT, entry
from tests.fakes.waiting import until
from tests.unit.deliver.conftest import Rig

SETTINGS = [(False, False), (False, True), (True, False), (True, True)]
NAME = "mx1.dest.example"


def leaf(rig, kind: Kind) -> x509.Certificate:
    return x509.load_pem_x509_certificate(
        rig.authority.leaf(NAME, kind, address="127.0.1.1").chain_pem
    )


def spki(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def tlsa(*found: bytes) -> TlsaAnswer:
    return TlsaAnswer(found, authenticated=True)


def key_record(rig, kind: Kind) -> bytes:
    return bytes([3, 1, 1]) + sha256(spki(leaf(rig, kind))).digest()


def sts(mode: StsMode = StsMode.ENFORCE, *mx: str) -> StsFloor:
    return StsFloor("dest.example", mode, "1", mx or (NAME,))


@dataclass(frozen=True)
class Met:
    """A host, and what of TLS there is with it: whether its certificate verifies, by PKIX."""

    name: str
    script: Script
    kind: Kind | None  # None: there is no TLS
    unmet: str = ""  # where there is none
    result: str = ""
    clear_new: bool = False


HOSTS = [
    Met("good", Script(), Kind.GOOD),
    Met("wrong-name", Script(certificate=Kind.WRONG_NAME), Kind.WRONG_NAME),
    Met("expired", Script(certificate=Kind.EXPIRED), Kind.EXPIRED),
    Met("self-signed", Script(certificate=Kind.SELF_SIGNED), Kind.SELF_SIGNED),
    Met("absent", Script(starttls=StartTls.ABSENT), None, "4.7.4", "starttls-not-supported"),
    Met("refused", Script(starttls=StartTls.REFUSED_454), None, "4.7.4", "starttls-not-supported"),
    Met("garbage", Script(starttls=StartTls.GARBAGE), None, "4.7.5", "validation-failure", True),
    Met("closed", Script(starttls=StartTls.CLOSE), None, "4.7.5", "validation-failure", True),
]
PKIX_FAULTS = {
    Kind.GOOD: None,
    Kind.WRONG_NAME: "certificate-host-mismatch",
    Kind.EXPIRED: "certificate-expired",
    Kind.SELF_SIGNED: "certificate-not-trusted",
}


@dataclass(frozen=True)
class Expected:
    """`status`: of what is deferred, "" where it is delivered; `by`: verified-by; `tls`: in TLS."""

    status: str = ""
    by: str | None = None
    tls: bool = True
    result: str | None = None


def by_settings(met: Met, require: bool, skip: bool) -> Expected:
    """The row of the table of TLS rules, without any floor."""
    if met.kind is None:
        return Expected(met.unmet) if require else Expected("", None, False)
    if skip:
        return Expected()
    if met.kind is Kind.GOOD:
        return Expected("", "pkix")
    return Expected("4.7.5") if require else Expected("", None, False)


def without_tls(met: Met) -> Expected:
    return Expected(met.unmet, result=met.result)


def under_dane(met: Met, record: Kind) -> Expected:
    if met.kind is None:
        return without_tls(met)
    return (
        Expected("", "dane-ee")
        if met.kind is record
        else Expected("4.7.5", result="validation-failure")
    )


def under_unusable(met: Met, require: bool, skip: bool) -> Expected:
    if met.kind is None:
        return without_tls(met)
    if met.kind is Kind.GOOD and not skip:
        return Expected("", "pkix", result="tlsa-invalid")
    if require and not skip:
        return Expected("4.7.5", result="tlsa-invalid")
    return Expected(result="tlsa-invalid")


def under_sts(met: Met) -> Expected:
    if met.kind is None:
        return without_tls(met)
    fault = PKIX_FAULTS[met.kind]
    return Expected("", "pkix") if fault is None else Expected("4.7.5", result=fault)


def sent_in_clear(mx: MxServer) -> bytes:
    return b"".join(connection.clear for connection in mx.connections)


async def assert_as_expected(rig, mx: MxServer, outcome: Outcome, expected: Expected) -> HopPolicy:
    session = outcome.session
    policy = session.policy if session is not None else outcome.policy
    assert policy is not None
    assert (policy.result.value if policy.result else None) == expected.result
    if expected.status:
        assert isinstance(outcome, Deferred)
        assert (outcome.status, outcome.tls_unmet) == (expected.status, True)
        assert not any(verb in sent_in_clear(mx) for verb in (b"MAIL", b"RCPT", b"DATA"))
        assert mx.messages == []
        return policy
    assert isinstance(outcome, Delivered)
    assert session is not None
    assert (session.tls, session.verified_by) == (expected.tls, expected.by)
    (message,) = mx.messages
    assert (message.in_tls, message.content) == (expected.tls, CONTENT)
    return policy


def named(met: Met) -> str:
    return met.name


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("record", [Kind.GOOD, Kind.SELF_SIGNED, Kind.EXPIRED])
@pytest.mark.parametrize("met", HOSTS, ids=named)
async def test_a_host_with_usable_tlsa_records_is_judged_by_them_alone(
    rig, met: Met, record: Kind, require: bool, skip: bool
):
    mx = await rig.mx(met.script, tlsa_bases=(NAME,))
    published = Published({f"_{mx.port}._tcp.{NAME}": tlsa(key_record(rig, record))})
    rig.floors = floors_of(published)
    outcome = await rig.send(entry(require=require, skip=skip))
    policy = await assert_as_expected(rig, mx, outcome, under_dane(met, record))
    assert (policy.type, policy.mode) == ("tlsa", "enforce")
    if met.kind is not None and met.kind is not record:
        (connection,) = mx.connections
        await until(lambda: connection.closed)
        assert connection.in_tls == b"QUIT\r\n"


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("met", HOSTS, ids=named)
async def test_a_host_without_a_usable_record_gets_mail_in_tls_only(
    rig, met: Met, require: bool, skip: bool
):
    mx = await rig.mx(met.script, tlsa_bases=(NAME,))
    unusable = bytes([1, 1, 1]) + bytes(32)
    rig.floors = floors_of(Published({f"_{mx.port}._tcp.{NAME}": tlsa(unusable)}))
    outcome = await rig.send(entry(require=require, skip=skip))
    policy = await assert_as_expected(rig, mx, outcome, under_unusable(met, require, skip))
    assert (policy.type, policy.mode) == ("tlsa", "enforce")


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("met", HOSTS, ids=named)
async def test_a_host_that_an_enforced_policy_names_has_to_be_verified(
    rig, met: Met, require: bool, skip: bool
):
    mx = await rig.mx(met.script)
    rig.floors = floors_of(Published(sts=[sts()]))
    outcome = await rig.send(entry(require=require, skip=skip))
    policy = await assert_as_expected(rig, mx, outcome, under_sts(met))
    assert (policy.type, policy.mode) == ("sts", "enforce")


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("kind", ["sts", "dane"])
@pytest.mark.parametrize("met", HOSTS, ids=named)
async def test_testing_floor_changes_nothing_and_says_what_it_would_have_held(
    rig, met: Met, kind: str, require: bool, skip: bool
):
    mx = await rig.mx(met.script, tlsa_bases=(NAME,))
    record = tlsa(key_record(rig, Kind.SELF_SIGNED))
    if kind == "dane":
        published = Published({f"_{mx.port}._tcp.{NAME}": record})
        rig.floors = floors_of(published, PolicyRules(dane=FloorUse.TESTING))
        held = under_dane(met, Kind.SELF_SIGNED).result
    else:
        rig.floors = floors_of(Published(sts=[sts(StsMode.TESTING)]))
        held = under_sts(met).result
    outcome = await rig.send(entry(require=require, skip=skip))
    expected = replace(by_settings(met, require, skip), result=held)
    policy = await assert_as_expected(rig, mx, outcome, expected)
    assert policy.mode == "testing"


@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize(
    ("rules", "found", "lookup", "words", "result"),
    [
        (
            PolicyRules(),
            sts(StsMode.ENFORCE, "other.example"),
            None,
            "MTA-STS",
            "validation-failure",
        ),
        (PolicyRules(), NO_STS, Unanswered("SERVFAIL"), "TLSA", "dnssec-invalid"),
        (
            PolicyRules(destinations={"dest.example": DestinationRule(mx=("mx9.dest.example",))}),
            NO_STS,
            None,
            "allows",
            None,
        ),
    ],
    ids=["not-in-policy", "tlsa-failed", "not-pinned"],
)
async def test_a_host_that_may_not_be_used_is_not_connected_to(
    rig, rules, found, lookup, words: str, result: str | None, require: bool, skip: bool
):
    mx = await rig.mx(tlsa_bases=(NAME,))
    published = Published(sts=[found])
    if lookup is not None:
        published.tlsa[f"_{mx.port}._tcp.{NAME}"] = lookup
    rig.floors = floors_of(published, rules)
    outcome = await rig.send(entry(require=require, skip=skip))
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.tls_unmet, outcome.session) == ("4.7.5", True, None)
    assert outcome.policy is not None
    assert outcome.policy.result == result
    assert words in outcome.description
    assert outcome.message.startswith(NAME)
    assert mx.connections == []


@pytest.mark.parametrize("bounce", [True, False])
@pytest.mark.parametrize("require", [True, False])
@pytest.mark.parametrize("kind", ["named", "failed"])
async def test_on_tls_unmet_bounce_returns_what_requires_tls_itself_and_never_for_a_dns_failure(
    rig, kind: str, require: bool, bounce: bool
):
    mx = await rig.mx(tlsa_bases=(NAME,))
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE if bounce else OnTlsUnmet.DEFER
    failed: dict[str, TlsaLookup] = {f"_{mx.port}._tcp.{NAME}": Unanswered("SERVFAIL")}
    rig.floors = floors_of(
        Published(failed)
        if kind == "failed"
        else Published(sts=[sts(StsMode.ENFORCE, "x.example")])
    )
    outcome = await rig.send(entry(require=require))
    is_bounced = bounce and require and kind == "named"
    assert isinstance(outcome, Bounced if is_bounced else Deferred)
    assert outcome.status == ("5.7.5" if is_bounced else "4.7.5")
    assert outcome.policy is not None
    assert outcome.policy.type == ("tlsa" if kind == "failed" else "sts")


async def test_the_record_is_looked_up_anew_before_mail_is_returned_for_a_policy(rig):
    mx = await rig.mx()
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    old, new = sts(StsMode.ENFORCE, "old.example"), replace(sts(), id="2")
    published = Published(sts=[old, new])
    rig.floors = floors_of(published)
    assert isinstance(await rig.send(entry(require=True)), Delivered)
    assert published.asked == ["sts dest.example", "sts dest.example anew"]
    assert len(mx.messages) == 1


async def test_a_policy_that_is_the_same_anew_is_not_tried_twice(rig):
    mx = await rig.mx(Script(certificate=Kind.EXPIRED))
    published = Published(sts=[sts()])
    rig.floors = floors_of(published)
    assert (await rig.send(entry())).status == "4.7.5"
    assert published.asked == ["sts dest.example", "sts dest.example anew"]
    assert len(mx.connections) == 1


async def test_a_fetch_that_began_anew_does_not_lose_the_outcome(rig):
    await rig.mx(Script(certificate=Kind.EXPIRED))
    pending = PolicyPending("dest.example", datetime.now(UTC))
    rig.floors = floors_of(Published(sts=[sts(), pending]))
    assert (await rig.send(entry())).status == "4.7.5"


async def test_the_host_that_the_policy_names_is_found_behind_one_that_it_does_not(rig):
    first, second = await rig.mx(), await rig.mx()
    rig.floors = floors_of(Published(sts=[sts(StsMode.ENFORCE, "mx2.dest.example")]))
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert (len(first.connections), len(second.messages)) == (0, 1)
    assert any("mx1.dest.example" in line for line in outcome.hosts)


async def test_dane_and_an_enforced_policy_hold_together(rig):
    """DANE alone judges the certificate; the policy still says which names may be used."""
    mx = await rig.mx(Script(certificate=Kind.SELF_SIGNED), tlsa_bases=(NAME,))
    published = Published(
        {f"_{mx.port}._tcp.{NAME}": tlsa(key_record(rig, Kind.SELF_SIGNED))}, sts=[sts()]
    )
    rig.floors = floors_of(published)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.verified_by == "dane-ee"
    published.sts = [sts(StsMode.ENFORCE, "other.example")]
    assert (await rig.send(entry())).status == "4.7.5"
    assert len(mx.connections) == 1


async def test_the_tlsa_base_domain_is_sent_as_server_name(rig):
    mx = await rig.mx(tlsa_bases=("real.dest.example", NAME))
    record = tlsa(key_record(rig, Kind.GOOD))
    rig.floors = floors_of(Published({f"_{mx.port}._tcp.real.dest.example": record}))
    assert isinstance(await rig.send(entry()), Delivered)
    assert mx.messages[0].sni == "real.dest.example"


@pytest.mark.parametrize("usage", ["2 0 0", "2 1 0"])
async def test_an_anchor_that_the_record_brings_verifies_a_host_for_its_name(rig, usage: str):
    issuer = x509.load_pem_x509_certificate(rig.authority.ca_pem)
    data = issuer.public_bytes(Encoding.DER) if usage == "2 0 0" else spki(issuer)
    record = tlsa(bytes(map(int, usage.split())) + data)
    mx = await rig.mx(tlsa_bases=(NAME,))
    wrong = await rig.mx(Script(certificate=Kind.WRONG_NAME), tlsa_bases=("mx2.dest.example",))
    rig.floors = floors_of(
        Published(
            {f"_{mx.port}._tcp.{NAME}": record, f"_{wrong.port}._tcp.mx2.dest.example": record}
        )
    )
    outcome = await rig.send(entry())
    assert outcome.session is not None
    assert outcome.session.verified_by == "dane-ta"
    rig.hosts.reverse()
    rig.hosts.pop()
    assert (await rig.send(entry())).status == "4.7.5"


async def test_messages_under_different_records_share_no_connection_and_under_one_they_do(rig):
    mx = await rig.mx(tlsa_bases=(NAME,))
    name = f"_{mx.port}._tcp.{NAME}"
    published = Published({name: tlsa(key_record(rig, Kind.GOOD))})
    rig.floors = floors_of(published)
    for _ in range(2):
        assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 1
    published.tlsa[name] = tlsa(key_record(rig, Kind.GOOD), key_record(rig, Kind.EXPIRED))
    assert isinstance(await rig.send(entry()), Delivered)
    del published.tlsa[name]
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 3


async def test_a_route_of_the_operators_is_under_the_policy_of_its_host(rig):
    mx = await rig.mx()
    published = Published(sts=[sts(StsMode.ENFORCE, "other.example")])
    rules = PolicyRules(destinations={"dest.example": DestinationRule(mx=("none.example",))})
    rig.floors = floors_of(published, rules)
    naming = Naming(True, "smart.example", ("smart.example",))

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        return Hosts(tuple(rig.hosts), naming=naming)

    rig.attempt._route = route
    outcome = await rig.send(entry())
    assert published.asked[0] == "sts smart.example"
    assert isinstance(outcome, Deferred)  # by the policy, not by the pin
    assert "MTA-STS" in outcome.description
    assert outcome.policy is not None
    assert outcome.policy.mx_secure
    assert mx.connections == []


async def next_hop_of_three(rig: Rig, sts_of: list[StsFloor | Exception]) -> Published:
    """Three hosts of one next hop, each the only one in its group; the last one is good."""
    busy = Script(replies={"RCPT": "450 4.2.0 busy"})
    for number, script in enumerate([busy, Script(), Script()]):
        await rig.mx(script, preference=number)
    hop = NextHop("provider", tuple((host.name,) for host in rig.hosts))
    rig.hosts[:] = [replace(host, hop=hop) for host in rig.hosts]
    published = Published(sts=sts_of)
    rig.floors = floors_of(published)

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        first = rig.hosts[0].name
        return Hosts(tuple(rig.hosts), naming=Naming(True, first, (first,)))

    rig.attempt._route = route
    return published


async def test_each_host_of_a_next_hop_is_under_its_own_policy(rig):
    published = await next_hop_of_three(
        rig, [NO_STS, sts(StsMode.ENFORCE, "other.example"), NO_STS]
    )
    first, second, third = rig.servers
    assert isinstance(await rig.send(entry()), Delivered)
    names = [server.name for server in rig.servers]
    assert published.asked == [f"sts {name}" for name in names]
    assert (first.messages, second.connections, len(third.messages)) == ([], [], 1)


async def test_policy_of_another_host_is_looked_up_when_its_turn_comes(rig):
    published = await next_hop_of_three(rig, [NO_STS])
    rig.servers[0].scripts = (Script(),)
    assert isinstance(await rig.send(entry()), Delivered)
    assert published.asked == [f"sts {rig.servers[0].name}"]


async def test_policy_that_is_fetched_after_a_host_has_answered_leaves_its_host_out(rig):
    pending = PolicyPending("mx2.dest.example", datetime(2026, 1, 1, tzinfo=UTC))
    await next_hop_of_three(rig, [NO_STS, pending, NO_STS])
    assert isinstance(await rig.send(entry()), Delivered)
    _, second, third = rig.servers
    assert (second.connections, len(third.messages)) == ([], 1)


@pytest.mark.parametrize(
    ("rule", "asked"),
    [
        (DestinationRule(mta_sts=FloorUse.IGNORE), ["sts dest.example", "tlsa"]),
        (DestinationRule(dane=FloorUse.IGNORE), ["sts dest.example"]),
    ],
)
async def test_policy_ignored_for_a_destination_is_not_looked_up_and_the_log_says_so(
    rig, rule: DestinationRule, asked: list[str]
):
    mx = await rig.mx(Script(certificate=Kind.EXPIRED), tlsa_bases=(NAME,))
    published = Published(sts=[NO_STS])
    rig.floors = floors_of(published, PolicyRules(destinations={"dest.example": rule}))
    outcome = await rig.send(entry(skip=True))
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.policy.waived == "destination"
    assert [("tlsa" if "_tcp" in name else name) for name in published.asked] == asked
    assert len(mx.connections) == 1


async def test_tls_under_a_floor_is_as_new_as_required_tls(rig):
    mx = await rig.mx(TLS_1_0_ONLY, tlsa_bases=(NAME,))
    record = tlsa(key_record(rig, Kind.GOOD))
    rig.floors = floors_of(Published({f"_{mx.port}._tcp.{NAME}": record}))
    outcome = await rig.send(entry())
    assert (outcome.status, mx.messages) == ("4.7.5", [])
