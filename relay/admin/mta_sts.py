"""The MTA-STS policies of a running relay, and their form in JSON."""

from __future__ import annotations

from typing import Protocol

from relay.mail.jsontext import JsonObject
from relay.route.mta_sts import KeptPolicy, Refreshed


class Policies(Protocol):
    """The policies of a running relay: `relay.deliver.sts_policies.StsPolicies`."""

    async def kept(self, domain: str) -> KeptPolicy | None: ...

    def last_failure(self, domain: str) -> str: ...

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[KeptPolicy], str | None]: ...

    async def refresh(self, domain: str) -> Refreshed: ...

    async def forget(self, domain: str) -> bool: ...


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
