"""The private keys of DKIM: reads them from PEM files, makes new ones, writes their DNS records. †

A key is RSA of at least 1024 bits, better 2048 (RFC 8301 §3.2), or Ed25519 (RFC 8463), and is not
encrypted.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa, utils

from relay.sign.options import DkimDomain
from relay.sign.signature import SigningKey

_LEAST_BITS = 1024
_STRING_OCTETS = 255


class KeyFileError(Exception):
    """A key cannot be used. The text says why, and does not name the file."""


@dataclass(frozen=True, slots=True)
class RsaKey:
    """An RSA key, which signs as `rsa-sha256` (RFC 6376 §3.3.1)."""

    key: rsa.RSAPrivateKey
    algorithm: str = "rsa-sha256"

    def sign(self, digest: bytes) -> bytes:
        return self.key.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))

    def record_text(self) -> str:
        """The record's text. Its p= tag is the SubjectPublicKeyInfo."""
        spki = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return f"v=DKIM1; k=rsa; p={base64.b64encode(spki).decode()}"


@dataclass(frozen=True, slots=True)
class Ed25519Key:
    """An Ed25519 key, which signs the hash as `ed25519-sha256` (RFC 8463 §3)."""

    key: ed25519.Ed25519PrivateKey
    algorithm: str = "ed25519-sha256"

    def sign(self, digest: bytes) -> bytes:
        return self.key.sign(digest)

    def record_text(self) -> str:
        """The record's text. Its p= tag is the key without a wrapper (RFC 8463 §4)."""
        raw = self.key.public_key().public_bytes_raw()
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(raw).decode()}"


def load_keys(domains: Mapping[str, DkimDomain]) -> dict[str, SigningKey]:
    """The key of each domain. `KeyFileError` names the first file that cannot be used."""
    keys = {}
    for name, domain in domains.items():
        try:
            keys[name] = SigningKey(name, domain.selector, load_key(Path(domain.key_file)))
        except KeyFileError as error:
            raise KeyFileError(f"{domain.key_file}: {error}") from None
    return keys


def load_key(path: Path) -> RsaKey | Ed25519Key:
    """The key in a PEM file."""
    try:
        octets = path.read_bytes()
        if stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH:
            raise KeyFileError("every user of this machine may read the key")
    except OSError as error:
        raise KeyFileError(error.strerror or str(error)) from None
    try:
        key = serialization.load_pem_private_key(octets, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError("not an unencrypted private key in PEM form") from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return Ed25519Key(key)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise KeyFileError("neither RSA nor Ed25519")
    if key.key_size < _LEAST_BITS:
        raise KeyFileError(f"RSA of {key.key_size} bits; mail hosts want {_LEAST_BITS} or more")
    return RsaKey(key)


def new_key(path: Path, *, kind: str) -> RsaKey | Ed25519Key:
    """Make a key ("rsa" of 2048 bits, or "ed25519") in a new file, which only its owner may read.

    A file that root makes gets the owner and the group of its directory, because the service does
    not run as root. The group may read the file if it may enter the directory.
    """
    made = (
        Ed25519Key(ed25519.Ed25519PrivateKey.generate())
        if kind == "ed25519"
        else RsaKey(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    )
    pem = made.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
            if os.geteuid() == 0:
                _take_owner_of(file.fileno(), path.parent.stat())
    except OSError as error:
        raise KeyFileError(error.strerror or str(error)) from None
    return made


def _take_owner_of(fd: int, directory: os.stat_result) -> None:
    os.fchown(fd, directory.st_uid, directory.st_gid)
    if directory.st_gid and directory.st_mode & stat.S_IXGRP:
        os.fchmod(fd, 0o640)


def dns_record(key: RsaKey | Ed25519Key, *, domain: str, selector: str) -> str:
    """The record that publishes a key, as in a zone file: in strings of at most 255 octets."""
    text = key.record_text()
    strings = [text[i : i + _STRING_OCTETS] for i in range(0, len(text), _STRING_OCTETS)]
    quoted = "\n    ".join(f'"{string}"' for string in strings)
    return f"{selector}._domainkey.{domain}. IN TXT (\n    {quoted} )"
