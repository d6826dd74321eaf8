"""Telling a webhook of an event: what is said, how it is signed, when it is said again. Pure.

The payload and its signature are Mailgun's: hex HMAC-SHA256 (RFC 2104) of timestamp and token,
so that a receiver knows who speaks and can refuse what it has heard before. An answer 2yz ends
it, and 406 says never to tell this one again; anything else, or silence, is tried again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from datetime import datetime, timedelta

from relay.mail.event import Event

__all__ = ["NAMES", "RETRY", "kind_of", "next_try", "payload"]

NAMES = ("accepted", "delivered", "temporary_fail", "permanent_fail")
"""The kinds of events a webhook can be asked for."""

RETRY = (
    timedelta(minutes=5),
    timedelta(minutes=10),
    timedelta(minutes=15),
    timedelta(hours=1),
    timedelta(hours=2),
    timedelta(hours=4),
)

_NEVER_AGAIN = 406


def kind_of(event: Event) -> str:
    """The kind an event is of, as a webhook names it."""
    if event.name != "failed":
        return event.name
    return (
        "permanent_fail"
        if json.loads(event.line).get("severity") == "permanent"
        else "temporary_fail"
    )


def payload(line: str, *, signing_key: str, timestamp: int, token: str) -> bytes:
    """What is posted: the event's own object and the signature."""
    signed = hmac.digest(signing_key.encode(), f"{timestamp}{token}".encode(), hashlib.sha256).hex()
    signature = json.dumps({"timestamp": str(timestamp), "token": token, "signature": signed})
    return f'{{"signature":{signature},"event-data":{line}}}'.encode()


def next_try(status: int | None, *, attempts: int, now: datetime) -> datetime | None:
    """When it is said again after `attempts` tries before this one; None: it is over.

    `status`: the answer, None where there was none.
    """
    if status is not None and (200 <= status < 300 or status == _NEVER_AGAIN):
        return None
    return now + RETRY[attempts] if attempts < len(RETRY) else None
