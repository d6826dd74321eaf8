"""The text of a delivery status notification, for people. Pure.

It says what happened, what the host answered, and what the reader can do. Texts of a peer are put
on one line and indented, so that they cannot be taken for the relay's own.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from email.utils import format_datetime

from relay.mail.outcome import Code, Deferred
from relay.mail.printable import one_line
from relay.queue.entry import QueuedMessage, State
from relay.queue.settle import Change, Report, ReportKind

_MAX_VALUE_CHARS = 4 * 940
"""Characters of a peer's text that are looked at."""

_MAX_REPLY_LINES = 20
_MAX_NAMED = 100
"""Recipients that the text for people names; the part for programs has them all."""

WIDTH = 76
"""Columns of a line."""

_OPENING = {
    ReportKind.FAILED: "Your message could not be delivered to the recipients below. "
    "It will not be tried again.",
    ReportKind.DELAYED: "Your message has not reached the recipients below yet. It is still "
    "being tried; you need not send it again. If it cannot be delivered you will get another "
    "report.",
    ReportKind.RELAYED: "Your message was handed to the mail hosts of the recipients below. They "
    "do not report deliveries, so you will get another report only if the delivery fails.",
}

_ADVICE = (  # the first whose pattern matches the status is taken (RFC 3463 §3)
    (
        r"5\.7\.[45]",
        "This message may only be sent over a protected connection, and none of the recipient's "
        "mail hosts offered one that is good enough. Ask the recipient's postmaster to repair its "
        "TLS. If the message needs no protection, send it again without requiring TLS.",
    ),
    (
        r".\.4\.7",
        "The recipient's mail hosts did not accept it in any attempt. Send it again later, or "
        "reach the recipient some other way.",
    ),
    (
        r".\.1\.(?:10|2)|.\.4\.4",
        "The recipient's domain accepts no mail, or does not exist. Check the part after the @.",
    ),
    (r".\.1\.", "Check the address for mistakes; the recipient may have a new one."),
    (
        r".\.2\.2|.\.2\.3",
        "The mailbox is full, or the message too large for it. Tell the recipient.",
    ),
    (
        r".\.3\.4",
        "The message is too large for the recipient's mail host. Send it in smaller parts.",
    ),
    (r".\.2\.", "The mailbox accepts no mail at the moment. Reach the recipient some other way."),
    (
        r".\.7\.",
        "The recipient's mail host refused it by a rule of its own. Its answer may say which; its "
        "postmaster can tell you more.",
    ),
    (
        r".\.6\.",
        "The recipient's mail host cannot handle the form of this message. Its answer may say what"
        " is wrong.",
    ),
    (r"", "If the answer does not help you, pass this report on to your postmaster."),
)


def text_for_people(report: Report, hostname: str) -> Iterator[str]:
    """The lines of the text, of at most 76 characters."""
    message = report.entry.message
    yield from _wrapped(f"This is the mail system at {hostname}.")
    yield ""
    yield from _wrapped(_OPENING[report.kind])
    if report.kind is ReportKind.DELAYED and report.retry_until is not None:
        yield ""
        yield from _wrapped(f"It will be tried until {format_datetime(report.retry_until)}.")
    yield ""
    for name, value in (
        ("Subject", message.summary.subject),
        ("Sent", format_datetime(message.arrived)),
        ("Message-ID", message.summary.message_id),
        ("Queue ID", message.queue_id),
    ):
        if value:
            yield from _wrapped(f"{name}: {value}", "    ")
    for change in report.changes[:_MAX_NAMED]:
        yield ""
        yield from _about(report.kind, message, change)
    if len(report.changes) > _MAX_NAMED:
        yield ""
        more = len(report.changes) - _MAX_NAMED
        yield f"And {more} more recipients, listed in the report for programs."
    yield ""
    yield from _wrapped("A report for programs and the header of your message are attached.")


def _about(kind: ReportKind, message: QueuedMessage, change: Change) -> Iterator[str]:
    """The lines about one recipient."""
    outcome = change.outcome
    yield from _wrapped(f"<{change.recipient.address}>")
    if change.recipient.state is State.EXPIRED:
        days = (
            change.recipient.last.at if change.recipient.last else message.arrived
        ) - message.arrived
        yield from _wrapped(f"Given up after {max(days.days, 0)} days. The last attempt:", "    ")
    yield from _reply_lines(change)
    if outcome.description:
        yield from _wrapped(outcome.description, "    ")
    if isinstance(outcome, Deferred) and outcome.in_doubt:
        yield from _wrapped(
            "The host had received all of the message, so it may have arrived.", "    "
        )
    if outcome.hosts and kind is not ReportKind.RELAYED:
        yield "    Other hosts that were tried:"
        for host in outcome.hosts[:_MAX_REPLY_LINES]:
            yield from _wrapped(host, "        ")
    if kind is ReportKind.FAILED:
        yield from _wrapped(f"What to do: {_advice(change.status)}", "    ")


def _reply_lines(change: Change) -> Iterator[str]:
    """The host's reply, line by line."""
    outcome, session = change.outcome, change.outcome.session
    if not is_reply(outcome.code):
        return
    host = f"{session.mx_host} [{session.mx_ip}]" if session is not None else "The mail host"
    yield from _wrapped(f"{host} answered:", "    ")
    for line in f"{outcome.code} {outcome.message}"[:4000].splitlines()[:_MAX_REPLY_LINES]:
        yield from _wrapped(line, "        ")


def _advice(status: str) -> str:
    return next(advice for pattern, advice in _ADVICE if re.match(pattern, status))


def _wrapped(text: str, indent: str = "") -> list[str]:
    """A paragraph in lines of at most 76 characters."""
    line = one_line(text[:_MAX_VALUE_CHARS]).strip()
    if len(line) + len(indent) <= WIDTH:
        return [indent + line] if line else []
    return textwrap.wrap(
        line, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def is_reply(code: int) -> bool:
    """Whether a code is a host's, and not one of the relay's own (`Code`)."""
    return 200 <= code < 600 and code != Code.NO_USABLE_MX
