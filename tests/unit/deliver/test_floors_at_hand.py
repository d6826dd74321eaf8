"""What a domain asks for, put together; and how long that is good without another look."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from relay.deliver.floors import DomainFloor, Floors
from relay.mail.outcome import Waived
from relay.policy.rules import DestinationRule, FloorRules, PolicyRules
from relay.policy.settings import FloorUse, MemoryAction
from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import StsMode
from relay.route.next_hop import BY_NOBODY, Host, Naming
from tests.fakes.floors import Published, Resolver

NAME = "mx.dest.example"
HOST = Host(NAME, "192.0.2.1", 25, tlsa_bases=(NAME,))
POLICY = StsFloor("dest.example", StsMode.ENFORCE, "1", (NAME,))


class World:
    """Floors that are good for a second, and a clock."""

    def __init__(self, *sts: StsFloor) -> None:
        self.published = Published(sts=list(sts) or [POLICY])
        self.rules = PolicyRules()
        self.now = 100.0
        policies: Any = self.published
        resolver: Any = Resolver(self.published)
        self.floors = Floors(
            resolver, policies, lambda: self.rules, seconds=1.0, clock=lambda: self.now
        )

    async def look(self, naming: Naming = BY_NOBODY, **more: Any) -> int:
        """An attempt at one host; how many look-ups it took."""
        before = len(self.published.asked)
        domain = await self.floors.of_domain("dest.example", naming, **more)
        await self.floors.at(HOST, domain)
        return len(self.published.asked) - before


async def test_within_a_second_nothing_is_looked_up_again():
    world = World()
    assert await world.look() == 2  # the policy, and the TLSA records
    world.now += 0.9
    assert await world.look() == 0
    world.now += 0.2
    assert await world.look() == 2


async def test_other_rules_another_naming_and_the_look_before_a_bounce_are_looked_up_at_once():
    world = World()
    await world.look()
    assert await world.look(Naming(is_secure=True)) == 2
    world.rules = PolicyRules()
    assert await world.look(Naming(is_secure=True)) == 2
    assert await world.look(Naming(is_secure=True), anew=True) == 2


async def test_a_policy_just_fetched_is_asked_for_again_since_it_may_hold_once():
    world = World(replace(POLICY, was_fetched=True), POLICY)
    assert await world.look() == 2
    assert await world.look() == 2
    assert await world.look() == 0


async def test_a_message_that_waives_is_never_taken_for_one_that_does_not():
    world = World()
    assert await world.look(waiving="a@sender.example") == 0
    assert await world.look() == 2
    assert await world.look(waiving="a@sender.example") == 0


async def test_a_host_without_a_name_to_ask_for_waits_for_no_resolver():
    """Mail by a route to an address flows while the name servers are dead."""
    world = World(NO_STS)

    async def never() -> bool:
        raise AssertionError("the resolver was asked")

    world.floors._resolver.validates = never  # type: ignore[method-assign]
    domain = await world.floors.of_domain("dest.example", BY_NOBODY)
    found = await world.floors.at(replace(HOST, tlsa_bases=()), domain)
    assert not found.not_used


# --- put together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("naming", "sts", "is_secure"),
    [
        (BY_NOBODY, NO_STS, False),
        (Naming(is_secure=True), NO_STS, True),
        (Naming(is_domain_itself=True), NO_STS, True),
        (BY_NOBODY, POLICY, True),
        (BY_NOBODY, replace(POLICY, mode=StsMode.TESTING), False),
        (BY_NOBODY, replace(POLICY, mx=("other.example",)), False),
    ],
)
def test_host_has_a_secure_name_by_its_naming_or_by_an_enforced_policy(naming, sts, is_secure):
    assert DomainFloor(naming=naming, sts=sts).has_secure_name(HOST) is is_secure


async def test_message_that_waives_is_under_no_policy_and_keeps_the_pins():
    world = World()
    world.rules = PolicyRules(destinations={"dest.example": DestinationRule(mx=(NAME,))})
    floor = await world.floors.of_domain("dest.example", BY_NOBODY, waiving="a@sender.example")
    assert floor.rules == FloorRules(FloorUse.IGNORE, FloorUse.IGNORE, (NAME,))
    assert (floor.sts, floor.waived) == (NO_STS, Waived.TLS_REQUIRED_NO)
    assert floor.told == "dest.example"  # reports on TLS count its sessions all the same
    assert (await world.floors.at(HOST, floor)).policy.waived is Waived.TLS_REQUIRED_NO


async def test_rule_that_ignores_a_policy_is_told_as_a_waiver():
    world = World()
    rule = DestinationRule(mta_sts=FloorUse.IGNORE)
    world.rules = PolicyRules(destinations={"dest.example": rule})
    floor = await world.floors.of_domain("dest.example", BY_NOBODY)
    assert (floor.waived, floor.sts) == (Waived.DESTINATION, NO_STS)
    assert (await world.floors.of_domain("other.example", BY_NOBODY)).waived is None


@pytest.mark.parametrize("is_secure", [False, True])
async def test_floor_of_a_host_tells_whether_its_name_was_signed(is_secure):
    world = World()
    floor = await world.floors.of_domain("dest.example", Naming(is_secure=is_secure))
    assert (await world.floors.at(HOST, floor)).policy.mx_secure is is_secure


class Past:
    """A memory that has the same past for all domains."""

    def __init__(self, past: Any) -> None:
        self.past = past
        self.asked: list[tuple[str, bool]] = []

    async def of_domain(self, domain: str, use: object, *, is_waived: bool) -> Any:
        self.asked.append((domain, is_waived))
        return self.past


async def test_past_of_a_domain_comes_with_its_floor_and_none_with_a_route():
    world, past = World(), object()
    memory: Any = Past(past)
    world.floors._memory = memory
    assert (await world.floors.of_domain("dest.example", BY_NOBODY)).past is past
    waiving = await world.floors.of_domain("dest.example", BY_NOBODY, waiving="a@sender.example")
    assert waiving.past is past
    routed = await world.floors.of_domain("dest.example", Naming(route_host="hop.example"))
    assert routed.past is None
    assert memory.asked == [("dest.example", False), ("dest.example", True)]
    memory.past = None
    assert (await world.floors.of_domain("dest.example", BY_NOBODY)).past is None


class Memory:
    """A memory that says what it was asked, and knows something of one domain."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, MemoryAction | None, bool]] = []

    async def of_domain(
        self, domain: str, action: MemoryAction | None, *, is_waived: bool
    ) -> str | None:
        self.asked.append((domain, action, is_waived))
        return None if action is MemoryAction.IGNORE else "past"


async def test_floor_of_a_domain_has_its_past_which_is_asked_for_each_time():
    world, memory = World(), Memory()
    floors: Any = world.floors
    floors._memory = memory
    rule = DestinationRule(downgrade_memory=MemoryAction.IGNORE)
    for _ in range(2):
        found = await floors.of_domain("dest.example", BY_NOBODY)
        assert (found.past, found.sts) == ("past", POLICY)
    waived = await floors.of_domain("dest.example", BY_NOBODY, waiving="a@sender.example")
    assert (waived.past, waived.sts) == ("past", NO_STS)
    world.rules = PolicyRules(destinations={"dest.example": rule})
    assert (await floors.of_domain("dest.example", BY_NOBODY)).past is None
    by_route = await floors.of_domain("dest.example", Naming(route_host=NAME))
    assert (by_route.past, by_route.naming) == (None, Naming(route_host=NAME))
    assert memory.asked == [
        ("dest.example", None, False),
        ("dest.example", None, False),
        ("dest.example", None, True),
        ("dest.example", MemoryAction.IGNORE, False),
    ]


async def test_without_a_memory_nothing_is_past():
    assert (await World().floors.of_domain("dest.example", BY_NOBODY)).past is None
