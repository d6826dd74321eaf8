"""Mail for a test: an entry of the queue and a route, in few words."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from relay.mail.address import domain_of
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient
from relay.route.next_hop import Host, Hosts, Route

ARRIVED = datetime(2026, 1, 1, tzinfo=UTC)
CONTENT = b"From: a@sender.example\r\nSubject: hello\r\n\r\n.a line with a dot\r\nthe end\r\n"


def settings(require: bool = False, skip: bool = False) -> TlsSettings:
    return TlsSettings(Setting(require, Source.DEFAULT), Setting(skip, Source.DEFAULT))


def entry(
    *addresses: str,
    require: bool = False,
    skip: bool = False,
    content: bytes | None = CONTENT,
    reverse_path: str = "a@sender.example",
    notify: Sequence[Any] = (),
    orcpt: str = "",
    **fields: Any,
) -> Entry:
    """An entry for these addresses, all of one domain; more fields are the message's."""
    addresses = addresses or ("bob@dest.example",)
    recipients = tuple(
        QueuedRecipient(
            n,
            address,
            domain_of(address),
            settings(require, skip),
            notify=frozenset(notify),
            orcpt=orcpt,
        )
        for n, address in enumerate(addresses)
    )
    fields = {"size_bytes": len(content or b"")} | fields
    message = QueuedMessage(
        "Q1",
        reverse_path,
        arrived=ARRIVED,
        summary=fields.pop("summary", MessageSummary()),
        **fields,
    )
    return Entry(message, recipients, content, total=len(recipients))


def to(*hosts: Host, trouble: tuple[str, ...] = ()) -> Callable[[str], Awaitable[Route]]:
    """A router that knows one answer."""

    async def route(_: str) -> Route:
        return Hosts(hosts, trouble)

    return route
