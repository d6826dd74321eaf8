"""Who waits, in which order, and how many for which destination."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from relay.deliver.lines import Lines, Rank, line_of_hop
from relay.queue.entry import Entry
from tests.fakes.mail import entry


def waiting(number: int, domain: str) -> Entry:
    one = entry(f"b@{domain}")
    return replace(one, message=replace(one.message, queue_id=f"Q{number}"))


def test_domains_take_turns_and_each_has_its_entries_in_order():
    lines = Lines()
    for number, domain in enumerate(["a.example", "a.example", "b.example"]):
        lines.add(domain, waiting(number, domain), Rank.NEW)
    order = []
    while len(lines):
        domain = next(lines.turns(Rank.NEW))
        order.append(lines.pop(domain).message.queue_id)
    assert order == ["Q0", "Q2", "Q1"]


def test_each_class_of_mail_has_its_own_turns():
    lines = Lines()
    lines.add("a.example", waiting(1, "a.example"), Rank.NEW)
    lines.add("b.example", waiting(2, "b.example"), Rank.PROVEN)
    assert list(lines.turns(Rank.NEW)) == ["a.example"]
    assert list(lines.turns(Rank.PROVEN)) == ["b.example"]
    lines.classify("a.example", Rank.PROVEN)
    assert (lines.waiting(Rank.NEW), lines.waiting(Rank.PROVEN)) == (0, 2)


def test_a_line_has_the_best_rank_of_its_entries():
    lines = Lines()
    lines.add("a.example", waiting(1, "a.example"), Rank.BULK)
    lines.add("a.example", waiting(2, "a.example"), Rank.NEW)
    lines.add("a.example", waiting(3, "a.example"), Rank.BULK)
    assert (lines.waiting(Rank.NEW), lines.waiting(Rank.BULK)) == (3, 0)


def test_returned_entry_is_first_in_its_line_and_the_last_entry_leaves_first():
    lines = Lines()
    for number in (1, 2, 3):
        lines.add("a.example", waiting(number, "a.example"), Rank.NEW)
    lines.add("a.example", waiting(0, "a.example"), Rank.NEW, at_head=True)
    assert [one.message.queue_id for one in lines.pop_last("a.example", 2)] == ["Q3", "Q2"]
    assert [one.message.queue_id for one in lines.pop_all("a.example")] == ["Q0", "Q1"]


def test_destination_of_a_domain_is_remembered_for_a_while():
    lines = Lines()
    lines.add("a.example", waiting(1, "a.example"), Rank.NEW)
    lines.bind("a.example", ("[192.0.2.1]:25",), until=10)
    assert lines.destinations("a.example", 9) == ("[192.0.2.1]:25",)
    assert lines.waiting_at("[192.0.2.1]:25") == 1
    assert lines.destinations("a.example", 10) == ()
    assert lines.waiting_at("[192.0.2.1]:25") == 0


def test_line_of_a_next_hop_stays_bound_however_many_domains_are():
    lines, line = Lines(), line_of_hop("provider")
    lines.add(line, waiting(1, "a.example"), Rank.NEW)
    lines.bind(line, ("hop.example:25",), until=inf)
    for number in range(10_100):
        lines.bind(f"d{number}.example", ("[192.0.2.1]:25",), until=10)
    assert lines.destinations(line, 9) == ("hop.example:25",)
    assert lines.waiting_at("hop.example:25") == 1
    assert lines.destinations("d0.example", 9) == ()


DOMAINS = st.sampled_from(["a.example", "b.example", "c.example"])
RANKS = st.sampled_from(Rank)
NAMES = st.sampled_from([("one",), ("two",), ("one", "two")])


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), DOMAINS, RANKS, st.booleans()),
            st.tuples(st.just("pop"), DOMAINS),
            st.tuples(st.just("pop_last"), DOMAINS, st.integers(0, 3)),
            st.tuples(st.just("classify"), DOMAINS, RANKS),
            st.tuples(st.just("bind"), DOMAINS, NAMES),
            st.tuples(st.just("unbind"), DOMAINS),
        )
    )
)
def test_the_counts_are_those_of_the_entries(steps):
    lines, number = Lines(), 0
    entries: Counter[str] = Counter()
    leads: dict[str, tuple[str, ...]] = {}
    for verb, domain, *rest in steps:
        match verb:
            case "add":
                number += 1
                lines.add(domain, waiting(number, domain), rest[0], at_head=rest[1])
                entries[domain] += 1
            case "pop" if entries[domain]:
                lines.pop(domain)
                entries[domain] -= 1
            case "pop_last":
                entries[domain] -= len(lines.pop_last(domain, rest[0]))
            case "classify":
                lines.classify(domain, rest[0])
            case "bind":
                lines.bind(domain, rest[0], until=1)
                leads[domain] = rest[0]
            case "unbind":
                lines.unbind(domain)
                leads.pop(domain, None)
        assert len(lines) == lines.waiting(*Rank) == entries.total()
        assert sorted(lines.names()) == sorted(domain for domain in entries if entries[domain])
        for name in ("one", "two"):
            at = sum(entries[domain] for domain, names in leads.items() if name in names)
            assert lines.waiting_at(name) == at
