"""What the handlers work with, and how they answer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from relay.admin.domain_settings import SettingsInForce
from relay.admin.operator import Operator
from relay.policy.rules import PolicyRules
from relay.queue.api_state import ApiState
from relay.queue.store import MessageSink

__all__ = ["API", "Api", "Handler", "HttpOptions", "answer", "api_of"]


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """What a reload may change. `domains`: those that may be sent from, none named: any."""

    api_keys: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    webhook_signing_key: str | None = None


@dataclass(frozen=True, slots=True)
class Api:
    """`rules` are those in force, settings made here included; what has a default is the daemon's
    to give.
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
    """What a handler works with."""
    return request.app[API]


def answer(values: Mapping[str, object], *, status: int = 200) -> web.Response:
    """A JSON answer, in ASCII: a peer's text in it does no harm on the way."""
    return web.Response(status=status, text=json.dumps(values), content_type="application/json")
