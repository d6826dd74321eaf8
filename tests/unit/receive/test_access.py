"""Who may relay, in whose name, over how many connections."""

from __future__ import annotations

import ipaddress

import pytest

from relay.receive.access import Access, User, may_relay, may_send_as
from relay.receive.limits import Connections, Limits


@pytest.mark.parametrize(
    ("client", "may"),
    [
        ("127.0.0.1", True),
        ("127.255.0.1", True),
        ("::1", True),
        ("128.0.0.1", False),
        ("192.0.2.1", False),
        ("::2", False),
        ("", True),
        (None, False),
    ],
)
def test_a_client_may_relay_from_our_networks_and_through_a_unix_socket(client, may):
    assert may_relay(Access(), client) is may


def test_no_client_may_relay_by_address_without_networks():
    assert not may_relay(Access(networks=()), "127.0.0.1")


@pytest.mark.parametrize(
    ("domains", "domain", "may"),
    [
        (None, "anything.example", True),
        (None, "", True),
        (("example.com",), "example.com", True),
        (("example.com",), "sub.example.com", False),
        (("example.com",), "badexample.com", False),
        (("example.com",), "", False),
        (("*.example.com",), "sub.example.com", True),
        (("*.example.com",), "deep.sub.example.com", True),
        (("*.example.com",), "example.com", False),
        (("*.example.com",), "badexample.com", False),
        ((), "example.com", False),
    ],
)
def test_a_user_sends_in_its_own_domains(domains, domain, may):
    assert may_send_as(User("u", "hash", domains), domain) is may


def test_connections_are_counted_in_all_and_by_client():
    connections = Connections()
    limits = Limits(connections=3, connections_per_client=2)
    assert connections.admit("192.0.2.1", limits) is None
    assert connections.admit("192.0.2.1", limits) is None
    third = connections.admit("192.0.2.1", limits)
    assert third is not None
    assert (third.code, third.status) == (421, "4.7.0")
    assert connections.admit("192.0.2.2", limits) is None
    fourth = connections.admit("192.0.2.3", limits)
    assert fourth is not None
    assert (fourth.code, fourth.status) == (421, "4.3.2")
    connections.leave("192.0.2.1")
    assert (connections.total, connections.of("192.0.2.1")) == (2, 1)
    assert connections.admit("192.0.2.1", limits) is None


def test_a_client_with_a_whole_ipv6_network_is_one_client():
    connections = Connections()
    limits = Limits(connections_per_client=1)
    assert connections.admit("2001:db8::1", limits) is None
    assert connections.admit("2001:db8::2", limits) is not None
    assert connections.admit("2001:db8:0:1::1", limits) is None


def test_a_unix_socket_has_only_the_limit_of_all():
    connections = Connections()
    limits = Limits(connections=5, connections_per_client=1)
    assert [connections.admit("", limits) for _ in range(5)] == [None] * 5
    assert connections.admit("", limits) is not None


def test_a_network_is_compared_with_addresses_of_its_own_family():
    access = Access(networks=(ipaddress.ip_network("0.0.0.0/0"),))
    assert not may_relay(access, "2001:db8::1")
