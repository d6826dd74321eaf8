"""Every path of the HTTP interface: what it takes, what it answers, who does it.

The routes of the server and the OpenAPI document are both made from this table, so that the
document cannot promise what is not served. Parameters in a path are written `{domain}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict

from relay.api import answers, domains, events, operator, sending, webhooks
from relay.api.state import Handler

__all__ = ["ENDPOINTS", "TEXT", "Endpoint"]

TEXT = "text/plain"
"""In the place of an answer's type: a bare text."""

Truth = Literal["yes", "no", "true", "false"]


_OPTIONS: Mapping[str, object] = {
    "o:require-tls": Truth,
    "o:skip-verification": Truth,
    "o:testmode": Truth,
    "o:dkim": Truth,
    "o:deliverytime": str,
    "o:deliver-within": str,
    "o:tag": list[str],
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path. What is in `needed`, of form or query, has to be there."""

    method: str
    path: str
    handler: Handler
    summary: str
    answers: Mapping[int, object]
    query: Mapping[str, object] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    form: Mapping[str, object] = field(default_factory=dict)
    body: object = None


class QueueSelection(TypedDict, total=False):
    """Which messages are meant; every field that is there has to match."""

    ids: list[str]
    domain: str
    sender: str
    state: Literal["queued", "deferred", "held"]
    all: bool


_M = answers.Message
_REFUSALS: Mapping[int, object] = {400: _M, 401: _M, 403: _M, 404: _M, 429: _M, 503: _M}
_BODY_REFUSALS: Mapping[int, object] = {**_REFUSALS, 408: _M, 413: _M, 415: _M}
_SEND_REFUSALS: Mapping[int, object] = {**_BODY_REFUSALS, 401: TEXT}

_MESSAGE_FORM: Mapping[str, object] = {
    "from": str,
    "to": list[str],
    "cc": list[str],
    "bcc": list[str],
    "subject": str,
    "text": str,
    "html": str,
    "amp-html": str,
    "attachment": list[bytes],
    "inline": list[bytes],
    **_OPTIONS,
}
_MIME_FORM: Mapping[str, object] = {
    "to": list[str],
    "cc": list[str],
    "bcc": list[str],
    "from": str,
    "message": bytes,
    **_OPTIONS,
}
_SETTINGS_FORM: Mapping[str, object] = {"require_tls": Truth, "skip_verification": Truth}
_WEBHOOK_KIND = Literal["accepted", "delivered", "temporary_fail", "permanent_fail"]
_EVENT_QUERY: Mapping[str, object] = {
    "begin": str,
    "end": str,
    "ascending": Truth,
    "limit": int,
    "event": str,
    "recipient": str,
    "from": str,
    "to": str,
    "subject": str,
    "message-id": str,
    "severity": Literal["temporary", "permanent"],
    "tags": str,
    "page": str,
}
_QUEUE_QUERY: Mapping[str, object] = {
    "domain": str,
    "sender": str,
    "state": Literal["queued", "deferred", "held"],
    "older-than": int,
    "limit": int,
    "after": str,
}
_EXPLAIN_QUERY: Mapping[str, object] = {
    "from": str,
    "to": str,
    "require-tls": Truth,
    "skip-verification": Truth,
}

_CONNECTION = "/v3/domains/{domain}/connection"
_HOOKS = "/v3/domains/{domain}/webhooks"

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        "POST",
        "/v3/{domain}/messages",
        sending.send,
        "Send a message",
        {200: answers.Sent, **_SEND_REFUSALS},
        form=_MESSAGE_FORM,
        needed=frozenset({"from", "to"}),
    ),
    Endpoint(
        "POST",
        "/v3/{domain}/messages.mime",
        sending.send_mime,
        "Send a message that is made already",
        {200: answers.Sent, **_SEND_REFUSALS},
        form=_MIME_FORM,
        needed=frozenset({"to", "message"}),
    ),
    Endpoint(
        "GET",
        _CONNECTION,
        domains.get_connection,
        "The settings in effect for mail from a domain",
        {200: answers.Connection, **_REFUSALS},
    ),
    Endpoint(
        "PUT",
        _CONNECTION,
        domains.set_connection,
        "Set them",
        {200: answers.ConnectionUpdated, **_BODY_REFUSALS},
        form=_SETTINGS_FORM,
    ),
    *(
        endpoint
        for place in ("/v3/domains", "/v4/domains")
        for endpoint in (
            Endpoint(
                "GET",
                place,
                domains.list_domains,
                "The domains we know",
                {200: answers.DomainList, **_REFUSALS},
            ),
            Endpoint(
                "GET",
                place + "/{domain}",
                domains.get_domain,
                "A domain",
                {200: answers.DomainAnswer, **_REFUSALS},
            ),
            Endpoint(
                "PUT",
                place + "/{domain}",
                domains.set_domain,
                "Set what holds for mail from a domain",
                {200: answers.DomainAnswer, **_BODY_REFUSALS},
                form=_SETTINGS_FORM,
            ),
        )
    ),
    *(
        Endpoint(
            "GET",
            f"/v3/{{domain}}/events{path}",
            events.list_events,
            "Events of mail from a domain",
            {200: answers.EventPage, **_REFUSALS},
            query=_EVENT_QUERY if not path else {},
        )
        for path in ("", "/{page}")
    ),
    Endpoint(
        "GET",
        _HOOKS,
        webhooks.list_all,
        "All webhooks of a domain",
        {200: answers.WebhookList, **_REFUSALS},
    ),
    Endpoint(
        "POST",
        _HOOKS,
        webhooks.create,
        "Make a webhook",
        {200: answers.WebhookAnswer, **_BODY_REFUSALS},
        form={"id": _WEBHOOK_KIND, "url": list[str]},
        needed=frozenset({"id", "url"}),
    ),
    Endpoint(
        "GET",
        _HOOKS + "/{name}",
        webhooks.get,
        "A webhook",
        {200: answers.WebhookAnswer, **_REFUSALS},
    ),
    Endpoint(
        "PUT",
        _HOOKS + "/{name}",
        webhooks.update,
        "Give a webhook other URLs",
        {200: answers.WebhookAnswer, **_BODY_REFUSALS},
        form={"url": list[str]},
        needed=frozenset({"url"}),
    ),
    Endpoint(
        "DELETE",
        _HOOKS + "/{name}",
        webhooks.remove,
        "Remove a webhook",
        {200: answers.WebhookAnswer, **_BODY_REFUSALS},
    ),
    Endpoint(
        "GET",
        "/relay/v1/status",
        operator.status,
        "How the relay is",
        {200: answers.Status, **_REFUSALS},
    ),
    Endpoint(
        "GET",
        "/relay/v1/queue",
        operator.list_queue,
        "A page of the queue",
        {200: answers.QueuePage, **_REFUSALS},
        query=_QUEUE_QUERY,
    ),
    Endpoint(
        "GET",
        "/relay/v1/queue/{id}",
        operator.show,
        "All we know of a message",
        {200: answers.QueueItem, **_REFUSALS},
    ),
    Endpoint(
        "POST",
        "/relay/v1/queue/{verb}",
        operator.change,
        "Retry, hold, release or remove messages",
        {200: answers.Changed, **_BODY_REFUSALS},
        body=QueueSelection,
    ),
    Endpoint(
        "GET",
        "/relay/v1/explain",
        operator.explain,
        "What would become of a message",
        {200: answers.Explained, **_REFUSALS},
        query=_EXPLAIN_QUERY,
        needed=frozenset({"to"}),
    ),
    Endpoint(
        "POST",
        "/relay/v1/probe/{domain}",
        operator.probe,
        "Connect to the mail hosts of a domain and look",
        {200: answers.Probed, **_BODY_REFUSALS},
    ),
)
