"""Mailgun's events query: which events, in which direction, and where the next page begins. Pure.

A page is asked for by parameters, or by the token of another page's `paging` links, which holds
all of them and a position. Clients follow the links in two ways, by the last step of the path
and by the parameters of the query, so each link has its token in both.

`begin` is where the search begins and `end` where it ends, whichever is later in time; without
either it goes back from now. At the end of the events `next` is an empty page, which is asked for
again until there is something new: so one follows the log.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from relay.api.mailgun import ApiError
from relay.queue.store import EventFilter, StoredEvent

__all__ = ["EventQuery", "item_of", "links", "read_query"]

MAX_LIMIT = 300
_DEFAULT_LIMIT = 100
_FARTHEST = 1 << 4096
"""Positions are the store's numbers; that of several queues has a part for each of them."""

_TOLD = {"from": "from", "to": "to", "subject": "subject", "severity": "severity", "tags": "tag"}
_OPERATORS = re.compile(r"\s+(?:OR|or|AND|and)\s+")
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EventQuery:
    """`after`: the last sequence number that is not wanted, in the direction; 0 at the first page.

    `backward`: the page before: looked for the other way, and turned round.
    """

    wanted: EventFilter
    limit: int = _DEFAULT_LIMIT
    ascending: bool = False
    after: int = 0
    backward: bool = False
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def looks_ascending(self) -> bool:
        """The direction in which the store is to look."""
        return self.ascending != self.backward


def read_query(parameters: Mapping[str, str], *, domain: str, token: str = "") -> EventQuery:
    """The query that parameters or a page's token ask for."""
    token = token or parameters.get("page", "")
    if token:
        return _of_token(token, domain)
    return _of_parameters(parameters, domain)


def links(query: EventQuery, found: Sequence[StoredEvent]) -> tuple[str, str]:
    """The tokens of the next and the previous page; `found` in the order in which it is shown."""
    if found:
        next_after, before = found[-1].seq, found[0].seq
    else:
        # On the far side of the end: what is on the near side includes the last one seen.
        step = 1 if query.ascending else -1
        edge = query.after
        next_after = edge - step if query.backward and edge else edge
        before = edge if query.backward or not edge else edge + step
    following = replace(query, after=next_after, backward=False)
    preceding = replace(query, after=before, backward=True)
    return _token(following), _token(preceding)


def item_of(line: str) -> dict[str, Any]:
    """An event as the interface shows it: the log's own object, with what every item of theirs has."""
    item: dict[str, Any] = json.loads(line)
    item.setdefault("tags", [])
    item.setdefault("user-variables", {})
    item.setdefault("campaigns", [])
    flags = {
        "is-routed": False,
        "is-authenticated": True,
        "is-system-test": False,
        "is-test-mode": False,
    }
    item["flags"] = flags | item.get("flags", {})
    status = item.get("delivery-status")
    if status is not None and status.get("mx-host") is not None:
        status.setdefault("mxhost", status["mx-host"])
    return item


def _of_parameters(parameters: Mapping[str, str], domain: str) -> EventQuery:
    begin, end = _time(parameters, "begin"), _time(parameters, "end")
    ascending = _direction(parameters.get("ascending"), begin, end)
    low, high = (begin, end) if ascending else (end, begin)
    return EventQuery(
        wanted=EventFilter(
            begin=low,
            end=high,
            names=_names(parameters.get("event", "")),
            recipient=parameters.get("recipient", ""),
            sender_domain=domain,
            told=_told(parameters),
        ),
        limit=_limit(parameters.get("limit")),
        ascending=ascending,
        parameters=tuple(
            sorted((name, value) for name, value in parameters.items() if name != "page")
        ),
    )


def _direction(word: str | None, begin: datetime | None, end: datetime | None) -> bool:
    """Whether the search goes forward in time."""
    if word:
        if word.lower() not in ("yes", "no", "true", "false"):
            raise ApiError(400, "ascending is neither yes nor no")
        return word.lower() in ("yes", "true")
    if begin is not None:
        return end is None or begin <= end
    return False


def _time(parameters: Mapping[str, str], name: str) -> datetime | None:
    """An instant as seconds since 1970 or a date of RFC 5322."""
    text = parameters.get(name, "").strip()
    if not text:
        return None
    try:
        at = (
            datetime.fromtimestamp(float(text), UTC)
            if _is_number(text)
            else parsedate_to_datetime(text)
        )
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return max(at.astimezone(UTC), _EARLIEST)
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        raise ApiError(400, f"{name} is neither a time in seconds nor an RFC 5322 date") from None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,9})?", text) is not None


def _names(text: str) -> frozenset[str]:
    """`failed OR delivered`: the kinds of events that are meant."""
    return frozenset(
        word.strip().strip('"').lower() for word in _OPERATORS.split(text) if word.strip()
    )


def _told(parameters: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    told = [
        (field, parameters[name].strip('"'))
        for name, field in _TOLD.items()
        if parameters.get(name)
    ]
    if parameters.get("message-id"):
        told.append(("message-id", parameters["message-id"].strip("<>")))
    return tuple(told)


def _limit(text: str | None) -> int:
    if not text:
        return _DEFAULT_LIMIT
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise ApiError(400, f"limit is a number from 1 to {MAX_LIMIT}")
    return min(int(text), MAX_LIMIT)


def _token(query: EventQuery) -> str:
    """A page in a form that fits into a path: parameters, position, direction."""
    said = [query.parameters, query.after, query.backward]
    octets = json.dumps(said, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def _of_token(token: str, domain: str) -> EventQuery:
    """The page of a token; it is a stranger's text, and is read as carefully as parameters are."""
    try:
        octets = base64.b64decode(
            token.encode("ascii") + b"==="[: -len(token) % 4], b"-_", validate=True
        )
        parameters, after, backward = json.loads(octets)
        pairs = {str(name): value for name, value in parameters}
        if not all(isinstance(value, str) for value in pairs.values()):
            raise ValueError("not a parameter")
        if type(after) is not int or abs(after) >= _FARTHEST or not isinstance(backward, bool):
            raise ValueError("not a position")
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise ApiError(400, "page is not a page of this listing") from None
    return replace(_of_parameters(pairs, domain), after=after, backward=backward)
