"""Certificates of every kind that a mail host may show, made in memory.

An `Authority` is a test CA: a relay trusts its `ca_pem`, and `leaf(name, kind)` is a
certificate for the host `name` with one fault, or with none (`Kind`). Keys are elliptic, so
that a leaf costs a millisecond; each leaf is made once. Use these certificates in tests only.
"""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_DAY = timedelta(days=1)


class Kind(StrEnum):
    """The fault of a certificate. A relay has to verify only `GOOD` and `WILDCARD`."""

    GOOD = "good"
    WILDCARD = "wildcard"
    """`*.` in place of the left-most label (RFC 9525 §6.3)."""
    WRONG_NAME = "wrong-name"
    EXPIRED = "expired"
    NOT_YET_VALID = "not-yet-valid"
    SELF_SIGNED = "self-signed"
    UNKNOWN_CA = "unknown-ca"
    MISSING_INTERMEDIATE = "missing-intermediate"
    CN_ONLY = "cn-only"
    """The right name, but only as common name: not an identity (RFC 9525 §2)."""
    WILDCARD_TWO_LABELS = "wildcard-two-labels"
    """One `*` that would have to stand for two labels."""
    IP_SAN = "ip-san"
    """The right address, but no name."""
    SHORT_KEY = "short-key"
    """RSA of 1024 bits."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A leaf and its key, both PEM; `chain_pem` begins with the leaf."""

    chain_pem: bytes
    key_pem: bytes


class Authority:
    """A test CA with an intermediate CA, and another CA that no relay trusts."""

    def __init__(self, name: str = "Relay test CA") -> None:
        self._name = name
        self._root = _issue_ca(name, None)
        self._intermediate: _Signer | None = None
        self._unknown_ca: Authority | None = None
        self._leaves: dict[tuple[str, Kind, str], Certificate] = {}

    @property
    def ca_pem(self) -> bytes:
        """The root certificate, for the `tls.ca_file` of a relay that trusts this authority."""
        return self._root.certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(self, name: str, kind: Kind = Kind.GOOD, *, address: str = "127.0.0.1") -> Certificate:
        """The certificate of the host `name` with the fault `kind`. `IP_SAN` needs `address`."""
        key = (name, kind, address)
        if key not in self._leaves:
            self._leaves[key] = self._make(name, kind, address)
        return self._leaves[key]

    def client(self, name: str) -> Certificate:
        """The certificate of a client that is called `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        signer = self._root.signer
        builder = _builder(_subject(name), key, now - _DAY, now + 30 * _DAY)
        builder = builder.add_extension(usage, critical=False).issuer_name(signer.name)
        signed = _with_authority_key(builder, signer.key).sign(signer.key, hashes.SHA256())
        return Certificate(signed.public_bytes(serialization.Encoding.PEM), _key_pem(key))

    def _make(self, name: str, kind: Kind, address: str) -> Certificate:
        if kind is Kind.UNKNOWN_CA:
            if self._unknown_ca is None:
                self._unknown_ca = Authority("Unknown CA")
            return self._unknown_ca.leaf(name)
        leaf_key: _Key = (
            _rsa_1024() if kind is Kind.SHORT_KEY else ec.generate_private_key(ec.SECP256R1())
        )
        builder = _leaf_builder(name, kind, address, leaf_key)
        signer = self._signer(kind, leaf_key, name)
        builder = _with_authority_key(builder, signer.key)
        signed = builder.issuer_name(signer.name).sign(signer.key, hashes.SHA256())
        return Certificate(signed.public_bytes(serialization.Encoding.PEM), _key_pem(leaf_key))

    def _signer(self, kind: Kind, leaf_key: _Key, name: str) -> _Signer:
        if kind is Kind.SELF_SIGNED:
            return _Signer(leaf_key, _subject(name))
        if kind is Kind.MISSING_INTERMEDIATE:
            if self._intermediate is None:
                self._intermediate = _issue_ca(f"{self._name}, intermediate", self._root).signer
            return self._intermediate
        return self._root.signer


def server_context(
    certificate: Certificate,
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    maximum: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
) -> ssl.SSLContext:
    """A server's context with this certificate and these versions of TLS, 1.0 included."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # OpenSSL 3 refuses old versions of TLS and short keys above security level 0, as a server too.
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        # TLS 1.0 and 1.1 are deprecated (RFC 8996); a test needs hosts that speak only these.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = minimum
        context.maximum_version = maximum
    with tempfile.TemporaryDirectory() as directory:
        # `ssl` loads a chain from files only.
        chain, key = Path(directory, "chain.pem"), Path(directory, "key.pem")
        chain.write_bytes(certificate.chain_pem)
        key.write_bytes(certificate.key_pem)
        context.load_cert_chain(chain, key)
    return context


@dataclass(frozen=True, slots=True)
class _Signer:
    key: _Key
    name: x509.Name


@dataclass(frozen=True, slots=True)
class _Ca:
    certificate: x509.Certificate
    signer: _Signer = field(repr=False)


def _issue_ca(name: str, parent: _Ca | None) -> _Ca:
    """A CA, signed by `parent` or itself, that passes Python 3.13's checks (RFC 5280 §4.2.1)."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = _Signer(key, _subject(name))
    signer = parent.signer if parent else own
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _builder(own.name, key, now - _DAY, now + 3650 * _DAY)
        .issuer_name(signer.name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    builder = _with_authority_key(builder, signer.key)
    return _Ca(builder.sign(signer.key, hashes.SHA256()), own)


def _leaf_builder(name: str, kind: Kind, address: str, key: _Key) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    begins, ends = now - _DAY, now + 30 * _DAY
    if kind is Kind.EXPIRED:
        begins, ends = now - 30 * _DAY, now - _DAY
    if kind is Kind.NOT_YET_VALID:
        begins, ends = now + _DAY, now + 30 * _DAY
    builder = (
        _builder(_subject(name), key, begins, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    names = _alternative_names(name, kind, address)
    return (
        builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if names
        else builder
    )


def _alternative_names(name: str, kind: Kind, address: str) -> list[x509.GeneralName]:
    match kind:
        case Kind.CN_ONLY:
            return []
        case Kind.IP_SAN:
            return [x509.IPAddress(ipaddress.ip_address(address))]
        case Kind.WRONG_NAME:
            return [x509.DNSName(f"wrong.{name}")]
        case Kind.WILDCARD:
            return [x509.DNSName("*." + name.split(".", 1)[1])]
        case Kind.WILDCARD_TWO_LABELS:
            return [x509.DNSName("*." + name.split(".", 2)[2])]
        case _:
            return [x509.DNSName(name)]


def _builder(
    subject: x509.Name, key: _Key, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _with_authority_key(builder: x509.CertificateBuilder, key: _Key) -> x509.CertificateBuilder:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return builder.add_extension(identifier, critical=False)


def _subject(name: str) -> x509.Name:
    """The name as common name, if it is not longer than RFC 5280 appendix A.1 allows."""
    if len(name) > 64:
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "A host with a long name")])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@lru_cache(maxsize=1)
def _rsa_1024() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=1024)


def _key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
