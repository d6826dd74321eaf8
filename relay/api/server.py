"""The HTTP server: its socket, TLS if the operator wants it, and the checks of every request.

    connections   limited in all, and for one client to half of that (`relay.api.entrance`)
    time          the header section of a request has `_HEADER_SECONDS` from the last answer, or
                  the connection ends; the whole request has the time of a transaction over SMTP
    origin        403: a page of another site sends a request that changes something
                  (`relay.api.origin`)
    key           401 in Mailgun's words; 429 after too many wrong keys from an address
    encoding      415: the relay decompresses no body
    body          413, 408, 503: size, pace, and the memory of all bodies (`relay.api.bodies`)
    errors        a sentence as JSON, never a trace; the relay's log has the errors of the relay

The checks have this order, so no octet of a body is read before the key is known. After an answer
without a read body, the relay reads and drops the body for a moment, so that the client reads the
answer; then the connection ends. Clients without a right key get answers at a limited rate
(`relay.api.rate`). A client that does not read its answer is disconnected.

A request goes on to its end although its client may be gone, so that an accepted message stays
accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

from aiohttp import web

from relay.api.bodies import BODY, Body, BodyBuffers
from relay.api.endpoints import ENDPOINTS, TEXT, Endpoint
from relay.api.entrance import Entrance, HttpError
from relay.api.keys import Keys
from relay.api.mailgun_form import ApiError
from relay.api.openapi import document_text
from relay.api.origin import is_foreign
from relay.api.rate import AnswerRate, Shared
from relay.api.state import API, Api, answer, api_of
from relay.mail.ip import canonical
from relay.mail.jsontext import JsonFields
from relay.queue.store import SpoolError
from relay.submit.certificates import ServerTls
from relay.submit.failures import client_key
from relay.submit.secrets import SecretVerdict

log = logging.getLogger(__name__)

CONNECTIONS = 256
_HEADER_SECONDS = 30.0
_FORM_OCTETS = 1024 * 1024
"""How much larger a form may be than its message: for other fields, and boundaries."""

_LARGEST_AT_A_TIME = 3
_OTHER_BODY_OCTETS = 1024 * 1024

_ANSWERS_WITHOUT_KEY = 20
_ANSWERS_ABOUT_HEALTH = 100
"""Answers a second for one client."""

_UNWANTED_SECONDS = 5.0
_UNWANTED_AT_A_TIME = 8
_UNWANTED_PAUSE = 0.005
"""Seconds between reads of about 128 KiB: 25 MB/s from one client."""

_ANSWER_SECONDS = 30.0
_ANSWER_OCTETS_A_SECOND = 4096

PROTOCOL_OPTIONS: JsonFields = {
    # aiohttp would decompress a body, even one that it only drops.
    "auto_decompress": False,
    # `_drop_body` does this, for a few at a time.
    "lingering_time": 0.0,
    "max_headers": 64,
    "max_field_size": 4096,
}

Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gate:
    """The keys, and the limits that all requests share."""

    def __init__(self, api: Api) -> None:
        self.keys = Keys(lambda: api.options().api_keys, clock=api.operator.clock)
        self.largest = api.message_size_bytes + _FORM_OCTETS
        self.buffers = BodyBuffers(
            _LARGEST_AT_A_TIME * self.largest, _LARGEST_AT_A_TIME * self.largest // 2
        )
        self.rate = AnswerRate(_ANSWERS_WITHOUT_KEY)
        self.health_rate = AnswerRate(_ANSWERS_ABOUT_HEALTH)
        self.unwanted = asyncio.Semaphore(_UNWANTED_AT_A_TIME)


GATE: web.AppKey[Gate] = web.AppKey("gate", Gate)
HAS_KEY: web.RequestKey[bool] = web.RequestKey("has key", bool)


class HttpServer:
    """A listening server. `address`: with the real port."""

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
        """How many connections are open, or in their handshake."""
        return self._entrance.connections

    def read_certificate(self) -> Callable[[], None]:
        """Read the certificate. Returns the function that puts it in use; `CertificateError`."""
        if self._files is None:
            return lambda: None
        context = ServerTls(*self._files).context
        return partial(setattr, self._entrance, "context", context)

    async def close(self) -> None:
        """Accept no more requests, and wait a while for those under way."""
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
    also: Callable[[web.Application], object] = lambda _: None,
) -> HttpServer:
    """Listen, with TLS if there is a certificate. `HttpError`, `CertificateError`.

    `also`: adds other pages to the server.
    """
    files = (certificate, key) if certificate is not None else None
    context = ServerTls(*files).context if files is not None else None
    app = application(api)
    also(app)
    runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=10.0)
    await runner.setup()
    assert runner.server is not None
    options = {
        "access_log": None,
        "logger": _protocol_log(),
        # Counts from the beginning of a connection and from the end of each answer, also while
        # octets come.
        "keepalive_timeout": header_seconds,
        **PROTOCOL_OPTIONS,
    }
    entrance = Entrance(
        runner.server, most=connections, context=context, options=options, clock=api.operator.clock
    )
    try:
        bound = await entrance.open(address)
    except OSError as error:
        await runner.cleanup()
        raise HttpError(str(error)) from error
    return HttpServer(runner, entrance, bound, files)


def _protocol_log() -> logging.Logger:
    """The log of aiohttp about clients that speak no HTTP: one line each, at level debug."""

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
    """The server without its socket."""
    app = web.Application(middlewares=[_paced, _guarded])
    app[API] = api
    app[GATE] = gate = Gate(api)
    add = partial(app.router.add_route, expect_handler=_expected)

    async def describe(request: web.Request) -> web.Response:
        # In a thread: whoever asks first has it made, and nobody else waits for that.
        described = await asyncio.to_thread(document_text)
        return web.Response(text=described, content_type="application/json")

    async def add_headers(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "relay"
        response.headers["X-Content-Type-Options"] = "nosniff"

    async def forget(_: web.Application) -> None:
        gate.keys.close()

    app.on_response_prepare.append(add_headers)
    app.on_cleanup.append(forget)
    look = partial(app.router.add_get, expect_handler=_expected)
    relay = api.operator.relay
    health = Shared(relay.health if relay is not None else _not_here)
    look("/metrics", partial(_measure, Shared(relay.metrics if relay is not None else _not_here)))
    look("/healthz", partial(_tell_health, health, "liveness"))
    look("/readyz", partial(_tell_health, health, "readiness"))
    look("/relay/v1/openapi.json", describe)
    for endpoint in ENDPOINTS:
        add(endpoint.method, endpoint.path, partial(_serve, endpoint))
    return app


async def _expected(request: web.Request) -> None:
    """Do nothing: `relay.api.bodies` answers `Expect: 100-continue` when it reads the body."""


async def _not_here() -> NoReturn:
    raise web.HTTPNotFound


async def _measure(measure: Shared[bytes], request: web.Request) -> web.Response:
    await _check_key(request, bare=True)
    return web.Response(body=await measure(), content_type=TEXT, charset="utf-8")


async def _tell_health(
    ask: Shared[Mapping[str, Sequence[str]]], kind: str, request: web.Request
) -> web.Response:
    """Answer yes or no, without a key. The reasons are in the relay's log and control socket."""
    wrong = (await ask())[kind]
    await request.app[GATE].health_rate.wait(canonical(request.remote or ""))
    request[HAS_KEY] = True  # this answer has its own rate
    return web.Response(text="no\n" if wrong else "ok\n", status=503 if wrong else 200)


async def _serve(endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
    """Serve one request to an endpoint: key, encoding, body, then the handler."""
    api, gate = api_of(request), request.app[GATE]
    await _check_key(request, bare=endpoint.answers.get(401) == TEXT)
    coding = request.headers.get("Transfer-Encoding", "chunked")
    if "Content-Encoding" in request.headers or coding.lower() != "chunked":
        raise ApiError(415, "the body has to come without a Content-Encoding")
    address, authorization = canonical(request.remote or ""), request.headers["Authorization"]
    body = Body(
        request,
        gate.buffers,
        client=(client_key(address), gate.keys.name_of(authorization)),
        limit=gate.largest if endpoint.form else _OTHER_BODY_OCTETS,
        seconds=api.request_seconds,
    )
    request[BODY] = body
    try:
        async with asyncio.timeout(api.request_seconds):
            return await endpoint.handler(api, request)
    finally:
        body.close()


async def _check_key(request: web.Request, *, bare: bool) -> None:
    verdict = await request.app[GATE].keys.judge(
        request.headers.get("Authorization", ""), canonical(request.remote or "")
    )
    if verdict is SecretVerdict.WAIT:
        raise ApiError(429, "Too many failed authentications, try again later")
    if verdict is SecretVerdict.WRONG:
        raise _Unauthorized(bare)
    request[HAS_KEY] = True


class _Unauthorized(ApiError):
    """401. `bare`: in plain text, as Mailgun's endpoints for sending answer."""

    def __init__(self, bare: bool) -> None:
        super().__init__(401, "Forbidden" if bare else "Invalid private key")
        self.bare = bare


@web.middleware
async def _paced(request: web.Request, handler: Answerer) -> web.StreamResponse:
    """Send the answer, at the rate of its client, and drop a body that was not read."""
    gate = request.app[GATE]
    response = await handler(request)
    if not request.get(HAS_KEY):
        await gate.rate.wait(canonical(request.remote or ""))
    is_unwanted = not request.content.is_eof()
    if is_unwanted:
        response.force_close()
    length = response.content_length or 0
    try:
        async with asyncio.timeout(_ANSWER_SECONDS + length / _ANSWER_OCTETS_A_SECOND):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        log.info("HTTP: %s does not take its answer", canonical(request.remote or ""))
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError from None
    if is_unwanted and not gate.unwanted.locked():
        async with gate.unwanted:
            await _drop_body(request)
    return response


async def _drop_body(request: web.Request) -> None:
    """Read on for a moment. A client that still sends reads nothing, and a reset would discard its
    answer.
    """
    with contextlib.suppress(TimeoutError, ConnectionError, web.RequestPayloadError):
        async with asyncio.timeout(_UNWANTED_SECONDS):
            async for _ in request.content.iter_any():
                await asyncio.sleep(_UNWANTED_PAUSE)


@web.middleware
async def _guarded(request: web.Request, handler: Answerer) -> web.StreamResponse:
    """Check the origin of a request, and answer every error."""
    try:
        if is_foreign(request.method, request.headers):
            raise ApiError(403, "A page of another site may not ask")
        return await handler(request)
    except _Unauthorized as error:
        return _unauthorized(error)
    except ApiError as error:
        response = answer({"message": error.message}, status=error.status)
        if error.status in (429, 503):
            response.headers["Retry-After"] = "60"
        return response
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


def _unauthorized(error: _Unauthorized) -> web.Response:
    challenge = {"WWW-Authenticate": 'Basic realm="relay"'}
    if error.bare:
        return web.Response(status=401, text=error.message, content_type=TEXT, headers=challenge)
    response = answer({"message": error.message}, status=401)
    response.headers.update(challenge)
    return response
