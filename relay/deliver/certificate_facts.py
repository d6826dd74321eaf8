"""The contents of a host's certificate, verified or not. Pure.

A host shows the same certificate many times, so it is read once.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from cryptography import x509

from relay.mail.outcome import CertificateFacts
from relay.route.chain import UNREADABLE, load

_REMEMBERED = 256


@lru_cache(maxsize=_REMEMBERED)
def facts_of(der: bytes) -> CertificateFacts | None:
    """The contents; None where the certificate cannot be read."""
    try:
        certificate = load(der)
        return CertificateFacts(
            subject=certificate.subject.rfc4514_string(),
            issuer=certificate.issuer.rfc4514_string(),
            names=_names(certificate),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            sha256=hashlib.sha256(der).hexdigest(),
        )
    except UNREADABLE:
        return None


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(names.get_values_for_type(x509.DNSName))
