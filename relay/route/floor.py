"""What a recipient's domain requires of an attempt: floors that no setting lowers. Values only.

The relay looks them up before it connects to a host; `relay.route.security` judges by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from relay.route.mta_sts import PolicyError, StsMode, matches

__all__ = ["NO_DANE", "NO_STS", "DaneFloor", "DaneState", "StsFloor", "Tlsa"]


@dataclass(frozen=True, slots=True)
class StsFloor:
    """What MTA-STS requires of one attempt (RFC 8461 §5).

    `domain`: the policy domain. `mode`: how the policy is applied, after the operator's
    configuration; None: no policy is in force. `id`: of the record with which the policy was
    fetched. `mx`: the patterns, `lines`: the text of the policy. `error`: why there is no policy
    although the record announces one. `was_fetched`: this attempt has fetched the policy.
    `published`: the mode in its text, where the configuration replaces it.
    """

    domain: str = ""
    mode: StsMode | None = None
    id: str = ""
    mx: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    expires: datetime | None = None
    error: PolicyError | None = None
    was_fetched: bool = False
    published: StsMode | None = None

    @property
    def holds(self) -> bool:
        """Whether mail has to meet the policy."""
        return self.mode is StsMode.ENFORCE

    @property
    def is_looked_at(self) -> bool:
        """Whether a host is compared with the policy at all."""
        return self.mode in (StsMode.ENFORCE, StsMode.TESTING)

    def names(self, host: str) -> bool:
        """Whether the policy names this mail host (RFC 8461 §4.1)."""
        return matches(self.mx, host)


NO_STS = StsFloor()
"""There is no policy, and no record announces one."""


@dataclass(frozen=True, slots=True)
class Tlsa:
    """A TLSA record (RFC 6698 §2.1): usage, selector, matching type, and the data to match."""

    usage: int
    selector: int
    matching: int
    data: bytes

    def __str__(self) -> str:
        return f"{self.usage} {self.selector} {self.matching} {self.data.hex()}"


class DaneState(StrEnum):
    """The result of the look-up of a host's TLSA records, as `relay explain` names it."""

    USABLE = "usable"
    UNUSABLE = "unusable"
    """There are only unusable records: TLS is required, with any certificate (RFC 7672 §2.2)."""
    NONE = "none"
    INSECURE = "insecure"
    """The addresses are not signed, so TLSA records were not asked for (RFC 7672 §2.2.2)."""
    FAILED = "failed"
    """No answer, or one that does not validate: the host is not used (RFC 7672 §2.1.2)."""
    IGNORED = "ignored"
    """Not looked up, because the configuration says so."""
    OFF = "off"
    """Not looked up, because no trusted resolver validates."""


@dataclass(frozen=True, slots=True)
class DaneFloor:
    """What DANE requires of one mail host.

    `is_enforced`: false in testing mode. `base`: the TLSA base domain, which is also sent as SNI
    (RFC 7672 §8.1). `names`: the names that a certificate under DANE-TA may have, with `base`.
    `records`: the records that count, or all if none does. `error`: why the look-up failed.
    """

    state: DaneState = DaneState.NONE
    is_enforced: bool = True
    base: str = ""
    names: tuple[str, ...] = ()
    records: tuple[Tlsa, ...] = ()
    error: str = ""


NO_DANE = DaneFloor()
