"""Answers about messages and recipients, made of the rows that an engine found. Pure.

A message is the columns queue_id, reverse_path, arrived, size_bytes, data; a recipient is the
columns index, domain, state, due, data (`relay.queue.rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from relay.mail.event import Event
from relay.queue.entry import QueuedMessage, State
from relay.queue.rows import (
    FINAL_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    message_of,
    moment,
    pending_change,
    recipient_of,
)
from relay.queue.shown import listed_recipient, shown_message, whole
from relay.queue.store import (
    PAGE_RECIPIENTS,
    EventOfChange,
    ListedMessage,
    ListedRecipient,
    PendingReport,
    SpoolError,
    StoredEvent,
)

Row = Sequence[Any]

EVENT_COLUMNS = "seq, at, name, queue_id, sender, recipient, id, line"
"""Of the delivery log, as `stored_event` reads them."""


def ids_of_page(
    rows: Iterable[tuple[str, int]], limit: int, end: str | None
) -> tuple[list[str], str | None]:
    """The ids of a page and where it ends: at its last message if it is full, else at `end`.

    `rows`: queue_id, number of recipients. A page has not more messages than have
    `PAGE_RECIPIENTS` together.
    """
    ids: list[str] = []
    recipients = 0
    for queue_id, count in rows:
        ids.append(queue_id)
        recipients += count
        if len(ids) == limit or recipients >= PAGE_RECIPIENTS:
            return ids, queue_id
    return ids, end


def listed_messages(rows: Iterable[Row]) -> list[ListedMessage]:
    """Messages in a listing. `rows`: queue_id, reverse_path, arrived, size_bytes, and a recipient
    of it, or None five times. A listing spends nearly all its time here, so nothing is made that
    is not shown.
    """
    found: list[ListedMessage] = []
    recipients: list[ListedRecipient] = []
    for queue_id, reverse_path, arrived, size_bytes, *columns in rows:
        if not found or found[-1].queue_id != queue_id:
            recipients = []
            found.append(
                ListedMessage(
                    queue_id, str(reverse_path), whole(arrived), whole(size_bytes), recipients
                )
            )
        if columns[0] is not None:
            recipients.append(listed_recipient(*columns))
    return found


def events_of_rows(rows: Iterable[Row], event_of: EventOfChange) -> dict[tuple[str, int], Event]:
    """The event of each recipient; of a damaged row there is none. `rows`: a message, and a
    recipient of it.
    """
    events: dict[tuple[str, int], Event] = {}
    message: QueuedMessage | None = None
    for row in rows:
        if message is None or row[0] != message.queue_id:
            message = shown_message(*row[:5])
        with suppress(BadRow):
            events[row[0], row[5]] = event_of(message, recipient_of(*row[5:]))
    return events


def report_of_rows(message: Row | None, rows: Sequence[Row]) -> PendingReport | None:
    """What the sender of a message is still to be told. `rows`: whether the recipient is done, the
    data of what is pending, and the recipient.
    """
    if not rows or message is None:
        return None
    try:
        done, delayed = (
            tuple(
                pending_change(recipient_of(*row[2:]), row[1], is_done=kind)
                for row in rows
                if row[0] == kind
            )
            for kind in (True, False)
        )
        return PendingReport(message_of(*message), done, delayed)
    except BadRow as exc:
        raise SpoolError(f"{message[0]}: {exc}") from exc


def state_counts(counted: Mapping[int, int]) -> dict[State, int]:
    """The recipients in each state that is not final, of the numbers by the state's number."""
    return {STATE_OF_NUMBER[number]: counted.get(number, 0) for number in range(FINAL_NUMBER)}


def stored_event(row: Row) -> StoredEvent:
    """An event of the delivery log."""
    seq, at, name, queue_id, sender, recipient, event_id, line = row
    return StoredEvent(seq, Event(event_id, moment(at), name, queue_id, sender, recipient, line))


def numbers_behind(
    low: int | None, high: int | None, after: int, *, ascending: bool
) -> tuple[int, int]:
    """The first and the last number of a search that goes on behind `after`, 0 where it begins; of
    what there is from `low` to `high`. If the first is larger, there is nothing.
    """
    if low is None or high is None:
        return 1, 0
    if not after:
        return low, high
    return (max(low, after + 1), high) if ascending else (low, min(high, after - 1))
