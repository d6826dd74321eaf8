"""MTA-STS policies as the store keeps them: what was fetched, for all workers, as durable as mail.

A policy has to outlive us: until its `max_age` is over it holds whatever fails (RFC 8461 §3.3), and
who forgets it can be made to deliver to anybody. Here it is text; `relay.route.mta_sts` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from relay.queue.rows import moment


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy of one domain. `id`: of the record that told of it. `body`: the text as it was
    fetched.

    `refresh_at`: when it is to be fetched again in the background.
    """

    domain: str
    id: str
    body: bytes
    fetched: datetime
    refresh_at: datetime


class PolicyCache(Protocol):
    """All methods may raise `SpoolError`; what one that changes returned from is committed and
    synced.
    """

    async def policy(self, domain: str) -> StoredPolicy | None:
        """The policy of a domain, whatever its age."""

    async def keep(self, policy: StoredPolicy) -> None:
        """Keep a policy in the place of the one its domain has."""

    async def refresh_later(self, policy: StoredPolicy, refresh_at: datetime) -> None:
        """Have a policy fetched again at another time, if it is still the one that is kept."""

    async def forget(self, domain: str, *, fetched: datetime | None = None) -> bool:
        """Forget the policy of a domain, or only the one that was fetched then; whether it was
        there.
        """

    async def policies(self, *, after: str = "", limit: int = 500) -> list[StoredPolicy]:
        """A page of all policies, by domain."""

    async def refresh_due(self, *, now: datetime, limit: int) -> list[StoredPolicy]:
        """Policies that are to be fetched again by now, those due longest first."""

    async def close(self) -> None:
        """Let the file go."""


def policies_of_rows(rows: Iterable[Sequence[Any]]) -> list[StoredPolicy]:
    """What an engine found. `rows`: the columns of `StoredPolicy`, its times in microseconds."""
    return [
        StoredPolicy(domain, id, body, moment(fetched), moment(refresh_at))
        for domain, id, body, fetched, refresh_at in rows
    ]
