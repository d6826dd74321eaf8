"""What follows from the outcomes of an attempt: new states, and what the sender is owed.

Pure: `settle` takes an entry, an outcome for each of its recipients and `now`, and
returns a `Settlement` for the store to commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from relay.mail.outcome import Outcome
from relay.queue.entry import Entry, QueuedRecipient

__all__ = ["Change", "Report", "ReportKind", "Settlement"]


class ReportKind(StrEnum):
    """The Action field of a DSN (RFC 3464 §2.3.3) that a report is about."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"
    """Handed to a host that will not report success itself (RFC 3461 §5.2.2)."""


@dataclass(frozen=True, slots=True)
class Change:
    """A recipient as the attempt leaves it.

    `status` and `code` are those to log and to report: the outcome's own, except at the
    end of the lifetime (602, 4.4.7; 5.7.4 or 5.7.5 where TLS stayed unmet). `retry_in` is
    None once the state is final.
    """

    recipient: QueuedRecipient
    outcome: Outcome
    code: int
    status: str
    retry_in: timedelta | None = None
    reason: str = "generic"


@dataclass(frozen=True, slots=True)
class Report:
    """A DSN owed to the sender: its kind and the recipients it is about."""

    kind: ReportKind
    entry: Entry
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Settlement:
    """All that an attempt changes."""

    entry: Entry
    at: datetime
    changes: tuple[Change, ...]
    reports: tuple[Report, ...] = ()
