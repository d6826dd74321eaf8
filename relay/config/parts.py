"""What a part of the relay is told, where the file spreads it over more than one section.

Apart from the sections themselves, since these imports are slow and a command that only
wants the path of a socket should not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.config.sections import Config
from relay.route.dns import ResolverOptions

if TYPE_CHECKING:
    from relay.route.next_hop import NextHop
    from relay.route.router import RouteOptions

__all__ = ["logged_in_at", "next_hops_by_recipient", "resolver_options", "route_options"]


def resolver_options(config: Config) -> ResolverOptions:
    """`resolver`."""
    section = config.resolver
    return ResolverOptions(
        nameservers=section.nameservers, timeout=section.timeout, trust_ad=section.trust_ad
    )


def route_options(config: Config) -> RouteOptions:
    """The next hops of the file, and what `delivery` says about where a connection may go."""
    from relay.route.choice import Routes
    from relay.route.router import RouteOptions  # and with it cryptography: 30 ms for `relay check`

    return RouteOptions(
        port=config.delivery.port,
        allow_networks=config.delivery.allow_networks,
        routes=Routes(
            next_hops_by_recipient(config),
            {
                pattern: config.next_hops[by if isinstance(by, str) else by.next_hop]
                for pattern, by in config.routes_by_sender.items()
            },
            config.next_hops,
        ),
    )


def next_hops_by_recipient(config: Config) -> dict[str, NextHop]:
    """`routes`, with the next hop that each leads to; `consider` has found unknown names."""
    return {
        pattern: config.next_hops[route] if isinstance(route, str) else route
        for pattern, route in config.routes.items()
    }


def logged_in_at(config: Config) -> list[str]:
    """The names of the next hops that the relay logs in at."""
    every = {hop.name: hop for hop in next_hops_by_recipient(config).values()}
    every |= {hop.name: hop for hop in config.next_hops.values()}
    return [name for name, hop in every.items() if hop.auth is not None]
