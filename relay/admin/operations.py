"""What the operator can ask and change: one implementation for socket, HTTP, page and CLI.

The command line uses it through the control socket or, where no relay is running, with a store that
is opened for reading. Every function returns plain values, with the names of the relay's JSON.

    list_queue, show_message                    look at the queue
    change_in_steps                             retry, hold, release, remove
    find_events, follow_events                  the delivery log in the store

The removal of mail has an event like any other result, which commits with the change.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Protocol, TypeVar

from relay.mail.jsontext import JsonObject
from relay.queue.entry import QueuedRecipient, State
from relay.queue.nodes import Node
from relay.queue.rows import micros
from relay.queue.store import (
    EventFilter,
    EventPage,
    ListedMessage,
    ListedRecipient,
    QueueControl,
    QueuedItem,
    QueueFilter,
    QueueView,
    more_follows,
)
from relay.queue.verbs import VERBS
from relay.report import deliverylog
from relay.route.choice import said
from relay.route.forecast import Forecast, sentence
from relay.route.next_hop import Host, NoRoute, RouteChoice

T = TypeVar("T")

PAGE = 500
HEADER_BYTES = 64 * 1024
_LATEST = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())


class PageAfter(Protocol[T]):
    """Reads a page of a listing, by key."""

    async def __call__(self, *, after: str) -> tuple[list[T], str | None]: ...


async def list_queue(
    view: QueueView, wanted: QueueFilter, *, now: datetime
) -> AsyncIterator[list[ListedMessage]]:
    """The messages that match, oldest first, in pages, because there may be millions."""
    for named in _named(wanted):
        after: str | None = ""
        while after is not None:
            page = await view.list_messages(named, now=now, after=after, limit=PAGE)
            if page:
                yield page
            after = page[-1].queue_id if more_follows(page, PAGE) else None


async def pages_of(page_after: PageAfter[T]) -> AsyncIterator[list[T]]:
    """All pages of a listing. `page_after`: the page behind a key, and the key for the next."""
    after: str | None = ""
    while after is not None:
        page, after = await page_after(after=after)
        yield page


def page_as_json(page: Sequence[ListedMessage]) -> list[JsonObject]:
    """Messages of the queue as `relay queue list --json` has them."""
    return [_listed_as_json(message) for message in page]


def node_as_json(node: Node) -> JsonObject:
    """A node as `relay queue nodes --json` has it."""
    return {
        "name": node.name,
        "state": node.state.value,
        "host": node.host,
        "version": node.version,
        "expires-in": None if node.expires_seconds is None else round(node.expires_seconds, 1),
        "claims": node.claims,
        "policy-digest": node.policy_digest,
    }


def _named(wanted: QueueFilter) -> Iterator[QueueFilter]:
    """The filter. Where it names very many messages: one filter for each part of them."""
    if not wanted.queue_ids:
        yield wanted
    ids = sorted(wanted.queue_ids)
    for start in range(0, len(ids), PAGE):
        yield replace(wanted, queue_ids=frozenset(ids[start : start + PAGE]))


async def show_message(view: QueueView, queue_id: str) -> JsonObject | None:
    """A message of the queue with its settings and header section; None if there is none."""
    item = await view.find_message(queue_id)
    if item is None:
        return None
    message = item.message
    header = await view.read_header(queue_id, limit_bytes=HEADER_BYTES)
    return {
        **item_as_json(item),
        "origin": message.origin,
        "client": message.client,
        "client-tls": message.client_tls,
        "client-user": message.client_user,
        "next-hop": message.next_hop or None,
        "message": {
            "message-id": message.summary.message_id,
            "from": message.summary.from_,
            "to": message.summary.to,
            "subject": message.summary.subject,
        },
        "settings": [_settings_as_json(recipient) for recipient in item.recipients],
        "header": header.decode("utf-8", "backslashreplace"),
    }


@dataclass(frozen=True, slots=True)
class Changed:
    """The result of a verb so far: how many recipients changed, and which ids are unknown."""

    recipients: int
    unknown: Sequence[str] = ()

    def as_json(self) -> JsonObject:
        return {"changed": self.recipients, "unknown": self.unknown}


async def change_in_steps(
    queue: QueueControl, wanted: QueueFilter, *, verb: str, now: datetime
) -> AsyncIterator[Changed]:
    """Do a verb of the operator to all messages that match. The last value is the result.

    Each step is one short transaction, so that a change of a million messages does not stop the
    mail, and a crash leaves all steps before it done.
    """
    if verb not in VERBS:
        raise ValueError(f"no such verb: {verb}")
    event_of = partial(deliverylog.removed, now=now) if verb == "remove" else None
    unknown = set(wanted.queue_ids)
    changed = 0
    for named in _named(wanted):
        after: str | None = ""
        while after is not None:
            step = await queue.change(named, verb=verb, now=now, after=after, event_of=event_of)
            after = step.until
            changed += step.changed
            unknown -= step.found
            if after is not None:
                yield Changed(changed)
    yield Changed(changed, sorted(unknown))


async def find_events(
    view: QueueView, wanted: EventFilter, *, limit: int | None = None
) -> AsyncIterator[tuple[int, str]]:
    """Sequence number and line of each event that matches, oldest first.

    `limit`: only so many of the newest.
    """
    if limit is not None:
        latest = await view.find_events(wanted, EventPage(limit=limit, ascending=False))
        for stored in reversed(latest):
            yield stored.seq, stored.event.line
        return
    after = 0
    while page := await view.find_events(wanted, EventPage(after, PAGE)):
        for stored in page:
            yield stored.seq, stored.event.line
        after = page[-1].seq


async def follow_events(
    view: QueueView, wanted: EventFilter, *, after: int, more: Callable[[], Awaitable[None]]
) -> AsyncIterator[str]:
    """The lines of events as they commit, without end. `more` waits between two looks."""
    while True:
        page = await view.find_events(wanted, EventPage(after, PAGE))
        for stored in page:
            yield stored.event.line
            after = stored.seq
        if not page:
            await more()


def forecast_as_json(forecast: Forecast) -> JsonObject:
    """What would happen to a message. `tls`, `certificate-verified` and `downgrade` are as in the
    delivery log.
    """
    return {
        "situation": forecast.situation.value if forecast.situation else None,
        "step": forecast.step.action.value,
        "tls": forecast.tls,
        "certificate-verified": forecast.verified,
        "downgrade": forecast.downgrade.value if forecast.downgrade else None,
        "unmet": forecast.step.unmet,
        "if-last": forecast.at_last,
        "text": sentence(forecast),
    }


def host_as_json(host: Host) -> JsonObject:
    """A mail host."""
    return {
        "host": host.name,
        "address": host.address,
        "port": host.port,
        "preference": host.preference,
        "tls": host.tls.value,
        "login": host.credentials is not None,
    }


def choice_as_json(choice: RouteChoice) -> JsonObject:
    """Which next hop a message takes, and by which rule. `next-hop`: null for the MX hosts."""
    return {
        "next-hop": choice.next_hop or None,
        "rule": choice.rule.value,
        "pattern": choice.pattern or None,
        "text": said(choice),
    }


_TLSA = {
    "usable": "usable",
    "unusable": "none usable: TLS is required, with any certificate",
    "none": "none",
    "insecure": "none can be trusted: the host's addresses are not signed (DNSSEC)",
    "failed": "not known: the look-up failed",
    "ignored": "not looked up, by the configuration",
    "off": "not looked up: no resolver that validates is trusted (resolver.trust_ad)",
}


def tlsa_text(state: str) -> str:
    """The result of the look-up of a host's TLSA records in words, by its state in the JSON."""
    return _TLSA.get(state, state)


def no_route_as_json(route: NoRoute) -> JsonObject:
    """The reason why there is no host to try."""
    outcome = route.outcome
    return {
        "outcome": type(outcome).__name__.lower(),
        "code": outcome.code,
        "status": outcome.status,
        "description": outcome.description or outcome.message,
    }


def item_as_json(item: QueuedItem) -> JsonObject:
    """A message of the queue."""
    return _listed_as_json(listed(item))


def listed(item: QueuedItem) -> ListedMessage:
    """A message in the form that a listing has."""
    message = item.message
    recipients = [_listed_recipient(one) for one in item.recipients]
    arrived = micros(message.arrived)
    return ListedMessage(
        message.queue_id, message.reverse_path, arrived, message.size_bytes, recipients
    )


def _listed_recipient(recipient: QueuedRecipient) -> ListedRecipient:
    due, last = recipient.next_attempt, recipient.last
    return ListedRecipient(
        recipient.address,
        recipient.state,
        recipient.attempts,
        micros(due) if due else None,
        (micros(last.at), last.code, last.status, last.message, last.host) if last else None,
    )


def _listed_as_json(message: ListedMessage) -> JsonObject:
    return {
        "queue-id": message.queue_id,
        "state": message_state(message.recipients).value,
        "sender": message.reverse_path,
        "size": message.size_bytes,
        "arrived": _timestamp(message.arrived),
        "recipients": [
            {
                "address": address,
                "state": state.value,
                "attempts": attempts,
                "next-attempt": None if due is None else _timestamp(due),
                "last": _last_as_json(*last) if last else None,
            }
            for address, state, attempts, due, last in message.recipients
        ],
    }


def message_state(recipients: Sequence[ListedRecipient]) -> State:
    """The state of a message: that of the recipient that is farthest from its end."""
    states = {recipient.state for recipient in recipients}
    for state in (State.QUEUED, State.DEFERRED, State.HELD):
        if state in states:
            return state
    return recipients[0].state if recipients else State.REMOVED


def timestamp(at: datetime) -> str:
    """RFC 3339, in UTC, to the second."""
    return f"{at.astimezone(UTC).isoformat()[:19]}Z"


def _timestamp(at: int) -> str:
    """RFC 3339, of microseconds since 1970."""
    return _second(at // 1_000_000)


@lru_cache(maxsize=4096)
def _second(at: int) -> str:
    """Cached: messages that are listed together often arrived in the same second."""
    return timestamp(datetime.fromtimestamp(min(max(at, 0), _LATEST), UTC))


def _last_as_json(at: int, code: int, status: str, message: str, host: str) -> JsonObject:
    return {"at": _timestamp(at), "code": code, "status": status, "message": message, "host": host}


def _settings_as_json(recipient: QueuedRecipient) -> JsonObject:
    require, skip = recipient.settings.require_tls, recipient.settings.skip_verification
    return {
        "recipient": recipient.address,
        "require-tls": require.value,
        "require-tls-source": require.source.value,
        "require-tls-rule": require.rule,
        "skip-verification": skip.value,
        "skip-verification-source": skip.source.value,
        "skip-verification-rule": skip.rule,
    }
