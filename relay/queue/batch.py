"""The rows that a new message, a result or a report writes, whichever engine writes them. Pure.

A transaction writes the rows of many requests together, table by table. Times are whole
microseconds since 1970; what is not searched for is JSON (`relay.queue.rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import chain
from typing import Any, TypeVar

from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.due import Place, first_place, settled_place
from relay.queue.rows import STATE_NUMBER, message_data, micros, pending_data, recipient_data
from relay.queue.settle import Settlement
from relay.queue.store import NewMessage, PendingReport
from relay.queue.tls_sessions import ReportResult

T = TypeVar("T")

Row = tuple[Any, ...]

FinishedReport = tuple[date, str, str, ReportResult]
"""A report on TLS: its day, domain, place and result."""


@dataclass(slots=True, eq=False)
class Rows:
    """What one request writes. `takes_in`: it is mail from outside, refused when room gets short.

    messages      queue_id, arrived, size_bytes, number of recipients, in_file, reverse_path, data,
                  content
    recipients    queue_id, index, domain, state, place, due, data
    updates       queue_id, index, state, place, due, data: of claimed recipients
    finished      queue_id, number of recipients: all were claimed, and all became final
    pending       queue_id, index, is_done, since, report_after, data: to be reported later
    reported      queue_id, index, is_done: rows of `pending` that are reported now
    perhaps_done  messages to be removed if no recipient is open and nothing is pending
    settled       the message of which the result tells whether its pending report is due now
    settlement    the result that these rows are of
    sessions      sessions that reports on TLS count, and when they are counted
    tls_reports   day, domain, place, result: reports on TLS that are finished now
    """

    events: Sequence[Event] = ()
    takes_in: bool = False
    size_bytes: int = 0
    messages: list[Row] = field(default_factory=list)
    recipients: list[Row] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)
    finished: list[tuple[str, int]] = field(default_factory=list)
    pending: list[Row] = field(default_factory=list)
    reported: list[tuple[str, int, bool]] = field(default_factory=list)
    perhaps_done: list[str] = field(default_factory=list)
    settled: str = ""
    settlement: Settlement | None = None
    sessions: tuple[datetime, Sequence[TlsSession]] | None = None
    tls_reports: list[FinishedReport] = field(default_factory=list)

    @property
    def token(self) -> int:
        """The lease that the result's claim was made under, 0 for none."""
        return self.settlement.entry.token if self.settlement is not None else 0

    def add_message(self, new: NewMessage, *, claimed: Collection[int], in_file: bool) -> None:
        """A new message, with the indices of the recipients that are handed over at once."""
        message = new.message
        queue_id = message.queue_id
        self.messages.append(
            (
                queue_id,
                micros(message.arrived),
                message.size_bytes,
                len(new.recipients),
                in_file,
                message.reverse_path,
                message_data(message),
                None if in_file else new.content,
            )
        )
        for one in new.recipients:
            place, due = first_place(message, one)
            self.recipients.append(
                (
                    queue_id,
                    one.index,
                    one.domain,
                    STATE_NUMBER[one.state],
                    Place.CLAIMED if one.index in claimed else place,
                    None if due is None else micros(due),
                    recipient_data(one),
                )
            )
        if all(one.state.is_final for one in new.recipients):
            self.perhaps_done.append(queue_id)  # no recipient is to get it: test mode
        self.size_bytes += len(new.content)

    def add_settlement(self, settlement: Settlement) -> None:
        """The results of an attempt. The message is removed if all its recipients are final."""
        self.settlement = settlement
        entry, changes = settlement.entry, settlement.changes
        queue_id = entry.message.queue_id
        all_final = all(change.recipient.state.is_final for change in changes)
        if (
            all_final
            and entry.total
            and len(changes) == entry.total
            and not _may_be_pending(settlement)
        ):
            self.finished.append((queue_id, entry.total))
            return
        for change in changes:
            one = change.recipient
            place, due = settled_place(one, settlement.at)
            at = None if due is None else micros(due)
            row = (queue_id, one.index, STATE_NUMBER[one.state], place, at, recipient_data(one))
            self.updates.append(row)
        self._add_pending(settlement, settlement.report_after or settlement.at)
        self.settled = queue_id
        if any(change.recipient.state.is_final for change in changes):
            self.perhaps_done.append(queue_id)

    def _add_pending(self, settlement: Settlement, report_after: datetime) -> None:
        queue_id = settlement.entry.message.queue_id
        since, until = micros(settlement.at), micros(report_after)
        for change in settlement.pending:
            one = change.recipient
            self.pending.append(
                (queue_id, one.index, one.state.is_final, since, until, pending_data(change))
            )

    def add_report(self, pending: PendingReport) -> None:
        """That a pending report is sent."""
        queue_id = pending.message.queue_id
        self.reported += [(queue_id, change.recipient.index, True) for change in pending.done]
        self.reported += [(queue_id, change.recipient.index, False) for change in pending.delayed]
        self.perhaps_done.append(queue_id)


def _may_be_pending(settlement: Settlement) -> bool:
    """Whether something is pending, or was: of recipients that are not final, that can only be a
    delay.
    """
    return bool(settlement.pending) or any(
        one.recipient.delay_notified for one in settlement.changes
    )


def joined(parts: Iterable[list[T]]) -> list[T]:
    """The rows of all parts."""
    return list(chain.from_iterable(parts))
