"""Reads the filters of a request, and writes them.

An empty filter is a `RequestError`, because it may come from a script whose variable is not set,
and would select every message. So is an unknown filter, which would select more than was meant.
`queue_request` is the inverse of `queue_filter`: it writes a filter as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from relay.admin.report import period
from relay.mail.address import AddressError, normalise_domain
from relay.mail.jsontext import JsonObject
from relay.queue.entry import State
from relay.queue.statistics import CountFilter
from relay.queue.store import EventFilter, QueueFilter


class RequestError(Exception):
    """A request is invalid, or cannot be answered. The text says why."""


_WAITING = (State.QUEUED, State.DEFERRED, State.HELD)

_QUEUE_FILTERS = frozenset({"ids", "domain", "sender", "older-than", "state"})
_EVENT_FILTERS = frozenset(
    {"since", "until", "events", "recipient", "recipient-domain", "sender", "sender-domain", "id"}
)
_COUNT_FILTERS = frozenset({"since", "until", "sender-domain", "recipient-domain"})


def queue_filter(request: Mapping[str, object]) -> QueueFilter:
    """The messages that a request selects."""
    check_known(request, _QUEUE_FILTERS | {"verb", "all"})
    seconds = number_in(request, "older-than", "a number of seconds")
    state = request.get("state", State.QUEUED)
    if not isinstance(state, str) or state not in set(State):
        raise RequestError(f"no such state: {state}; known are {', '.join(_WAITING)}")
    return QueueFilter(
        queue_ids=_names(request, "ids", "a list of queue ids"),
        domain=domain_in(request),
        sender=text_in(request, "sender"),
        older_than=None if seconds is None else timedelta(seconds=seconds),
        state=State(state) if "state" in request else None,
    )


def queue_request(wanted: QueueFilter) -> JsonObject:
    """The filters of a request that selects these messages."""
    filters = {
        "ids": sorted(wanted.queue_ids) or None,
        "domain": wanted.domain or None,
        "sender": wanted.sender or None,
        "older-than": None if wanted.older_than is None else wanted.older_than.total_seconds(),
        "state": None if wanted.state is None else wanted.state.value,
    }
    return {name: value for name, value in filters.items() if value is not None}


def change_filter(verb: str, request: Mapping[str, object]) -> QueueFilter:
    """The messages that a verb changes: those of a filter, or all if the request says so."""
    wanted = queue_filter(request)
    question = f"{verb} what? name queue ids or a filter, or say all"
    check_all(request, wanted == QueueFilter(), question)
    return wanted


def check_all(request: Mapping[str, object], is_unfiltered: bool, question: str) -> None:
    """Refuse a change that has no filter and does not say `all`, or that has both."""
    if "all" in request and request["all"] is not True:
        raise RequestError("all is true, or is left out")
    if is_unfiltered != ("all" in request):
        raise RequestError(question)


def event_filter(request: Mapping[str, object]) -> EventFilter:
    """The events that a request selects."""
    check_known(request, _EVENT_FILTERS | {"verb", "limit", "follow"})
    return EventFilter(
        begin=_time(request, "since"),
        end=_time(request, "until"),
        names=_names(request, "events", "a list of names"),
        recipient=text_in(request, "recipient"),
        sender=text_in(request, "sender"),
        queue_id=text_in(request, "id"),
        sender_domain=domain_in(request, "sender-domain"),
        recipient_domain=domain_in(request, "recipient-domain"),
    )


def count_filter(request: Mapping[str, object]) -> CountFilter:
    """The counts that a request selects. The sender domain `<>` is the null reverse-path."""
    check_known(request, _COUNT_FILTERS | {"verb"})
    begin, end = _time(request, "since"), _time(request, "until")
    if begin is None or end is None:
        raise RequestError("a report needs since and until")
    if begin >= end:
        raise RequestError("since has to be before until")
    if request.get("sender-domain") == "<>":
        sender_domain = "<>"
    else:
        sender_domain = domain_in(request, "sender-domain")
    recipient_domain = domain_in(request, "recipient-domain")
    return period(begin, end, sender_domain=sender_domain, recipient_domain=recipient_domain)


def _time(request: Mapping[str, object], key: str) -> datetime | None:
    if key not in request:
        return None
    try:
        at = datetime.fromisoformat(str(request[key]))
    except ValueError:
        raise RequestError(f"{key} is a time such as 2030-01-31T12:00:00Z") from None
    if at.tzinfo is None:
        raise RequestError(f"{key} has to name its zone")
    return at


def domain_in(request: Mapping[str, object], key: str = "domain") -> str:
    """The domain that a request names, normalised; "" for none."""
    text = text_in(request, key)
    try:
        return normalise_domain(text) if text else ""
    except AddressError as error:
        raise RequestError(f"{key}: {error}") from None


def check_known(request: Mapping[str, object], known: frozenset[str]) -> None:
    """Refuse a request with an unknown filter: without it, it would select more than was meant."""
    for name in request:
        if name not in known:
            raise RequestError(f"no such filter: {name}; known are {', '.join(sorted(known))}")


def _names(request: Mapping[str, object], key: str, kind: str) -> frozenset[str]:
    if key not in request:
        return frozenset()
    names = request[key]
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise RequestError(f"{key} is {kind}")
    if not names:
        raise _empty(key)
    return frozenset(_checked(key, one) for one in names)


def number_in(
    request: Mapping[str, object], key: str, kind: str = "a number"
) -> int | float | None:
    """A number of a request, from 0 to 10^9; None for none."""
    if key not in request:
        return None
    value = request[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e9:
        return value
    raise RequestError(f"{key} is {kind}")


def text_in(request: Mapping[str, object], key: str) -> str:
    """A text of a request; "" for none."""
    if key not in request:
        return ""
    value = request[key]
    if not isinstance(value, str):
        raise RequestError(f"{key} is a text")
    return _checked(key, value)


def _checked(key: str, value: str) -> str:
    """A text that is not empty, and that a store can search for."""
    if not value.strip():
        raise _empty(key)
    try:
        value.encode()
    except UnicodeEncodeError:  # octets of a command line, or half of a surrogate pair in JSON
        raise RequestError(f"{key} is not UTF-8") from None
    return value


def _empty(key: str) -> RequestError:
    return RequestError(f"{key} is empty: give it a value or leave it out")
