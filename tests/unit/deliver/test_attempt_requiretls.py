"""REQUIRETLS and TLS-Required: No (RFC 8689), against real mail hosts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.mail.outcome import Bounced, Deferred, Delivered, Outcome
from relay.policy.rules import DestinationRule, PolicyRules, TlsRule
from relay.queue.entry import Entry
from relay.route.answers import TlsaLookup, Unanswered
from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import StsMode
from relay.route.next_hop import BY_NOBODY, Hosts, Naming
from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.floors import Published, floors_of
from tests.fakes.mail import entry

NAME = "mx1.dest.example"
IN_TLS = ("PIPELINING", "SIZE 52428800", "8BITMIME", "DSN", "REQUIRETLS")
PASSES_ON = Script(offers_in_tls=IN_TLS)
SIGNED = Naming(is_secure=True, domains=("dest.example",))
POLICY = StsFloor("dest.example", StsMode.ENFORCE, "1", (NAME, "mx2.dest.example"))


def named_by(rig, naming: Naming, published: Published | None = None, **rules) -> None:
    """Whoever named the hosts, and what the domain publishes."""
    rig.floors = floors_of(published or Published(), PolicyRules(**rules))

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        return Hosts(tuple(rig.hosts), rig.trouble, naming=naming)

    rig.attempt._route = route


def tagged(reverse_path: str = "a@sender.example") -> Entry:
    """As it is queued: REQUIRETLS beats every field and setting."""
    return entry(require=True, skip=False, reverse_path=reverse_path, requiretls=True)


def says_no(require: bool = False) -> Entry:
    return entry(require=require, tls_required_no=True)


def mail_of(mx: MxServer) -> str:
    return mx.messages[0].mail


def said_in_clear(mx: MxServer) -> set[str]:
    return {verb for connection in mx.connections for verb in connection.clear_verbs}


def assert_returned(outcome: Outcome, status: str) -> None:
    assert isinstance(outcome, Bounced), outcome
    assert outcome.status == status


@pytest.mark.parametrize(
    ("naming", "sts"),
    [
        (SIGNED, NO_STS),
        (BY_NOBODY, POLICY),
        (replace(BY_NOBODY, is_domain_itself=True), NO_STS),
        (Naming(True, "smart.example", ("smart.example",)), NO_STS),
    ],
    ids=["signed MX", "MTA-STS", "no MX", "route"],
)
async def test_requiretls_is_passed_on_to_a_host_whose_name_is_sure(rig, naming, sts):
    mx = await rig.mx(PASSES_ON)
    named_by(rig, naming, Published(sts=[sts]))
    outcome = await rig.send(tagged())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.requiretls
    assert mail_of(mx).endswith("REQUIRETLS")
    assert said_in_clear(mx) == {"EHLO", "STARTTLS"}


@pytest.mark.parametrize(
    "rules", [{}, {"destinations": {"dest.example": DestinationRule(mx=(NAME,))}}]
)
async def test_a_host_whose_name_is_not_sure_is_not_connected_to_and_a_pin_is_not_enough(
    rig, rules
):
    mx = await rig.mx(PASSES_ON)
    named_by(rig, BY_NOBODY, **rules)
    assert_returned(await rig.send(tagged()), "5.7.10")
    assert mx.connections == []


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (Script(), "5.7.30"),
        (Script(offers=(*IN_TLS,), offers_in_tls=("PIPELINING",)), "5.7.30"),
        (replace(PASSES_ON, certificate=Kind.EXPIRED), "5.7.10"),
        (replace(PASSES_ON, starttls=StartTls.ABSENT), "5.7.10"),
        (replace(PASSES_ON, starttls=StartTls.REFUSED_454), "5.7.10"),
        (replace(PASSES_ON, starttls=StartTls.CLOSE), "5.7.10"),
    ],
)
async def test_host_that_fails_gets_no_part_of_the_message_which_bounces_at_once(
    rig, script: Script, status: str
):
    mx = await rig.mx(script)
    named_by(rig, SIGNED)
    assert_returned(await rig.send(tagged()), status)
    heard = {verb for connection in mx.connections for verb in connection.verbs}
    assert heard <= {"EHLO", "STARTTLS", "QUIT"}


async def test_bounce_says_requiretls_not_offered_if_one_host_lacked_nothing_else(rig):
    await rig.mx()
    await rig.mx(Script(certificate=Kind.EXPIRED))
    named_by(rig, SIGNED)
    outcome = await rig.send(tagged())
    assert_returned(outcome, "5.7.30")
    assert "REQUIRETLS not offered" in outcome.description


async def test_host_without_requiretls_is_passed_over_for_the_next(rig):
    await rig.mx()
    second = await rig.mx(PASSES_ON)
    named_by(rig, SIGNED)
    assert isinstance(await rig.send(tagged()), Delivered)
    assert len(second.messages) == 1


@pytest.mark.parametrize("what", ["no connection", "TLSA", "busy", "route"])
async def test_temporary_trouble_defers_requiretls_mail(rig, what: str):
    await rig.mx()
    published = Published()
    if what == "no connection":
        server = await rig.mx(PASSES_ON)
        await server.close()
    elif what == "busy":
        await rig.mx(replace(PASSES_ON, replies={"MAIL": "450 4.3.2 busy"}))
    elif what == "route":
        rig.trouble = ("mx9.dest.example: no answer",)
    else:
        mx = await rig.mx(PASSES_ON, tlsa_bases=("mx2.dest.example",))
        failed: dict[str, TlsaLookup] = {
            f"_{mx.port}._tcp.mx2.dest.example": Unanswered("SERVFAIL")
        }
        published = Published(failed)
    named_by(rig, SIGNED, published)
    assert isinstance(await rig.send(tagged()), Deferred)


async def test_report_about_requiretls_mail_has_the_keyword_only_where_it_is_offered(rig):
    mx = await rig.mx(PASSES_ON, Script())
    named_by(rig, BY_NOBODY)
    for _ in range(2):
        outcome = await rig.send(tagged(reverse_path=""))
        assert isinstance(outcome, Delivered)
        await rig.attempt._pool.close()
        rig.attempt._pool._closed = False
    assert [message.mail.endswith("REQUIRETLS") for message in mx.messages] == [True, False]
    assert all(message.in_tls for message in mx.messages)


async def test_report_about_requiretls_mail_never_goes_unverified(rig):
    mx = await rig.mx(Script(certificate=Kind.EXPIRED))
    named_by(rig, BY_NOBODY)
    outcome = await rig.send(tagged(reverse_path=""))
    assert isinstance(outcome, Deferred)
    assert mx.messages == []


async def test_mail_with_and_without_requiretls_shares_no_connection(rig):
    mx = await rig.mx(PASSES_ON)
    named_by(rig, SIGNED)
    await rig.send(tagged())
    await rig.send(entry(require=True))
    await rig.send(tagged())
    assert len(mx.connections) == 2
    assert [m.mail.endswith("REQUIRETLS") for m in mx.messages] == [True, True, False]


@pytest.mark.parametrize("mx_names", [(NAME,), ("other.example",)])
async def test_tls_required_no_waives_what_the_domain_asks_for(rig, mx_names):
    mx = await rig.mx(Script(starttls=StartTls.ABSENT))
    published = Published(sts=[replace(POLICY, mx=mx_names)])
    named_by(rig, BY_NOBODY, published)
    outcome = await rig.send(says_no())
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.policy.waived == "tls-required-no"
    assert published.asked == []  # not even looked up
    assert not mx.messages[0].in_tls


@pytest.mark.parametrize(
    ("message", "rules"),
    [
        (says_no(require=True), {}),
        (says_no(), {"domains": {"sender.example": TlsRule(allow_override=False)}}),
        (says_no(), {"destinations": {"dest.example": DestinationRule(allow_override=False)}}),
        (says_no(), {"default": TlsRule(False, False, False)}),
    ],
)
async def test_tls_required_no_waives_nothing_beside_a_stricter_wish_or_a_locked_rule(
    rig, message: Entry, rules
):
    mx = await rig.mx(Script(starttls=StartTls.ABSENT))
    named_by(rig, BY_NOBODY, Published(sts=[POLICY]), **rules)
    assert (await rig.send(message)).status == "4.7.4"
    assert mx.messages == []


async def test_pins_stay_whatever_the_message_says(rig):
    mx = await rig.mx()
    rules = {"destinations": {"dest.example": DestinationRule(mx=("other.example",))}}
    named_by(rig, BY_NOBODY, None, **rules)
    assert (await rig.send(says_no())).status == "4.7.5"
    assert mx.connections == []


async def test_host_that_closes_after_the_greeting_is_no_reason_to_bounce(rig):
    await rig.mx(replace(PASSES_ON, replies={"GREETING": ScriptedReply(None, then=Then.CLOSE)}))
    named_by(rig, SIGNED)
    assert isinstance(await rig.send(tagged()), Deferred)
