"""Who is alive: the lease of this process, which fences its claims.

    lease(id, node, host, boot, pid, version, policy_digest, expires, lost)

The id of the lease is the token of each claim made under it. The lease is renewed six times in its
length, over a connection of its own, so never behind a batch. Only the database's clock says when
it ends. This process counts on it a sixth less, from before it asked, on a clock that goes on while
the machine sleeps; past that it begins nothing (`holds`).

A lease that has expired may be renewed. Another node marks it lost, and only one that has renewed
its own without a break for a third of its length: after an outage everybody renews first. What was
claimed under a lease that is not among the live ones is READY again. That looks at claims and not
at the dead, so a claim that a commit brought late is found, too.

The mark waits for a batch of that lease that is being committed: each batch holds a key-share lock
on the row of its lease, which a renewal does not wait for. So a lease that is marked lost commits
nothing more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from relay import __version__
from relay.queue.postgres.connection import Db, Link, StartRefused, Superseded
from relay.queue.postgres.leftovers import dead_holders, give_all_back, sweep, take_over
from relay.queue.store import SpoolError

log = logging.getLogger(__name__)

_CLOCK_DRIFT = timedelta(seconds=5)
_TAKE_OVER_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
"""Between two tries to renew while the server is away: nothing is delivered before one succeeds."""

_HELD_HERE: set[int] = set()
"""Leases of this process that are held: one of its own that is not is of a store that ended."""


def boottime() -> float:
    """Seconds on a clock that no one sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What a node is called, and how long its lease is. `policy_digest`: of the policy it decides
    by, to be compared with that of others.
    """

    name: str
    length: timedelta = timedelta(seconds=30)
    policy_digest: str = ""


class Lease:
    """`register`, then `run` until `end`. `lost` is called when the lease is lost, `taken_over`
    when claims of others were made READY, `renewed` after each renewal, with its connection, and
    `superseded` when another process has taken the name of this node.
    """

    def __init__(
        self,
        link: Link,
        options: NodeOptions,
        *,
        renewed: Callable[[Db], Awaitable[None]],
        lost: Callable[[], Awaitable[None]],
        taken_over: Callable[[int], None],
        superseded: Callable[[str], None],
    ) -> None:
        self._link = link
        self._options = options
        self._renewed = renewed
        self._lost = lost
        self._taken_over = taken_over
        self._superseded = superseded
        self._valid_until = 0.0
        self._steady_since: float | None = None
        self._offset = timedelta(0)
        self._told_drift = False
        self._failing = False
        self._hurry = asyncio.Event()
        self.id = 0
        self.node = 0

    def clock(self) -> datetime:
        """The database's time, from its last answer on."""
        return datetime.fromtimestamp(boottime(), UTC) + self._offset

    def holds(self, token: int) -> bool:
        """Whether a claim made under a lease is still this node's for sure."""
        return token == self.id and boottime() < self._valid_until

    @property
    def trouble(self) -> str:
        """Why this node may begin nothing, "" where it may."""
        if boottime() < self._valid_until:
            return ""
        return "the lease of this node could not be renewed"

    @property
    def seconds(self) -> float:
        """The length of the lease."""
        return self._options.length.total_seconds()

    # Registering.

    async def register(self) -> None:
        """Get a lease. The node's last one is taken over at once where its process is gone, and
        waited for otherwise; `StartRefused` where that is renewed.
        """
        waited_for: tuple[int, datetime] | None = None
        while (other := await self._link.ask(self._try_to_register)) is not None:
            id, expires, left = other
            if waited_for is None:
                name = self._options.name
                log.warning("node %s has a lease yet: waiting %.0f s for its end", name, left)
            elif waited_for[0] != id or expires > waited_for[1]:
                raise StartRefused(
                    f"another process is node {self._options.name}: give this one a name of its"
                    " own (queue.node)"
                )
            waited_for = id, expires
            await asyncio.sleep(min(max(left, 0.1), 1.0))

    async def _try_to_register(self, db: Db) -> tuple[int, datetime, float] | None:
        asked = boottime()
        async with db.transaction():
            await db.execute(
                "INSERT INTO relay.node (name) VALUES ($1) ON CONFLICT DO NOTHING",
                self._options.name,
            )
            self.node = await db.fetchval(
                "SELECT id FROM relay.node WHERE name = $1 FOR UPDATE", self._options.name
            )
            others = await db.fetch(
                "SELECT id, host, boot, pid, expires,"
                " extract(epoch FROM expires - now())::float8 AS left"
                " FROM relay.lease WHERE node = $1 AND lost IS NULL",
                self.node,
            )
            for other in others:
                is_gone = _is_gone(other["id"], other["host"], other["boot"], other["pid"])
                if not is_gone and other["left"] > 0:
                    return other["id"], other["expires"], other["left"]
            await self._mark_lost(db, [other["id"] for other in others])
            row = await db.fetchrow(
                "INSERT INTO relay.lease"
                " (node, host, boot, pid, version, policy_digest, expires)"
                " VALUES ($1, $2, $3, $4, $5, $6, now() + $7) RETURNING id, now()",
                self.node,
                socket.gethostname(),
                _boot(),
                os.getpid(),
                __version__,
                self._options.policy_digest,
                self._options.length,
            )
        assert row is not None
        self.id, now = row
        _HELD_HERE.add(self.id)
        self._is_ours(asked, now)
        return None

    async def _mark_lost(self, db: Db, ids: list[int]) -> None:
        if ids:
            # Waits for a batch that is being committed.
            await db.execute(
                "SELECT 1 FROM relay.lease WHERE id = ANY($1) ORDER BY id FOR UPDATE", ids
            )
            await db.execute("UPDATE relay.lease SET lost = now() WHERE id = ANY($1)", ids)

    def _is_ours(self, asked: float, now: datetime) -> None:
        """The lease was made or renewed by a statement that was sent at `asked`."""
        self._valid_until = asked + self.seconds * 5 / 6
        if self._steady_since is None:
            self._steady_since = asked
        middle = datetime.fromtimestamp((asked + boottime()) / 2, UTC)
        self._offset = now - middle
        drift = datetime.now(UTC) - now
        if abs(drift) > _CLOCK_DRIFT and not self._told_drift:
            log.warning(
                "the clock of this machine differs from that of the database by %.0f s:"
                " the database's is used",
                drift.total_seconds(),
            )
            self._told_drift = True

    # Renewing.

    async def run(self) -> None:
        """Renew, for ever; and do for others what they cannot do any more."""
        while True:
            pause = self.seconds / 6
            if self._failing:
                pause = min(pause, _PAUSE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self._link.ask(self._step)
                self._failing = False
            except Superseded as error:
                self._superseded(str(error))
                return
            except SpoolError as error:
                self._tell_failure(error)
            except Exception:  # no mistake of one renewal may end the lease
                log.exception("the lease of this node could not be renewed")

    def hurry(self) -> None:
        """Renew now: there is reason to believe that the lease is lost."""
        self._hurry.set()

    def _tell_failure(self, error: SpoolError) -> None:
        self._steady_since = None
        if not self._failing:
            self._failing = True
            log.error("the lease of this node cannot be renewed: %s", error)

    async def _step(self, db: Db) -> None:
        asked = boottime()
        if asked >= self._valid_until:
            self._steady_since = None  # it has not been renewed without a break
        now = await db.fetchval(
            "UPDATE relay.lease SET expires = now() + $2 WHERE id = $1 AND lost IS NULL"
            " RETURNING now()",
            self.id,
            self._options.length,
        )
        if now is None:
            await self._begin_anew(db)
            return
        self._is_ours(asked, now)
        if self._steady_since is not None and asked - self._steady_since >= self.seconds / 3:
            await self._look_after_others(db)
        await self._renewed(db)

    async def _begin_anew(self, db: Db) -> None:
        """Another node has marked this lease lost: drop what was not begun, and come back."""
        log.warning("the lease of node %s was lost: it begins anew", self._options.name)
        _HELD_HERE.discard(self.id)
        self._valid_until = 0.0
        self._steady_since = None
        await self._lost()
        if await self._try_to_register(db) is not None:
            raise Superseded(
                f"another process is node {self._options.name} now: give each a name of its own"
                " (queue.node)"
            )

    async def _look_after_others(self, db: Db) -> None:
        async with db.transaction():
            # One that is being committed under is looked at again with the next renewal.
            ids = await db.fetch(
                "SELECT id FROM relay.lease WHERE lost IS NULL AND expires < now() AND id <> $1"
                " FOR UPDATE SKIP LOCKED",
                self.id,
            )
            if ids:
                lost = await db.fetch(
                    "UPDATE relay.lease SET lost = now() FROM relay.node"
                    " WHERE lease.id = ANY($1) AND node.id = lease.node RETURNING node.name",
                    [row[0] for row in ids],
                )
                for (name,) in lost:
                    log.warning("node %s is lost: its mail is taken over", name)
        await self.take_over(db)

    async def take_over(self, db: Db) -> None:
        """Make READY what is claimed under no live lease.

        No longer than until the next renewal is due, and than one question may take: what is left
        comes right after that.
        """
        until = boottime() + min(self.seconds / 6, _TAKE_OVER_SECONDS)
        for holder in await dead_holders(db):
            is_more = True
            while is_more:
                if boottime() >= until:
                    self._hurry.set()
                    return
                count, is_more = await take_over(db, holder)
                if count:
                    self._taken_over(count)
        await sweep(db)

    # The end.

    async def end(self) -> None:
        """Give everything back and end the lease. What fails is left to the other nodes."""
        id, self._valid_until = self.id, 0.0
        _HELD_HERE.discard(id)
        if id:
            with suppress(SpoolError):
                await self._link.ask(give_all_back, id)


async def ask_to_give_back(db: Db) -> int:
    """Ask all nodes to give back what they have not begun; the number of the request."""
    number: int = await db.fetchval(
        "UPDATE relay.meta SET give_back = give_back + 1 RETURNING give_back"
    )
    return number


async def have_given_back(db: Db, lease: int, number: int) -> None:
    """A node has done what was asked."""
    await db.execute("UPDATE relay.lease SET given_back = $2 WHERE id = $1", lease, number)


async def others_that_hold(db: Db, lease: int, number: int) -> int:
    """How many other live nodes have not done it yet."""
    count: int = await db.fetchval(
        "SELECT count(*) FROM relay.lease"
        " WHERE id <> $1 AND lost IS NULL AND expires > now() AND given_back < $2",
        lease,
        number,
    )
    return count


def _boot() -> str:
    """This start of this machine, or of its container: process numbers compare only within it."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_gone(id: int, host: str, boot: str, pid: int) -> bool:
    """Whether the process of a lease is known not to be there any more."""
    if not boot or (host, boot) != (socket.gethostname(), _boot()):
        return False
    if pid == os.getpid():
        return id not in _HELD_HERE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
