"""What follows from an attempt: the states of the recipients, and what the sender hears."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.envelope import Notify
from relay.mail.outcome import Bounced, Deferred, Delivered, HopSession, VerifiedBy
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import (
    Entry,
    LastAttempt,
    MessageSummary,
    QueuedMessage,
    QueuedRecipient,
    State,
    Terms,
)
from relay.queue.retry import RetrySchedule
from relay.queue.settle import ReportKind, notification_due, reports_about, settle

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SCHEDULE = RetrySchedule()
OFF = Setting(False, Source.DEFAULT)
ON = Setting(True, Source.MESSAGE)
PLAIN = TlsSettings(OFF, OFF)
SESSION = HopSession(
    "mx.example.net", "192.0.2.1", tls=True, verified_by=VerifiedBy.PKIX, seconds=30.0
)

OK = Delivered("2.0.0", 250, "2.0.0 OK", session=SESSION)
BUSY = Deferred("4.2.1", 450, "4.2.1 mailbox busy", session=SESSION)
UNKNOWN = Bounced("5.1.1", 550, "5.1.1 no such user", session=SESSION)
NO_TLS = Deferred("4.7.4", 0, "", description="STARTTLS not offered", tls_unmet=True)
BAD_CERTIFICATE = Deferred("4.7.5", 0, "", description="certificate expired", tls_unmet=True)

ASKED = st.frozensets(st.sampled_from([Notify.SUCCESS, Notify.FAILURE, Notify.DELAY])) | st.just(
    frozenset({Notify.NEVER})
)
OUTCOMES = st.sampled_from(
    [OK, BUSY, UNKNOWN, NO_TLS, BAD_CERTIFICATE, replace(OK, dsn_passed_on=True)]
)


def entry(*recipients, reverse_path="a@example.com", origin="smtp", summary=None):
    message = QueuedMessage(
        "Q1",
        reverse_path,
        NOON,
        1000,
        summary if summary is not None else MessageSummary(),
        origin=origin,
    )
    return Entry(message, recipients or (recipient(),))


def recipient(index=0, *notify, **facts):
    return QueuedRecipient(
        index, f"r{index}@example.net", "example.net", PLAIN, notify=frozenset(notify), **facts
    )


def after(one, outcome, *, age=HOUR, attempts=0, **facts):
    """The one change of an attempt `age` after the message arrived, and its settlement."""
    ready = replace(one, recipients=tuple(replace(r, attempts=attempts) for r in one.recipients))
    settlement = settle(ready, {0: outcome}, schedule=SCHEDULE, now=NOON + age, **facts)
    return settlement.changes[0], settlement


@pytest.mark.parametrize(
    ("outcome", "age", "state", "code", "status", "reason"),
    [
        (OK, HOUR, State.DELIVERED, 250, "2.0.0", "generic"),
        (UNKNOWN, HOUR, State.BOUNCED, 550, "5.1.1", "bounce"),
        (BUSY, HOUR, State.DEFERRED, 450, "4.2.1", "generic"),
        (NO_TLS, HOUR, State.DEFERRED, 0, "4.7.4", "generic"),
        (BUSY, 5 * DAY, State.EXPIRED, 602, "4.4.7", "old"),
        (NO_TLS, 5 * DAY, State.EXPIRED, 602, "5.7.4", "old"),
        (BAD_CERTIFICATE, 5 * DAY, State.EXPIRED, 602, "5.7.5", "old"),
        (replace(NO_TLS, status="4.4.1"), 5 * DAY, State.EXPIRED, 602, "5.7.5", "old"),
        (OK, 6 * DAY, State.DELIVERED, 250, "2.0.0", "generic"),
    ],
)
def test_an_outcome_and_the_age_of_the_message_say_what_becomes_of_a_recipient(
    outcome, age, state, code, status, reason
):
    change, _ = after(entry(), outcome, age=age)
    assert change.recipient.state is state
    assert (change.code, change.status, change.reason) == (code, status, reason)
    assert (change.retry_in is None) == state.is_final
    assert (change.recipient.next_attempt is None) == state.is_final


def test_a_deferred_recipient_is_due_when_its_schedule_says():
    change, _ = after(entry(), BUSY, attempts=1, jitter=0.1)
    assert change.retry_in == 11 * MINUTE
    assert change.recipient.next_attempt == NOON + HOUR + 11 * MINUTE
    assert change.recipient.attempts == 2


def test_the_last_answer_is_kept_at_the_end_of_the_lifetime():
    change, _ = after(entry(), BUSY, age=5 * DAY)
    assert change.recipient.last == LastAttempt(
        NOON + 5 * DAY, 450, "4.2.1", "4.2.1 mailbox busy", "mx.example.net"
    )


def test_tls_that_stayed_unmet_is_remembered_with_its_reason():
    change, _ = after(entry(), NO_TLS)
    assert change.recipient.last is not None
    assert change.recipient.last.tls_unmet
    assert change.recipient.last.message == "STARTTLS not offered"


def test_the_first_attempt_began_when_its_session_did_and_stays_the_first():
    change, _ = after(entry(), BUSY)
    assert change.recipient.first_attempt == NOON + HOUR - timedelta(seconds=30)
    again = settle(entry(change.recipient), {0: BUSY}, schedule=SCHEDULE, now=NOON + 2 * HOUR)
    assert again.changes[0].recipient.first_attempt == change.recipient.first_attempt


def test_long_text_of_a_peer_is_cut_before_it_is_stored():
    change, _ = after(entry(), replace(BUSY, message="x" * 100_000))
    assert change.recipient.last is not None
    assert len(change.recipient.last.message) == 1000


def test_a_recipient_without_an_outcome_stays_deferred():
    settlement = settle(
        entry(recipient(0), recipient(1)), {0: OK}, schedule=SCHEDULE, now=NOON + HOUR
    )
    forgotten = settlement.changes[1]
    assert forgotten.recipient.state is State.DEFERRED
    assert forgotten.recipient.attempts == 1
    assert forgotten.recipient.next_attempt == NOON + HOUR + 5 * MINUTE


def test_an_outcome_for_nobody_changes_nothing():
    settlement = settle(entry(), {0: OK, 7: UNKNOWN}, schedule=SCHEDULE, now=NOON)
    assert [change.recipient.index for change in settlement.changes] == [0]


@pytest.mark.parametrize("state", [State.DELIVERED, State.BOUNCED, State.EXPIRED, State.REMOVED])
def test_a_recipient_that_is_done_is_neither_changed_nor_reported_again(state):
    settlement = settle(entry(recipient(state=state)), {0: UNKNOWN}, schedule=SCHEDULE, now=NOON)
    assert settlement.changes == ()
    assert settlement.reports == ()


def test_a_jump_of_the_clock_bounces_nothing():
    now = NOON + 30 * DAY
    change, settlement = after(entry(), BUSY, age=30 * DAY, attempts=2, steady_since=now)
    assert change.recipient.state is State.DEFERRED
    assert settlement.reports == ()


# What the sender hears.

NEVER, SUCCESS, FAILURE, DELAY = Notify.NEVER, Notify.SUCCESS, Notify.FAILURE, Notify.DELAY
FAILED, DELAYED, RELAYED = ReportKind.FAILED, ReportKind.DELAYED, ReportKind.RELAYED


@pytest.mark.parametrize(
    ("notify", "outcome", "age", "kind"),
    [
        ((), UNKNOWN, HOUR, FAILED),  # RFC 3461 §4.1: as FAILURE
        ((FAILURE,), UNKNOWN, HOUR, FAILED),
        ((SUCCESS,), UNKNOWN, HOUR, None),
        ((DELAY,), UNKNOWN, HOUR, None),
        ((NEVER,), UNKNOWN, HOUR, None),
        ((), BUSY, 5 * DAY, FAILED),
        ((NEVER,), BUSY, 5 * DAY, None),
        ((), OK, HOUR, None),
        ((FAILURE, DELAY), OK, HOUR, None),
        ((SUCCESS,), OK, HOUR, RELAYED),
        ((SUCCESS, FAILURE), OK, HOUR, RELAYED),
        ((SUCCESS,), replace(OK, dsn_passed_on=True), HOUR, None),
        ((), BUSY, 4 * HOUR, DELAYED),
        ((), BUSY, 4 * HOUR - MINUTE, None),
        ((DELAY,), BUSY, 4 * HOUR, DELAYED),
        ((FAILURE,), BUSY, 4 * HOUR, None),
        ((SUCCESS, FAILURE), BUSY, 4 * HOUR, None),
        ((NEVER,), BUSY, 4 * HOUR, None),
    ],
)
def test_the_sender_hears_what_notify_asks_for(notify, outcome, age, kind):
    _, settlement = after(entry(recipient(0, *notify)), outcome, age=age)
    assert [report.kind for report in settlement.reports] == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("outcome", "age"), [(UNKNOWN, HOUR), (BUSY, 5 * DAY), (BUSY, 4 * HOUR), (OK, HOUR)]
)
def test_nothing_is_ever_reported_to_the_null_reverse_path(outcome, age):
    bounce = entry(recipient(0, SUCCESS, FAILURE, DELAY), reverse_path="", origin="dsn")
    _, settlement = after(bounce, outcome, age=age)
    assert settlement.reports == ()
    assert not settlement.changes[0].recipient.delay_notified


def test_a_delay_is_told_once():
    first, settlement = after(entry(), BUSY, age=4 * HOUR)
    assert first.recipient.delay_notified
    assert settlement.reports[0].retry_until == NOON + 5 * DAY
    again = settle(entry(first.recipient), {0: BUSY}, schedule=SCHEDULE, now=NOON + 8 * HOUR)
    assert again.reports == ()


def test_no_delay_is_told_where_warn_after_is_never():
    schedule = replace(SCHEDULE, warn_after=None)
    assert settle(entry(), {0: BUSY}, schedule=schedule, now=NOON + DAY).reports == ()


def test_no_delay_is_told_about_a_dsn():
    assert after(entry(origin="dsn"), BUSY, age=DAY)[1].reports == ()


def test_a_program_hears_of_a_delay_only_if_it_asked():
    by_program = MessageSummary(auto_submitted=True)
    assert after(entry(summary=by_program), BUSY, age=DAY)[1].reports == ()
    assert after(entry(recipient(0, DELAY), summary=by_program), BUSY, age=DAY)[1].reports != ()
    assert after(entry(summary=by_program), UNKNOWN)[1].reports != ()


def test_a_jump_of_the_clock_tells_no_delay():
    _, settlement = after(entry(), BUSY, age=30 * DAY, attempts=1, steady_since=NOON + 30 * DAY)
    assert settlement.reports == ()


def test_the_failures_of_an_attempt_are_one_report():
    many = entry(*(recipient(index) for index in range(5)))
    settlement = settle(many, {0: UNKNOWN, 1: OK, 2: UNKNOWN, 3: BUSY}, schedule=SCHEDULE, now=NOON)
    (report,) = settlement.reports
    assert [change.recipient.index for change in report.changes] == [0, 2]
    assert [r.index for r in report.entry.recipients] == [0, 2]


@pytest.mark.parametrize(
    ("outcome", "age", "kind"),
    [(UNKNOWN, HOUR, FAILED), (BUSY, 5 * DAY, FAILED), (BUSY, 4 * HOUR, DELAYED)],
)
def test_simultaneous_results_of_several_domains_are_one_report(outcome, age, kind):
    now = NOON + age
    first = settle(entry(), {0: outcome}, schedule=SCHEDULE, now=now, has_others=True)
    second = settle(entry(recipient(1)), {1: outcome}, schedule=SCHEDULE, now=now, has_others=True)
    assert first.reports == second.reports == ()
    assert first.report_after == now + 4 * MINUTE
    (report,) = reports_about(
        first.entry.message, (*first.pending, *second.pending), schedule=SCHEDULE, now=now + MINUTE
    )
    assert report.kind is kind
    assert [change.recipient.index for change in report.changes] == [0, 1]
    assert report.retry_until == (NOON + 5 * DAY if kind is DELAYED else None)


def test_a_failure_a_delay_and_a_success_are_a_report_each():
    asked = (SUCCESS, FAILURE, DELAY)
    one = entry(*(recipient(index, *asked) for index in range(3)))
    settlement = settle(one, {0: BUSY, 1: OK, 2: UNKNOWN}, schedule=SCHEDULE, now=NOON + 4 * HOUR)
    told = {
        report.kind: [c.recipient.index for c in report.changes] for report in settlement.reports
    }
    assert told == {FAILED: [2], DELAYED: [0], RELAYED: [1]}


@given(
    st.lists(
        st.timedeltas(min_value=timedelta(0), max_value=10 * MINUTE), min_size=200, max_size=200
    )
)
def test_domains_of_a_message_are_delayed_and_expire_at_the_same_moment(durations):
    """What each attempt takes is added to the wait after it, so that domains drift apart."""
    one, now = entry(), NOON
    told: dict[ReportKind, datetime] = {}
    for took in durations:
        begun, now = now, now + took
        settlement = settle(one, {0: BUSY}, schedule=SCHEDULE, now=now)
        told |= {report.kind: begun for report in settlement.reports}
        left = settlement.changes[0].recipient
        if left.state.is_final:
            break
        assert left.next_attempt is not None
        one, now = entry(left), left.next_attempt
    # An attempt that was under way at the moment may itself be the one that tells.
    for kind, age in ((DELAYED, 4 * HOUR), (FAILED, 5 * DAY)):
        assert NOON + age - 10 * MINUTE <= told[kind] <= NOON + age


def test_a_message_of_short_life_comes_to_its_end_in_time_though_it_is_not_tried():
    brief = replace(entry().message, terms=Terms(lifetime=HOUR))
    short = replace(entry(), message=brief)
    assert notification_due(short, schedule=SCHEDULE, now=NOON) == NOON + HOUR
    assert notification_due(entry(), schedule=SCHEDULE, now=NOON) == NOON + 4 * HOUR


@pytest.mark.parametrize(
    ("settings", "strictest"),
    [
        ([(False, False), (True, True)], (True, False)),
        ([(False, True), (False, True)], (False, True)),
        ([(True, False)], (True, False)),
    ],
)
def test_a_report_is_as_strict_as_the_strictest_it_is_about(settings, strictest):
    recipients = [
        replace(recipient(i), settings=TlsSettings(ON if require else OFF, ON if skip else OFF))
        for i, (require, skip) in enumerate(settings)
    ]
    outcomes = dict.fromkeys(range(len(recipients)), UNKNOWN)
    (report,) = settle(entry(*recipients), outcomes, schedule=SCHEDULE, now=NOON).reports
    assert (report.settings.require_tls.value, report.settings.skip_verification.value) == strictest


# What holds whatever happens.


@given(
    notify=st.lists(ASKED, min_size=1, max_size=6),
    data=st.data(),
    reverse_path=st.sampled_from(["", "a@example.com"]),
    age=st.timedeltas(min_value=-40 * DAY, max_value=40 * DAY),
    has_others=st.booleans(),
    steady=st.booleans(),
)
def test_no_recipient_is_forgotten_and_none_is_reported_twice(
    notify, data, reverse_path, age, has_others, steady
):
    recipients = [
        recipient(
            index,
            *asked,
            attempts=data.draw(st.integers(0, 60)),
            delay_notified=data.draw(st.booleans()),
        )
        for index, asked in enumerate(notify)
    ]
    one = entry(*recipients, reverse_path=reverse_path)
    outcomes = data.draw(st.dictionaries(st.integers(0, len(recipients)), OUTCOMES))
    now = NOON + age
    settlement = settle(
        one,
        outcomes,
        schedule=SCHEDULE,
        now=now,
        steady_since=None if steady else now,
        has_others=has_others,
    )

    assert [change.recipient.index for change in settlement.changes] == [
        r.index for r in recipients
    ]
    for before, change in zip(recipients, settlement.changes, strict=True):
        left = change.recipient
        assert left.state in (State.DELIVERED, State.BOUNCED, State.EXPIRED, State.DEFERRED)
        assert left.attempts == before.attempts + 1
        pending = left.state is State.DEFERRED
        assert pending == (left.next_attempt is not None) == (change.retry_in is not None)
        assert not pending or left.next_attempt >= now
        if isinstance(change.outcome, Delivered):
            assert left.state is State.DELIVERED

    told = [c for report in settlement.reports for c in report.changes] + list(settlement.pending)
    assert len({change.recipient.index for change in told}) == len(told)
    assert not (settlement.reports and settlement.pending)
    assert bool(told) <= bool(reverse_path)
    assert not any(Notify.NEVER in change.recipient.notify for change in told)
    if reverse_path:
        failed = {
            c.recipient.index
            for c in settlement.changes
            if c.recipient.state in (State.BOUNCED, State.EXPIRED)
            and (not c.recipient.notify or Notify.FAILURE in c.recipient.notify)
        }
        reported = [report for report in settlement.reports if report.kind is ReportKind.FAILED]
        heard = {c.recipient.index for report in reported for c in report.changes}
        held = [c for c in settlement.pending if not isinstance(c.outcome, Delivered)]
        heard |= {c.recipient.index for c in held if c.recipient.state.is_final}
        assert failed == heard
        assert all(c.recipient.delay_notified for c in held if not c.recipient.state.is_final)


@given(outcomes=st.lists(OUTCOMES, min_size=1, max_size=60), notify=ASKED)
def test_message_causes_one_failure_report_and_at_most_one_delay_notice_in_its_life(
    outcomes, notify
):
    one, now, kinds = entry(recipient(0, *notify)), NOON, []
    for outcome in [*outcomes, *[BUSY] * 60]:
        settlement = settle(one, {0: outcome}, schedule=SCHEDULE, now=now)
        kinds += [report.kind for report in settlement.reports]
        left = settlement.changes[0].recipient
        if left.state.is_final:
            break
        assert left.next_attempt is not None
        one, now = entry(left), left.next_attempt
    assert left.state.is_final
    assert now <= NOON + SCHEDULE.lifetime
    assert kinds.count(ReportKind.DELAYED) <= 1
    done = [kind for kind in kinds if kind is not ReportKind.DELAYED]
    if left.state is State.DELIVERED:
        assert ReportKind.FAILED not in done
    else:
        assert done == ([ReportKind.FAILED] if not notify or Notify.FAILURE in notify else [])
