"""The configuration of the page (`admin.web`). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from relay.mail.option import SECRET, TextForm


class Role(StrEnum):
    """What a user may do."""

    VIEWER = "viewer"
    """May look."""
    OPERATOR = "operator"
    """May look, and change the queue."""


@dataclass(frozen=True, slots=True)
class WebUser:
    """Who may look. `password`: an argon2 hash; None: the user comes only through a proxy."""

    name: str
    password: Annotated[str, TextForm.ARGON2, SECRET] | None = field(default=None, repr=False)
    role: Role = Role.VIEWER


@dataclass(frozen=True, slots=True)
class WebOptions:
    """`users` by name; without any there is no page. `hosts`: names of the page beside localhost,
    loopback addresses and `hostname`. `insecure`: plain HTTP also for clients on other machines.
    `note`: a sentence on every page.

    `proxy_header`: the field with the name of the user, from a proxy in `proxy_networks`.
    """

    users: Mapping[str, WebUser] = field(default_factory=dict)
    hosts: tuple[Annotated[str, TextForm.MAIL_HOST], ...] = ()
    insecure: bool = False
    show_content: bool = False
    proxy_header: Annotated[str, TextForm.HEADER_NAME] | None = None
    proxy_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    note: str = ""
