"""The operator's verbs for MTA-STS policies, in the values of the interface's JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from relay.mail.jsontext import JsonObject
from relay.route.mta_sts import KeptPolicy, Refreshed

__all__ = ["Policies", "list_policies", "policy_as_json"]


class Policies(Protocol):
    """The policies of a running relay: `relay.deliver.sts_policies.StsPolicies`."""

    async def kept(self, domain: str) -> KeptPolicy | None: ...

    def last_failure(self, domain: str) -> str: ...

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[KeptPolicy], str | None]: ...

    async def refresh(self, domain: str) -> Refreshed: ...

    async def forget(self, domain: str) -> bool: ...


async def list_policies(policies: Policies) -> AsyncIterator[list[KeptPolicy]]:
    """All policies that are kept, by domain, in pages."""
    after: str | None = ""
    while after is not None:
        page, after = await policies.page(after=after)
        yield page


def policy_as_json(kept: KeptPolicy) -> JsonObject:
    """A policy as `relay mta-sts show --json` has it."""
    return {
        "domain": kept.domain,
        "mode": kept.policy.mode.value,
        "id": kept.id,
        "mx": list(kept.policy.mx),
        "max-age": int(kept.policy.max_age.total_seconds()),
        "fetched": kept.fetched.isoformat(timespec="seconds"),
        "expires": kept.expires.isoformat(timespec="seconds"),
        "refresh-at": kept.refresh_at.isoformat(timespec="seconds"),
        "policy": list(kept.policy.lines),
    }
