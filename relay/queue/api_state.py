"""What the HTTP interface keeps beside the queue, in the same store and as durable.

    domain settings   what was set over HTTP for mail from a domain; above the file's own rule
    webhooks          who wants to be told what, by sender domain
    calls             what a webhook is still to be told, until it has answered

A call is pending from the moment `add_calls` returned until `settle_call` says that it is over. It
carries its event with it, since the event itself may be forgotten before the last try.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from relay.queue.rows import moment

if TYPE_CHECKING:
    from relay.queue.store import StoredEvent


@dataclass(frozen=True, slots=True)
class DomainSettings:
    """What was set for a sender domain. None: nothing was said about that setting."""

    require_tls: bool | None = None
    skip_verification: bool | None = None


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to report a kind of event. `since`: not the events up to this sequence number."""

    domain: str
    name: str
    urls: tuple[str, ...]
    since: int = 0


@dataclass(frozen=True, slots=True)
class PendingCall:
    """One event to be told to one URL. `number` is the store's own, 0 before it has one."""

    url: str
    line: str
    due: datetime
    attempts: int = 0
    number: int = 0


CallsAbout = Callable[["Sequence[Webhook]", "Sequence[StoredEvent]"], "Sequence[PendingCall]"]
"""The calls that webhooks are to get about events."""


class ApiState(Protocol):
    """All methods may raise `SpoolError`; what one that changes returned from is committed and
    synced.
    """

    def when_changed_elsewhere(self, call: Callable[[], Awaitable[None]]) -> None:
        """Have this called when another node has changed settings or webhooks."""

    @property
    def is_shared(self) -> bool:
        """Whether several nodes share it: then calls may come that this one did not add."""

    async def add_lost_calls(self, about: CallsAbout) -> bool:
        """Keep the calls about the next events that a lost node has not looked at. Whether there
        were such events; False at all live nodes but one.
        """

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """All of them, by domain."""

    async def set_domain_settings(self, domain: str, settings: DomainSettings) -> DomainSettings:
        """Set what is not None, keep the rest; what is set now."""

    async def webhooks(self) -> list[Webhook]:
        """All of them."""

    async def set_webhook(self, domain: str, name: str, urls: Sequence[str]) -> None:
        """Put these URLs in the place of those it has; none removes it."""

    async def add_calls(self, calls: Sequence[PendingCall], *, seen: int) -> None:
        """Keep these calls, and remember that all events up to `seen` were looked at."""

    async def calls_seen(self) -> int:
        """The last `seen`, 0 at first."""

    async def calls_due(
        self, *, now: datetime, limit: int, besides: Collection[str] = ()
    ) -> list[PendingCall]:
        """The calls that are due, those due longest first; not to the URLs of `besides`."""

    async def next_call_due(self) -> datetime | None:
        """When the next call is due (maybe long since)."""

    async def settle_call(self, call: PendingCall, *, due: datetime | None) -> None:
        """The call was tried: once more at `due`, or never again."""


def webhooks_of_rows(rows: Iterable[Sequence[Any]]) -> list[Webhook]:
    """What an engine found. `rows`: domain, name, URLs as JSON, since."""
    return [
        Webhook(domain, name, tuple(json.loads(urls)), since) for domain, name, urls, since in rows
    ]


def calls_of_rows(rows: Iterable[Sequence[Any]]) -> list[PendingCall]:
    """What an engine found. `rows`: URL, line, due, attempts, number."""
    return [
        PendingCall(url, line, moment(due), attempts, number)
        for url, line, due, attempts, number in rows
    ]
