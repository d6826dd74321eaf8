"""The files in which messages go from one queue to another (`relay queue export`, `import`). Pure.

A file has one message, and is named after it:

    a line of JSON   what the queue keeps of the message beside its content
    content          its octets, as they are in the queue
    a line           the SHA-256 of all that is before it, in hexadecimal digits

`stamp` is drawn for each move of a message. A queue remembers the stamps of what came to it, so
that a file whose message it has had is known, though the message has left again meanwhile.

A call that a webhook waits for is a file of its own, without content.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from relay.mail.jsontext import JsonDocument, of_json, to_json
from relay.queue.api_state import PendingCall
from relay.queue.due import Place
from relay.queue.entry import State
from relay.queue.rows import (
    FINAL_NUMBER,
    STATE_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    message_of,
    micros,
    moment,
    pending_change,
    recipient_of,
)

MESSAGE_SUFFIX, CALL_SUFFIX = ".message", ".call"
"""How the names of the files end."""

END_BYTES = 66
"""The last line of a file, and the end of line before it."""

LONGEST_HEAD_BYTES = 256 * 1024 * 1024
"""A first line is no longer than this, whatever the number of recipients."""

_VERSION = 1
_MESSAGE, _CALL = "relay-queue-message", "relay-queue-call"
_QUEUE_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


class DamagedFile(ValueError):
    """A file is not as `relay queue export` has written it. The text says what is wrong."""


@dataclass(frozen=True, slots=True)
class MovedRecipient:
    """A recipient, in the columns of `relay.queue.rows`."""

    index: int
    domain: str
    state: int
    due: int | None
    data: str


@dataclass(frozen=True, slots=True)
class MovedReport:
    """What the sender is still to be told about a recipient."""

    index: int
    is_done: bool
    since: int
    report_after: int
    data: str


@dataclass(frozen=True, slots=True)
class MovedMessage:
    """A message without its content, in the columns of `relay.queue.rows`."""

    queue_id: str
    stamp: str
    reverse_path: str
    arrived: int
    size_bytes: int
    data: str
    recipients: Sequence[MovedRecipient]
    reports: Sequence[MovedReport] = ()

    @property
    def envelope(self) -> tuple[str, list[str]]:
        """Sender and recipients, as they stay while a message is in a queue. `BadRow`."""
        recipients = (
            recipient_of(one.index, one.domain, one.state, one.due, one.data)
            for one in self.recipients
        )
        return self.reverse_path, [one.address for one in recipients]

    @property
    def recipient_rows(self) -> list[tuple[object, ...]]:
        """Rows of an engine's table `recipient`, but for a lease: queue_id, idx, domain, state,
        place, due, data.
        """
        return [
            (self.queue_id, one.index, one.domain, one.state, *stands(one), one.data)
            for one in self.recipients
        ]

    @property
    def report_rows(self) -> list[tuple[object, ...]]:
        """Rows of `owed`: queue_id, idx, is_done, since, report_after, data."""
        return [
            (self.queue_id, one.index, one.is_done, one.since, one.report_after, one.data)
            for one in self.reports
        ]


def new_stamp() -> str:
    """A stamp that no other move of a message has."""
    return secrets.token_hex(8)


def end_of(digest: str) -> bytes:
    """The last line of a file. `digest`: the SHA-256 of all before it, in hexadecimal digits."""
    return f"\n{digest}\n".encode("ascii")


def head_of_message(message: MovedMessage) -> bytes:
    """The first line of a message's file."""
    return _line(
        {
            _MESSAGE: _VERSION,
            "queue-id": message.queue_id,
            "stamp": message.stamp,
            "sender": message.reverse_path,
            "arrived": message.arrived,
            "size": message.size_bytes,
            "message": message.data,
            "recipients": [
                {
                    "index": one.index,
                    "domain": one.domain,
                    "state": STATE_OF_NUMBER[one.state],
                    "due": one.due,
                    "recipient": one.data,
                }
                for one in message.recipients
            ],
            "reports": [
                {
                    "index": one.index,
                    "is-done": one.is_done,
                    "since": one.since,
                    "report-after": one.report_after,
                    "report": one.data,
                }
                for one in message.reports
            ],
        }
    )


def head_of_call(call: PendingCall, stamp: str) -> bytes:
    """The first line, and all, of a call's file."""
    return _line(
        {
            _CALL: _VERSION,
            "stamp": stamp,
            "url": call.url,
            "event": call.line,
            "due": micros(call.due),
            "attempts": call.attempts,
        }
    )


def _line(fields: JsonDocument) -> bytes:
    return f"{to_json(fields)}\n".encode("ascii")


def read_message(line: bytes) -> MovedMessage:
    """The message that a first line tells of. `DamagedFile`."""
    fields = _fields(line, _MESSAGE)
    try:
        message = MovedMessage(
            _text(fields["queue-id"]),
            _text(fields["stamp"]),
            _text(fields["sender"]),
            _number(fields["arrived"]),
            _number(fields["size"]),
            _text(fields["message"]),
            tuple(_recipient(one) for one in fields["recipients"]),
            tuple(_report(one) for one in fields["reports"]),
        )
        if not _QUEUE_ID.fullmatch(message.queue_id):
            raise DamagedFile("its queue id is none")
        check_rows(message)
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(error) from error
    return message


def _recipient(fields: JsonDocument) -> MovedRecipient:
    due = fields["due"]
    return MovedRecipient(
        _number(fields["index"]),
        _text(fields["domain"]),
        STATE_NUMBER[fields["state"]],
        None if due is None else _number(due),
        _text(fields["recipient"]),
    )


def _report(fields: JsonDocument) -> MovedReport:
    return MovedReport(
        _number(fields["index"]),
        bool(fields["is-done"]),
        _number(fields["since"]),
        _number(fields["report-after"]),
        _text(fields["report"]),
    )


def read_call(line: bytes) -> tuple[PendingCall, str]:
    """The call that a first line tells of, and its stamp. `DamagedFile`."""
    fields = _fields(line, _CALL)
    try:
        due = moment(_number(fields["due"]))
        attempts = _number(fields["attempts"])
        call = PendingCall(_text(fields["url"]), _text(fields["event"]), due, attempts)
        return call, _text(fields["stamp"])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(error) from error


def _fields(line: bytes, kind: str) -> JsonDocument:
    try:
        fields = of_json(line)
    except (ValueError, RecursionError):
        raise DamagedFile("its first line is no JSON") from None
    version = fields.get(kind) if isinstance(fields, dict) else None
    if version != _VERSION:
        newer = isinstance(version, int) and version > _VERSION
        raise DamagedFile("a newer relay wrote it" if newer else "no relay wrote it")
    found: JsonDocument = fields
    return found


def _damaged(error: Exception) -> DamagedFile:
    if isinstance(error, DamagedFile | BadRow):
        return DamagedFile(str(error))
    return DamagedFile(f"its first line cannot be read ({error})")


def check_rows(message: MovedMessage) -> None:
    """Raise `BadRow` if a row of a message cannot be read."""
    message_of(
        message.queue_id, message.reverse_path, message.arrived, message.size_bytes, message.data
    )
    recipients = {
        one.index: recipient_of(one.index, one.domain, one.state, one.due, one.data)
        for one in message.recipients
    }
    for one in message.reports:
        if one.index not in recipients:
            raise BadRow(f"there is a report about recipient {one.index}, and no such recipient")
        pending_change(recipients[one.index], one.data, is_done=one.is_done)
    if not recipients:
        raise BadRow("it has no recipient")


def part_damaged(messages: Iterable[MovedMessage]) -> tuple[list[MovedMessage], dict[str, str]]:
    """The messages whose rows can be read, and of each other, by queue id, why not."""
    whole: list[MovedMessage] = []
    damaged: dict[str, str] = {}
    for message in messages:
        try:
            check_rows(message)
        except BadRow as error:
            damaged[message.queue_id] = str(error)
        else:
            whole.append(message)
    return whole, damaged


def stands(one: MovedRecipient) -> tuple[Place, int | None]:
    """The place of a recipient that comes to a queue, or comes back, and when it is due."""
    if one.state >= FINAL_NUMBER or one.state == STATE_NUMBER[State.HELD]:
        return Place.ASIDE, None
    return Place.WAITING, one.due or 0


def said_of_leaving(count: int, target: str) -> str:
    """Of messages that an export which was cut short has left half moved, for the log."""
    return (
        f"{count} messages are on their way to {target.partition(' ')[2]} and are not delivered:"
        " run `relay queue export` again with that directory"
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} where a number belongs")
    return value
