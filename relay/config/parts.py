"""What a part of the relay is told, where the file spreads it over more than one section.

Apart from the sections themselves, since these imports are slow and a command that only
wants the path of a socket should not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from relay.config.sections import Config
from relay.route.choice import Routes
from relay.route.name_servers import ResolverOptions

if TYPE_CHECKING:
    from relay.route.router import RouteOptions


def resolver_options(config: Config) -> ResolverOptions:
    """`resolver`."""
    section = config.resolver
    return ResolverOptions(
        nameservers=section.nameservers, timeout=section.timeout, trust_ad=section.trust_ad
    )


def route_options(config: Config) -> RouteOptions:
    """The next hops of the file, and what `delivery` says about where a connection may go."""
    from relay.route.router import RouteOptions  # and with it cryptography: 30 ms for `relay check`

    return RouteOptions(
        port=config.delivery.port,
        allow_networks=config.delivery.allow_networks,
        routes=routes_of(config),
    )


def routes_of(config: Config) -> Routes:
    """`routes` and `routes_by_sender`, with the next hops that they lead to; `consider` has found
    unknown names.
    """
    hops = config.next_hops
    by_recipient, by_sender = (
        {pattern: hops[to] if isinstance(to, str) else to for pattern, to in routes.items()}
        for routes in (config.routes, config.routes_by_sender)
    )
    of_listeners = [listener.next_hop for listener in config.listeners]
    of_users = [user.next_hop for user in config.access.users.values()]
    clients = {name for name in (*of_listeners, *of_users) if name is not None}
    return Routes(by_recipient, by_sender, hops, clients)


def logged_in_at(config: Config) -> list[str]:
    """The names of the next hops that the relay logs in at."""
    hops = routes_of(config).every_next_hop()
    return [name for name, hop in hops.items() if hop.auth is not None]
