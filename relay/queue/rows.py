"""Messages and recipients as the columns an engine keeps, and back. Pure.

What is searched or ordered by has a column of its own; the rest travels as one JSON
list, whose places have the order written here: new ones are added at its end, none
is ever taken out. What cannot be read back raises `BadRow`, so that one damaged row
costs one message and not the queue. Times are whole microseconds since 1970 in UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from relay.mail.envelope import Body, Notify, Ret
from relay.mail.jsontext import of_json, to_json
from relay.mail.outcome import Bounced, Deferred, Delivered, HopSession, Outcome
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import (
    LastAttempt,
    MessageSummary,
    QueuedMessage,
    QueuedRecipient,
    State,
    Terms,
)
from relay.queue.settle import Change

STATE_OF_NUMBER = (
    State.QUEUED,
    State.DEFERRED,
    State.HELD,
    State.DELIVERED,
    State.BOUNCED,
    State.EXPIRED,
    State.REMOVED,
)
STATE_NUMBER = {state: number for number, state in enumerate(STATE_OF_NUMBER)}
FINAL_NUMBER = STATE_NUMBER[State.DELIVERED]
"""States are kept as numbers; from this one on they are final."""

NOT_BEFORE_PATH = "$[8][0]"
"""`Terms.not_before` in `message_data`, as a JSON path."""

ATTEMPTS_PATH = "$[4]"
"""`QueuedRecipient.attempts` in `recipient_data`, as a JSON path."""

_STATES = dict(enumerate(STATE_OF_NUMBER))
_BODIES = {body.value: body for body in Body}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NO_SUMMARY = MessageSummary()
_PENDING_TEXT_CHARS = 4000
_PENDING_HOSTS = 10


class BadRow(ValueError):
    """A row that cannot be read back."""


def micros(at: datetime) -> int:
    """The instant as whole microseconds since 1970."""
    return (at - _EPOCH) // _MICROSECOND


def moment(at: int) -> datetime:
    """The instant of `micros`."""
    return _EPOCH + timedelta(0, 0, at)


def message_data(message: QueuedMessage) -> str:
    """What of a message has no column of its own."""
    summary = message.summary
    return to_json(
        [
            None
            if summary == _NO_SUMMARY
            else [
                summary.message_id,
                summary.from_,
                summary.to,
                summary.subject,
                summary.auto_submitted,
            ],
            message.body,
            message.eight_bit,
            message.smtputf8,
            message.ret,
            message.envid,
            message.origin,
            message.client,
            None if message.terms is None else _terms_data(message.terms),
            *_data_of_some(message),
        ]
    )


def _data_of_some(message: QueuedMessage) -> list[object]:
    """What most mail has not, as far as there is any."""
    is_known = bool(message.client_tls or message.client_user)
    if not (is_known or message.requiretls or message.tls_required_no or message.is_dotless):
        return []
    found: list[object] = [message.requiretls, message.tls_required_no]
    if is_known or message.is_dotless:
        found += [message.client_tls, message.client_user]
    return [*found, True] if message.is_dotless else found


def _terms_data(terms: Terms) -> list[object]:
    return [
        None if terms.not_before is None else micros(terms.not_before),
        None if terms.lifetime is None else terms.lifetime // _MICROSECOND,
        terms.tags,
        terms.variables,
        terms.is_test,
        terms.is_signed,
        *([terms.next_hop] if terms.next_hop else []),
    ]


def _terms_of(data: list[Any] | None) -> Terms | None:
    if data is None:
        return None
    not_before, lifetime, tags, variables, is_test, *later = data
    return Terms(
        not_before=None if not_before is None else moment(not_before),
        lifetime=None if lifetime is None else timedelta(microseconds=lifetime),
        tags=tuple(map(_text, tags)),
        variables=tuple((_text(name), _text(value)) for name, value in variables),
        is_test=bool(is_test),
        is_signed=bool(later[0]) if later else True,
        next_hop=_text(later[1]) if len(later) > 1 else "",
    )


def message_of(
    queue_id: str, reverse_path: str, arrived: int, size_bytes: int, data: str
) -> QueuedMessage:
    """The message its columns tell of."""
    try:
        summary, body, eight_bit, smtputf8, ret, envid, origin, client, *more = of_json(data)
        return QueuedMessage(
            queue_id=queue_id,
            reverse_path=_text(reverse_path),
            arrived=moment(arrived),
            size_bytes=int(size_bytes),
            summary=_NO_SUMMARY if summary is None else MessageSummary(*summary),
            body=_BODIES[body],
            eight_bit=bool(eight_bit),
            smtputf8=bool(smtputf8),
            ret=None if ret is None else Ret(ret),
            envid=_text(envid),
            origin=_text(origin),
            client=_text(client),
            terms=_terms_of(more[0]) if more else None,
            requiretls=len(more) > 1 and _flag(more[1]),
            tls_required_no=len(more) > 2 and _flag(more[2]),
            client_tls=_text(more[3]) if len(more) > 3 else "",
            client_user=_text(more[4]) if len(more) > 4 else "",
            is_dotless=len(more) > 5 and _flag(more[5]),
        )
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
        raise BadRow(f"the message row cannot be read: {exc}") from exc


def recipient_data(recipient: QueuedRecipient) -> str:
    """What of a recipient has no column of its own."""
    last = recipient.last
    return to_json(
        [
            recipient.address,
            _settings_data(recipient.settings),
            sorted(recipient.notify) if recipient.notify else None,
            recipient.orcpt,
            recipient.attempts,
            None
            if last is None
            else [micros(last.at), last.code, last.status, last.message, last.host, last.tls_unmet],
            None if recipient.first_attempt is None else micros(recipient.first_attempt),
            recipient.delay_notified,
        ]
    )


def recipient_of(
    index: int, domain: str, state: int, due: int | None, data: str
) -> QueuedRecipient:
    """The recipient its columns tell of."""
    try:
        address, settings, notify, orcpt, attempts, last, first_attempt, delay_notified, *_ = (
            of_json(data)
        )
        return QueuedRecipient(
            index=index,
            address=_text(address),
            domain=_text(domain),
            settings=_settings_of(*settings[0], *settings[1]),
            notify=frozenset(map(Notify, notify)) if notify else frozenset(),
            orcpt=_text(orcpt),
            state=_STATES[state],
            attempts=int(attempts),
            next_attempt=None if due is None else moment(due),
            last=None if last is None else LastAttempt(moment(last[0]), *last[1:]),
            first_attempt=None if first_attempt is None else moment(first_attempt),
            delay_notified=bool(delay_notified),
        )
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
        raise BadRow(f"the row of recipient {index} cannot be read: {exc}") from exc


def is_untried(data: str) -> bool:
    """Whether the data of a recipient say that it was never tried; not, if they are damaged."""
    try:
        return bool(of_json(data)[4] == 0)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


def wish_of(data: str) -> int | None:
    """When the sender of a message wants it to go out, by its data; None if they are damaged."""
    try:
        wish = of_json(data)[8][0]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return wish if isinstance(wish, int) else None


def pending_data(change: Change) -> str:
    """What a report says about a recipient, and its row does not."""
    outcome = change.outcome
    session = outcome.session
    return to_json(
        [
            change.code,
            change.status,
            change.reason,
            outcome.code,
            outcome.status,
            outcome.message[:_PENDING_TEXT_CHARS],
            outcome.description[:_PENDING_TEXT_CHARS],
            [host[:_PENDING_TEXT_CHARS] for host in outcome.hosts[:_PENDING_HOSTS]],
            None if session is None else [session.mx_host, session.mx_ip],
            isinstance(outcome, Deferred) and outcome.in_doubt,
        ]
    )


def pending_change(recipient: QueuedRecipient, data: str, *, is_done: bool = True) -> Change:
    """The change to be reported: a delay if not `is_done`. Of its session only the host is kept."""
    try:
        (
            code,
            status,
            reason,
            own_code,
            own_status,
            message,
            description,
            hosts,
            host,
            in_doubt,
            *_,
        ) = of_json(data)
        session = None if host is None else HopSession(_text(host[0]), _text(host[1]))
        facts = (_text(own_status), int(own_code), _text(message), _text(description), session)
        outcome: Outcome
        match recipient.state:
            case State.DELIVERED if is_done:
                outcome = Delivered(*facts, hosts=tuple(map(_text, hosts)))
            case State.BOUNCED if is_done:
                outcome = Bounced(*facts, hosts=tuple(map(_text, hosts)))
            case _:
                outcome = Deferred(*facts, hosts=tuple(map(_text, hosts)), in_doubt=bool(in_doubt))
        return Change(recipient, outcome, int(code), _text(status), reason=_text(reason))
    except (ValueError, TypeError, LookupError, RecursionError) as exc:
        raise BadRow(
            f"the pending report about recipient {recipient.index} cannot be read: {exc}"
        ) from exc


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


@lru_cache(maxsize=256)
def _settings_data(settings: TlsSettings) -> list[list[object]]:
    """Most mail shares a handful of settings."""
    return [
        [setting.value, setting.source, setting.rule]
        for setting in (settings.require_tls, settings.skip_verification)
    ]


@lru_cache(maxsize=256)
def _settings_of(
    require: bool,
    require_source: str,
    require_rule: str,
    skip: bool,
    skip_source: str,
    skip_rule: str,
) -> TlsSettings:
    return TlsSettings(
        Setting(_flag(require), Source(require_source), _text(require_rule)),
        Setting(_flag(skip), Source(skip_source), _text(skip_rule)),
    )


def _flag(value: object) -> bool:
    """A setting decides over TLS: what is not plainly true or false is damage, not a guess."""
    if not isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} where a setting belongs")
    return value
