"""What we write on top of a message, and what we read there of its way so far.

The Received field (RFC 5321 §4.4) says from whom, by whom, how (`with`, RFC 3848 and RFC 6531
§4.3), under which queue id and when; TLS stands in a comment. `for` is written only for a
single recipient: with more it would tell each of the others (RFC 5321 §7.2). Nothing of a
client's goes into it that could end the field or open a comment.

`count_hops` is the defence against loops (RFC 5321 §6.3). `missing_fields` completes what a
simple client left out, where the listener's operator wants that (RFC 6409 §8).
"""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache

from relay.mail.header import iter_fields
from relay.receive.session import Session

__all__ = ["count_hops", "missing_fields", "protocol_of", "received_field"]

_RECEIVED = re.compile(rb"(?:\A|\n)received[ \t]*+:", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9])?|\[[A-Za-z0-9:.]{2,64}\]")

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def received_field(
    session: Session,
    *,
    hostname: str,
    queue_id: str,
    now: datetime,
    smtputf8: bool = False,
    only_for: str = "",
) -> bytes:
    """Our Received field, with its CRLF."""
    helo = session.helo if _NAME.fullmatch(session.helo) else "unknown"
    tls = f"\r\n\t(using {session.tls.version} with cipher {session.tls.cipher})" if session.tls else ""
    recipient = f"\r\n\tfor <{only_for}>" if only_for else ""
    return (
        f"Received: from {helo} ({_where_from(session)}){tls}\r\n"
        f"\tby {hostname} with {protocol_of(session, smtputf8=smtputf8)} id {queue_id}{recipient};\r\n"
        f"\t{date_time(now.replace(microsecond=0))}\r\n"
    ).encode()


def protocol_of(session: Session, *, smtputf8: bool) -> str:
    """The `with` keyword: ESMTPSA and its kin (RFC 3848), UTF8SMTPSA and its (RFC 6531 §4.3)."""
    if not session.extended:
        return "SMTP"
    name = "UTF8SMTP" if smtputf8 else "ESMTP"
    return f"{name}{'S' if session.tls else ''}{'A' if session.user else ''}"


def _where_from(session: Session) -> str:
    """TCP-info, as far as it is known (RFC 5321 §4.4)."""
    if session.client is None:
        return "unknown"
    if not session.client:
        return "local"
    return f"[IPv6:{session.client}]" if ":" in session.client else f"[{session.client}]"


@lru_cache(maxsize=4)
def date_time(now: datetime) -> str:
    """A date-time of RFC 5322 §3.3, in whole seconds; in English whatever the locale."""
    day, month = _DAYS[now.weekday()], _MONTHS[now.month - 1]
    return f"{day}, {now.day} {month} {now.year} {now:%H:%M:%S} {now:%z}"


def count_hops(header: bytes) -> int:
    """How many hosts wrote a Received field so far."""
    return len(_RECEIVED.findall(header))


def missing_fields(header: bytes, *, reverse_path: str, hostname: str, queue_id: str, now: datetime) -> bytes:
    """The fields of Date, Message-ID and From that the header section lacks (RFC 5322 §3.6)."""
    present = {field.name.strip(b" \t").lower() for field in iter_fields(header)}
    added = []
    if b"date" not in present:
        added.append(f"Date: {date_time(now.replace(microsecond=0))}\r\n")
    if b"message-id" not in present:
        added.append(f"Message-ID: <{queue_id}@{hostname}>\r\n")
    if b"from" not in present:
        added.append(f"From: <{reverse_path}>\r\n" if reverse_path else f"From: MAILER-DAEMON@{hostname}\r\n")
    return "".join(added).encode()
