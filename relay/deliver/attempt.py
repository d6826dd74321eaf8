"""One attempt to deliver an entry: the hosts of its domain are tried in order, until each recipient
has an outcome.

    route, policy ─► for each host: floor, room? ─► requirement ─► pool or reach ─► transactions
                                                                   ─► diagnosis ─► tally

These rules prevent loss, duplicates and mail without the required TLS. In one attempt, a recipient
is not offered to another host after a host has accepted it, has rejected it permanently
(`diagnosis` says when), or has sent no reply after the final dot (then a later attempt may deliver
it a second time). No part of the message, not even MAIL, is sent to a host that has not met the TLS
requirement. Where a connection kept from another message is lost before the host answered MAIL, the
attempt connects to the same host again.

The hosts of a next hop of the operator's are tried as `hop_turns` says: equals in turn, and dead
ones not at all.

If an attempt is cancelled before the final dot is sent, it closes the connection. After the final
dot it waits for the reply, because the host may have accepted the message already. The same holds
where the claim of the entry is over, so that another node may have it: the attempt looks before it
connects, before MAIL and before the final dot.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial

from relay.deliver import negotiate
from relay.deliver.conditions import Asked, Conditions
from relay.deliver.connecting import Connecting
from relay.deliver.connection import Connection
from relay.deliver.destinations import Destinations, NotNow, Use
from relay.deliver.floors import Floors
from relay.deliver.hand_over import HandOver
from relay.deliver.hop_turns import HopTurns, HostResult, HostTurn
from relay.deliver.job import Job, job_of
from relay.deliver.login import Logins
from relay.deliver.memory import NO_PAST, shown_by
from relay.deliver.options import DeliveryOptions, TlsOptions, security_options
from relay.deliver.pool import Pool, pool_key
from relay.deliver.sessions import SessionLog
from relay.deliver.signing import Signer
from relay.deliver.sts_policies import PolicyPending
from relay.deliver.tally import Tally
from relay.deliver.tls import TlsContexts
from relay.deliver.transfer import require_claim
from relay.mail.outcome import Code, Deferred, Outcome
from relay.mail.record import replace
from relay.mail.tls_session import TlsSession
from relay.queue.entry import TLS_REPORT, Entry, QueuedRecipient
from relay.queue.store import ClaimLost, SpoolError
from relay.route.next_hop import Host, NoRoute, RouteFinder
from relay.route.security import Requirement, at_host, is_below, requirement


class Attempt:
    """Makes all attempts of a process, and keeps connections for later messages."""

    def __init__(
        self,
        route: RouteFinder,
        *,
        floors: Floors,
        hostname: str,
        delivery: DeliveryOptions | None = None,
        tls: TlsOptions | None = None,
        pool: Pool | None = None,
        contexts: TlsContexts | None = None,
        signer: Signer | None = None,
        destinations: Destinations | None = None,
        logins: Logins | None = None,
        counts_sessions: bool = False,
        may_begin: Callable[[Entry], bool] = lambda entry: True,
    ) -> None:
        """`route`: where a message goes. `floors`: what the domain asks of them.
        `counts_sessions`: whether sessions are counted for reports on TLS. `may_begin`: whether
        the claim of an entry still holds.
        """
        delivery, tls = delivery or DeliveryOptions(), tls or TlsOptions()
        self._route = route
        self._security = security_options(delivery, tls)
        # Most mail shares a few settings, and the key of a kept connection is compared faster with
        # the same requirement than with an equal one.
        self._required = lru_cache(maxsize=256)(
            lambda settings, requiretls: requirement(
                settings, self._security, requiretls=requiretls
            )
        )
        self._pool = Pool() if pool is None else pool
        self._signer = signer
        self._destinations = destinations or Destinations(
            delivery.concurrency_per_destination, clock=_now
        )
        self._destinations.on_surplus = self._pool.make_room_at_hop
        self._destinations.on_division = self._pool.close_idle
        using = negotiate.SessionOptions(
            hostname, delivery.timeouts, contexts or TlsContexts(tls.ca_file), logins
        )
        self._connecting = Connecting(self._pool, self._destinations, using)
        self._floors = floors
        self._counts_sessions = counts_sessions
        self._may_begin = may_begin

    async def run(
        self,
        entry: Entry,
        content: Callable[[], AsyncIterator[bytes]],
        sessions: list[TlsSession] | None = None,
    ) -> dict[int, Outcome]:
        """Try to deliver; the outcome for every recipient of the entry, by its index.

        The sessions that reports on TLS have to count (RFC 8460) are added to `sessions`, also if
        the attempt raises. Raises `NotNow` where no host had room for a connection, `PolicyPending`
        while the domain's MTA-STS policy is fetched, `SpoolError` where the policy cannot be
        read, and `ClaimLost` where the claim is over. No host has accepted or rejected a recipient
        then; a host that turned the connection
        away (`NotNow.turned_away`) may have received MAIL.
        """
        message = entry.message
        route = await self._route(entry.domain, message.reverse_path, message.next_hop)
        if isinstance(route, NoRoute):
            outcome = replace(route.outcome, routing=route.routing)
            return {recipient.index: outcome for recipient in entry.recipients}
        asked = Asked(entry, route, self._floors, self._security)
        await asked.of(route.hosts[0])
        # For a message with the null reverse-path REQUIRETLS is no condition (RFC 8689 §4.2.1);
        # `prepare` adds the keyword all the same where the host offers it.
        requiretls = message.requiretls and message.reverse_path != ""
        needed = self._required(entry.settings, requiretls)
        bounce = needed.bounces_unmet and all(
            at_host(needed, host, self._security).bounces_unmet for host in route.hosts
        )
        tally = Tally(
            entry.recipients,
            bounce_unmet=bounce,
            requiretls=requiretls,
            trouble=route.trouble,
            rejected=route.rejected,
            routing=route.routing,
            sessions=self._session_log(entry, sessions),
        )
        job = await job_of(entry, content, self._signer, partial(self._may_begin, entry))
        self._pool.begin_use(entry.domain)
        try:
            may_go_on = await self._try_route(asked, needed, job, tally)
            if may_go_on and tally.is_unmet_by_policy:
                outcomes = await self._under_newer_policy(asked, needed, job, tally)
            else:
                outcomes = tally.outcomes()
        finally:
            self._pool.end_use(entry.domain)
        tally.sessions.end()
        return outcomes

    def _session_log(self, entry: Entry, sessions: list[TlsSession] | None) -> SessionLog:
        """Reports on TLS do not count the sessions that carry them (RFC 8460 §3)."""
        is_counted = self._counts_sessions and entry.message.origin != TLS_REPORT
        return SessionLog(sessions if is_counted else None)

    def _try_route(
        self, asked: Asked, needed: Requirement, job: Job, tally: Tally
    ) -> Awaitable[bool]:
        """Try the hosts of a route; whether the attempt may go on after that."""
        if asked.route.hosts[0].hop is None:
            return self._try_hosts(asked, needed, job, tally)
        return self._try_next_hop(asked, needed, job, tally)

    async def _try_hosts(self, asked: Asked, needed: Requirement, job: Job, tally: Tally) -> bool:
        """Try the hosts in order, those that have room for a connection.

        If a host is busy with our own connections and gets messages done over them, the attempt
        waits for that host and tries none of another preference.
        """
        recipients = tally.pending
        holder = job.message.queue_id, recipients[0].domain
        busy: dict[str, int] = {}
        turned_away: list[str] = []
        has_answered = False
        for host in asked.route.hosts:
            conditions = await asked.at(host, needed, tally)
            if conditions is None:
                continue
            name = host.destination
            if self._is_worth_waiting(busy, host):
                break
            if (silence := self._destinations.silence_of(name)) is not None:
                tally.go_on_for(tally.pending, host, silence)
                continue
            use = self._destinations.begin(name, holder, host.hop)
            if use is None:
                busy[name] = host.preference
                continue
            try:
                result = await self._try_host(conditions, job, tally, use)
            finally:
                self._destinations.end(use)
            if tally.is_settled or result is HostResult.CANCELLED:
                return False
            has_answered |= result is HostResult.ANSWERED
            if result is HostResult.TURNED_AWAY:
                turned_away.append(name)
        is_untouched = tally.pending == recipients and not has_answered
        if (busy or turned_away) and is_untouched:
            raise NotNow((*turned_away, *busy), tally.outcomes() if turned_away else {})
        return True

    def _is_worth_waiting(self, busy: Mapping[str, int], host: Host) -> bool:
        """Whether a host of another preference is busy, and still takes messages."""
        return any(
            preference != host.preference and not self._destinations.is_stuck(name)
            for name, preference in busy.items()
        )

    async def _try_next_hop(
        self, asked: Asked, needed: Requirement, job: Job, tally: Tally
    ) -> bool:
        """Try the hosts of a next hop of the operator's, those that are not dead."""
        hosts, recipients = asked.route.hosts, tally.pending
        holder = job.message.queue_id, recipients[0].domain
        turns = HopTurns(self._destinations, self._pool.kept_at, hosts, holder)
        try:
            for turn in turns.deal(lambda: at_host(needed, hosts[0], self._security).proof):
                try:
                    await self._take_turn(turn, asked, needed, job, tally)
                finally:
                    turns.end_turn(turn)
                if tally.is_settled or HostResult.CANCELLED in turns.results:
                    return False
            is_untouched = tally.pending == recipients and not turns.has_answered
            turns.end(tally, is_untouched=is_untouched)
        finally:
            turns.close()
        return True

    async def _take_turn(
        self, turn: HostTurn, asked: Asked, needed: Requirement, job: Job, tally: Tally
    ) -> None:
        """Try one host of a next hop, at one address after the other, unless it is dead."""
        turns = turn.turns
        for host in turn.addresses:
            conditions = await self._conditions_of_hop(turns, asked, host, needed, tally)
            if conditions is None:
                continue
            use = turns.turn_to(turn, host, conditions.needed.proof, tally)
            if use is None:
                continue
            result = await self._try_host(conditions, job, tally, use, turn)
            if tally.is_settled:
                return
            turns.tried(result)
            if result not in (HostResult.SILENT, HostResult.ANSWERED):
                return

    async def _conditions_of_hop(
        self, turns: HopTurns, asked: Asked, host: Host, needed: Requirement, tally: Tally
    ) -> Conditions | None:
        """What holds at a host of a next hop. Once a host has answered, the attempt does not end
        because the policy of another host is not there yet: that host is passed by.
        """
        try:
            return await asked.at(host, needed, tally)
        except (PolicyPending, SpoolError) as error:
            if not turns.has_answered:
                raise
            text = f"{host.name} [{host.address}]: not tried: {error}"
            tally.pass_by(host, Deferred("4.4.3", Code.NONE, "", text))
            return None

    async def close(self) -> None:
        """Close the connections that are kept."""
        await self._pool.close()

    async def _under_newer_policy(
        self, asked: Asked, needed: Requirement, job: Job, tally: Tally
    ) -> dict[int, Outcome]:
        """The outcomes after at least one host failed the domain's policy.

        If the domain has published another policy since, the hosts are tried once more under it, so
        that no mail bounces because of an old policy (RFC 8461 §5.1).
        """
        outcomes = tally.outcomes()
        try:
            newer = asked.again()
            for host in asked.route.hosts:
                await newer.of(host)
            if newer.policies == asked.policies:
                return outcomes
            tally.begin_anew()
            await self._try_route(newer, needed, job, tally)
        except ClaimLost:
            raise
        except (NotNow, PolicyPending, SpoolError):
            return outcomes
        return tally.outcomes()

    async def _try_host(
        self, conditions: Conditions, job: Job, tally: Tally, use: Use, turn: HostTurn | None = None
    ) -> HostResult:
        """Offer one host what is still to be delivered. `turn`: of a host of a next hop."""
        key = pool_key(conditions.host, conditions.needed)
        has_rate = use.hop is not None and use.hop.rate is not None
        waiting: Sequence[QueuedRecipient] = tally.pending
        began = _now()
        connection = self._pool.take(key)
        is_kept = connection is not None
        result, went_well = HostResult.ANSWERED, False
        while waiting:
            if connection is None:
                require_claim(job.may_go_on)
                reached = await self._connecting.reach(conditions, waiting, tally, use, began, turn)
                if not isinstance(reached, Connection):
                    return reached
                connection = reached
            use.is_connected = True
            handing_over = HandOver(
                conditions,
                connection,
                job,
                tally,
                began,
                begin=partial(self._connecting.wait_for_rate, use) if has_rate else None,
                is_worn_out=self._pool.is_worn_out,
            )
            try:
                waiting = await handing_over.run(waiting, is_kept=is_kept)
            except BaseException:
                connection.abort()
                raise
            if handing_over.has_delivered:
                went_well = True
                if conditions.past is not NO_PAST:
                    session = connection.session
                    is_old = is_below(session.tls_version, self._security)
                    conditions.past.learn(shown_by(session), is_old=is_old)
            if waiting:  # they are to go over another connection
                connection.quit()
            else:
                result = self._note_session(handing_over, use, went_well=went_well)
                self._pool.give_back(key, connection, use.holder[1])
            if connection.was_cancelled:
                return HostResult.CANCELLED
            if waiting and is_kept:
                self._pool.forget(key)
            connection, is_kept, began = None, False, _now()
            use.is_connected = False
        return result

    def _note_session(self, handing_over: HandOver, use: Use, *, went_well: bool) -> HostResult:
        """Note what a session tells of its destination. `went_well`: the host took the message for
        a recipient. What a full host of a next hop tells is noted when the other hosts have been
        tried.
        """
        if handing_over.was_turned_away:
            return self._connecting.turned_away(use) if use.hop is None else HostResult.TURNED_AWAY
        self._destinations.served(use, went_well=went_well)
        return HostResult.ANSWERED


_now = time.monotonic
"""Not the event loop's clock, which in uvloop stands still while a callback runs."""
