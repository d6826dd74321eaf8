"""Mail hosts whose certificates are of an authority that nobody knows, and TLSA records of them."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from relay.sandbox.certificates import Certificate, server_context
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script

_OTHER = "other"
_SHORT = "short"


class Shown(StrEnum):
    """What a host shows. Only `TRUSTED` is by an authority that clients are told to trust."""

    TRUSTED = "trusted"
    PRIVATE = "private"
    """Its own certificate, and behind it that of the authority."""
    LEAF_ONLY = "leaf-only"
    INTERMEDIATE = "intermediate"
    """Its own certificate, by an intermediate authority, and behind it that one and the root."""
    WRONG_NAME = "wrong-name"
    EXPIRED = "expired"
    FOR_DOMAIN = "for-domain"
    """For the recipient domain, not for the host."""
    WILDCARD = "wildcard"


@dataclass(frozen=True)
class Identity:
    """What one host shows: DER, its own certificate first, and PEM with the key."""

    chain: tuple[bytes, ...]
    root: bytes
    certificate: Certificate

    def record(self, text: str) -> str:
        """A TLSA record's data, from `3 1 1 leaf`: usage, selector, matching type, and of what.

        Of what: `leaf`, `issuer` (the first of the chain behind it), `root`, `other`, `other2`
        and so on (of a certificate that is nowhere), `short` (the leaf's, less its last octet).
        """
        usage, selector, matching, of = text.split()
        subject = {"issuer": self.chain[1:2], "root": (self.root,)}.get(of, self.chain[:1])[0]
        data = associated(subject, int(selector), int(matching))
        if of.startswith(_OTHER):
            data = hashlib.sha512(data + of.encode()).digest()[: len(data)]
        if of == _SHORT:
            data = data[:-1]
        return f"{usage} {selector} {matching} {data.hex()}"

    def rdata(self, text: str) -> str:
        """The same in the form of RFC 3597, which lets a record be wrong."""
        usage, selector, matching, data = self.record(text).split()
        octets = bytes((int(usage), int(selector), int(matching))) + bytes.fromhex(data)
        return f"TYPE52 \\# {len(octets)} {octets.hex()}"


class Authorities:
    """The two authorities of a test: a trusted one and an unknown one."""

    def __init__(self) -> None:
        self._trusted = trustme.CA()
        self._private = trustme.CA()

    @property
    def trusted_pem(self) -> bytes:
        return self._trusted.cert_pem.bytes()

    @cached_property
    def _intermediate(self) -> trustme.CA:
        return self._private.create_child_ca()

    def identity(self, shown: Shown, host: str, domain: str) -> Identity:
        """What the mail host of a domain shows."""
        issuer = {Shown.TRUSTED: self._trusted, Shown.INTERMEDIATE: self._intermediate}.get(
            shown, self._private
        )
        name = {
            Shown.WRONG_NAME: "wrong.example",
            Shown.FOR_DOMAIN: domain,
            Shown.WILDCARD: f"*.{host.partition('.')[2]}",
        }.get(shown, host)
        ends = datetime.now(UTC) + timedelta(days=-1 if shown is Shown.EXPIRED else 30)
        leaf = issuer.issue_cert(name, not_before=ends - timedelta(days=60), not_after=ends)
        root = self._trusted if shown is Shown.TRUSTED else self._private
        pem = [blob.bytes() for blob in leaf.cert_chain_pems]
        if shown not in (Shown.LEAF_ONLY, Shown.TRUSTED):
            pem.append(root.cert_pem.bytes())
        certificate = Certificate(b"".join(pem), leaf.private_key_pem.bytes())
        return Identity(tuple(map(_der, pem)), _der(root.cert_pem.bytes()), certificate)


class DaneHost(MxServer):
    """A mail host that shows an identity of the test's choice."""

    def __init__(
        self, script: Script, identity: Identity, *, name: str, address: str, port: int
    ) -> None:
        super().__init__(script, name=name, address=address, port=port)
        self.identity = identity

    def context(self, script: Script) -> ssl.SSLContext:
        return server_context(self.identity.certificate, script.minimum_tls, script.maximum_tls)


def _der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def associated(der: bytes, selector: int, matching: int) -> bytes:
    """RFC 6698 §2.1.3."""
    if selector == 1:
        key = x509.load_der_x509_certificate(der).public_key()
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = {1: hashlib.sha256, 2: hashlib.sha512}.get(matching)
    return digest(der).digest() if digest else der
