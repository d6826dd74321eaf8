"""Hands a message over in a session with a host: its transactions, and an outcome for each
recipient.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from relay.deliver.conditions import Conditions
from relay.deliver.connection import Connection
from relay.deliver.destinations import turns_away
from relay.deliver.diagnosis import (
    Answer,
    Stage,
    another_may_take,
    cannot_take,
    demands_tls,
    judge,
    too_many_recipients,
    unmet,
    worth_another_host,
)
from relay.deliver.job import Job, fit_for, signed
from relay.deliver.memory import NO_PAST, shown_by
from relay.deliver.no_session import with_result
from relay.deliver.tally import Tally
from relay.deliver.transaction import MOST_RECIPIENTS, prepare
from relay.mail.outcome import Deferred, Delivered, HopSession
from relay.mail.record import replace
from relay.queue.entry import QueuedRecipient
from relay.route.next_hop import Host


class HandOver:
    """Hands a message over in one session with a host. `began`: when the attempt turned to this
    host, on the monotonic clock. `begin`: returns when a transaction may begin; None: at once.
    """

    def __init__(
        self,
        conditions: Conditions,
        connection: Connection,
        job: Job,
        tally: Tally,
        began: float,
        *,
        begin: Callable[[], Awaitable[None]] | None,
        is_worn_out: Callable[[Connection], bool],
    ) -> None:
        self._host = conditions.host
        self._begin = begin
        self._is_worn_out = is_worn_out
        self._policy = conditions.floor.policy
        self._past = conditions.past
        self._connection = connection
        self._job = job
        self._tally = tally
        self._began = began
        self._utf8 = False
        self._requiretls = False
        self._unsigned = ""
        self.was_turned_away = False
        self.has_delivered = False

    async def run(
        self, recipients: Sequence[QueuedRecipient], *, is_kept: bool
    ) -> Sequence[QueuedRecipient]:
        """Hand the message over for these recipients, in as many transactions as it takes.

        The recipients returned are to be tried again over a new connection to the same host. The
        host closed this connection before it answered MAIL for them, and the connection was kept
        from another message or had carried a transaction; or the host took messages over this
        connection and takes no more; or the connection may carry no more.
        """
        if self._past is not NO_PAST:
            await self._raise_alarm()
        recipients = list(recipients)
        waiting = recipients
        # Where the connection was kept, the pool has just looked at it.
        while waiting and (is_kept or self._can_carry_more()):
            batch, after = waiting[:MOST_RECIPIENTS], waiting[MOST_RECIPIENTS:]
            has_delivered = self._connection.has_delivered
            answers = await self._transact(batch)
            carried_before = is_kept or waiting != recipients
            is_taken = any(answer.is_positive for answer in answers.values())
            if not is_taken and (ended := _ended(answers, carried_before, has_delivered)):
                self._note([one for one in batch if one.index not in ended], answers)
                return [recipient for recipient in waiting if self._tally.is_pending(recipient)]
            is_kept = False
            self.was_turned_away = (
                not is_taken and bool(answers) and all(map(turns_away, answers.values()))
            )
            waiting = self._note(batch, answers) + after
        if len(waiting) < len(recipients) and not self._connection.was_cancelled:
            return waiting
        if waiting:
            self._note_untried(waiting)
        return ()

    def _can_carry_more(self) -> bool:
        """Whether this connection may carry another transaction."""
        connection = self._connection
        is_well = connection.is_usable and not connection.was_cancelled
        return is_well and not self._is_worn_out(connection)

    async def _raise_alarm(self) -> None:
        """Raise the downgrade alarm where this session shows less than the host has shown before. A
        kept connection is checked too: it may have been opened for another domain.
        """
        alarm = self._past.alarm(shown_by(self._connection.session))
        if alarm is not None:
            await self._past.ring(alarm)
            self._policy = replace(self._policy, memory=alarm)

    async def _transact(self, batch: Sequence[QueuedRecipient]) -> dict[int, Answer]:
        job = await signed(await fit_for(self._connection.offers, self._job))
        transaction, unsendable = prepare(
            job.message,
            batch,
            self._connection.offers,
            header_is_utf8=job.header_is_utf8,
            not_convertible=job.not_convertible,
        )
        for index, what in unsendable.items():
            outcome = cannot_take(what, self._host, self._session())
            note = self._tally.go_on if another_may_take(what) else self._tally.settle
            note(self._host, index, outcome)
        if transaction is None:
            return {}
        self._utf8 = transaction.utf8
        self._requiretls = transaction.requiretls
        self._unsigned = job.unsigned
        if self._begin is not None:
            await self._begin()
        return await self._connection.transact(transaction, job.content, job.may_go_on)

    def _note(
        self, batch: Sequence[QueuedRecipient], answers: dict[int, Answer]
    ) -> list[QueuedRecipient]:
        """Tally the answers. Returns the recipients to send RCPT for again, fewer at a time."""
        refused = {index for index, answer in answers.items() if too_many_recipients(answer)}
        may_ask_again = len(refused) < len(answers)
        session = self._session()
        again = []
        for recipient in batch:
            answer = answers.get(recipient.index)
            if answer is None:
                continue
            if may_ask_again and recipient.index in refused:
                again.append(recipient)
            else:
                self._tally_one(recipient.index, answer, session)
        return again

    def _tally_one(self, index: int, answer: Answer, session: HopSession) -> None:
        host = self._host
        if not session.tls and demands_tls(answer):
            self._tally.go_on(host, index, _tls_demanded(answer, host, session))
            return
        outcome = judge(
            answer,
            host,
            session,
            dsn_passed_on=self._connection.offers.dsn,
            routing=self._tally.routing,
        )
        if isinstance(outcome, Delivered):
            self.has_delivered = True
            self._tally.settle(host, index, outcome)
        elif worth_another_host(answer, self._host):
            assert isinstance(outcome, Deferred)
            self._tally.go_on(host, index, outcome)
        else:
            self._tally.settle(host, index, outcome)

    def _note_untried(self, waiting: Sequence[QueuedRecipient]) -> None:
        """The session ended before RCPT was sent for these."""
        cancelled = self._connection.was_cancelled
        error = (
            "we were told to stop" if cancelled else "the session was over before this recipient"
        )
        answer, session = Answer(Stage.MAIL, None, error, ours=cancelled), self._session()
        for recipient in waiting:
            self._tally_one(recipient.index, answer, session)

    def _session(self) -> HopSession:
        return replace(
            self._connection.session,
            utf8=self._utf8,
            requiretls=self._requiretls,
            unsigned=self._unsigned,
            seconds=_now() - self._began,
            policy=with_result(self._policy, self._connection.session),
        )


def _ended(answers: Mapping[int, Answer], carried_before: bool, has_delivered: bool) -> set[int]:
    """The recipients to try again over a new connection, since the host, which took the message for
    none of them, may have refused only to go on with this one.

    `carried_before`: the connection had carried a transaction. `has_delivered`: the host had taken
    a message over it.
    """
    if carried_before and all(map(_never_began, answers.values())):
        return set(answers)
    if has_delivered:
        return {index for index, answer in answers.items() if _may_mean_the_connection(answer)}
    return set()


def _never_began(answer: Answer) -> bool:
    """Whether the host had not taken MAIL when it went away: nothing happened, and nothing is in
    doubt.
    """
    return answer.stage is Stage.MAIL and (answer.reply is None or answer.reply.code == 421)


def _may_mean_the_connection(answer: Answer) -> bool:
    return (
        answer.stage in (Stage.MAIL, Stage.RCPT, Stage.DATA)
        and answer.reply is not None
        and answer.reply.code in (421, 452, 554)
    )


def _tls_demanded(answer: Answer, host: Host, session: HopSession) -> Deferred:
    """The outcome at a host that takes nothing in clear (RFC 3207 §4) and has no TLS that we may
    use: both errors are in it.
    """
    reply = answer.reply
    assert reply is not None
    before = session.downgrade.error if session.downgrade else "no TLS"
    return unmet(
        "4.7.5",
        f"{before}; then in clear, {answer.stage} was answered {reply}",
        host,
        session,
        reply,
    )


_now = time.monotonic
"""Not the event loop's clock, which in uvloop stands still while a callback runs."""
