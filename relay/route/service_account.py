"""The key of a service account, and the statement about who asks that is signed with it. Pure."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from relay.mail.jsontext import object_of

_STATEMENT_LIFE = timedelta(hours=1)
"""Google takes no longer one."""


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """The key file of a service account."""

    email: str
    token_url: str
    key: rsa.RSAPrivateKey = field(repr=False)
    key_id: str = ""

    @classmethod
    def parse(cls, text: str) -> ServiceKey:
        """Read the JSON that Google offers for download. ValueError says what is wrong with it."""
        found = object_of(text)
        if found is None:
            raise ValueError("it is not the JSON file of a service account's key")
        email, pem = found.get("client_email"), found.get("private_key")
        if not isinstance(email, str) or not isinstance(pem, str):
            raise ValueError("it has no client_email or no private_key")
        try:
            key = load_pem_private_key(pem.encode(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("its private_key is not an RSA key in PEM form without a passphrase")
        token_url, key_id = found.get("token_uri"), found.get("private_key_id")
        return cls(
            email,
            token_url if isinstance(token_url, str) else "",
            key,
            key_id if isinstance(key_id, str) else "",
        )

    def statement(self, url: str, *, subject: str | None, scope: str | None, now: datetime) -> str:
        """A JWT (RFC 7523 §3) for a server, signed with RS256 (RFC 7518 §3.3).

        `subject`: the mailbox that is meant, None for the account itself.
        """
        issued = int(now.timestamp())
        header = {"alg": "RS256", "typ": "JWT"} | ({"kid": self.key_id} if self.key_id else {})
        claims = {
            "iss": self.email,
            "sub": subject or self.email,
            "aud": url,
            "iat": issued,
            "exp": issued + int(_STATEMENT_LIFE.total_seconds()),
        }
        if scope:
            claims["scope"] = scope
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = self.key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return (signed + b"." + _base64url(signature)).decode()


def _base64url(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")
