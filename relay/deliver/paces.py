"""The recipient domains of this process and the next hops of the operator's, each with its pace
(`relay.deliver.pacing`). A next hop has the name of its line (`relay.deliver.lines`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from datetime import datetime

from relay.deliver import pacing
from relay.deliver.lines import is_of_hop
from relay.deliver.pacing import Pace
from relay.mail.outcome import Deferred, Outcome
from relay.queue.retry import RetrySchedule

logger = logging.getLogger(__name__)

_MOST_DOMAINS = 10_000


class Paces:
    """What is known of each domain. `most`: `concurrency_per_destination`."""

    def __init__(self, most: int, schedule: RetrySchedule, clock: Callable[[], datetime]) -> None:
        self._most = most
        self._schedule = schedule
        self._schedule_of_hops = pacing.schedule_of_hops(schedule)
        self._clock = clock
        self._paces: dict[str, Pace] = {}

    def silent(self) -> dict[str, datetime]:
        """The domains that get no attempts, and until when."""
        now = self._clock()
        return {
            domain: pace.suspended_until
            for domain, pace in self._paces.items()
            if pace.suspended_until is not None and now < pace.suspended_until
        }

    def retry_silent(self) -> None:
        """Silent domains are new ones again."""
        for domain, pace in self._paces.items():
            if pace.suspended_until is not None:
                self._paces[domain] = Pace(in_flight=pace.in_flight)

    def is_suspended(self, domain: str) -> bool:
        """Whether a domain is not to be tried for now."""
        pace = self._paces.get(domain)
        if pace is None or pace.suspended_until is None:
            return False
        return pacing.is_suspended(pace, now=self._clock())

    def has_room(self, domain: str, *, most: int, is_crowded: bool) -> bool:
        """Whether one more attempt may begin, of no more than `most` at once."""
        pace, now = self._of(domain), self._clock()
        return pacing.room(pace, most=most, now=now, is_crowded=is_crowded) > 0

    def began(self, domain: str) -> None:
        """An attempt begins."""
        self._paces[domain] = pacing.began(self._of(domain))

    def learn(self, domain: str, outcomes: Collection[Outcome], *, begun: datetime) -> bool:
        """An attempt, begun at `begun`, has ended; whether the domain has answered it.

        Without outcomes it tells nothing about the domain.
        """
        before, now = self._paces.pop(domain, pacing.NEW), self._clock()
        schedule = self._schedule_of_hops if is_of_hop(domain) else self._schedule
        self._paces[domain] = after = pacing.learned(
            before, outcomes, begun=begun, now=now, most=self._most, schedule=schedule
        )
        if len(self._paces) > _MOST_DOMAINS:
            self._forget_one()
        if after.silences > before.silences:
            logger.info("%s does not answer, no attempts until %s", domain, after.suspended_until)
        elif before.silences and not after.silences:
            logger.info("%s answers again", domain)
        return after.answered_at == now

    def silence(self, domain: str) -> tuple[datetime, Deferred | None]:
        """Until when a domain gets no attempts, and the outcome of a message that is not tried."""
        pace = self._of(domain)
        outcome = None if pace.silence is None else pacing.untried(pace, pace.silence)
        return pace.suspended_until or self._clock(), outcome

    def _of(self, domain: str) -> Pace:
        return self._paces.get(domain, pacing.NEW)

    def _forget_one(self) -> None:
        """Keep the table short; of the domains without an attempt the one longest unused goes."""
        oldest = next((name for name, pace in self._paces.items() if not pace.in_flight), None)
        if oldest is not None:
            del self._paces[oldest]
