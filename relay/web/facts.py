"""The details of an event, which the page shows when a row is opened: names and values. Pure.

The message and its rule come first, then the hosts that the attempt could use, then each host with
what it offered and proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from relay.admin.certificates import faults
from relay.mail.jsontext import JsonFields

Pairs = list[tuple[str, object]]

_NAMES_KEPT = 5
"""How many names of a certificate the delivery log has."""

_HOST = (
    ("TLS version", "tls-version"),
    ("Cipher", "tls-cipher"),
    ("Verified by", "verified-by"),
    ("Pin", "pin"),
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
    "pin": "a key that is pinned, and no authority (pin_sha256)",
}


class FactGroup(NamedTuple):
    """Facts with a title; "" for those of the message."""

    title: str
    facts: tuple[tuple[str, str], ...]


def groups_of(line: JsonFields) -> tuple[FactGroup, ...]:
    """The groups of an event that are not empty."""
    status = line.get("delivery-status", {})
    at = datetime.fromtimestamp(line["timestamp"], UTC)
    groups = [
        ("", _message(line)),
        ("Where it could go", _routing(status)),
        *((one["mx-host"], _host(one, at)) for one in status.get("earlier", ())),
        (status.get("mx-host") or "The attempt" if status else "", _attempt(line, status, at)),
    ]
    filled = (FactGroup(title, tuple(_not_empty(pairs))) for title, pairs in groups)
    return tuple(group for group in filled if group.facts)


def _not_empty(pairs: Pairs) -> Iterator[tuple[str, str]]:
    return ((name, str(value)) for name, value in pairs if value not in (None, "", 0))


def _message(line: JsonFields) -> Pairs:
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
        ("Node", line.get("node")),
    ]


def _asked(policy: JsonFields) -> Iterator[str]:
    """What the message asked for, in the words of RFC 8689."""
    if policy.get("requiretls"):
        yield "REQUIRETLS"
    if policy.get("tls-required-no"):
        yield "TLS-Required: No"


def rule_text(line: JsonFields) -> str:
    """Both settings of an event, each with its source and rule."""
    return setting_text(line["policy"] | line.get("policy-rules", {}))


def setting_text(policy: JsonFields) -> str:
    """Both settings, each with its source and rule."""
    return ", ".join(_one_setting(policy, name) for name in ("require-tls", "skip-verification"))


def _one_setting(policy: JsonFields, name: str) -> str:
    """`require_tls: true (domain legal.example)`: the source of a setting, and the rule there."""
    source, rule = policy[f"{name}-source"], policy.get(f"{name}-rule", "")
    origin = source if rule in ("", source) else f"{source} {rule}"
    return f"{name.replace('-', '_')}: {'true' if policy[name] else 'false'} ({origin})"


def _routing(status: JsonFields) -> Pairs:
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


def _host(status: JsonFields, at: datetime) -> Pairs:
    """What a host offered and proved."""
    pairs: Pairs = [("Address", status.get("mx-ip")), ("TLS offered", _is_offered(status))]
    for name, key in _HOST:
        value = status.get(key)
        pairs.append((name, _VERIFIED_BY.get(value or "", value)))
    if certificate := status.get("certificate"):
        is_verified = bool(status.get("certificate-verified"))
        pairs += certificate_facts(certificate, str(status["mx-host"]), at, is_verified=is_verified)
    return pairs


def _is_offered(status: JsonFields) -> str | None:
    """Whether the host offered TLS, where that is known."""
    downgrade = status.get("downgrade")
    if downgrade is not None:
        return "no" if downgrade["reason"] == "starttls-not-offered" else "yes"
    return "yes" if status.get("tls") or status.get("certificate") else None


def certificate_facts(
    certificate: JsonFields, host: str, at: datetime, *, is_verified: bool
) -> Pairs:
    """A certificate, and what is wrong with it."""
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


def _attempt(line: JsonFields, status: JsonFields, at: datetime) -> Pairs:
    pairs = _host(status, at)
    if login := status.get("auth"):
        user = f" as {login['user']}" if login["user"] else ""
        pairs.append(("Login", f"{login['mechanism']}{user}"))
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


def _policy(status: JsonFields) -> Pairs:
    """The policy of the recipient's domain, and its result at this host."""
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


def _memory(alarm: JsonFields | None) -> str | None:
    """What a host has shown of TLS before, if it showed less in this attempt."""
    if alarm is None:
        return None
    return f"{alarm['before']} before, {alarm['now']} now ({alarm['host']}, last {alarm['since']})"
