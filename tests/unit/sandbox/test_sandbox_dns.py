"""The DNS server of the tests answers, and fails, as it is told."""

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.resolver
import pytest

from relay.sandbox.dns import DnsAnswer, DnsServer, Fault


@pytest.fixture
async def server():
    async with DnsServer() as running:
        yield running


def resolver(server: DnsServer) -> dns.asyncresolver.Resolver:
    made = dns.asyncresolver.Resolver(configure=False)
    made.nameservers = [server.address]
    made.port = server.port
    made.lifetime = 1.0
    made.use_edns(0, dns.flags.DO, 1232)
    return made


async def test_an_mx_has_preference_and_name(server):
    server.mx("Example.NET.", (10, "mx1.example.net"), (20, "mx2.example.net"), ttl=77)
    answer = await resolver(server).resolve("example.net", "MX")
    assert {(rr.preference, rr.exchange.to_text()) for rr in answer} == {
        (10, "mx1.example.net."),
        (20, "mx2.example.net."),
    }
    assert answer.rrset is not None
    assert answer.rrset.ttl == 77
    assert server.asked("example.net", "MX") == 1


async def test_a_name_without_this_type_has_no_data_and_an_unknown_one_does_not_exist(server):
    server.a("host.example", "127.0.0.1")
    with pytest.raises(dns.resolver.NoAnswer):
        await resolver(server).resolve("host.example", "MX")
    with pytest.raises(dns.resolver.NXDOMAIN):
        await resolver(server).resolve("other.example", "MX")


async def test_a_wildcard_stands_for_names_that_are_not_there(server):
    server.a("*.example", "127.0.0.1")
    server.mx("there.example", (0, "."))
    assert (await resolver(server).resolve("any.example", "A"))[0].address == "127.0.0.1"
    with pytest.raises(dns.resolver.NoAnswer):
        await resolver(server).resolve("there.example", "A")


async def test_aliases_are_followed(server):
    server.cname("www.example", "alias.example")
    server.cname("alias.example", "host.example")
    server.a("host.example", "127.0.0.9")
    assert (await resolver(server).resolve("www.example", "A"))[0].address == "127.0.0.9"


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.REFUSED])
async def test_a_failing_server_leaves_no_nameserver(server, fault):
    server.fail("bad.example", "*", fault)
    with pytest.raises(dns.resolver.NoNameservers):
        await resolver(server).resolve("bad.example", "MX")


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.WRONG_ID, Fault.GARBAGE])
async def test_invalid_answer_ends_in_a_timeout_or_a_dead_server(server, fault):
    server.set("bad.example", "MX", DnsAnswer(("10 mx.example.",), fault=fault))
    with pytest.raises((dns.resolver.LifetimeTimeout, dns.resolver.NoNameservers)):
        await resolver(server).resolve("bad.example", "MX")


async def test_a_truncated_answer_is_whole_over_tcp(server):
    server.set("big.example", "A", DnsAnswer(("127.0.0.1",), fault=Fault.TRUNCATED))
    assert (await resolver(server).resolve("big.example", "A"))[0].address == "127.0.0.1"
    assert server.asked("big.example", "A") == 2


async def test_an_answer_too_big_for_udp_is_truncated_by_itself(server):
    server.a("many.example", *(f"127.0.{n // 250}.{n % 250}" for n in range(300)))
    assert len(await resolver(server).resolve("many.example", "A")) == 300
    assert server.asked("many.example", "A") == 2


async def test_answers_may_differ_from_query_to_query(server):
    server.set(
        "rebind.example", "A", DnsAnswer(("11.22.33.44",), ttl=0), DnsAnswer(("127.0.0.1",), ttl=0)
    )
    first = await resolver(server).resolve("rebind.example", "A")
    second = await resolver(server).resolve("rebind.example", "A")
    assert (first[0].address, second[0].address) == ("11.22.33.44", "127.0.0.1")


async def test_authenticity_is_told_to_those_who_ask(server):
    server.mx("secure.example", (10, "mx.secure.example"), authentic=True)
    server.mx("insecure.example", (10, "mx.insecure.example"))
    secure = await resolver(server).resolve("secure.example", "MX")
    insecure = await resolver(server).resolve("insecure.example", "MX")
    assert secure.response.flags & dns.flags.AD
    assert not insecure.response.flags & dns.flags.AD


async def test_a_late_answer_is_late(server):
    server.a("slow.example", "127.0.0.1")
    server.delay("slow.example", "A", 5.0)
    with pytest.raises(dns.exception.Timeout):
        await resolver(server).resolve("slow.example", "A")
