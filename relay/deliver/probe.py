"""Examines a mail host without sending mail, for `relay probe`.

The probe connects once for each kind of handshake in the table of TLS rules: without verification,
with verification, without verification where TLS is required, and with the host's TLSA records.
Then it applies each of the four rules to the results. A session has only the greeting, EHLO,
STARTTLS and QUIT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from relay.deliver.connection import Connection, TlsResult
from relay.deliver.diagnosis import Answer, Stage, judge
from relay.deliver.dialogue import SessionBroken
from relay.deliver.negotiate import SessionOptions
from relay.deliver.tls import HopFilesError
from relay.mail.outcome import CertificateFacts, VerifiedBy
from relay.policy.settings import Setting, Source, TlsSettings
from relay.route.floor import Floor, HostFloor, Proof
from relay.route.forecast import Forecast, forecast, not_used
from relay.route.next_hop import Host, TlsMode
from relay.route.security import (
    Requirement,
    SecurityOptions,
    Situation,
    TlsVersion,
    at_host,
    requirement,
    under,
)

RULES = ((False, False), (False, True), (True, False), (True, True))
"""(require_tls, skip_verification), in the order of the table."""

_VERIFYING = (True, False)
_EASIEST = (False, True)

_NO_FLOOR = HostFloor()
_AT_ONCE = 10

Held = Callable[[Requirement], Requirement]
"""A requirement, and what becomes of it where mail is held to what the host has shown before."""

_Kind = tuple[bool, TlsVersion, int, Floor]


@dataclass(frozen=True, slots=True)
class RuleVerdict:
    """The result for a message under one of the four rules, and the error ("" without one)."""

    require_tls: bool
    skip_verification: bool
    forecast: Forecast
    error: str = ""


@dataclass(frozen=True, slots=True)
class HostReport:
    """The report on one address of a host. `trouble`: why there was no session, "" with one.

    `verified`: by a chain to a trusted root. `meets_dane`: whether the certificate matches a TLSA
    record; None where none is usable. `verified_by`, `pin`: what verified it.
    """

    host: Host
    trouble: str = ""
    tls_offered: bool = False
    tls_version: str | None = None
    tls_cipher: str | None = None
    certificate: CertificateFacts | None = None
    verified: bool = False
    why_not_verified: str = ""
    meets_dane: bool | None = None
    verified_by: VerifiedBy | None = None
    pin: str | None = None
    verdicts: tuple[RuleVerdict, ...] = ()


@dataclass(frozen=True, slots=True)
class _Look:
    """The result of one connection, and the TLS session if there was one."""

    met: TlsResult
    version: str | None = None
    cipher: str | None = None
    certificate: CertificateFacts | None = None
    verified_by: VerifiedBy | None = None
    pin: str | None = None


async def probe_all(
    hosts: Iterable[tuple[Host, HostFloor, Held]], using: SessionOptions, options: SecurityOptions
) -> list[HostReport]:
    """Each host's report, in the order given, some of them at once."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(host: Host, floor: HostFloor, held: Held) -> HostReport:
        async with places:
            return await probe(host, using, options, floor, held)

    return await asyncio.gather(*(one(*each) for each in hosts))


async def probe(
    host: Host,
    using: SessionOptions,
    options: SecurityOptions,
    floor: HostFloor = _NO_FLOOR,
    held: Held = lambda needed: needed,
) -> HostReport:
    """Look at one host, also at one that its floor says is not used. `held`: what mail is held to
    by what the host has shown before.
    """
    plain = {rule: at_host(requirement(_settings(*rule), options), host, options) for rule in RULES}
    needs = {rule: held(under(needed, floor.floor, options)) for rule, needed in plain.items()}
    looks: dict[_Kind, _Look] = {}
    try:
        for needed in (plain[_VERIFYING], plain[_EASIEST], *needs.values()):
            if _kind(needed) not in looks:
                looks[_kind(needed)] = await _look(host, needed, using)
    except SessionBroken as broken:
        return HostReport(host, judge(broken.answer, host).description)
    if floor.not_used:
        reason = f"it {floor.not_used}"
        verdicts = [RuleVerdict(*rule, not_used(needed), reason) for rule, needed in needs.items()]
    else:
        verdicts = [
            _verdict(rule, needed, looks[_kind(needed)].met) for rule, needed in needs.items()
        ]
    report = _report(host, looks[_kind(plain[_VERIFYING])], looks[_kind(plain[_EASIEST])], verdicts)
    if floor.floor.asks is not Proof.DANE:
        return report
    return replace(report, meets_dane=_meets_records(looks[_kind(needs[_EASIEST])].met))


def _meets_records(met: TlsResult) -> bool | None:
    """Whether a certificate matches a TLSA record; None where none was shown."""
    is_shown = met.situation in (Situation.SECURED, Situation.UNVERIFIED)
    return met.fault is None if is_shown else None


def _report(
    host: Host, verifying: _Look, easiest: _Look, verdicts: Sequence[RuleVerdict]
) -> HostReport:
    shown = verifying if verifying.met.situation is Situation.SECURED else easiest
    return HostReport(
        host,
        tls_offered=host.tls is TlsMode.IMPLICIT
        or easiest.met.situation is not Situation.NOT_OFFERED,
        tls_version=shown.version,
        tls_cipher=shown.cipher,
        certificate=shown.certificate or verifying.certificate,
        verified=verifying.met.situation is Situation.SECURED,
        why_not_verified=verifying.met.error,
        verified_by=verifying.verified_by,
        pin=verifying.pin,
        verdicts=tuple(verdicts),
    )


async def _look(host: Host, needed: Requirement, using: SessionOptions) -> _Look:
    """One connection, as far as TLS."""
    try:
        handshake = using.contexts.handshake(host, needed)
    except HopFilesError as error:
        raise SessionBroken(Answer(Stage.CONNECT, None, str(error), ours=True)) from error
    connection = await Connection.open(host, hostname=using.hostname, timeouts=using.timeouts)
    try:
        if host.tls is TlsMode.IMPLICIT:
            met = await connection.begin_in_tls(handshake)
        else:
            await connection.greet()
            met = await connection.start_tls(handshake)
        hop = connection.session
        return _Look(
            met, hop.tls_version, hop.tls_cipher, hop.certificate, hop.verified_by, hop.pin
        )
    finally:
        connection.quit()
        await connection.wait_closed()  # the caller and its event loop may end right after this


def _kind(needed: Requirement) -> _Kind:
    """The facts by which handshakes differ."""
    return needed.looks, needed.min_version, needed.security_level, needed.floor


def _verdict(rule: tuple[bool, bool], needed: Requirement, met: TlsResult) -> RuleVerdict:
    return RuleVerdict(*rule, forecast(needed, met.situation), met.error)


def _settings(require: bool, skip: bool) -> TlsSettings:
    return TlsSettings(Setting(require, Source.DEFAULT), Setting(skip, Source.DEFAULT))
