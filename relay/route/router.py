"""Answers the question of delivery: where does this mail go?

    a next hop of the operator's     its hosts, with any addresses (`choice` says which next hop)
    an address literal `[192.0.2.1]` that address, if it is allowed (RFC 5321 §4.1.3)
    any other domain                 its mail hosts in the DNS, with judged addresses (§5.1)

The order of a look-up: `mx.mail_hosts` chooses the hosts, `dns` finds their addresses, `plan.plan`
says which of these may be tried. A plan is kept until the first of its answers expires, and
`plan.arrange` shuffles it for each attempt. Logins are not kept: `credentials` returns the current
ones.

The operator names a next hop. Its host may be private and without a dot. If it cannot be found or
used, the mail waits: the mistake is the operator's, not the recipient's. The same holds where a
message names a next hop that is not configured any more: no other way would be what its client
was told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from random import Random

from relay.mail.outcome import Bounced, Code, Deferred
from relay.route import addresses
from relay.route.addresses import (
    Address,
    Network,
    Own,
    Rejection,
    parse_address,
    parse_address_literal,
)
from relay.route.answers import (
    AddressAnswer,
    AddressLookup,
    MxAnswer,
    MxLookup,
    Resolver,
    Unanswered,
)
from relay.route.cache import ExpiringCache
from relay.route.choice import Routes, choose, may_lead_to
from relay.route.credentials import CredentialsError, RouteCredentials
from relay.route.dane import base_domains
from relay.route.family import usable_from, why_unusable
from relay.route.local_address import is_local_address
from relay.route.log_once import LogOnce
from relay.route.mx import MailHost, MailHosts, hop_host, host_name, mail_hosts, unusable
from relay.route.next_hop import (
    BY_NOBODY,
    Host,
    Hosts,
    Naming,
    NextHop,
    NoRoute,
    Route,
    RouteChoice,
)
from relay.route.plan import Plan, arrange, not_found, plan

log = logging.getLogger(__name__)

_MOST_ADDRESSES = 100_000
_MOST_CHOICES = 10_000
_FAILED_SECONDS = 30.0
"""Seconds that a plan is used although a look-up of one of its hosts failed."""
_PATIENCE = 3.0
"""Seconds to wait for the rest of the hosts once one has an address."""
_LONGEST_PATIENCE = 30.0
"""The same, while none has."""
_HOSTS_AT_ONCE = 20
_LITERAL_SECONDS = 60.0
"""Seconds until an address is judged again: the machine's own addresses may change."""
_WRONG_CONFIGURATION = "4.3.5"


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """How mail is routed.

    `max_hosts`: how many mail hosts of a domain are looked up, the best ones; `max_addresses`: how
    many addresses an attempt tries.
    """

    port: int = 25
    allow_networks: tuple[Network, ...] = ()
    routes: Routes = field(default_factory=Routes)
    max_addresses: int = 10
    max_hosts: int = 100


@dataclass(slots=True)
class _Kept:
    """The result of a domain's look-ups. `hosts`: what the last message got, where that is a single
    address: the next message gets the same.
    """

    result: Plan | NoRoute
    naming: Naming = BY_NOBODY
    hosts: Hosts | None = None


class Router:
    """Routes domains.

    `hostname` and `listening` (address and port of each listener) identify the relay itself.
    """

    def __init__(
        self,
        resolver: Resolver,
        options: RouteOptions,
        *,
        hostname: str,
        listening: Callable[[], Collection[tuple[str, int]]] = tuple,
        credentials: RouteCredentials | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolver = resolver
        self._hostname = host_name(hostname) or hostname
        self._own = Own(listening, is_local_address)
        self._random = random or Random()
        self._clock = clock
        self._cache: ExpiringCache[_Kept] = ExpiringCache(_MOST_ADDRESSES)
        self._credentials = credentials or RouteCredentials()
        self._logged = LogOnce()
        self.reload(options)

    def reload(self, options: RouteOptions) -> None:
        """Route by other options from now on."""
        self._options = options
        self._choices: dict[tuple[str, str, str], RouteChoice] = {}
        self._hops_of: dict[str, tuple[NextHop | None, ...]] = {}
        self._cache.clear()
        self._credentials.forget()
        self._logged.forget()

    async def route(self, domain: str, reverse_path: str = "", next_hop: str = "") -> Route:
        """The hosts to try for a recipient domain, in order, or the outcome without a host.

        `reverse_path` and `next_hop`: as for `choice.choose`.
        """
        choice = self._choose(domain, reverse_path, next_hop)
        if choice.missing:
            return self._not_configured(choice)
        return await self._by_choice(domain, choice)

    def leads_to(self, domain: str, reverse_path: str = "", next_hop: str = "") -> NextHop | None:
        """The operator's next hop that such a message takes, None for the MX hosts or where it is
        missing. Nothing is looked up.
        """
        routes = self._options.routes
        if not routes.by_recipient and not routes.by_sender and not next_hop:
            return None
        return self._choose(domain, reverse_path, next_hop).hop

    def may_lead_to(self, domain: str) -> Collection[NextHop | None]:
        """The operator's next hops that mail to a domain may take, whoever sends it; None for the
        MX hosts.
        """
        routes = self._options.routes
        if not (routes.by_recipient or routes.by_sender or routes.next_hops):
            return (None,)
        found = self._hops_of.get(domain)
        if found is None:
            if len(self._hops_of) >= _MOST_CHOICES:
                self._hops_of.clear()
            hops = may_lead_to(routes, host_name(domain) or domain)
            by_destination = {hop and hop.name: hop for hop in hops}
            found = self._hops_of[domain] = tuple(by_destination.values())
        return found

    async def hosts_of(self, hop: NextHop) -> Route:
        """The hosts of a next hop, whatever mail leads there."""
        return replace(await self._by_choice(hop.name, RouteChoice(hop=hop)), choice=RouteChoice())

    def _choose(self, domain: str, reverse_path: str, next_hop: str) -> RouteChoice:
        """The choice, found once for each domain and sender: three parts ask about a message."""
        routes = self._options.routes
        if not (routes.by_sender or next_hop):
            reverse_path = ""  # no rule looks at it
        key = domain, reverse_path, next_hop
        choice = self._choices.get(key)
        if choice is None:
            if len(self._choices) >= _MOST_CHOICES:
                self._choices.clear()
            name = host_name(domain) or domain
            choice = self._choices[key] = choose(routes, name, reverse_path, next_hop)
        return choice

    async def _by_choice(self, domain: str, choice: RouteChoice) -> Route:
        hop = choice.hop
        key = domain if hop is None else f"{hop.name} {domain}"  # neither has a space
        kept = self._cache.get(key, now=self._clock())
        if kept is None:
            kept = await self._look_up(key, domain, hop)
        if kept.hosts is not None and kept.hosts.choice is choice:
            return kept.hosts
        if isinstance(kept.result, NoRoute):
            return replace(kept.result, choice=choice)
        found = await self._arranged(kept.result, choice, kept.naming)
        is_constant = kept.result.weight == 1 and (hop is None or hop.auth is None)
        if is_constant and isinstance(found, Hosts):
            kept.hosts = found
        return found

    async def _arranged(self, plan: Plan, choice: RouteChoice, naming: Naming) -> Route:
        """The hosts of one attempt."""
        if choice.hop is not None:
            return replace(await self._to_hop(plan, choice.hop, naming), choice=choice)
        limit, trouble = self._options.max_addresses, plan.trouble
        hosts = arrange(plan, limit, self._random)
        if (untried := plan.hosts - limit) > 0:
            trouble = (*trouble, f"{untried} more mail hosts are left for another attempt")
        return Hosts(hosts, trouble, plan.rejected, naming, choice)

    async def _look_up(self, key: str, domain: str, hop: NextHop | None) -> _Kept:
        options = self._options
        name = host_name(domain) or domain
        literal = parse_address_literal(domain)
        naming = BY_NOBODY
        if hop is not None:
            result, expires = await self._by_next_hop(domain, hop)
            first = hop.hosts[0][0]
            naming = Naming(True, first, (host_name(first) or first,))
        elif literal is not None:
            result, expires = self._by_literal(domain, literal)
        elif reason := unusable(name):
            bounced = Bounced("5.1.2", Code.NO_USABLE_MX, "", f"{domain} {reason}")
            result, expires = NoRoute(bounced), inf
        else:
            result, expires, naming = await self._by_dns(name)
        kept = _Kept(result, naming)
        if options is self._options:  # else a reload has changed them meanwhile
            weight = 1 + (result.weight if isinstance(result, Plan) else 0)
            self._cache.put(key, kept, expires=expires, weight=weight)
        return kept

    async def _by_dns(self, name: str) -> tuple[Plan | NoRoute, float, Naming]:
        answer = await self._resolver.mx(name)
        listed = mail_hosts(name, answer, hostname=self._hostname)
        if isinstance(listed, NoRoute):
            return listed, answer.expires, BY_NOBODY
        # All hosts: any may be the relay under another name, and no host after it may be tried.
        chosen = listed.hosts[: self._options.max_hosts]
        lookups = await self._look_up_hosts(chosen, self._resolver.addresses)
        result = plan(
            name,
            replace(listed, hosts=chosen, left_out=len(listed.hosts) - len(chosen)),
            lookups,
            make_host=lambda host, address, preference: Host(
                host,
                address,
                self._options.port,
                preference,
                tlsa_bases=base_domains(host, lookups[host]),
            ),
            judge=self._judge,
        )
        expires = min(answer.expires, self._until(result, lookups.values()))
        return result, expires, _named_by_dns(name, answer)

    async def _look_up_hosts(
        self, hosts: Sequence[MailHost], look_up: Callable[[str], Awaitable[AddressLookup]]
    ) -> dict[str, AddressLookup]:
        """Look up twenty at a time. A slow look-up does not delay mail for another host."""
        if len(hosts) == 1:
            return {hosts[0].name: await look_up(hosts[0].name)}
        at_once = asyncio.Semaphore(_HOSTS_AT_ONCE)

        async def addresses(name: str) -> AddressLookup:
            async with at_once:
                return await look_up(name)

        tasks = {host.name: asyncio.create_task(addresses(host.name)) for host in hosts}
        try:
            _, waiting = await asyncio.wait(tasks.values(), timeout=_PATIENCE)
            if waiting and not any(_has_addresses(task) for task in tasks.values()):
                await asyncio.wait(waiting, timeout=_LONGEST_PATIENCE)
            late = Unanswered("the name servers have not answered yet")
            return {name: task.result() if task.done() else late for name, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()

    def _until(self, result: Plan | NoRoute, lookups: Collection[AddressLookup]) -> float:
        """Until when a result is valid. A plan with a host is kept for a while after a failure."""
        if isinstance(result, NoRoute):
            return min(lookup.expires for lookup in lookups)
        answered = [lookup.expires for lookup in lookups if not isinstance(lookup, Unanswered)]
        if result.trouble:
            answered.append(self._clock() + _FAILED_SECONDS)
        return min(answered)

    def _by_literal(self, domain: str, address: Address) -> tuple[Plan | NoRoute, float]:
        """The address that the sender wrote, under the same rules as the addresses of a domain."""
        text = str(address)
        listed = MailHosts((MailHost(0, text),), (), inf)
        result = plan(
            domain,
            listed,
            {text: AddressAnswer((text,))},
            make_host=lambda host, address, preference: Host(
                host, address, self._options.port, preference
            ),
            judge=self._judge,
        )
        return result, self._clock() + _LITERAL_SECONDS

    async def _by_next_hop(self, domain: str, hop: NextHop) -> tuple[Plan | NoRoute, float]:
        """The operator's next hop, without MX look-up; only the relay's own address is refused."""
        names: dict[str, int] = {}
        for preference, equals in enumerate(hop.hosts):
            for named in equals:
                if (name := hop_host(named)) is None:
                    return _deferred(
                        domain, _WRONG_CONFIGURATION, f"{named!r} is not a host name"
                    ), inf
                names.setdefault(name, preference)
        listed = MailHosts(tuple(MailHost(n, name) for name, n in names.items()), (), inf)
        lookups = {
            name: usable_from(hop, lookup)
            for name, lookup in (
                await self._look_up_hosts(listed.hosts, self._addresses_of_hop)
            ).items()
        }
        result = plan(
            domain,
            listed,
            lookups,
            make_host=lambda host, address, preference: Host(
                host,
                address,
                hop.port,
                preference,
                hop.tls,
                tlsa_bases=base_domains(host, lookups[host]),
                hop=hop,
            ),
            judge=lambda address: self._judge_at_hop(address, hop, is_only=len(names) == 1),
        )
        if isinstance(result, Plan):
            unknown = [name for name, lookup in lookups.items() if not _is_found(lookup)]
            lines = (*result.trouble, *result.rejected)
            self._warn_not_found(hop, not_found(unknown, (), lines))
        expires = self._until(result, lookups.values())
        if isinstance(result, NoRoute):
            result = self._unusable_hop(domain, hop, result)
        return result, expires

    def _warn_not_found(self, hop: NextHop, missing: dict[str, str]) -> None:
        """Warn of hosts of a next hop that are not found while others are: of a change at once,
        else once a minute, however many domains lead there.
        """
        said = "; ".join(f"{name} {why}" for name, why in missing.items())
        if said and self._logged.is_due(f"not found {hop.name} {said}", self._clock()):
            log.warning("next hop %s: %s; its other hosts get the mail", hop.name, said)

    async def _addresses_of_hop(self, name: str) -> AddressLookup:
        expires = self._clock() + _LITERAL_SECONDS
        if parse_address(name) is not None:
            return AddressAnswer((name,), expires)
        if name == "localhost":  # RFC 6761 §6.3: never asked of the DNS
            return AddressAnswer(("127.0.0.1", "::1"), expires)
        return await self._resolver.addresses(name)

    def judge(self, text: str, port: int) -> Rejection | None:
        """Why a recipient's domain may not lead to this address and port; None if it may."""
        address = parse_address(text)
        if address is None:
            return Rejection("is not an address")
        return addresses.judge(
            address, port, own=self._own, allow_networks=self._options.allow_networks
        )

    def _judge(self, text: str) -> Rejection | None:
        return self.judge(text, self._options.port)

    def _judge_at_hop(self, text: str, hop: NextHop, *, is_only: bool) -> Rejection | None:
        """`is_only`: the next hop has one host; of several, the relay itself is only left out."""
        address = parse_address(text)
        if address is None:
            return Rejection("is not an address")
        if reason := why_unusable(hop, address):
            return Rejection(reason)
        if self._own.answers_at(address, hop.port):
            return Rejection("is an address of our own", ourselves=is_only)
        return None

    async def _to_hop(self, plan: Plan, hop: NextHop, naming: Naming) -> Route:
        """The hosts of a next hop, with the login there. An attempt deals equals in turn."""
        limit = max(self._options.max_addresses, plan.hosts)
        hosts = arrange(plan, limit, self._random, shuffles_equals=False)
        if hop.auth is not None:
            try:
                credentials = await self._credentials.of(hop)
            except CredentialsError as error:
                if error.status == _WRONG_CONFIGURATION:  # a server that gives none was logged
                    self._log_once(f"login {hop.name} {error}", str(error))
                return NoRoute(Deferred(error.status, Code.NONE, "", str(error)))
            hosts = tuple(replace(host, credentials=credentials) for host in hosts)
        return Hosts(hosts, plan.trouble, plan.rejected, naming)

    def _not_configured(self, choice: RouteChoice) -> NoRoute:
        missing = choice.missing
        text = f"the next hop that was to take this message is not configured: {missing}"
        cure = f"add next_hops.{missing} again, or remove the message"
        self._log_once(f"missing {missing}", f"{text}; {cure}")
        return NoRoute(Deferred(_WRONG_CONFIGURATION, Code.NO_USABLE_MX, "", text), choice)

    def _unusable_hop(self, domain: str, hop: NextHop, result: NoRoute) -> NoRoute:
        """A configured next hop that cannot be used defers, with every answer of the DNS."""
        outcome = result.outcome
        reason = "; ".join(outcome.hosts) or outcome.description
        status = {"5.4.6": "4.4.6", "5.4.4": "4.4.4"}.get(outcome.status, outcome.status)
        deferred = _deferred(domain, status, reason, outcome.hosts)
        # One cause for all domains that the next hop takes.
        self._log_once(f"hosts {hop.name} {status}", deferred.outcome.description)
        return deferred

    def _log_once(self, cause: str, text: str) -> None:
        """Log an error that each attempt meets, once a minute."""
        if self._logged.is_due(cause, self._clock()):
            log.error("%s", text)


def _named_by_dns(domain: str, answer: MxLookup) -> Naming:
    """The naming of hosts by MX records; a certificate may be for the domain (RFC 7672 §3.2.2)."""
    if not isinstance(answer, MxAnswer):
        return BY_NOBODY
    if answer.records and not answer.authenticated:
        return BY_NOBODY
    domains = (domain, answer.canonical) if answer.canonical else (domain,)
    return Naming(answer.authenticated, None, domains, is_domain_itself=not answer.records)


def _has_addresses(task: asyncio.Task[AddressLookup]) -> bool:
    if not task.done():
        return False
    return _is_found(task.result())


def _is_found(lookup: AddressLookup) -> bool:
    return isinstance(lookup, AddressAnswer) and bool(lookup.addresses)


def _deferred(domain: str, status: str, reason: str, lines: tuple[str, ...] = ()) -> NoRoute:
    text = f"the route configured for {domain} cannot be used: {reason}"
    return NoRoute(Deferred(status, Code.NO_USABLE_MX, "", text, hosts=lines))
