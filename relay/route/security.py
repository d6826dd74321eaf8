"""How secure a session with a mail host has to be, and what to do when it is not.

Two settings of the message decide, `require_tls` and `skip_verification`, and a few options of the
configuration. What the recipient's domain publishes (its TLSA records, RFC 7672; its MTA-STS
policy, RFC 8461) is a floor: it raises what a host must prove, and no setting lowers it.
`requirement` joins the settings before the relay connects, `under` joins them with the floor of a
host (`relay.route.floor`), and `next_step` decides what to do after the handshake. Only these two
modules decide, without I/O: an attempt follows the table, `relay explain` shows it, and
`relay probe` compares a host with it (both in the words of `relay.route.forecast`).

    require  skip    secured  unverified          not offered  refused      handshake failed
    false    false   tls      reconnect in clear  clear        clear        reconnect in clear
    false    true    tls      tls                 clear        clear        reconnect in clear
    true     false   tls      next host 4.7.5     4.7.4        4.7.4        4.7.5
    true     true    tls      tls                 4.7.4        4.7.4        4.7.5

    floor, with any settings
    TLSA records     tls      next host 4.7.5     4.7.4        4.7.4        4.7.5
    MTA-STS enforce  tls      next host 4.7.5     4.7.4        4.7.4        4.7.5
    TLSA, none usable         tls, unverified;    4.7.4        4.7.4        4.7.5
                     tls      true/false: 4.7.5

    a next hop of the operator's, with a login, a client certificate or a pin, with any settings
                     tls      next host 4.7.5     4.7.4        4.7.4        4.7.5

    held to what the host has shown before (relay.route.memory), where the settings ask for less
    verified         tls      next host 4.7.5     4.7.4        4.7.4        4.7.5
    encrypted        tls      tls                 4.7.4        4.7.4        4.7.5

"Verified" is: a chain to a trusted root, in date, and the host's name in a dNSName of the
subjectAltName (RFC 9525 §6.3). Where there are usable TLSA records, only they judge the
certificate; a root or a policy cannot make a certificate valid that they refuse (RFC 8461 §2). A
next hop may have roots and a name of its own, and pins, which are checked besides.
"Refused" is any answer to STARTTLS but 220 (RFC 3207 §4). After a handshake has begun, the relay
sends nothing in clear on that connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from relay.mail.memory import Shown
from relay.mail.outcome import DowngradeReason, Level, PolicyResult
from relay.mail.record import record, replace
from relay.policy.settings import TlsSettings
from relay.route.floor import NO_FLOOR, Floor, Proof
from relay.route.next_hop import NO_CHAIN, Host, TlsMode


class TlsVersion(StrEnum):
    """The TLS versions there are to choose from, oldest first."""

    TLS_1_0 = "TLSv1"
    TLS_1_1 = "TLSv1.1"
    TLS_1_2 = "TLSv1.2"
    TLS_1_3 = "TLSv1.3"


_VERSIONS = tuple(TlsVersion)


class OnTlsUnmet(StrEnum):
    """What the relay does with a message if no host can give the required TLS."""

    DEFER = "defer"
    BOUNCE = "bounce"


class OnUnverified(StrEnum):
    """What the relay does if TLS is not required and a certificate does not verify."""

    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"


@dataclass(frozen=True, slots=True)
class SecurityOptions:
    """The options of the configuration that decide here, beside the message's own settings."""

    on_tls_unmet: OnTlsUnmet = OnTlsUnmet.DEFER
    on_unverified: OnUnverified = OnUnverified.PLAINTEXT
    min_version: TlsVersion = TlsVersion.TLS_1_2
    opportunistic_min_version: TlsVersion = TlsVersion.TLS_1_0


@record(frozen=True, slots=True)
class Requirement:
    """What a session has to prove before a message may go over it.

    Two messages with equal requirements may share a connection to a host; others never.
    `tls_required` and `verify` come from the settings, `floor` from the recipient's domain, with
    TLS of `floor_version` or later. `min_version` and `security_level` (OpenSSL's) are for the
    first handshake; a session that no longer checks the certificate uses those of `unlooked`.
    `requiretls`: the host has to pass REQUIRETLS on (RFC 8689 §4.2.1). `remembered`: what
    the host has shown before, where mail is held to that.

    `hop_demands`: the next hop requires verified TLS, whatever the settings are. `pins`: the keys
    of which the host must have one. `is_pin_alone`: a pin replaces the chain and the name.
    """

    tls_required: bool
    verify: bool
    min_version: TlsVersion
    security_level: int
    on_unverified: OnUnverified
    on_tls_unmet: OnTlsUnmet
    opportunistic_min_version: TlsVersion
    requiretls: bool
    floor_version: TlsVersion
    floor: Floor = NO_FLOOR
    remembered: Shown = Shown.NONE
    hop_demands: bool = False
    pins: tuple[str, ...] = ()
    is_pin_alone: bool = False
    proof: Proof = field(init=False, repr=False, compare=False)
    """What the host has to prove: the most of what the floor demands, what the settings do, and
    what it has shown before.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "proof", self._proof())

    def _proof(self) -> Proof:
        held = self.floor.holds
        if held in (Proof.DANE, Proof.PKIX):
            return held
        if self.is_pin_alone:
            return Proof.PIN
        if (self.tls_required and self.verify) or self.remembered is Shown.VERIFIED:
            return Proof.PKIX
        is_encrypted = self.tls_required or self.remembered is Shown.ENCRYPTED
        return Proof.ENCRYPTED if is_encrypted else held

    @property
    def looks(self) -> bool:
        """Whether the relay checks the certificate, with or without consequences."""
        return self.verify or self.proof in (Proof.DANE, Proof.PKIX, Proof.PIN)

    @property
    def wanted(self) -> Level:
        """The level that the relay tries first."""
        return Level.VERIFIED if self.looks else Level.ENCRYPTED

    @property
    def must_encrypt(self) -> bool:
        """Whether no part of the message may be sent in clear."""
        return self.proof is not Proof.NOTHING

    @property
    def bounces_unmet(self) -> bool:
        """Whether a message bounces at once if no host can give the required TLS.

        Only a message that requires TLS by its own settings does: a domain or a route may require
        less later. A message with REQUIRETLS always does (RFC 8689 §4.2.1). No message does where
        the next hop requires verified TLS: the operator can repair the next hop.
        """
        if self.hop_demands:
            return False
        return self.requiretls or (self.tls_required and self.on_tls_unmet is OnTlsUnmet.BOUNCE)

    @property
    def unlooked(self) -> Requirement:
        """The requirement after the relay has stopped checking the certificate.

        Old versions of TLS are then allowed, unless a floor requires TLS.
        """
        if self.floor.holds is not Proof.NOTHING:
            return replace(self, verify=False)
        return replace(
            self,
            verify=False,
            min_version=self.opportunistic_min_version,
            security_level=_ANY_STRENGTH,
        )


class Situation(StrEnum):
    """The result of TLS with a host."""

    SECURED = "secured"
    """The handshake succeeded, and the certificate is valid if it was checked."""
    UNVERIFIED = "unverified"
    NOT_OFFERED = "not-offered"
    REFUSED = "refused"
    HANDSHAKE_FAILED = "handshake-failed"
    """The handshake failed or hung, or the connection was lost after STARTTLS."""


class Action(StrEnum):
    """What to do now."""

    SEND_IN_TLS = "send-in-tls"
    SEND_IN_CLEAR = "send-in-clear"
    """Send in clear on this connection."""
    RECONNECT_IN_CLEAR = "reconnect-in-clear"
    """Send in clear over a new connection to the same host."""
    RECONNECT_UNVERIFIED = "reconnect-unverified"
    """Send in TLS over a new connection to the same host, with any certificate."""
    NEXT_HOST = "next-host"


@dataclass(frozen=True, slots=True)
class NextStep:
    """An action, and for `NEXT_HOST` the status that says which demand was not met."""

    action: Action
    unmet: str = ""


_TLS = NextStep(Action.SEND_IN_TLS)
_CLEAR = NextStep(Action.SEND_IN_CLEAR)
_NEW_CLEAR = NextStep(Action.RECONNECT_IN_CLEAR)
_NEW_UNVERIFIED = NextStep(Action.RECONNECT_UNVERIFIED)
_NO_TLS = NextStep(Action.NEXT_HOST, "4.7.4")
"""Security features not supported (RFC 3463 §3.8)."""
_BAD_TLS = NextStep(Action.NEXT_HOST, "4.7.5")
"""Cryptographic failure (RFC 3463 §3.8)."""

_SITUATIONS = (
    Situation.SECURED,
    Situation.UNVERIFIED,
    Situation.NOT_OFFERED,
    Situation.REFUSED,
    Situation.HANDSHAKE_FAILED,
)

# fmt: off
_TABLE: Mapping[tuple[Proof, bool], tuple[NextStep, NextStep, NextStep, NextStep, NextStep]] = {
    # to prove, looks          secured unverified      not offered refused  failed
    (Proof.NOTHING,   True):  (_TLS,  _NEW_CLEAR,      _CLEAR,     _CLEAR,  _NEW_CLEAR),
    (Proof.NOTHING,   False): (_TLS,  _TLS,            _CLEAR,     _CLEAR,  _NEW_CLEAR),
    (Proof.ENCRYPTED, True):  (_TLS,  _NEW_UNVERIFIED, _NO_TLS,    _NO_TLS, _BAD_TLS),
    (Proof.ENCRYPTED, False): (_TLS,  _TLS,            _NO_TLS,    _NO_TLS, _BAD_TLS),
    (Proof.PKIX,      True):  (_TLS,  _BAD_TLS,        _NO_TLS,    _NO_TLS, _BAD_TLS),
    (Proof.DANE,      True):  (_TLS,  _BAD_TLS,        _NO_TLS,    _NO_TLS, _BAD_TLS),
    (Proof.PIN,       True):  (_TLS,  _BAD_TLS,        _NO_TLS,    _NO_TLS, _BAD_TLS),
}
# fmt: on

STRONG = 2
"""OpenSSL's level of 112 bits: RSA and DH of 2048 bits (RFC 9325 §4)."""
_ANY_STRENGTH = 0

DOWNGRADE_REASONS: Mapping[Situation, DowngradeReason] = {
    Situation.UNVERIFIED: DowngradeReason.UNVERIFIED,
    Situation.NOT_OFFERED: DowngradeReason.NOT_OFFERED,
    Situation.REFUSED: DowngradeReason.REFUSED,
    Situation.HANDSHAKE_FAILED: DowngradeReason.HANDSHAKE_FAILED,
}
"""The delivery log's name for the reason of clear text."""


def requirement(
    settings: TlsSettings, options: SecurityOptions, *, requiretls: bool = False
) -> Requirement:
    """What the settings of a message, and REQUIRETLS, require of every host.

    Old and weak TLS is accepted only where the alternative is no TLS and the certificate is not
    checked (RFC 7435 §3, RFC 9325 §5.2). Where TLS is required or verified, it has to be strong.
    """
    required = settings.require_tls.value
    verify = not settings.skip_verification.value
    either_way = not required and not verify
    return Requirement(
        tls_required=required,
        verify=verify,
        min_version=options.opportunistic_min_version if either_way else options.min_version,
        security_level=_ANY_STRENGTH if either_way else STRONG,
        on_unverified=options.on_unverified,
        on_tls_unmet=options.on_tls_unmet,
        opportunistic_min_version=options.opportunistic_min_version,
        requiretls=requiretls,
        floor_version=options.min_version,
    )


def at_host(needed: Requirement, host: Host, options: SecurityOptions) -> Requirement:
    """The requirement at one host of a next hop of the operator's.

    A login, a client certificate or a pin requires verified TLS, whatever the message says: a host
    that steals a login could read all later mail, and a pin says who the host is. A port with
    implicit TLS has no clear text to fall back to. What only the next hop requires makes no message
    bounce.
    """
    if demands_verified_tls(host):
        hop = host.hop
        return replace(
            needed,
            tls_required=True,
            verify=True,
            min_version=options.min_version,
            security_level=STRONG,
            hop_demands=True,
            pins=hop.pin_sha256 if hop is not None else (),
            is_pin_alone=hop is not None and hop.ca_file == NO_CHAIN,
        )
    if host.tls is TlsMode.IMPLICIT and not needed.tls_required:
        return replace(needed, tls_required=True, on_tls_unmet=OnTlsUnmet.DEFER)
    return needed


def demands_verified_tls(host: Host) -> bool:
    """Whether the next hop of a host requires verified TLS of every message."""
    hop = host.hop
    if host.credentials is not None or hop is None:
        return host.credentials is not None
    return hop.auth is not None or hop.certificate is not None or bool(hop.pin_sha256)


def under(needed: Requirement, floor: Floor, options: SecurityOptions) -> Requirement:
    """The requirement with the floor of a host. Under a floor, only strong TLS counts."""
    if floor == NO_FLOOR:
        return needed
    needed = replace(needed, floor=floor)
    if floor.holds is Proof.NOTHING:
        return needed
    return replace(needed, min_version=options.min_version, security_level=STRONG)


def is_below(version: str | None, options: SecurityOptions) -> bool:
    """Whether a session's version of TLS is one that mail which requires TLS would not go with."""
    least = _VERSIONS.index(options.min_version)
    return version in _VERSIONS and _VERSIONS.index(TlsVersion(version)) < least


def held_to(needed: Requirement, remembered: Shown) -> Requirement:
    """The requirement where mail is held to what the host has shown before."""
    return replace(needed, remembered=remembered)


def instead(needed: Requirement, situation: Situation) -> Shown | None:
    """What the message would go with in a situation, were it not held to what the host has shown
    before; None: it would not go either.
    """
    match next_step(held_to(needed, Shown.NONE), situation).action:
        case Action.SEND_IN_TLS | Action.RECONNECT_UNVERIFIED:
            return Shown.ENCRYPTED
        case Action.SEND_IN_CLEAR | Action.RECONNECT_IN_CLEAR:
            return Shown.NONE
    return None


def policy_result(
    floor: Floor, situation: Situation, fault: PolicyResult | None
) -> PolicyResult | None:
    """The failure of a host under a floor, enforced or not (RFC 8460 §4.3).

    `fault`: the fault of the certificate or of the version of TLS.
    """
    if floor.asks is Proof.NOTHING:
        return None
    match situation:
        case Situation.NOT_OFFERED | Situation.REFUSED:
            return PolicyResult.STARTTLS_NOT_SUPPORTED
        case Situation.HANDSHAKE_FAILED:
            return PolicyResult.VALIDATION_FAILURE
        case Situation.UNVERIFIED if floor.asks is Proof.ENCRYPTED:
            return None  # the settings required the check of the certificate, not the floor
        case _:
            return fault


def next_step(needed: Requirement, situation: Situation) -> NextStep:
    """What to do at a host after the result of TLS with it: a cell of the table above."""
    step = _TABLE[needed.proof, needed.looks][_SITUATIONS.index(situation)]
    goes_clear_for_its_certificate = situation is Situation.UNVERIFIED and step == _NEW_CLEAR
    if goes_clear_for_its_certificate and needed.on_unverified is OnUnverified.ENCRYPTED:
        return _NEW_UNVERIFIED
    return step
