"""What is wrong together in `routes`, `routes_by_sender`, `next_hops` and `oauth2`.

Looks into the files that these keys name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from relay.config.remark import Remark, unreadable
from relay.config.sections import Config
from relay.route.next_hop import Auth, NextHop

__all__ = ["consider_routes"]


def consider_routes(config: Config) -> Iterator[Remark]:
    yield from _consider_names(config)
    for key, hop in _next_hops(config):
        if hop.auth is not None:
            yield from _consider_login(f"{key}.auth", key, hop.auth)


def _next_hops(config: Config) -> Iterator[tuple[str, NextHop]]:
    """Each next hop, with the key that it stands under."""
    for name, hop in config.next_hops.items():
        yield f"next_hops.{name}", hop
    for pattern, route in config.routes.items():
        if isinstance(route, NextHop):
            yield f"routes.{pattern}", route


def _consider_names(config: Config) -> Iterator[Remark]:
    """A name leads to what it names."""
    for pattern, route in config.routes.items():
        if isinstance(route, str):
            yield from _unknown(f"routes.{pattern}", route, config.next_hops, "next_hops")
        elif pattern in config.next_hops:
            problem = f"next_hops has a next hop of this name, too: {pattern}"
            yield Remark(f"routes.{pattern}", problem, f"rename next_hops.{pattern}")
    for pattern, by in config.routes_by_sender.items():
        name = by if isinstance(by, str) else by.next_hop
        yield from _unknown(f"routes_by_sender.{pattern}", name, config.next_hops, "next_hops")
    for name, user in config.access.users.items():
        if user.next_hop is not None:
            key = f"access.users.{name}.next_hop"
            yield from _unknown(key, user.next_hop, config.next_hops, "next_hops")
    for i, listener in enumerate(config.listeners):
        if listener.next_hop is not None:
            key = f"listeners.{i}.next_hop"
            yield from _unknown(key, listener.next_hop, config.next_hops, "next_hops")
    for key, hop in _next_hops(config):
        if hop.auth is not None and hop.auth.oauth2 is not None:
            yield from _unknown(f"{key}.auth.oauth2", hop.auth.oauth2, config.oauth2, "oauth2")


def _unknown(key: str, name: str, known: Collection[str], section: str) -> Iterator[Remark]:
    if name not in known:
        there = f"write one of {', '.join(known)}, or add" if known else "add"
        yield Remark(key, f"{section} has no {name}", f"{there} {section}.{name}")


def _consider_login(key: str, of: str, auth: Auth) -> Iterator[Remark]:
    if auth.oauth2 is None and (auth.username is None) != (auth.password_file is None):
        yield Remark(of, "username and password_file belong together", "give both, or neither")
    trouble = unreadable(auth.password_file) if auth.password_file is not None else None
    if trouble:
        cure = "correct the path, or let the relay's user read it"
        yield Remark(f"{key}.password_file", f"{auth.password_file}: {trouble}", cure)
