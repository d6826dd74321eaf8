"""A look at the mail hosts of a domain: one implementation for the command line and the HTTP
interface.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

from relay.admin import certificates
from relay.admin.operations import forecast_as_json, host_as_json, no_route_as_json
from relay.daemon.explaining import (
    HostUnderFloor,
    domain_rules_as_json,
    floors_of,
    host_floor_as_json,
    memory_as_json,
    sts_as_json,
)
from relay.deliver.floors import Floors
from relay.deliver.negotiate import SessionOptions
from relay.deliver.options import DeliveryOptions, Timeouts, TlsOptions, security_options
from relay.deliver.probe import HostReport, RuleVerdict, probe_all
from relay.deliver.tls import TlsContexts
from relay.mail.jsontext import JsonObject
from relay.route.next_hop import NoRoute, RouteFinder


async def probe_domain(
    domain: str,
    *,
    route: RouteFinder,
    hostname: str,
    delivery: DeliveryOptions,
    tls: TlsOptions,
    floors: Floors,
    patience: timedelta,
) -> JsonObject:
    """What each mail host shows of itself, and what would become of a message under each rule.

    Raises `FloorPending` where the MTA-STS policy of the domain takes longer than `patience`.
    """
    found = await route(domain)
    if isinstance(found, NoRoute):
        rejected = list(found.outcome.hosts)
        return {
            "domain": domain,
            "mta-sts": None,
            **domain_rules_as_json(None),
            "hosts": [],
            "rejected": rejected,
            "no-route": no_route_as_json(found),
        }
    using = SessionOptions(
        hostname, _shortened(delivery.timeouts, patience), TlsContexts(tls.ca_file)
    )
    asked, hosts = await floors_of(floors, domain, found, patience=patience)
    reports = await probe_all(
        [(each.host, each.found, each.held) for each in hosts],
        using,
        security_options(delivery, tls),
    )
    return {
        "domain": domain,
        "mta-sts": sts_as_json(asked.sts),
        **domain_rules_as_json(asked),
        "hosts": [
            _report_as_json(report, each) for report, each in zip(reports, hosts, strict=True)
        ],
        "rejected": list(found.rejected),
        "no-route": None,
    }


def _shortened(timeouts: Timeouts, patience: timedelta) -> Timeouts:
    """A person waits less long than mail does."""
    waits = {f.name: min(getattr(timeouts, f.name), patience) for f in dataclasses.fields(timeouts)}
    return dataclasses.replace(timeouts, **waits)


def _report_as_json(report: HostReport, each: HostUnderFloor) -> JsonObject:
    return {
        **host_as_json(report.host),
        **host_floor_as_json(each),
        "memory": memory_as_json(each.past(verify=True)),
        "meets-dane": report.meets_dane,
        "meets-mta-sts": _meets_policy(report, each),
        "not-used": each.found.not_used or None,
        "trouble": report.trouble,
        "tls-offered": report.tls_offered,
        "tls-version": report.tls_version,
        "tls-cipher": report.tls_cipher,
        "verified": report.verified,
        "why-not-verified": report.why_not_verified,
        "verified-by": report.verified_by,
        "pin": report.pin,
        **_certificate(report),
        "rules": [_verdict_as_json(verdict) for verdict in report.verdicts],
    }


def _meets_policy(report: HostReport, each: HostUnderFloor) -> bool | None:
    """Whether the MTA-STS policy names the host, and its certificate is for its name."""
    sts = each.domain.sts
    return sts.names(report.host.name) and report.verified if sts.is_looked_at else None


def _certificate(report: HostReport) -> JsonObject:
    """What the host showed, and where it did not verify what of it does not match."""
    if report.certificate is None:
        return {"certificate": None, "certificate-faults": []}
    shown = certificates.as_json(report.certificate)
    hop = report.host.hop
    name = (hop.verify_name if hop is not None else None) or report.host.name
    faults = certificates.faults(shown, name, at=datetime.now(UTC))
    return {"certificate": shown, "certificate-faults": [] if report.verified else faults}


def _verdict_as_json(verdict: RuleVerdict) -> JsonObject:
    return {
        "require-tls": verdict.require_tls,
        "skip-verification": verdict.skip_verification,
        "would-send": verdict.forecast.is_sent,
        **forecast_as_json(verdict.forecast),
        "error": verdict.error,
    }
