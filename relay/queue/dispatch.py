"""Which entries an engine gives out: those of the hand-off, and in turn those that wait in the
store.

The same for every engine. `StoredClaims` is what the engine does for it: claims in the store are
committed there, and found again after a crash.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from relay.queue.due import DueHint, is_due_at_once
from relay.queue.entry import TLS_REPORT, Entry, QueuedRecipient, State
from relay.queue.handoff import ClaimQuery, HandOff, HandOffLimits, Shares
from relay.queue.settle import Settlement
from relay.queue.store import NewMessage, SpoolError

_HANDED_OVER = 2
"""So many times what a node may deliver at once of a domain, where others may deliver, too."""


class StoredClaims(Protocol):
    """The claims of an engine, in the store."""

    async def claim_stored(self, query: ClaimQuery, /) -> list[Entry]:
        """Entries that are due, claimed. If the caller is cancelled, they are given back."""

    async def next_stored(self, skip: Collection[str], /) -> datetime | None:
        """When the next unclaimed entry outside `skip` is due, or a little earlier."""

    async def give_back(self, entries: Sequence[Entry]) -> None:
        """Have claimed entries wait in the store, due at once."""

    def give_back_later(self, entries: Sequence[Entry]) -> None:
        """The same, without waiting for it; calls `Dispatch.changed` when it is done."""


class Dispatch:
    """Entries on their way to an attempt."""

    def __init__(self, limits: HandOffLimits, stored: StoredClaims) -> None:
        self._limits = limits
        self._stored = stored
        self._handoff = HandOff(limits)
        self._due = DueHint()
        self._limit_of: Callable[[str], int] | None = None
        self.is_divided = False
        self._turn = 0
        self._claiming = asyncio.Lock()
        self._work = asyncio.Event()
        self.counts = StateCounts()
        self._give_back: list[Callable[[], Awaitable[None]]] = []

    # Taking in.

    def reserve(self, new: NewMessage, *, in_file: bool) -> list[Entry]:
        """The entries of a new message that are handed over as soon as it is committed."""
        entries = self._entries(new, in_file=in_file)
        if (
            new.message.origin in ("dsn", TLS_REPORT)
            or len(entries) > self._limits.entries_per_message
        ):
            return []
        return [
            entry
            for entry in entries
            if self._handoff.reserve(entry, self._most_handed_over(entry.domain))
        ]

    def _entries(self, new: NewMessage, *, in_file: bool) -> list[Entry]:
        """What of a new message is due at once, by domain."""
        small = not in_file and len(new.content) <= self._limits.content_bytes
        kept = new.content if small else None
        total = len(new.recipients)
        if total == 1 and is_due_at_once(new.message, new.recipients[0]):
            return [Entry(new.message, new.recipients, kept, total)]
        by_domain: dict[str, list[QueuedRecipient]] = {}
        for one in new.recipients:
            if is_due_at_once(new.message, one):
                by_domain.setdefault(one.domain, []).append(one)
        return [Entry(new.message, tuple(those), kept, total) for those in by_domain.values()]

    def accepted(self, messages: Sequence[NewMessage], handed: Sequence[Entry]) -> None:
        """These messages are committed, and these of their entries handed over."""
        self.counts.accepted(messages)
        for entry in handed:
            self._handoff.put(entry)
        others = sum(len(new.recipients) for new in messages)
        if others != sum(len(entry.recipients) for entry in handed):
            for new in messages:
                for one in new.recipients:
                    if one.next_attempt is not None and not is_due_at_once(new.message, one):
                        self._due.sooner(one.next_attempt, one.domain)
            self._due.now()
        self._work.set()

    def give_up(self, entries: Sequence[Entry]) -> None:
        """What was reserved was not committed."""
        for entry in entries:
            self._handoff.give_up(entry)

    # Giving out.

    def limit_domains(self, limit_of: Callable[[str], int]) -> None:
        """A claim takes no more of a domain than this says; 0: the domain is not served here."""
        self._limit_of = limit_of

    def serves(self, domain: str) -> bool:
        """Whether mail for a domain is given out."""
        return self._limit_of is None or self._limit_of(domain) > 0

    def _most_handed_over(self, domain: str) -> int | None:
        """How many entries of a domain may be in the hand-off, None for any number. `is_divided`:
        other nodes have parts of the limits, and are to find mail for them in the store.
        """
        if self._limit_of is None:
            return None
        limit = self._limit_of(domain)
        return _HANDED_OVER * limit if self.is_divided or not limit else None

    async def leave_to_others(self) -> None:
        """Let wait in the store what others are to deliver now."""
        if self.is_divided:
            await self._spill(self._handoff.take_beyond(lambda d: self._most_handed_over(d) or 0))
        self.changed()

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        with_new: bool = False,
    ) -> list[Entry]:
        """Entries that are due: from the hand-off, and for a fair part from the store if some wait
        there.
        """
        if limit <= 0:
            return []
        async with self._claiming:
            shares = Shares(self._limit_of)
            claimed = await self._claim_due(ClaimQuery(now, limit, skip, shares, only))
            if only is not None and with_new:
                claimed += self._handoff.take(limit - len(claimed), skip, shares)
            return claimed

    async def _claim_due(self, query: ClaimQuery) -> list[Entry]:
        limit, skip, shares, only = query.limit, query.skip, query.shares, query.only
        if skip and self._handoff.is_crowded:
            await self._spill(self._handoff.take_of(skip))
        if only is not None and self._handoff.is_crowded:
            await self._spill(self._handoff.take_but(only))
        if not self._due.may_be_due(query.now, skip):
            return self._handoff.take(limit, skip, shares, only)
        self._turn ^= 1
        at_once = self._handoff.take((limit + self._turn) // 2, skip, shares, only)
        try:
            stored = await self._claim_stored(replace(query, limit=limit - len(at_once)))
        except BaseException:
            self._put_back(at_once)
            raise
        left = limit - len(at_once) - len(stored)
        return at_once + stored + self._handoff.take(left, skip, shares, only)

    async def _claim_stored(self, query: ClaimQuery) -> list[Entry]:
        if query.limit <= 0:
            return []
        before = self._due.begin()
        entries = await self._stored.claim_stored(query)
        try:
            if len(entries) < query.limit and query.only is None:
                found = await self._stored.next_stored(query.skip)
                self._due.learn(before, found, query.skip)
        except BaseException:
            # No caller takes them any more: they are due again now, not after a restart.
            self._stored.give_back_later(entries)
            raise
        query.shares.taken.update(entry.domain for entry in entries)
        return entries

    def _put_back(self, entries: list[Entry]) -> None:
        """Entries that could not be given out wait in the hand-off again, where they had their
        room.
        """
        full = [entry for entry in entries if not self._handoff.reserve(entry)]
        for entry in entries:
            if entry not in full:
                self._handoff.put(entry)
        self._stored.give_back_later(full)

    async def _spill(self, entries: list[Entry]) -> None:
        """Let entries wait in the store, so that the hand-off has room for others."""
        if entries:
            try:
                await self._stored.give_back(entries)
            except SpoolError:
                self._put_back(entries)
                raise
            self._due.now()

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        """When there is something to claim."""
        waiting = self._handoff.oldest(skip)
        if waiting is not None:
            return waiting.message.arrived
        if self._due.is_about(skip):
            return self._due.due
        before = self._due.begin()
        found = await self._stored.next_stored(skip)
        self._due.learn(before, found, skip)
        return found

    async def wait_for_work(self) -> None:
        """Return when there may be something new to claim."""
        await self._work.wait()
        self._work.clear()

    # What changes when something is due.

    def changed(self) -> None:
        """Anything may be due now."""
        self._due.now()
        self._work.set()

    def note_due(self, due: datetime) -> None:
        """Something that others wrote is due at `due`, of whatever domain."""
        if self._due.due is None or due < self._due.due:
            self._due.now()
            self._work.set()

    def forget_all(self) -> None:
        """What waits to be given out is another's now."""
        self._handoff.take_all()

    def due_later(self, due: datetime, domain: str) -> None:
        """A recipient of `domain` is due at `due`."""
        self._due.sooner(due, domain)
        self._work.set()

    def settled(self, settlement: Settlement) -> None:
        """What an attempt came to is committed."""
        self.counts.settled(settlement)
        for change in settlement.changes:
            if change.recipient.next_attempt is not None:
                self.due_later(change.recipient.next_attempt, change.recipient.domain)

    # The operator.

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        """Whom to ask for claims that were not begun on."""
        self._give_back.append(give_back)

    @asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Nothing is claimed meanwhile; what is not being tried is in the store, within the
        operator's reach.
        """
        async with self._claiming:
            for give_back in self._give_back:
                await give_back()
            await self._spill(self._handoff.take_all())
            yield


class StateCounts:
    """How many recipients are in each state that is not final, counted along with the commits."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys((State.QUEUED, State.DEFERRED, State.HELD), 0)

    def set(self, counts: Mapping[State, int]) -> None:
        """As the store has them."""
        self._counts.update(counts)

    def get(self) -> dict[State, int]:
        """The numbers now."""
        return dict(self._counts)

    def add(self, counts: Mapping[State, int]) -> None:
        """So many more; or fewer, where it is below zero."""
        for state, more in counts.items():
            if state in self._counts:
                self._counts[state] += more

    def accepted(self, messages: Sequence[NewMessage]) -> None:
        """These messages are committed."""
        counts = self._counts
        for new in messages:
            for one in new.recipients:
                if one.state in counts:
                    counts[one.state] += 1

    def settled(self, settlement: Settlement) -> None:
        """What an attempt came to is committed."""
        counts = self._counts
        before = {one.index: one.state for one in settlement.entry.recipients}
        for change in settlement.changes:
            if (old := before[change.recipient.index]) in counts:
                counts[old] -= 1
            if (new := change.recipient.state) in counts:
                counts[new] += 1
