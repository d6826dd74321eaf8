"""No stranger's DNS makes us connect into our own network."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from relay.route.addresses import Own, judge, parse_address, parse_address_literal

NOBODY = Own()


def judged(address, port=25, own=NOBODY, allow=()):
    return judge(
        ip_address(address), port, own=own, allow_networks=[ip_network(net) for net in allow]
    )


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("10.0.0.5", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "shared"),
        ("169.254.169.254", "link-local"),  # the metadata service of a cloud
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("192.0.0.9", "reserved"),
        ("192.0.2.1", "documentation"),
        ("192.88.99.1", "reserved"),
        ("198.18.0.1", "benchmarks"),
        ("198.51.100.1", "documentation"),
        ("203.0.113.1", "documentation"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.250", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.255", "reserved"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::7f00:1", "reserved"),  # IPv4-compatible
        ("::ffff:127.0.0.1", "IPv4-mapped"),
        ("::ffff:11.22.33.44", "IPv4-mapped"),
        ("64:ff9b::7f00:1", "127.0.0.1, which is loopback"),
        ("64:ff9b::10.0.0.5", "10.0.0.5, which is private"),
        ("64:ff9b:1::1", "private"),
        ("2002:7f00:1::1", "127.0.0.1, which is loopback"),
        ("2002:c0a8:101::1", "192.168.1.1, which is private"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "Teredo"),
        ("2001:20::1", "reserved"),
        ("2001:db8::1", "documentation"),
        ("3fff::1", "documentation"),
        ("100::1", "reserved"),
        ("5f00::1", "reserved"),
        ("4000::1", "reserved"),
        ("fc00::1", "private"),
        ("fd12:3456::1", "private"),
        ("fe80::1", "link-local"),
        ("fec0::1", "private"),
        ("ff02::1", "multicast"),
    ],
)
def test_an_address_that_is_not_public_is_not_connected_to(address, word):
    rejection = judged(address)
    assert rejection is not None
    assert word in rejection.reason
    assert not rejection.ourselves


@pytest.mark.parametrize(
    "address",
    [
        "11.22.33.44",
        "8.8.8.8",
        "100.63.255.255",
        "100.128.0.0",
        "172.32.0.1",
        "172.15.255.255",
        "223.255.255.255",
        "2a00:1234::1",
        "2606:4700::1111",
        "64:ff9b::11.22.33.44",  # NAT64 is how an IPv6-only network reaches a public IPv4 host
        "2002:b16:212c::1",
    ],
)
def test_a_public_address_is_connected_to(address):
    assert judged(address) is None


def test_operator_may_allow_a_private_network():
    assert judged("10.1.2.3", allow=["10.1.0.0/16"]) is None
    assert judged("10.2.2.3", allow=["10.1.0.0/16"]) is not None
    assert judged("::1", allow=["10.1.0.0/16", "::1/128"]) is None


def test_allowing_private_ipv4_does_not_allow_it_in_disguise():
    for allowed in ("10.0.0.0/8", "::/0", "::ffff:0:0/96"):
        assert judged("::ffff:10.1.2.3", allow=[allowed]).reason == "is IPv4-mapped (RFC 4291)"
        assert judged("::ffff:127.0.0.1", allow=[allowed]) is not None
    assert judged("64:ff9b::10.1.2.3", allow=["10.0.0.0/8"]) is not None


@pytest.mark.parametrize("address", ["11.22.33.44", "::ffff:11.22.33.44"])
def test_our_own_listener_is_no_mail_host_even_where_its_network_is_allowed(address):
    own = Own(lambda: [("11.22.33.44", 25)])
    rejection = judged(address, own=own, allow=["11.22.33.0/24", "::/0"])
    assert rejection is not None
    assert rejection.ourselves


def test_another_port_of_our_own_address_is_not_ourselves():
    own = Own(lambda: [("127.0.0.1", 2525)])
    assert judged("127.0.0.1", port=2526, own=own, allow=["127.0.0.0/8"]) is None
    assert judged("127.0.0.1", port=2525, own=own, allow=["127.0.0.0/8"]).ourselves


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_listener_is_every_address_of_this_machine(wildcard):
    own = Own(lambda: [(wildcard, 25)], lambda address: address == "11.22.33.44")
    assert judged("11.22.33.44", own=own).ourselves
    assert judged("127.0.0.9", own=own).ourselves
    assert judged("0.0.0.0", own=own).ourselves
    assert judged("11.22.33.45", own=own) is None


def test_the_machine_is_not_asked_for_a_listener_with_an_address():
    def refuse(address):
        raise AssertionError(address)

    assert judged("11.22.33.45", own=Own(lambda: [("11.22.33.44", 25)], refuse)) is None


@pytest.mark.parametrize(
    ("domain", "address"),
    [
        ("[11.22.33.44]", "11.22.33.44"),
        ("[IPv6:2a00:1234::1]", "2a00:1234::1"),
        ("[ipv6:2A00:1234::1]", "2a00:1234::1"),
        ("[2a00:1234::1]", "2a00:1234::1"),
        ("11.22.33.44", None),
        ("[11.22.33.444]", None),
        ("[11.22.33.44", None),
        ("[]", None),
        ("[IPv6:fe80::1%eth0]", None),
        ("[example.net]", None),
        ("", None),
    ],
)
def test_an_address_literal_is_read_as_the_address_it_is(domain, address):
    literal = parse_address_literal(domain)
    assert (str(literal) if literal else None) == address


@pytest.mark.parametrize(
    "text", ["", "mx.example", "1.2.3", "1.2.3.4.5", "0x7f000001", "127.0.0.01"]
)
def test_text_that_is_no_address_is_none(text):
    assert parse_address(text) is None
