"""What differs between a line of Postfix's TLS policy table and the rule that it becomes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from relay.policy.postfix_table import VERSIONS, PostfixLevel, PostfixPolicy, allowed_versions

# fmt: off
NEVER_USED = frozenset((
    "aNULL", "eNULL", "NULL", "ADH", "AECDH", "PSK", "SRP", "aPSK", "kPSK", "aSRP", "kSRP", "EXP",
    "EXPORT", "EXPORT40", "EXPORT56", "LOW", "DES", "3DES", "RC2", "RC4", "RC5", "IDEA", "SEED",
    "MD5", "DSS", "aDSS", "KRB5", "kKRB5", "aDH", "kDHr", "kDHd", "DES-CBC3-SHA", "RC4-SHA",
    "RC4-MD5",
))
# fmt: on
"""Ciphers, by the names of `exclude=`, that we never use where TLS is required or verified."""


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


def stricter(text: str) -> ImportRemark:
    return ImportRemark(Difference.STRICTER, text)


def no_equivalent(text: str) -> ImportRemark:
    return ImportRemark(Difference.NO_EQUIVALENT, text)


def no_effect(text: str) -> ImportRemark:
    return ImportRemark(Difference.NO_EFFECT, text)


REMARKS_OF_LEVEL: Mapping[PostfixLevel, ImportRemark] = {
    PostfixLevel.NONE: stricter(
        "the relay uses TLS where the host offers it, and sends in clear where TLS does not work;"
        " Postfix never tries TLS"
    ),
    PostfixLevel.DANE_ONLY: no_equivalent(
        "Postfix sends nothing to a host without usable TLSA records, or with an MX record that is"
        " not signed; the relay does if the host has a certificate of an authority for its name"
    ),
    PostfixLevel.FINGERPRINT: no_equivalent(
        "a rule for a domain has no fingerprints, and requires a certificate of an authority for"
        " the host's name; only a next hop has them: write one with the partner's hosts, ca_file:"
        " none and pin_sha256, and a route to it (docs/routes.md); the pin is the digest of the"
        " public key, not of the certificate"
    ),
}


def remarks_of_attributes(policy: PostfixPolicy, tls: OurTls) -> Iterator[ImportRemark]:
    if policy.protocols is not None:
        yield from _remarks_of_protocols(policy, policy.protocols, tls)
    if policy.ciphers is not None and not policy.level.requires_tls:
        said = f"ciphers={policy.ciphers}"
        yield stricter(f"{said}: the relay uses weaker TLS where Postfix sends in clear")
    elif policy.ciphers is not None and policy.ciphers.lower() != "high":
        yield stricter(f"ciphers={policy.ciphers}: the relay requires 112 bits or more")
    if policy.exclude is not None:
        yield from _remarks_of_exclude(policy, policy.exclude)
    if policy.tafile:
        yield no_equivalent(
            f"tafile={', '.join(policy.tafile)}: a rule for a domain takes the authorities of the"
            " system and of tls.ca_file; for authorities of its own write a next hop with ca_file,"
            " and a route to it (docs/routes.md)"
        )
    if policy.servername is not None and policy.servername.lower() != "hostname":
        said = f"servername={policy.servername}"
        yield no_equivalent(
            f"{said}: the relay sends the host's own name (SNI); another name is sent, and looked"
            " for in the certificate, by a next hop with verify_name (docs/routes.md)"
        )
    if policy.connection_reuse is not None:
        yield no_effect("connection_reuse: messages that require the same TLS share a connection")
    if policy.enable_rpk:
        yield stricter("enable_rpk=yes: a host has to show a certificate, not a bare key")
    if policy.others:
        said = ", ".join(policy.others)
        yield no_effect(f"{said}: the relay finds MTA-STS policies itself (policy.mta_sts)")


def _may_require_tls(policy: PostfixPolicy) -> bool:
    """Whether Postfix sends nothing in clear, at least to hosts with TLSA records."""
    return policy.level.requires_tls or policy.level is PostfixLevel.DANE


def _remarks_of_protocols(
    policy: PostfixPolicy, protocols: str, tls: OurTls
) -> Iterator[ImportRemark]:
    allowed = allowed_versions(protocols)
    said = f"protocols={protocols}"
    if not allowed:
        yield no_equivalent(f"{said} allows no version of TLS at all")
        return
    at, least, relaxed = (
        VERSIONS.index(version)
        for version in (allowed[0], tls.min_version, tls.opportunistic_min_version)
    )
    if _may_require_tls(policy):
        if at > least:
            yield no_equivalent(
                f"{said}: the least version is the same for all domains; it is {tls.min_version},"
                f" and tls.min_version: {allowed[0]} would change it"
            )
        elif at < least:
            least_of_ours = f"the relay uses {tls.min_version} or later"
            yield stricter(f"{said}: where TLS is required, {least_of_ours}")
    if not policy.level.requires_tls and at > relaxed:
        yield stricter(
            f"{said}: the relay uses TLS from {tls.opportunistic_min_version} on where Postfix"
            " sends in clear"
        )
    if VERSIONS[-1] not in allowed:
        yield stricter(f"{said}: the relay uses newer versions of TLS, too")


def _remarks_of_exclude(policy: PostfixPolicy, exclude: str) -> Iterator[ImportRemark]:
    unknown = [each for each in re.split(r"[\s,:]+", exclude) if each and each not in NEVER_USED]
    if not unknown:
        return
    said = f"exclude={exclude}"
    if _may_require_tls(policy):
        yield no_equivalent(f"{said}: the relay may use {', '.join(unknown)}")
    else:
        yield stricter(f"{said}: the relay uses such a cipher where Postfix sends in clear")


# --- lines together -------------------------------------------------------------------------------
