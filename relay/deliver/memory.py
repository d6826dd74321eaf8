"""What mail hosts have shown of TLS before, at hand for attempts. †

    of_domain   before an attempt: what is remembered; from memory, else from the store
    learn       after a session that carried mail: gathered, and written within seconds
    ring        mail goes, or would go, with less than before: written at once, told once a day

One for each worker; the store is one for all. What is at hand is asked for anew after a few
seconds, since another worker may know more, or the operator may have had it forgotten. A message
costs no write: sightings are gathered and written together, within a second where a level has
changed and within five where only numbers have. A crash loses what was learned in these seconds,
and the next session teaches it again. An alarm is written before its mail goes; if the store
cannot be written, the relay logs the alarm and the mail goes.

`relay.route.memory` decides; this module remembers and waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from relay.mail.memory import DomainMemory, DowngradeAlarm, Shown, Sighting
from relay.mail.outcome import HopSession
from relay.policy.settings import MemoryAction
from relay.queue.memory import Change, MemoryStore
from relay.queue.store import SpoolError
from relay.route.cache import ExpiringCache
from relay.route.memory import (
    MemoryOptions,
    Recalled,
    alarm_of,
    held_until,
    is_as_known,
    learned,
    most_of,
    recalled,
    rung,
    without_host,
)
from relay.route.security import Requirement, held_to

log = logging.getLogger(__name__)

_AT_HAND = 20_000
_AT_HAND_SECONDS = 5.0
_WRITE_SECONDS = 5.0
_WRITE_SOON_SECONDS = 1.0
_DOMAINS_IN_A_WRITE = 500
_GATHERED = 20_000
"""Domains of which something may wait to be written, while the store is in trouble."""
_KEPT_DOMAINS = 500_000
_PURGE_SECONDS = 600.0
_DAY_SECONDS = 86400.0

_Kind = tuple[str, Shown, Shown, bool]
_Gathered = dict[str, dict[_Kind, Sighting]]
"""By domain; one sighting for each host, level, most that could be seen, and old TLS or not."""


@dataclass(frozen=True, slots=True)
class _Known:
    memory: DomainMemory | None


def shown_by(session: HopSession) -> Shown:
    """What a host has shown in a session."""
    if not session.tls:
        return Shown.NONE
    return Shown.VERIFIED if session.certificate_verified else Shown.ENCRYPTED


class DowngradeMemory:
    """`options`: those in force; `on_alarm`: hears of each alarm, once a day and kind."""

    def __init__(
        self,
        store: MemoryStore,
        options: Callable[[], MemoryOptions],
        *,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float] = time.monotonic,
        on_alarm: Callable[[DowngradeAlarm], None] = lambda alarm: None,
    ) -> None:
        self._store = store
        self._options = options
        self.clock = clock
        self._monotonic = monotonic
        self._on_alarm = on_alarm
        self._at_hand: ExpiringCache[_Known] = ExpiringCache(_AT_HAND)
        self._gathered: _Gathered = {}
        self._being_written: _Gathered = {}
        self._writing = asyncio.Lock()
        self._is_urgent = asyncio.Event()
        self._in_trouble = False
        self._told_in_trouble: ExpiringCache[bool] = ExpiringCache(_AT_HAND)

    @property
    def options(self) -> MemoryOptions:
        """Those in force."""
        return self._options()

    # --- for attempts -----------------------------------------------------------------------------

    async def of_domain(
        self, domain: str, action: MemoryAction | None, *, is_waived: bool
    ) -> OfDomain | None:
        """What an attempt for a domain (normalised) goes by; None where nothing is remembered.

        `action`: the word of a rule for the domain; `is_waived`: the message is not held to it.
        Raises `SpoolError` where mail may have to wait and the store cannot be read.
        """
        options = self.options
        action = action or options.action
        if action is MemoryAction.IGNORE:
            return None
        try:
            memory = await self.known(domain)
        except SpoolError as error:
            if action is MemoryAction.DEFER:
                raise
            self._note_trouble(error)
            memory = None
        return OfDomain(self, domain, memory, action, options, is_waived)

    async def known(self, domain: str) -> DomainMemory | None:
        """All that is remembered of a domain, what is not written yet included."""
        at_hand = self._at_hand.get(domain, now=self._monotonic())
        if at_hand is not None:
            return at_hand.memory
        memory = await self._store.memory(domain)
        self._in_trouble = False
        for gathered in (self._being_written, self._gathered):
            memory = self._with(memory, domain, gathered.get(domain, {}).values())
        self._have_at_hand(domain, memory)
        return memory

    def learn(
        self, domain: str, host: str, shown: Shown, most: Shown, *, is_old: bool = False
    ) -> None:
        """Learn what a host has shown in a session that carried mail; `most`, `is_old`: see
        `Sighting`.
        """
        now = self.clock()
        kinds = self._gathered.get(domain)
        if kinds is None:
            if len(self._gathered) >= _GATHERED:
                return  # the store is in trouble; the next session teaches it again
            kinds = self._gathered[domain] = {}
        kind = host, shown, most, is_old
        seen = kinds.get(kind)
        if seen is not None:
            seen.again(now)
        else:
            kinds[kind] = Sighting(host, shown, most, now, now, 1, is_old)
        at_hand = self._at_hand.get(domain, now=self._monotonic())
        before = at_hand.memory if at_hand is not None else None
        if before is None or not is_as_known(before, host, shown):
            if at_hand is not None:
                seen = Sighting(host, shown, most, now, now, 1, is_old)
                self._have_at_hand(domain, self._with(before, domain, [seen]))
            self._is_urgent.set()

    async def ring(self, domain: str, alarm: DowngradeAlarm, *, host: str) -> None:
        """Mail for a domain goes, or would go, to `host` with less than before."""
        now, is_new_host = self.clock(), host != alarm.host
        at_hand = self._at_hand.get(domain, now=self._monotonic())
        before = at_hand.memory if at_hand is not None else None
        if before is not None:
            after, _ = rung(before, alarm, is_new_host=is_new_host, now=now)
            if after is before:
                return
        if await self._write_alarm(domain, alarm, before, is_new_host=is_new_host, now=now):
            self._tell(domain, alarm, host)

    async def _write_alarm(
        self,
        domain: str,
        alarm: DowngradeAlarm,
        known: DomainMemory | None,
        *,
        is_new_host: bool,
        now: datetime,
    ) -> bool:
        """Write an alarm down; whether it is to be told. Of several workers one tells it."""
        told = [False]  # and so it stays where the domain was forgotten this moment

        def ringing(memory: DomainMemory | None) -> DomainMemory | None:
            if memory is not None:
                memory, told[0] = rung(memory, alarm, is_new_host=is_new_host, now=now)
            return memory

        try:
            await self._write([domain], ringing)
        except SpoolError as error:
            self._note_trouble(error)
            key = f"{domain} {alarm.host} {alarm.before} {alarm.now}"
            told[0] = True
            if known is not None:
                known, told[0] = rung(known, alarm, is_new_host=is_new_host, now=now)
                self._have_at_hand(domain, known)
            # What is at hand is asked for anew, from a store that knows nothing of it.
            told[0] &= self._told_in_trouble.get(key, now=self._monotonic()) is None
            if told[0]:
                self._told_in_trouble.put(key, True, expires=self._monotonic() + _DAY_SECONDS)
        return told[0]

    def _tell(self, domain: str, alarm: DowngradeAlarm, host: str) -> None:
        of_whom = "it" if host == alarm.host else f"every known host of the domain ({alarm.host})"
        log.warning(
            "TLS downgrade: mail for %s: %s has %s, and %s has shown %s before (last at %s): "
            "docs/tls.md, When there is an alarm",
            domain,
            host,
            _NOW[alarm.now],
            of_whom,
            _BEFORE[alarm.before],
            alarm.since.isoformat(timespec="seconds"),
        )
        self._on_alarm(alarm)

    # --- for the operator -------------------------------------------------------------------------

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[DomainMemory], str | None]:
        """A page of what is remembered, by domain, and the last domain of the page; None at the
        end. The sightings of this worker are written before.
        """
        if not after:
            await self.write()
        found = await self._store.page(after=after, limit=limit)
        return found, found[-1].domain if len(found) == limit else None

    async def forget(self, domain: str, host: str = "") -> bool:
        """Forget a domain, or one host of it; whether there was one. Other workers know within
        seconds.
        """
        async with self._writing:
            self._at_hand.remove(domain)
            if not host:
                self._gathered.pop(domain, None)
                return await self._store.forget(domain)
            before = await self._store.memory(domain)
            await self._store.change({domain: lambda memory: without_host(memory, host)})
            return before is not None and host in before.hosts

    # --- writing ----------------------------------------------------------------------------------

    async def run(self, *, purges: bool) -> None:
        """Write what was gathered, for ever. `purges`: this worker removes what is too old, for all
        workers.
        """
        purge_at = self._monotonic()
        while True:
            try:
                await self.write()
                if purges and self._monotonic() >= purge_at:
                    purge_at = self._monotonic() + _PURGE_SECONDS
                    keep = self.options.keep
                    await self._store.purge(seen_before=self.clock() - keep, most=_KEPT_DOMAINS)
            except SpoolError as error:
                self._note_trouble(error)
            except Exception:  # a mistake here is no reason to stop the relay
                log.exception("what hosts have shown of TLS is not written down")
            await asyncio.sleep(_WRITE_SOON_SECONDS)
            await self._wait()

    async def _wait(self) -> None:
        """Until something is urgent, or it is time."""
        try:
            async with asyncio.timeout(_WRITE_SECONDS - _WRITE_SOON_SECONDS):
                await self._is_urgent.wait()
        except TimeoutError:
            pass

    async def write(self) -> None:
        """Write what was gathered. Raises `SpoolError`; what was gathered is kept then."""
        self._is_urgent.clear()
        while self._gathered:
            await self._write(list(self._gathered)[:_DOMAINS_IN_A_WRITE])

    async def close(self) -> None:
        """Write what is left."""
        try:
            await self.write()
        except SpoolError as error:
            self._note_trouble(error)

    async def _write(self, domains: Iterable[str], then: Change = lambda memory: memory) -> None:
        """Write down what was gathered of domains, and what is to follow it at each."""
        async with self._writing:
            gathered = {domain: self._gathered.pop(domain, {}) for domain in domains}
            self._being_written = gathered
            try:
                found = await self._store.change(
                    {
                        domain: partial(self._after, domain, tuple(kinds.values()), then)
                        for domain, kinds in gathered.items()
                    }
                )
            except BaseException:
                for domain, kinds in gathered.items():
                    self._give_back(domain, kinds)
                raise
            finally:
                self._being_written = {}
        self._in_trouble = False
        for domain, memory in found.items():
            later = self._gathered.get(domain, {})
            self._have_at_hand(domain, self._with(memory, domain, later.values()))

    def _after(
        self, domain: str, seen: Iterable[Sighting], then: Change, memory: DomainMemory | None
    ) -> DomainMemory | None:
        return then(self._with(memory, domain, seen))

    def _give_back(self, domain: str, kinds: dict[_Kind, Sighting]) -> None:
        """What could not be written waits to be written."""
        if not kinds:
            return
        waiting = self._gathered.setdefault(domain, {})
        for kind, seen in kinds.items():
            waiting[kind] = seen.joined(waiting[kind]) if kind in waiting else seen

    def _with(
        self, memory: DomainMemory | None, domain: str, seen: Iterable[Sighting]
    ) -> DomainMemory | None:
        keep = self.options.keep
        for sighting in sorted(seen, key=lambda one: one.last):
            memory = learned(memory, domain, sighting, keep=keep)
        return memory

    def _have_at_hand(self, domain: str, memory: DomainMemory | None) -> None:
        expires = self._monotonic() + _AT_HAND_SECONDS
        self._at_hand.put(domain, _Known(memory), expires=expires)

    def _note_trouble(self, error: SpoolError) -> None:
        """Say it once, until writing succeeds again."""
        if not self._in_trouble:
            log.warning("what hosts have shown of TLS cannot be looked up or kept: %s", error)
        self._in_trouble = True


_NOW = {Shown.NONE: "no TLS now", Shown.ENCRYPTED: "TLS that is not verified now"}
_BEFORE = {Shown.ENCRYPTED: "TLS", Shown.VERIFIED: "verified TLS"}


@dataclass(slots=True)
class OfDomain:
    """What one attempt goes by. `action`: log or defer."""

    whole: DowngradeMemory
    domain: str
    memory: DomainMemory | None
    action: MemoryAction
    options: MemoryOptions
    is_waived: bool

    def at(self, host: str, *, verify: bool) -> AtHost:
        """What holds at a host, for a message; `verify`: by its settings the certificate is looked
        at.
        """
        now = self.whole.clock()
        most = most_of(verify=verify, is_waived=self.is_waived)
        found = recalled(self.memory, host, most, keep=self.options.keep, now=now)
        until = None
        if found is not None and self.memory is not None and self.action is MemoryAction.DEFER:
            until = held_until(self.memory, found, defer_for=self.options.defer_for, now=now)
        return AtHost(self, host, most, found, until)


@dataclass(slots=True)
class AtHost:
    """What one host has shown before. `until`: mail is held to it so long; None: it is not."""

    of: OfDomain | None = None
    host: str = ""
    most: Shown = Shown.NONE
    found: Recalled | None = None
    until: datetime | None = None

    def over(self, needed: Requirement) -> Requirement:
        """The requirement, with what mail is held to."""
        if self.found is None or self.until is None:
            return needed
        return held_to(needed, self.found.before)

    def alarm(self, now: Shown) -> DowngradeAlarm | None:
        """The alarm where mail goes, or would go, with this much; None: it is no less."""
        return alarm_of(self.found, now)

    async def ring(self, alarm: DowngradeAlarm) -> None:
        """Have an alarm written down and told, before the mail goes."""
        if self.of is not None:
            await self.of.whole.ring(self.of.domain, alarm, host=self.host)

    def learn(self, shown: Shown, *, is_old: bool) -> None:
        """The host has shown this, and mail went."""
        if self.of is not None:
            self.of.whole.learn(self.of.domain, self.host, shown, self.most, is_old=is_old)

    def why_held(self, alarm: DowngradeAlarm) -> str:
        """Why mail waits, until when, and the cure."""
        assert self.of is not None
        assert self.until is not None
        whose = "it" if self.host == alarm.host else f"every known host ({alarm.host})"
        return (
            f"{whose} has shown {_BEFORE[alarm.before]} before (last at {_when(alarm.since)}), so "
            f"mail waits until {_when(self.until)} (downgrade_memory.action: defer); if less is "
            f"meant: relay memory forget {self.of.domain}"
        )


NO_PAST = AtHost()
"""Nothing is remembered, and nothing will be."""


def _when(at: datetime) -> str:
    return at.isoformat(timespec="seconds")
