"""Where mail for a domain goes: the table of the DNS's faults, static routes, literals, caching."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta
from ipaddress import ip_network
from random import Random
from typing import Any

import pytest

from relay.mail.outcome import Bounced, Deferred
from relay.route import router as router_module
from relay.route.answers import AddressAnswer, MxAnswer, MxRecord, NoSuchName, TrustAd, Unanswered
from relay.route.choice import Routes
from relay.route.dns import DnsResolver
from relay.route.local_address import is_local_address
from relay.route.name_servers import ResolverOptions
from relay.route.next_hop import (
    Auth,
    Credentials,
    Hosts,
    IpFamily,
    Naming,
    NextHop,
    NoRoute,
    TlsMode,
)
from relay.route.router import RouteOptions, Router
from relay.sandbox.dns import DnsAnswer, DnsServer, Fault
from tests.fakes.dns import FakeDns
from tests.fakes.waiting import idle_seconds

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def router(dns, *, clock=None, listening=(), hostname="relay.example", **options):
    if isinstance(by_recipient := options.get("routes"), dict):
        options["routes"] = Routes(by_recipient)
    return Router(
        dns,
        RouteOptions(**options),
        hostname=hostname,
        listening=lambda: listening,
        random=Random(3),
        clock=clock or time.monotonic,
    )


def next_hop(host, port=25, tls=TlsMode.STARTTLS, **login):
    return NextHop("hop", ((host,),), port, tls, Auth(**login) if login else None)


def refused(route):
    assert isinstance(route, NoRoute)
    return type(route.outcome), route.outcome.status, route.outcome.code


def tried(route):
    assert isinstance(route, Hosts)
    return [host.address for host in route.hosts]


# The DNS's own faults, against a real server. Number: the row of the table of faults.


@pytest.fixture
async def server():
    async with DnsServer() as server:
        yield server


@pytest.fixture
async def real(server):
    resolver = DnsResolver(ResolverOptions((server.nameserver,), trust_ad=TrustAd.NEVER))
    yield resolver
    await resolver.close()


@pytest.fixture
async def hasty(server):
    """For questions that no answer comes to."""
    resolver = DnsResolver(
        ResolverOptions((server.nameserver,), timedelta(seconds=0.4), trust_ad=TrustAd.NEVER)
    )
    yield resolver
    await resolver.close()


@pytest.mark.parametrize("fault", [Fault.SERVFAIL, Fault.DROP, Fault.REFUSED])
async def test_mail_waits_without_an_mx_answer_and_no_a_record_is_used(server, hasty, fault):
    server.a("broken.example", "11.22.33.1")
    server.fail("broken.example", "MX", fault)
    assert refused(await router(hasty).route("broken.example")) == (Deferred, "4.4.3", 498)
    assert server.asked("broken.example", "A") == 0


async def test_mail_for_a_domain_that_does_not_exist_bounces(real):
    route = await router(real).route("nowhere.example")
    assert refused(route) == (Bounced, "5.1.2", 498)
    assert route.outcome.description == "nowhere.example does not exist (NXDOMAIN)"


async def test_domain_without_mx_gets_mail_at_its_address(server, real):
    server.a("example.net", "11.22.33.1")
    route = await router(real).route("example.net")
    assert [(host.name, host.address, host.port) for host in route.hosts] == [
        ("example.net", "11.22.33.1", 25)
    ]


async def test_mail_for_a_null_mx_bounces_without_a_connection(server, real):
    server.mx("nomail.example", (0, "."))
    server.a("nomail.example", "11.22.33.1")
    assert refused(await router(real).route("nomail.example")) == (Bounced, "5.1.10", 556)
    assert server.asked("nomail.example", "A") == 0


async def test_mx_that_is_an_alias_keeps_the_name_of_the_mx_record(server, real):
    server.mx("example.net", (10, "mx.example.net"))
    server.cname("mx.example.net", "host7.provider.example")
    server.a("host7.provider.example", "11.22.33.1")
    route = await router(real).route("example.net")
    assert [(host.name, host.address) for host in route.hosts] == [("mx.example.net", "11.22.33.1")]


async def test_mail_for_a_loop_of_aliases_waits(server, real):
    server.mx("example.net", (10, "a.example.net"))
    server.cname("a.example.net", "b.example.net")
    server.cname("b.example.net", "a.example.net")
    assert refused(await router(real).route("example.net")) == (Deferred, "4.4.3", 498)


@pytest.mark.parametrize(
    ("rdtype", "address"),
    [
        ("A", "127.0.0.1"),
        ("A", "169.254.169.254"),
        ("A", "0.0.0.0"),
        ("A", "10.0.0.5"),
        ("AAAA", "::1"),
        ("AAAA", "::ffff:127.0.0.1"),
        ("AAAA", "64:ff9b::7f00:1"),
        ("AAAA", "fe80::1"),
    ],
)
async def test_mx_inside_our_network_is_not_connected_to(server, real, rdtype, address):
    server.mx("evil.example", (10, "mx.evil.example"))
    server.set("mx.evil.example", rdtype, DnsAnswer((address,)))
    route = await router(real).route("evil.example")
    assert refused(route) == (Bounced, "5.4.4", 498)
    assert "mx.evil.example" in route.outcome.description


@pytest.mark.parametrize("exchange", ["10.0.0.1", "localhost", "mail"])
async def test_mx_that_is_no_name_is_not_looked_up(server, real, exchange):
    server.mx("evil.example", (10, exchange))
    assert refused(await router(real).route("evil.example")) == (Bounced, "5.4.4", 498)
    assert sum(server.queries.values()) == 1


@pytest.mark.parametrize("listening", [("127.0.0.5", 25), ("0.0.0.0", 25), ("::", 25)])
async def test_mx_at_our_own_address_loops(server, real, listening):
    server.mx("evil.example", (10, "mx.evil.example"))
    server.a("mx.evil.example", "127.0.0.5")
    ours = router(real, listening=[listening], allow_networks=LOOPBACK)
    assert refused(await ours.route("evil.example")) == (Bounced, "5.4.6", 498)


async def test_second_answer_of_the_dns_has_no_effect(server, real):
    server.mx("evil.example", (10, "mx.evil.example"), ttl=0)
    server.set(
        "mx.evil.example", "A", DnsAnswer(("11.22.33.1",), ttl=0), DnsAnswer(("127.0.0.1",), ttl=0)
    )
    route = await router(real).route("evil.example")
    assert tried(route) == ["11.22.33.1"]
    assert server.asked("mx.evil.example", "A") == 1


async def test_host_with_a_thousand_addresses_is_tried_at_ten_after_a_few_queries(
    server, real, monkeypatch
):
    monkeypatch.setattr(router_module, "_PATIENCE", 60.0)  # all answers are waited for
    server.mx("many.example", *((10 + n, f"mx{n}.many.example") for n in range(200)))
    server.a("*.many.example", *(f"11.22.{n}.1" for n in range(50)))
    route = await router(real).route("many.example")
    assert len(route.hosts) == 10
    best = [f"mx{n}.many.example" for n in range(5)]
    assert [host.name for host in route.hosts[:5]] == best
    preferences = [host.preference for host in route.hosts]
    assert preferences == sorted(preferences)
    assert sum(server.queries.values()) == 2 + 2 * 100  # the MX records took TCP too


async def test_a_domain_whose_first_twenty_mail_hosts_are_gone_is_tried_at_others():
    dns = FakeDns(
        {"example.net": [(10 + n, f"mx{n}.example.net") for n in range(21)]},
        {"mx20.example.net": ["11.22.33.1"]},
    )
    assert tried(await router(dns).route("example.net")) == ["11.22.33.1"]


async def test_a_domain_with_very_many_mail_hosts_is_never_given_up_for_those_not_looked_up():
    dns = FakeDns({"example.net": [(10 + n, f"mx{n}.example.net") for n in range(101)]}, {})
    assert refused(await router(dns).route("example.net")) == (Deferred, "4.4.3", 498)


@pytest.mark.parametrize("ours", range(30))
async def test_no_mail_host_after_ourselves_is_tried_under_any_name(ours):
    """Whatever is looked up first, and whatever is drawn by lot."""
    names = [f"mx{n}.example.net" for n in range(30)]
    addresses = {name: [f"11.22.33.{n}"] for n, name in enumerate(names)}
    addresses[names[ours]] = ["11.22.44.1"]
    dns = FakeDns({"example.net": [(10 + n, name) for n, name in enumerate(names)]}, addresses)
    routes = router(dns, listening=[("11.22.44.1", 25)])
    for _ in range(10):
        route = await routes.route("example.net")
        if ours == 0:
            assert refused(route) == (Bounced, "5.4.6", 498)
        else:
            assert {host.name for host in route.hosts} <= set(names[:ours])


async def test_mail_loops_where_all_hosts_before_ourselves_are_gone():
    names = [f"mx{n}.example.net" for n in range(30)]
    addresses = {name: [f"11.22.33.{n}"] for n, name in enumerate(names) if n > 25}
    addresses[names[25]] = ["11.22.44.1"]
    dns = FakeDns({"example.net": [(10 + n, name) for n, name in enumerate(names)]}, addresses)
    routes = router(dns, listening=[("11.22.44.1", 25)])
    assert refused(await routes.route("example.net")) == (Bounced, "5.4.6", 498)


async def test_an_ipv4_address_in_disguise_is_not_connected_to_where_its_network_is_allowed():
    dns = FakeDns(
        {"example.net": [(10, "mx.example.net")], "example.org": [(10, "mx.example.org")]},
        {"mx.example.net": ["::ffff:10.0.0.5"], "mx.example.org": ["::ffff:10.0.0.5", "10.0.0.5"]},
    )
    routes = router(dns, allow_networks=(ip_network("10.0.0.0/8"), ip_network("::/0")))
    assert refused(await routes.route("example.net")) == (Bounced, "5.4.4", 498)
    assert tried(await routes.route("example.org")) == ["10.0.0.5"]


async def test_mail_hosts_beyond_the_limit_of_an_attempt_get_their_turn_and_keep_it_temporary():
    names = [f"mx{n}.example.net" for n in range(12)]
    dns = FakeDns(
        {"example.net": [(10 + n, name) for n, name in enumerate(names)]},
        {name: [f"11.22.33.{n}", f"11.22.34.{n}"] for n, name in enumerate(names)},
    )
    routes, seen = router(dns), set()
    for _ in range(100):
        route = await routes.route("example.net")
        assert route.trouble == ("2 more mail hosts are left for another attempt",)
        assert len(route.hosts) == 10
        seen |= {host.name for host in route.hosts}
    assert seen == set(names)


@pytest.mark.parametrize("fault", [Fault.WRONG_ID, Fault.GARBAGE, Fault.TRUNCATED_NO_TCP])
async def test_mail_waits_after_an_answer_of_nonsense(server, hasty, fault):
    server.set("example.net", "MX", DnsAnswer(("10 mx.example.net.",), fault=fault))
    server.a("mx.example.net", "11.22.33.1")
    assert refused(await router(hasty).route("example.net")) == (Deferred, "4.4.3", 498)


async def test_truncated_mx_answer_is_read_over_tcp(server, real):
    server.set("example.net", "MX", DnsAnswer(("10 mx.example.net.",), fault=Fault.TRUNCATED))
    server.a("mx.example.net", "11.22.33.1")
    assert tried(await router(real).route("example.net")) == ["11.22.33.1"]


async def test_both_address_families_are_tried_in_turns(server, real):
    server.mx("example.net", (10, "mx.example.net"))
    server.a("mx.example.net", "11.22.33.1", "11.22.33.2")
    server.aaaa("mx.example.net", *(f"2a00:1234::{n}" for n in range(1, 30)))
    addresses = tried(await router(real).route("example.net"))
    assert len(addresses) == 10
    assert {":" in address for address in addresses[:2]} == {True, False}


async def test_all_hosts_of_equal_preference_are_used(server, real):
    server.mx("example.net", *((10, f"mx{n}.example.net") for n in range(4)))
    for n in range(4):
        server.a(f"mx{n}.example.net", f"11.22.33.{n}")
    ours = router(real)
    first = Counter([tried(await ours.route("example.net"))[0] for _ in range(200)])
    assert len(first) == 4
    assert min(first.values()) > 25
    assert server.asked("example.net", "MX") == 1


@pytest.mark.parametrize("spelling", ["example.net", "EXAMPLE.Net", "example.net."])
async def test_domain_is_found_in_every_spelling(server, real, spelling):
    server.mx("example.net", (10, "mx.example.net"))
    server.a("mx.example.net", "11.22.33.1")
    assert tried(await router(real).route(spelling)) == ["11.22.33.1"]


@pytest.mark.parametrize("spelling", ["bücher.example", "xn--bcher-kva.example", "BÜCHER.example"])
async def test_internationalised_domain_is_looked_up_by_its_a_label(server, real, spelling):
    server.mx("xn--bcher-kva.example", (10, "mx.example.net"))
    server.a("mx.example.net", "11.22.33.1")
    assert tried(await router(real).route(spelling)) == ["11.22.33.1"]


async def test_domain_with_an_underscore_is_looked_up(server, real):
    server.mx("my_shop.example", (10, "mx_1.example.net"))
    server.a("mx_1.example.net", "11.22.33.1")
    assert tried(await router(real).route("my_shop.example")) == ["11.22.33.1"]


@pytest.mark.parametrize(
    "domain",
    [
        "x" * 64 + ".example",
        "a..example",
        "a." * 130 + "example",
        "",
        ".",
        "\udce9.example",
        "a b.example",
    ],
)
async def test_mail_for_an_impossible_domain_bounces(server, real, domain):
    assert refused(await router(real).route(domain)) == (Bounced, "5.1.2", 498)
    assert not server.queries


@pytest.mark.parametrize(
    "domain", ["localhost", "mail", "10.0.0.1", "[127.0.0.1", "[x]", "[IPv6:zz]"]
)
async def test_a_domain_that_is_no_domain_bounces(server, real, domain):
    assert refused(await router(real).route(domain)) == (Bounced, "5.1.2", 498)
    assert not server.queries


# Hosts that cannot all be found


async def test_one_host_that_is_not_found_for_now_leaves_the_attempt_temporary():
    dns = FakeDns(
        {"example.net": [(10, "a.example"), (20, "b.example")]},
        {"a.example": Unanswered("SERVFAIL"), "b.example": ["11.22.33.1"]},
    )
    route = await router(dns).route("example.net")
    assert tried(route) == ["11.22.33.1"]
    assert route.trouble == ("a.example: SERVFAIL",)


async def test_a_host_that_takes_long_does_not_hold_up_mail_another_can_take(server, monkeypatch):
    monkeypatch.setattr("relay.route.router._PATIENCE", 0.2)
    server.mx("example.net", (10, "slow.example"), (20, "fast.example"))
    server.fail("slow.example", "*", Fault.DROP)
    server.a("fast.example", "11.22.33.1")
    resolver = DnsResolver(ResolverOptions((server.nameserver,), trust_ad=TrustAd.NEVER))
    began = idle_seconds()
    route = await router(resolver).route("example.net")
    assert tried(route) == ["11.22.33.1"]
    assert "slow.example" in route.trouble[0]
    assert idle_seconds() - began < 8, "the slow host is silent for 10 s"
    await resolver.close()


async def test_a_rejected_address_is_told_along_with_the_good_ones():
    dns = FakeDns({"example.net": [(10, "a.example")]}, {"a.example": ["10.0.0.1", "11.22.33.1"]})
    route = await router(dns).route("example.net")
    assert tried(route) == ["11.22.33.1"]
    assert route.rejected == ("a.example: 10.0.0.1 is private (RFC 1918)",)


async def test_hosts_at_and_above_our_own_preference_are_not_looked_up():
    dns = FakeDns(
        {"example.net": [(10, "a.example"), (20, "Relay.example."), (30, "c.example")]},
        {"a.example": ["11.22.33.1"]},
    )
    assert tried(await router(dns).route("example.net")) == ["11.22.33.1"]
    assert dns.asked == ["MX example.net", "A a.example"]


# Address literals


async def test_an_address_literal_is_its_own_mail_host():
    route = await router(FakeDns(), port=2525).route("[11.22.33.1]")
    assert [(host.name, host.address, host.port) for host in route.hosts] == [
        ("11.22.33.1", "11.22.33.1", 2525)
    ]
    assert tried(await router(FakeDns()).route("[IPv6:2A00:1234::1]")) == ["2a00:1234::1"]


@pytest.mark.parametrize(
    ("domain", "status"),
    [
        ("[127.0.0.1]", "5.4.4"),
        ("[10.0.0.1]", "5.4.4"),
        ("[IPv6:::1]", "5.4.4"),
        ("[11.22.33.99]", "5.4.6"),
    ],
)
async def test_an_address_literal_is_judged_as_an_mx_is(domain, status):
    ours = router(FakeDns(), listening=[("11.22.33.99", 25)])
    assert refused(await ours.route(domain)) == (Bounced, status, 498)


# Static routes


async def test_a_static_route_is_used_instead_of_the_mx_and_may_be_private():
    dns = FakeDns(
        {"intranet.example": [(10, "mx.example")]}, {"mail.intranet.example": ["10.0.0.7"]}
    )
    ours = router(
        dns, routes={"intranet.example": next_hop("mail.intranet.example", 2525, TlsMode.IMPLICIT)}
    )
    route = await ours.route("Intranet.example.")
    assert [(host.name, host.address, host.port, host.tls) for host in route.hosts] == [
        ("mail.intranet.example", "10.0.0.7", 2525, TlsMode.IMPLICIT)
    ]
    assert dns.asked == ["A mail.intranet.example"]


@pytest.mark.parametrize(
    ("domain", "hop"),
    [
        ("example.net", "exact"),
        ("a.example.net", "sub"),
        ("b.a.example.net", "sub"),
        ("x.deep.example.net", "deep"),
        ("deep.example.net", "sub"),
        ("notexample.net", "all"),
        ("other.example", "all"),
        ("[11.22.33.1]", "all"),
        ("localhost", "all"),
    ],
)
async def test_the_closest_route_wins(domain, hop):
    routes = {
        "example.net": next_hop("exact"),
        "*.example.net": next_hop("sub"),
        "*.deep.example.net": next_hop("deep"),
        "*": next_hop("all"),
    }
    dns = FakeDns(hosts={name: ["10.0.0.1"] for name in ("exact", "sub", "deep", "all")})
    route = await router(dns, routes=routes).route(domain)
    assert [host.name for host in route.hosts] == [hop]


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("[10.0.0.1]", {"10.0.0.1"}),
        ("10.0.0.1", {"10.0.0.1"}),
        ("[IPv6:fd00::1]", {"fd00::1"}),
        ("[fd00::1]", {"fd00::1"}),
        ("localhost", {"127.0.0.1", "::1"}),
    ],
)
async def test_a_route_to_an_address_or_to_this_machine_asks_no_dns(host, addresses):
    dns = FakeDns()
    route = await router(dns, routes={"*": next_hop(host, 10025)}).route("example.net")
    assert set(tried(route)) == addresses
    assert not dns.asked


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("gone.intranet.example", "4.4.4"),
        ("broken.intranet.example", "4.4.3"),
        ("[127.0.0.1]", "4.4.6"),
        ("a..b", "4.3.5"),
    ],
)
async def test_mail_waits_where_a_configured_next_hop_cannot_be_used(host, status):
    dns = FakeDns(hosts={"broken.intranet.example": Unanswered("SERVFAIL")})
    ours = router(dns, routes={"*": next_hop(host)}, listening=[("0.0.0.0", 25)])
    route = await ours.route("example.net")
    assert refused(route) == (Deferred, status, 498)
    assert "example.net" in route.outcome.description


async def test_a_content_filter_on_another_port_of_this_machine_is_not_ourselves():
    ours = router(
        FakeDns(), routes={"*": next_hop("localhost", 10025)}, listening=[("127.0.0.1", 2525)]
    )
    assert len(tried(await ours.route("example.net"))) == 2


async def test_credentials_come_from_the_password_file_as_it_is_now(tmp_path):
    path = tmp_path / "password"
    path.write_text("first secret\n")
    ours = router(
        FakeDns(), routes={"*": next_hop("[10.0.0.1]", 587, username="us", password_file=str(path))}
    )
    assert (await ours.route("a.example")).hosts[0].credentials == Credentials("us", "first secret")
    path.write_text("second\r\nnot this\n")
    os.utime(path, ns=(1, 1))
    assert (await ours.route("a.example")).hosts[0].credentials == Credentials("us", "second")


@pytest.mark.parametrize("content", [None, b"", b"\nsecret\n", b"\xff\xfe\n"])
async def test_mail_waits_without_a_readable_password_and_says_why(tmp_path, content, caplog):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    ours = router(
        FakeDns(), routes={"*": next_hop("[10.0.0.1]", username="us", password_file=str(path))}
    )
    route = await ours.route("a.example")
    assert refused(route) == (Deferred, "4.3.5", 0)
    assert str(path) in route.outcome.description
    assert str(path) in caplog.text


async def test_a_user_name_without_password_file_is_no_login_without_password():
    ours = router(FakeDns(), routes={"*": next_hop("[10.0.0.1]", username="us")})
    assert refused(await ours.route("a.example")) == (Deferred, "4.3.5", 0)


async def test_other_routes_take_effect_at_once_after_a_reload():
    dns = FakeDns({"example.net": [(10, "mx.example")]}, {"mx.example": ["11.22.33.1"]})
    ours = router(dns, routes={"*": next_hop("[10.0.0.1]")})
    assert tried(await ours.route("example.net")) == ["10.0.0.1"]
    ours.reload(RouteOptions())
    assert tried(await ours.route("example.net")) == ["11.22.33.1"]


async def test_route_looked_up_under_old_options_is_not_kept_for_new_ones():
    class Reloading(FakeDns):
        async def addresses(self, host):
            ours.reload(RouteOptions(port=2525))
            return await super().addresses(host)

    ours = router(Reloading({"example.net": [(10, "mx.example")]}, {"mx.example": ["11.22.33.1"]}))
    await ours.route("example.net")
    assert (await ours.route("example.net")).hosts[0].port == 2525


# What is kept


async def test_a_route_is_kept_until_the_first_of_its_answers_runs_out():
    clock = Clock()
    dns = FakeDns(
        {"example.net": MxAnswer((MxRecord(10, "mx.example"),), expires=1100.0)},
        {"mx.example": ["11.22.33.1"]},
    )
    ours = router(dns, clock=clock)
    for now in (1000.0, 1099.0):
        clock.now = now
        await ours.route("example.net")
    assert dns.asked.count("MX example.net") == 1
    clock.now = 1100.0
    await ours.route("example.net")
    assert dns.asked.count("MX example.net") == 2


async def test_a_failure_is_not_kept_longer_than_the_resolver_says():
    clock = Clock()
    dns = FakeDns({"example.net": Unanswered("SERVFAIL", expires=1005.0)})
    ours = router(dns, clock=clock)
    await ours.route("example.net")
    await ours.route("example.net")
    assert len(dns.asked) == 1
    clock.now = 1005.0
    await ours.route("example.net")
    assert len(dns.asked) == 2


async def test_a_route_with_trouble_is_looked_up_again_soon():
    clock = Clock()
    dns = FakeDns(
        {"example.net": [(10, "a.example"), (20, "b.example")]},
        {"a.example": Unanswered("SERVFAIL", 1005.0), "b.example": ["11.22.33.1"]},
    )
    ours = router(dns, clock=clock)
    await ours.route("example.net")
    clock.now += 29
    await ours.route("example.net")
    assert dns.asked.count("MX example.net") == 1
    clock.now += 2
    await ours.route("example.net")
    assert dns.asked.count("MX example.net") == 2


async def test_a_known_domain_is_routed_in_microseconds():
    dns = FakeDns(
        {"example.net": [(10, "a.example"), (10, "b.example"), (20, "c.example")]},
        {f"{n}.example": ["11.22.33.1", "2a00:1234::1"] for n in "abc"},
    )
    ours = router(dns)
    await ours.route("example.net")
    best = 1.0
    for _ in range(20):
        began = time.process_time()
        for _ in range(100):
            await ours.route("example.net")
        best = min(best, (time.process_time() - began) / 100)
    assert best < 20e-6


# This machine


def test_the_machine_knows_its_own_addresses():
    assert is_local_address("127.0.0.1")
    assert not is_local_address("11.22.33.44")
    assert not is_local_address("2a00:1234::1")
    assert not is_local_address("not an address")


def test_own_addresses_are_found_where_any_address_can_be_bound(monkeypatch):
    monkeypatch.setattr("relay.route.local_address._binds", lambda address: True)
    assert is_local_address("127.0.0.1")
    assert not is_local_address("11.22.33.44")


async def test_mail_goes_by_its_sender_and_by_what_its_client_is_given():
    names = ("all", "sender", "of-client")
    dns = FakeDns(hosts={f"{name}.hop.example": [f"11.22.33.{len(name)}"] for name in names})
    hops = {name: NextHop(name, ((f"{name}.hop.example",),)) for name in names}
    routes = Routes({"*": hops["all"]}, {"example.com": hops["sender"]}, hops)
    ours = router(dns, routes=routes)
    for sender, client, name in [
        ("", "of-client", "all"),
        ("a@example.com", "", "sender"),
        ("a@example.com", "of-client", "of-client"),
        ("a@example.org", "", "all"),
        ("a@example.com", "", "sender"),  # what was kept for one sender is not another's
    ]:
        route = await ours.route("example.net", sender, client)
        assert tried(route) == [f"11.22.33.{len(name)}"]
        assert route.hosts[0].hop == route.choice.hop == hops[name]


async def test_mail_whose_next_hop_was_removed_waits_until_it_is_back(caplog):
    dns = FakeDns(hosts={"h.example": ["11.22.33.1"]})
    hop = NextHop("client", (("h.example",),))
    ours = router(dns, routes=Routes({"*": hop}, {}, {}))
    route = await ours.route("example.net", "a@example.com", "client")
    assert refused(route) == (Deferred, "4.3.5", 498)
    assert route.outcome.description.endswith("message is not configured: client")
    assert "add next_hops.client again" in caplog.text
    ours.reload(RouteOptions(routes=Routes({"*": hop}, {}, {"client": hop})))
    assert tried(await ours.route("example.net", "a@example.com", "client")) == ["11.22.33.1"]


async def test_next_hop_that_cannot_be_used_is_logged_once_a_minute(tmp_path, caplog):
    path = str(tmp_path / "none")
    clock = Clock()
    routes = {
        "*": next_hop("[10.0.0.1]", username="us", password_file=path),
        "own.example": NextHop("own", (("gone.example",),)),
        "*.own.example": NextHop("own", (("gone.example",),)),
    }
    dns = FakeDns(hosts={"gone.example": NoSuchName(expires=0.0)})
    ours = router(dns, clock=clock, routes=Routes(routes, {}, {}))

    async def lines():
        caplog.clear()
        for number in range(20):
            for domain in (f"d{number}.example", "own.example", f"d{number}.own.example"):
                assert refused(await ours.route(domain))[0] is Deferred
            gone = await ours.route(f"d{number}.example", "a@example.com", "client")
            assert refused(gone)[1] == "4.3.5"
        said = [record.getMessage() for record in caplog.records]
        counts = [sum(part in one for one in said) for part in (path, "gone", "next_hops.client")]
        assert sum(counts) == len(said)
        return counts

    assert await lines() == [1, 1, 1]
    clock.now += 59
    assert await lines() == [0, 0, 0]
    clock.now += 1
    assert await lines() == [1, 1, 1]
    ours.reload(RouteOptions(routes=Routes(routes, {}, {})))
    assert await lines() == [1, 1, 1]


# --- several hosts of a next hop ----------------------------------------------------------------


def several(*groups, **keys):
    return NextHop("hop", groups, **keys)


async def test_hosts_of_a_next_hop_come_group_by_group_in_the_order_of_the_file():
    names = ["a.example", "b.example", "c.example"]
    dns = FakeDns(hosts={name: AddressAnswer((f"10.0.0.{n}",)) for n, name in enumerate(names, 1)})
    hop = several(("A.example.", "b.example"), ("c.example", "[10.0.0.4]"), port=2525)
    ours = router(dns, routes={"*": hop})
    for _ in range(3):  # equals are dealt by the attempt, and not shuffled here
        route = await ours.route("example.net")
        assert isinstance(route, Hosts)
        assert [(host.name, host.address, host.preference) for host in route.hosts] == [
            ("a.example", "10.0.0.1", 0),
            ("b.example", "10.0.0.2", 0),
            ("c.example", "10.0.0.3", 1),
            ("10.0.0.4", "10.0.0.4", 1),
        ]
        assert {host.port for host in route.hosts} == {2525}
        assert {route.naming_of(host).route_host for host in route.hosts} == {
            host.name for host in route.hosts
        }


async def test_next_hop_with_more_hosts_than_an_attempt_has_addresses_keeps_all_hosts():
    names = [f"h{n}.example" for n in range(14)]
    dns = FakeDns(hosts={name: AddressAnswer(("10.0.0.1", "10.0.0.2")) for name in names})
    route = await router(dns, routes={"*": several(tuple(names))}).route("example.net")
    assert isinstance(route, Hosts)
    assert [host.name for host in route.hosts] == names


@pytest.mark.parametrize(
    ("lookup", "trouble", "rejected"),
    [
        (Unanswered("SERVFAIL"), ("b.example: SERVFAIL",), ()),
        (NoSuchName(), (), ("b.example does not exist (NXDOMAIN)",)),
        (AddressAnswer(()), (), ("b.example has no address",)),
    ],
)
async def test_host_of_a_next_hop_that_is_not_found_leaves_the_others(lookup, trouble, rejected):
    dns = FakeDns(hosts={"a.example": AddressAnswer(("10.0.0.1",)), "b.example": lookup})
    route = await router(dns, routes={"*": several(("a.example", "b.example"))}).route("d.example")
    assert tried(route) == ["10.0.0.1"]
    assert (route.trouble, route.rejected) == (trouble, rejected)


async def test_host_of_a_next_hop_that_is_not_found_is_warned_of_once_a_minute(caplog):
    dns = FakeDns(hosts={"a.example": AddressAnswer(("10.0.0.1",))})
    clock = Clock()
    ours = router(dns, clock=clock, routes={"*": several(("a.example", "b.example"))})

    async def warnings(domain):
        caplog.clear()
        await ours.route(domain)
        return [one.message for one in caplog.records if one.levelname == "WARNING"]

    said = "next hop hop: b.example does not exist (NXDOMAIN); its other hosts get the mail"
    assert await warnings("d.example") == [said]
    assert await warnings("e.example") == []
    dns.hosts = {**dns.hosts, "b.example": Unanswered("SERVFAIL")}
    assert await warnings("f.example") == [said.replace("does not exist (NXDOMAIN)", "SERVFAIL")]
    clock.now += 60
    assert len(await warnings("g.example")) == 1


async def test_next_hop_without_any_host_found_names_each(caplog):
    dns = FakeDns(hosts={"b.example": AddressAnswer(())})
    route = await router(dns, routes={"*": several(("a.example", "b.example"))}).route("d.example")
    for text in (route.outcome.description, caplog.text):
        assert "a.example does not exist (NXDOMAIN); b.example has no address" in text


async def test_of_several_hosts_only_the_relay_itself_is_left_out(caplog):
    dns = FakeDns(
        hosts={
            "a.example": AddressAnswer(("127.0.0.1",)),
            "b.example": AddressAnswer(("10.0.0.2",)),
        }
    )
    hop = several(("a.example",), ("b.example",))
    route = await router(dns, routes={"*": hop}, listening=[("0.0.0.0", 25)]).route("d.example")
    assert tried(route) == ["10.0.0.2"]
    assert route.rejected == ("a.example: 127.0.0.1 is an address of our own",)
    assert not caplog.records  # several relays may have the same list


BOTH = AddressAnswer(("10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"))


@pytest.mark.parametrize(
    ("keys", "versions"),
    [
        ({}, {4, 6}),
        ({"ip_family": IpFamily.IPV4}, {4}),
        ({"ip_family": IpFamily.IPV6}, {6}),
        ({"source_address": "192.0.2.1"}, {4}),
        ({"source_address": "2001:db8::1"}, {6}),
    ],
)
async def test_next_hop_uses_the_addresses_of_one_family(keys, versions):
    ours = router(FakeDns(hosts={"a.example": BOTH}), routes={"*": several(("a.example",), **keys)})
    route = await ours.route("d.example")
    assert {6 if ":" in address else 4 for address in tried(route)} == versions
    assert route.rejected == ()


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"ip_family": IpFamily.IPV6}, "is not used, since ip_family is ipv6"),
        (
            {"source_address": "2001:db8::1"},
            "is not used, since source_address is 2001:db8::1, of the other IP version",
        ),
    ],
)
async def test_next_hop_without_an_address_of_the_family_says_so(keys, reason):
    dns = FakeDns(hosts={"a.example": AddressAnswer(("10.0.0.1",))})
    route = await router(dns, routes={"*": several(("a.example",), **keys)}).route("d.example")
    assert refused(route) == (Deferred, "4.4.4", 498)
    assert route.outcome.description.endswith(f"a.example: 10.0.0.1 {reason}")


# --- what is known of a host's name ------------------------------------------------------------


def signed(*addresses: str, **more: Any) -> AddressAnswer:
    return AddressAnswer(addresses, authenticated=True, **more)


async def naming_of(dns: FakeDns, domain: str, **options: Any) -> tuple[Naming, tuple[str, ...]]:
    route = await router(dns, **options).route(domain)
    assert isinstance(route, Hosts)
    return route.naming, route.hosts[0].tlsa_bases


@pytest.mark.parametrize("is_signed", [False, True])
async def test_route_says_whether_dns_or_the_operator_named_the_host(is_signed):
    answer = MxAnswer((MxRecord(10, "mx.example"),), authenticated=is_signed, canonical="b.example")
    dns = FakeDns(mx_records={"a.example": answer}, hosts={"mx.example": signed("11.22.33.1")})
    domains = ("a.example", "b.example") if is_signed else ()
    assert await naming_of(dns, "a.example") == (Naming(is_signed, None, domains), ("mx.example",))


@pytest.mark.parametrize("is_signed", [False, True])
async def test_a_domain_without_mx_is_its_own_host_by_name(is_signed):
    dns = FakeDns(
        mx_records={"a.example": MxAnswer((), authenticated=is_signed)},
        hosts={"a.example": ["11.22.33.1"]},
    )
    itself = Naming(is_signed, None, ("a.example",), is_domain_itself=True)
    assert await naming_of(dns, "a.example") == (itself, ())


async def test_an_alias_has_its_tlsa_records_at_its_end_first():
    found = signed("11.22.33.1", canonical="final.example")
    dns = FakeDns(mx_records={"a.example": [(10, "mx.example")]}, hosts={"mx.example": found})
    assert (await naming_of(dns, "a.example"))[1] == ("final.example", "mx.example")


async def test_the_host_of_a_route_is_named_by_the_operator():
    dns = FakeDns(hosts={"gate.example": signed("11.22.33.1")})
    routes = {"*": next_hop("Gate.example")}
    named = Naming(True, "Gate.example", ("gate.example",))
    assert await naming_of(dns, "a.example", routes=routes) == (named, ("gate.example",))


async def test_an_address_has_no_name_and_no_tlsa_records():
    assert await naming_of(FakeDns(), "[11.22.33.1]") == (Naming(), ())
    routed = await naming_of(FakeDns(), "a.example", routes={"*": next_hop("11.22.33.1")})
    assert routed[1] == ()
