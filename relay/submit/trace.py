"""The header fields that the relay adds at the top of a message. Pure.

The Received field (RFC 5321 §4.4) says from which client and by which host a message came, how
(`with`), under which queue id and when. `for` is written only for a single recipient: with more
recipients it would tell each of them about the others (RFC 5321 §7.2). The caller gives the facts
about the client (name, address, protocol, TLS) in a form that can neither end the field nor begin
a comment.

`missing_fields` makes the fields that a simple client left out (RFC 6409 §8).
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from relay.mail.address import in_header
from relay.mail.section import HeaderSection

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Arrival(NamedTuple):
    """A message that came in: the relay's host name, the queue id, and when."""

    hostname: str
    queue_id: str
    at: datetime


def received_field(arrival: Arrival, *, source: str, protocol: str, only_for: str = "") -> bytes:
    """The relay's Received field, with its CRLF. `source` is the text after "from"."""
    recipient = f"\r\n\tfor <{in_header(only_for)}>" if only_for else ""
    return (
        f"Received: from {source}\r\n"
        f"\tby {arrival.hostname} with {protocol} id {arrival.queue_id}{recipient};\r\n"
        f"\t{date_time(arrival.at.replace(microsecond=0))}\r\n"
    ).encode()


def tcp_info(client: str | None) -> str:
    """TCP-info for a client's address (RFC 5321 §4.4); "" is a UNIX socket, None is unknown."""
    if client is None:
        return "unknown"
    if not client:
        return "local"
    return f"[IPv6:{client}]" if ":" in client else f"[{client}]"


@lru_cache(maxsize=4)
def date_time(now: datetime) -> str:
    """A date-time of RFC 5322 §3.3 in whole seconds, in English with every locale."""
    day, month = _DAYS[now.weekday()], _MONTHS[now.month - 1]
    return f"{day}, {now.day} {month} {now.year} {now:%H:%M:%S} {now:%z}"


def missing_fields(section: HeaderSection, arrival: Arrival, *, reverse_path: str) -> bytes:
    """The fields of Date, Message-ID and From that the header section lacks (RFC 5322 §3.6)."""
    added = []
    if b"date" not in section:
        added.append(f"Date: {date_time(arrival.at.replace(microsecond=0))}\r\n")
    if b"message-id" not in section:
        added.append(f"Message-ID: <{arrival.queue_id}@{arrival.hostname}>\r\n")
    if b"from" not in section:
        added.append(
            f"From: <{in_header(reverse_path)}>\r\n"
            if reverse_path
            else f"From: MAILER-DAEMON@{arrival.hostname}\r\n"
        )
    return "".join(added).encode()
