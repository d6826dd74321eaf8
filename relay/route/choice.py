"""Which next hop a message takes to a recipient, and by which rule. Pure.

The first rule that applies decides:

    1  recipient   `routes`: the recipient's domain, then the longest "*." above it
    2  client      `next_hop` of the user who logged in, or of the listener
    3  sender      `routes_by_sender`: the sender's address, its domain, then the longest "*."
    4  all         `routes`: "*"
    5  mx          no next hop: the MX records of the recipient's domain

The sender is the reverse-path. A message with the null reverse-path, such as a report, has no
sender: the rules 2 and 3 do not apply to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

from relay.mail.address import AddressError, normalise_domain
from relay.route.next_hop import NextHop, RouteChoice, RouteRule

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Routes:
    """`routes` and `routes_by_sender`, each pattern with its next hop; and all by name. `clients`:
    the names that users and listeners may give to a message; None: any of them.
    """

    by_recipient: Mapping[str, NextHop] = field(default_factory=dict)
    by_sender: Mapping[str, NextHop] = field(default_factory=dict)
    next_hops: Mapping[str, NextHop] = field(default_factory=dict)
    clients: Collection[str] | None = None

    def every_next_hop(self) -> dict[str, NextHop]:
        """All next hops by name, also those that stand in a route itself."""
        in_routes = (*self.by_recipient.values(), *self.by_sender.values())
        return {**{hop.name: hop for hop in in_routes}, **self.next_hops}


def choose(routes: Routes, domain: str, reverse_path: str = "", next_hop: str = "") -> RouteChoice:
    """The next hop for a recipient's domain. `next_hop`: the one that the client's listener or user
    named when the message was accepted; it may be missing since a reload.
    """
    found = _first(routes.by_recipient, _domain_patterns(domain))
    if found is not None:
        return RouteChoice(RouteRule.RECIPIENT, *found)
    if reverse_path and next_hop:
        hop = routes.next_hops.get(next_hop)
        return RouteChoice(RouteRule.CLIENT, hop=hop, missing="" if hop else next_hop)
    found = _first(routes.by_sender, _sender_patterns(reverse_path))
    if found is not None:
        return RouteChoice(RouteRule.SENDER, *found)
    found = _first(routes.by_recipient, ("*",))
    if found is not None:
        return RouteChoice(RouteRule.ALL, *found)
    return RouteChoice(RouteRule.MX)


def may_lead_to(routes: Routes, domain: str) -> list[NextHop | None]:
    """The next hops that mail to a domain may take, whoever sends it; None for its MX hosts."""
    found = _first(routes.by_recipient, _domain_patterns(domain))
    if found is not None:
        return [found[1]]
    names = routes.next_hops if routes.clients is None else routes.clients
    of_clients = (routes.next_hops[name] for name in names if name in routes.next_hops)
    return [*of_clients, *routes.by_sender.values(), routes.by_recipient.get("*")]


def said(choice: RouteChoice) -> str:
    """Where the rule stands in the configuration."""
    match choice.rule:
        case RouteRule.RECIPIENT | RouteRule.ALL:
            return f'routes: "{choice.pattern}"'
        case RouteRule.CLIENT:
            return "next_hop of the user or the listener"
        case RouteRule.SENDER:
            return f'routes_by_sender: "{choice.pattern}"'
        case RouteRule.MX:
            return "no route applies"
        case _:
            assert_never(choice.rule)


def _first(by_pattern: Mapping[str, T], patterns: Iterable[str]) -> tuple[str, T] | None:
    if not by_pattern:
        return None
    return next(((p, by_pattern[p]) for p in patterns if p in by_pattern), None)


def _domain_patterns(domain: str) -> Iterator[str]:
    """The patterns that cover a domain, the most exact first; of an address literal only itself."""
    yield domain
    _, _, above = domain.partition(".")
    while above and not domain.startswith("["):
        yield f"*.{above}"
        _, _, above = above.partition(".")


def _sender_patterns(reverse_path: str) -> Iterator[str]:
    """The patterns that cover a sender. The case of its local part does not count: people do not
    write an address in the same case each time.
    """
    local_part, _, after = reverse_path.rpartition("@")
    if not local_part:
        return
    try:
        domain = normalise_domain(after)
    except AddressError:
        return
    yield f"{local_part.lower()}@{domain}"
    yield from _domain_patterns(domain)
