"""How secure a session with a mail host has to be, and what to do when it is not.

Two settings of the message decide, `require_tls` and `skip_verification`; a little of the
configuration decides the rest. `requirement` puts them together before we connect; `next_step`
judges what we met at the host. Neither opens a socket, and nobody else makes this judgement:
an attempt walks the table, `relay explain` tells it, `relay probe` holds a host against it (both in
the words of `relay.route.forecast`).

    require  skip    secured  unverified          not offered  refused      handshake failed
    false    false   tls      reconnect in clear  clear        clear        reconnect in clear
    false    true    tls      tls                 clear        clear        reconnect in clear
    true     false   tls      next host 4.7.5     4.7.4        4.7.4        4.7.5
    true     true    tls      tls                 4.7.4        4.7.4        4.7.5

"Verified" is: a chain to a trusted root, in date, and the host's name in a dNSName of the
subjectAltName (RFC 9525 §6.3). "Refused" is any answer to STARTTLS but 220 (RFC 3207 §4). After
a handshake has begun, nothing more is ever said in clear on that connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from relay.mail.outcome import DowngradeReason, Level
from relay.policy.settings import TlsSettings
from relay.route.next_hop import Host, TlsMode

__all__ = [
    "DOWNGRADE_REASONS",
    "Action",
    "OnTlsUnmet",
    "OnUnverified",
    "Requirement",
    "SecurityOptions",
    "Situation",
    "Step",
    "TlsVersion",
    "at_host",
    "next_step",
    "requirement",
]


class TlsVersion(StrEnum):
    """The TLS versions there are to choose from, oldest first."""

    TLS_1_0 = "TLSv1"
    TLS_1_1 = "TLSv1.1"
    TLS_1_2 = "TLSv1.2"
    TLS_1_3 = "TLSv1.3"


class OnTlsUnmet(StrEnum):
    """What becomes of a message whose TLS no host can give."""

    DEFER = "defer"
    BOUNCE = "bounce"


class OnUnverified(StrEnum):
    """What is done where TLS is not required and a certificate does not verify."""

    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"


@dataclass(frozen=True, slots=True)
class SecurityOptions:
    """What of the configuration has a say here, next to the message's own settings."""

    on_tls_unmet: OnTlsUnmet = OnTlsUnmet.DEFER
    on_unverified: OnUnverified = OnUnverified.PLAINTEXT
    min_version: TlsVersion = TlsVersion.TLS_1_2
    opportunistic_min_version: TlsVersion = TlsVersion.TLS_1_0


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a session has to prove before a message may go over it.

    Two messages with equal requirements may share a connection to a host; others never.
    `min_version` and `security_level` (OpenSSL's) are those of the first handshake; a session
    that gave up looking at the certificate takes those of `unlooked`.
    """

    tls_required: bool
    verify: bool
    min_version: TlsVersion
    security_level: int
    on_unverified: OnUnverified = OnUnverified.PLAINTEXT
    on_tls_unmet: OnTlsUnmet = OnTlsUnmet.DEFER
    opportunistic_min_version: TlsVersion = TlsVersion.TLS_1_0

    @property
    def wanted(self) -> Level:
        """The level that is tried for first."""
        return Level.VERIFIED if self.verify else Level.ENCRYPTED

    @property
    def bounces_unmet(self) -> bool:
        """Whether a message whose TLS no host can give is returned at once."""
        return self.tls_required and self.on_tls_unmet is OnTlsUnmet.BOUNCE

    @property
    def unlooked(self) -> Requirement:
        """The same, once the certificate is not looked at any more: TLS all the same, however old."""
        return replace(
            self,
            verify=False,
            min_version=self.opportunistic_min_version,
            security_level=_ANY_STRENGTH,
        )


class Situation(StrEnum):
    """What became of TLS with a host."""

    SECURED = "secured"
    """The handshake is done, and the certificate good where it was looked at."""
    UNVERIFIED = "unverified"
    NOT_OFFERED = "not-offered"
    REFUSED = "refused"
    HANDSHAKE_FAILED = "handshake-failed"
    """It failed, hung, or the connection was lost since STARTTLS was said."""


class Action(StrEnum):
    """What to do now."""

    SEND_IN_TLS = "send-in-tls"
    SEND_IN_CLEAR = "send-in-clear"
    """On this connection."""
    RECONNECT_IN_CLEAR = "reconnect-in-clear"
    """Send in clear over a new connection to the same host."""
    RECONNECT_UNVERIFIED = "reconnect-unverified"
    """Send in TLS over a new connection to the same host, whatever its certificate."""
    NEXT_HOST = "next-host"


@dataclass(frozen=True, slots=True)
class Step:
    """An action, and for `NEXT_HOST` the status that says what was not met."""

    action: Action
    unmet: str = ""


_TLS = Step(Action.SEND_IN_TLS)
_CLEAR = Step(Action.SEND_IN_CLEAR)
_NEW_CLEAR = Step(Action.RECONNECT_IN_CLEAR)
_NEW_UNVERIFIED = Step(Action.RECONNECT_UNVERIFIED)
_NOT_SUPPORTED = Step(Action.NEXT_HOST, "4.7.4")
"""Security features not supported (RFC 3463 §3.8)."""
_CRYPTO_FAILED = Step(Action.NEXT_HOST, "4.7.5")
"""Cryptographic failure (RFC 3463 §3.8)."""

_SITUATIONS = (
    Situation.SECURED,
    Situation.UNVERIFIED,
    Situation.NOT_OFFERED,
    Situation.REFUSED,
    Situation.HANDSHAKE_FAILED,
)

# fmt: off
_TABLE: Mapping[tuple[bool, bool], tuple[Step, Step, Step, Step, Step]] = {
    # required, verify   secured  unverified        not offered      refused          handshake failed
    (False,     True):  (_TLS,    _NEW_CLEAR,       _CLEAR,          _CLEAR,          _NEW_CLEAR),
    (False,     False): (_TLS,    _TLS,             _CLEAR,          _CLEAR,          _NEW_CLEAR),
    (True,      True):  (_TLS,    _CRYPTO_FAILED,   _NOT_SUPPORTED,  _NOT_SUPPORTED,  _CRYPTO_FAILED),
    (True,      False): (_TLS,    _TLS,             _NOT_SUPPORTED,  _NOT_SUPPORTED,  _CRYPTO_FAILED),
}
# fmt: on

_STRONG = 2
"""OpenSSL's level of 112 bits: RSA and DH of 2048 bits (RFC 9325 §4)."""
_ANY_STRENGTH = 0

DOWNGRADE_REASONS: Mapping[Situation, DowngradeReason] = {
    Situation.UNVERIFIED: DowngradeReason.UNVERIFIED,
    Situation.NOT_OFFERED: DowngradeReason.NOT_OFFERED,
    Situation.REFUSED: DowngradeReason.REFUSED,
    Situation.HANDSHAKE_FAILED: DowngradeReason.HANDSHAKE_FAILED,
}
"""How the delivery log names what led to clear text."""


def requirement(settings: TlsSettings, options: SecurityOptions) -> Requirement:
    """What the settings of a message ask of every host it may go to.

    Old and weak TLS is accepted only where the alternative is none and nobody looks at the
    certificate (RFC 7435 §3, RFC 9325 §5.2); where TLS is required or verified it has to be worth its name.
    """
    required = settings.require_tls.value
    verify = not settings.skip_verification.value
    either_way = not required and not verify
    return Requirement(
        tls_required=required,
        verify=verify,
        min_version=options.opportunistic_min_version if either_way else options.min_version,
        security_level=_ANY_STRENGTH if either_way else _STRONG,
        on_unverified=options.on_unverified,
        on_tls_unmet=options.on_tls_unmet,
        opportunistic_min_version=options.opportunistic_min_version,
    )


def at_host(needed: Requirement, host: Host, options: SecurityOptions) -> Requirement:
    """The requirement as it stands at one host of the operator's own.

    Credentials go over verified TLS and nothing else, whatever the message says: who takes them
    could read all later mail. A port where TLS comes first has no clear text to fall back on. What is
    asked for by the route alone is no reason to return a message: the mistake is ours.
    """
    logs_in = host.credentials is not None
    comes_first = host.tls is TlsMode.IMPLICIT
    lacks_tls = (logs_in or comes_first) and not needed.tls_required
    lacks_verification = logs_in and not needed.verify
    if not lacks_tls and not lacks_verification:
        return needed
    asked = replace(
        needed,
        tls_required=True,
        verify=needed.verify or logs_in,
        on_tls_unmet=OnTlsUnmet.DEFER,
    )
    return (
        replace(asked, min_version=options.min_version, security_level=_STRONG)
        if logs_in
        else asked
    )


def next_step(needed: Requirement, situation: Situation) -> Step:
    """What to do at a host, given what became of TLS with it: a cell of the table above."""
    step = _TABLE[needed.tls_required, needed.verify][_SITUATIONS.index(situation)]
    goes_clear_for_its_certificate = situation is Situation.UNVERIFIED and step == _NEW_CLEAR
    if goes_clear_for_its_certificate and needed.on_unverified is OnUnverified.ENCRYPTED:
        return _NEW_UNVERIFIED
    return step
