"""How many connections each destination gets at once, from all domains that lead to it. Pure.

A destination is an address with its port, or an operator's next hop with all its hosts
(`Host.destination`). Its behaviour decides how many connections it gets:

    the destination is new                 5
    a connection took a message            one more, up to `concurrency_per_destination`; after the
                                           first reduction one more for every 20 messages
    it turned a connection away            half of the open ones, rounded up, at least one
    it turned away the only connection     none for 1 to 5 seconds, then one
    no greeting, and no other one is open  none for a time, which doubles with each silence in a
                                           row (`pacing.back_off`); then one as a test

The operator's own limits of a next hop (`hop_limits`) hold besides.

A host turns a connection away with 421 to the greeting, EHLO or MAIL, or with another 4yz and a
text about connections or rate; with such a text also to AUTH, where it knows the user. A missing
greeting (the connection is refused, reset or closed) means the same while another connection is
open or was just used. Which of its hosts a next hop uses, `host_health` decides; a next hop is
silent while all its hosts are dead.

An entry that has to wait for a connection waits in memory if that takes a moment (`patience`), and
otherwise in the queue (`next_turn`), so that a slow host takes no slot from others.

No function here waits or opens a socket. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from relay.deliver.diagnosis import Answer, Stage
from relay.deliver.hop_limits import Holder, HopLimits
from relay.deliver.host_health import HostHealth
from relay.deliver.pacing import INITIAL_WINDOW, back_off
from relay.deliver.parts import NodeParts
from relay.mail.outcome import Deferred, Outcome
from relay.mail.reply import Reply
from relay.queue.retry import RetrySchedule
from relay.route.next_hop import NextHop

_GOOD_FOR_ONE_MORE = 20
"""After so many messages a reduced destination gets one more connection."""

_AT_ONCE = 1.0
_JUST_SERVED = 5.0
_REST = (1.0, 5.0)
_PATIENCE = 2.0
"""Seconds that a message waits in memory for a connection."""

_MOST_WAITING = 200
_LONGEST_TURN = 120.0
"""The most seconds until a message for a slow destination is tried again."""
_LONGEST_TURN_OF_HOP = 900.0
"""The same where the operator's limit is why, and no attempt is needed to find that out."""
_SHORT_TURN = 5.0
"""Seconds until it is tried again while few wait."""
_TURNS_A_SECOND = 20
"""At least so many of those that wait in the queue may be asked for room in a second."""
_TURNS_A_SECOND_OF_HOP = 50
"""The most, where the operator's limit is why."""

_MOST = 10_000
"""How many destinations are remembered; beyond that, one without a connection is forgotten."""

_ABOUT_LOAD = re.compile(
    r"\bconnections?\b|concurren|\bsessions?\b|\brate\b|\btoo (?:many|much|fast)\b", re.IGNORECASE
)


_ABOUT_TLS = re.compile(r"encrypt|\btls\b", re.IGNORECASE)
"""Postfix: 450 4.7.1 Session encryption is required."""

_ABOUT_LOGINS = re.compile(r"\bfail|\binvalid|\bpassword|\battempt|\blog[- ]?ins?\b", re.IGNORECASE)


def turns_away(answer: Answer) -> bool:
    """Whether a host's answer says that it has too many of the relay's connections or messages."""
    reply = answer.reply
    if reply is not None and answer.stage is Stage.AUTH:
        # Dovecot counts the connections of a user, whom it knows only now. Too many wrong passwords
        # are something else.
        is_about_logins = _ABOUT_LOGINS.search(reply.text) is not None
        return reply.code < 500 and speaks_of_load(reply) and not is_about_logins
    if reply is None or answer.stage not in (Stage.GREETING, Stage.EHLO, Stage.MAIL):
        return False
    if reply.code == 421:
        return True
    is_about_load = speaks_of_load(reply) and _ABOUT_TLS.search(reply.text) is None
    return 400 <= reply.code < 500 and is_about_load


def speaks_of_load(reply: Reply) -> bool:
    """Whether a reply names connections or rate as its reason."""
    return _ABOUT_LOAD.search(reply.text) is not None


class NotNow(Exception):
    """An attempt ended without a result for any recipient: no host had room for a connection.

    `names`: the destinations that may have room soon. `turned_away`: the outcomes if a host turned
    the connection away and the message is not tried again; empty if the relay's own limit decided.
    """

    def __init__(self, names: tuple[str, ...], turned_away: Mapping[int, Outcome]) -> None:
        super().__init__("no room for another connection")
        self.names = names
        self.turned_away = turned_away


@dataclass(eq=False, slots=True)
class Use:
    """A connection that an entry holds, makes, or is about to make. `address`: of a next hop with
    several, the one that it leads to, since `began`; none while the entry goes from one to the
    next.
    """

    destination: Destination
    holder: Holder
    began: float
    is_connected: bool = False
    hop: NextHop | None = None
    address: str = ""


class _Turns:
    """How many entries are due later, and when, to half a second."""

    _STEP = 0.5

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._steps: list[int] = []
        self._total = 0

    def add(self, due: float) -> None:
        """One more is due then."""
        step = int(due / self._STEP)
        if step not in self._counts:
            heapq.heappush(self._steps, step)
        self._counts[step] += 1
        self._total += 1

    def count(self, now: float) -> int:
        """How many are not due yet."""
        while self._steps and self._steps[0] * self._STEP <= now:
            self._total -= self._counts.pop(heapq.heappop(self._steps))
        return self._total


@dataclass(eq=False, slots=True)
class Destination:
    """The facts about one destination.

    `good`: messages since the window changed. `seconds`: how long a message took recently.
    `later`: when the entries that wait for it in the queue are due.
    """

    name: str
    uses: dict[Holder, Use] = field(default_factory=dict)
    window: int = INITIAL_WINDOW
    is_narrowed: bool = False
    good: int = 0
    seconds: float = 0.0
    served_at: float | None = None
    rests_until: float = 0.0
    later: _Turns = field(default_factory=_Turns)
    silences: int = 0
    silent_since: float | None = None
    suspended_until: float = 0.0
    silence: Deferred | None = None

    def others(self, use: Use) -> list[Use]:
        """The connections of other entries, made or begun."""
        return [one for one in self.uses.values() if one is not use]


def _seconds_of_message(one: Destination, now: float) -> float:
    """How long a message takes there: lately, or those under way, whichever is longer."""
    ages = [now - use.began for use in one.uses.values()]
    return max(one.seconds, sum(ages) / len(ages) if ages else 0.0)


class Destinations:
    """All destinations of this process. `on_room` gets the name of each that has room again;
    `on_surplus` each next hop where so many idle connections may stay, as others need them.
    `on_division` is called while the nodes divide the limits anew: no connection is to stay idle.
    """

    def __init__(
        self,
        most: int,
        schedule: RetrySchedule | None = None,
        *,
        clock: Callable[[], float],
        limits: HopLimits | None = None,
        parts: NodeParts | None = None,
    ) -> None:
        """`most`: `concurrency_per_destination`. `clock`: the monotonic one. `limits`: those of the
        operator's next hops. `parts`: what this node has of all of them.
        """
        self.parts = parts or NodeParts(most)
        self.limits = limits or HopLimits(clock=clock)
        self._schedule = schedule or RetrySchedule()
        self._clock = clock
        self._known: dict[str, Destination] = {}
        self.hosts = HostHealth(clock)
        self._later = _Turns()
        self.on_room: Callable[[str], None] = lambda name: None
        self.on_surplus: Callable[[NextHop, int], None] = lambda hop, idle: None
        self.on_division: Callable[[], None] = lambda: None

    # --- connections ------------------------------------------------------------------------------

    def begin(self, name: str, holder: Holder, hop: NextHop | None = None) -> Use | None:
        """Take a connection for an entry, or the reserved one; None where there is no room. `hop`:
        the operator's next hop that it leads to.
        """
        now = self._clock()
        known = self._known.pop(name, None)
        if known is None:
            self._forget_one()
            known = Destination(name)
        self._known[name] = known  # the destination that was not used for longest is first
        if (use := known.uses.get(holder)) is not None:
            return use
        if self._room(known, now) <= 0:
            return None
        if hop is not None and not self.limits.begin(hop, holder):
            return None
        use = known.uses[holder] = Use(known, holder, now, hop=hop)
        return use

    def reserve(
        self, names: Iterable[str], holder: Holder, hop: NextHop | None = None
    ) -> Use | None:
        """Take a connection at the first of some destinations that has room."""
        if hop is not None and not self.limits.has_room(hop):
            return None
        return next((use for name in names if (use := self.begin(name, holder, hop))), None)

    def end(self, use: Use) -> None:
        """The entry has given up the connection. A second call has no effect."""
        if use.destination.uses.pop(use.holder, None) is not None:
            if use.hop is not None:
                self.limits.end(use.hop, use.holder)
            self.on_room(use.destination.name)

    def turn_to(self, use: Use, address: str) -> None:
        """The entry turns to this address of a next hop, or away from one (`address` is empty)."""
        use.address, use.began, use.is_connected = address, self._clock(), False

    def others_may_stay(self, use: Use) -> int:
        """How many idle connections may stay beside those in use."""
        known = use.destination
        return max(min(known.window, self._most_at(known)) - len(known.uses), 0)

    def is_within_parts(self) -> bool:
        """Whether no destination has more connections than this node's part."""
        within = (len(one.uses) <= self._most_at(one) for one in self._known.values())
        return all(within) and self.limits.is_within_parts()

    def give_up_surplus(self) -> None:
        """Have idle connections closed that are beyond this worker's part of a limit."""
        for hop, idle in self.limits.look():
            self.on_surplus(hop, idle)

    def _room(self, one: Destination, now: float) -> int:
        if now < one.suspended_until or now < one.rests_until:
            return 0
        window = 1 if one.silences else min(one.window, self._most_at(one))
        return window - len(one.uses)

    def _most_at(self, one: Destination) -> int:
        return self.parts.of_address(one.name)

    # --- what a host did --------------------------------------------------------------------------

    def answered(self, use: Use) -> None:
        """The host answered."""
        use.destination.silences, use.destination.suspended_until = 0, 0.0

    def served(self, use: Use, *, went_well: bool = True) -> None:
        """The host has answered for a message. `went_well`: it took it."""
        self.answered(use)
        one, now = use.destination, self._clock()
        one.seconds += (now - use.began - one.seconds) / 4
        one.served_at = now
        if not went_well:
            return
        one.good += 1
        if not one.is_narrowed or one.good >= _GOOD_FOR_ONE_MORE:
            one.window, one.good = min(one.window + 1, self._most_at(one)), 0

    def turned_away(self, use: Use, kept: int) -> bool:
        """The host refused another connection. Returns whether it is worth waiting for room.

        `kept`: idle connections to it.
        """
        one, now = use.destination, self._clock()
        others = one.others(use)
        standing = sum(other.is_connected for other in others) + kept
        one.window, one.is_narrowed, one.good = max((standing + 1) // 2, 1), True, 0
        if others or kept:
            return True
        one.rests_until = now + random.uniform(*_REST)
        return one.served_at is not None and now - one.served_at < _JUST_SERVED

    def unreached(self, use: Use, kept: int, silence: Deferred) -> bool:
        """No greeting came. Returns whether the host has turned the connection away.

        A connection begun before the last silence was noted is part of that silence. A connection
        that ended at once, while others were begun, tells nothing before those have ended.
        """
        one, now = use.destination, self._clock()
        has_served = one.served_at is not None and use.began <= one.served_at
        if has_served or self.is_one_of_several(use, kept):
            return True
        if one.silent_since is None or use.began > one.silent_since:
            one.silences += 1
            one.window, one.is_narrowed = INITIAL_WINDOW, False
            one.silent_since, one.silence = now, silence
            one.suspended_until = now + back_off(one.silences, self._schedule).total_seconds()
        return False

    def is_one_of_several(self, use: Use, kept: int) -> bool:
        """Whether a connection without a greeting may have been one too many for the host."""
        one = use.destination
        others = [other for other in one.others(use) if other.address == use.address]
        if kept or any(other.is_connected for other in others):
            return True
        is_early = self._clock() - use.began < _AT_ONCE and not one.silences
        return is_early and bool(others)

    def all_dead(self, use: Use, until: float, silence: Deferred) -> None:
        """All hosts of a next hop are dead; the first of them is tested at `until`."""
        one = use.destination
        one.silences += 1
        one.window, one.is_narrowed = INITIAL_WINDOW, False
        one.silent_since, one.silence, one.suspended_until = self._clock(), silence, until

    def silence_of(self, name: str) -> Deferred | None:
        """The outcome of a message for a silent destination; None where it is not silent."""
        one, now = self._known.get(name), self._clock()
        if one is None or now >= one.suspended_until or one.silence is None:
            return None
        ago = timedelta(seconds=round(now - (one.silent_since or now)))
        text = f"not tried, it gave no answer {ago} ago: {one.silence.description}"
        return Deferred(one.silence.status, one.silence.code, "", text)

    def retry_silent(self) -> None:
        """Let silent destinations, and dead hosts of next hops, be tried again at once."""
        for one in self._known.values():
            one.silences, one.suspended_until = 0, 0.0
        self.hosts.retry()

    # --- who waits --------------------------------------------------------------------------------

    def is_stuck(self, name: str) -> bool:
        """Whether it has had connections for seconds and has answered for no message meanwhile."""
        one = self._known.get(name)
        if one is None or not one.uses:
            return False
        began = next(iter(one.uses.values())).began
        return self._clock() - max(began, one.served_at or began) >= _JUST_SERVED

    def patience(self, name: str, hop: NextHop | None = None) -> int:
        """How many entries may wait in memory for a connection: those that get one soon."""
        one = self._known.get(name) or Destination(name, window=self.parts.of_address(name))
        apart = self._apart(one, hop, _seconds_of_message(one, self._clock()))
        if hop is not None and hop.rate is not None:
            return min(int(_SHORT_TURN / apart) + 2, _MOST_WAITING)
        in_time = int(_PATIENCE / apart)
        return max(min(in_time, _MOST_WAITING), self._at_once(one, hop))

    def next_turn(self, name: str, hop: NextHop | None = None) -> float:
        """In how many seconds one more entry, which waits in the queue, is due again.

        It is half of the time that the host needs now: the host may become faster, and must not
        idle. For the same reason it is a few seconds only, as long as few entries wait for all
        destinations.
        """
        one, now = self._known.get(name), self._clock()
        if one is None:
            return _PATIENCE
        seconds = _seconds_of_message(one, now)
        is_limited = hop is not None and hop.is_limited
        longest = _LONGEST_TURN_OF_HOP if is_limited else _LONGEST_TURN
        a_second = _TURNS_A_SECOND_OF_HOP if is_limited else self._turns_a_second(one, seconds)
        turn = (_PATIENCE + one.later.count(now) * self._apart(one, hop, seconds)) / 2
        turn = min(turn, max(self._later.count(now) / a_second, _SHORT_TURN))
        turn = min(max(turn, one.suspended_until - now), longest)
        one.later.add(now + turn)
        self._later.add(now + turn)
        return turn

    def waiting_for(self, hop: NextHop) -> int:
        """How many entries wait for room at a next hop, in memory and in the queue."""
        one = self._known.get(hop.destination)
        in_queue = 0 if one is None else one.later.count(self._clock())
        return self.limits.waiting(hop.name) + in_queue

    def _at_once(self, one: Destination, hop: NextHop | None) -> int:
        """How many connections it gets now, with nothing else in the way."""
        window = max(min(one.window, self._most_at(one)), 1)
        most = self.limits.most(hop) if hop is not None else None
        return window if most is None else max(min(window, most), 1)

    def _turns_a_second(self, one: Destination, seconds: float) -> float:
        """How many of those that wait in the queue may be asked for room in a second. A destination
        that has turned none away soon has all its connections, and must not idle then.
        """
        if one.is_narrowed or one.silences or not seconds:
            return _TURNS_A_SECOND
        return max(self._most_at(one) / seconds, _TURNS_A_SECOND)

    def _apart(self, one: Destination, hop: NextHop | None, seconds: float) -> float:
        """Seconds between two messages, each of which takes so long, at no more than the rate."""
        spacing = self.limits.spacing(hop) if hop is not None else None
        by_rate = spacing.interval if spacing is not None else 0.0
        return max(seconds / self._at_once(one, hop), by_rate, 0.001)

    def _forget_one(self) -> None:
        if len(self._known) >= _MOST:
            name = next((one.name for one in self._known.values() if not one.uses), None)
            if name is not None:
                del self._known[name]
