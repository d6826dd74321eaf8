"""How much is claimed, and whose turn it is, as decisions without a store or a loop."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from relay.deliver.destinations import Destinations
from relay.deliver.waiting import Waiting
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule
from tests.fakes.mail import entry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCHEDULE = RetrySchedule()


def of(domain: str, number: int = 0, total: int = 0) -> Entry:
    one = entry(f"b@{domain}")
    return replace(one, message=replace(one.message, queue_id=f"Q{number}"), total=total)


def waiting_of(most: int, share: int) -> Waiting[str]:
    return Waiting(
        most,
        share,
        schedule=SCHEDULE,
        destinations=Destinations(share, SCHEDULE, clock=lambda: 0.0),
        clock=lambda: NOW,
        monotonic=lambda: 0.0,
    )


def begin_all(waiting: Waiting[str]) -> list[str]:
    """Begin all attempts that may begin; their domains."""
    begun = []
    for one, line, rank, _ in waiting.turns():
        waiting.places.begin(f"{one.domain} {one.message.queue_id}", line, one, rank)
        begun.append(one.domain)
    return begun


def test_an_idle_relay_claims_a_page_with_all_that_is_new():
    wanted = waiting_of(20, 5).wanted()
    assert wanted is not None
    assert (wanted.limit, wanted.only, wanted.with_new) == (20, None, True)


def test_nothing_is_claimed_while_half_a_page_waits_and_no_place_is_free():
    waiting = waiting_of(4, 4)
    for number in range(7):
        waiting.add(of(f"d{number}.example", number))
    assert len(begin_all(waiting)) == 4
    assert waiting.wanted() is None
    for number in (4, 5):
        waiting.lines.pop_all(f"d{number}.example")
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.limit == 3


def test_a_page_of_unproven_domains_leaves_claims_for_proven_ones_alone():
    waiting = waiting_of(20, 5)
    waiting.places.note("well.example", is_proven=True)
    for number in range(40):
        waiting.add(of(f"slow{number}.example", number))
    assert len(begin_all(waiting)) == 15
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.only == ("well.example",)
    waiting.claimed(wanted)
    assert not waiting.may_claim()
    waiting.places.end("slow0.example Q0")
    assert waiting.may_claim()


def test_the_places_of_proven_domains_are_left_free_by_all_others():
    waiting = waiting_of(8, 2)
    waiting.places.note("well.example", is_proven=True)
    for number in range(8):
        waiting.add(of(f"slow{number}.example", number))
    assert len(begin_all(waiting)) == 6
    waiting.add(of("well.example"))
    assert begin_all(waiting) == ["well.example"]


def test_a_message_to_many_domains_leaves_places_for_other_messages():
    waiting = waiting_of(8, 2)
    waiting.places.note("well.example", is_proven=True)
    for number in range(8):
        waiting.add(of(f"list{number}.example", number, total=100))
    assert len(begin_all(waiting)) == 3
    waiting.add(of("new.example"))
    assert begin_all(waiting) == ["new.example"]


def test_a_domain_whose_line_is_long_is_passed_over_until_it_is_shorter():
    waiting = waiting_of(20, 4)
    for number in range(7):
        waiting.add(of("long.example", number))
    waiting.add(of("other.example"))
    begin_all(waiting)
    for number in range(2):
        waiting.add(of("long.example", 10 + number))
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.skip == {"long.example"}
    waiting.claimed(wanted)
    assert not waiting.may_claim()
    waiting.lines.pop_last("long.example", 4)
    assert waiting.may_claim()


def test_classes_of_domains_take_turns():
    waiting = waiting_of(20, 5)
    waiting.places.note("well.example", is_proven=True)
    for number in range(2):
        waiting.add(of("well.example", number))
        waiting.add(of(f"new{number}.example", number))
        waiting.add(of(f"list{number}.example", number, total=100))
    domains = ["new0.example", "list0.example", "well.example"]
    assert begin_all(waiting) == [*domains, "new1.example", "list1.example", "well.example"]
