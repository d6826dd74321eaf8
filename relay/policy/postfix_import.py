"""What a Postfix `smtp_tls_policy_maps` table means in rules of ours, line by line.

`imported` gives each line a rule for `policy.destinations`, and a remark for each difference:

    level          require_tls  skip_verification
    none           false        true     the relay uses TLS where the host offers it
    may            false        true
    encrypt        true         true
    dane           false        true     dane: enforce
    dane-only      true         false    dane: enforce; without records an authority is enough
    fingerprint    true         false    an authority instead of the fingerprint
    verify         true         false
    secure         true         false    mx: the names of `match`, as names of the host itself

In Postfix no message weakens its line, so a rule that protects says `allow_override: false`. Each
rule names both settings, so that it takes neither from a rule for a wider pattern.

Where the relay cannot do the same, the rule is the one that protects more. If no rule protects as
the line did, the remark is `NO_EQUIVALENT`, and the line still gets the nearest rule: without one,
its mail would go by `policy.default`. A key with a host in brackets is a next hop; its rule is for
the domains whose route leads to that host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import ip_address

from relay.mail.address import AddressError, normalise_domain
from relay.policy.postfix_files import holds_secret, shown
from relay.policy.postfix_table import (
    VERSIONS,
    PolicyValueError,
    PostfixLevel,
    PostfixPolicy,
    TableLine,
    allowed_versions,
    read_policy,
    read_table,
)
from relay.policy.rules import DestinationRule
from relay.policy.settings import FloorUse

__all__ = [
    "NEVER_USED",
    "Difference",
    "ImportRemark",
    "ImportedLine",
    "OurTls",
    "PostfixNextHop",
    "imported",
    "imported_level",
]


class Difference(StrEnum):
    """How what we do differs from what Postfix did, as it is told."""

    STRICTER = "stricter"
    """The rule protects at least as well, and more in some situation: mail may wait that went."""
    NO_EQUIVALENT = "no equivalent"
    """Postfix protects better in some situation, or there is no rule."""
    NO_EFFECT = "no effect"
    """Postfix ignores it, too, or it is about speed only."""


@dataclass(frozen=True, slots=True)
class ImportRemark:
    """A difference, and a sentence about it with the cure where there is one."""

    difference: Difference
    text: str


@dataclass(frozen=True, slots=True)
class ImportedLine:
    """A line and what became of it.

    `rule`: None where there is none. `domains`: the keys of `policy.destinations` that it is for,
    or "" for `policy.default`. `is_readable`: False where Postfix makes nothing of the line; then
    it may be anything, also what is not to be shown.
    """

    line: TableLine
    rule: DestinationRule | None = None
    domains: tuple[str, ...] = ()
    remarks: tuple[ImportRemark, ...] = ()
    is_readable: bool = True

    @property
    def shown(self) -> str:
        """The line, without a value that Postfix makes nothing of and that may be a password."""
        try:
            read_policy(self.line.value)
        except PolicyValueError:
            return shown(self.line, is_understood=False)
        return shown(self.line, is_understood=not self.line.fault)

    @property
    def has_equivalent(self) -> bool:
        """Whether our rule protects at least as well in every situation."""
        return not any(one.difference is Difference.NO_EQUIVALENT for one in self.remarks)


@dataclass(frozen=True, slots=True)
class PostfixNextHop:
    """Where a route leads: a name or an address without brackets, in lower case."""

    host: str
    port: int = 25

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}"


@dataclass(frozen=True, slots=True)
class OurTls:
    """What our configuration says of TLS for all domains (`tls`), and its `routes`."""

    min_version: str = "TLSv1.2"
    opportunistic_min_version: str = "TLSv1"
    routes: tuple[tuple[str, PostfixNextHop], ...] = ()

    def leading_to(self, hop: PostfixNextHop) -> tuple[str, ...]:
        """The keys of the routes that lead to a next hop."""
        return tuple(domain for domain, there in self.routes if there == hop)

    def route_of(self, domain: str) -> PostfixNextHop | None:
        """Where a domain, or what a pattern covers, goes by a route: the nearest one."""
        labels = domain.removeprefix("*.").split(".")
        above = (f"*.{'.'.join(labels[at:])}" for at in range(1, len(labels)))
        routes = dict(self.routes)
        return next((routes[key] for key in (domain, *above, "*") if key in routes), None)


# fmt: off
NEVER_USED = frozenset((
    "aNULL", "eNULL", "NULL", "ADH", "AECDH", "PSK", "SRP", "aPSK", "kPSK", "aSRP", "kSRP", "EXP",
    "EXPORT", "EXPORT40", "EXPORT56", "LOW", "DES", "3DES", "RC2", "RC4", "RC5", "IDEA", "SEED",
    "MD5", "DSS", "aDSS", "KRB5", "kKRB5", "aDH", "kDHr", "kDHd", "DES-CBC3-SHA", "RC4-SHA",
    "RC4-MD5",
))
# fmt: on
"""Ciphers, by the names of `exclude=`, that we never use where TLS is required or verified."""

_SERVICES = {"smtp": 25, "submission": 587, "submissions": 465, "smtps": 465}
_IN_BRACKETS = re.compile(r"\[([^\[\]]+)\](?::(\w+))?")
_EXPRESSION = re.compile(r"!?/.+/[A-Za-z]*")
"""A key of a table of type regexp or pcre."""
_WITH_PORT = re.compile(rf"[^\[\]:/@]+:(?:\d+|{'|'.join(_SERVICES)})")

_DEFAULT_MATCH = {
    PostfixLevel.VERIFY: ("hostname",),
    PostfixLevel.SECURE: ("nexthop", "dot-nexthop"),
}
"""smtp_tls_verify_cert_match, smtp_tls_secure_cert_match."""

_SAFEST = DestinationRule(require_tls=True, skip_verification=False, allow_override=False)

_BY_LEVEL: Mapping[PostfixLevel, DestinationRule] = {
    PostfixLevel.NONE: DestinationRule(require_tls=False, skip_verification=True),
    PostfixLevel.MAY: DestinationRule(require_tls=False, skip_verification=True),
    PostfixLevel.ENCRYPT: DestinationRule(
        require_tls=True, skip_verification=True, allow_override=False
    ),
    PostfixLevel.DANE: DestinationRule(
        require_tls=False, skip_verification=True, allow_override=False, dane=FloorUse.ENFORCE
    ),
    PostfixLevel.DANE_ONLY: replace(_SAFEST, dane=FloorUse.ENFORCE),
    PostfixLevel.FINGERPRINT: _SAFEST,
    PostfixLevel.VERIFY: _SAFEST,
    PostfixLevel.SECURE: _SAFEST,
}


def _stricter(text: str) -> ImportRemark:
    return ImportRemark(Difference.STRICTER, text)


def _no_equivalent(text: str) -> ImportRemark:
    return ImportRemark(Difference.NO_EQUIVALENT, text)


def _no_effect(text: str) -> ImportRemark:
    return ImportRemark(Difference.NO_EFFECT, text)


_OF_LEVEL: Mapping[PostfixLevel, ImportRemark] = {
    PostfixLevel.NONE: _stricter(
        "the relay uses TLS where the host offers it, and sends in clear where TLS does not work;"
        " Postfix never tries TLS"
    ),
    PostfixLevel.DANE_ONLY: _no_equivalent(
        "Postfix sends nothing to a host without usable TLSA records, or with an MX record that is"
        " not signed; the relay does if the host has a certificate of an authority for its name"
    ),
    PostfixLevel.FINGERPRINT: _no_equivalent(
        "a rule for a domain has no fingerprints, and requires a certificate of an authority for"
        " the host's name; only a next hop has them: write one with the partner's hosts, ca_file:"
        " none and pin_sha256, and a route to it (docs/routes.md); the pin is the digest of the"
        " public key, not of the certificate"
    ),
}


def imported(text: str, tls: OurTls) -> tuple[ImportedLine, ...]:
    """Every logical line of a table, in its order, each with its rule and what differs."""
    table = read_table(text)
    hops = {hop: line for line in reversed(table) if (hop := _next_hop(line.key.lower()))}
    lines: list[ImportedLine] = []
    first: dict[str, int] = {}
    for line in table:
        key = line.key.lower()
        if line.fault:
            lines.append(_unreadable(line, line.fault))
        elif _EXPRESSION.fullmatch(line.key):
            reason = "a regular expression has no equivalent; write a rule for each domain"
            lines.append(ImportedLine(line, remarks=(_no_equivalent(reason),)))
        elif key in first:
            reason = f"line {first[key]} has the same key and counts"
            lines.append(_passed_over(line, reason))
        else:
            first[key] = line.number
            lines.append(_of_line(line, tls, hops))
    return _with_wider_rules(_without_conflicts(lines))


def imported_level(level: PostfixLevel) -> ImportedLine:
    """`smtp_tls_security_level`, as `policy.default`."""
    remarks = [_OF_LEVEL[level]] if level in _OF_LEVEL else []
    if level is PostfixLevel.SECURE:
        remarks.append(_no_equivalent(_NAMES_BY_DOMAIN))
    line = TableLine(0, "smtp_tls_security_level", str(level))
    return ImportedLine(line, _BY_LEVEL[level], ("",), tuple(remarks))


# --- a line ---------------------------------------------------------------------------------------


def _passed_over(line: TableLine, reason: str) -> ImportedLine:
    return ImportedLine(line, remarks=(_no_effect(f"Postfix ignores it, too: {reason}"),))


def _unreadable(line: TableLine, reason: str) -> ImportedLine:
    return replace(_passed_over(line, reason), is_readable=False)


def _of_line(
    line: TableLine, tls: OurTls, hops: Mapping[PostfixNextHop, TableLine]
) -> ImportedLine:
    key = line.key.lower()
    if named := _next_hop(key):
        return _of_next_hop(line, tls, named)
    if _WITH_PORT.fullmatch(key):
        reason = "a route has no MX records; write a route to the host, and the key as [host]:port"
        return ImportedLine(line, remarks=(_no_equivalent(reason),))
    try:
        domain = _domain(key)
    except AddressError:
        return _unreadable(line, "the key is no domain, and is never looked up")
    hop = tls.route_of(domain)
    rule, remarks = _meaning(line.value, domain, tls, hop)
    if hop is None:
        return ImportedLine(line, rule, (domain,), remarks)
    reason = f"mail for it goes by a route, and Postfix looks up {hop} instead"
    if hop in hops:
        return _passed_over(line, f"{reason} (line {hops[hop].number})")
    if rule in (_BY_LEVEL[PostfixLevel.NONE], _BY_LEVEL[PostfixLevel.MAY]):
        return _passed_over(line, reason)
    return ImportedLine(line, rule, (domain,), (*remarks, _stricter(reason)))


def _next_hop(key: str) -> PostfixNextHop | None:
    """`[host]:port`, or None for another key. A port that is none is 0: no route has it."""
    found = _IN_BRACKETS.fullmatch(key)
    if found is None:
        return None
    service = found[2] or "smtp"
    port = _SERVICES.get(service, int(service) if service.isdecimal() else 0)
    host = found[1].removeprefix("ipv6:")
    try:
        return PostfixNextHop(str(ip_address(host)), port)
    except ValueError:
        return PostfixNextHop(host.removesuffix("."), port)


def _domain(key: str) -> str:
    """The key of `policy.destinations`: `*.` covers what `.` covers in Postfix."""
    if key.endswith("."):
        raise AddressError("a final dot")
    return f"*.{normalise_domain(key[1:])}" if key.startswith(".") else normalise_domain(key)


def _of_next_hop(line: TableLine, tls: OurTls, hop: PostfixNextHop) -> ImportedLine:
    domains = tls.leading_to(hop)
    if not domains:
        reason = f"no route leads to {hop}; write it under routes and import this file again"
        return ImportedLine(line, remarks=(_no_equivalent(reason),))
    rule, remarks = _meaning(line.value, hop.host, tls, hop)
    if "*" in domains:
        reason = (
            "policy.default holds for all domains without a rule, also those with a route of"
            " their own"
        )
        remarks = (*remarks, _stricter(reason))
    return ImportedLine(line, rule, tuple("" if d == "*" else d for d in domains), remarks)


def _meaning(
    value: str, name: str, tls: OurTls, hop: PostfixNextHop | None
) -> tuple[DestinationRule, tuple[ImportRemark, ...]]:
    """The rule of a line for one domain or pattern, or for a next hop, and what differs."""
    try:
        policy = read_policy(value)
    except PolicyValueError as error:
        # The error quotes the value.
        said = "its value is no TLS policy" if holds_secret(value) else str(error)
        reason = (
            f"{said}, so Postfix defers all its mail; the rule requires verified TLS until you"
            " correct the line"
        )
        return _SAFEST, (_no_equivalent(reason),)
    rule = _BY_LEVEL[policy.level]
    remarks = [_OF_LEVEL[policy.level]] if policy.level in _OF_LEVEL else []
    if policy.level in _DEFAULT_MATCH:
        match = policy.match or _DEFAULT_MATCH[policy.level]
        mx, of_match = _at_route(match, hop) if hop else _pins(match, name)
        rule = replace(rule, mx=mx)
        remarks += of_match
    remarks += _of_attributes(policy, tls)
    return rule, tuple(remarks)


# --- match= ---------------------------------------------------------------------------------------

_NAMES_BY_DOMAIN = (
    "Postfix compares with the names of each domain, and a rule for many domains has one list;"
    " write a rule with mx for each domain"
)


def _pins(match: tuple[str, ...], domain: str) -> tuple[tuple[str, ...], list[ImportRemark]]:
    """The hosts that may be connected to, so that the name in the certificate does not hang on the
    DNS alone.

    Postfix looks for the names of `match` in the certificate of any host that the DNS names. Here
    the certificate is for the host's own name always, and `mx` says which names those may be.
    """
    words = [word.lower() for word in match]
    if "hostname" in words:
        if len(words) == 1:
            return (), []
        return (), [_stricter("the certificate has to be for the mail host's own name")]
    remarks = []
    if domain.startswith("*.") and {"nexthop", "dot-nexthop"} & set(words):
        remarks.append(_no_equivalent(_NAMES_BY_DOMAIN))
    mx: list[str] = []
    for word in words:
        try:
            mx.append(_mail_host(_pin(word, domain)))
        except AddressError:
            remarks.append(_stricter(f'match: "{word}" is the name of no mail host'))
        if word.startswith("*"):
            remarks.append(_no_equivalent(f'match: "{word}" is no pattern in Postfix'))
    if not mx:
        return (), [*remarks, _no_equivalent("match names no host, so any host may be used")]
    below = [pin for pin in mx if pin.startswith("*.")]
    of_depth = (
        f"; {', '.join(below)} is one label, where Postfix takes names at any depth"
        if below
        else ""
    )
    reason = (
        "the relay connects only to hosts of mx, and each has to have a certificate for its own"
        f" name; Postfix lets any host show a certificate for one of these names{of_depth}"
    )
    return tuple(dict.fromkeys(mx)), [*remarks, _stricter(reason)]


def _mail_host(pin: str) -> str:
    """A pin that the configuration takes: no address, and a dot in its domain."""
    if "[" in pin or "." not in pin.removeprefix("*."):
        raise AddressError("not the name of a mail host")
    return pin


def _pin(word: str, domain: str) -> str:
    match word:
        case "nexthop":
            return domain
        case "dot-nexthop":
            return domain if domain.startswith("*.") else f"*.{domain}"
        case _ if word.startswith((".", "*.")):
            return f"*.{normalise_domain(word.lstrip('*')[1:])}"
        case _:
            return normalise_domain(word)


def _at_route(
    match: tuple[str, ...], hop: PostfixNextHop
) -> tuple[tuple[str, ...], list[ImportRemark]]:
    """At a next hop the operator named the host, and the certificate is for that name."""
    names = {word.lower() for word in match}
    if names <= {"hostname", "nexthop", hop.host}:
        return (), []
    others = ", ".join(sorted(names - {"hostname", "nexthop", "dot-nexthop", hop.host}))
    reason = f"the certificate has to be for {hop.host}, the host of the route"
    if others:
        reason += f"; Postfix also takes one for {others}"
    return (), [_stricter(reason)]


# --- other attributes -----------------------------------------------------------------------------


def _of_attributes(policy: PostfixPolicy, tls: OurTls) -> Iterator[ImportRemark]:
    if policy.protocols is not None:
        yield from _of_protocols(policy, policy.protocols, tls)
    if policy.ciphers is not None and not policy.level.requires_tls:
        said = f"ciphers={policy.ciphers}"
        yield _stricter(f"{said}: the relay uses weaker TLS where Postfix sends in clear")
    elif policy.ciphers is not None and policy.ciphers.lower() != "high":
        yield _stricter(f"ciphers={policy.ciphers}: the relay requires 112 bits or more")
    if policy.exclude is not None:
        yield from _of_exclude(policy, policy.exclude)
    if policy.tafile:
        yield _no_equivalent(
            f"tafile={', '.join(policy.tafile)}: a rule for a domain takes the authorities of the"
            " system and of tls.ca_file; for authorities of its own write a next hop with ca_file,"
            " and a route to it (docs/routes.md)"
        )
    if policy.servername is not None and policy.servername.lower() != "hostname":
        said = f"servername={policy.servername}"
        yield _no_equivalent(
            f"{said}: the relay sends the host's own name (SNI); another name is sent, and looked"
            " for in the certificate, by a next hop with verify_name (docs/routes.md)"
        )
    if policy.connection_reuse is not None:
        yield _no_effect("connection_reuse: messages that require the same TLS share a connection")
    if policy.enable_rpk:
        yield _stricter("enable_rpk=yes: a host has to show a certificate, not a bare key")
    if policy.others:
        said = ", ".join(policy.others)
        yield _no_effect(f"{said}: the relay finds MTA-STS policies itself (policy.mta_sts)")


def _may_require_tls(policy: PostfixPolicy) -> bool:
    """Whether Postfix sends nothing in clear, at least to hosts with TLSA records."""
    return policy.level.requires_tls or policy.level is PostfixLevel.DANE


def _of_protocols(policy: PostfixPolicy, protocols: str, tls: OurTls) -> Iterator[ImportRemark]:
    allowed = allowed_versions(protocols)
    said = f"protocols={protocols}"
    if not allowed:
        yield _no_equivalent(f"{said} allows no version of TLS at all")
        return
    at, least, relaxed = (
        VERSIONS.index(version)
        for version in (allowed[0], tls.min_version, tls.opportunistic_min_version)
    )
    if _may_require_tls(policy):
        if at > least:
            yield _no_equivalent(
                f"{said}: the least version is the same for all domains; it is {tls.min_version},"
                f" and tls.min_version: {allowed[0]} would change it"
            )
        elif at < least:
            least_of_ours = f"the relay uses {tls.min_version} or later"
            yield _stricter(f"{said}: where TLS is required, {least_of_ours}")
    if not policy.level.requires_tls and at > relaxed:
        yield _stricter(
            f"{said}: the relay uses TLS from {tls.opportunistic_min_version} on where Postfix"
            " sends in clear"
        )
    if VERSIONS[-1] not in allowed:
        yield _stricter(f"{said}: the relay uses newer versions of TLS, too")


def _of_exclude(policy: PostfixPolicy, exclude: str) -> Iterator[ImportRemark]:
    unknown = [each for each in re.split(r"[\s,:]+", exclude) if each and each not in NEVER_USED]
    if not unknown:
        return
    said = f"exclude={exclude}"
    if _may_require_tls(policy):
        yield _no_equivalent(f"{said}: the relay may use {', '.join(unknown)}")
    else:
        yield _stricter(f"{said}: the relay uses such a cipher where Postfix sends in clear")


# --- lines together -------------------------------------------------------------------------------


def _without_conflicts(lines: list[ImportedLine]) -> list[ImportedLine]:
    """Each domain with one line, the first: two keys may be one domain, or one next hop, here."""
    owners: dict[str, TableLine] = {}
    for each in lines:
        for domain in each.domains:
            owners.setdefault(domain, each.line)
    return [_without_owned(each, owners) for each in lines]


def _without_owned(each: ImportedLine, owners: Mapping[str, TableLine]) -> ImportedLine:
    others = [owners[domain] for domain in each.domains if owners[domain] != each.line]
    if not others:
        return each
    reason = f"line {others[0].number} ({others[0].key}) is for the same mail, and counts"
    return ImportedLine(each.line, remarks=(_no_equivalent(reason),))


def _with_wider_rules(lines: list[ImportedLine]) -> tuple[ImportedLine, ...]:
    """With a word on each rule without `mx` that inherits it from a pattern."""
    pinned = [
        domain
        for each in lines
        if each.rule is not None and each.rule.mx
        for domain in each.domains
        if domain.startswith("*.")
    ]
    return tuple(_with_wider_pins(each, pinned) for each in lines)


def _with_wider_pins(each: ImportedLine, pinned: list[str]) -> ImportedLine:
    if each.rule is None or each.rule.mx:
        return each
    wider = [key for key in pinned for domain in each.domains if domain.endswith(key[1:])]
    if not wider:
        return each
    reason = f"the mx of {wider[0]} holds for it, too, unless it has an mx of its own"
    return replace(each, remarks=(*each.remarks, _stricter(reason)))
