"""Decides which addresses a webhook may have.

A client with a key chooses the URL, so it could reach addresses that only this machine can reach:
other machines of the network, a cloud's metadata at 169.254.169.254, the relay itself. So an
address is judged like that of a mail host (`relay.route.addresses`): allowed is the public
internet, and what `admin.webhook_networks` lists. It is judged when the webhook is made and at each
call. The relay's resolver looks the name up, and aiohttp connects only to addresses that passed.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from relay.api.mailgun_form import shown
from relay.route.addresses import Network, Own, judge, parse_address
from relay.route.answers import AddressAnswer, AddressLookup

_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?", re.IGNORECASE)
"""A host that some programs take for an IPv4 address (WHATWG URL §3.5): 2130706433, 0x7f.1."""


class NoTarget(OSError):
    """There is no address that may be called. The text says why."""


class Targets:
    """`lookup`: finds the addresses of a name. `networks`: allowed beside the public internet."""

    def __init__(
        self,
        lookup: Callable[[str], Awaitable[AddressLookup]],
        networks: Callable[[], Sequence[Network]],
    ) -> None:
        self._lookup = lookup
        self._networks = networks

    async def objection(self, url: str) -> str:
        """Why no webhook with this URL is made; "" if it may be made."""
        try:
            found, refused = await self._judged(urlsplit(url).hostname or "", urlsplit(url).port)
        except NoTarget as error:
            return str(error)
        return "" if found else refused

    async def addresses(self, host: str, port: int | None = None) -> list[str]:
        """The addresses that may be called. `NoTarget` if there is none."""
        found, refused = await self._judged(host, port)
        if not found:
            raise NoTarget(refused or f"{shown(host)} has no address")
        return found

    async def _judged(self, host: str, port: int | None) -> tuple[list[str], str]:
        """The addresses that passed, and the reason against one that did not."""
        passed, refused = [], ""
        for text in await self._addresses(host):
            address = parse_address(text)
            if address is None:
                continue
            rejection = judge(address, port or 0, own=Own(), allow_networks=self._networks())
            if rejection is None:
                passed.append(text)
            else:
                refused = f"{shown(host)} is {shown(text)}, which {rejection.reason}"
        return passed, refused and f"{refused}; admin.webhook_networks may list it"

    async def _addresses(self, host: str) -> Sequence[str]:
        if parse_address(host) is not None:
            return [host]
        name = host.lower().removesuffix(".")
        if name == "localhost" or name.endswith(".localhost"):  # RFC 6761 §6.3
            return ["127.0.0.1", "::1"]
        if not name or _NUMERIC.fullmatch(name):
            raise NoTarget(f"{shown(host)} is neither a name nor an address")
        answer = await self._lookup(name)
        return answer.addresses if isinstance(answer, AddressAnswer) else []
