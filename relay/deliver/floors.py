"""Looks up the floors of an attempt: the domain's MTA-STS policy, and its hosts' TLSA records.

    of_domain   before any host is tried: the policy, and the operator's rules for the domain
    at          at one host: its floor, or why the relay does not connect to it

The result has also what the domain's hosts have shown before (`relay.deliver.memory`).

`relay.route.security` judges by these values. Attempts, `relay explain` and `relay probe` all look
them up here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from relay.deliver.memory import DowngradeMemory, OfDomain
from relay.deliver.sessions import judged_by
from relay.deliver.sts_policies import StsPolicies
from relay.mail.outcome import Waived
from relay.mail.record import record
from relay.policy.rules import FloorRules, PolicyRules, floor_rules, is_locked
from relay.policy.settings import FloorUse
from relay.route.answers import Resolver
from relay.route.cache import ExpiringCache
from relay.route.dane import look_up
from relay.route.floor import (
    NO_DANE,
    NO_STS,
    DaneFloor,
    DaneState,
    HostFloor,
    StsFloor,
    floor_at,
    not_named,
)
from relay.route.mta_sts import policy_domain
from relay.route.next_hop import BY_NOBODY, Host, Naming

_AT_HAND = 10_000

_NO_RULES = FloorRules(FloorUse.IGNORE, FloorUse.IGNORE)
_IGNORED = DaneFloor(DaneState.IGNORED)


@record(frozen=True, slots=True)
class DomainFloor:
    """The facts that hold for all hosts of one attempt.

    Each host of an operator's next hop has facts of its own. `naming`: who named the hosts.
    `at_hosts`: the floors that were looked up so far. `told`: the domain that has the policy and
    gets reports on TLS; "" where there can be none. `past`: what the hosts have shown before, None
    where that does not matter.
    """

    rules: FloorRules = _NO_RULES
    naming: Naming = BY_NOBODY
    sts: StsFloor = NO_STS
    waived: Waived | None = None
    told: str = ""
    past: OfDomain | None = None
    at_hosts: dict[Host, HostFloor] = field(default_factory=dict)

    @property
    def pins(self) -> tuple[str, ...] | None:
        """The hosts that the operator allows; None for any, also for the host of a route."""
        return self.rules.pins if self.naming.route_host is None else None

    def has_secure_name(self, host: Host) -> bool:
        """Whether the name of a host is known for sure, as REQUIRETLS asks (RFC 8689 §4.2.1): a pin
        is not enough.
        """
        naming = self.naming
        named_by_policy = self.sts.holds and self.sts.names(host.name)
        return naming.is_secure or naming.is_domain_itself or named_by_policy


@dataclass(frozen=True, slots=True)
class _AtHand:
    rules: PolicyRules
    floor: DomainFloor


class Floors:
    """`rules`: those in force. `seconds`: how long the next message may use a domain's floor.

    It must not be longer than the shortest time that a DNS answer is kept.
    """

    def __init__(
        self,
        resolver: Resolver,
        policies: StsPolicies,
        rules: Callable[[], PolicyRules],
        *,
        seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        memory: DowngradeMemory | None = None,
    ) -> None:
        self._memory = memory
        self._resolver = resolver
        self._policies = policies
        self._rules = rules
        self._seconds = seconds
        self._clock = clock
        self._at_hand: ExpiringCache[_AtHand] = ExpiringCache(_AT_HAND)

    async def of_domain(
        self, domain: str, naming: Naming, *, waiving: str | None = None, anew: bool = False
    ) -> DomainFloor:
        """What an attempt for a recipient domain (normalised) is under. `anew`: the MTA-STS record
        is looked up although an answer is at hand.

        `waiving`: the reverse-path of a message that says TLS-Required: No. It waives what the
        domain asks for, unless a rule lets no message have less; pins stay (RFC 8689 §3).
        Raises `PolicyPending` or `SpoolError`.
        """
        found = await self._published(domain, naming, waiving, anew=anew)
        if self._memory is None or naming.route_host is not None:
            return found  # the operator named the host, so it is no host of the domain
        is_waived = found.waived is Waived.TLS_REQUIRED_NO
        past = await self._memory.of_domain(domain, found.rules.memory, is_waived=is_waived)
        return replace(found, past=past) if past is not None else found

    async def _published(
        self, domain: str, naming: Naming, waiving: str | None, *, anew: bool
    ) -> DomainFloor:
        in_force = self._rules()
        if waiving is not None and not is_locked(in_force, waiving, domain):
            rules = floor_rules(in_force, domain)
            ignoring = replace(rules, mta_sts=FloorUse.IGNORE, dane=FloorUse.IGNORE)
            told = policy_domain(domain, naming.route_host)
            return DomainFloor(ignoring, naming, waived=Waived.TLS_REQUIRED_NO, told=told)
        known = self._at_hand.get(_key(domain, naming), now=self._clock())
        is_so = known is not None and known.rules is in_force and known.floor.naming == naming
        if known is not None and is_so and not anew:
            return known.floor
        return await self._look_up(domain, naming, in_force, anew=anew)

    async def _look_up(
        self, domain: str, naming: Naming, in_force: PolicyRules, *, anew: bool
    ) -> DomainFloor:
        rules, told = floor_rules(in_force, domain), policy_domain(domain, naming.route_host)
        sts = await self._policies.floor(told, rules.mta_sts, anew=anew)
        waived = Waived.DESTINATION if rules.is_waived else None
        floor = DomainFloor(rules, naming, sts, waived, told)
        # A policy just fetched may hold for this attempt alone (max_age 0).
        if self._seconds and not sts.was_fetched:
            expires = self._clock() + self._seconds
            self._at_hand.put(_key(domain, naming), _AtHand(in_force, floor), expires=expires)
        return floor

    async def at(self, host: Host, domain: DomainFloor) -> HostFloor:
        """The floor at one host. No TLSA records are looked up for a host that is not used."""
        found = domain.at_hosts.get(host)
        if found is None:
            # Without a name to look up, the attempt does not wait for the check of the resolver.
            is_asked = host.tlsa_bases and not not_named(host.name, domain.sts, domain.pins)
            dane = await self.dane_at(host, domain) if is_asked else NO_DANE
            found = domain.at_hosts[host] = judged(host, domain, dane)
        return found

    async def dane_at(self, host: Host, domain: DomainFloor) -> DaneFloor:
        """What DANE requires of one host."""
        use = domain.rules.dane
        if use is FloorUse.IGNORE:
            return _IGNORED
        return await look_up(
            self._resolver,
            host.tlsa_bases,
            host.port,
            names=domain.naming.domains,
            is_enforced=use is FloorUse.ENFORCE,
        )


def _key(domain: str, naming: Naming) -> str:
    """Each host of a next hop has a floor of its own."""
    return domain if naming.route_host is None else f"{domain} {naming.route_host}"


def judged(host: Host, domain: DomainFloor, dane: DaneFloor) -> HostFloor:
    """The floor at one host, from what was looked up."""
    found = floor_at(
        host.name,
        dane=dane,
        sts=domain.sts,
        pins=domain.pins,
        mx_secure=domain.naming.is_secure,
        waived=domain.waived,
    )
    by = judged_by(found.policy, domain.told, dane, domain.sts)
    return replace(found, judged_by=by, told=domain.told)
