"""The contents of a host's certificate as JSON, and what is wrong with it. Pure.

`faults` names what can be seen in the certificate: dates, names, an issuer that is the subject.
Only the handshake decides whether an authority is trusted.
"""

from __future__ import annotations

from datetime import datetime

from relay.mail.jsontext import JsonFields, JsonObject
from relay.mail.outcome import CertificateFacts
from relay.route.mta_sts import matches


def as_json(facts: CertificateFacts) -> JsonObject:
    """A certificate as in the delivery log, with all its names."""
    return {
        "subject": facts.subject,
        "issuer": facts.issuer,
        "names": list(facts.names),
        "not-before": facts.not_before.isoformat(),
        "not-after": facts.not_after.isoformat(),
        "sha256": facts.sha256,
    }


def faults(
    certificate: JsonFields, host: str, *, at: datetime, has_all_names: bool = True
) -> list[str]:
    """What is wrong with a certificate that a host of this name showed at this time.

    `has_all_names` False: the log has only the first names, so the host's may be among the others.
    """
    begins, ends = (datetime.fromisoformat(certificate[key]) for key in ("not-before", "not-after"))
    names = tuple(certificate["names"])
    found = []
    if at > ends:
        found.append(f"it expired on {ends:%Y-%m-%d}")
    if at < begins:
        found.append(f"it is not valid before {begins:%Y-%m-%d}")
    if not names:
        found.append("it is for no host name")
    # RFC 9525 §6.3 compares as RFC 8461 §4.1 does: a wildcard stands for the whole first label.
    elif has_all_names and not matches(tuple(name.lower() for name in names), host.lower()):
        found.append(f"it is for {', '.join(names[:5])}, not for {host}")
    if certificate["subject"] == certificate["issuer"]:
        found.append("it is signed by itself, not by an authority")
    return found
