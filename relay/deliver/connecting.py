"""Connects to hosts for attempts, within the limits of their destinations. †

Idle connections make room for the one that is made. One to a next hop of the operator's counts
against its limits as long as it stands. What a failed connection tells of a host is noted: in the
tally, and in `destinations`, or for a next hop in `hop_turns`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from relay.deliver import negotiate
from relay.deliver.conditions import Conditions
from relay.deliver.connection import Connection
from relay.deliver.destinations import Destinations, Use, turns_away
from relay.deliver.diagnosis import Stage
from relay.deliver.hop_turns import HostResult, HostTurn
from relay.deliver.memory import AtHost
from relay.deliver.no_session import unreached
from relay.deliver.pool import Pool
from relay.deliver.tally import Tally
from relay.mail.outcome import Deferred, HopPolicy
from relay.mail.record import replace
from relay.queue.entry import QueuedRecipient
from relay.route.next_hop import NextHop

_AGAIN_SECONDS = 0.05


class Connecting:
    """Makes the connections of a process. `using`: what every session needs."""

    def __init__(
        self, pool: Pool, destinations: Destinations, using: negotiate.SessionOptions
    ) -> None:
        self._pool = pool
        self._destinations = destinations
        self._limits = destinations.limits
        self._using = using
        self._standing: set[asyncio.Task[None]] = set()

    async def reach(
        self,
        conditions: Conditions,
        waiting: Sequence[QueuedRecipient],
        tally: Tally,
        use: Use,
        began: float,
        turn: HostTurn | None,
    ) -> Connection | HostResult:
        """A new session with a host that meets the conditions; or what the host did instead, which
        is noted for the recipients that wait. `began`: when the attempt turned to the host.
        """
        host, floor = conditions.host, conditions.floor
        self._pool.make_room(host.destination, self._destinations.others_may_stay(use))
        self._pool.make_room_for(waiting[0].domain, self._most_for(waiting[0].domain, host.hop))
        seen = partial(tally.sessions.met, host, floor)
        async with self._counted(host.hop) as opened:
            reached = await negotiate.reach(
                host, conditions.needed, self._using, seen=seen, opened=opened.append
            )
            if isinstance(reached, Connection):
                if turn is not None:
                    turn.lives()
                return reached
        failure, policy = await _with_alarm(reached, conditions.past, floor.policy)
        outcome = unreached(failure, host, policy, time.monotonic() - began)
        tally.go_on_for(waiting, host, outcome)
        if turn is not None:
            return turn.failed(failure, outcome)
        return self._note_unreached(failure, outcome, use)

    async def wait_for_rate(self, use: Use) -> None:
        """Wait until the rate of the next hop lets a message begin; the first of an attempt may."""
        assert use.hop is not None
        seconds = self._limits.wait_for_message(use.hop, use.holder)
        while seconds:
            await asyncio.sleep(seconds)
            seconds = self._limits.wait_for_message(use.hop, use.holder)

    def turned_away(self, use: Use) -> HostResult:
        """Note that a host has too many connections."""
        kept = self._pool.kept_at(use.destination.name)
        is_worth_waiting = self._destinations.turned_away(use, kept)
        return HostResult.TURNED_AWAY if is_worth_waiting else HostResult.ANSWERED

    def _most_for(self, domain: str, hop: NextHop | None) -> int:
        """How many connections the mail for a domain may have."""
        parts = self._destinations.parts
        return parts.of_domain(domain) if hop is None else parts.of_address(hop.destination)

    @asynccontextmanager
    async def _counted(self, hop: NextHop | None) -> AsyncIterator[list[Connection]]:
        """Count a connection to a next hop, as long as one that is put into the list stands.

        A connection that failed or was given up stands at the host until the host has closed it: a
        limit of the next hop waits for that.
        """
        opened: list[Connection] = []
        if hop is None:
            yield opened
            return
        if hop.max_connections is not None:
            self._pool.make_room_at_hop(hop, self._limits.idle(hop))
        while not self._limits.may_open(hop):
            if self._standing:
                await asyncio.wait(self._standing, return_when=asyncio.FIRST_COMPLETED)
            else:  # one that is being made may come to nothing
                await asyncio.sleep(_AGAIN_SECONDS)
        try:
            yield opened
        finally:
            if opened:
                task = asyncio.create_task(self._count_until_gone(hop, opened))
                self._standing.add(task)
                task.add_done_callback(self._standing.discard)
            else:
                self._limits.gone(hop)

    async def _count_until_gone(self, hop: NextHop, opened: Sequence[Connection]) -> None:
        for connection in opened:
            await connection.wait_closed()
        self._limits.gone(hop)
        self._destinations.on_room(hop.destination)

    def _note_unreached(
        self, failure: negotiate.Unmet | negotiate.Failed, outcome: Deferred, use: Use
    ) -> HostResult:
        """Note what a failed connection tells of its destination."""
        if isinstance(failure, negotiate.Failed):
            answer = failure.answer
            if turns_away(answer):
                return self.turned_away(use)
            if answer.reply is None and answer.stage in (Stage.CONNECT, Stage.GREETING):
                kept = self._pool.kept_at(use.destination.name)
                if self._destinations.unreached(use, kept, outcome):
                    return self.turned_away(use)
                return HostResult.SILENT
        self._destinations.answered(use)
        return HostResult.ANSWERED


async def _with_alarm(
    failure: negotiate.Unmet | negotiate.Failed, past: AtHost, policy: HopPolicy
) -> tuple[negotiate.Unmet | negotiate.Failed, HopPolicy]:
    """Add the downgrade alarm to a failed connection, if `downgrade_memory: defer` required the
    earlier level here.
    """
    if not isinstance(failure, negotiate.Unmet) or failure.instead is None:
        return failure, policy
    alarm = past.alarm(failure.instead)
    if alarm is None:
        return failure, policy
    await past.ring(alarm)
    failure = replace(failure, error=f"{failure.error}; {past.why_held(alarm)}")
    return failure, replace(policy, memory=alarm)
