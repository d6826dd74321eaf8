"""Asking the router from the command line, as the running relay would ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.config import Config
    from relay.route.next_hop import Route

__all__ = ["host_text", "no_route_text", "route_of"]


async def route_of(config: Config, domain: str) -> Route:
    """The hosts for a domain, or why there is none."""
    from relay.config.parts import resolver_options, route_options
    from relay.receive.spec import TcpAddress, parse_address
    from relay.route.dns import DnsResolver
    from relay.route.router import Router

    addresses = (parse_address(listener.address) for listener in config.listeners)
    listening = [(a.host, a.port) for a in addresses if isinstance(a, TcpAddress)]
    router = Router(
        DnsResolver(resolver_options(config)),
        route_options(config),
        hostname=config.hostname,
        listening=lambda: listening,
    )
    return await router.route(domain)


def host_text(host: dict[str, Any]) -> str:
    """`mx1.example.net [192.0.2.7]:25  preference 10`; of a route's host, how it is different."""
    from relay.cli.common import printable

    words = [
        f"{printable(host['host'])} [{host['address']}]:{host['port']}",
        f"preference {host['preference']}",
    ]
    words += ["TLS from the first byte"] if host["tls"] == "implicit" else []
    words += ["with login"] if host["login"] else []
    return "  ".join(words)


def no_route_text(verdict: dict[str, Any]) -> str:
    from relay.cli.common import printable

    return f"no host to try: {verdict['outcome']}, {verdict['status']} {printable(verdict['description'])}"
