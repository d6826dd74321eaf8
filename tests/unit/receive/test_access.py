"""Who may relay, in whose name, and how often a password may be wrong."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta

import pytest

from relay.receive.access import Access, User, may_relay, may_send_as
from relay.receive.limits import Connections, Limits
from relay.receive.passwords import Passwords
from relay.submit.failures import Failures
from relay.workers.shared_counters import SharedCounters
from tests.unit.receive.conftest import USERS, hashed

NOW = datetime(2026, 11, 20, tzinfo=UTC)


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


def test_without_networks_nobody_may_relay_by_address():
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


def test_failures_are_forgotten_with_time_and_forgiven_with_a_right_password():
    failures = Failures(tolerated=3, window=timedelta(minutes=10))
    for _ in range(3):
        assert not failures.must_wait("192.0.2.1", NOW)
        failures.note("192.0.2.1", NOW)
    assert failures.must_wait("192.0.2.1", NOW)
    assert not failures.must_wait("192.0.2.2", NOW)
    assert not failures.must_wait("192.0.2.1", NOW + timedelta(minutes=10))
    failures.forgive("192.0.2.1")
    assert not failures.must_wait("192.0.2.1", NOW)


def test_workers_count_wrong_passwords_together():
    board = SharedCounters(3)
    one, other, third = (
        Failures(tolerated=4, window=timedelta(minutes=10), elsewhere=board.row(number))
        for number in range(3)
    )
    for failures in (one, one, other, third):
        assert not one.must_wait("192.0.2.1", NOW)
        failures.note("192.0.2.1", NOW)
    assert all(failures.must_wait("192.0.2.1", NOW) for failures in (one, other, third))
    assert not other.must_wait("192.0.2.2", NOW)
    board.clear(0)  # a worker that ended has not been forgotten
    assert other.must_wait("192.0.2.1", NOW)
    one.forgive("192.0.2.1")
    assert not other.must_wait("192.0.2.1", NOW)
    one.note("192.0.2.1", NOW)
    one.note("192.0.2.1", NOW)
    assert other.must_wait("192.0.2.1", NOW)
    assert not other.must_wait("192.0.2.1", NOW + timedelta(minutes=11))


def test_no_more_clients_are_remembered_than_there_is_room_for():
    failures = Failures(tolerated=1, remembered=10)
    for number in range(100):
        failures.note(f"192.0.2.{number}", NOW)
    assert not failures.must_wait("192.0.2.89", NOW)
    assert failures.must_wait("192.0.2.90", NOW)


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


async def test_a_password_is_right_for_its_user_only():
    passwords = Passwords()
    access = Access(users=USERS)
    user = await passwords.verify(access, "app1", "secret")
    assert user is USERS["app1"]
    assert await passwords.verify(access, "app1", "wrong") is None
    assert await passwords.verify(access, "app1", "") is None
    assert await passwords.verify(access, "nobody", "secret") is None
    assert await passwords.verify(Access(users={"x": User("x", "no hash")}), "x", "secret") is None
    passwords.close()


async def test_a_password_that_was_right_is_forgotten_with_its_hash():
    passwords = Passwords()
    before = Access(users={"x": User("x", hashed("old"))})
    after = Access(users={"x": User("x", hashed("new"))})
    assert await passwords.verify(before, "x", "old") is not None
    assert await passwords.verify(before, "x", "old") is not None
    assert await passwords.verify(after, "x", "old") is None
    assert await passwords.verify(Access(users={}), "x", "old") is None
    passwords.close()


def test_a_network_is_compared_with_addresses_of_its_own_family():
    access = Access(networks=(ipaddress.ip_network("0.0.0.0/0"),))
    assert not may_relay(access, "2001:db8::1")
