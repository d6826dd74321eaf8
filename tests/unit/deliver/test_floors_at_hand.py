"""How long what a domain asks for is good without another look."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from relay.deliver.floors import Floors
from relay.policy.rules import PolicyRules
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
