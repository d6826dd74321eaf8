"""Lets aiohttp connect only to addresses that were judged. †

The relay's own resolver looks names up, and `relay.route.addresses` judges the addresses. aiohttp
asks this resolver just before it connects, so it uses no other answer of the DNS.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult


class JudgedResolver(AbstractResolver):
    """`addresses`: a function of host and port; OSError where no address is allowed."""

    def __init__(self, addresses: Callable[[str, int], Awaitable[Sequence[str]]]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The allowed addresses, in aiohttp's form."""
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._addresses(host, port)
        ]

    async def close(self) -> None:
        """There is nothing to close."""
