"""The numbers of a queue's events, and up to which of them the log file has all. Pure.

An event gets its number in the transaction that commits it. The mark of the log waits for no sync:
a mark that is too low has events written to the log file once more.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.mail.event import Event, of_node
from relay.queue.batch import Row
from relay.queue.request import Request
from relay.queue.rows import micros
from relay.queue.store import StoredEvent


class EventNumbers:
    """`last`: the number that was given last; set back where a transaction is undone. `node`: whose
    events they are, where several nodes share the queue.
    """

    def __init__(self, node: str = "") -> None:
        self.last = 0
        self._node = node
        self._mark = self._mark_written = 0

    def load(self, last: int, mark: int) -> None:
        """What the database has."""
        self._mark = self._mark_written = mark
        self.last = max(last, mark)

    def rows_of(self, request: Request, events: Iterable[Event]) -> list[Row]:
        """The rows of a request's events, each with the next number."""
        rows = []
        at, at_micros = None, 0
        for one in events:
            event = of_node(one, self._node) if self._node else one
            if event.at is not at:  # events that are written together often have one time
                at, at_micros = event.at, micros(event.at)
            self.last = seq = self.last + 1
            request.stored.append(StoredEvent(seq, event))
            rows.append(
                (
                    seq,
                    at_micros,
                    event.name,
                    event.queue_id,
                    event.sender,
                    event.recipient,
                    event.id,
                    event.line,
                )
            )
        return rows

    # The mark of the log.

    @property
    def mark(self) -> int:
        """What `note_mark` was last given."""
        return self._mark

    def note_mark(self, seq: int) -> None:
        """Have the mark written, with a commit that is made anyway or soon."""
        self._mark = max(self._mark, seq)

    @property
    def mark_to_write(self) -> int | None:
        """The mark; None where it is written already."""
        return self._mark if self._mark != self._mark_written else None

    def mark_is_written(self, mark: int) -> None:
        """This mark is durable."""
        self._mark_written = mark
