"""What the domain of a recipient publishes: MTA-STS and TLSRPT records, policies, TLSA records."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from relay.mail.address import parse_path
from relay.mail.outcome import VerifiedBy
from relay.route.answers import TlsaAnswer
from relay.route.dane import floor_of_records, matched, parse_tlsa, usable
from relay.route.floor import DaneState, Tlsa
from relay.route.mta_sts import (
    InvalidPolicy,
    Policy,
    StsMode,
    is_pattern,
    matches,
    parse_policy,
    record_id,
)
from relay.route.tlsrpt import MOST_TARGETS, report_targets

NOW = datetime(2026, 11, 20, tzinfo=UTC)
HOST = "mx.example.net"


def policies(octets: bytes) -> None:
    """A record has one id or none; a policy is read or refused, and no later line weakens it."""
    first, _, body = octets.partition(b"\xfe")
    _records(first.split(b"\xfd"))
    _report_targets(first.split(b"\xfd"))
    try:
        policy = parse_policy(body)
    except InvalidPolicy:
        return
    assert policy.mode in StsMode
    assert timedelta(0) <= policy.max_age <= timedelta(seconds=31_557_600)
    assert policy.mx or policy.mode is StsMode.NONE
    assert len(set(policy.mx)) == len(policy.mx)
    for other in (
        re.sub(rb"\r\n(?!\r)", b"\n", body) if b"\r\r" not in body else body,
        body + b"\nmode: none\nmax_age: 0\nversion: x\nmx: [127.0.0.1]\n",
    ):
        assert _essence(parse_policy(other)) == _essence(policy)
    for pattern in policy.mx:
        _names(pattern)


def _essence(policy: Policy) -> Policy:
    return replace(policy, lines=())


def _records(texts: list[bytes]) -> None:
    found = record_id(texts)
    ours = [text for text in texts if text.startswith(b"v=STSv1;")]
    if found is None:
        return
    assert re.fullmatch(r"[A-Za-z0-9]{1,32}", found)
    assert len(ours) == 1
    assert re.search(rb";[ \t]*id=%s[ \t]*(?:;|\Z)" % found.encode(), ours[0])
    assert record_id([*texts, b"v=spf1 -all"]) == found
    assert record_id([*texts, b"v=STSv1; id=1;"]) is None


def _report_targets(texts: list[bytes]) -> None:
    """RFC 8460 §3: targets come from one record, and an address is one that can be mailed."""
    for targets in (report_targets(texts), report_targets([b"v=TLSRPTv1;rua=" + texts[0]])):
        assert len(targets) <= MOST_TARGETS
        assert len({target.uri for target in targets}) == len(targets)
        for target in targets:
            assert target.uri.isascii()
            assert target.uri.isprintable()
            if target.transport == "mail":
                assert parse_path(f"<{target.address}>".encode(), smtputf8=False)[0]
            else:
                assert target.uri[:8].lower() == "https://"


def _names(pattern: str) -> None:
    """RFC 8461 §4.1."""
    assert is_pattern(pattern)
    bare = pattern.removeprefix("*.")
    names = {bare: bare == pattern, f"a.{bare}": bare != pattern, f"a.b.{bare}": False}
    for name, is_named in {**names, f"x{bare}": False, "": False, ".": False}.items():
        for spelling in (name, f"{name}.", name.upper()):
            assert matches([pattern], spelling) is is_named, (pattern, spelling)


def tlsa(octets: bytes) -> None:
    """Records of any octets are read; a certificate meets those that name it, or its issuer."""
    if len(octets) < 3:
        return
    flags, place, octet = octets[:3]
    leaf, issuer = certificates()
    if flags & 1:
        broken = bytearray(leaf)
        broken[place % len(leaf)] ^= octet or 1
        leaf = bytes(broken)
    described = (leaf, issuer) if flags & 4 else certificates()
    rdata = [_filled(line, *described) for line in octets[3:].split(b"\n")][:6]
    floor = floor_of_records(
        TlsaAnswer(tuple(rdata), authenticated=True), HOST, names=(), is_enforced=True
    )
    counting = usable(map(parse_tlsa, rdata))
    assert floor.state is (DaneState.USABLE if counting else DaneState.UNUSABLE)
    assert all(record.usage in (2, 3) for record in counting)
    if not counting:
        return
    chain = [leaf, issuer] if flags & 2 else [leaf]
    verdict = matched(floor, chain, now=NOW)
    named = {one.usage for one in counting if one.data in _values(one, leaf, issuer)[one.usage]}
    if flags & 1:  # its signature is broken
        assert verdict is None or (
            verdict is VerifiedBy.DANE_EE and 3 in {r.usage for r in counting}
        )
    elif 3 in named:
        assert verdict is VerifiedBy.DANE_EE
    elif 2 in named and (flags & 2 or any(r.usage == 2 and not r.matching for r in counting)):
        assert verdict is VerifiedBy.DANE_TA or not flags & 2
    else:
        assert verdict is None
    assert matched(floor, [], now=NOW) is None


def _values(record: Tlsa, leaf: bytes, issuer: bytes) -> Mapping[int, tuple[bytes, ...]]:
    """What a record holds that names the certificate (usage 3) or the issuer (2)."""
    return {3: (_selected(record, leaf),), 2: (_selected(record, issuer),)}


def _selected(record: Tlsa, der: bytes) -> bytes:
    """As the library has it."""
    if record.selector:
        try:
            key = x509.load_der_x509_certificate(der).public_key()
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
            return b""
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    match record.matching:
        case 0:
            return der
        case 1:
            return hashlib.sha256(der).digest()
    return hashlib.sha512(der).digest()


TLSA_WORDS = [
    b"<%s%d%d>" % (whose, selector, matching)
    for whose in (b"leaf", b"issuer")
    for selector in (0, 1)
    for matching in (0, 1, 2)
]


def _filled(line: bytes, leaf: bytes, issuer: bytes) -> bytes:
    """A record in which words stand for what it is about: `<leaf11>`: SHA-256 of the leaf's key."""
    for word in TLSA_WORDS:
        if word in line:
            der = leaf if word.startswith(b"<leaf") else issuer
            record = Tlsa(0, int(word[-3:-2]), int(word[-2:-1]), b"")
            line = line.replace(word, _selected(record, der))
    return line


@cache
def certificates() -> tuple[bytes, bytes]:
    """A host's certificate and that of its issuer: the same octets in each run."""
    key, issuing_key = (ec.derive_private_key(n, ec.SECP256R1()) for n in (1, 2))
    host, issuer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (HOST, "CA")
    )

    def issue(
        subject: x509.Name, of: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> bytes:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(of.public_key())
            .serial_number(7)
            .not_valid_before(NOW - timedelta(days=9))
            .not_valid_after(NOW + timedelta(days=9))
            .add_extension(extension, critical=False)
            .sign(issuing_key, hashes.SHA256(), ecdsa_deterministic=True)
            .public_bytes(Encoding.DER)
        )

    names = x509.SubjectAlternativeName([x509.DNSName(HOST)])
    constraints = x509.BasicConstraints(ca=True, path_length=None)
    return issue(host, key, names), issue(issuer, issuing_key, constraints)
