"""What a recipient's domain requires of a host: floors that no setting of a message lowers.

The relay looks up MTA-STS policies and TLSA records before it connects to a host. `floor_at` says
what they require of it, and whether the relay connects to it at all; `relay.route.security` joins
that with what the message requires.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from relay.mail.outcome import NO_POLICY, HopPolicy, PolicyMode, PolicyResult, PolicyType, Waived
from relay.mail.tls_session import JudgedBy
from relay.route.mta_sts import PolicyError, StsMode, matches


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


class Proof(StrEnum):
    """What a host has to prove before it gets a message, as `relay explain` names it."""

    NOTHING = "nothing"
    ENCRYPTED = "encrypted"
    PKIX = "pkix"
    """TLS, and a certificate of a trusted authority for the host's name."""
    DANE = "dane"
    """TLS, and a certificate that one of its TLSA records matches."""
    PIN = "pin"
    """TLS, and a key that the operator has pinned; no authority is asked (`ca_file: none`)."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What the recipient's domain requires of a host, beside the settings of a message.

    `asks`: the proof that it requires. `is_enforced`: false in testing mode, which stops no mail.
    `dane`: the TLSA records that judge the certificate. `policy`: the id of the MTA-STS policy,
    with its domain. Two messages with different floors share no connection.
    """

    asks: Proof = Proof.NOTHING
    is_enforced: bool = True
    dane: DaneFloor = NO_DANE
    policy: str = ""

    @property
    def holds(self) -> Proof:
        """The proof that mail needs: none in testing mode."""
        return self.asks if self.is_enforced else Proof.NOTHING


NO_FLOOR = Floor()


@dataclass(frozen=True, slots=True)
class HostFloor:
    """What the recipient's domain requires of one host, as known before the relay connects.

    `policy`: the facts for the delivery log so far. `not_used`: why the relay does not connect to
    the host, "" where it does. `judged_by`: the policy, as reports on TLS name it. `told`: the
    domain that has the policy and gets these reports; "" where there can be none.
    """

    floor: Floor = NO_FLOOR
    policy: HopPolicy = NO_POLICY
    not_used: str = ""
    judged_by: JudgedBy | None = None
    told: str = ""


_NAMES_SHOWN = 5


def not_named(name: str, sts: StsFloor, pins: tuple[str, ...] | None) -> str:
    """Why the relay does not connect to a mail host because of its name; "" where it may.

    `pins`: the names that the operator allows for this domain, None for any.
    """
    if pins is not None and not matches(pins, name):
        return f"is none of the hosts that the configuration allows for this domain: {_few(pins)}"
    if sts.holds and not sts.names(name):
        return f"is not named by the MTA-STS policy of {sts.domain}, which names {_few(sts.mx)}"
    return ""


def floor_at(
    name: str,
    *,
    dane: DaneFloor = NO_DANE,
    sts: StsFloor = NO_STS,
    pins: tuple[str, ...] | None = None,
    mx_secure: bool = False,
    waived: Waived | None = None,
) -> HostFloor:
    """The floor of a mail host.

    Where there are usable TLSA records, only DANE judges the certificate; the MTA-STS policy still
    says which host names are allowed (RFC 8461 §2). An enforced floor comes before a testing one.
    """
    found = _floor_at(name, dane, sts, pins)
    return replace(found, policy=replace(found.policy, mx_secure=mx_secure, waived=waived))


def _floor_at(name: str, dane: DaneFloor, sts: StsFloor, pins: tuple[str, ...] | None) -> HostFloor:
    by_sts, by_dane = _under_sts(name, sts), _under_dane(dane)
    if reason := not_named(name, sts, pins):
        # A pin decides before any policy does; that the policy could not be fetched stays known.
        is_pinned_out = not_named(name, NO_STS, pins) != "" and sts.error is None
        return HostFloor(policy=NO_POLICY if is_pinned_out else by_sts.policy, not_used=reason)
    decides = dane.state in (DaneState.USABLE, DaneState.FAILED)
    if by_dane is None or (sts.holds and not (decides and dane.is_enforced)):
        return by_sts
    return by_dane


def _under_dane(dane: DaneFloor) -> HostFloor | None:
    """The floor by TLSA records; None where there are none, or where none were looked up."""
    mode = PolicyMode.ENFORCE if dane.is_enforced else PolicyMode.TESTING
    match dane.state:
        case DaneState.USABLE:
            floor = Floor(Proof.DANE, dane.is_enforced, dane)
            return HostFloor(floor, HopPolicy(PolicyType.TLSA, mode))
        case DaneState.UNUSABLE:
            floor = Floor(Proof.ENCRYPTED, dane.is_enforced, dane)
            return HostFloor(floor, HopPolicy(PolicyType.TLSA, mode, PolicyResult.TLSA_INVALID))
        case DaneState.FAILED:
            policy = HopPolicy(PolicyType.TLSA, mode, PolicyResult.DNSSEC_INVALID)
            reason = f"is not used, since its TLSA records are not known: {dane.error}"
            return HostFloor(policy=policy, not_used=reason if dane.is_enforced else "")
        case _:
            return None


def _under_sts(name: str, sts: StsFloor) -> HostFloor:
    """The floor by the domain's MTA-STS policy."""
    match sts.mode:
        case None if sts.error is not None:
            return HostFloor(policy=HopPolicy(PolicyType.STS, None, PolicyResult(sts.error.value)))
        case None:
            return HostFloor()
        case StsMode.NONE:
            return HostFloor(policy=HopPolicy(PolicyType.NONE, PolicyMode.NONE))
    policy = HopPolicy(PolicyType.STS, PolicyMode(sts.mode.value))
    if not sts.names(name):
        return HostFloor(policy=replace(policy, result=PolicyResult.VALIDATION_FAILURE))
    return HostFloor(Floor(Proof.PKIX, sts.holds, policy=f"{sts.domain} {sts.id}"), policy)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
