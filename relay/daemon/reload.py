"""What a new configuration changes in a running relay. Pure.

Policy, routes, access, certificates, DKIM keys, the keys of the HTTP interface and the log's
level are taken over as one; every other key is read at the start only, and the administrator
is told which of them wait for a restart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from relay.config import Config, as_document

__all__ = ["Changes", "changes", "taken_over"]

_TAKEN_OVER = re.compile(
    r"(policy|routes|access|dkim)(\..+)?|log\.level|admin\.(api_keys|domains|webhook_signing_key)"
)


@dataclass(frozen=True, slots=True)
class Changes:
    """The keys that differ: those in force now, and those that wait for a restart."""

    applied: tuple[str, ...]
    waiting: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"changed: {', '.join(self.applied)}" if self.applied else "no key changed"]
        if self.waiting:
            parts.append(f"only after a restart: {', '.join(self.waiting)}")
        return "; ".join(parts)


def changes(old: Config, new: Config) -> Changes:
    """What is different between two configurations, by key; values are not told, some are secrets."""
    before, after = as_document(old, with_secrets=True), as_document(new, with_secrets=True)
    keys = list(_differing(before, after, ""))
    applied = tuple(key for key in keys if _TAKEN_OVER.fullmatch(key))
    return Changes(applied, tuple(key for key in keys if key not in applied))


def _differing(before: Any, after: Any, key: str) -> list[str]:
    if before == after:
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [key]
    names = [*before, *(name for name in after if name not in before)]
    below = (
        _differing(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
        for name in names
    )
    return [found for found_below in below for found in found_below]


def taken_over(old: Config, new: Config) -> Config:
    """The configuration in force after a reload.

    What waits for a restart keeps its old value here, too, or the next comparison would miss it.
    """
    return replace(
        old,
        policy=new.policy,
        routes=new.routes,
        access=new.access,
        dkim=new.dkim,
        log=replace(old.log, level=new.log.level),
        admin=replace(
            old.admin,
            api_keys=new.admin.api_keys,
            domains=new.admin.domains,
            webhook_signing_key=new.admin.webhook_signing_key,
        ),
    )
