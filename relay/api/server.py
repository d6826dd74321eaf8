"""The HTTP server: a socket, TLS if the operator wants it, and what every request goes through.

    connections   no more than there may be, and from one client half of them (`relay.api.entrance`)
    time          a request's header section has `_HEADER_SECONDS` from the last answer, or the connection
                  ends; all of it the time a transaction has over SMTP
    origin        a browser that says it asks for another site's page is answered 403
    key           401 in Mailgun's words; 429 after too many wrong ones from an address
    size          413, before the body is read where its length is told, else while it is
    memory        503 while the bodies under way are as large as all may be together
    errors        a sentence as JSON, never a trace; what is our fault is in our log

A request goes on to its end when its client has gone: what was accepted is accepted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web

from relay.api.endpoints import ENDPOINTS, TEXT, Endpoint
from relay.api.entrance import Entrance, HttpError, tls_context
from relay.api.forms import Budget
from relay.api.keys import Keys, Verdict
from relay.api.mailgun import ApiError
from relay.api.openapi import document
from relay.api.state import API, Api, answer, api_of
from relay.queue.store import SpoolError

__all__ = ["CONNECTIONS", "HttpError", "HttpServer", "application", "start_http"]

log = logging.getLogger(__name__)

CONNECTIONS = 256
_HEADER_SECONDS = 60.0
_FORM_OCTETS = 1024 * 1024
"""What a form may be larger than the message it makes: its other fields, the boundaries."""

_BODIES_AT_A_TIME = 4
_OTHER_BODY_OCTETS = 1024 * 1024
_OTHER_SITES = ("cross-site", "same-site")

Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]

KEYS: web.AppKey[Keys] = web.AppKey("keys", Keys)
BUDGET: web.AppKey[Budget] = web.AppKey("budget", Budget)


class HttpServer:
    """A listening server. `address`: where it really listens."""

    def __init__(
        self,
        runner: web.AppRunner,
        entrance: Entrance,
        address: tuple[str, int],
        files: tuple[str, str | None] | None,
    ) -> None:
        self._runner = runner
        self._entrance = entrance
        self._files = files
        self.address = address

    @property
    def connections(self) -> int:
        """How many are inside or on the way in."""
        return self._entrance.connections

    def read_certificate(self) -> Callable[[], None]:
        """What shows the certificate the files have now. `HttpError` where they are broken."""
        if self._files is None:
            return lambda: None
        context = tls_context(*self._files)
        return partial(setattr, self._entrance, "context", context)

    async def close(self) -> None:
        """Take no more requests, let those under way end, for a while."""
        await self._entrance.close()
        await self._runner.cleanup()


async def start_http(
    api: Api,
    address: tuple[str, int],
    *,
    certificate: str | None = None,
    key: str | None = None,
    connections: int = CONNECTIONS,
    header_seconds: float = _HEADER_SECONDS,
) -> HttpServer:
    """Listen, with TLS where there is a certificate."""
    files = (certificate, key) if certificate is not None else None
    context = tls_context(*files) if files is not None else None
    runner = web.AppRunner(application(api), handle_signals=False, shutdown_timeout=10.0)
    await runner.setup()
    assert runner.server is not None
    options = {
        "access_log": None,
        "logger": _protocol_log(),
        # Counted from the beginning of a connection and from the end of each answer, however the octets come.
        "keepalive_timeout": header_seconds,
    }
    entrance = Entrance(runner.server, most=connections, context=context, options=options)
    try:
        bound = await entrance.open(address)
    except OSError as error:
        await runner.cleanup()
        raise HttpError(str(error)) from error
    return HttpServer(runner, entrance, bound, files)


def _protocol_log() -> logging.Logger:
    """What aiohttp has to say of clients that speak no HTTP: a line each, and only to who wants to know."""

    def without_trace(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            record.msg, record.args = (
                "HTTP: a request that cannot be read: %s",
                (type(error).__name__,),
            )
        record.exc_info = None
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger().isEnabledFor(logging.DEBUG)

    protocol_log = logging.getLogger("relay.api.protocol")
    protocol_log.filters[:] = [without_trace]
    return protocol_log


def application(api: Api) -> web.Application:
    """Everything but the socket."""
    largest = api.message_size_bytes + _FORM_OCTETS
    app = web.Application(client_max_size=largest, middlewares=[_guarded])
    app[API] = api
    app[KEYS] = keys = Keys(lambda: api.options().api_keys, clock=api.clock)
    app[BUDGET] = Budget(_BODIES_AT_A_TIME * largest)
    described = json.dumps(document())

    async def describe(request: web.Request) -> web.Response:
        return web.Response(text=described, content_type="application/json")

    async def name_ourselves(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "relay"

    async def forget(_: web.Application) -> None:
        keys.close()

    async def measure(request: web.Request) -> web.Response:
        await _check_key(request, bare=True)
        if api.metrics is None:
            raise web.HTTPNotFound
        return web.Response(body=await api.metrics(), content_type=TEXT, charset="utf-8")

    async def tell_health(request: web.Request) -> web.Response:
        """Nobody needs a key to hear yes or no; what is wrong is said in the program's own log and socket."""
        if api.health is None:
            raise web.HTTPNotFound
        found = await api.health()
        wrong = found["liveness" if request.path == "/healthz" else "readiness"]
        return web.Response(text="no\n" if wrong else "ok\n", status=503 if wrong else 200)

    app.on_response_prepare.append(name_ourselves)
    app.on_cleanup.append(forget)
    app.router.add_get("/metrics", measure)
    app.router.add_get("/healthz", tell_health)
    app.router.add_get("/readyz", tell_health)
    app.router.add_get("/relay/v1/openapi.json", describe)
    for endpoint in ENDPOINTS:
        app.router.add_route(endpoint.method, endpoint.path, partial(_serve, endpoint))
    return app


async def _serve(endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
    """One request to an endpoint, within what all requests together may hold."""
    api, budget = api_of(request), request.app[BUDGET]
    await _check_key(request, bare=endpoint.answers.get(401) == TEXT)
    limit = api.message_size_bytes + _FORM_OCTETS if endpoint.form else _OTHER_BODY_OCTETS
    length = request.content_length
    if length is not None and length > limit:
        raise ApiError(413, "Request entity too large")
    held = length if length is not None else limit if request.can_read_body else 0
    if not budget.reserve(held):
        raise ApiError(503, "Too many large requests at a time, try again later")
    try:
        async with asyncio.timeout(api.request_seconds):
            return await endpoint.handler(api, request)
    finally:
        budget.give_back(held)


async def _check_key(request: web.Request, *, bare: bool) -> None:
    verdict = await request.app[KEYS].judge(
        request.headers.get("Authorization", ""), request.remote or ""
    )
    if verdict is Verdict.WAIT:
        raise ApiError(429, "Too many failed authentications, try again later")
    if verdict is Verdict.WRONG:
        raise _Unauthorized(bare)


class _Unauthorized(ApiError):
    """401; `bare`: in plain text, as their sending endpoints say it."""

    def __init__(self, bare: bool) -> None:
        super().__init__(401, "Forbidden" if bare else "Invalid private key")
        self.bare = bare


@web.middleware
async def _guarded(request: web.Request, handler: Answerer) -> web.StreamResponse:
    """Any request, and any way in which it may fail."""
    try:
        _check_origin(request)
        return await handler(request)
    except _Unauthorized as error:
        return _unauthorized(error)
    except ApiError as error:
        response = answer({"message": error.message}, status=error.status)
        if error.status in (429, 503):
            response.headers["Retry-After"] = "60"
        return response
    except web.HTTPRequestEntityTooLarge:
        return answer({"message": "Request entity too large"}, status=413)
    except web.HTTPException as error:
        response = answer({"message": error.reason}, status=error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except TimeoutError:
        if not request.content.is_eof():
            return answer({"message": "The request took too long to come"}, status=408)
        return answer({"message": "Trouble of our own, try again later"}, status=503)
    except SpoolError as error:
        log.error("HTTP: %s", error)
        return answer({"message": "Trouble of our own, try again later"}, status=503)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("HTTP: %s %r failed", request.method, request.path)
        return answer({"message": "An error of the relay's own; its log has it"}, status=500)


def _check_origin(request: web.Request) -> None:
    """A browser that has a key would send it along for a page of anybody's: that is not its user's will."""
    if request.headers.get("Sec-Fetch-Site") in _OTHER_SITES and request.method not in (
        "GET",
        "HEAD",
    ):
        raise ApiError(403, "A page of another site may not ask")


def _unauthorized(error: _Unauthorized) -> web.Response:
    challenge = {"WWW-Authenticate": 'Basic realm="relay"'}
    if error.bare:
        return web.Response(status=401, text=error.message, content_type=TEXT, headers=challenge)
    response = answer({"message": error.message}, status=401)
    response.headers.update(challenge)
    return response
