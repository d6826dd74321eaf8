"""A call to a webhook: its content, its signature, and when it is made again. Pure.

Content and signature have Mailgun's form: hex HMAC-SHA256 (RFC 2104) of timestamp and token. With
it the receiver can check who calls, and refuse a call that somebody repeats. After an answer 2yz or
406 the call is not made again; after any other answer, or none, it is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import datetime, timedelta

from relay.mail.event import Event

KINDS = ("accepted", "delivered", "temporary_fail", "permanent_fail")
"""The kinds of events that a webhook can be for."""

RETRY = (
    timedelta(minutes=5),
    timedelta(minutes=10),
    timedelta(minutes=15),
    timedelta(hours=1),
    timedelta(hours=2),
    timedelta(hours=4),
)

_NOT_ACCEPTABLE = 406


def kind_of(event: Event) -> str:
    """The kind of an event, one of `KINDS` (or another name, for which there is no webhook)."""
    if event.name != "failed":
        return event.name
    return f"{json.loads(event.line)['severity']}_fail"


def payload(line: str, *, signing_key: str, timestamp: int, token: str) -> bytes:
    """The content of a call: the event as the delivery log has it, and the signature."""
    signed = hmac.digest(signing_key.encode(), f"{timestamp}{token}".encode(), hashlib.sha256).hex()
    signature = json.dumps({"timestamp": str(timestamp), "token": token, "signature": signed})
    return f'{{"signature":{signature},"event-data":{line}}}'.encode()


def next_try(status: int | None, *, attempts: int, now: datetime) -> datetime | None:
    """When to make a call again; None: never. `attempts`: how often it was made before this time.

    `status`: of the answer; None where there was none.
    """
    if status is not None and (200 <= status < 300 or status == _NOT_ACCEPTABLE):
        return None
    return now + RETRY[attempts] if attempts < len(RETRY) else None
