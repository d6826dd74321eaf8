"""Mail hosts that change from one situation to the next; one authority signs all certificates."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from relay.sandbox.certificates import Authority, Certificate, Kind, server_context
from relay.sandbox.mx import MxServer
from relay.sandbox.script import TLS_1_0_ONLY, Script, ScriptedReply, StartTls, Then


class Situation(StrEnum):
    """What a client meets at a host."""

    GOOD = "right authority, right name"
    NO_STARTTLS = "no STARTTLS"
    REFUSED = "STARTTLS refused"
    SELF_SIGNED = "self-signed"
    UNKNOWN_CA = "unknown authority"
    WRONG_NAME = "right authority, wrong name"
    BESIDE = "right authority, another name below the host's"
    FOR_DOMAIN = "right authority, name of the recipient domain"
    EXPIRED = "expired"
    TLS_1_0_ONLY = "TLS 1.0 only"
    TLS_1_2_ONLY = "TLS 1.2 only"
    CLOSES_IN_HANDSHAKE = "closes in the handshake"
    REFUSED_FOR_GOOD = "STARTTLS refused for good"
    NOT_YET_VALID = "not yet valid"
    COMMON_NAME_ONLY = "right authority, right name as common name only"
    WILDCARD = "right authority, wildcard"

    @property
    def breaks_handshake(self) -> bool:
        """Whether a client may come back another way, some time later."""
        return self in (Situation.TLS_1_0_ONLY, Situation.CLOSES_IN_HANDSHAKE)


_SCRIPTS = {
    Situation.NO_STARTTLS: Script(starttls=StartTls.ABSENT),
    Situation.REFUSED: Script(starttls=StartTls.REFUSED_454),
    Situation.REFUSED_FOR_GOOD: Script(starttls=StartTls.REFUSED_502),
    Situation.SELF_SIGNED: Script(certificate=Kind.SELF_SIGNED),
    Situation.BESIDE: Script(certificate=Kind.WRONG_NAME),
    Situation.EXPIRED: Script(certificate=Kind.EXPIRED),
    Situation.NOT_YET_VALID: Script(certificate=Kind.NOT_YET_VALID),
    Situation.COMMON_NAME_ONLY: Script(certificate=Kind.CN_ONLY),
    Situation.WILDCARD: Script(certificate=Kind.WILDCARD),
    Situation.TLS_1_0_ONLY: TLS_1_0_ONLY,
    Situation.TLS_1_2_ONLY: Script(maximum_tls=ssl.TLSVersion.TLSv1_2),
    Situation.CLOSES_IN_HANDSHAKE: Script(starttls=StartTls.CLOSE_IN_HANDSHAKE),
}

_LAST_REPLY = {"CONTENT": ScriptedReply("250 2.0.0 OK", then=Then.CLOSE)}
"""No connection outlives its message, so that each message meets the situation anew."""


@dataclass(frozen=True)
class Seat:
    """Where a host is: its name, the recipient domain it is for, an address, and a port."""

    name: str
    domain: str
    address: str
    port: int


@dataclass(frozen=True)
class Issuers:
    """Who issues certificates: an authority that clients trust, and one that they do not."""

    trusted: Authority
    unknown: Authority


class TlsHost(MxServer):
    """A mail host whose situation can be changed between two connections."""

    def __init__(self, seat: Seat, issuers: Issuers) -> None:
        super().__init__(
            name=seat.name, address=seat.address, port=seat.port, authority=issuers.trusted
        )
        self._issuers = issuers
        self._domain = seat.domain
        self.meet(Situation.GOOD)

    def meet(self, situation: Situation) -> None:
        """What the next client meets."""
        script = replace(_SCRIPTS.get(situation, Script()), replies=_LAST_REPLY)
        self.scripts = (script,)
        self._situation = situation

    def context(self, script: Script) -> ssl.SSLContext:
        return server_context(self.shown(script), script.minimum_tls, script.maximum_tls)

    def shown(self, script: Script) -> Certificate:
        """The certificate of the situation."""
        match self._situation:
            case Situation.UNKNOWN_CA:
                return self._issuers.unknown.leaf(self.name)
            case Situation.WRONG_NAME:
                return self._issuers.trusted.leaf("mx.elsewhere.test")
            case Situation.FOR_DOMAIN:
                return self._issuers.trusted.leaf(self._domain)
            case _:
                return self._issuers.trusted.leaf(self.name, script.certificate)

    def took(self, sender: str) -> Sequence[bool]:
        """Of each message of a sender, whether it came in TLS."""
        return [message.in_tls for message in self.messages if message.reverse_path == sender]
