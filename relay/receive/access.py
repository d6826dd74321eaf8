"""Who may relay, and in whose name.

A client may relay when its address is in one of `networks`, when it came through a UNIX
socket (the file's mode decides who may), or after it has authenticated. No other client may
relay, for any domain: this host has no mailboxes, so a stranger has nothing to send here.

A user with `sender_domains` may use reverse-paths in those domains only. The null reverse-path
is not among them: the default rules would judge it instead of the rules of the user's domain.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

from relay.mail.option import SECRET, NotEmpty, TextForm

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LOOPBACK: tuple[Network, ...] = (
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv6Network("::1/128"),
)


@dataclass(frozen=True, slots=True)
class User:
    """A user who may log in. `password`: an argon2 hash.

    `sender_domains` None: any. "*.example.com" covers sub-domains. `next_hop`: where this user's
    mail goes, by name; see `relay.route.choice`.
    """

    name: str
    password: Annotated[str, TextForm.ARGON2, SECRET] = field(repr=False)
    sender_domains: (
        Annotated[
            tuple[Annotated[str, TextForm.DOMAIN_PATTERN], ...],
            NotEmpty(
                "an empty list: this user could send nothing",
                "name at least one domain, or remove the key for any",
            ),
        ]
        | None
    ) = None
    next_hop: Annotated[str, TextForm.NAME] | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may relay: these networks without AUTH, these users (by name) with it."""

    networks: tuple[Network, ...] = LOOPBACK
    users: Mapping[str, User] = field(default_factory=dict)


def may_relay(access: Access, client: str | None) -> bool:
    """Whether a client may relay by its address. None: unknown; "": a UNIX socket."""
    if not client:
        return client is not None
    address = _parsed(client)
    return any(address in network for network in access.networks)


@lru_cache(maxsize=1024)
def _parsed(client: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of a client; cached, because parsing takes longer than comparing."""
    return ipaddress.ip_address(client)


def may_send_as(user: User, sender_domain: str) -> bool:
    """Whether a user may use a reverse-path in this domain (normalised; "" for the null
    reverse-path).
    """
    if user.sender_domains is None:
        return True
    return any(_covers(pattern, sender_domain) for pattern in user.sender_domains)


def _covers(pattern: str, domain: str) -> bool:
    if pattern.startswith("*."):
        return domain.endswith(pattern[1:])
    return domain == pattern
