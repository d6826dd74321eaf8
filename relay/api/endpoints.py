"""The table of all paths of the HTTP interface, with parameters, answers and handlers.

The routes of the server and the OpenAPI document are made from this table, so that the document
describes what is served. Parameters in a path have the form `{domain}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict

from relay.api import domains, events, operator, schemas, sending, webhooks
from relay.api.state import Handler

TEXT = "text/plain"
"""In the place of the type of an answer: plain text."""

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
    """One method of one path. `needed`: the parameters of form or query that are required."""

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
    """Selects messages: all fields that are there have to match."""

    ids: list[str]
    domain: str
    sender: str
    state: Literal["queued", "deferred", "held"]
    all: bool


_M = schemas.Message
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

_NOTHING: Mapping[str, object] = {}
_CONNECTION = "/v3/domains/{domain}/connection"
_HOOKS = "/v3/domains/{domain}/webhooks"


def _get(
    path: str,
    handler: Handler,
    summary: str,
    found: object,
    query: Mapping[str, object] = _NOTHING,
    needed: frozenset[str] = frozenset(),
) -> Endpoint:
    """An endpoint that changes nothing."""
    return Endpoint("GET", path, handler, summary, {200: found, **_REFUSALS}, query, needed)


def _change(
    method: str,
    path: str,
    handler: Handler,
    summary: str,
    found: object,
    form: Mapping[str, object] = _NOTHING,
    needed: frozenset[str] = frozenset(),
    body: object = None,
) -> Endpoint:
    """An endpoint that changes something; it may have a body."""
    refusals = {200: found, **_BODY_REFUSALS}
    return Endpoint(method, path, handler, summary, refusals, _NOTHING, needed, form, body)


def _domain_endpoints(path: str) -> tuple[Endpoint, ...]:
    one = f"{path}/{{domain}}"
    summary = "Set what holds for mail from a domain"
    return (
        _get(path, domains.list_domains, "The domains that the relay knows", schemas.DomainList),
        _get(one, domains.get_domain, "A domain", schemas.DomainAnswer),
        _change("PUT", one, domains.set_domain, summary, schemas.DomainAnswer, form=_SETTINGS_FORM),
    )


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        "POST",
        "/v3/{domain}/messages",
        sending.send,
        "Send a message",
        {200: schemas.Sent, **_SEND_REFUSALS},
        form=_MESSAGE_FORM,
        needed=frozenset({"from", "to"}),
    ),
    Endpoint(
        "POST",
        "/v3/{domain}/messages.mime",
        sending.send_mime,
        "Send a complete message",
        {200: schemas.Sent, **_SEND_REFUSALS},
        form=_MIME_FORM,
        needed=frozenset({"to", "message"}),
    ),
    _get(
        _CONNECTION,
        domains.get_connection,
        "The settings in effect for mail from a domain",
        schemas.Connection,
    ),
    _change(
        "PUT",
        _CONNECTION,
        domains.set_connection,
        "Set them",
        schemas.ConnectionUpdated,
        form=_SETTINGS_FORM,
    ),
    *_domain_endpoints("/v3/domains"),
    *_domain_endpoints("/v4/domains"),
    *(
        _get(
            f"/v3/{{domain}}/events{path}",
            events.list_events,
            "Events of mail from a domain",
            schemas.EventPage,
            query=_EVENT_QUERY if not path else {},
        )
        for path in ("", "/{page}")
    ),
    _get(_HOOKS, webhooks.list_all, "All webhooks of a domain", schemas.WebhookList),
    _change(
        "POST",
        _HOOKS,
        webhooks.create,
        "Make a webhook",
        schemas.WebhookAnswer,
        form={"id": _WEBHOOK_KIND, "url": list[str]},
        needed=frozenset({"id", "url"}),
    ),
    _get(f"{_HOOKS}/{{name}}", webhooks.get, "A webhook", schemas.WebhookAnswer),
    _change(
        "PUT",
        f"{_HOOKS}/{{name}}",
        webhooks.update,
        "Give a webhook other URLs",
        schemas.WebhookAnswer,
        form={"url": list[str]},
        needed=frozenset({"url"}),
    ),
    _change(
        "DELETE", f"{_HOOKS}/{{name}}", webhooks.remove, "Remove a webhook", schemas.WebhookAnswer
    ),
    _get("/relay/v1/status", operator.status, "The state of the relay", schemas.Status),
    _get(
        "/relay/v1/queue",
        operator.list_queue,
        "A page of the queue",
        schemas.QueuePage,
        query=_QUEUE_QUERY,
    ),
    _get("/relay/v1/queue/{id}", operator.show, "All facts about a message", schemas.QueueItem),
    _change(
        "POST",
        "/relay/v1/queue/{verb}",
        operator.change,
        "Retry, hold, release or remove messages",
        schemas.Changed,
        body=QueueSelection,
    ),
    _get(
        "/relay/v1/explain",
        operator.explain,
        "What would happen to a message",
        schemas.Explained,
        query=_EXPLAIN_QUERY,
        needed=frozenset({"to"}),
    ),
    _change(
        "POST",
        "/relay/v1/probe/{domain}",
        operator.probe,
        "Connect to the mail hosts of a domain and look",
        schemas.Probed,
    ),
)
