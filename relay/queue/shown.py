"""Rows of messages and recipients as the operator sees them, also those that are damaged. Pure.

A damaged row costs its own facts and no more: what can be read of it is shown, and the reason why
the rest cannot.
"""

from __future__ import annotations

from relay.mail.jsontext import of_json
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.rows import STATE_OF_NUMBER, BadRow, message_of, moment, recipient_of
from relay.queue.store import ListedRecipient

_STRICTEST = TlsSettings(Setting(True, Source.DEFAULT), Setting(False, Source.DEFAULT))


def shown_message(
    queue_id: str, reverse_path: str, arrived: int, size_bytes: int, data: str
) -> QueuedMessage:
    """The message, or what can be read of a damaged row: the operator has to see it."""
    try:
        return message_of(queue_id, reverse_path, arrived, size_bytes, data)
    except BadRow as exc:
        return QueuedMessage(
            queue_id=str(queue_id),
            reverse_path=str(reverse_path),
            arrived=moment(arrived) if isinstance(arrived, int) else moment(0),
            size_bytes=size_bytes if isinstance(size_bytes, int) else 0,
            summary=MessageSummary(subject=f"({exc})"),
        )


def shown_recipient(
    index: int, domain: str, state: int, due: int | None, data: str
) -> QueuedRecipient:
    try:
        return recipient_of(index, domain, state, due, data)
    except BadRow as exc:
        known = isinstance(state, int) and 0 <= state < len(STATE_OF_NUMBER)
        return QueuedRecipient(
            index=index,
            address=f"({exc})",
            domain=str(domain),
            settings=_STRICTEST,
            state=STATE_OF_NUMBER[state] if known else State.HELD,
        )


def listed_recipient(
    index: int, domain: str, state: int, due: int | None, data: str
) -> ListedRecipient:
    try:
        address, _, _, _, attempts, last, *_ = of_json(data)
        if isinstance(address, str) and (due is None or isinstance(due, int)):
            shown = None if last is None else (whole(last[0]), *last[1:5])
            return ListedRecipient(address, STATE_OF_NUMBER[state], whole(attempts), due, shown)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    damaged = shown_recipient(index, domain, state, due, data)
    return ListedRecipient(damaged.address, damaged.state, 0, None, None)


def whole(value: object) -> int:
    return value if isinstance(value, int) else 0
