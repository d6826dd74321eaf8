"""The Received field of a message that came over SMTP: its client in words (RFC 5321 §4.4).

`with` is RFC 3848's keyword, or RFC 6531 §4.3's; TLS stands in a comment. Text of a client
cannot end the field or begin a comment.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.receive.session import Session, TlsFacts
from relay.submit import trace

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253}[A-Za-z0-9])?|\[[A-Za-z0-9:.]{2,64}\]")


def received_field(
    session: Session, arrival: trace.Arrival, *, smtputf8: bool = False, only_for: str = ""
) -> bytes:
    """The relay's Received field, with its CRLF."""
    return trace.received_field(
        arrival,
        source=_source(session.helo, session.client, session.tls),
        protocol=protocol_of(session, smtputf8=smtputf8),
        only_for=only_for,
    )


@lru_cache(maxsize=1024)
def _source(helo: str, client: str | None, tls: TlsFacts | None) -> str:
    """The text after "from", which is the same for all messages of a session."""
    name = helo if _NAME.fullmatch(helo) else "unknown"
    using = f"\r\n\t(using {tls.version} with cipher {tls.cipher})" if tls else ""
    return f"{name} ({trace.tcp_info(client)}){using}"


def protocol_of(session: Session, *, smtputf8: bool) -> str:
    """The `with` keyword: ESMTPSA and such (RFC 3848), UTF8SMTPSA and such (RFC 6531 §4.3)."""
    if not session.extended:
        return "SMTP"
    name = "UTF8SMTP" if smtputf8 else "ESMTP"
    return f"{name}{'S' if session.tls else ''}{'A' if session.user else ''}"
