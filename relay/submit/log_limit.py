"""Limits the log lines about clients that break the protocol. Pure.

The relay logs one line for a client that speaks no SMTP (at the HTTP port, no HTTP) or breaks the
connection off, so that an operator can find the client. A stranger must not fill the log with such
lines: each client may cause ten in ten minutes, all clients together a thousand. The next line
after that says how many were left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from relay.mail.newest import keep_newest
from relay.submit.failures import client_key

_MOST_OF_CLIENT = 10
_MOST_OF_ALL = 1000
_WINDOW = timedelta(minutes=10)
_REMEMBERED = 10_000


@dataclass(slots=True)
class _Share:
    """How many lines were written since `begun`."""

    begun: datetime
    written: int = 0
    left_out: int = 0

    def renew(self, now: datetime) -> None:
        if now - self.begun >= _WINDOW:
            self.begun, self.written = now, 0

    def write(self) -> int:
        """Count one more line; returns how many lines were left out before it."""
        left_out, self.left_out = self.left_out, 0
        self.written += 1
        return left_out


class LogLimit:
    """Counts lines by client. It remembers 10,000 clients and forgets the oldest first."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._all = _Share(datetime.min.replace(tzinfo=UTC))

    def line(self, client: str, text: str, now: datetime) -> str | None:
        """The line to log about a client; None if its share is used up."""
        share, total = self._share_of(client_key(client), now), self._all
        total.renew(now)
        if share.written >= _MOST_OF_CLIENT:
            share.left_out += 1
            return None
        if total.written >= _MOST_OF_ALL:
            total.left_out += 1
            return None
        left_out = share.write() + total.write()
        return f"{text} ({left_out} such lines were left out before)" if left_out else text

    def _share_of(self, client: str, now: datetime) -> _Share:
        share = self._shares.get(client) or _Share(now)
        share.renew(now)
        keep_newest(self._shares, client, share, most=_REMEMBERED)
        return share
