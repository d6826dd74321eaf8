"""What a recipient's domain asks of an attempt, as values: the floors that settings do not lower.

Found out before hosts are connected to; `relay.route.security` judges by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from relay.route.mta_sts import PolicyError, StsMode, matches

__all__ = ["NO_DANE", "NO_STS", "DaneFloor", "DaneState", "StsFloor", "Tlsa"]


@dataclass(frozen=True, slots=True)
class StsFloor:
    """What MTA-STS asks of one attempt (RFC 8461 §5).

    `domain`: the policy domain. `mode`: what is done with the policy, the operator's word included;
    None: no policy is in force. `id`: of the record the policy was fetched by. `mx`: the patterns,
    `lines`: the text of the policy. `error`: why there is none although the record tells of one.
    `was_fetched`: by this attempt, not before.
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


@dataclass(frozen=True, slots=True)
class Tlsa:
    """A TLSA record (RFC 6698 §2.1): usage, selector, matching type, and what is to match."""

    usage: int
    selector: int
    matching: int
    data: bytes

    def __str__(self) -> str:
        return f"{self.usage} {self.selector} {self.matching} {self.data.hex()}"


class DaneState(StrEnum):
    """What the look-up of a host's TLSA records came to, as `relay explain` names it."""

    USABLE = "usable"
    UNUSABLE = "unusable"
    """There are records and none is usable: TLS is a must, whatever the certificate (RFC 7672
    §2.2).
    """
    NONE = "none"
    INSECURE = "insecure"
    """The addresses are not signed, so TLSA records were not asked for (RFC 7672 §2.2.2)."""
    FAILED = "failed"
    """No answer, or one that does not validate: the host is not used (RFC 7672 §2.1.2)."""
    IGNORED = "ignored"
    """By the configuration."""
    OFF = "off"
    """There is no resolver whose validation is trusted."""


@dataclass(frozen=True, slots=True)
class DaneFloor:
    """What DANE asks of one mail host.

    `is_enforced`: false where the configuration only looks. `base`: the TLSA base domain, which is
    sent as SNI too (RFC 7672 §8.1). `names`: whose certificate it may be under DANE-TA, `base`
    among them. `records`: those that count where there are any, else all. `error`: why the look-up
    failed.
    """

    state: DaneState = DaneState.NONE
    is_enforced: bool = True
    base: str = ""
    names: tuple[str, ...] = ()
    records: tuple[Tlsa, ...] = ()
    error: str = ""


NO_DANE = DaneFloor()
