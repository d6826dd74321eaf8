"""The short way from accept to delivery is bounded, fair, and never blocked by one destination."""

from __future__ import annotations

import pytest

from relay.queue.entry import Entry
from relay.queue.handoff import HandOff, HandOffLimits, Shares, weight_of
from tests.fakes.queued import new_message


def entry(domain: str, content: bytes = b"x") -> Entry:
    new = new_message(f"b@{domain}", content=content)
    return Entry(new.message, new.recipients, content, 1)


def filled(limits: HandOffLimits, *domains: str) -> HandOff:
    handoff = HandOff(limits)
    for domain in domains:
        one = entry(domain)
        if handoff.reserve(one):
            handoff.put(one)
    return handoff


def taken(entries: list[Entry]) -> list[str]:
    return [one.domain for one in entries]


def test_the_domains_are_served_in_turn():
    handoff = filled(HandOffLimits(), *["busy.example"] * 5, "a.example", "b.example")
    assert taken(handoff.take(4)) == ["busy.example", "a.example", "b.example", "busy.example"]


def test_entries_of_one_domain_leave_in_the_order_of_their_arrival():
    handoff, entries = HandOff(HandOffLimits()), [entry("a.example") for _ in range(5)]
    for one in entries:
        assert handoff.reserve(one)
        handoff.put(one)
    assert handoff.take(3) + handoff.take(10) == entries
    assert len(handoff) == 0


def test_a_domain_to_be_skipped_waits_and_the_others_go():
    handoff = filled(HandOffLimits(), "dead.example", "dead.example", "a.example")
    assert taken(handoff.take(10, {"dead.example"})) == ["a.example"]
    assert taken(handoff.take(10)) == ["dead.example", "dead.example"]


def test_a_domain_that_has_its_share_waits():
    handoff = filled(HandOffLimits(), *["busy.example"] * 5, "a.example")
    shares = Shares(lambda domain: 2)
    assert taken(handoff.take(10, (), shares)) == ["busy.example", "a.example", "busy.example"]
    assert handoff.take(10, (), shares) == []


@pytest.mark.parametrize(
    ("limits", "domains", "admitted"),
    [
        (HandOffLimits(entries=3), ["a", "b", "c", "d"], 3),
        (HandOffLimits(entries_per_domain=2), ["a", "a", "a", "b"], 3),
        (HandOffLimits(size_bytes=2 * weight_of(entry("a"))), ["a", "b", "c"], 2),
        (HandOffLimits(entries=0), ["a"], 0),
    ],
)
def test_handoff_holds_no_more_than_its_limit(limits, domains, admitted):
    assert len(filled(limits, *domains)) == admitted


def test_room_is_free_again_when_an_entry_has_left_or_did_not_come():
    handoff, one = HandOff(HandOffLimits(entries=1)), entry("a")
    for _ in range(3):
        assert handoff.reserve(one)
        assert not handoff.reserve(entry("b"))
        handoff.put(one)
        assert handoff.take(1) == [one]
    assert handoff.reserve(one)
    handoff.give_up(one)
    assert handoff.reserve(entry("b"))


def test_all_of_some_domains_can_be_taken_out():
    handoff = filled(HandOffLimits(), "a", "a", "b", "c")
    assert taken(handoff.take_of({"a", "nobody"})) == ["a", "a"]
    assert sorted(taken(handoff.take_all())) == ["b", "c"]
    assert len(handoff) == 0


def test_a_skipped_domain_is_not_the_oldest():
    handoff = filled(HandOffLimits(), "a", "b")
    oldest = handoff.oldest({"a"})
    assert oldest is not None
    assert oldest.domain == "b"
    assert handoff.oldest({"a", "b"}) is None


def test_handoff_is_crowded_when_more_than_half_of_it_is_used():
    assert not filled(HandOffLimits(entries=4), "a", "b").is_crowded
    assert filled(HandOffLimits(entries=4), "a", "b", "c").is_crowded


def test_entries_of_some_domains_only_are_taken_in_turn_past_all_others():
    domains = [f"d{number}.example" for number in range(50)]
    handoff = filled(HandOffLimits(), *domains, "a.example", "b.example", "a.example", "a.example")
    only = ("b.example", "a.example", "absent.example")
    shares = Shares(lambda domain: 2)
    assert taken(handoff.take(9, ("d0.example",), shares, only)) == [
        "b.example",
        "a.example",
        "a.example",
    ]
    assert len(handoff) == 51
    assert taken(handoff.take(1, (), None, ("a.example",))) == ["a.example"]
    assert taken(handoff.take(99, (), None, ("a.example",))) == []


def test_all_but_the_entries_of_some_domains_can_be_taken_out():
    handoff = filled(HandOffLimits(), "a.example", "b.example", "c.example", "a.example")
    assert sorted(taken(handoff.take_but({"b.example"}))) == ["a.example", "a.example", "c.example"]
    assert len(handoff) == 1


def test_newest_entries_beyond_what_a_domain_may_have_are_taken_out():
    handoff = filled(HandOffLimits(), "a.example", *["b.example"] * 4, "c.example")
    beyond = handoff.take_beyond({"a.example": 1, "b.example": 2, "c.example": 0}.__getitem__)
    assert sorted(taken(beyond)) == ["b.example", "b.example", "c.example"]
    assert sorted(taken(handoff.take(10))) == ["a.example", "b.example", "b.example"]
    assert not len(handoff)


def test_domain_has_no_room_beyond_what_it_may_have():
    handoff = HandOff(HandOffLimits())
    entries = [entry("a.example") for _ in range(3)]
    assert [handoff.reserve(one, 2) for one in entries] == [True, True, False]
    assert not handoff.reserve(entry("b.example"), 0)
