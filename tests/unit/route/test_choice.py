"""Which next hop a message takes: the precedence of the rules, as docs/routes.md has it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.route.choice import Routes, choose
from relay.route.next_hop import NextHop, RouteChoice, RouteRule


def hop(name: str) -> NextHop:
    return NextHop(name, ((f"{name}.hop.example",),))


RECIPIENT = {
    "partner.example": "exact",
    "*.partner.example": "below",
    "*.deep.partner.example": "deep",
    "*": "all",
}
SENDER = {
    "bot@example.com": "bot",
    "example.com": "domain",
    "*.example.com": "below-sender",
    "*.deep.example.com": "deep-sender",
}
ROUTES = Routes(
    {pattern: hop(name) for pattern, name in RECIPIENT.items()},
    {pattern: hop(name) for pattern, name in SENDER.items()},
    {"mine": hop("mine")},
)
WITHOUT_ALL = Routes(
    {pattern: hop(name) for pattern, name in RECIPIENT.items() if pattern != "*"},
    ROUTES.by_sender,
    ROUTES.next_hops,
)


@pytest.mark.parametrize(
    ("domain", "sender", "client", "rule", "name"),
    [
        # 1. the route of the recipient's domain comes before all others
        ("partner.example", "bot@example.com", "mine", "recipient", "exact"),
        ("a.partner.example", "bot@example.com", "mine", "recipient", "below"),
        ("a.b.partner.example", "x@y.example", "", "recipient", "below"),
        ("a.deep.partner.example", "x@y.example", "", "recipient", "deep"),
        ("deep.partner.example", "x@y.example", "", "recipient", "below"),
        # 2. the next hop of the user or the listener
        ("a.example", "bot@example.com", "mine", "client", "mine"),
        ("a.example", "x@y.example", "mine", "client", "mine"),
        # 3. the sender: the address, its domain, the longest "*."
        ("a.example", "bot@example.com", "", "sender", "bot"),
        ("a.example", "Bot@Example.COM", "", "sender", "bot"),
        ("a.example", "other@example.com", "", "sender", "domain"),
        ("a.example", "bot@a.example.com", "", "sender", "below-sender"),
        ("a.example", "bot@deep.example.com", "", "sender", "below-sender"),
        ("a.example", "bot@a.deep.example.com", "", "sender", "deep-sender"),
        # 4. the route of all
        ("a.example", "x@y.example", "", "all", "all"),
        ("a.example", "x@notexample.com", "", "all", "all"),
        # the null reverse-path has neither a client's next hop nor a sender
        ("partner.example", "", "mine", "recipient", "exact"),
        ("a.example", "", "mine", "all", "all"),
        ("a.example", "", "", "all", "all"),
    ],
)
def test_the_first_rule_that_applies_chooses_the_next_hop(
    domain: str, sender: str, client: str, rule: str, name: str
) -> None:
    choice = choose(ROUTES, domain, sender, client)
    assert choice.hop is not None
    assert (choice.rule.value, choice.hop.name) == (rule, name)
    without_all = choose(WITHOUT_ALL, domain, sender, client)
    expected = (RouteRule.MX, None) if rule == "all" else (choice.rule, choice.hop)
    assert (without_all.rule, without_all.hop) == expected


@pytest.mark.parametrize(
    ("domain", "sender", "pattern"),
    [
        ("a.partner.example", "", "*.partner.example"),
        ("a.example", "bot@example.com", "bot@example.com"),
        ("a.example", "x@a.example.com", "*.example.com"),
        ("a.example", "", "*"),
    ],
)
def test_choice_says_under_which_pattern_its_rule_stands(
    domain: str, sender: str, pattern: str
) -> None:
    assert choose(ROUTES, domain, sender).pattern == pattern


def test_next_hop_of_a_client_that_is_configured_no_more_is_missing() -> None:
    choice = choose(ROUTES, "a.example", "x@y.example", "gone")
    assert choice == RouteChoice(RouteRule.CLIENT, missing="gone")
    assert choose(ROUTES, "partner.example", "x@y.example", "gone").hop == hop("exact")
    assert choose(ROUTES, "a.example", "", "gone").hop == hop("all")


def test_address_literals_are_covered_by_themselves_and_by_all() -> None:
    routes = Routes({"[192.0.2.1]": hop("literal"), "*.0.2.1]": hop("wrong"), "*": hop("all")})
    assert choose(routes, "[192.0.2.1]").hop == hop("literal")
    assert choose(routes, "[192.0.2.9]").hop == hop("all")


@given(
    st.sampled_from(["a.example", "partner.example", "x.partner.example", "[192.0.2.1]", ""]),
    st.text(max_size=30) | st.sampled_from(["bot@example.com", "a@b@example.com", "@", "x@"]),
    st.sampled_from(["", "mine", "gone"]),
)
def test_every_message_has_a_choice(domain: str, sender: str, client: str) -> None:
    choice = choose(ROUTES, domain, sender, client)
    assert (choice.hop is None) == bool(choice.missing)  # never MX where there is a route for all
    assert not (choice.missing and not sender)
