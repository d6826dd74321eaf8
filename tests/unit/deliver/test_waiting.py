"""How much is claimed, and whose turn it is, as decisions without a store or a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from relay.deliver.destinations import Destinations
from relay.deliver.lines import Rank
from relay.deliver.waiting import Waiting
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule
from relay.route.next_hop import NextHop, Rate
from tests.fakes.mail import entry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCHEDULE = RetrySchedule()


def of(domain: str, number: int = 0, total: int = 0) -> Entry:
    one = entry(f"b@{domain}")
    return replace(one, message=replace(one.message, queue_id=f"Q{number}"), total=total)


def waiting_of(
    most: int,
    share: int,
    leads_to: Callable[[Entry], NextHop | None] = lambda entry: None,
    monotonic: Callable[[], float] = lambda: 0.0,
) -> Waiting[str]:
    return Waiting(
        most,
        share,
        schedule=SCHEDULE,
        destinations=Destinations(share, SCHEDULE, clock=monotonic),
        clock=lambda: NOW,
        monotonic=monotonic,
        leads_to=leads_to,
    )


def hop(name: str = "provider", **limits: Any) -> NextHop:
    return NextHop(name, ((f"{name}.example",),), **limits)


def begin_all(waiting: Waiting[str]) -> list[str]:
    """Begin all attempts that may begin; their domains."""
    begun = []
    for one, line, rank, _ in waiting.turns():
        waiting.slots.begin(f"{one.domain} {one.message.queue_id}", line, one, rank)
        begun.append(one.domain)
    return begun


def test_an_idle_relay_claims_a_page_with_all_that_is_new():
    wanted = waiting_of(20, 5).wanted()
    assert wanted is not None
    assert (wanted.limit, wanted.only, wanted.with_new) == (20, None, True)


def test_scheduler_claims_a_page_ahead_of_busy_slots_except_what_others_have_where_nothing_waits():
    waiting = waiting_of(4, 4)
    for number in range(4):
        waiting.line_up([of(f"d{number}.example", number)])
    assert len(begin_all(waiting)) == 4
    waiting.leave("others.example")
    wanted = waiting.wanted()
    assert wanted is not None
    assert (wanted.limit, wanted.only, wanted.with_new) == (4, None, True)
    assert wanted.skip == {"others.example"}


def test_nothing_is_claimed_while_half_a_page_waits_and_no_place_is_free():
    waiting = waiting_of(4, 4)
    for number in range(7):
        waiting.line_up([of(f"d{number}.example", number)])
    assert len(begin_all(waiting)) == 4
    assert waiting.wanted() is None
    for number in (4, 5):
        waiting.lines.pop_all(f"d{number}.example")
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.limit == 3


def test_a_page_of_unproven_domains_leaves_claims_for_proven_ones_alone():
    waiting = waiting_of(20, 5)
    waiting.slots.note("well.example", is_proven=True)
    for number in range(40):
        waiting.line_up([of(f"slow{number}.example", number)])
    assert len(begin_all(waiting)) == 15
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.only == ("well.example",)
    waiting.claimed(wanted)
    assert not waiting.may_claim()
    waiting.slots.end("slow0.example Q0")
    assert waiting.may_claim()


def test_the_slots_of_proven_domains_are_left_free_by_all_others():
    waiting = waiting_of(8, 2)
    waiting.slots.note("well.example", is_proven=True)
    for number in range(8):
        waiting.line_up([of(f"slow{number}.example", number)])
    assert len(begin_all(waiting)) == 6
    waiting.line_up([of("well.example")])
    assert begin_all(waiting) == ["well.example"]


def test_a_message_to_many_domains_leaves_slots_for_other_messages():
    waiting = waiting_of(8, 2)
    waiting.slots.note("well.example", is_proven=True)
    for number in range(8):
        waiting.line_up([of(f"list{number}.example", number, total=100)])
    assert len(begin_all(waiting)) == 3
    waiting.line_up([of("new.example")])
    assert begin_all(waiting) == ["new.example"]


def test_a_domain_whose_line_is_long_is_passed_over_until_it_is_shorter():
    waiting = waiting_of(20, 4)
    for number in range(7):
        waiting.line_up([of("long.example", number)])
    waiting.line_up([of("other.example")])
    begin_all(waiting)
    for number in range(2):
        waiting.line_up([of("long.example", 10 + number)])
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.skip == {"long.example"}
    waiting.claimed(wanted)
    assert not waiting.may_claim()
    waiting.lines.pop_last("long.example", 4)
    assert waiting.may_claim()


def test_classes_of_domains_take_turns():
    waiting = waiting_of(20, 5)
    waiting.slots.note("well.example", is_proven=True)
    for number in range(2):
        waiting.line_up([of("well.example", number)])
        waiting.line_up([of(f"new{number}.example", number)])
        waiting.line_up([of(f"list{number}.example", number, total=100)])
    domains = ["new0.example", "list0.example", "well.example"]
    assert begin_all(waiting) == [*domains, "new1.example", "list1.example", "well.example"]


def test_domains_of_a_next_hop_wait_in_one_line_and_begin_with_a_connection_reserved():
    limited = hop(max_connections=2)
    waiting = waiting_of(20, 5, lambda entry: limited)
    for number in range(4):
        waiting.line_up([of(f"d{number}.example", number)])
    assert waiting.lines.names() == ["next hop provider"]
    turns = list(waiting.turns())
    assert [turn.entry.domain for turn in turns] == ["d0.example", "d1.example"]
    assert all(turn.use is not None for turn in turns)


def test_mail_over_a_limited_next_hop_does_not_hold_up_other_mail_for_the_same_domain():
    limited = hop(rate=Rate(1, 3600))

    def leads_to(entry: Entry) -> NextHop | None:
        return limited if entry.message.queue_id < "Q5" else None

    waiting = waiting_of(20, 4, leads_to)
    for number in range(9):
        waiting.line_up([of("mail.example", number)])
    begun = [turn.entry.message.queue_id for turn in waiting.turns()]
    assert sorted(begun) == ["Q0", "Q5", "Q6", "Q7"], "4 for a domain, over whatever way"
    wanted = waiting.wanted()
    assert wanted is not None
    assert wanted.skip == frozenset()


def test_domain_that_hangs_over_one_next_hop_holds_up_no_other_domain_of_another():
    hanging, well = hop("hanging"), hop("well")

    def leads_to(entry: Entry) -> NextHop | None:
        return hanging if entry.message.queue_id < "Q4" else well

    waiting = waiting_of(20, 4, leads_to)
    for number in range(4):
        waiting.line_up([of("slow.example", number)])
    assert begin_all(waiting) == ["slow.example"] * 4
    for number in range(4, 7):
        waiting.line_up([of("slow.example", number)])
    for number in range(7, 9):
        waiting.line_up([of(f"d{number}.example", number)])
    assert begin_all(waiting) == ["d7.example", "d8.example"]
    waiting.ended(of("slow.example"))
    [turn] = waiting.turns()
    assert turn.entry.message.queue_id == "Q4", "the order is kept otherwise"


def test_entries_whose_domain_is_busy_are_the_first_that_go_back_into_the_queue():
    limited, hanging = hop(rate=Rate(30, 60)), hop("hanging")

    def leads_to(entry: Entry) -> NextHop | None:
        return hanging if entry.message.queue_id < "Q4" else limited

    waiting = waiting_of(20, 4, leads_to)
    for number in range(4):
        waiting.line_up([of("slow.example", number)])
    waiting.line_up([of("first.example", 9)])
    assert len(begin_all(waiting)) == 5, "the rate lets none in from now on"
    for number in range(4, 9):
        waiting.line_up([of("slow.example", number)])
    waiting.line_up([of("other.example", 9)])
    assert begin_all(waiting) == []
    taken = waiting.room.take_excess()
    assert taken
    assert {entry.domain for entry, _, _ in taken} == {"slow.example"}


def test_entries_that_wait_for_limits_of_next_hops_take_no_page_from_others():
    hops = [hop(f"hop{number}", rate=Rate(1, 3600)) for number in range(30)]
    waiting = waiting_of(20, 4, lambda entry: hops[int(entry.domain[1:3])])
    for number in range(30):
        for again in range(4):
            waiting.line_up([of(f"d{number:02}.example", 100 * number + again)])
    assert len(list(waiting.turns())) == 30
    wanted = waiting.wanted()
    assert wanted is not None
    assert (wanted.limit, wanted.only, wanted.with_new) == (20, None, True)
    assert len(waiting.room.take_excess()) > 0


def test_entries_line_up_again_when_routes_have_changed():
    routes = {"d0.example": hop("old"), "d1.example": hop("old")}
    waiting = waiting_of(20, 4, lambda entry: routes.get(entry.domain))
    for number in range(3):
        waiting.line_up([of(f"d{number}.example", number)])
    assert waiting.lines.names() == ["next hop old", "d2.example"]
    routes.clear()
    routes["d2.example"] = hop("new")
    waiting.line_up_again()
    assert sorted(waiting.lines.names()) == ["d0.example", "d1.example", "next hop new"]


def test_mail_for_domains_of_a_proven_next_hop_is_claimed_with_that_for_proven_domains():
    provider = hop()
    waiting = waiting_of(20, 5, lambda entry: provider if "d" in entry.domain[:1] else None)
    waiting.slots.note("next hop provider", is_proven=True, domain="d1.example")
    waiting.slots.note("well.example", is_proven=True)
    assert waiting.slots.proven == ("d1.example", "well.example")
    assert waiting.slots.rank("next hop provider", of("d2.example")) is Rank.PROVEN
    for number in range(40):
        waiting.line_up([of(f"slow{number}.example", number)])
    begin_all(waiting)
    waiting.line_up([of("d2.example")])
    assert begin_all(waiting) == ["d2.example"]


@pytest.mark.parametrize(("slow", "after"), [(8, 1.1), (7, 5.1)])
def test_attempt_takes_long_after_a_second_only_where_others_wait_for_its_place(slow, after):
    now = [100.0]
    waiting = waiting_of(8, 2, monotonic=lambda: now[0])
    domains = [f"slow{number}.example" for number in range(slow)]
    for domain in [*domains, "well.example"]:
        waiting.slots.note(domain, is_proven=True)
    for domain in domains:
        waiting.line_up([of(domain)])
    assert len(begin_all(waiting)) == slow
    if slow == 8:
        waiting.line_up([of("well.example")])
    for seconds in (after - 0.6, after):
        now[0] = 100.0 + seconds
        waiting.line_up([of("other.example")])
        begin_all(waiting)
        is_long = seconds == after
        assert ("slow0.example" in waiting.slots.proven) is not is_long
        assert bool(waiting.slots.in_the_way()) is (is_long and slow == 8)
