"""What a host's certificate says of itself, in the interface's spelling, and what does not match.

`faults` names what a person can see: dates, names, an issuer that is the subject. Whether an
authority is trusted is the handshake's to say. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from relay.mail.outcome import CertificateFacts
from relay.route.mta_sts import matches

__all__ = ["as_json", "faults"]


def as_json(facts: CertificateFacts) -> dict[str, Any]:
    """The certificate in the spelling of the delivery log, whole."""
    return {
        "subject": facts.subject,
        "issuer": facts.issuer,
        "names": list(facts.names),
        "not-before": facts.not_before.isoformat(),
        "not-after": facts.not_after.isoformat(),
        "sha256": facts.sha256,
    }


def faults(
    certificate: Mapping[str, Any], host: str, *, at: datetime, has_all_names: bool = True
) -> list[str]:
    """What is against this certificate, seen at this time, for a host of this name.

    `has_all_names` False: the log kept the first names only, so the host's may be another.
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
