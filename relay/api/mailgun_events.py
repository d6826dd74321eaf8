"""Mailgun's query for events: which events, in which order, and where the next page begins. Pure.

A request has parameters, or the token of a `paging` link of another page. The token contains the
parameters and a position. Some clients take the token from the path of a link, others from its
query, so each link has it in both places.

The search goes from `begin` to `end`, forward or backward in time; without both it goes back from
now. Behind the last event, `next` is an empty page. A client that follows the log asks for this
page again until there is a new event.

A filter is a word or a "phrase in quotes". `event` accepts `a OR b` and `NOT a`; `from`, `to`,
`subject` (a part of the text, in any case) and `tags` accept `a AND b`. A 400 with the name answers
any other expression, a filter without a value, an unknown event, and an unknown parameter.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from relay.api.mailgun_form import ApiError, shown
from relay.mail.dates import read_date
from relay.mail.jsontext import JsonDocument
from relay.queue.store import EventFilter, StoredEvent

MAX_LIMIT = 300
_DEFAULT_LIMIT = 100
_FARTHEST = 1 << 4096
"""A position is a sequence number; for several queues, one number that contains one of each."""

_FIELDS = {"from": "from", "to": "to", "subject": "subject", "severity": "severity", "tags": "tag"}
_FILTERS = frozenset({"begin", "end", "event", "recipient", "message-id", *_FIELDS})
_PARAMETERS = _FILTERS | {"ascending", "limit", "page", "pretty"}
"""`pretty` asks for an answer with line breaks: the values are the same."""

_EVENTS = frozenset({"accepted", "delivered", "failed"})
"""The events of the delivery log that the interface has."""

_MAILGUN_EVENTS = _EVENTS | {
    "clicked", "complained", "list_member_uploaded", "list_member_upload_error", "list_uploaded",
    "opened", "rejected", "stored", "unsubscribed",
}  # fmt: skip
"""With Mailgun's other events, of which there are none here. A client may ask for them."""

_SEVERITIES = frozenset({"temporary", "permanent"})
_PHRASE = re.compile(r'"[^"]*"')
_TERMS = re.compile(r'"([^"]*)"|([()])|([^\s()"]+)')
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class EventQuery:
    """`after`: the sequence number before the page, in its direction; 0 for the first page.

    `backward`: the page before `after`, which is searched in the other direction and reversed.
    """

    wanted: EventFilter
    limit: int = _DEFAULT_LIMIT
    ascending: bool = False
    after: int = 0
    backward: bool = False
    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def looks_ascending(self) -> bool:
        """The direction in which the store searches."""
        return self.ascending != self.backward


def read_query(parameters: Mapping[str, str], *, domain: str, token: str = "") -> EventQuery:
    """The query of parameters, or of the token of a page."""
    token = token or parameters.get("page", "")
    if token:
        return _of_token(token, domain)
    return _of_parameters(parameters, domain)


def links(query: EventQuery, found: Sequence[StoredEvent]) -> tuple[str, str]:
    """The tokens of the next and the previous page; `found` in the order in which it is shown."""
    if found:
        next_after, before = found[-1].seq, found[0].seq
    else:
        # An empty page is behind the end. The page on its other side includes the last event seen.
        step = 1 if query.ascending else -1
        edge = query.after
        next_after = edge - step if query.backward and edge else edge
        before = edge if query.backward or not edge else edge + step
    following = replace(query, after=next_after, backward=False)
    preceding = replace(query, after=before, backward=True)
    return _token(following), _token(preceding)


def item_of(line: str) -> JsonDocument:
    """An event in the interface: the object of the log, with the fields of Mailgun's events."""
    item: JsonDocument = json.loads(line)
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
    unknown = sorted(parameters.keys() - _PARAMETERS)
    if unknown:
        raise ApiError(400, f"{shown(unknown[0])} is not a filter of these events")
    empty = [name for name in sorted(_FILTERS & parameters.keys()) if not parameters[name].strip()]
    if empty:
        raise ApiError(400, f"{empty[0]} is empty; leave it out to filter by nothing")
    begin, end = _time(parameters, "begin"), _time(parameters, "end")
    ascending = _direction(parameters.get("ascending"), begin, end)
    low, high = (begin, end) if ascending else (end, begin)
    return EventQuery(
        wanted=EventFilter(
            begin=low,
            end=high,
            names=_names(parameters.get("event", "")),
            recipient=_one(parameters, "recipient"),
            sender_domain=domain,
            fields=_fields(parameters),
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
        at = datetime.fromtimestamp(float(text), UTC) if _is_number(text) else read_date(text)
    except (ValueError, OverflowError, OSError):
        raise ApiError(400, f"{name} is neither a time in seconds nor an RFC 5322 date") from None
    return max(at, _EARLIEST)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,9})?", text) is not None


def _names(text: str) -> frozenset[str]:
    """The events in an expression such as `failed OR delivered` or `NOT accepted`."""
    terms = _terms(text)
    words = [term.lower() for is_word, term in terms if is_word]
    between = [term.upper() for is_word, term in terms if not is_word]
    alternating = [is_word for is_word, _ in terms] == [n % 2 == 0 for n in range(len(terms))]
    if not terms:
        return frozenset()
    if unknown := set(words) - _MAILGUN_EVENTS:
        raise ApiError(400, f"event: there is no event {shown(min(unknown))}")
    if len(terms) == 2 and between == ["NOT"] and not terms[0][0]:
        return _EVENTS - set(words)
    if not (alternating and len(terms) % 2 and set(between) <= {"OR"}):
        raise _not_understood("event", text)
    return frozenset(words)


def _fields(parameters: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    fields = [
        (field, value)
        for name, field in _FIELDS.items()
        for value in _all_of(name, parameters.get(name, ""))
    ]
    severities = {value for field, value in fields if field == "severity"}
    if severities - _SEVERITIES or len(severities) > 1:
        raise ApiError(400, "severity is temporary or permanent")
    message_id = _one(parameters, "message-id").removeprefix("<").removesuffix(">")
    return (*fields, ("message-id", message_id)) if message_id else tuple(fields)


def _all_of(name: str, text: str) -> list[str]:
    """The values in `a AND b`, which all have to match; or one value, which may contain spaces."""
    if not text.strip():
        return []
    is_phrase = _PHRASE.fullmatch(text.strip()) is not None
    parts = [text] if is_phrase else re.split(r"\s+AND\s+", text)
    return [_phrase(name, part.strip(), text) for part in parts]


def _phrase(name: str, part: str, text: str) -> str:
    """A phrase in quotes, or words without an operator."""
    if _PHRASE.fullmatch(part):
        return part[1:-1]
    if not part or '"' in part or not all(is_word for is_word, _ in _terms(part)):
        raise _not_understood(name, text)
    return part


def _one(parameters: Mapping[str, str], name: str) -> str:
    """A value that has to match completely."""
    text = parameters.get(name, "").strip()
    if re.search(r"[\s,]", text) and not re.fullmatch(r'"[^"]*"@?\S*', text):
        raise _not_understood(name, text)
    return text[1:-1] if _PHRASE.fullmatch(text) else text


def _terms(text: str) -> list[tuple[bool, str]]:
    """The terms of an expression, each with whether it is a word or a phrase, and no operator."""
    found = []
    for phrase, bracket, word in _TERMS.findall(text):
        found.append((not bracket and word not in ("AND", "OR", "NOT"), phrase or bracket or word))
    return found


def _not_understood(name: str, text: str) -> ApiError:
    return ApiError(400, f"{name}: this filter is not understood: {shown(text)}")


def _limit(text: str | None) -> int:
    if not text:
        return _DEFAULT_LIMIT
    if not re.fullmatch(r"[0-9]{1,9}", text) or not int(text):
        raise ApiError(400, f"limit is a number from 1 to {MAX_LIMIT}")
    return min(int(text), MAX_LIMIT)


def _token(query: EventQuery) -> str:
    """Parameters, position and direction of a page as a text that fits into a path."""
    page = [query.parameters, query.after, query.backward]
    octets = json.dumps(page, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def _of_token(token: str, domain: str) -> EventQuery:
    """The page of a token, which is checked like parameters, because a stranger may write one."""
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
