"""Decides whether a message is signed, and for which domain; makes the DKIM-Signature field. Pure.

A message is signed if its sender (the reverse-path) and its author (the From field) are in the same
domain, and this domain has a key. Both have to match, because the sender domains of a user restrict
only the reverse-path: another domain in From must not get a signature of that domain. Reports of
the relay have no reverse-path; for them From alone decides.

The signature is made last, over the octets that are sent. RFC 6376 §5.4.1 says which fields are
signed. A field that a reader sees is oversigned: named once more than it occurs, so that nobody can
add a second one (§8.15). dkimpy writes the field and its hash; `cryptography` signs the hash,
because it is much faster.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import dkim
from dkim.canonicalization import CanonicalizationPolicy

from relay.mail.address import AddressError, domain_of, normalise_domain
from relay.mail.header import named
from relay.queue.entry import QueuedMessage


class _Key(Protocol):
    """Signs a SHA-256 hash. `algorithm`: the value of the a= tag."""

    @property
    def algorithm(self) -> str: ...

    def sign(self, digest: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key, with the domain and the selector that its signatures name."""

    domain: str
    selector: str
    key: _Key


_OVERSIGNED = (
    b"from",
    b"to",
    b"cc",
    b"subject",
    b"date",
    b"reply-to",
    b"message-id",
    b"content-type",
)
"""Fields that a reader sees or a program obeys: nobody may add a second one."""


def may_sign(keys: Mapping[str, SigningKey], message: QueuedMessage) -> bool:
    """Whether a message is signed if its author is in the domain of its sender.

    The content is not needed for this, so the relay need not read it where the result is False.
    """
    if not keys or _has_opted_out(message):
        return False
    return _sender_domain(message) in keys if message.reverse_path else message.origin == "dsn"


def key_for(
    keys: Mapping[str, SigningKey], message: QueuedMessage, header: bytes
) -> SigningKey | None:
    """The key that signs a message; None if it is not signed."""
    if not may_sign(keys, message):
        return None
    author = author_domain(header)
    if message.reverse_path and author != _sender_domain(message):
        return None
    return keys.get(author)


def why_unsigned(keys: Mapping[str, SigningKey], message: QueuedMessage) -> str:
    """Why a message has no signature, if the domain of its sender or author has a key; else ""."""
    if not keys or _has_opted_out(message):
        return ""
    author = author_domain(f"From: {message.summary.from_}".encode("utf-8", "replace"))
    sender = _sender_domain(message)
    if sender not in keys and author not in keys:
        return ""
    return f"the sender's domain ({sender or 'none'}) is not the author's ({author or 'not clear'})"


def _has_opted_out(message: QueuedMessage) -> bool:
    return message.terms is not None and not message.terms.is_signed


def _sender_domain(message: QueuedMessage) -> str:
    try:
        return domain_of(message.reverse_path)
    except AddressError:
        return ""


_QUOTED = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*"')
_COMMENT = re.compile(rb"\([^()]*+\)")
_IN_BRACKETS = re.compile(rb"[^<>,;@]*+<[^<>@,;]*+@([^<>@,;\s]++)>\s*")
_BARE = re.compile(rb"\s*[^<>,;@\s]*+@([^<>@,;\s]++)\s*")


_author_fields = named((b"from",))


def author_domain(header: bytes) -> str:
    """The domain of the author; "" unless there is exactly one From field with one author."""
    values = [field.value(header) for field in _author_fields(header)]
    if len(values) != 1:
        return ""
    value = _COMMENT.sub(b"", _QUOTED.sub(b"", values[0]))
    found = _IN_BRACKETS.fullmatch(value) or _BARE.fullmatch(value)
    if found is None:
        return ""
    try:
        return normalise_domain(found[1].decode())
    except (AddressError, UnicodeError):
        return ""


_MOST_SIGNED = 200
_REPORT_FIELDS = (b"tls-report-domain", b"tls-report-submitter")
"""RFC 8460 §3: a report on TLS is signed with these."""

_signed_fields = named((*dkim.DKIM.SHOULD, *_REPORT_FIELDS))


def sign(signing: SigningKey, header: bytes, body_hash: bytes, *, now: datetime) -> bytes:
    """The DKIM-Signature field, which goes on top of a message.

    ValueError where dkimpy refuses the message, or where so many fields would have to be signed
    that a mail host may refuse to check them.
    """
    fields = [header[field.start : field.end] + b"\r\n" for field in _signed_fields(header)]
    if len(fields) > _MOST_SIGNED:
        raise ValueError(f"it has more than {_MOST_SIGNED} fields that would have to be signed")
    try:
        return _Signer(b"".join(fields) + b"\r\n").signature(signing, body_hash, now)
    except dkim.DKIMException as error:
        raise ValueError(str(error)) from error


class _Signer(dkim.DKIM):  # type: ignore[misc]  # dkimpy has no types
    """dkimpy's signer. It takes the hash of a body instead of the body, and a key of ours."""

    def __init__(self, header: bytes) -> None:
        # Only with this algorithm dkimpy gives the key a hash, and takes the signature unchanged.
        super().__init__(header, signature_algorithm=b"ed25519-sha256")
        self.hasher = hashlib.sha256
        self.should_sign.update(_REPORT_FIELDS)

    def signature(self, signing: SigningKey, body_hash: bytes, now: datetime) -> bytes:
        names = [name.lower() for name, _ in self.headers if name.lower() in self.should_sign]
        names += [
            name for name in _OVERSIGNED if name not in (b"content-type", b"cc") or name in names
        ]
        relaxed = CanonicalizationPolicy.from_c_value(b"relaxed/relaxed")
        tags = [
            (b"v", b"1"),
            (b"a", signing.key.algorithm.encode()),
            (b"c", relaxed.to_c_value()),
            (b"d", signing.domain.encode()),
            (b"s", signing.selector.encode()),
            (b"t", str(int(now.timestamp())).encode()),
            (b"h", b" : ".join(names)),
            (b"bh", base64.b64encode(body_hash)),
            (b"b", b"0" * 60),
        ]
        value: bytes = self.gen_header(
            tags, names, relaxed, b"DKIM-Signature", _ForDkimpy(signing.key)
        )
        return b"DKIM-Signature: " + value


@dataclass(frozen=True, slots=True)
class _Signed:
    signature: bytes


@dataclass(frozen=True, slots=True)
class _ForDkimpy:
    """A key in the form of pynacl's, which dkimpy expects."""

    key: _Key

    def sign(self, digest: bytes) -> _Signed:
        return _Signed(self.key.sign(digest))
