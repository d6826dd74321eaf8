"""The parts of the relay that the handlers use, and the form of their answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from relay.admin.domain_settings import SettingsInForce
from relay.admin.operator import Operator
from relay.api.mailgun import sending_domain
from relay.policy.rules import PolicyRules
from relay.queue.api_state import ApiState
from relay.queue.store import MessageSink


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Options that a reload may change. `domains`: the allowed sender domains; empty: all."""

    api_keys: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    webhook_signing_key: str | None = None


@dataclass(frozen=True, slots=True)
class Api:
    """The relay as the handlers see it. `rules`: those in force, with the settings made over HTTP.

    `webhook_objection`: why a URL may not be called; "" if it may.
    """

    operator: Operator
    hostname: str
    sink: MessageSink
    state: ApiState
    settings: SettingsInForce
    options: Callable[[], HttpOptions]
    rules: Callable[[], PolicyRules]
    webhook_objection: Callable[[str], Awaitable[str]]
    message_size_bytes: int = 50 * 1024 * 1024
    recipients: int = 1000
    received_hops: int = 100
    request_seconds: float = 1800.0
    webhooks_changed: Callable[[], None] = lambda: None


Handler = Callable[[Api, web.Request], Awaitable[web.Response]]

API: web.AppKey[Api] = web.AppKey("api", Api)


def api_of(request: web.Request) -> Api:
    """The `Api` of a request."""
    return request.app[API]


def sender_domain(api: Api, request: web.Request, *, named: bool = False) -> str:
    """The domain in the path of a request (`sending_domain`)."""
    return sending_domain(request.match_info["domain"], api.options().domains, named=named)


def answer(values: Mapping[str, object], *, status: int = 200) -> web.Response:
    """An answer as JSON in ASCII, so that no text of a peer in it can do harm."""
    return web.Response(status=status, text=json.dumps(values), content_type="application/json")
