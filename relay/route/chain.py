"""Chains of certificates, checked without a handshake.

OpenSSL checks a chain during the handshake, and its result is final. Where another part decides
(the TLSA records of a host, or a policy in testing mode), this module checks the chain that the
host sent. It uses only the rules of RFC 5280: the default rules of the library are meant for public
web authorities, and an authority that a host names in TLSA records need not follow them. Pure.
"""

from __future__ import annotations

import warnings
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from relay.mail.outcome import PolicyResult

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises for a certificate or a key that it cannot read."""


def load(der: bytes) -> x509.Certificate:
    """A certificate. The library's warnings about mistakes in it are suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x509.load_der_x509_certificate(der)


def load_whole(der: bytes) -> x509.Certificate:
    """A certificate, read with its names and key, which the library otherwise reads later."""
    certificate = load(der)
    _ = certificate.subject, certificate.issuer, certificate.public_key()
    return certificate


def readable(chain: Iterable[bytes]) -> Iterator[tuple[x509.Certificate, bytes]]:
    """The certificates of a chain in DER that can be read, with their octets."""
    for der in chain:
        try:
            yield load_whole(der), der
        except UNREADABLE:
            continue


def store_of(roots: Iterable[bytes]) -> Store | None:
    """The roots (DER) to trust, None for none."""
    certificates = [certificate for certificate, _ in readable(roots)]
    return Store(certificates) if certificates else None


def fault_of(
    chain: Sequence[bytes], roots: Store | None, name: str | None, *, now: datetime
) -> PolicyResult | None:
    """The first fault of a host's certificate, or None.

    Checked in OpenSSL's order: the chain to a root, the dates, the name (RFC 8460 §4.3).
    """
    try:
        leaf = load_whole(chain[0])
    except (IndexError, *UNREADABLE):
        return PolicyResult.NOT_TRUSTED
    others = [certificate for certificate, _ in readable(chain[1:])]
    if name is not None and roots is not None and is_issued(leaf, others, roots, name, now):
        return None
    if roots is None or not _is_issued_at_all(leaf, others, roots, now):
        ended = leaf.not_valid_after_utc
        if ended < now and roots is not None and _is_issued_at_all(leaf, others, roots, ended):
            return PolicyResult.EXPIRED
        return PolicyResult.NOT_TRUSTED
    return PolicyResult.HOST_MISMATCH


def _is_issued_at_all(
    leaf: x509.Certificate, others: list[x509.Certificate], roots: Store, now: datetime
) -> bool:
    """Whether a chain leads to a root, with any name in the certificate."""
    return any(is_issued(leaf, others, roots, name, now) for name in _names(leaf)[:1])


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = found.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return []
    return [f"any{name[1:]}" if name.startswith("*.") else name for name in names]


def is_issued(
    leaf: x509.Certificate, others: list[x509.Certificate], anchors: Store, name: str, now: datetime
) -> bool:
    """Whether a certificate is valid now, for the name, with a chain to one of the anchors."""
    try:
        verifier = (
            PolicyBuilder()
            .store(anchors)
            .time(now)
            .extension_policies(ca_policy=_ISSUERS, ee_policy=_HOSTS)
            .build_server_verifier(x509.DNSName(name))
        )
        verifier.verify(leaf, others)
    except (VerificationError, *UNREADABLE):
        return False
    return True


def pin_of(der: bytes) -> str:
    """The pin that a certificate matches: base64 of the SHA-256 digest of its SubjectPublicKeyInfo
    (RFC 7469 §2.4); "" where it has no key.
    """
    key = key_of(der)
    return b64encode(sha256(key).digest()).decode("ascii") if key else ""


def key_of(der: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate, as octets; b"" where there is none.

    The key is cut out and not decoded: DANE-EE and pins only compare it, so a certificate that
    `cryptography` cannot read may match, too.
    """
    try:
        tbs, _ = _inside(der, _inside(der, 0)[0])
        if der[tbs] == _VERSION_TAG:
            _, tbs = _inside(der, tbs)
        for _ in range(_FIELDS_BEFORE_KEY):
            _, tbs = _inside(der, tbs)
        return der[tbs : _inside(der, tbs)[1]]
    except IndexError:
        return b""


_VERSION_TAG = 0xA0
_FIELDS_BEFORE_KEY = 5
"""serialNumber, signature, issuer, validity, subject (RFC 5280 §4.1)."""


def _inside(der: bytes, at: int) -> tuple[int, int]:
    """Where the content of the DER element at `at` begins, and where it ends."""
    length, begin = der[at + 1], at + 2
    if length & 0x80:
        octets = length & 0x7F
        begin += octets
        length = int.from_bytes(der[begin - octets : begin], "big")
    return begin, begin + length


def _may_issue(_: Policy, __: x509.Certificate, found: x509.KeyUsage | None) -> None:
    if found is not None and not found.key_cert_sign:
        raise ValueError("its key may not sign certificates")


def _may_serve(_: Policy, __: x509.Certificate, found: x509.ExtendedKeyUsage | None) -> None:
    if found is not None and not _SERVER_USES & set(found):
        raise ValueError("not for servers")


_SERVER_USES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}

_ISSUERS = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _may_issue)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_serve)
)
_HOSTS = (
    ExtensionPolicy.permit_all()
    .require_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, None)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _may_serve)
)
