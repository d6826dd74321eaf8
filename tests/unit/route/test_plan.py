"""From mail hosts and addresses to the order of an attempt."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.outcome import Bounced, Deferred
from relay.route.addresses import Rejection
from relay.route.answers import AddressAnswer, NoSuchName, Unanswered
from relay.route.mx import MailHost, MailHosts
from relay.route.next_hop import Host, NoRoute
from relay.route.plan import Plan, arrange, plan

OURS = "11.22.33.99"


def judge(address):
    if address == OURS:
        return Rejection("is an address of our own", ourselves=True)
    return Rejection("is private (RFC 1918)") if ip_address(address).is_private else None


def planned(*hosts, rejected=()):
    """hosts: (preference, name, addresses or lookup)."""
    listed = MailHosts(tuple(MailHost(p, name) for p, name, _ in hosts), tuple(rejected), inf)
    lookups = {
        name: AddressAnswer(tuple(found)) if isinstance(found, list) else found
        for _, name, found in hosts
    }
    return plan(
        "example.net",
        listed,
        lookups,
        make_host=lambda name, address, preference: Host(name, address, 25, preference),
        judge=judge,
    )


def test_a_host_carries_its_name_address_and_preference():
    result = planned((10, "mx1.example", ["11.0.0.1"]))
    assert arrange(result, 10, Random(1)) == (Host("mx1.example", "11.0.0.1", 25, 10),)


def test_lower_preference_is_tried_before_higher():
    result = planned((10, "a.example", ["11.0.0.1", "11.0.0.2"]), (20, "b.example", ["11.0.0.3"]))
    for seed in range(20):
        assert [host.preference for host in arrange(result, 10, Random(seed))] == [10, 10, 20]


def test_hosts_of_equal_preference_share_the_mail():
    result = planned(*((10, f"mx{n}.example", [f"11.0.0.{n}"]) for n in range(1, 5)))
    random = Random(7)
    first = Counter(arrange(result, 10, random)[0].name for _ in range(400))
    assert len(first) == 4
    assert min(first.values()) > 60


def test_addresses_of_one_host_share_the_mail():
    result = planned((10, "mx.example", [f"11.0.0.{n}" for n in range(1, 5)]))
    random = Random(7)
    assert len({arrange(result, 10, random)[0].address for _ in range(100)}) == 4


def test_the_families_of_a_host_take_turns_beginning_with_either():
    result = planned((10, "mx.example", ["11.0.0.1", "11.0.0.2", "11.0.0.3", "2a00::1", "2a00::2"]))
    beginnings = set()
    for seed in range(30):
        versions = [ip_address(host.address).version for host in arrange(result, 10, Random(seed))]
        assert versions in ([4, 6, 4, 6, 4], [6, 4, 6, 4, 4])
        beginnings.add(versions[0])
    assert beginnings == {4, 6}


def test_a_family_without_connectivity_does_not_use_up_the_limit():
    many = [f"2a00::{n}" for n in range(1, 50)] + ["11.0.0.1"]
    result = planned((10, "mx.example", many))
    for seed in range(20):
        assert "11.0.0.1" in {host.address for host in arrange(result, 10, Random(seed))}


def test_a_host_with_many_addresses_does_not_push_out_its_neighbours():
    result = planned(
        (10, "a.example", [f"11.0.1.{n}" for n in range(50)]),
        (20, "b.example", [f"11.0.2.{n}" for n in range(50)]),
        (30, "c.example", ["11.0.3.1"]),
    )
    hosts = arrange(result, 10, Random(1))
    assert [host.name for host in hosts] == ["a.example"] * 5 + ["b.example"] * 4 + ["c.example"]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)).filter(
            lambda h: h[1] + h[2] > 0
        ),
        min_size=1,
        max_size=14,
    ),
    st.integers(1, 12),
    st.integers(),
)
def test_any_plan_gives_an_ordered_attempt_within_its_limit(shape, limit, seed):
    hosts = [
        (
            p,
            f"h{i}.example",
            [f"11.0.{i}.{n}" for n in range(v4)] + [f"2a00:{i}::{n}" for n in range(v6)],
        )
        for i, (p, v4, v6) in enumerate(sorted(shape))
    ]
    result = planned(*hosts)
    dealt = arrange(result, limit, Random(seed))
    total = sum(v4 + v6 for _, v4, v6 in shape)
    assert len(dealt) == min(limit, total) == len({host.address for host in dealt})
    assert [host.preference for host in dealt] == sorted(host.preference for host in dealt)
    assert len({host.name for host in dealt}) == min(limit, len(shape))
    assert result.weight == total


def test_an_address_that_is_listed_twice_is_tried_once():
    result = planned((10, "a.example", ["11.0.0.1", "11.0.0.1"]))
    assert len(arrange(result, 10, Random(1))) == 1


def test_a_host_whose_lookup_failed_leaves_the_attempt_temporary():
    result = planned((10, "a.example", Unanswered("SERVFAIL")), (20, "b.example", ["11.0.0.1"]))
    assert isinstance(result, Plan)
    assert result.trouble == ("a.example: SERVFAIL",)


def test_a_private_address_is_left_out_and_said_so():
    result = planned((10, "a.example", ["10.0.0.1", "11.0.0.1"]))
    assert [host.address for host in arrange(result, 10, Random(1))] == ["11.0.0.1"]
    assert result.rejected == ("a.example: 10.0.0.1 is private (RFC 1918)",)


@pytest.mark.parametrize(
    ("hosts", "kind", "status"),
    [
        ([(10, "a", NoSuchName()), (20, "b", [])], Bounced, "5.4.4"),
        ([(10, "a", NoSuchName()), (20, "b", Unanswered("SERVFAIL"))], Deferred, "4.4.3"),
        ([(10, "a", Unanswered("late")), (20, "b", ["10.0.0.1"])], Deferred, "4.4.3"),
        ([(10, "a", ["10.0.0.1"])], Bounced, "5.4.4"),
        ([(10, "a", [OURS])], Bounced, "5.4.6"),
        ([(10, "a", ["10.0.0.1", OURS])], Bounced, "5.4.6"),
        ([(10, "a", [OURS]), (20, "b", ["11.0.0.1"])], Bounced, "5.4.6"),
        ([(10, "a", [OURS]), (20, "b", Unanswered("SERVFAIL"))], Bounced, "5.4.6"),
        ([(10, "b", ["11.0.0.1"]), (10, "a", [OURS])], Bounced, "5.4.6"),
        ([(10, "a", [OURS, "11.0.0.1"])], Bounced, "5.4.6"),
    ],
)
def test_outcome_of_a_plan_without_a_host(hosts, kind, status):
    result = planned(*hosts)
    assert isinstance(result, NoRoute)
    assert isinstance(result.outcome, kind)
    assert (result.outcome.status, result.outcome.code) == (status, 498)
    assert "example.net" in result.outcome.description


def test_hosts_before_ourselves_are_kept_and_those_behind_dropped():
    result = planned(
        (10, "a.example", ["11.0.0.1"]), (20, "us.example", [OURS]), (30, "c.example", ["11.0.0.3"])
    )
    assert [host.name for host in arrange(result, 10, Random(1))] == ["a.example"]


def test_a_thousand_rejected_addresses_do_not_make_a_thousand_lines():
    hosts = [(n, f"h{n}.example", [f"10.0.{n}.{m}" for m in range(50)]) for n in range(20)]
    result = planned(*hosts)
    assert len(result.outcome.hosts) <= 20
