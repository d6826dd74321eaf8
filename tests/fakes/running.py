"""A relay that runs and has nothing to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["QuietRelay"]


class QuietRelay:
    """A `relay.admin.operator.RunningRelay`; `retried` counts what silent destinations were told."""

    def __init__(self) -> None:
        self.retried = 0

    def retry_silent(self) -> None:
        self.retried += 1

    async def health(self) -> Mapping[str, Sequence[str]]:
        return {"liveness": [], "readiness": []}

    async def status(self) -> Mapping[str, Any]:
        return {"in-flight": 0, "silent-destinations": {}}

    async def metrics(self) -> bytes:
        return b""
