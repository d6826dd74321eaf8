"""What the TLSA records of a mail host require, and whether a certificate matches (RFC 7672).

    record            a statement in the DNS about the host's certificate (RFC 6698)
    usable            usage DANE-TA(2) or DANE-EE(3), known selector and matching type, valid data
    DANE-EE(3)        the certificate, or its key, is the one in the record. Its names, dates and
                      issuer do not matter (RFC 7672 §3.1.1)
    DANE-TA(2)        a chain, in date, leads from the certificate to an issuer that the record
                      names, and the certificate is for the host's name (RFC 7672 §3.1.2, §3.2.2)

Usages PKIX-TA(0) and PKIX-EE(1) are unusable for mail (RFC 7672 §3.1.3). One record that matches is
enough. Of several digests with the same usage and selector only the strongest count (RFC 7671 §9),
so that a host can replace a digest algorithm that was broken.

Records are read one by one: an invalid record does not affect the others. `cryptography` verifies
chains. Pure: other modules ask the DNS and make the handshake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from hashlib import sha256, sha512

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_der_public_key
from cryptography.x509.verification import Store

from relay.mail.outcome import VerifiedBy
from relay.route.answers import (
    AddressAnswer,
    AddressLookup,
    Resolver,
    TlsaAnswer,
    TlsaLookup,
    Unanswered,
)
from relay.route.chain import UNREADABLE, is_issued, key_of, load, load_whole, readable
from relay.route.floor import DaneFloor, DaneState, Tlsa

_DANE_TA, _DANE_EE = 2, 3
_CERTIFICATE, _KEY = 0, 1
_EXACT, _SHA_256, _SHA_512 = 0, 1, 2
_DIGEST_OCTETS = {_SHA_256: 32, _SHA_512: 64}

_HEADER_OCTETS = 3
_NO_RECORD = Tlsa(255, 255, 255, b"")
"""Its usage, selector and matching type are for private use (RFC 6698 §7.2 to §7.4)."""


def base_domains(name: str, found: AddressLookup) -> tuple[str, ...]:
    """The names that may have a mail host's TLSA records, in order (RFC 7672 §2.2.2, §2.2.3).

    Empty where its addresses are not signed: the servers of some big domains fail on a TLSA query.
    For a host that is an alias, the name at the end comes first, if all aliases are signed.
    """
    if not isinstance(found, AddressAnswer) or not found.addresses:
        return ()
    if found.authenticated:
        return (found.canonical, name) if found.canonical else (name,)
    return (name,) if found.alias_authenticated else ()


async def look_up(
    resolver: Resolver,
    bases: Sequence[str],
    port: int,
    *,
    names: tuple[str, ...],
    is_enforced: bool,
) -> DaneFloor:
    """What DANE requires of a mail host. `names`: other names its certificate may have (§3.2.2)."""
    if not bases:
        state = DaneState.INSECURE if await resolver.validates() else DaneState.OFF
        return DaneFloor(state, is_enforced)
    floor = DaneFloor(DaneState.NONE, is_enforced)
    for base in bases:
        found = await resolver.tlsa(f"_{port}._tcp.{base}")
        floor = floor_of_records(found, base, names=names, is_enforced=is_enforced)
        if floor.state is not DaneState.NONE:
            break
    return floor


def floor_of_records(
    found: TlsaLookup, base: str, *, names: tuple[str, ...], is_enforced: bool
) -> DaneFloor:
    """What DANE requires after an answer about TLSA records (RFC 7672 §2.1.1, §2.1.2, §2.2)."""
    match found:
        case Unanswered():
            return DaneFloor(DaneState.FAILED, is_enforced, base, error=found.reason)
        case TlsaAnswer(records=octets) if octets and found.authenticated:
            records = tuple(map(parse_tlsa, octets))
        case _:
            return DaneFloor(DaneState.NONE, is_enforced)
    counting = usable(records)
    if not counting:
        return DaneFloor(DaneState.UNUSABLE, is_enforced, base, records=records)
    # DANE-EE ignores names; without them, domains with the same host can share connections.
    anchored = any(record.usage == _DANE_TA for record in counting)
    every = tuple(dict.fromkeys((base, *names))) if anchored else ()
    return DaneFloor(DaneState.USABLE, is_enforced, base, every, counting)


def parse_tlsa(rdata: bytes) -> Tlsa:
    """A record from its octets. Octets that are too short give an unusable record."""
    if len(rdata) < _HEADER_OCTETS:
        return _NO_RECORD
    usage, selector, matching = rdata[:_HEADER_OCTETS]
    return Tlsa(usage, selector, matching, rdata[_HEADER_OCTETS:])


def usable(records: Iterable[Tlsa]) -> tuple[Tlsa, ...]:
    """The records that count: usable, and without digests weaker than another (RFC 7671 §9)."""
    sound = [record for record in dict.fromkeys(records) if _is_usable(record)]
    strongest: dict[tuple[int, int], int] = {}
    for record in sound:
        kind = record.usage, record.selector
        strongest[kind] = max(strongest.get(kind, _EXACT), record.matching)
    return tuple(
        record
        for record in sound
        if record.matching in (_EXACT, strongest[record.usage, record.selector])
    )


def _is_usable(record: Tlsa) -> bool:
    if record.usage not in (_DANE_TA, _DANE_EE) or record.selector not in (_CERTIFICATE, _KEY):
        return False
    if record.matching == _EXACT:
        return _is_readable(record)
    return len(record.data) == _DIGEST_OCTETS.get(record.matching)


def _is_readable(record: Tlsa) -> bool:
    """Whether a record with matching type 0 holds a certificate, or a key."""
    try:
        if record.selector == _CERTIFICATE:
            load(record.data)
        else:
            load_der_public_key(record.data)
    except UNREADABLE:
        return False
    return True


def matched(floor: DaneFloor, chain: Sequence[bytes], *, now: datetime) -> VerifiedBy | None:
    """How a host's certificate matches its records; None where it does not.

    `chain`: the certificates that the host sent, in DER, its own first.
    """
    if not chain:
        return None
    if any(r.usage == _DANE_EE and _matches(r, chain[0]) for r in floor.records):
        return VerifiedBy.DANE_EE
    anchored = [record for record in floor.records if record.usage == _DANE_TA]
    if anchored and _is_anchored(anchored, chain, floor.names, now):
        return VerifiedBy.DANE_TA
    return None


def _matches(record: Tlsa, der: bytes) -> bool:
    """Whether a certificate, or its key, matches the record (RFC 6698 §2.1.3)."""
    selected = der if record.selector == _CERTIFICATE else key_of(der)
    match record.matching:
        case 0:
            return selected == record.data
        case 1:
            return sha256(selected).digest() == record.data
        case _:
            return sha512(selected).digest() == record.data


def _is_anchored(
    records: Iterable[Tlsa], chain: Sequence[bytes], names: Iterable[str], now: datetime
) -> bool:
    """Whether the first certificate is for one of the names, by an issuer that a record names."""
    try:
        leaf = load_whole(chain[0])
    except UNREADABLE:
        return False
    sent = tuple(readable(chain[1:]))
    anchors = [
        anchor
        for record in records
        for anchor in _anchors(record, (leaf, *(certificate for certificate, _ in sent)), sent, now)
        if anchor != leaf
    ]
    others = [certificate for certificate, _ in sent]
    return any(is_issued(leaf, others, Store(anchors), name, now) for name in names if anchors)


_Sent = tuple[x509.Certificate, bytes]


def _anchors(
    record: Tlsa, chain: Sequence[x509.Certificate], sent: Iterable[_Sent], now: datetime
) -> Iterator[x509.Certificate]:
    """The issuers that a record names (RFC 7671 §5.2).

    A digest finds them among the certificates of the host; a record with matching type 0 contains
    the issuer itself. If the record is about a certificate, its constraints apply; if it is about a
    key, only the key counts (RFC 7672 §3.1.2).
    """
    if record.matching == _EXACT and record.selector == _CERTIFICATE:
        yield from (certificate for certificate, _ in readable([record.data]))
    elif record.matching == _EXACT:
        key = load_der_public_key(record.data)
        for issuer in {certificate.issuer for certificate in chain}:
            yield from _bare(issuer, key, now)
    else:
        for certificate, der in sent:
            if _matches(record, der):
                if record.selector == _CERTIFICATE:
                    yield certificate
                else:
                    yield from _bare(certificate.subject, certificate.public_key(), now)


def _bare(name: x509.Name, key: object, now: datetime) -> Iterator[x509.Certificate]:
    """A certificate with this key and no other facts, because the library wants one as an anchor.

    The library does not check the signature of an anchor.
    """
    try:
        yield (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(_certificate_key(key))
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
        )
    except UNREADABLE:
        return


def _certificate_key(key: object) -> CertificatePublicKeyTypes:
    return key  # type: ignore[return-value]  # the builder refuses any other type with TypeError
