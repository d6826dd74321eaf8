"""What stands behind an event when it is opened: groups of names and values. Pure.

The message and its rule first, then where the attempt could go, then each host with what it offered
and proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from relay.admin.certificates import faults

__all__ = ["FactGroup", "certificate_facts", "groups_of", "rule_text", "setting_text"]

Fields = Mapping[str, Any]
Pairs = list[tuple[str, Any]]

_NAMES_KEPT = 5
"""How many names of a certificate the delivery log keeps."""

_HOST = (
    ("TLS version", "tls-version"),
    ("Cipher", "tls-cipher"),
    ("Verified by", "verified-by"),
)
_ANSWER = (
    ("Reply code", "code"),
    ("Enhanced status", "enhanced-code"),
    ("Reply", "message"),
    ("Description", "description"),
    ("No DKIM signature", "dkim-unsigned"),
    ("Attempt", "attempt-no"),
)
_NAMED_BY = {
    "mx": "MX records of the domain",
    "domain": "the domain itself, which has no MX record",
    "route": "a route of the configuration",
    "address": "the address in the recipient's domain",
}
_WAIVED = {
    "destination": "a rule for the recipient's domain",
    "tls-required-no": "the message (TLS-Required: No)",
}
_VERIFIED_BY = {
    "pkix": "a trusted authority, its dates and its name (PKIX)",
    "dane-ee": "a TLSA record of its own (DANE-EE)",
    "dane-ta": "a TLSA record of its authority (DANE-TA)",
}


class FactGroup(NamedTuple):
    """`title` "": of the message itself."""

    title: str
    facts: tuple[tuple[str, str], ...]


def groups_of(line: Fields) -> tuple[FactGroup, ...]:
    """The groups of an event, those that say something."""
    status = line.get("delivery-status", {})
    at = datetime.fromtimestamp(line["timestamp"], UTC)
    groups = [
        ("", _message(line)),
        ("Where it could go", _routing(status)),
        *((one["mx-host"], _host(one, at)) for one in status.get("earlier", ())),
        (status.get("mx-host") or "The attempt" if status else "", _attempt(line, status, at)),
    ]
    told = (FactGroup(title, tuple(_said(pairs))) for title, pairs in groups)
    return tuple(group for group in told if group.facts)


def _said(pairs: Pairs) -> Iterator[tuple[str, str]]:
    return ((name, str(value)) for name, value in pairs if value not in (None, "", 0))


def _message(line: Fields) -> Pairs:
    headers = line.get("message", {}).get("headers", {})
    policy = line.get("policy", {})
    return [
        ("Subject", headers.get("subject")),
        ("Message-ID", headers.get("message-id")),
        ("Size", f"{line['message']['size']:,} octets" if "message" in line else None),
        ("Client's TLS", line.get("client-tls")),
        ("Client's user", line.get("client-user")),
        ("Rule", rule_text(line) if policy else None),
        ("Came with", ", ".join(_asked(policy))),
    ]


def _asked(policy: Fields) -> Iterator[str]:
    """What the message said in the words of RFC 8689."""
    if policy.get("requiretls"):
        yield "REQUIRETLS"
    if policy.get("tls-required-no"):
        yield "TLS-Required: No"


def rule_text(line: Fields) -> str:
    """Both settings of an event with who spoke for them."""
    return setting_text(line["policy"] | line.get("policy-rules", {}))


def setting_text(policy: Fields) -> str:
    """Both settings with who spoke for them."""
    return ", ".join(
        f"{name.replace('-', '_')}: {'true' if policy[name] else 'false'} ({_spoke(policy, name)})"
        for name in ("require-tls", "skip-verification")
    )


def _spoke(policy: Fields, name: str) -> str:
    """`domain legal.example`: who spoke for a setting, and by which rule."""
    source, rule = policy[f"{name}-source"], policy.get(f"{name}-rule", "")
    return source if rule in ("", source) else f"{source} {rule}"


def _routing(status: Fields) -> Pairs:
    routing = status.get("routing")
    if routing is None:
        return []
    named_by = routing["named-by"]
    signed = "yes, and validated" if routing["authentic"] else "no"
    return [
        ("Hosts named by", _NAMED_BY.get(named_by, named_by)),
        ("Next hop", status.get("route")),
        ("Signed (DNSSEC)", signed if named_by in ("mx", "domain") else None),
        *((f"{number}.", host) for number, host in enumerate(routing["hosts"], 1)),
    ]


def _host(status: Fields, at: datetime) -> Pairs:
    """What a host offered and proved."""
    pairs: Pairs = [("Address", status.get("mx-ip")), ("TLS offered", _is_offered(status))]
    for name, key in _HOST:
        value = status.get(key)
        pairs.append((name, _VERIFIED_BY.get(value or "", value)))
    if certificate := status.get("certificate"):
        is_verified = bool(status.get("certificate-verified"))
        pairs += certificate_facts(certificate, str(status["mx-host"]), at, is_verified=is_verified)
    return pairs


def _is_offered(status: Fields) -> str | None:
    """Whether the host offered TLS, where that is known."""
    downgrade = status.get("downgrade")
    if downgrade is not None:
        return "no" if downgrade["reason"] == "starttls-not-offered" else "yes"
    return "yes" if status.get("tls") or status.get("certificate") else None


def certificate_facts(certificate: Fields, host: str, at: datetime, *, is_verified: bool) -> Pairs:
    """A certificate, and what of it does not match."""
    begins, ends = (
        f"{datetime.fromisoformat(certificate[key]):%Y-%m-%d %H:%M} UTC"
        for key in ("not-before", "not-after")
    )
    has_all_names = len(certificate["names"]) < _NAMES_KEPT
    against = [] if is_verified else faults(certificate, host, at=at, has_all_names=has_all_names)
    return [
        ("Certificate of", certificate["subject"]),
        ("issued by", certificate["issuer"]),
        ("for", ", ".join(certificate["names"]) or "no host name"),
        ("valid", f"{begins} to {ends}"),
        ("SHA-256", certificate.get("sha256")),
        ("does not match", "; ".join(against)),
    ]


def _attempt(line: Fields, status: Fields, at: datetime) -> Pairs:
    pairs = _host(status, at)
    if downgrade := status.get("downgrade"):
        pairs.append(("Downgrade", f"from {downgrade['from']}: {downgrade['error']}"))
    pairs += _policy(status)
    if line["policy"].get("requiretls"):
        pairs.append(("REQUIRETLS passed on", "yes" if status.get("requiretls") else "no"))
    pairs += [(name, status.get(key)) for name, key in _ANSWER]
    if "session-seconds" in status:
        pairs.append(("Session", f"{status['session-seconds']} s"))
    pairs += [("Tried before", host) for host in status.get("hosts", ())]
    return pairs


def _policy(status: Fields) -> Pairs:
    """What the recipient's domain publishes, and what came of it at this host."""
    if "policy-type" not in status:
        return []
    kind, result = status["policy-type"], status.get("policy-result")
    published = {"sts": "MTA-STS", "tlsa": "TLSA records (DANE)"}.get(kind)
    mode = status.get("policy-mode")
    waived = status.get("waived")
    return [
        ("Published policy", ", ".join(one for one in (published, mode) if one)),
        ("What is wrong with it", result),
        ("Policy waived by", _WAIVED.get(waived or "", waived)),
        ("Host name authentic", "yes" if status.get("mx-secure") else "no"),
        ("Less than shown before", _memory(status.get("memory"))),
    ]


def _memory(alarm: Fields | None) -> str | None:
    """What a host has shown of TLS before, where this attempt met less."""
    if alarm is None:
        return None
    return f"{alarm['before']} before, {alarm['now']} now ({alarm['host']}, last {alarm['since']})"
