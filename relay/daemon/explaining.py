"""What would become of a message, without sending one: one implementation for the command line and
the HTTP interface.

Everything is looked up as an attempt would look it up, MTA-STS policies and TLSA records included.
No mail host is connected to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from relay.admin.operations import choice_as_json, forecast_as_json, host_as_json, no_route_as_json
from relay.deliver.floors import DomainFloor, Floors, judged
from relay.deliver.memory import NO_PAST, AtHost
from relay.deliver.sts_policies import PolicyPending
from relay.mail.address import domain_of
from relay.mail.jsontext import JsonObject
from relay.mail.outcome import PolicyResult
from relay.policy.fields import Wishes, tls_wishes
from relay.policy.rules import PolicyRules, is_locked, resolve
from relay.policy.settings import FloorUse, Setting
from relay.queue.store import SpoolError
from relay.route.floor import DaneFloor, HostFloor, StsFloor
from relay.route.forecast import describe, forecasts
from relay.route.mta_sts import StsMode, matches
from relay.route.next_hop import Host, Hosts, Naming, NoRoute, Route, RouteFinder
from relay.route.security import Requirement, SecurityOptions, at_host, requirement, under

_BETWEEN_LOOKS = 0.2


class FloorPending(SpoolError):
    """The MTA-STS policy is still being fetched, so there is no answer yet; the text says of which
    domain.
    """


@dataclass(frozen=True, slots=True)
class HostUnderFloor:
    """A host with what its domain asks of it."""

    host: Host
    domain: DomainFloor
    dane: DaneFloor
    found: HostFloor

    def needed(self, settings: Requirement, options: SecurityOptions) -> Requirement:
        """What the host has to prove, for a message whose settings ask for this."""
        needed = under(at_host(settings, self.host, options), self.found.floor, options)
        return self.held(needed)

    def held(self, needed: Requirement) -> Requirement:
        """The requirement, with what the host has shown before where mail is held to that."""
        return self.past(verify=needed.verify).over(needed)

    def past(self, *, verify: bool) -> AtHost:
        """What the host has shown before, for a message that looks at certificates or not."""
        past = self.domain.past
        return past.at(self.host.name, verify=verify) if past is not None else NO_PAST


async def explain(
    *,
    reverse_path: str,
    recipient: str,
    wishes: Wishes,
    rules: PolicyRules,
    route: RouteFinder,
    options: SecurityOptions,
    floors: Floors,
    patience: timedelta,
    lifetime: timedelta,
    requiretls: bool = False,
    tls_required_no: bool = False,
) -> JsonObject:
    """Each setting and where it came from, the hosts in order, and what each of them must prove.
    `requiretls`, `tls_required_no`: as if the message came with REQUIRETLS, or said TLS-Required:
    No.

    `recipient` is an address that `relay.mail.address.parse_path` gave. The DNS is asked, and the
    policy host of the domain for as long as `patience`; then `FloorPending` is raised. `lifetime`:
    how long a deferred message is tried.
    """
    domain = domain_of(recipient)
    says_no = tls_required_no
    asked, tls_required_no = tls_wishes(wishes, requiretls=requiretls, says_no=says_no)
    locked = is_locked(rules, reverse_path, domain)
    settings = resolve(rules, reverse_path=reverse_path, recipient_domain=domain, wishes=asked)
    needed = requirement(settings, options, requiretls=requiretls and reverse_path != "")
    waives = tls_required_no and not settings.require_tls.value
    found = await route(domain, reverse_path)
    return {
        "sender": reverse_path,
        "recipient": recipient,
        "recipient-domain": domain,
        "policy": {
            "require-tls": _setting_as_json(settings.require_tls),
            "skip-verification": _setting_as_json(settings.skip_verification),
        },
        "message-may-weaken": not locked,
        "requiretls": requiretls,
        "tls-required-no": tls_required_no,
        "tls-required-no-refused": _why_refused(
            says_no=says_no, has_effect=tls_required_no, requiretls=requiretls, locked=locked
        ),
        "route": choice_as_json(found.choice),
        **await _where(
            domain,
            found,
            needed,
            options,
            floors,
            patience,
            lifetime,
            reverse_path if waives else None,
        ),
    }


async def floors_of(
    floors: Floors, domain: str, route: Hosts, *, patience: timedelta, waiving: str | None = None
) -> tuple[DomainFloor, list[HostUnderFloor]]:
    """What a recipient domain asks of its mail, and of each of its hosts in the order of the route.
    Each host of a next hop is asked for what it publishes itself; first that of the first host.
    `waiving`: as for `Floors.of_domain`.
    """
    by_naming: dict[Naming, DomainFloor] = {}
    found = []
    for host in route.hosts:
        naming = route.naming_of(host)
        if naming not in by_naming:
            by_naming[naming] = await _of_domain(floors, domain, naming, patience, waiving)
        asked = by_naming[naming]
        dane = await floors.dane_at(host, asked)
        found.append(HostUnderFloor(host, asked, dane, judged(host, asked, dane)))
    return found[0].domain, found


async def _of_domain(
    floors: Floors, domain: str, naming: Naming, patience: timedelta, waiving: str | None
) -> DomainFloor:
    deadline = asyncio.get_running_loop().time() + patience.total_seconds()
    while True:
        try:
            return await floors.of_domain(domain, naming, waiving=waiving)
        except PolicyPending as pending:
            if asyncio.get_running_loop().time() >= deadline:
                raise FloorPending(str(pending)) from pending
        await asyncio.sleep(_BETWEEN_LOOKS)


async def _where(
    domain: str,
    route: Route,
    needed: Requirement,
    options: SecurityOptions,
    floors: Floors,
    patience: timedelta,
    lifetime: timedelta,
    waiving: str | None,
) -> JsonObject:
    """The hosts in order, or why there is none."""
    if isinstance(route, NoRoute):
        return {
            "mta-sts": None,
            **domain_rules_as_json(None),
            "hosts": [],
            "rejected": list(route.outcome.hosts),
            "trouble": [],
            "no-route": no_route_as_json(route),
            "result": None,
        }
    asked, hosts = await floors_of(floors, domain, route, patience=patience, waiving=waiving)
    return {
        "mta-sts": sts_as_json(asked.sts),
        **domain_rules_as_json(asked),
        "hosts": [_host_and_rules(each, each.needed(needed, options)) for each in hosts],
        "rejected": list(route.rejected),
        "trouble": list(route.trouble),
        "no-route": None,
        "result": _result_without_host(route, hosts, needed, options, lifetime),
    }


def _result_without_host(
    route: Hosts,
    hosts: list[HostUnderFloor],
    needed: Requirement,
    options: SecurityOptions,
    lifetime: timedelta,
) -> JsonObject | None:
    """The result where the relay connects to none of the hosts, as `relay.deliver.tally` has it;
    null where it connects to one.
    """
    if not all(_why_not_used(each, needed) for each in hosts):
        return None
    is_temporary = route.trouble or any(
        each.found.policy.result is PolicyResult.DNSSEC_INVALID for each in hosts
    )
    bounces = needed.bounces_unmet and all(
        at_host(needed, each.host, options).bounces_unmet for each in hosts
    )
    if bounces and not is_temporary:
        status = "5.7.10" if needed.requiretls else "5.7.5"
        return {"outcome": "bounced", "status": status, "bounced-after-seconds": 0}
    status = "4.7.5" if hosts[-1].found.not_used else "4.7.10"
    seconds = round(lifetime.total_seconds())
    return {"outcome": "deferred", "status": status, "bounced-after-seconds": seconds}


def _why_not_used(each: HostUnderFloor, needed: Requirement) -> str:
    """Why the relay does not connect to a host for this message; "" where it does."""
    reason = each.found.not_used
    if not reason and needed.requiretls and not each.domain.has_secure_name(each.host):
        reason = "has no name that is known for sure, which REQUIRETLS asks for"
    return reason


def _host_and_rules(each: HostUnderFloor, needed: Requirement) -> JsonObject:
    """A host, what it must prove, and what follows in each situation that can be met there."""
    reason = _why_not_used(each, needed)
    return {
        **host_as_json(each.host),
        "needs": {
            "tls-required": needed.tls_required,
            "verified": needed.verify,
            "min-version": needed.min_version.value,
        },
        **host_floor_as_json(each),
        "memory": memory_as_json(each.past(verify=needed.verify)),
        "must-prove": "not-used" if reason else needed.proof.value,
        "rules": [f"not connected to: it {reason}"]
        if reason
        else [*_testing_words(each), *describe(needed, each.host)],
        "steps": [] if reason else [forecast_as_json(p) for p in forecasts(needed, each.host)],
    }


def _testing_words(each: HostUnderFloor) -> tuple[str, ...]:
    """A policy in testing mode that does not name the host."""
    sts = each.domain.sts
    if sts.mode is not StsMode.TESTING or sts.names(each.host.name):
        return ()
    says = f"the domain says {_published_mode(sts)}"
    if each.domain.rules.mta_sts is FloorUse.TESTING:
        says += ", the configuration testing"
    return (
        f"the MTA-STS policy does not name this host: with enforce, no mail would go here ({says})",
    )


def domain_rules_as_json(domain: DomainFloor | None) -> JsonObject:
    """How the relay uses what the domain publishes. `mta-sts-use`: enforce, testing or ignore;
    `waived`: who turned a look-up off; `pins`: the hosts that the operator allows, null for any.
    All null where there is no host to try.
    """
    if domain is None:
        return {"mta-sts-use": None, "waived": None, "pins": None}
    return {
        "mta-sts-use": domain.rules.mta_sts.value,
        "waived": domain.waived.value if domain.waived is not None else None,
        "pins": list(domain.pins) if domain.pins is not None else None,
    }


def host_floor_as_json(each: HostUnderFloor) -> JsonObject:
    """What the domain asks of a host: `sts-match`, `pinned`: null where nothing names hosts."""
    sts, pins, name = each.domain.sts, each.domain.pins, each.host.name
    return {
        "dane": {
            "state": each.dane.state.value,
            "records": [str(record) for record in each.dane.records],
        },
        "sts-match": sts.names(name) if sts.is_looked_at else None,
        "pinned": matches(pins, name) if pins is not None else None,
        "mx-secure": each.found.policy.mx_secure,
    }


def memory_as_json(past: AtHost) -> JsonObject | None:
    """What the host, or every known host of the domain, has shown before; null where that is
    nothing. `held-until`: so long mail is held to it, null where it is not; an alarm that has not
    rung yet would begin the wait now.
    """
    if past.found is None:
        return None
    return {
        "before": past.found.before.value,
        "host": past.found.host,
        "since": past.found.since.isoformat(timespec="seconds"),
        "held-until": past.until.isoformat(timespec="seconds") if past.until else None,
    }


def sts_as_json(sts: StsFloor) -> JsonObject | None:
    """The MTA-STS policy of an attempt, null where there is none and none was expected."""
    if sts.mode is None and sts.error is None:
        return None
    return {
        "mode": sts.mode.value if sts.mode is not None else None,
        "published-mode": _published_mode(sts),
        "id": sts.id or None,
        "mx": list(sts.mx),
        "expires": sts.expires.isoformat(timespec="seconds") if sts.expires else None,
        "source": None if sts.mode is None else "fetched" if sts.was_fetched else "cache",
        "error": sts.error.value if sts.error is not None else None,
    }


def _published_mode(sts: StsFloor) -> str | None:
    mode = sts.published or sts.mode
    return mode.value if mode is not None else None


def _why_refused(*, says_no: bool, has_effect: bool, requiretls: bool, locked: bool) -> str | None:
    """Why TLS-Required: No waives nothing; null where it does, or where no message says it."""
    if not says_no:
        return None
    if requiretls:
        return "the message has REQUIRETLS"
    if not has_effect:
        return "the message says X-Require-TLS: yes"
    return "a rule has allow_override: false" if locked else None


def _setting_as_json(setting: Setting) -> JsonObject:
    return {"value": setting.value, "source": setting.source.value, "rule": setting.rule}
