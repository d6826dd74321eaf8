"""One attempt to deliver an entry: the hosts of its domain in order, until each recipient's fate is
known.

    route, policy ─► for each host: floor, room? ─► requirement ─► pool or reach ─► transactions
                                                                   ─► diagnosis ─► tally

The order is the safety argument. In one attempt, a recipient is not offered to another host once a
host has accepted it, has rejected it with 5yz, or has sent no reply after the final dot (then a
later attempt may deliver it a second time). No part of the message, not even MAIL, is sent to a
host that has not met the TLS requirement. A kept connection that turns out dead before its host took MAIL counts for nothing: the
host is asked again on a fresh one.

If an attempt is cancelled before the final dot is sent, it closes the connection. After the final
dot it waits for the reply, because the host may have accepted the message already.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from enum import Enum, auto

from relay.deliver import negotiate
from relay.deliver.connection import Connection
from relay.deliver.destinations import Destinations, NotNow, Use, turns_away
from relay.deliver.diagnosis import (
    NO_SECURE_WAY,
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
from relay.deliver.floors import NO_DOMAIN_FLOOR, DomainFloor, Floors
from relay.deliver.job import Job, fit_for, job_of, signed
from relay.deliver.options import DeliveryOptions, TlsOptions, security_options
from relay.deliver.pool import Pool, pool_key
from relay.deliver.signing import Signer
from relay.deliver.sts_policies import PolicyPending
from relay.deliver.tally import Tally
from relay.deliver.tls import TlsContexts
from relay.deliver.transaction import MOST_RECIPIENTS, prepare
from relay.mail.outcome import Deferred, HopPolicy, HopSession, Outcome
from relay.queue.entry import Entry, QueuedRecipient
from relay.queue.store import SpoolError
from relay.route.mta_sts import StsMode
from relay.route.next_hop import Host, Hosts, NoRoute, Route
from relay.route.security import HostFloor, Requirement, at_host, requirement, under

__all__ = ["Attempt"]


class _Visited(Enum):
    """What trying a host came to."""

    TALKED = auto()
    SILENT = auto()
    TURNED_AWAY = auto()
    CANCELLED = auto()


class Attempt:
    """Makes attempts. One for the whole relay: it keeps the connections."""

    def __init__(
        self,
        route: Callable[[str], Awaitable[Route]],
        *,
        hostname: str,
        delivery: DeliveryOptions | None = None,
        tls: TlsOptions | None = None,
        pool: Pool | None = None,
        contexts: TlsContexts | None = None,
        signer: Signer | None = None,
        destinations: Destinations | None = None,
        floors: Floors | None = None,
    ) -> None:
        """`floors`: what recipients' domains ask for; None: nobody asks for anything."""
        delivery, tls = delivery or DeliveryOptions(), tls or TlsOptions()
        self._route = route
        self._security = security_options(delivery, tls)
        self._using = negotiate.SessionOptions(
            hostname, delivery.timeouts, contexts or TlsContexts(tls.ca_file)
        )
        self._pool = Pool() if pool is None else pool
        self._signer = signer
        self._destinations = destinations or Destinations(
            delivery.concurrency_per_destination, clock=_now
        )
        self._floors = floors

    async def run(
        self, entry: Entry, content: Callable[[], AsyncIterator[bytes]]
    ) -> dict[int, Outcome]:
        """Try to deliver; the outcome for every recipient of the entry, by its index.

        Raises `NotNow` where no host had room for a connection, `PolicyPending` where the domain's
        MTA-STS policy is still being fetched, and `SpoolError` where it cannot be read; nothing was
        tried then.
        """
        route = await self._route(entry.domain)
        if isinstance(route, NoRoute):
            return {recipient.index: route.outcome for recipient in entry.recipients}
        message = entry.message
        floor = await self._floor(entry, route)
        # For a message with the null reverse-path REQUIRETLS is no condition (RFC 8689 §4.2.1);
        # `prepare` adds the keyword all the same where the host offers it.
        requiretls = message.requiretls and message.reverse_path != ""
        needed = requirement(entry.settings, self._security, requiretls=requiretls)
        bounce = needed.bounces_unmet and all(
            at_host(needed, host, self._security).bounces_unmet for host in route.hosts
        )
        tally = Tally(
            entry.recipients,
            bounce_unmet=bounce,
            requiretls=requiretls,
            trouble=route.trouble,
            rejected=route.rejected,
        )
        job = await job_of(entry, content, self._signer)
        with self._pool.using_one():
            may_go_on = await self._try_hosts(route, floor, needed, job, tally)
            if may_go_on and tally.is_unmet_by_policy:
                return await self._unless_newer(entry, route, floor, needed, job, tally)
        return tally.outcomes()

    async def _try_hosts(
        self, route: Hosts, floor: DomainFloor, needed: Requirement, job: Job, tally: Tally
    ) -> bool:
        """Try the hosts in order, those that have room for a connection; whether the attempt may go
        on after that.

        To wait for a host that we keep busy is better than to use one that is worse.
        """
        recipients = tally.pending
        holder = job.message.queue_id, recipients[0].domain
        busy: dict[str, int] = {}
        turned_away: list[str] = []
        has_talked = False
        for number, host in enumerate(route.hosts, start=1):
            under_floor = await self._floors.at(host, floor) if self._floors else HostFloor()
            if under_floor.not_used:
                _go_on(tally, host, tally.pending, _not_used(under_floor, host))
                continue
            if needed.requiretls and not floor.has_secure_name(host):
                _go_on(tally, host, tally.pending, _not_known(under_floor, host))
                continue
            name = host.destination
            if any(p != host.preference and not self._is_stuck(at) for at, p in busy.items()):
                break
            if (silence := self._destinations.silence_of(name)) is not None:
                _go_on(tally, host, tally.pending, silence)
                continue
            use = self._destinations.begin(name, holder)
            if use is None:
                busy[name] = host.preference
                continue
            has_more = any(other.destination == name for other in route.hosts[number:])
            try:
                visited = await self._try_host(
                    host, under_floor, needed, job, tally, use, has_more=has_more
                )
            finally:
                self._destinations.end(use)
            if not tally.pending or visited is _Visited.CANCELLED:
                return False
            has_talked |= visited is _Visited.TALKED
            if visited is _Visited.TURNED_AWAY:
                turned_away.append(name)
        is_untouched = tally.pending == recipients and not has_talked
        if (busy or turned_away) and is_untouched:
            raise NotNow((*turned_away, *busy), tally.outcomes() if turned_away else {})
        return True

    def _is_stuck(self, name: str) -> bool:
        return self._destinations.is_stuck(name)

    async def close(self) -> None:
        """Close the connections that are kept."""
        await self._pool.close()

    async def _floor(self, entry: Entry, route: Hosts, *, anew: bool = False) -> DomainFloor:
        if self._floors is None:
            return NO_DOMAIN_FLOOR
        message, waiving = entry.message, None
        if message.tls_required_no and not entry.settings.require_tls.value:
            waiving = message.reverse_path
        return await self._floors.of_domain(entry.domain, route.naming, waiving=waiving, anew=anew)

    async def _unless_newer(
        self,
        entry: Entry,
        route: Hosts,
        floor: DomainFloor,
        needed: Requirement,
        job: Job,
        tally: Tally,
    ) -> dict[int, Outcome]:
        """What an attempt came to that did not meet a policy: tried anew where the domain has another
        policy by now, so that no mail is returned for an old one (RFC 8461 §5.1).
        """
        met = tally.outcomes()
        try:
            newer = await self._floor(entry, route, anew=True)
            if _asks(newer) == _asks(floor):
                return met
            tally.begin_anew()
            await self._try_hosts(route, newer, needed, job, tally)
        except (NotNow, PolicyPending, SpoolError):
            return met
        return tally.outcomes()

    async def _try_host(
        self,
        host: Host,
        floor: HostFloor,
        needed: Requirement,
        job: Job,
        tally: Tally,
        use: Use,
        *,
        has_more: bool,
    ) -> _Visited:
        """Offer one host what is still to be delivered. `has_more`: its destination has another
        address, which is tried next.
        """
        needed = under(at_host(needed, host, self._security), floor.floor, self._security)
        key = pool_key(host, needed)
        waiting: Sequence[QueuedRecipient] = tally.pending
        began = _now()
        connection = self._pool.take(key)
        is_kept = connection is not None
        visited = _Visited.TALKED
        while waiting:
            if connection is None:
                self._pool.make_room(host.destination, self._destinations.others_may_stay(use))
                reached = await negotiate.reach(host, needed, self._using)
                if not isinstance(reached, Connection):
                    outcome = _unreached(reached, host, floor.policy, began)
                    _go_on(tally, host, waiting, outcome)
                    return self._note_unreached(reached, outcome, use, has_more=has_more)
                connection = reached
            use.is_connected = True
            try:
                visit = _Visit(host, floor.policy, connection, job, tally, began)
                waiting = await visit.hand_over(waiting, is_kept=is_kept)
            except BaseException:
                connection.abort()
                raise
            if waiting:  # they are to go over another connection
                connection.quit()
            else:
                visited = self._note_visit(visit, use)
                self._pool.give_back(key, connection)
            if connection.was_cancelled:
                return _Visited.CANCELLED
            if waiting and is_kept:
                self._pool.forget(key)
            connection, is_kept, began = None, False, _now()
            use.is_connected = False
        return visited

    def _note_unreached(
        self,
        reached: negotiate.Unmet | negotiate.Failed,
        outcome: Deferred,
        use: Use,
        *,
        has_more: bool,
    ) -> _Visited:
        """What it tells of a destination that no session came of. One address that is silent says
        nothing of a next hop that has another.
        """
        kept = self._pool.kept_at(use.destination.name)
        if isinstance(reached, negotiate.Failed):
            answer = reached.answer
            if turns_away(answer):
                return self._turned_away(use)
            if answer.reply is None and answer.stage in (Stage.CONNECT, Stage.GREETING):
                if has_more:
                    return _Visited.SILENT
                if self._destinations.unreached(use, kept, outcome):
                    return self._turned_away(use)
                return _Visited.SILENT
        self._destinations.answered(use)
        return _Visited.TALKED

    def _note_visit(self, visit: _Visit, use: Use) -> _Visited:
        """What a session that carried transactions, or was to, tells of its destination."""
        if visit.was_turned_away:
            return self._turned_away(use)
        self._destinations.served(use)
        return _Visited.TALKED

    def _turned_away(self, use: Use) -> _Visited:
        kept = self._pool.kept_at(use.destination.name)
        is_worth_waiting = self._destinations.turned_away(use, kept)
        return _Visited.TURNED_AWAY if is_worth_waiting else _Visited.TALKED


class _Visit:
    """What one session does for one attempt. `policy`: what the recipient's domain asks of the host.
    `began`: when, on the monotonic clock.
    """

    def __init__(
        self,
        host: Host,
        policy: HopPolicy,
        connection: Connection,
        job: Job,
        tally: Tally,
        began: float,
    ) -> None:
        self._host = host
        self._policy = policy
        self._connection = connection
        self._job = job
        self._tally = tally
        self._began = began
        self._utf8 = False
        self._requiretls = False
        self._unsigned = ""
        self.was_turned_away = False

    async def hand_over(
        self, recipients: Sequence[QueuedRecipient], *, is_kept: bool
    ) -> Sequence[QueuedRecipient]:
        """Hand over to the recipients, in as many transactions as it takes.

        Those returned are to be tried again over a new connection to the same host: it went away
        before it took MAIL for them, on a connection kept from another message or after it had
        taken others, or it takes no more over one that others went well over.
        """
        recipients = list(recipients)
        waiting = recipients
        while waiting and self._connection.is_usable and not self._connection.was_cancelled:
            batch, after = waiting[:MOST_RECIPIENTS], waiting[MOST_RECIPIENTS:]
            has_delivered = self._connection.has_delivered
            answers = await self._transact(batch)
            told = answers.values()
            if answers and (
                (all(map(_never_began, told)) and (is_kept or waiting != recipients))
                or (all(map(_takes_no_more, told)) and has_delivered)
            ):
                return [recipient for recipient in waiting if self._tally.is_pending(recipient)]
            is_kept = False
            self.was_turned_away = bool(answers) and all(map(turns_away, told))
            waiting = self._note(batch, answers) + after
        if len(waiting) < len(recipients) and not self._connection.was_cancelled:
            return waiting
        self._note_untried(waiting)
        return ()

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
        return await self._connection.transact(transaction, job.content)

    def _note(
        self, batch: Sequence[QueuedRecipient], answers: dict[int, Answer]
    ) -> list[QueuedRecipient]:
        """Tally the answers; who is to be named again, in a transaction with fewer recipients."""
        some_were_named = any(not too_many_recipients(answer) for answer in answers.values())
        again = []
        for recipient in batch:
            answer = answers.get(recipient.index)
            if answer is None:
                continue
            if some_were_named and too_many_recipients(answer):
                again.append(recipient)
            else:
                self._tally_one(recipient.index, answer)
        return again

    def _tally_one(self, index: int, answer: Answer) -> None:
        host, session = self._host, self._session()
        if not session.tls and demands_tls(answer):
            self._tally.go_on(host, index, _wanted_tls(answer, host, session))
            return
        outcome = judge(answer, host, session, dsn_passed_on=self._connection.offers.dsn)
        if worth_another_host(answer):
            self._tally.go_on(host, index, _deferred(outcome))
        else:
            self._tally.settle(host, index, outcome)

    def _note_untried(self, waiting: Sequence[QueuedRecipient]) -> None:
        """The session was over before these were named."""
        cancelled = self._connection.was_cancelled
        error = (
            "we were told to stop" if cancelled else "the session was over before this recipient"
        )
        answer = Answer(Stage.MAIL, None, error, ours=cancelled)
        for recipient in waiting:
            self._tally_one(recipient.index, answer)

    def _session(self) -> HopSession:
        return replace(
            self._connection.hop,
            utf8=self._utf8,
            requiretls=self._requiretls,
            unsigned=self._unsigned,
            seconds=_now() - self._began,
            policy=_policy(self._policy, self._connection.hop),
        )


def _policy(policy: HopPolicy, session: HopSession) -> HopPolicy:
    """What the domain asked of a host, with what came of it in a session."""
    result = session.policy.result
    return policy if result is None else replace(policy, result=result)


def _never_began(answer: Answer) -> bool:
    """Whether the host had not taken MAIL when it went away: nothing happened, and nothing is in
    doubt.
    """
    return answer.stage is Stage.MAIL and (answer.reply is None or answer.reply.code == 421)


def _takes_no_more(answer: Answer) -> bool:
    """Whether a host that took messages over a connection may only have had enough of that one."""
    return (
        answer.stage in (Stage.MAIL, Stage.RCPT, Stage.DATA)
        and answer.reply is not None
        and answer.reply.code in (421, 452, 554)
    )


def _wanted_tls(answer: Answer, host: Host, session: HopSession) -> Deferred:
    """A host that has no TLS we may use, and takes nothing without: both errors (RFC 3207 §4)."""
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


def _asks(floor: DomainFloor) -> tuple[StsMode | None, str, tuple[str, ...]]:
    """What makes one MTA-STS policy another."""
    return floor.sts.mode, floor.sts.id, floor.sts.mx


def _not_used(floor: HostFloor, host: Host) -> Deferred:
    """A host is not connected to, for what the recipient's domain or the operator said."""
    text = f"not connected to: it {floor.not_used}"
    outcome = unmet("4.7.5", text, host, None, policy=floor.policy)
    return replace(outcome, message=outcome.description)


def _not_known(floor: HostFloor, host: Host) -> Deferred:
    """A host is not connected to, since REQUIRETLS asks for a name that is known for sure."""
    text = f"not connected to: REQUIRETLS asks for a host whose name is known for sure ({_SURE})"
    outcome = unmet(NO_SECURE_WAY, text, host, None, policy=floor.policy)
    return replace(outcome, message=outcome.description)


_SURE = "a signed MX record, an enforced MTA-STS policy, a route, or a domain without MX records"


def _unreached(
    reached: negotiate.Unmet | negotiate.Failed, host: Host, policy: HopPolicy, began: float
) -> Deferred:
    """The outcome where there is no session that a message could go over."""
    session = reached.session
    if session is not None:
        policy = _policy(policy, session)
        session = replace(session, seconds=_now() - began, policy=policy)
    if isinstance(reached, negotiate.Unmet):
        return unmet(reached.status, reached.error, host, session, reached.reply)
    outcome = replace(_deferred(judge(reached.answer, host, session)), policy=policy)
    if not reached.before:
        return outcome
    description = f"{outcome.description} (before that, {reached.before})"
    return replace(outcome, description=description)


def _go_on(tally: Tally, host: Host, waiting: Sequence[QueuedRecipient], outcome: Deferred) -> None:
    """All that wait had the same from a host."""
    for recipient in waiting:
        tally.go_on(host, recipient.index, outcome)


def _deferred(outcome: Outcome) -> Deferred:
    assert isinstance(outcome, Deferred)
    return outcome


_now = time.monotonic
"""Not the event loop's clock, which in uvloop stands still while a callback runs."""
