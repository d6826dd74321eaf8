"""Which hosts of a next hop are dead, when they are tested again, and whose turn it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from relay.deliver.host_health import Cause, HostHealth, Trial, rest
from relay.mail.outcome import Code, Deferred
from relay.route.floor import Proof
from relay.route.next_hop import Credentials, Host, IpFamily, NextHop

HOP = NextHop("provider", (("a.example", "b.example"), ("c.example",)), 587)
A = Host("a.example", "192.0.2.1", 587, hop=HOP)
B = Host("b.example", "192.0.2.2", 587, hop=HOP)
C = Host("c.example", "192.0.2.3", 587, 1, hop=HOP)
REFUSED = Deferred("4.4.1", Code.NO_CONNECTION, "", "a.example [192.0.2.1]: Connection refused")
UNMET = Deferred("4.7.5", Code.NONE, "", "a.example [192.0.2.1]: expired", tls_unmet=True)


class World:
    """The health of hosts, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.health = HostHealth(lambda: self.now)

    def begin(self, host: Host = A, proof: Proof = Proof.NOTHING) -> Trial:
        trial = self.health.begin(host, proof)
        assert isinstance(trial, Trial), trial
        return trial

    def may_begin(self, host: Host = A, proof: Proof = Proof.NOTHING) -> bool:
        trial = self.health.begin(host, proof)
        if isinstance(trial, Trial):
            self.health.end(trial)
        return isinstance(trial, Trial)

    def kill(
        self, host: Host = A, cause: Cause = Cause.UNREACHABLE, proof: Proof = Proof.NOTHING
    ) -> bool:
        self.now += 1
        outcome = UNMET if cause is Cause.TLS else REFUSED
        return self.health.died(self.begin(host, proof), cause, outcome)

    def order(self, *hosts: Host, proof: Proof = Proof.NOTHING) -> list[str]:
        return [host.name[0] for host in self.health.deal(hosts, proof)]


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(1, 15), (2, 30), (3, 60), (4, 120), (5, 240), (6, 300), (7, 300), (10_000, 300)],
)
def test_dead_host_is_left_alone_for_15_seconds_doubling_to_5_minutes(failures, seconds):
    assert rest(failures) == seconds


def test_dead_host_is_tested_by_one_message_when_its_time_is_over(world):
    assert world.kill()
    for seconds in (15, 30, 60):
        world.now += seconds - 1
        assert not world.may_begin()
        world.now += 1
        test = world.begin()
        assert not world.may_begin()  # the others pass it by
        assert not world.health.died(test, Cause.UNREACHABLE, REFUSED)
        assert not world.may_begin()


def test_message_for_a_dead_host_hears_how_the_host_failed(world):
    world.kill()
    world.now += 7
    outcome = world.health.begin(A, Proof.NOTHING)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.4.1", Code.NO_CONNECTION)
    assert outcome.description == (
        "not tried, it failed 0:00:07 ago: a.example [192.0.2.1]: Connection refused"
    )


def test_first_session_ends_a_death_and_the_next_failure_begins_anew(world):
    world.kill()
    world.now += 15
    assert world.health.lives(world.begin())
    assert world.may_begin()
    assert not world.health.lives(world.begin())
    assert world.kill()
    world.now += 15
    assert world.may_begin()


def test_test_that_showed_nothing_leaves_the_host_to_another(world):
    world.kill()
    world.now += 15
    world.health.end(world.begin())
    world.health.end(world.begin())
    assert not world.health.lives(world.begin(B))
    assert world.health.lives(world.begin())


def test_connections_that_began_before_a_failure_are_part_of_it(world):
    trials = [world.begin() for _ in range(5)]
    world.now += 30
    assert [world.health.died(one, Cause.UNREACHABLE, REFUSED) for one in trials] == [
        True,
        *[False] * 4,
    ]
    world.now += 15
    assert world.may_begin()


def test_connection_that_began_before_a_later_session_does_not_kill(world):
    slow = world.begin()
    world.now += 1
    world.health.lives(world.begin())
    world.now += 1
    assert not world.health.died(slow, Cause.UNREACHABLE, REFUSED)
    assert world.may_begin()


def test_operator_may_have_dead_hosts_tested_at_once(world):
    world.kill()
    world.health.retry()
    assert world.may_begin()


# --- what a death holds for ---------------------------------------------------------------------

OTHER_HOP = replace(HOP, name="other")

PROOFS = [Proof.NOTHING, Proof.ENCRYPTED, Proof.PKIX, Proof.DANE]


@pytest.mark.parametrize(
    ("cause", "proof", "stopped", "stops_other_hops"),
    [
        (Cause.UNREACHABLE, Proof.NOTHING, PROOFS, True),
        (Cause.UNREACHABLE, Proof.PKIX, PROOFS, True),
        (Cause.LOGIN, Proof.PKIX, PROOFS, False),
        (Cause.TLS, Proof.ENCRYPTED, [Proof.ENCRYPTED, Proof.PKIX, Proof.DANE], False),
        (Cause.TLS, Proof.PKIX, [Proof.PKIX], False),
        (Cause.TLS, Proof.DANE, [Proof.DANE], False),
    ],
)
def test_death_stops_the_messages_that_would_meet_the_same(
    world, cause, proof, stopped, stops_other_hops
):
    world.kill(A, cause, proof)
    assert [each for each in PROOFS if not world.may_begin(A, each)] == stopped
    elsewhere = [each for each in PROOFS if not world.may_begin(replace(A, hop=OTHER_HOP), each)]
    assert elsewhere == (stopped if stops_other_hops else [])
    assert all(world.may_begin(B, each) for each in PROOFS)
    assert all(world.may_begin(replace(A, port=25), each) for each in PROOFS)


def test_session_of_a_message_that_requires_less_does_not_end_a_death_of_tls(world):
    world.kill(A, Cause.TLS, Proof.PKIX)
    assert not world.health.lives(world.begin(A, Proof.ENCRYPTED))
    assert not world.may_begin(A, Proof.PKIX)
    world.now += 15
    assert world.health.lives(world.begin(A, Proof.PKIX))


@pytest.mark.parametrize(
    ("first", "then"),
    [(Cause.UNREACHABLE, Cause.TLS), (Cause.UNREACHABLE, Cause.LOGIN), (Cause.TLS, Cause.LOGIN)],
)
def test_host_that_fails_at_a_later_step_has_passed_the_earlier_one(world, first, then):
    world.kill(A, first, Proof.PKIX)
    world.now += 15
    assert world.health.died(world.begin(A, Proof.PKIX), then, UNMET)
    if first is Cause.UNREACHABLE:
        assert world.health.unreachable_until([A]) is None
    world.now += 15
    assert world.health.lives(world.begin(A, Proof.PKIX))
    assert all(world.may_begin(A, each) for each in PROOFS)


def test_next_hop_is_silent_only_while_all_its_hosts_are_dead_for_all(world):
    world.kill(A)
    world.now += 3
    assert world.health.unreachable_until([A, B]) is None
    world.kill(B)
    assert world.health.unreachable_until([A, B]) == world.now + 11  # A died four seconds ago
    assert world.health.unreachable_until([A, B, C]) is None
    world.kill(C, Cause.TLS, Proof.PKIX)
    assert world.health.unreachable_until([A, B, C]) is None


# --- whose turn it is ---------------------------------------------------------------------------


def test_equals_are_dealt_in_turn_and_groups_in_order(world):
    assert [world.order(A, B, C) for _ in range(4)] == [
        ["a", "b", "c"],
        ["b", "a", "c"],
        ["a", "b", "c"],
        ["b", "a", "c"],
    ]


def test_share_of_a_dead_host_is_dealt_among_the_others(world):
    equals = [A, B, replace(C, preference=0), Host("d.example", "192.0.2.4", 587, hop=HOP)]
    world.kill(B)
    first = Counter(world.order(*equals)[0] for _ in range(9))
    assert first == {"a": 3, "c": 3, "d": 3}
    assert world.order(*equals)[-1] == "b"


def test_dead_host_has_its_turn_again_when_its_time_is_over(world):
    world.kill(A)
    world.now += 15
    assert "a" in {world.order(A, B)[0] for _ in range(2)}
    world.begin(A)
    assert {world.order(A, B)[0] for _ in range(2)} == {"b"}


def test_host_that_is_dead_for_stricter_messages_has_its_turn_for_the_others(world):
    world.kill(A, Cause.TLS, Proof.PKIX)
    assert {world.order(A, B, proof=Proof.PKIX)[0] for _ in range(4)} == {"b"}
    assert {world.order(A, B)[0] for _ in range(4)} == {"a", "b"}


def test_addresses_of_a_host_stay_together(world):
    second = replace(A, address="192.0.2.9")
    dealt = [world.health.deal([A, second, B], Proof.NOTHING) for _ in range(2)]
    assert dealt == [[A, second, B], [B, A, second]]


@pytest.mark.parametrize(
    "keys",
    [{"source_address": "192.0.2.7"}, {"hello": "other.example.net"}, {"ip_family": IpFamily.IPV4}],
    ids=lambda keys: next(iter(keys)),
)
def test_host_that_does_not_answer_one_way_of_connecting_may_answer_another(world, keys):
    other = replace(A, hop=replace(HOP, name="other", **keys))
    same = replace(A, hop=replace(HOP, name="same"))
    world.kill()
    assert world.may_begin(other)
    assert not world.may_begin(same)
    assert world.health.unreachable_until([other]) is None
    world.now += 1
    later = world.begin(other)
    world.now += 15
    test = world.begin(A)
    assert world.health.lives(later) is False  # it says nothing of the first
    world.health.died(test, Cause.UNREACHABLE, REFUSED)
    world.now += 16
    assert not world.may_begin(same)  # the second failure counted: 30 seconds


WRONG = replace(A, credentials=Credentials("app", "wrong"))
CORRECTED = replace(A, credentials=Credentials("app", "open sesame"))


def test_refused_login_does_not_keep_a_message_with_a_corrected_one(world):
    world.kill(WRONG, Cause.LOGIN)
    assert not world.may_begin(WRONG)
    assert not world.may_begin(replace(WRONG, credentials=Credentials("app", "wrong", token="t")))
    assert world.may_begin(CORRECTED)
    assert world.order(WRONG, B) == ["b", "a"]
    assert sorted(world.order(CORRECTED, B)) == ["a", "b"]
    assert world.health.lives(world.begin(CORRECTED))  # the host is said to be alive again
    assert world.may_begin(WRONG)


def test_corrected_login_that_is_refused_too_is_a_first_failure_again(world):
    world.kill(WRONG, Cause.LOGIN)
    world.now += 15
    world.kill(WRONG, Cause.LOGIN)
    assert world.kill(CORRECTED, Cause.LOGIN)
    world.now += 14
    assert not world.may_begin(CORRECTED)
    world.now += 1
    assert world.may_begin(CORRECTED)


def test_host_that_does_not_answer_is_dead_whatever_the_login(world):
    world.kill(WRONG)
    assert not world.may_begin(CORRECTED)
