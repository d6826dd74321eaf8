"""Answers and failures of a name server, and what they mean, with a real server on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from datetime import timedelta
from unittest.mock import ANY

import dns.message
import dns.rrset
import pytest
import uvloop

from relay.route.answers import AddressAnswer, MxAnswer, MxRecord, NoSuchName, TrustAd, Unanswered
from relay.route.dns import DnsResolver
from relay.route.name_servers import ResolverError, ResolverOptions, parse_nameserver
from relay.sandbox.dns import DnsAnswer, DnsServer, Fault
from tests.fakes.waiting import idle_seconds, patient

SHORT = timedelta(seconds=0.4)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
async def server():
    async with DnsServer() as server:
        yield server


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def resolver(server, clock):
    options = ResolverOptions((server.nameserver,), trust_ad=TrustAd.AUTO)
    resolver = DnsResolver(options, clock=clock)
    yield resolver
    await resolver.close()


@pytest.fixture
async def hasty(server):
    """For questions that no answer comes to."""
    resolver = DnsResolver(ResolverOptions((server.nameserver,), SHORT))
    yield resolver
    await resolver.close()


async def test_mx_records_come_as_they_are_without_final_dot(server, resolver):
    server.mx("example.net", (20, "MX2.example.net"), (10, "mx1.example.net"))
    answer = await resolver.mx("example.net")
    assert answer.records == (MxRecord(10, "mx1.example.net"), MxRecord(20, "MX2.example.net"))


async def test_a_null_mx_has_an_empty_name(server, resolver):
    server.mx("nomail.example", (0, "."))
    assert (await resolver.mx("nomail.example")).records == (MxRecord(0, ""),)


async def test_both_address_families_are_asked_for(server, resolver):
    server.a("mx.example", "11.22.33.1", "11.22.33.2")
    server.aaaa("mx.example", "2a00:1234::1")
    answer = await resolver.addresses("mx.example")
    assert sorted(answer.addresses) == ["11.22.33.1", "11.22.33.2", "2a00:1234::1"]


@pytest.mark.parametrize(
    "fault", [Fault.SERVFAIL, Fault.REFUSED, Fault.DROP, Fault.GARBAGE, Fault.WRONG_ID]
)
async def test_name_server_that_fails_gives_no_answer(server, hasty, fault):
    server.mx("broken.example", (10, "mx.example"))
    server.a("broken.example", "11.22.33.1")
    server.fail("broken.example", "MX", fault)
    began = idle_seconds()
    answer = await hasty.mx("broken.example")
    assert isinstance(answer, Unanswered)
    assert answer.reason
    assert "\n" not in answer.reason
    assert idle_seconds() - began < 9, "and not the usual 10 s"
    assert server.asked("broken.example", "A") == 0


async def test_the_reason_names_what_the_server_said(server, resolver):
    server.fail("broken.example", "MX", Fault.SERVFAIL)
    assert (await resolver.mx("broken.example")).reason == f"SERVFAIL from 127.0.0.1@{server.port}"


async def test_the_strings_of_a_txt_record_are_joined(server, resolver):
    texts = ('"v=STSv1; " "id=1;"', '"another"')
    server.set("_mta-sts.example.net", "TXT", DnsAnswer(texts, 300))
    answer = await resolver.txt("_mta-sts.example.net")
    assert sorted(answer.texts) == [b"another", b"v=STSv1; id=1;"]


async def test_an_alias_of_a_txt_record_is_followed(server, resolver):
    server.cname("_mta-sts.example.net", "_mta-sts.provider.example")
    server.txt("_mta-sts.provider.example", "v=STSv1; id=1;")
    assert (await resolver.txt("_mta-sts.example.net")).texts == (b"v=STSv1; id=1;",)


async def test_a_txt_record_is_asked_for_anew_though_its_answer_is_kept(server, resolver):
    server.txt("_mta-sts.example.net", "v=STSv1; id=1;")
    await resolver.txt("_mta-sts.example.net")
    server.txt("_mta-sts.example.net", "v=STSv1; id=2;")
    assert (await resolver.txt("_mta-sts.example.net")).texts == (b"v=STSv1; id=1;",)
    assert (await resolver.txt("_mta-sts.example.net", anew=True)).texts == (b"v=STSv1; id=2;",)
    assert (await resolver.txt("_mta-sts.example.net")).texts == (b"v=STSv1; id=2;",)


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.DROP])
async def test_txt_lookup_that_fails_gives_no_answer(server, hasty, fault):
    server.txt("_mta-sts.example.net", "v=STSv1; id=1;")
    server.fail("_mta-sts.example.net", "TXT", fault)
    assert isinstance(await hasty.txt("_mta-sts.example.net"), Unanswered)


async def test_a_name_that_does_not_exist_is_known_not_to(resolver):
    assert isinstance(await resolver.mx("nowhere.example"), NoSuchName)
    assert isinstance(await resolver.addresses("nowhere.example"), NoSuchName)


async def test_a_name_without_such_records_is_an_answer_without_records(server, resolver):
    server.a("example.net", "11.22.33.1")
    server.txt("empty.example", "nothing here")
    assert (await resolver.mx("example.net")).records == ()
    assert (await resolver.addresses("empty.example")).addresses == ()


@pytest.mark.parametrize(
    "name",
    [
        "x" * 64 + ".example",
        "a..example",
        ("a" * 60 + ".") * 5 + "example",
        "",
        ".",
        r"a\999.example",
        "\udce9.x",
    ],
)
async def test_a_name_that_cannot_be_in_the_dns_is_permanent_and_no_crash(server, resolver, name):
    assert isinstance(await resolver.mx(name), NoSuchName)
    assert isinstance(await resolver.addresses(name), NoSuchName)
    assert not server.queries


async def test_no_search_list_is_used(server, tmp_path):
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\nsearch corp.example\noptions ndots:5\n")
    server.a("mail.corp.example", "11.22.33.1")
    resolver = DnsResolver(ResolverOptions((), SHORT, resolv_conf=str(conf)))
    resolver._servers._resolver.nameserver_ports = {"127.0.0.1": server.port}
    assert isinstance(await resolver.addresses("mail"), NoSuchName)
    assert server.asked("mail.corp.example", "A") == 0


# Aliases


async def test_an_alias_of_a_mail_host_is_followed(server, resolver):
    server.cname("mx.example", "real.example")
    server.a("real.example", "11.22.33.1")
    assert (await resolver.addresses("mx.example")).addresses == ("11.22.33.1",)


async def test_a_loop_of_aliases_ends_and_is_temporary(server, resolver):
    server.cname("a.example", "b.example")
    server.cname("b.example", "a.example")
    assert isinstance(await resolver.addresses("a.example"), Unanswered)
    assert sum(server.queries.values()) < 50


async def test_a_chain_of_twenty_aliases_is_followed_or_deferred(server, resolver):
    for n in range(20):
        server.cname(f"c{n}.example", f"c{n + 1}.example")
    server.a("c20.example", "11.22.33.1")
    answer = await resolver.addresses("c0.example")
    assert isinstance(answer, Unanswered) or answer.addresses == ("11.22.33.1",)
    assert sum(server.queries.values()) < 50


async def test_an_alias_to_nothing_has_no_address(server, resolver):
    server.cname("mx.example", "gone.example")
    assert isinstance(await resolver.addresses("mx.example"), NoSuchName)


async def test_an_alias_whose_target_has_no_such_records_has_no_address(server, resolver):
    server.cname("mx.example", "text.example")
    server.txt("text.example", "no address")
    assert (await resolver.addresses("mx.example")).addresses == ()


# Responses of servers that are no good resolver


class Scripted(asyncio.DatagramProtocol):
    """Answers each query with what `respond` makes of it."""

    def __init__(self, respond):
        self.respond = respond

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        for wire in self.respond(dns.message.from_wire(data)):
            self.transport.sendto(wire, addr)


async def asked_of(respond, question, name):
    """What the resolver makes of the responses: `question` is DnsResolver.mx or
    DnsResolver.addresses.
    """
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: Scripted(respond), local_addr=("127.0.0.1", 0)
    )
    port = transport.get_extra_info("sockname")[1]
    try:
        return await question(DnsResolver(ResolverOptions((f"127.0.0.1:{port}",))), name)
    finally:
        transport.close()


async def test_a_referral_is_not_the_answer_that_there_is_no_mx():
    def respond(query):
        response = dns.message.make_response(query)
        response.authority.append(dns.rrset.from_text("example.", 60, "IN", "NS", "ns.example."))
        return [response.to_wire()]

    assert isinstance(await asked_of(respond, DnsResolver.mx, "lame.example"), Unanswered)


async def test_an_alias_that_the_server_leaves_to_us_is_followed():
    def respond(query):
        response = dns.message.make_response(query)
        name = query.question[0].name.to_text()
        if name == "mx.example.":
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", "real.example."))
        elif query.question[0].rdtype == dns.rdatatype.A:
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "11.22.33.1"))
        return [response.to_wire()]

    assert (await asked_of(respond, DnsResolver.addresses, "mx.example")).addresses == (
        "11.22.33.1",
    )


async def test_an_alias_to_itself_left_to_us_ends():
    def respond(query):
        response = dns.message.make_response(query)
        name = query.question[0].name.to_text()
        target = "b.example." if name == "a.example." else "a.example."
        response.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", target))
        return [response.to_wire()]

    answer = await asked_of(respond, DnsResolver.addresses, "a.example")
    assert answer == Unanswered("a chain of aliases without end", answer.expires)


async def test_a_forged_answer_before_the_right_one_is_ignored():
    def respond(query):
        wrong = dns.message.make_response(query)
        wrong.id = query.id ^ 1
        wrong.answer.append(
            dns.rrset.from_text(query.question[0].name, 60, "IN", "MX", "0 evil.example.")
        )
        right = dns.message.make_response(query)
        right.answer.append(
            dns.rrset.from_text(query.question[0].name, 60, "IN", "MX", "10 good.example.")
        )
        return [b"garbage", wrong.to_wire(), right.to_wire()]

    assert (await asked_of(respond, DnsResolver.mx, "example.net")).records == (
        MxRecord(10, "good.example"),
    )


# Transport


async def test_a_truncated_answer_is_asked_for_again_over_tcp(server, resolver):
    server.set("big.example", "A", DnsAnswer(("11.22.33.1",), fault=Fault.TRUNCATED))
    answer = await resolver.addresses("big.example")
    assert answer.addresses == ("11.22.33.1",)


async def test_an_answer_of_many_kilobytes_is_read_whole_over_tcp(server, resolver):
    server.mx("big.example", *((n, f"mx{n}.{'x' * 50}.example") for n in range(900)))
    answer = await resolver.mx("big.example")
    assert len(answer.records) == 900
    assert answer.records[0].preference == 0


async def test_best_mail_hosts_of_a_still_larger_answer_are_kept(server, resolver):
    server.mx("huge.example", *((3000 - n, f"mx{n}") for n in range(2500)))
    answer = await resolver.mx("huge.example")
    assert len(answer.records) == 1000
    assert answer.records[0] == MxRecord(501, "mx2499")


async def test_truncation_without_tcp_is_temporary(server, hasty):
    server.set("big.example", "MX", DnsAnswer(("10 mx.example.",), fault=Fault.TRUNCATED_NO_TCP))
    assert isinstance(await hasty.mx("big.example"), Unanswered)


async def test_missing_name_server_is_temporary():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        resolver = DnsResolver(ResolverOptions((f"127.0.0.1:{taken.getsockname()[1]}",), SHORT))
        assert isinstance(await resolver.mx("example.net"), Unanswered)


async def test_the_second_name_server_answers_where_the_first_fails(server):
    async with DnsServer() as broken:
        broken.fail("example.net", "MX", Fault.SERVFAIL)
        server.mx("example.net", (10, "mx.example.net"))
        resolver = DnsResolver(ResolverOptions((broken.nameserver, server.nameserver)))
        answer = await resolver.mx("example.net")
        assert isinstance(answer, MxAnswer)
        assert answer.records == (MxRecord(10, "mx.example.net"),)


async def test_an_answer_that_comes_too_late_is_no_answer(server, hasty):
    server.set("late.example", "MX", DnsAnswer(("10 mx.example.",), delay=1.5))
    assert isinstance(await hasty.mx("late.example"), Unanswered)


# --- validation -------------------------------------------------------------------------------


async def test_each_dns_answer_says_whether_it_was_validated(server, resolver):
    server.sign("signed.example")
    server.mx("signed.example", (10, "mx.signed.example"))
    server.a("mx.signed.example", "11.22.33.1")
    server.mx("plain.example", (10, "mx.plain.example"))
    server.a("mx.plain.example", "11.22.33.2")
    assert (await resolver.mx("signed.example")).authenticated
    assert (await resolver.addresses("mx.signed.example")).authenticated
    assert not (await resolver.mx("plain.example")).authenticated
    assert not (await resolver.addresses("mx.plain.example")).authenticated
    assert (await resolver.mx("empty.signed.example")) == NoSuchName(expires=ANY)


@pytest.mark.parametrize("signed", ["A", "AAAA"])
async def test_one_validated_family_of_a_host_is_enough(server, resolver, signed):
    server.sign()
    server.a("mx.example", "11.22.33.1", authentic=signed == "A")
    server.aaaa("mx.example", "2a00:1234::1", authentic=signed == "AAAA")
    assert (await resolver.addresses("mx.example")).authenticated


async def test_a_family_without_addresses_does_not_vouch_for_the_other(server, resolver):
    server.sign()
    server.a("mx.example", "11.22.33.1")
    server.set("mx.example", "AAAA", DnsAnswer(authentic=True))
    assert not (await resolver.addresses("mx.example")).authenticated


async def test_every_step_of_an_alias_has_to_be_validated(server, resolver):
    server.sign("signed.example", "too.example")
    server.cname("mx.signed.example", "host.too.example")
    server.a("host.too.example", "11.22.33.1")
    server.cname("out.signed.example", "host.plain.example")
    server.a("host.plain.example", "11.22.33.2")
    server.cname("in.plain.example", "host.too.example")
    whole = await resolver.addresses("mx.signed.example")
    assert (whole.authenticated, whole.canonical) == (True, "host.too.example")
    half = await resolver.addresses("out.signed.example")
    assert (half.authenticated, half.alias_authenticated) == (False, True)
    assert half.canonical == "host.plain.example"
    other = await resolver.addresses("in.plain.example")
    assert (other.authenticated, other.alias_authenticated) == (False, False)


async def test_only_an_alias_that_is_not_validated_is_asked_for_itself(server, resolver):
    server.sign("signed.example")
    server.cname("mx.signed.example", "host.signed.example")
    server.a("host.signed.example", "11.22.33.1")
    server.a("mx.plain.example", "11.22.33.1")
    await resolver.addresses("mx.signed.example")
    await resolver.addresses("mx.plain.example")
    assert server.asked("mx.signed.example", "CNAME") == 0
    assert server.asked("mx.plain.example", "CNAME") == 0


async def test_a_domain_that_is_an_alias_says_of_what(server, resolver):
    server.sign("example")
    server.cname("www.example", "Mail.example")
    server.mx("mail.example", (10, "mx.example"))
    assert (await resolver.mx("www.example")).canonical == "mail.example"
    assert (await resolver.mx("mail.example")).canonical == ""


async def test_tlsa_records_come_octet_for_octet_however_wrong_one_of_them_is(server, resolver):
    server.sign("example")
    server.tlsa("mx.example", "3 1 1 " + "ab" * 32, "3 1 1 abcd", "9 9 9 ")
    server.set("_25._tcp.short.example", "TLSA", DnsAnswer((r"\# 1 03", r"\# 3 030101")))
    found = await resolver.tlsa("_25._tcp.mx.example")
    assert found.authenticated
    assert set(found.records) == {
        b"\x03\x01\x01" + b"\xab" * 32,
        b"\x03\x01\x01\xab\xcd",
        b"\x09\x09\x09",
    }
    assert len((await resolver.tlsa("_25._tcp.short.example")).records) == 2


async def test_an_alias_of_a_tlsa_name_is_followed(server, resolver):
    server.sign("example")
    server.cname("_25._tcp.mx.example", "shared.example")
    server.set("shared.example", "TLSA", DnsAnswer((r"\# 4 03010100",)))
    assert (await resolver.tlsa("_25._tcp.mx.example")).records == (b"\x03\x01\x01\x00",)


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED, Fault.DROP, Fault.GARBAGE])
async def test_tlsa_records_that_cannot_be_had_are_not_no_records(server, hasty, fault):
    server.fail("_25._tcp.mx.example", "TLSA", fault)
    assert isinstance(await hasty.tlsa("_25._tcp.mx.example"), Unanswered)


@pytest.mark.parametrize("trust", list(TrustAd))
@pytest.mark.parametrize("validates", [False, True])
async def test_validation_is_believed_of_trusted_name_servers_only(
    server, trust, validates, caplog
):
    server.sign("example")
    server.validates = validates
    server.mx("example", (10, "mx.example"), authentic=True)
    options = ResolverOptions((server.nameserver,), trust_ad=trust)
    resolver = DnsResolver(options)
    expected = trust is not TrustAd.NEVER and validates
    found = await resolver.mx("example")
    assert isinstance(found, MxAnswer)
    assert found.authenticated is expected
    assert await resolver.validates() is (expected or trust is TrustAd.ALWAYS)
    assert server.asked("", "SOA") == (1 if trust is TrustAd.AUTO else 0)
    warned = (
        "TLSA records (DANE) are not looked up: the name server does not validate" in caplog.text
    )
    assert warned is (trust is TrustAd.AUTO and not validates)
    await resolver.close()


async def test_a_name_server_elsewhere_is_not_believed_and_not_asked(server, caplog):
    resolver = DnsResolver(
        ResolverOptions((server.nameserver, "192.0.2.53"), trust_ad=TrustAd.AUTO)
    )
    assert not await resolver.validates()
    assert server.asked("", "SOA") == 0
    assert "the name server 192.0.2.53 is not on this machine" in caplog.text
    always = ResolverOptions(("192.0.2.53",), trust_ad=TrustAd.ALWAYS)
    assert await DnsResolver(always).validates()
    await resolver.close()


async def test_a_resolver_that_no_longer_validates_is_found_out_within_the_hour(
    server, resolver, clock, caplog
):
    server.sign("example")
    server.mx("example", (10, "mx.example"), ttl=100_000)
    assert (await resolver.mx("example")).authenticated
    server.validates = False
    clock.now += 3000
    assert (await resolver.mx("example")).authenticated
    assert caplog.text == ""
    clock.now += 601
    server.mx("example", (10, "mx.example"), authentic=True)
    assert not (await resolver.mx("example")).authenticated
    assert caplog.text.count("TLSA records (DANE) are not looked up") == 1
    clock.now += 3601
    assert not await resolver.validates()
    assert caplog.text.count("TLSA records (DANE) are not looked up") == 1
    server.validates = True
    clock.now += 3601
    assert (await resolver.mx("example")).authenticated


async def test_a_resolver_that_does_not_answer_has_not_changed(server, hasty, clock):
    options = ResolverOptions((server.nameserver,), SHORT, trust_ad=TrustAd.AUTO)
    resolver = DnsResolver(options, clock=clock)
    server.fail(".", "SOA", Fault.SERVFAIL)
    assert not await resolver.validates()
    server.sign()
    assert not await resolver.validates()
    clock.now += 6
    assert await resolver.validates()
    server.fail(".", "SOA", Fault.SERVFAIL)
    clock.now += 3601
    assert await resolver.validates()
    await resolver.close()


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED, Fault.DROP, Fault.GARBAGE])
async def test_addresses_called_validated_wait_until_it_is_known_whether_the_resolver_validates(
    server, clock, fault, caplog
):
    server.sign("example")
    server.a("mx.example", "192.0.2.1", authentic=True)
    server.a("mx.unsigned", "192.0.2.2")
    server.fail(".", "SOA", fault)
    options = ResolverOptions((server.nameserver,), SHORT, trust_ad=TrustAd.AUTO)
    resolver = DnsResolver(options, clock=clock)
    assert isinstance(await resolver.addresses("mx.example"), Unanswered)
    assert isinstance(await resolver.addresses("mx.unsigned"), AddressAnswer)
    clock.now += 59
    assert isinstance(await resolver.addresses("mx.example"), Unanswered)
    assert caplog.text == ""
    server.sign()
    clock.now += 6
    found = await resolver.addresses("mx.example")
    assert isinstance(found, AddressAnswer)
    assert found.authenticated
    await resolver.close()


async def test_a_resolver_that_does_not_say_for_a_minute_that_it_validates_does_not(
    server, clock, caplog
):
    server.sign("example")
    server.a("mx.example", "192.0.2.1", authentic=True)
    server.fail(".", "SOA", Fault.SERVFAIL)
    resolver = DnsResolver(
        ResolverOptions((server.nameserver,), SHORT, trust_ad=TrustAd.AUTO), clock=clock
    )
    assert isinstance(await resolver.addresses("mx.example"), Unanswered)
    for _ in range(3):
        clock.now += 61
        found = await resolver.addresses("mx.example")
        assert isinstance(found, AddressAnswer)
        assert not found.authenticated
    assert caplog.text.count("does not answer whether it validates") == 1
    server.sign()
    clock.now += 6
    assert await resolver.validates()
    await resolver.close()


async def test_many_who_ask_at_once_ask_the_root_once(server, resolver):
    server.sign()
    assert all(await asyncio.gather(*(resolver.validates() for _ in range(50))))
    assert server.asked("", "SOA") == 1


def test_queries_do_not_hang_under_uvloop():
    async def many():
        async with DnsServer() as server:
            server.a("*.many.example", "11.22.33.1")
            resolver = DnsResolver(ResolverOptions((server.nameserver,), concurrency=20))
            names = [f"h{n}.many.example" for n in range(200)]
            answers = await asyncio.gather(*(resolver.addresses(name) for name in names))
            assert {getattr(answer, "addresses", answer) for answer in answers} == {("11.22.33.1",)}
            server.fail("gone.example", "*", Fault.DROP)
            assert isinstance(
                await DnsResolver(ResolverOptions((server.nameserver,), SHORT)).mx("gone.example"),
                Unanswered,
            )

    uvloop.run(asyncio.wait_for(many(), patient(30)))


# Families


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.DROP])
@pytest.mark.parametrize("broken", ["A", "AAAA"])
async def test_a_family_that_fails_does_not_matter_while_the_other_has_an_address(
    server, hasty, broken, fault
):
    server.a("mx.example", "11.22.33.1")
    server.aaaa("mx.example", "2a00:1234::1")
    server.fail("mx.example", broken, fault)
    answer = await hasty.addresses("mx.example")
    assert answer.addresses == (("2a00:1234::1",) if broken == "A" else ("11.22.33.1",))


@pytest.mark.parametrize("broken", ["A", "AAAA"])
async def test_a_family_that_fails_matters_while_the_other_has_none(server, resolver, broken):
    server.txt("mx.example", "here")
    server.fail("mx.example", broken, Fault.SERVFAIL)
    assert isinstance(await resolver.addresses("mx.example"), Unanswered)


async def test_a_broken_nxdomain_for_one_family_does_not_hide_the_other(server, resolver):
    server.a("mx.example", "11.22.33.1")
    server.fail("mx.example", "AAAA", Fault.NXDOMAIN)
    assert (await resolver.addresses("mx.example")).addresses == ("11.22.33.1",)


async def test_a_silent_family_does_not_hold_the_other_up_to_the_end(
    server, resolver, clock, monkeypatch
):
    monkeypatch.setattr("relay.route.dns._PATIENCE", 0.2)
    server.a("mx.example", "11.22.33.1")
    server.fail("mx.example", "AAAA", Fault.DROP)
    began = idle_seconds()
    answer = await resolver.addresses("mx.example")
    assert answer.addresses == ("11.22.33.1",)
    assert idle_seconds() - began < 8, "the silent family is silent for 10 s"
    assert answer.expires > clock.now + 60


# What is kept


async def test_an_answer_is_kept_for_its_ttl(server, resolver, clock):
    server.mx("example.net", (10, "mx.example.net"), ttl=100)
    await resolver.mx("example.net")
    clock.now += 99
    await resolver.mx("example.net")
    assert server.asked("example.net", "MX") == 1
    clock.now += 2
    await resolver.mx("example.net")
    assert server.asked("example.net", "MX") == 2


async def test_the_ttl_of_the_alias_counts_too(server, resolver, clock):
    server.cname("mx.example", "real.example", ttl=30)
    server.a("real.example", "11.22.33.1", ttl=300)
    answer = await resolver.addresses("mx.example")
    assert answer.expires <= clock.now + 60


@pytest.mark.parametrize(("ttl", "kept"), [(0, 1), (7 * 86400, 3600)])
async def test_a_ttl_is_kept_within_reason(server, resolver, clock, ttl, kept):
    server.mx("example.net", (10, "mx.example.net"), ttl=ttl)
    assert (await resolver.mx("example.net")).expires == clock.now + kept


async def test_answer_that_a_name_does_not_exist_is_kept_for_a_minute_at_most(
    server, resolver, clock
):
    answer = await resolver.mx("new.example")
    assert answer.expires <= clock.now + 60
    server.mx("new.example", (10, "mx.example"))
    assert isinstance(await resolver.mx("new.example"), NoSuchName)
    clock.now += 61
    assert isinstance(await resolver.mx("new.example"), MxAnswer)


async def test_a_failure_is_kept_for_seconds_only(server, resolver, clock):
    server.fail("example.net", "MX", Fault.SERVFAIL)
    await resolver.mx("example.net")
    server.mx("example.net", (10, "mx.example.net"))
    assert isinstance(await resolver.mx("example.net"), Unanswered)
    clock.now += 6
    assert isinstance(await resolver.mx("example.net"), MxAnswer)


async def test_caller_during_a_query_waits_for_the_same_answer(server, resolver):
    server.set("example.net", "MX", DnsAnswer(("10 mx.example.net.",), delay=0.1))
    answers = await asyncio.gather(*(resolver.mx("example.net") for _ in range(50)))
    assert len(set(answers)) == 1
    assert server.asked("example.net", "MX") == 1


async def test_cancelled_caller_does_not_take_the_answer_from_the_others(server, resolver):
    server.set("example.net", "MX", DnsAnswer(("10 mx.example.net.",), delay=0.2))
    impatient = asyncio.create_task(resolver.mx("example.net"))
    other = asyncio.create_task(resolver.mx("example.net"))
    await asyncio.sleep(0.05)
    impatient.cancel()
    assert isinstance(await other, MxAnswer)
    assert server.asked("example.net", "MX") == 1


async def test_only_so_many_queries_are_under_way_at_once(server):
    server.set("*.slow.example", "MX", DnsAnswer(("10 mx.example.",), delay=0.1))
    resolver = DnsResolver(ResolverOptions((server.nameserver,), concurrency=5))
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, sum(task.get_name() != "" for task in server._tasks))
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(resolver.mx(f"h{n}.slow.example") for n in range(25)))
    watching.cancel()
    assert 1 < most <= 5


async def test_names_that_are_never_answered_do_not_delay_names_that_were(server):
    server.a("mx.well.example", "11.22.33.1", ttl=0)
    server.fail("*.dead.example", "*", Fault.DROP)
    resolver = DnsResolver(
        ResolverOptions((server.nameserver,), timedelta(seconds=30), concurrency=8)
    )
    await resolver.addresses("mx.well.example")
    await asyncio.sleep(1.1)  # the answer is forgotten
    dead = [asyncio.create_task(resolver.mx(f"h{n}.dead.example")) for n in range(200)]
    async with asyncio.timeout(patient(10)):
        while server.queries.total() < 6:
            await asyncio.sleep(0.01)
    asked = server.queries["mx.well.example", "A"]
    async with asyncio.timeout(patient(2)):
        await resolver.addresses("mx.well.example")
    assert server.queries["mx.well.example", "A"] == asked + 1
    await resolver.close()
    await asyncio.gather(*dead, return_exceptions=True)


async def test_closing_gives_up_what_is_under_way(server):
    server.fail("silent.example", "MX", Fault.DROP)
    resolver = DnsResolver(ResolverOptions((server.nameserver,), timedelta(seconds=30)))
    asking = asyncio.create_task(resolver.mx("silent.example"))
    await asyncio.sleep(0.05)
    await asyncio.wait_for(resolver.close(), patient(1))
    with pytest.raises(asyncio.CancelledError):
        await asking


# Whom to ask


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("127.0.0.1", ("127.0.0.1", 53)),
        ("127.0.0.1:5353", ("127.0.0.1", 5353)),
        ("::1", ("::1", 53)),
        ("2a00:1234::53", ("2a00:1234::53", 53)),
        ("[::1]:5353", ("::1", 5353)),
        ("[::1]", ("::1", 53)),
    ],
)
def test_a_name_server_is_an_address_with_or_without_port(text, server):
    assert parse_nameserver(text) == server


@pytest.mark.parametrize(
    "text", ["", "dns.example", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:0", "1.2.3.4:65536", "[::1"]
)
def test_invalid_name_server_is_named(text):
    with pytest.raises(ResolverError, match="is not the address of a name server"):
        parse_nameserver(text)
    with pytest.raises(ResolverError):
        DnsResolver(ResolverOptions((text,)))


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "search example.net\n"])
def test_program_without_a_name_server_does_not_start_and_says_why(tmp_path, content):
    path = tmp_path / "resolv.conf"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResolverError, match=r"resolv\.conf names no name server"):
        DnsResolver(ResolverOptions(resolv_conf=str(path)))


def test_an_unusable_resolv_conf_is_a_clear_error_too(tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver dns.example\n")
    with pytest.raises(ResolverError, match="cannot be used"):
        DnsResolver(ResolverOptions(resolv_conf=str(path)))


def test_a_changed_resolv_conf_is_read_again_and_a_broken_one_is_not(tmp_path, clock, caplog):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.0.0.1\n")
    resolver = DnsResolver(ResolverOptions(resolv_conf=str(path)), clock=clock)

    def asked():
        return list(resolver._servers.resolver().nameservers)

    path.write_text("nameserver 127.0.0.2\nnameserver 127.0.0.3\n")
    assert asked() == ["127.0.0.1"]
    clock.now += 6
    assert asked() == ["127.0.0.2", "127.0.0.3"]
    path.write_text("")
    clock.now += 6
    assert asked() == ["127.0.0.2", "127.0.0.3"]
    assert "stay in use" in caplog.text
    os.remove(path)
    clock.now += 6
    assert asked() == ["127.0.0.2", "127.0.0.3"]
    path.write_text("nameserver 127.0.0.4\n")
    clock.now += 6
    assert asked() == ["127.0.0.4"]


async def test_a_mistake_in_the_library_is_temporary_and_logged(resolver, monkeypatch, caplog):
    async def broken(name, rdtype):
        raise RuntimeError("boom")

    monkeypatch.setattr(resolver, "_resolve", broken)
    assert isinstance(await resolver.mx("example.net"), Unanswered)
    assert "boom" in caplog.text


async def test_a_clock_that_steps_back_is_temporary(server, resolver, monkeypatch):
    server.set("example.net", "MX", DnsAnswer(("10 mx.example.net.",), delay=0.1))
    real = time.time
    steps: Counter[str] = Counter()

    def stepping():
        steps["asked"] += 1
        return real() - (3600 if steps["asked"] > 2 else 0)

    monkeypatch.setattr(time, "time", stepping)
    answer = await asyncio.wait_for(resolver.mx("example.net"), patient(5))
    assert isinstance(answer, Unanswered | MxAnswer)
