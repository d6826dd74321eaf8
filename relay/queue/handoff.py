"""Entries on the short way from `accept` to `claim_due`, without a look at the disk. Pure.

What is accepted and due at once waits here, already claimed, with its content where
that is small. The room is bounded in entries, in bytes, for each domain and for each message,
so that a dead destination, or a message to a thousand of them, fills its own share and no
more; what finds no room waits on disk like all other mail, and so do reports (DSNs): mail that
somebody sent comes first. Room is reserved before a commit and filled after it: nothing is handed
over that is not committed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import datetime

from relay.queue.entry import Entry

_ENTRY_BYTES = 1024
_RECIPIENT_BYTES = 512


@dataclass(frozen=True, slots=True)
class HandOffLimits:
    """How much may be on its way at once."""

    entries: int = 4096
    entries_per_domain: int = 1024
    size_bytes: int = 32 * 1024 * 1024
    entries_per_message: int = 20
    """A message to more domains does not take the short way, so that its successors have it."""
    content_bytes: int = 64 * 1024
    """Content up to this size goes along; larger is read again when it is sent."""


@dataclass(slots=True)
class Shares:
    """How many entries of each domain one claim has taken, and how many it may; None for any
    number.
    """

    most: Callable[[str], int] | None = None
    taken: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Shares:
        """The same, to be counted on apart."""
        return Shares(self.most, self.taken.copy())

    def left(self, domain: str, limit: int = 1) -> int:
        """How many more of a domain, at most `limit`."""
        if self.most is None:
            return limit
        return max(min(limit, self.most(domain) - self.taken[domain]), 0)


@dataclass(frozen=True, slots=True)
class ClaimQuery:
    """Which entries a claim is to give out: at most `limit` that are due, of no domain in `skip`,
    and of no other than those in `only` where it is not None.
    """

    now: datetime
    limit: int
    skip: Collection[str]
    shares: Shares
    only: Collection[str] | None

    def copy(self) -> ClaimQuery:
        """The same, whose shares are counted on apart."""
        return replace(self, shares=self.shares.copy())


def weight_of(entry: Entry) -> int:
    """About how much memory an entry holds."""
    return len(entry.content or b"") + _ENTRY_BYTES + _RECIPIENT_BYTES * len(entry.recipients)


class HandOff:
    """Claimed entries in the order of their arrival, served in turn by domain."""

    def __init__(self, limits: HandOffLimits) -> None:
        self._limits = limits
        self._waiting: OrderedDict[str, deque[Entry]] = OrderedDict()
        self._domain_entries: dict[str, int] = {}
        self._entries = 0
        self._bytes = 0
        self._present = 0

    def __len__(self) -> int:
        """How many entries wait here."""
        return self._present

    @property
    def is_crowded(self) -> bool:
        """More than half of the room is taken."""
        return 2 * self._entries > self._limits.entries or 2 * self._bytes > self._limits.size_bytes

    def reserve(self, entry: Entry, most: int | None = None) -> bool:
        """Keep room for an entry that is about to be committed; False where there is none. `most`:
        how many of its domain may be here.
        """
        domain, weight, limits = entry.domain, weight_of(entry), self._limits
        in_domain = self._domain_entries.get(domain, 0)
        if (
            self._entries >= limits.entries
            or in_domain >= limits.entries_per_domain
            or (most is not None and in_domain >= most)
            or self._bytes + weight > limits.size_bytes
        ):
            return False
        self._domain_entries[domain] = in_domain + 1
        self._entries += 1
        self._bytes += weight
        return True

    def give_up(self, entry: Entry) -> None:
        """Let go of the room of an entry that was reserved, and did not come or has left."""
        domain = entry.domain
        left = self._domain_entries[domain] - 1
        if left:
            self._domain_entries[domain] = left
        else:
            del self._domain_entries[domain]
        self._entries -= 1
        self._bytes -= weight_of(entry)

    def put(self, entry: Entry) -> None:
        """Hand over an entry for which room was reserved."""
        queue = self._waiting.get(entry.domain)
        if queue is None:
            self._waiting[entry.domain] = deque((entry,))
        else:
            queue.append(entry)
        self._present += 1

    def take(
        self,
        limit: int,
        skip: Collection[str] = (),
        shares: Shares | None = None,
        only: Collection[str] | None = None,
    ) -> list[Entry]:
        """At most `limit` entries, one of each domain in turn, of none that is in `skip` or has its
        share.
        """
        shares = shares or Shares()
        if only is not None:
            return self._take_only(limit, [one for one in only if one not in skip], shares)
        taken: list[Entry] = []
        passed: list[tuple[str, deque[Entry]]] = []
        while self._waiting and len(taken) < limit:
            domain, queue = self._waiting.popitem(last=False)
            if domain in skip or not shares.left(domain):
                passed.append((domain, queue))
                continue
            taken.append(queue.popleft())
            shares.taken[domain] += 1
            if queue:
                self._waiting[domain] = queue
        for domain, queue in reversed(passed):
            self._waiting[domain] = queue
            self._waiting.move_to_end(domain, last=False)
        self._left(taken)
        return taken

    def _take_only(self, limit: int, only: Collection[str], shares: Shares) -> list[Entry]:
        """`take` of some domains, however many others wait here."""
        taken: list[Entry] = []
        domains = deque(domain for domain in only if domain in self._waiting)
        while domains and len(taken) < limit:
            domain = domains.popleft()
            if not shares.left(domain):
                continue
            queue = self._waiting[domain]
            taken.append(queue.popleft())
            shares.taken[domain] += 1
            if queue:
                domains.append(domain)
            else:
                del self._waiting[domain]
        self._left(taken)
        return taken

    def take_but(self, domains: Collection[str]) -> list[Entry]:
        """All entries of other domains than these."""
        return self.take_of([domain for domain in self._waiting if domain not in domains])

    def take_beyond(self, most: Callable[[str], int]) -> list[Entry]:
        """The newest entries of each domain that has more than so many here."""
        taken = []
        for domain, queue in list(self._waiting.items()):
            left = most(domain)
            while len(queue) > left:
                taken.append(queue.pop())
            if not queue:
                del self._waiting[domain]
        self._left(taken)
        return taken

    def take_of(self, domains: Collection[str]) -> list[Entry]:
        """All entries of some domains."""
        taken = [entry for domain in domains for entry in self._waiting.pop(domain, ())]
        self._left(taken)
        return taken

    def take_all(self) -> list[Entry]:
        """Every entry."""
        return self.take_of(list(self._waiting))

    def oldest(self, skip: Collection[str] = ()) -> Entry | None:
        """An entry that waits for longest in its domain, outside `skip`."""
        return next(
            (queue[0] for domain, queue in self._waiting.items() if domain not in skip), None
        )

    def _left(self, taken: list[Entry]) -> None:
        self._present -= len(taken)
        for entry in taken:
            self.give_up(entry)
