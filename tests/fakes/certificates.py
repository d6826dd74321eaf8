"""Certificates with what a test says of them, and their keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)


class Issued:
    """A certificate and its key."""

    def __init__(self, certificate, key):
        self.certificate, self.key = certificate, key
        self.der = certificate.public_bytes(Encoding.DER)
        self.spki = certificate.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )


def issue(
    name,
    issuer=None,
    *,
    ca=None,
    names=None,
    begins=NOW - DAY,
    ends=NOW + DAY,
    path_length=None,
    key_usage=None,
    constraints=None,
    uses=None,
    key=None,
):
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )
    if ca is not None:
        basic = x509.BasicConstraints(ca=ca, path_length=path_length)
        builder = builder.add_extension(basic, critical=True)
    if names is not None:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(each) for each in names])
        builder = builder.add_extension(alternatives, critical=False)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=True)
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    if uses is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    signing = issuer.key if issuer else key
    algorithm = None if isinstance(signing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Issued(builder.sign(signing, algorithm), key)


def usage(*, digital_signature=False, key_cert_sign=False):
    """What a key may be used for; nothing else."""
    others = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(digital_signature=digital_signature, key_cert_sign=key_cert_sign, **others)
