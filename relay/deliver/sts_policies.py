"""What the MTA-STS policy of a domain requires of an attempt: record, cache and fetch. †

    record (DNS) ─► policy that is kept ─► fetch, if another is wanted ─► floor

Each worker has one `StsPolicies`. The store has the policies for all workers. Policies in use stay
in memory for a few seconds; then the store is asked again, because another worker or the operator
may have changed them. A domain has one fetch at a time, for which all its attempts wait.

An attempt waits for a fetch for at most `_PATIENCE`. Then it goes on with the policy in force. If
there is none, the attempt is made again later (`PolicyPending`). So a dead policy host delays only
the mail of its own domain, and only once.

A failure never lowers a floor: a policy holds until its age is over (RFC 8461 §3.3), and mail waits
if the store cannot be read (`SpoolError`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random

from relay.deliver.sts_fetch import Fetched, FetchFailed
from relay.policy.settings import FloorUse
from relay.queue.policies import PolicyCache, StoredPolicy
from relay.queue.store import SpoolError
from relay.route.answers import Resolver, TxtAnswer, Unanswered
from relay.route.cache import ExpiringCache
from relay.route.floor import NO_STS, StsFloor
from relay.route.mta_sts import (
    BACK_OFF,
    InvalidPolicy,
    KeptPolicy,
    PolicyError,
    Refreshed,
    StsMode,
    parse_policy,
    record_id,
    record_name,
    refresh_due,
    wants_fetch,
)

log = logging.getLogger(__name__)

_AT_HAND_SECONDS = 10.0
_AT_HAND = 20_000
_FAILURES = 20_000
_SILENT_AFTER_SECONDS = 1.0
_ASKED_AGAIN_SECONDS = 60.0
_PATIENCE = 2.0
_LATER = timedelta(seconds=15)
_REFRESH_LOOK_SECONDS = 60.0
_REFRESHED_IN_A_LOOK = 100
_REFRESHED_AT_ONCE = 5


OnFetch = Callable[[str, Fetched | FetchFailed, KeptPolicy | None], None]


class PolicyPending(Exception):
    """A policy is being fetched and none is in force: the attempt has to be repeated at `until`."""

    def __init__(self, domain: str, until: datetime) -> None:
        super().__init__(f"the MTA-STS policy of {domain} is being fetched")
        self.until = until


@dataclass(frozen=True, slots=True)
class _AtHand:
    kept: KeptPolicy | None


@dataclass(frozen=True, slots=True)
class _Failure:
    at: datetime
    error: PolicyError
    reason: str


@dataclass(frozen=True, slots=True)
class _Came:
    """What a fetch came to: a policy, or the failure."""

    kept: KeptPolicy | None
    failure: FetchFailed | None = None


class StsPolicies:
    """`on_fetch`: called after each fetch, with the policy kept before. Close it at the end."""

    def __init__(
        self,
        resolver: Resolver,
        cache: PolicyCache,
        fetch: Callable[[str], Awaitable[Fetched | FetchFailed]],
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        on_fetch: OnFetch = lambda domain, found, before: None,
    ) -> None:
        self._resolver = resolver
        self._cache = cache
        self._fetch = fetch
        self._clock = clock
        self._monotonic = monotonic
        self._random = random or Random()
        self._on_fetch = on_fetch
        self._at_hand: ExpiringCache[_AtHand] = ExpiringCache(_AT_HAND)
        self._failures: ExpiringCache[_Failure] = ExpiringCache(_FAILURES)
        self._silent: ExpiringCache[bool] = ExpiringCache(_FAILURES)
        self._under_way: dict[str, tuple[float, asyncio.Task[_Came]]] = {}
        self._refreshing = asyncio.Semaphore(_REFRESHED_AT_ONCE)

    async def floor(
        self, domain: str, use: FloorUse = FloorUse.ENFORCE, *, anew: bool = False
    ) -> StsFloor:
        """What the policy of a domain (`mta_sts.policy_domain`) asks of an attempt that begins now.

        `anew`: the record is looked up although an answer is at hand; that is done before mail is
        bounced for a policy that was not met (RFC 8461 §5.1). Raises `PolicyPending` or
        `SpoolError`.
        """
        if not domain or use is FloorUse.IGNORE:
            return NO_STS
        record = await self._record(domain, anew=anew)
        kept = await self._kept(domain)
        now = self._clock()
        failure = self._failures.get(domain, now=self._monotonic())
        if wants_fetch(kept, record, failed=failure.at if failure else None, now=now):
            assert record is not None
            return await self._floor_of_fetch(domain, record, kept, use)
        if kept is not None and not kept.is_in_force(now):
            await self._give_up(kept)
            kept = None
        error = failure.error if failure is not None and record is not None else None
        return _floor(domain, kept, use, error=error)

    async def refresh(self, domain: str) -> Refreshed:
        """Fetch a policy now, whatever its age and whatever failed before. Raises `SpoolError`."""
        kept = await self._kept(domain)
        record = await self._record(domain, anew=True)
        id = record if record is not None else kept.id if kept is not None else None
        if id is None:
            return Refreshed(None, f"{domain} has no record at {record_name(domain)}")
        came = await asyncio.shield(self._start(domain, id, is_asked_for=True)[1])
        if came.failure is None:
            return Refreshed(came.kept)
        in_force = kept is not None and kept.is_in_force(self._clock())
        return Refreshed(kept if in_force else None, came.failure.reason)

    async def kept(self, domain: str) -> KeptPolicy | None:
        """The policy that the store has for a domain, for the operator."""
        return await self._stored(domain)

    def last_failure(self, domain: str) -> str:
        """Why this worker could not fetch a policy within the last minutes, for the operator; ""
        where none failed.
        """
        failure = self._failures.get(domain, now=self._monotonic())
        return failure.reason if failure is not None else ""

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[KeptPolicy], str | None]:
        """Some of the policies in the store, by domain, and behind which domain to go on; None at
        the end.
        """
        stored = await self._cache.policies(after=after, limit=limit)
        kept = [found for one in stored if (found := _read(one)) is not None]
        return kept, stored[-1].domain if len(stored) == limit else None

    async def forget(self, domain: str) -> bool:
        """Forget a policy, for the operator; whether there was one. Other workers know within
        seconds.
        """
        self._at_hand.remove(domain)
        self._failures.remove(domain)
        return await self._cache.forget(domain)

    async def run(self) -> None:
        """Refetch due policies, for ever (RFC 8461 §3.3). One worker does it for all."""
        while True:
            await self.refetch_due()
            await asyncio.sleep(_REFRESH_LOOK_SECONDS)

    async def refetch_due(self) -> None:
        """Fetch again what is due now."""
        try:
            due = await self._cache.refresh_due(now=self._clock(), limit=_REFRESHED_IN_A_LOOK)
            await asyncio.gather(*map(self._refresh_stored, due))
        except SpoolError as error:
            log.warning("MTA-STS policies are not refetched: %s", error)
        except Exception:  # a bug here must not stop the relay
            log.exception("MTA-STS policies are not refetched")

    async def close(self) -> None:
        """Break off what is being fetched."""
        tasks = [task for _, task in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what is known ----------------------------------------------------------------------------

    async def _record(self, domain: str, *, anew: bool) -> str | None:
        """The id of the record; None where there is none, or no answer.

        Name servers that keep silent about this name are asked once a minute: the domain's mail
        does not wait for them at each attempt.
        """
        began = self._monotonic()
        if not anew and self._silent.get(domain, now=began):
            return None
        answer = await self._resolver.txt(record_name(domain), anew=anew)
        if isinstance(answer, TxtAnswer):
            return record_id(answer.texts)
        now = self._monotonic()
        if isinstance(answer, Unanswered) and now - began >= _SILENT_AFTER_SECONDS:
            self._silent.put(domain, True, expires=now + _ASKED_AGAIN_SECONDS)
        return None

    async def _kept(self, domain: str) -> KeptPolicy | None:
        at_hand = self._at_hand.get(domain, now=self._monotonic())
        return at_hand.kept if at_hand is not None else await self._stored(domain)

    async def _stored(self, domain: str) -> KeptPolicy | None:
        stored = await self._cache.policy(domain)
        kept = _read(stored) if stored is not None else None
        self._have_at_hand(domain, kept, _AT_HAND_SECONDS)
        return kept

    def _have_at_hand(self, domain: str, kept: KeptPolicy | None, seconds: float) -> None:
        self._at_hand.put(domain, _AtHand(kept), expires=self._monotonic() + seconds)

    async def _give_up(self, kept: KeptPolicy) -> None:
        """Forget a policy whose age is over and that could not be fetched again; say so once."""
        self._have_at_hand(kept.domain, None, _AT_HAND_SECONDS)
        if await self._cache.forget(kept.domain, fetched=kept.fetched) and _matters(kept):
            log.warning(
                "the MTA-STS policy of %s has expired and cannot be fetched: "
                "mail there is no longer held to it",
                kept.domain,
            )

    # --- fetching ---------------------------------------------------------------------------------

    async def _floor_of_fetch(
        self, domain: str, record: str, kept: KeptPolicy | None, use: FloorUse
    ) -> StsFloor:
        """The floor once a fetch has ended, or without waiting for its end."""
        began, task = self._start(domain, record)
        patience = max(0.0, began + _PATIENCE - self._monotonic())
        await asyncio.wait({task}, timeout=patience)
        now = self._clock()
        in_force = kept if kept is not None and kept.is_in_force(now) else None
        if not task.done():
            if in_force is None and use is FloorUse.ENFORCE:
                raise PolicyPending(domain, now + _LATER)
            return _floor(domain, in_force, use)
        came = task.result()
        if came.failure is None:
            return _floor(domain, came.kept, use, was_fetched=True)
        if in_force is not None:
            return _floor(domain, in_force, use)
        if kept is not None:
            await self._give_up(kept)
        return _floor(domain, None, use, error=came.failure.error)

    def _start(
        self, domain: str, id: str, *, is_asked_for: bool = False
    ) -> tuple[float, asyncio.Task[_Came]]:
        """The fetch for a domain that is under way, or a new one; and when it began."""
        found = self._under_way.get(domain)
        if found is None:
            work = self._fetch_and_keep(domain, id, is_asked_for=is_asked_for)
            found = self._under_way[domain] = self._monotonic(), asyncio.create_task(work)
            found[1].add_done_callback(lambda task: self._ended(domain, task))
        return found

    def _ended(self, domain: str, task: asyncio.Task[_Came]) -> None:
        del self._under_way[domain]
        if not task.cancelled():
            task.exception()  # raised where the result is waited for; perhaps nobody waits any more

    async def _fetch_and_keep(self, domain: str, id: str, *, is_asked_for: bool) -> _Came:
        before = await self._stored(domain)
        now = self._clock()
        if not is_asked_for and not wants_fetch(before, id, failed=None, now=now):
            return _Came(before)  # another worker was quicker
        found = await self._fetch(domain)
        self._on_fetch(domain, found, before)
        now = self._clock()
        if isinstance(found, FetchFailed):
            self._note_failure(domain, before, found, now)
            return _Came(None, found)
        expires = now + found.policy.max_age
        due = refresh_due(expires, now=now, jitter=self._random.random())
        kept = KeptPolicy(domain, id, found.policy, now, due)
        await self._keep(kept, found.body)
        return _Came(kept)

    def _note_failure(
        self, domain: str, before: KeptPolicy | None, found: FetchFailed, now: datetime
    ) -> None:
        until = self._monotonic() + BACK_OFF.total_seconds()
        self._failures.put(domain, _Failure(now, found.error, found.reason), expires=until)
        what = f"the MTA-STS policy of {domain} cannot be fetched ({found.error}: {found.reason})"
        if before is not None and before.is_in_force(now) and _matters(before):
            fetched, expires = (
                at.isoformat(timespec="seconds") for at in (before.fetched, before.expires)
            )
            log.warning("%s; the one of %s holds until %s", what, fetched, expires)
        else:
            log.info("%s", what)

    async def _keep(self, kept: KeptPolicy, body: bytes) -> None:
        """Keep a policy in the store; in memory for a while, if the store is in trouble."""
        domain = kept.domain
        lasts = bool(kept.policy.max_age)  # 0: it holds for the attempts that waited for it
        seconds = _AT_HAND_SECONDS
        try:
            if lasts:
                stored = StoredPolicy(domain, kept.id, body, kept.fetched, kept.refresh_at)
                await self._cache.keep(stored)
            else:
                await self._cache.forget(domain)
        except SpoolError as error:
            log.warning("the MTA-STS policy of %s cannot be kept: %s", domain, error)
            seconds = BACK_OFF.total_seconds()
        self._have_at_hand(domain, kept if lasts else None, seconds)
        self._failures.remove(domain)

    async def _refresh_stored(self, stored: StoredPolicy) -> None:
        """One policy that is due. One whose age is over and that cannot be fetched is given up."""
        async with self._refreshing:
            record = await self._record(stored.domain, anew=False)
            came = await self._start(stored.domain, record or stored.id, is_asked_for=True)[1]
        if came.failure is None:
            return
        now = self._clock()
        kept = _read(stored)
        if kept is None:
            await self._cache.forget(stored.domain, fetched=stored.fetched)
        elif kept.is_in_force(now):
            later = refresh_due(kept.expires, now=now, jitter=self._random.random())
            await self._cache.refresh_later(stored, later)
        else:
            await self._give_up(kept)


def _read(stored: StoredPolicy) -> KeptPolicy | None:
    """A policy from the store; None where this version of the program does not take its text for
    one.
    """
    try:
        policy = parse_policy(stored.body)
    except InvalidPolicy as error:
        log.warning("the kept MTA-STS policy of %s cannot be read: %s", stored.domain, error)
        return None
    return KeptPolicy(stored.domain, stored.id, policy, stored.fetched, stored.refresh_at)


def _matters(kept: KeptPolicy) -> bool:
    """Whether its end is worth a warning (RFC 8461 §3.3)."""
    return kept.policy.mode is not StsMode.NONE


def _floor(
    domain: str,
    kept: KeptPolicy | None,
    use: FloorUse,
    *,
    error: PolicyError | None = None,
    was_fetched: bool = False,
) -> StsFloor:
    """A policy as an attempt is told of it."""
    if kept is None:
        return StsFloor(domain, error=error)
    policy = kept.policy
    spares = use is FloorUse.TESTING and policy.mode is StsMode.ENFORCE
    return StsFloor(
        domain,
        StsMode.TESTING if spares else policy.mode,
        kept.id,
        policy.mx,
        policy.lines,
        kept.expires,
        was_fetched=was_fetched,
        published=policy.mode if spares else None,
    )
