"""Which hosts of a next hop are dead, when each is tried again, and whose turn it is. Pure.

    what happened                                     the host is dead for
    no connection, no greeting, 4yz or 5yz to it      all messages that come from the same address,
                                                      over the same IP family, with the same EHLO
    the login was refused                             all messages of this next hop, until the user
                                                      or the password is another one
    TLS did not meet what a message requires          messages of this next hop that require as much

A host that says that it has too many connections is not dead. Requirements of TLS differ from
message to message: a message that requires more than a host can give does not stop the others.

The relay leaves a dead host alone for 15 seconds, and for twice as long after each further failure,
up to 5 minutes. When that time is over, one connection tests the host; other messages pass the host
by until the test has ended. The first session that comes about ends the death.

A connection that began before the failure was noted is part of that failure. A connection that
began before the last new session came about shows nothing: the host answered later.

The hosts of a group are equals: each attempt begins with the next one of those that are not dead.

No function here waits or opens a socket. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from itertools import groupby
from math import inf

from relay.mail.outcome import Deferred
from relay.route.floor import Proof
from relay.route.next_hop import Credentials, Host

FIRST_REST = 15.0
LONGEST_REST = 300.0
"""Seconds that a dead host is left alone, after its first failure and at most."""


class Cause(StrEnum):
    """Why a host is dead, as the log says it; in the order in which a session meets them."""

    UNREACHABLE = "it does not answer"
    TLS = "it does not give the TLS that messages require"
    LOGIN = "it refuses the login"


_Scope = tuple[str, int, Cause, str, Proof]
"""What a death holds for: host, port, cause, next hop, and the proof that the host did not give. A
host that does not answer is dead for all next hops that connect in the same way: in place of the
next hop stands `NextHop.appearance`.
"""


def rest(failures: int) -> float:
    """How long a host is left alone after so many failures in a row."""
    return float(min(FIRST_REST * 2 ** min(failures - 1, 20), LONGEST_REST))


@dataclass(eq=False, slots=True)
class Trial:
    """A message that turns to a host: from before the connect until there is a session or none."""

    host: Host
    proof: Proof
    began: float

    @property
    def scopes(self) -> tuple[_Scope, ...]:
        """The deaths that keep the message from the host, in the order of `Cause`."""
        return _scopes(self.host, self.proof)


def _scopes(host: Host, proof: Proof) -> tuple[_Scope, ...]:
    where = host.name, host.port
    hop, appearance = (host.hop.name, host.hop.appearance) if host.hop is not None else ("", "")
    tls = dict.fromkeys((Proof.ENCRYPTED, proof)) if proof is not Proof.NOTHING else ()
    return (
        (*where, Cause.UNREACHABLE, appearance, Proof.NOTHING),
        *((*where, Cause.TLS, hop, each) for each in tls),
        (*where, Cause.LOGIN, hop, Proof.NOTHING),
    )


@dataclass(slots=True)
class _Death:
    """The failures in a row, the last at `since`. `outcome`: of the message that met the last one.
    `credentials`: of that message. `tested_by`: the one connection that tests the host.
    """

    failures: int
    since: float
    until: float
    outcome: Deferred
    credentials: Credentials | None
    tested_by: Trial | None = None


class HostHealth:
    """The hosts of all next hops of this process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deaths: dict[_Scope, _Death] = {}
        self._lived_at: dict[_Scope, float] = {}
        self._turns: Counter[tuple[str, int]] = Counter()

    # --- whose turn it is -------------------------------------------------------------------------

    def deal(self, hosts: Sequence[Host], proof: Proof) -> list[Host]:
        """The order of one attempt: group by group; within a group the next host that is not dead
        for a message with this proof comes first, with all its addresses.
        """
        if len(hosts) == 1:
            return list(hosts)
        dealt: list[Host] = []
        for _, group in groupby(hosts, key=lambda host: host.preference):
            dealt += self._deal_equals(list(group), proof)
        return dealt

    def _deal_equals(self, group: Sequence[Host], proof: Proof) -> list[Host]:
        addresses: dict[str, list[Host]] = {}
        for host in group:
            addresses.setdefault(host.name, []).append(host)
        if len(addresses) == 1:
            return list(group)
        first, now = group[0], self._clock()
        dead = [
            name
            for name, own in addresses.items()
            if self._blocking(own[0], _scopes(own[0], proof), now) is not None
        ]
        alive = [name for name in addresses if name not in dead]
        if alive:
            key = (first.hop.name if first.hop is not None else "", first.preference)
            turn = self._turns[key] % len(alive)
            self._turns[key] += 1
            alive = alive[turn:] + alive[:turn]
        return [host for name in (*alive, *dead) for host in addresses[name]]

    # --- what an attempt asks and tells -----------------------------------------------------------

    def begin(self, host: Host, proof: Proof) -> Trial | Deferred:
        """A message with this proof turns to a host; or the outcome of a message that does not,
        because the host is dead.
        """
        now = self._clock()
        trial = Trial(host, proof, now)
        if not self._deaths:
            return trial
        scopes = trial.scopes
        blocking = self._blocking(host, scopes, now)
        if blocking is not None:
            return _not_tried(blocking, now)
        for scope in scopes:
            if (death := self._deaths.get(scope)) is not None:
                death.tested_by = trial
        return trial

    def died(self, trial: Trial, cause: Cause, outcome: Deferred) -> bool:
        """No session came about, for this cause. Returns whether that is news."""
        self.end(trial)
        scopes = trial.scopes
        if self._lived_at.get(scopes[0], -inf) >= trial.began:
            return False
        now = self._clock()
        # The last scope of a cause is the one with the proof that the message needs.
        scope = next(scope for scope in reversed(scopes) if scope[2] is cause)
        before = self._deaths.get(scope)
        if before is not None and trial.began < before.since:
            return False
        for passed in scopes[: scopes.index(scope)]:
            if passed[2] is not cause:
                self._deaths.pop(passed, None)
        if before is not None and not _holds_for(trial.host, scope, before):
            before = None
        failures = before.failures + 1 if before is not None else 1
        until, credentials = now + rest(failures), trial.host.credentials
        self._deaths[scope] = _Death(failures, now, until, outcome, credentials)
        return failures == 1

    def lives(self, trial: Trial) -> bool:
        """A new session came about. Returns whether the host was dead before."""
        self.end(trial)
        scopes = trial.scopes
        self._lived_at[scopes[0]] = self._clock()
        ended = [scope for scope in scopes if self._deaths.pop(scope, None) is not None]
        return bool(ended)

    def end(self, trial: Trial) -> None:
        """The trial is over. Where it showed nothing, another connection may test the host."""
        if not self._deaths:
            return
        for scope in trial.scopes:
            death = self._deaths.get(scope)
            if death is not None and death.tested_by is trial:
                death.tested_by = None

    def unreachable_until(self, hosts: Sequence[Host]) -> float | None:
        """When the first of some hosts is tested, if all are dead for all messages; else None."""
        deaths = [self._deaths.get(_scopes(host, Proof.NOTHING)[0]) for host in hosts]
        until = [death.until for death in deaths if death is not None]
        return min(until) if len(until) == len(deaths) else None

    def retry(self) -> None:
        """Let dead hosts be tested at once."""
        for death in self._deaths.values():
            death.until = self._clock()

    def _blocking(self, host: Host, scopes: Sequence[_Scope], now: float) -> _Death | None:
        """The death that keeps a message from a host for now."""
        for scope in scopes:
            death = self._deaths.get(scope)
            if death is None or not _holds_for(host, scope, death):
                continue
            if now < death.until or death.tested_by is not None:
                return death
        return None


def _holds_for(host: Host, scope: _Scope, death: _Death) -> bool:
    """Whether a death is one for this message: a refused login says nothing of a corrected one."""
    return scope[2] is not Cause.LOGIN or death.credentials == host.credentials


def _not_tried(death: _Death, now: float) -> Deferred:
    outcome, ago = death.outcome, timedelta(seconds=round(now - death.since))
    text = f"not tried, it failed {ago} ago: {outcome.description}"
    return Deferred(outcome.status, outcome.code, "", text, tls_unmet=outcome.tls_unmet)
