"""The operator's verbs as JSON. They use the functions of `relay queue`, `explain` and `probe`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial

from aiohttp import web

from relay import __version__
from relay.admin import operations
from relay.admin.requests import RequestError, change_filter, queue_filter
from relay.api.forms import read_json
from relay.api.mailgun import sending_domain
from relay.api.mailgun_form import ApiError, shown
from relay.api.state import Api, answer
from relay.mail.address import AddressError, domain_of, typed_address
from relay.mail.jsontext import JsonObject
from relay.policy.fields import Wishes, yes_or_no
from relay.queue.store import QueueFilter, more_follows
from relay.queue.verbs import VERBS

log = logging.getLogger(__name__)

_MOST_ITEMS = 1000


async def status(api: Api, request: web.Request) -> web.Response:
    """The state of the relay."""
    operator = api.operator
    queue = {state.value: count for state, count in (await operator.view.counts()).items()}
    deliveries = {} if operator.relay is None else (await operator.relay.status()).as_json()
    return answer({"version": __version__, "hostname": api.hostname, "queue": queue, **deliveries})


async def list_queue(api: Api, request: web.Request) -> web.Response:
    """A page of the queue, oldest first."""
    query = _query(request, {"domain", "sender", "state", "older-than", "limit", "after"})
    named: JsonObject = {
        name: query[name] for name in ("domain", "sender", "state") if name in query
    }
    if "older-than" in query:
        named["older-than"] = _number(query, "older-than", 0)
    wanted = _filter(queue_filter, named)
    limit = min(_number(query, "limit", 100), _MOST_ITEMS)
    found = await api.operator.view.list_messages(
        wanted, now=api.operator.clock(), after=query.get("after", ""), limit=limit
    )
    following = found[-1].queue_id if more_follows(found, limit) else None
    return answer({"items": operations.page_as_json(found), "next": following})


async def show(api: Api, request: web.Request) -> web.Response:
    """All facts about one message of the queue."""
    found = await operations.show_message(api.operator.view, request.match_info["id"])
    if found is None:
        raise ApiError(
            404,
            "Message not found: it was delivered, returned or removed, or never was in this queue",
        )
    return answer(found)


async def change(api: Api, request: web.Request) -> web.Response:
    """Retry, hold, release or remove the messages that the body selects."""
    verb = request.match_info["verb"]
    if verb not in VERBS:
        raise ApiError(404, f"no such verb, known are: {', '.join(VERBS)}")
    body = await read_json(request)
    wanted = _filter(partial(change_filter, verb), body)
    async for so_far in api.operator.change(verb, wanted):
        done = so_far
    log.info("operator over HTTP: %s, %d recipients changed", verb, done.recipients)
    return answer(done.as_json())


async def explain(api: Api, request: web.Request) -> web.Response:
    """What would happen to a message. None is sent."""
    query = _query(
        request, {"from", "to", "require-tls", "skip-verification", "requiretls", "tls-required-no"}
    )
    recipient = _address(query, "to")
    if not recipient:
        raise ApiError(400, "to parameter is missing")
    reverse_path = _address(query, "from")
    wishes = Wishes(_truth(query, "require-tls"), _truth(query, "skip-verification"))
    return answer(
        await api.operator.running().explain(
            reverse_path,
            recipient,
            wishes,
            requiretls=_truth(query, "requiretls") or False,
            tls_required_no=_truth(query, "tls-required-no") or False,
        )
    )


async def probe(api: Api, request: web.Request) -> web.Response:
    """Connect to the mail hosts of a domain, and return what they show of TLS."""
    domain = sending_domain(request.match_info["domain"])
    return answer(await api.operator.running().probe(domain))


def _query(request: web.Request, known: Collection[str]) -> Mapping[str, str]:
    """The parameters of a query. 400 where one is unknown or repeated."""
    for name in request.query:
        if name not in known:
            raise ApiError(
                400, f"no such parameter: {shown(name)}; known are {', '.join(sorted(known))}"
            )
        if len(request.query.getall(name)) > 1:
            raise ApiError(400, f"{name} parameter is there more than once")
    return dict(request.query)


def _filter(
    read: Callable[[Mapping[str, object]], QueueFilter], wanted: Mapping[str, object]
) -> QueueFilter:
    try:
        return read(wanted)
    except (RequestError, OverflowError) as error:
        raise ApiError(400, str(error)) from None


def _number(query: Mapping[str, str], name: str, otherwise: int) -> int:
    if name not in query:
        return otherwise
    text = query[name]
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text)):
        raise ApiError(
            400, f"{name} is a number{' of seconds' if name == 'older-than' else ''}, at least 1"
        )
    return int(text)


def _address(query: Mapping[str, str], name: str) -> str:
    """The address that a parameter names; "" without one. It has a domain."""
    try:
        address = typed_address(query.get(name, ""))
        domain_of(address)
    except AddressError as error:
        raise ApiError(400, f"{name}: {error}") from None
    return address


def _truth(query: Mapping[str, str], name: str) -> bool | None:
    if name not in query:
        return None
    truth = yes_or_no(query[name].encode("utf-8", "replace"))
    if truth is None:
        raise ApiError(400, f"{name} parameter is neither yes nor no")
    return truth
