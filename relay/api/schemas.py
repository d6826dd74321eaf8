"""The types of the answers, from which the OpenAPI document is made. Pure."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from relay.mail.jsontext import JsonDocument


class Message(TypedDict):
    """A sentence. Every refusal has this form."""

    message: str


class Sent(TypedDict):
    """The message is accepted, and on disk, as after a 250 of SMTP."""

    id: str
    message: str


class Connection(TypedDict):
    """The settings in effect for mail from a domain."""

    connection: Pair
    require_tls: bool
    skip_verification: bool


class Pair(TypedDict):
    """The two settings."""

    require_tls: bool
    skip_verification: bool


ConnectionUpdated = TypedDict(
    "ConnectionUpdated",
    {
        "message": str,
        "require-tls": bool,
        "skip-verification": bool,
        "require_tls": bool,
        "skip_verification": bool,
    },
)


class Domain(TypedDict):
    """A sender domain."""

    id: str
    name: str
    require_tls: bool
    skip_verification: bool
    state: str
    type: str
    wildcard: bool
    spam_action: str
    is_disabled: bool
    smtp_login: str
    web_prefix: str
    web_scheme: str
    created_at: str


class DomainAnswer(TypedDict):
    """One domain. The lists of DNS records are empty: the relay does not know them."""

    domain: Domain
    message: NotRequired[str]
    receiving_dns_records: list[JsonDocument]
    sending_dns_records: list[JsonDocument]


class DomainList(TypedDict):
    """The domains that the relay knows."""

    total_count: int
    items: list[Domain]


class Paging(TypedDict):
    """URLs of the pages before and after this one. A page behind an end is empty."""

    next: str
    previous: str
    first: str
    last: str


class EventPage(TypedDict):
    """Events: the objects of the delivery log."""

    items: list[JsonDocument]
    paging: Paging


class Urls(TypedDict):
    """The URLs of a webhook."""

    urls: list[str]


class WebhookAnswer(TypedDict):
    """One webhook."""

    message: NotRequired[str]
    webhook: Urls


class WebhookList(TypedDict):
    """The webhooks of a domain, by name."""

    webhooks: dict[str, Urls]


QueueItem = TypedDict(
    "QueueItem",
    {
        "queue-id": str,
        "state": str,
        "sender": str,
        "size": int,
        "arrived": str,
        "recipients": list[JsonDocument],
    },
)


class QueuePage(TypedDict):
    """A page of the queue. `next`: the parameter `after` of the next page; null at the end."""

    items: list[QueueItem]
    next: str | None


class Changed(TypedDict):
    """The result of a verb: how many recipients changed, and which queue ids are unknown."""

    changed: int
    unknown: list[str]


Explained = TypedDict(
    "Explained",
    {
        "sender": str,
        "recipient": str,
        "recipient-domain": str,
        "policy": JsonDocument,
        "hosts": list[JsonDocument],
        "rejected": list[str],
        "trouble": list[str],
        "no-route": JsonDocument | None,
    },
)


class Probed(TypedDict):
    domain: str
    hosts: list[JsonDocument]


Status = TypedDict(
    "Status",
    {
        "version": str,
        "hostname": str,
        "queue": dict[str, int],
        "in-flight": int,
        "silent-destinations": dict[str, str],
    },
)
