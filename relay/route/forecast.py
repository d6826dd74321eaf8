"""Says in advance what would happen to a message at a host.

`relay explain` does so for every situation that may occur at a host, `relay probe` for the one that
it found. Nothing is decided here: the steps are those of `relay.route.security`, which an attempt
follows too. This module describes their results: for programs in the fields of the delivery log,
for people as a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from relay.mail.memory import Shown
from relay.mail.outcome import DowngradeReason
from relay.route.floor import Floor, Proof
from relay.route.next_hop import NO_CHAIN, Host, TlsMode
from relay.route.security import (
    DOWNGRADE_REASONS,
    Action,
    NextStep,
    Requirement,
    Situation,
    next_step,
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The result of a situation at a host. `situation` None: the relay does not connect to it.

    `tls`, `verified`, `downgrade`: as the delivery log will have them; None where the message is
    not sent. `at_last`: the status with which the attempt then ends if no other host is better,
    4.7.z deferred or 5.7.z bounced.
    """

    situation: Situation | None
    step: NextStep
    tls: bool | None = None
    verified: bool | None = None
    downgrade: DowngradeReason | None = None
    at_last: str = ""

    @property
    def is_sent(self) -> bool:
        """Whether the relay would send the message to this host."""
        return self.step.action is not Action.NEXT_HOST


def forecasts(needed: Requirement, host: Host) -> tuple[Forecast, ...]:
    """A forecast for each situation that may occur at the host. Implicit TLS has no STARTTLS."""
    never = _ABOUT_STARTTLS if host.tls is TlsMode.IMPLICIT else ()
    return tuple(forecast(needed, situation) for situation in Situation if situation not in never)


def forecast(needed: Requirement, situation: Situation) -> Forecast:
    """The result of one situation, for a message with this requirement at the host."""
    step = next_step(needed, situation)
    match step.action:
        case Action.NEXT_HOST:
            return Forecast(situation, step, at_last=_at_last(needed, step.unmet))
        case Action.SEND_IN_TLS:
            verified = needed.looks and situation is Situation.SECURED
            return Forecast(situation, step, tls=True, verified=verified)
        case Action.RECONNECT_UNVERIFIED:
            return Forecast(situation, step, tls=True, verified=False)
        case Action.SEND_IN_CLEAR | Action.RECONNECT_IN_CLEAR:
            reason = DOWNGRADE_REASONS[situation]
            return Forecast(situation, step, tls=False, verified=False, downgrade=reason)


def not_used(needed: Requirement) -> Forecast:
    """The result at a host to which the relay does not connect (`HostFloor.not_used`)."""
    return Forecast(None, NextStep(Action.NEXT_HOST, _UNMET), at_last=_at_last(needed, _UNMET))


def sentence(forecast: Forecast) -> str:
    """A forecast in a sentence."""
    if forecast.is_sent:
        verified = "verified" if forecast.verified else "unverified"
        how = f"in TLS, {verified}" if forecast.tls else "in clear"
        return f"sent {how}{_ON[forecast.step.action]}"
    end = "bounced" if forecast.at_last.startswith("5") else "deferred"
    return f"not sent here; {end} {forecast.at_last} if no other host has better"


def describe(needed: Requirement, host: Host) -> tuple[str, ...]:
    """What a host must prove, and what happens in each situation, as sentences."""
    met = _met_by(needed)
    consequences = (
        f"{met[each.situation]}: {sentence(each)}"
        for each in forecasts(needed, host)
        if each.situation is not None and each.situation in met
    )
    return (*_proof(needed, host), *consequences)


def _at_last(needed: Requirement, unmet: str) -> str:
    if not needed.bounces_unmet:
        return unmet
    return "5.7.10" if needed.requiretls else f"5{unmet[1:]}"


_UNMET = "4.7.5"
_ABOUT_STARTTLS = (Situation.NOT_OFFERED, Situation.REFUSED)

_ON: Mapping[Action, str] = {
    Action.SEND_IN_TLS: "",
    Action.SEND_IN_CLEAR: " on the same connection",
    Action.RECONNECT_IN_CLEAR: " over a new connection",
    Action.RECONNECT_UNVERIFIED: ", over a new connection",
}

_MET_WITHOUT_TLS = {
    Situation.NOT_OFFERED: "no STARTTLS offered",
    Situation.REFUSED: "STARTTLS refused",
    Situation.HANDSHAKE_FAILED: "the handshake fails",
}
_MET_BY_WHO_LOOKS: Mapping[Situation, str] = {
    Situation.SECURED: "the certificate verifies",
    Situation.UNVERIFIED: "the certificate does not verify",
    **_MET_WITHOUT_TLS,
}
_MET_UNDER_DANE: Mapping[Situation, str] = {
    Situation.SECURED: "its certificate matches a TLSA record",
    Situation.UNVERIFIED: "its certificate matches none",
    **_MET_WITHOUT_TLS,
}
_MET_BY_WHO_PINS: Mapping[Situation, str] = {
    Situation.SECURED: "its key is pinned",
    Situation.UNVERIFIED: "its key is not pinned",
    **_MET_WITHOUT_TLS,
}
_MET_BY_WHO_DOES_NOT: Mapping[Situation, str] = {
    Situation.SECURED: "TLS with any certificate",
    **_MET_WITHOUT_TLS,
}


def _met_by(needed: Requirement) -> Mapping[Situation, str]:
    if needed.proof is Proof.DANE:
        return _MET_UNDER_DANE
    if needed.proof is Proof.PIN:
        return _MET_BY_WHO_PINS
    return _MET_BY_WHO_LOOKS if needed.looks else _MET_BY_WHO_DOES_NOT


def _proof(needed: Requirement, host: Host) -> tuple[str, ...]:
    tls = (
        f"the host must offer TLS, {needed.min_version} or later"
        if needed.must_encrypt
        else f"the host is asked for TLS, {needed.min_version} or later, and may have none"
    )
    requiretls = ("the host must offer REQUIRETLS inside TLS",) if needed.requiretls else ()
    floor = _floor_words(needed.floor)
    return (
        *floor,
        *_memory_words(needed.remembered),
        *_why_stricter(host),
        tls,
        _certificate_words(needed, host),
        *_pin_words(needed),
        *requiretls,
    )


def _certificate_words(needed: Requirement, host: Host) -> str:
    if needed.proof is Proof.DANE:
        return f"its certificate must match a TLSA record of {needed.floor.dane.base}"
    if needed.proof is Proof.PIN:
        return "its certificate may be from anybody and for any name (ca_file: none)"
    what = f"in date, for {_name_words(host)}, from {_authority_words(host)}"
    if needed.proof is Proof.PKIX:
        return f"its certificate must be {what}"
    if needed.looks:
        return f"its certificate is looked at: whether it is {what}"
    return "its certificate is not looked at"


def _name_words(host: Host) -> str:
    name = host.hop.verify_name if host.hop is not None else None
    return f"the name {name} (verify_name)" if name is not None else "its own name"


def _authority_words(host: Host) -> str:
    ca_file = host.hop.ca_file if host.hop is not None else None
    if ca_file is None or ca_file == NO_CHAIN:
        return "a trusted authority"
    return f"an authority in {ca_file} (ca_file)"


def _pin_words(needed: Requirement) -> tuple[str, ...]:
    if not needed.pins:
        return ()
    return (f"its key must be pinned: {' or '.join(needed.pins)} (pin_sha256)",)


def _floor_words(floor: Floor) -> tuple[str, ...]:
    """The part of the recipient's domain, as sentences."""
    what = {
        Proof.DANE: "the host has TLSA records (DANE)",
        Proof.ENCRYPTED: "the host has TLSA records (DANE), and none that is usable",
        Proof.PKIX: "the domain has an MTA-STS policy that names the host",
    }.get(floor.asks)
    if what is None:
        return ()
    held = (
        "they hold whatever the settings"
        if floor.asks is not Proof.PKIX
        else "it holds whatever the settings"
    )
    return (f"{what}: {held if floor.is_enforced else 'looked at only, no mail is held to it'}",)


def _memory_words(remembered: Shown) -> tuple[str, ...]:
    """What mail is held to by what the host has shown before."""
    what = {Shown.ENCRYPTED: "TLS", Shown.VERIFIED: "verified TLS"}.get(remembered)
    if what is None:
        return ()
    return (f"the host has shown {what} before, and mail is held to that (downgrade_memory)",)


def _why_stricter(host: Host) -> tuple[str, ...]:
    """Why the host of a next hop may have to prove more than the settings of a message ask for."""
    reasons = [reason for reason, holds in _reasons(host) if holds]
    if reasons:
        return (
            f"{' and '.join(reasons)}: nothing is said to it but in verified TLS, whatever the"
            " settings",
        )
    if host.tls is TlsMode.IMPLICIT:
        return ("TLS comes first there: nothing is said to it in clear, whatever the settings",)
    return ()


def _reasons(host: Host) -> Iterator[tuple[str, bool]]:
    """What requires verified TLS at a next hop (`relay.route.security.demands_verified_tls`)."""
    hop = host.hop
    logs_in = host.credentials is not None or (hop is not None and hop.auth is not None)
    yield "we log in there", logs_in
    yield "we show it a certificate", hop is not None and hop.certificate is not None
    yield "its key is pinned", hop is not None and bool(hop.pin_sha256)
