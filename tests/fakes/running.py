"""A relay that runs and has nothing to tell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from relay.admin.operator import Deliveries
from relay.policy.fields import Wishes

Explain = Callable[..., Awaitable[dict[str, Any]]]


class QuietRelay:
    """A `relay.admin.operator.RunningRelay`; `retried` counts calls of `retry_silent`."""

    def __init__(self) -> None:
        self.retried = 0
        self.trouble: list[str] = []
        self.explained: Explain | None = None

    def retry_silent(self) -> None:
        self.retried += 1

    async def health(self) -> Mapping[str, Sequence[str]]:
        return {"liveness": [], "readiness": self.trouble}

    async def status(self) -> Deliveries:
        return Deliveries(0, {})

    async def metrics(self) -> bytes:
        return b""

    async def explain(
        self, reverse_path: str, recipient: str, wishes: Wishes, **speaks: bool
    ) -> dict[str, Any]:
        assert self.explained is not None
        return await self.explained(reverse_path, recipient, wishes, **speaks)

    async def probe(self, domain: str) -> dict[str, Any]:
        return {"domain": domain, "hosts": [], "rejected": [], "no-route": None}
