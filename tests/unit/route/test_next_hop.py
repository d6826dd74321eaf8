"""What is told of where an attempt could go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.mail.outcome import NamedBy
from relay.route.next_hop import BY_NOBODY, Auth, Host, Hosts, IpFamily, Naming, NextHop, Rate

MX = Host("mx.dest.example", "192.0.2.7", 25, 10)


@pytest.mark.parametrize(
    ("host", "naming", "named_by", "line"),
    [
        (MX, Naming(True, None, ("dest.example",)), NamedBy.MX, "10 mx.dest.example [192.0.2.7]"),
        (MX, BY_NOBODY, NamedBy.MX, "10 mx.dest.example [192.0.2.7]"),
        (
            Host("dest.example", "192.0.2.8", 25),
            Naming(is_domain_itself=True),
            NamedBy.DOMAIN,
            "0 dest.example [192.0.2.8]",
        ),
        (
            Host("hop.example", "10.0.0.1", 2525, hop=NextHop("a", (("hop.example",),), 2525)),
            Naming(True, "hop.example", ("hop.example",)),
            NamedBy.ROUTE,
            "hop.example [10.0.0.1]:2525",
        ),
        (Host("192.0.2.9", "192.0.2.9", 25), BY_NOBODY, NamedBy.ADDRESS, "0 192.0.2.9 [192.0.2.9]"),
    ],
)
def test_routing_says_who_named_the_hosts_and_in_which_order(
    host: Host, naming: Naming, named_by: NamedBy, line: str
) -> None:
    routing = Hosts((host,), naming=naming).routing
    assert (routing.named_by, routing.is_authentic) == (named_by, naming.is_secure)
    assert routing.hosts == (line,)


def test_next_hops_with_the_same_hosts_port_login_and_appearance_are_one_destination() -> None:
    hosts = (("a.example", "b.example"), ("c.example",))
    first = NextHop("a.example", hosts, 587, auth=Auth(username="one", password_file="/f"))
    assert first.destination == replace(first, name="b.example", rate=Rate(1, 1.0)).destination
    others = [
        replace(first, port=25),
        replace(first, hosts=hosts[:1]),
        replace(first, auth=None),
        replace(first, auth=Auth(username="two", password_file="/f")),
        replace(first, source_address="192.0.2.7"),
        replace(first, hello="other.example.net"),
        replace(first, ip_family=IpFamily.IPV4),
    ]
    assert len({first.destination, *(other.destination for other in others)}) == 8
