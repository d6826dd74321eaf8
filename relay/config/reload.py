"""What a new configuration changes in a running relay. Pure.

Policy, routes, access, certificates, DKIM keys, the keys of the HTTP interface and the log's
level are taken over as one; every other key is read at the start only, and the administrator
is told which of them wait for a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from relay.config import Config, as_document
from relay.config.shape import Section, Shape, section_of
from relay.config.tree import dotted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


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
    """The keys that differ between two configurations, without values: some are secrets."""
    before, after = as_document(old, with_secrets=True), as_document(new, with_secrets=True)
    found = list(_differing(before, after, section_of(Config)))
    return Changes(
        tuple(key for key, is_reloaded in found if is_reloaded),
        tuple(key for key, is_reloaded in found if not is_reloaded),
    )


def _differing(
    before: object, after: object, shape: Shape | None, key: str = "", is_reloaded: bool = False
) -> Iterator[tuple[str, bool]]:
    """Each key that differs, and whether it is taken over."""
    if before == after:
        return
    if not (isinstance(before, dict) and isinstance(after, dict)):
        yield key, is_reloaded
        return
    for name in [*before, *(name for name in after if name not in before)]:
        below = shape.keys.get(name) if isinstance(shape, Section) else None
        yield from _differing(
            before.get(name),
            after.get(name),
            below.shape if below else None,
            dotted(key, name),
            is_reloaded or (below is not None and below.is_reloaded),
        )


def taken_over(old: Config, new: Config) -> Config:
    """The configuration in force after a reload.

    What waits for a restart keeps its old value here, too, or the next comparison would miss it.
    """
    return _taken_over(old, new, section_of(Config))


def _taken_over(old: T, new: T, section: Section) -> T:
    values = {
        key.field: _taken_over(getattr(old, key.field), getattr(new, key.field), key.shape)
        if isinstance(key.shape, Section) and not key.is_reloaded
        else getattr(new if key.is_reloaded else old, key.field)
        for key in section.keys.values()
    }
    return replace(old, **values)
