"""What a recipient's domain asks of an attempt, as values: the floors that settings do not lower.

Found out before hosts are connected to; `relay.route.security` judges by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from relay.route.mta_sts import PolicyError, StsMode, matches

__all__ = ["NO_STS", "StsFloor"]


@dataclass(frozen=True, slots=True)
class StsFloor:
    """What MTA-STS asks of one attempt (RFC 8461 §5).

    `domain`: the policy domain. `mode`: what is done with the policy, the operator's word
    included; None: no policy is in force. `id`: of the record the policy was fetched by. `mx`: the
    patterns, `lines`: the text of the policy. `error`: why a policy could not be fetched; another may be
    in force all the same. `was_fetched`: by this attempt, not before.
    """

    domain: str = ""
    mode: StsMode | None = None
    id: str = ""
    mx: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    expires: datetime | None = None
    error: PolicyError | None = None
    was_fetched: bool = False

    @property
    def holds(self) -> bool:
        """Whether mail is held to the policy."""
        return self.mode is StsMode.ENFORCE

    @property
    def is_looked_at(self) -> bool:
        """Whether a host is compared with the policy at all."""
        return self.mode in (StsMode.ENFORCE, StsMode.TESTING)

    def names(self, host: str) -> bool:
        """Whether the policy names this mail host (RFC 8461 §4.1)."""
        return matches(self.mx, host)


NO_STS = StsFloor()
"""No policy, and none was expected."""
