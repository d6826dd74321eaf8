"""What follows from the outcomes of an attempt: new states, and the reports its sender gets.

Pure: `settle` takes an entry, an outcome for each of its recipients and `now`, and
returns a `Settlement` for the store to commit.

    outcome      lifetime  state       the sender gets a report (RFC 3461 §4.1, §5.2)
    Delivered              DELIVERED   relayed: NOTIFY=SUCCESS, and the host will not send this
                                       report
    Deferred     goes on   DEFERRED    delayed, once, when the message is as old as `warn_after`:
                                       NOTIFY=DELAY; or no NOTIFY, and no program sent the message
                                       (RFC 3834: Auto-Submitted)
    Deferred     over      EXPIRED     failed: NOTIFY=FAILURE or no NOTIFY
    Bounced                BOUNCED     failed: NOTIFY=FAILURE or no NOTIFY
    (no outcome)           as Deferred, so that the recipient is tried again

Nothing is ever reported to the null reverse-path (RFC 5321 §4.5.5), nor with NOTIFY=NEVER. There is
no delay notice about a DSN of the relay's own, and none with `warn_after: never`.

A message whose recipients have several domains is several entries, settled one by one. So that its
sender gets one report and not one for each domain, changes of such a message (`has_others`) wait as
`Settlement.pending`: the store keeps them until all attempts of the message that are due within
`RetrySchedule.report_window` have ended, for five minutes at most, and `reports_about` makes one
report of each kind. Kinds
are not mixed, though RFC 3464 §2.3.3 would allow it: the subject of a report says whether there is
something to do, and RET=FULL is for failures alone (RFC 3461 §4.3). A delay that ended, well or
not, before it was reported is not reported any more (RFC 3461 §4.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import assert_never

from relay.mail.envelope import Notify
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, Outcome
from relay.mail.record import record
from relay.policy.settings import TlsSettings
from relay.queue.entry import Entry, LastAttempt, QueuedMessage, QueuedRecipient, State
from relay.queue.retry import RetrySchedule, age_of, next_attempt, next_notification

_LAST_TEXT_CHARS = 1000
"""How much of a peer's last answer is kept with the recipient."""

_FORGOTTEN = Deferred(
    "4.3.0", Code.NONE, "", description="the attempt ended without a result for this recipient"
)


class ReportKind(StrEnum):
    """The kind of a report, which is the Action field of the DSN (RFC 3464 §2.3.3)."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"
    """Handed to a host that will not report success itself (RFC 3461 §5.2.2)."""


@record(frozen=True, slots=True)
class Change:
    """A recipient as the attempt leaves it.

    `status` and `code` are those to log and to report: the outcome's own, except at the end of the
    lifetime (602, the delivery log's "too old", with 4.4.7; 5.7.4 or 5.7.5 where TLS stayed unmet).
    `retry_in` is None once the state is final. `reason` is the delivery log's: generic,
    bounce or old.
    """

    recipient: QueuedRecipient
    outcome: Outcome
    code: int
    status: str
    retry_in: timedelta | None = None
    reason: str = "generic"


@record(frozen=True, slots=True)
class Report:
    """A DSN for the sender: its kind and the recipients it is about.

    `retry_until`: the end of a delayed message's lifetime; None for the other kinds.
    """

    kind: ReportKind
    entry: Entry
    changes: tuple[Change, ...]
    retry_until: datetime | None = None

    @property
    def settings(self) -> TlsSettings:
        """The strictest settings of its recipients: a DSN must not be sent under weaker ones."""
        every = [change.recipient.settings for change in self.changes]
        return TlsSettings(
            require_tls=next(
                (s.require_tls for s in every if s.require_tls.value), every[0].require_tls
            ),
            skip_verification=next(
                (s.skip_verification for s in every if not s.skip_verification.value),
                every[0].skip_verification,
            ),
        )


@record(frozen=True, slots=True)
class Settlement:
    """All that an attempt changes.

    `pending`: changes that are to be reported, but not before the message's other attempts that are
    due by `report_after` have ended.
    """

    entry: Entry
    at: datetime
    changes: tuple[Change, ...]
    reports: tuple[Report, ...] = ()
    pending: tuple[Change, ...] = ()
    report_after: datetime | None = None


def settle(
    entry: Entry,
    outcomes: Mapping[int, Outcome],
    *,
    schedule: RetrySchedule,
    now: datetime,
    jitter: float = 0.0,
    steady_since: datetime | None = None,
    has_others: bool = False,
) -> Settlement:
    """The state of each recipient after an attempt, and the reports for the sender.

    `outcomes` by recipient index. `steady_since`: see `relay.queue.retry`. `has_others`: the
    message has recipients that are not in this entry.
    """
    message = entry.message
    schedule = _schedule_of(message, schedule)
    changes: list[Change] = []
    reported: list[Change] = []
    for recipient in entry.recipients:
        if recipient.state.is_final:
            continue  # it was reported when it became final
        outcome = outcomes.get(recipient.index, _FORGOTTEN)
        change = _change(message, recipient, outcome, schedule, now, jitter, steady_since)
        if _needs_delay_notice(message, change, schedule, now, steady_since):
            change = replace(change, recipient=replace(change.recipient, delay_notified=True))
            reported.append(change)
        elif _needs_report(message, change):
            reported.append(change)
        changes.append(change)
    if has_others:
        report_after = now + schedule.report_window
        return Settlement(
            entry, now, tuple(changes), pending=tuple(reported), report_after=report_after
        )
    return Settlement(
        entry, now, tuple(changes), reports_about(message, reported, schedule=schedule, now=now)
    )


def notification_due(entry: Entry, *, schedule: RetrySchedule, now: datetime) -> datetime | None:
    """When the sender of an entry that waits untried is to hear of the delay, or of the end.

    None: never again.
    """
    return next_notification(
        _schedule_of(entry.message, schedule), arrived=entry.message.begins, now=now
    )


def _schedule_of(message: QueuedMessage, schedule: RetrySchedule) -> RetrySchedule:
    """The schedule, with the lifetime the sender asked for where that is shorter."""
    lifetime = message.terms.lifetime if message.terms is not None else None
    if lifetime is None or lifetime >= schedule.lifetime:
        return schedule
    return replace(schedule, lifetime=lifetime)


def reports_about(
    message: QueuedMessage, changes: Sequence[Change], *, schedule: RetrySchedule, now: datetime
) -> tuple[Report, ...]:
    """The reports about some recipients: one of each kind at most, whatever their domains."""
    if not changes:
        return ()
    by_kind: dict[ReportKind, list[Change]] = {kind: [] for kind in ReportKind}
    for change in changes:
        by_kind[_kind_of(change.recipient.state)].append(change)
    ends = max(message.begins + _schedule_of(message, schedule).lifetime, now)
    return tuple(
        Report(
            kind,
            Entry(message, tuple(change.recipient for change in about)),
            tuple(about),
            retry_until=ends if kind is ReportKind.DELAYED else None,
        )
        for kind, about in by_kind.items()
        if about
    )


def _kind_of(state: State) -> ReportKind:
    if state is State.DELIVERED:
        return ReportKind.RELAYED
    return ReportKind.FAILED if state.is_final else ReportKind.DELAYED


def _change(
    message: QueuedMessage,
    recipient: QueuedRecipient,
    outcome: Outcome,
    schedule: RetrySchedule,
    now: datetime,
    jitter: float,
    steady_since: datetime | None,
) -> Change:
    """One recipient after one attempt."""
    attempts = recipient.attempts + 1
    match outcome:
        case Delivered():
            done = _after(recipient, State.DELIVERED, outcome, now, message.arrived)
            return Change(done, outcome, outcome.code, outcome.status)
        case Bounced():
            done = _after(recipient, State.BOUNCED, outcome, now, message.arrived)
            return Change(done, outcome, outcome.code, outcome.status, reason="bounce")
        case Deferred():
            due = next_attempt(
                schedule,
                arrived=message.begins,
                attempts=attempts,
                now=now,
                jitter=jitter,
                steady_since=steady_since,
            )
            if due is None:
                done = _after(recipient, State.EXPIRED, outcome, now, message.arrived)
                return Change(done, outcome, Code.TOO_OLD, _expired_status(outcome), reason="old")
            later = _after(recipient, State.DEFERRED, outcome, now, message.arrived, due)
            return Change(later, outcome, outcome.code, outcome.status, retry_in=due - now)
        case _:
            assert_never(outcome)


def _after(
    recipient: QueuedRecipient,
    state: State,
    outcome: Outcome,
    now: datetime,
    arrived: datetime,
    due: datetime | None = None,
) -> QueuedRecipient:
    session = outcome.session
    began = now - timedelta(seconds=session.seconds) if session is not None else now
    return QueuedRecipient(
        index=recipient.index,
        address=recipient.address,
        domain=recipient.domain,
        settings=recipient.settings,
        notify=recipient.notify,
        orcpt=recipient.orcpt,
        state=state,
        attempts=recipient.attempts + 1,
        next_attempt=due,
        last=LastAttempt(
            at=now,
            code=outcome.code,
            status=outcome.status,
            message=(outcome.message or outcome.description)[:_LAST_TEXT_CHARS],
            host=session.mx_host if session is not None else "",
            tls_unmet=isinstance(outcome, Deferred) and outcome.tls_unmet,
        ),
        first_attempt=recipient.first_attempt or max(began, arrived),
        delay_notified=recipient.delay_notified,
    )


def _expired_status(outcome: Deferred) -> str:
    """RFC 3463 §3.5: X.4.7 is "delivery time expired". TLS that stayed unmet goes before."""
    if not outcome.tls_unmet:
        return "4.4.7"
    return f"5{outcome.status[1:]}" if outcome.status in ("4.7.4", "4.7.5") else "5.7.5"


def _needs_report(message: QueuedMessage, change: Change) -> bool:
    """Whether a final state is reported to the sender."""
    if not message.reverse_path:
        return False
    notify = change.recipient.notify
    match change.outcome:
        case Delivered(dsn_passed_on=passed_on):
            return Notify.SUCCESS in notify and not passed_on
        case _:
            # RFC 3461 §4.1: no NOTIFY means FAILURE.
            return change.recipient.state.is_final and (not notify or Notify.FAILURE in notify)


def _needs_delay_notice(
    message: QueuedMessage,
    change: Change,
    schedule: RetrySchedule,
    now: datetime,
    steady_since: datetime | None,
) -> bool:
    """Whether the sender is to be told now, for the first time, that a recipient is delayed."""
    recipient = change.recipient
    if (
        recipient.state is not State.DEFERRED
        or recipient.delay_notified
        or schedule.warn_after is None
    ):
        return False
    if not message.reverse_path or message.origin == "dsn":
        return False
    if recipient.notify:
        if Notify.DELAY not in recipient.notify:
            return False
    elif message.summary.auto_submitted:
        # Without NOTIFY a notice is at the relay's discretion (RFC 3461 §4.1), and a program that
        # sends mail does not wait for one.
        return False
    age = age_of(
        schedule,
        arrived=message.begins,
        attempts=recipient.attempts,
        now=now,
        steady_since=steady_since,
    )
    return age >= schedule.warn_after
