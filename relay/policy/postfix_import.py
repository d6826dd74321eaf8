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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

from relay.mail.address import AddressError, normalise_domain
from relay.policy.postfix_files import holds_secret, shown
from relay.policy.postfix_remarks import (
    REMARKS_OF_LEVEL,
    Difference,
    ImportRemark,
    OurTls,
    PostfixNextHop,
    no_effect,
    no_equivalent,
    remarks_of_attributes,
    stricter,
)
from relay.policy.postfix_table import (
    PolicyValueError,
    PostfixLevel,
    TableLine,
    read_policy,
    read_table,
)
from relay.policy.rules import DestinationRule
from relay.policy.settings import FloorUse


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
            lines.append(ImportedLine(line, remarks=(no_equivalent(reason),)))
        elif key in first:
            reason = f"line {first[key]} has the same key and counts"
            lines.append(_passed_over(line, reason))
        else:
            first[key] = line.number
            lines.append(_of_line(line, tls, hops))
    return _with_wider_rules(_without_conflicts(lines))


def imported_level(level: PostfixLevel) -> ImportedLine:
    """`smtp_tls_security_level`, as `policy.default`."""
    remarks = [REMARKS_OF_LEVEL[level]] if level in REMARKS_OF_LEVEL else []
    if level is PostfixLevel.SECURE:
        remarks.append(no_equivalent(_NAMES_BY_DOMAIN))
    line = TableLine(0, "smtp_tls_security_level", str(level))
    return ImportedLine(line, _BY_LEVEL[level], ("",), tuple(remarks))


# --- a line ---------------------------------------------------------------------------------------


def _passed_over(line: TableLine, reason: str) -> ImportedLine:
    return ImportedLine(line, remarks=(no_effect(f"Postfix ignores it, too: {reason}"),))


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
        return ImportedLine(line, remarks=(no_equivalent(reason),))
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
    return ImportedLine(line, rule, (domain,), (*remarks, stricter(reason)))


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
        return ImportedLine(line, remarks=(no_equivalent(reason),))
    rule, remarks = _meaning(line.value, hop.host, tls, hop)
    if "*" in domains:
        reason = (
            "policy.default holds for all domains without a rule, also those with a route of"
            " their own"
        )
        remarks = (*remarks, stricter(reason))
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
        return _SAFEST, (no_equivalent(reason),)
    rule = _BY_LEVEL[policy.level]
    remarks = [REMARKS_OF_LEVEL[policy.level]] if policy.level in REMARKS_OF_LEVEL else []
    if policy.level in _DEFAULT_MATCH:
        match = policy.match or _DEFAULT_MATCH[policy.level]
        mx, of_match = _at_route(match, hop) if hop else _pins(match, name)
        rule = replace(rule, mx=mx)
        remarks += of_match
    remarks += remarks_of_attributes(policy, tls)
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
        return (), [stricter("the certificate has to be for the mail host's own name")]
    remarks = []
    if domain.startswith("*.") and {"nexthop", "dot-nexthop"} & set(words):
        remarks.append(no_equivalent(_NAMES_BY_DOMAIN))
    mx: list[str] = []
    for word in words:
        try:
            mx.append(_mail_host(_pin(word, domain)))
        except AddressError:
            remarks.append(stricter(f'match: "{word}" is the name of no mail host'))
        if word.startswith("*"):
            remarks.append(no_equivalent(f'match: "{word}" is no pattern in Postfix'))
    if not mx:
        return (), [*remarks, no_equivalent("match names no host, so any host may be used")]
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
    return tuple(dict.fromkeys(mx)), [*remarks, stricter(reason)]


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
    return (), [stricter(reason)]


# --- other attributes -----------------------------------------------------------------------------


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
    return ImportedLine(each.line, remarks=(no_equivalent(reason),))


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
    return replace(each, remarks=(*each.remarks, stricter(reason)))
