"""One attempt at a next hop of the operator's: which host is tried next, and what each shows.

The next hop is one destination (`destinations`): the attempt holds one connection to it, whichever
host that leads to, so that no other entry takes its place on the way to the next host.
`host_health` knows which hosts are dead. This module asks both, tells both what became of each
host, and writes the lines of the log about deaths.

    turn_to     the next host, unless it is dead: then it is passed by
    lives       a new session came about
    failed      no session came about: full, dead, or neither
    tried       the attempt is done with one address
    end         no host took the message: is one worth waiting for? are all dead?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby

from relay.deliver.destinations import Destinations, NotNow, Use, speaks_of_load, turns_away
from relay.deliver.diagnosis import NO_REQUIRETLS, Answer, Stage
from relay.deliver.hop_limits import Holder
from relay.deliver.host_health import FIRST_REST, Cause, Trial
from relay.deliver.negotiate import Failed, Unmet
from relay.deliver.tally import Tally
from relay.mail.outcome import Deferred
from relay.route.floor import Proof
from relay.route.next_hop import Host

log = logging.getLogger(__name__)


class HostResult(Enum):
    """What a host did when it was tried. `SILENT`: it sent no greeting. `TURNED_AWAY`: it has too
    many connections of ours, and is worth waiting for. `DEAD`: a host of a next hop gave no
    session. `CANCELLED`: the attempt was cancelled.
    """

    ANSWERED = auto()
    SILENT = auto()
    TURNED_AWAY = auto()
    DEAD = auto()
    CANCELLED = auto()


@dataclass(eq=False, slots=True)
class HostTurn:
    """One host of the next hop, with its addresses. `has_more`: another address is tried next."""

    turns: HopTurns
    addresses: tuple[Host, ...]
    has_more: bool = False
    trial: Trial | None = None
    is_passed_by: bool = False

    def lives(self) -> None:
        """A new session with the host came about."""
        self.turns.lives(self)

    def failed(self, failure: Unmet | Failed, outcome: Deferred) -> HostResult:
        """No session with the host came about."""
        return self.turns.failed(self, failure, outcome)


class HopTurns:
    """The hosts of a next hop in one attempt. `kept_at`: how many idle connections there are to a
    destination, or to one address of it. Raises `NotNow` where there is no room.
    """

    def __init__(
        self,
        destinations: Destinations,
        kept_at: Callable[[str, str], int],
        hosts: Sequence[Host],
        holder: Holder,
    ) -> None:
        self._destinations = destinations
        self._health = destinations.hosts
        self._kept_at = kept_at
        self._hosts = hosts
        self._name = hosts[0].destination
        self._use = destinations.begin(self._name, holder, hosts[0].hop)
        self._silence = destinations.silence_of(self._name) if self._use is None else None
        if self._use is None and self._silence is None:
            raise NotNow((self._name,), {})
        self.results: set[HostResult] = set()

    @property
    def has_answered(self) -> bool:
        """Whether a host had its say about the message."""
        return HostResult.ANSWERED in self.results

    def deal(self, proof: Callable[[], Proof]) -> Iterator[HostTurn]:
        """The turn of each host, for a message that requires this proof, which matters only where
        there are several.
        """
        if len(self._hosts) == 1:
            yield HostTurn(self, tuple(self._hosts))
            return
        dealt = self._health.deal(self._hosts, proof())
        for _, addresses in groupby(dealt, key=lambda host: host.name):
            yield HostTurn(self, tuple(addresses))

    def turn_to(self, turn: HostTurn, host: Host, proof: Proof, tally: Tally) -> Use | None:
        """Turn to one address of a host: the connection to make; None where the host is dead, which
        is noted once.
        """
        if turn.trial is None:
            begun = self._health.begin(host, proof)
            if isinstance(begun, Trial) and self._silence is not None:
                self._health.end(begun)
                begun = self._silence
            if not isinstance(begun, Trial):
                if not turn.is_passed_by:
                    tally.pass_by(host, begun)
                turn.is_passed_by = True
                return None
            turn.trial = begun
        assert self._use is not None
        turn.has_more = host != turn.addresses[-1]
        self._destinations.turn_to(self._use, host.address)
        return self._use

    def tried(self, result: HostResult) -> None:
        """The attempt is done with this address. Until it turns to the next one, it has a
        connection to none: the last of several attempts that fail here is alone.
        """
        assert self._use is not None
        self.results.add(result)
        self._destinations.turn_to(self._use, "")

    def lives(self, turn: HostTurn) -> None:
        """A new session with the host came about."""
        assert turn.trial is not None
        assert self._use is not None
        self._destinations.answered(self._use)
        if self._health.lives(turn.trial):
            log.info("%s is alive again", _named(turn.trial.host))

    def failed(self, turn: HostTurn, failure: Unmet | Failed, outcome: Deferred) -> HostResult:
        """No session with the host came about. If it has another address, that is tried first."""
        assert turn.trial is not None
        assert self._use is not None
        if isinstance(failure, Failed) and self._is_full(failure.answer, self._use):
            return HostResult.TURNED_AWAY
        host = turn.trial.host
        cause = cause_of(failure, host)
        if cause is not Cause.UNREACHABLE:
            self._destinations.answered(self._use)
        if cause is None:
            return HostResult.ANSWERED
        if turn.has_more and cause is not Cause.LOGIN:  # no account is locked by many attempts
            return HostResult.SILENT
        if self._health.died(turn.trial, cause, outcome):
            log.warning(
                "%s is dead, %s (%s); it is left alone for %g s, then tested",
                _named(host),
                cause.value,
                outcome.description,
                FIRST_REST,
            )
        return HostResult.DEAD

    def end_turn(self, turn: HostTurn) -> None:
        """The attempt is done with this host."""
        if turn.trial is not None:
            self._health.end(turn.trial)

    def end(self, tally: Tally, *, is_untouched: bool) -> None:
        """No host took the message. Raises `NotNow` where a host is full and worth waiting for, if
        no recipient has a result (`is_untouched`). Where all hosts are dead for all messages, the
        next hop is silent until one is tested.
        """
        if self._use is None:
            return
        until = self._health.unreachable_until(self._hosts)
        if until is not None:
            outcome = tally.outcomes()[tally.pending[0].index]
            if isinstance(outcome, Deferred):
                self._destinations.all_dead(self._use, until, outcome)
            return
        if HostResult.TURNED_AWAY not in self.results or not is_untouched:
            return
        if self._destinations.turned_away(self._use, self._kept_at(self._name, "")):
            raise NotNow((self._name,), tally.outcomes())

    def close(self) -> None:
        """Give up the connection to the next hop."""
        if self._use is not None:
            self._destinations.end(self._use)

    def _is_full(self, answer: Answer, use: Use) -> bool:
        """Whether the host has too many connections of ours, and is not dead. A missing greeting,
        or a 421 that names no reason, says so while another connection to the host stands.
        """
        if answer.reply is None:
            may_be_full = answer.stage in (Stage.CONNECT, Stage.GREETING)
        elif answer.stage in (Stage.GREETING, Stage.EHLO) and speaks_of_load(answer.reply):
            return True
        else:
            may_be_full = turns_away(answer)
        kept = self._kept_at(self._name, use.address)
        return may_be_full and self._destinations.is_one_of_several(use, kept)


def cause_of(failure: Unmet | Failed, host: Host) -> Cause | None:
    """Why a host of a next hop is dead after a connection without a session; None where that shows
    nothing of the host, or only that it lacks REQUIRETLS.
    """
    if isinstance(failure, Unmet):
        return Cause.TLS if failure.status != NO_REQUIRETLS else None
    answer = failure.answer
    if answer.ours:
        return None
    if answer.stage is Stage.AUTH or _refuses_certificate(failure, host):
        return Cause.LOGIN
    return Cause.UNREACHABLE


def _refuses_certificate(failure: Failed, host: Host) -> bool:
    """Whether a host may have refused the relay's certificate: in TLS 1.3 it says so after the
    handshake, and closes.
    """
    shows_one = host.hop is not None and host.hop.certificate is not None
    is_in_tls = failure.session is not None and failure.session.tls
    return shows_one and is_in_tls and failure.answer.reply is None


def _named(host: Host) -> str:
    hop = host.hop.name if host.hop is not None else ""
    return f"next hop {hop}: {host.name} port {host.port}"
