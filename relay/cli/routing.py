"""Routes for the commands: looked up with the configuration, as the running relay does it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.floors import Floors
    from relay.mail.jsontext import JsonDocument
    from relay.route.answers import Resolver
    from relay.route.credentials import RouteCredentials
    from relay.route.next_hop import RouteFinder
    from relay.route.router import Router


@dataclass(frozen=True, slots=True)
class Lookups:
    """The objects with which the running relay would look up a route."""

    route: RouteFinder
    floors: Floors


@asynccontextmanager
async def lookups(config: Config) -> AsyncIterator[Lookups]:
    """Look up routes as the running relay would.

    MTA-STS policies come from the relay's store, if it has one; a fetched policy is not stored.
    """
    from relay.config.parts import resolver_options
    from relay.daemon.policies import make_policies
    from relay.deliver.floors import Floors
    from relay.deliver.memory import DowngradeMemory
    from relay.deliver.tls import TlsContexts
    from relay.queue.engine import open_memory_beside, open_policies_beside
    from relay.route.dns import DnsResolver

    logging.getLogger("relay").addHandler(logging.NullHandler())  # the answer has the same facts
    resolver = DnsResolver(resolver_options(config))
    router = make_router(config, resolver)
    cache = open_policies_beside(config.queue.location)
    store = open_memory_beside(config.queue.location)
    memory = DowngradeMemory(
        store, lambda: config.downgrade_memory, clock=lambda: datetime.now(UTC)
    )
    policies = make_policies(
        config,
        cache,
        resolver=resolver,
        router=router,
        contexts=TlsContexts(config.tls.ca_file),
        clock=lambda: datetime.now(UTC),
    )
    try:
        floors = Floors(resolver, policies, lambda: config.policy, memory=memory)
        yield Lookups(router.route, floors)
    finally:
        await policies.close()
        await cache.close()
        await store.close()
        await resolver.close()


def make_router(
    config: Config, resolver: Resolver, logins: RouteCredentials | None = None
) -> Router:
    """A router that knows, as the one of the running relay does, at which addresses it listens."""
    from relay.config.parts import route_options
    from relay.receive.spec import TcpAddress, parse_address
    from relay.route.router import Router

    addresses = (parse_address(listener.address) for listener in config.listeners)
    listening = [(a.host, a.port) for a in addresses if isinstance(a, TcpAddress)]
    return Router(
        resolver,
        route_options(config),
        hostname=config.hostname,
        listening=lambda: listening,
        credentials=logins,
    )


def host_text(host: JsonDocument) -> str:
    """`mx1.example.net [192.0.2.7]:25  preference 10`; for a route's host, its own options."""
    words = [
        f"{printable(host['host'])} [{host['address']}]:{host['port']}",
        f"preference {host['preference']}",
    ]
    words += ["TLS from the first byte"] if host["tls"] == "implicit" else []
    if login := host.get("login-text"):
        words.append(f"with login {printable(login)}")
    elif host["login"]:
        words.append("with login")
    return "  ".join(words)


def no_route_text(verdict: JsonDocument) -> str:
    description = printable(verdict["description"])
    return f"no host to try: {verdict['outcome']}, {verdict['status']} {description}"


def policy_line(answer: JsonDocument) -> str:
    """The MTA-STS policy of the recipient's domain in one line."""
    sts = answer["mta-sts"]
    if sts is None:
        if answer["mta-sts-use"] == "ignore":
            return f"MTA-STS: not looked up{_by(answer)}"
        return "MTA-STS: no policy"
    if sts["error"] is not None:
        return f"MTA-STS: a policy is announced and cannot be had ({sts['error']}): none holds"
    names = ", ".join(map(printable, sts["mx"])) or "no host"
    published = sts["published-mode"]
    mode = (
        sts["mode"] if published == sts["mode"] else f"{sts['mode']} (the domain says {published})"
    )
    return (
        f"MTA-STS: {mode}, {names} (id {printable(sts['id'])}, {sts['source']},"
        f" until {sts['expires']})"
    )


def _by(answer: JsonDocument) -> str:
    """Who turned a look-up off."""
    waived = answer["waived"] == "tls-required-no"
    return ": the message says TLS-Required: No" if waived else ", by the configuration"


def floor_lines(host: JsonDocument, answer: JsonDocument) -> list[str]:
    """The lines about one host's DNS records and configuration. `answer`: the whole of it."""
    from relay.admin.operations import tlsa_text

    dane = host["dane"]
    if dane["records"]:
        lines = [f"TLSA records, {dane['state']}: {record}" for record in dane["records"]]
    elif dane["state"] == "ignored":
        lines = [f"TLSA records: not looked up{_by(answer)}"]
    else:
        lines = [f"TLSA records: {tlsa_text(dane['state'])}"]
    if host["pinned"] is not None:
        pins = ", ".join(map(printable, answer["pins"]))
        allowed = "yes" if host["pinned"] else "no"
        lines.append(f"allowed by the configuration: {allowed} (mx: {pins})")
    if host["memory"] is not None:
        lines.append(_memory_line(host["memory"], host["host"]))
    return lines


def _memory_line(memory: JsonDocument, host: str) -> str:
    """What the host, or every known host of the domain, has shown before."""
    who = "it has" if memory["host"] == host else f"every known host ({memory['host']}) has"
    until = memory["held-until"]
    held = f"mail is held to that until {until}" if until else "less is an alarm, and mail goes"
    return f"shown before: {who} shown {memory['before']}, last at {memory['since']}; {held}"
