"""aiohttp connects to addresses that were judged, and to no others. †

Names are looked up by our own resolver and their addresses judged (`relay.route.addresses`).
aiohttp asks here as it is about to connect, so there is no second, unjudged answer of the DNS.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence

from aiohttp.abc import AbstractResolver, ResolveResult

__all__ = ["JudgedResolver"]


class JudgedResolver(AbstractResolver):
    """`addresses`: of a host, for a port, those that may be connected to; OSError where there is
    none.
    """

    def __init__(self, addresses: Callable[[str, int], Awaitable[Sequence[str]]]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses, as aiohttp wants them."""
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
