"""What the TLSA records of a mail host ask for, and whether a certificate meets them (RFC 7672).

    record            DNS-based statement about the host's certificate (RFC 6698)
    usable            usage DANE-TA(2) or DANE-EE(3), selector and matching type known, data sound
    DANE-EE(3)        the certificate, or its key, is the one in the record. Its names, dates and
                      issuer do not matter (RFC 7672 §3.1.1)
    DANE-TA(2)        a chain, in date, leads from the certificate to an issuer that the record
                      names, and the certificate is for the host's name (RFC 7672 §3.1.2, §3.2.2)

Usages PKIX-TA(0) and PKIX-EE(1) are unusable for mail (RFC 7672 §3.1.3). One record that matches is
enough. Of digests with one usage and one selector only the strongest count (RFC 7671 §9), so that
a host can leave a digest that was broken.

Records are read one by one: a record that makes no sense does not spoil its neighbours. Chains
are verified by `cryptography`. Pure: who asks the DNS, and who shakes hands, is elsewhere.
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
from relay.route.chain import UNREADABLE, is_issued, load, load_whole, readable
from relay.route.floor import DaneFloor, DaneState, Tlsa

__all__ = ["base_domains", "floor_of_records", "look_up", "matched", "parse_tlsa", "usable"]

_DANE_TA, _DANE_EE = 2, 3
_CERTIFICATE, _KEY = 0, 1
_EXACT, _SHA_256, _SHA_512 = 0, 1, 2
_DIGEST_OCTETS = {_SHA_256: 32, _SHA_512: 64}

_HEADER_OCTETS = 3
_NO_RECORD = Tlsa(255, 255, 255, b"")
"""Usage, selector and matching type are those of private use (RFC 6698 §7.2), which mail has none
of.
"""


def base_domains(name: str, found: AddressLookup) -> tuple[str, ...]:
    """Where a mail host's TLSA records may be, in the order to ask (RFC 7672 §2.2.2, §2.2.3).

    None where its addresses are not signed: the servers of some big domains fail on a TLSA query.
    Of a host that is an alias: the name at its end first, where the whole way is signed.
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
    """What DANE asks of a mail host. `names`: whose certificate it may have besides its own
    (§3.2.2).
    """
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
    """What an answer about the TLSA records of a base domain asks for (RFC 7672 §2.1.1, §2.1.2,
    §2.2).
    """
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
    # Names are of no account to DANE-EE, and domains with a host in common may share connections.
    anchored = any(record.usage == _DANE_TA for record in counting)
    every = tuple(dict.fromkeys((base, *names))) if anchored else ()
    return DaneFloor(DaneState.USABLE, is_enforced, base, every, counting)


def parse_tlsa(rdata: bytes) -> Tlsa:
    """A record from its octets. What is too short for one is a record that nobody can use."""
    if len(rdata) < _HEADER_OCTETS:
        return _NO_RECORD
    usage, selector, matching = rdata[:_HEADER_OCTETS]
    return Tlsa(usage, selector, matching, rdata[_HEADER_OCTETS:])


def usable(records: Iterable[Tlsa]) -> tuple[Tlsa, ...]:
    """The records that count: usable, and not of a digest weaker than another (RFC 7671 §9)."""
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
    """How a host's certificate meets its records; None where it does not.

    `chain`: what the host sent, in DER, its own certificate first.
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
    """Whether a certificate, or its key, is what the record says (RFC 6698 §2.1.3)."""
    selected = der if record.selector == _CERTIFICATE else _key_of(der)
    match record.matching:
        case 0:
            return selected == record.data
        case 1:
            return sha256(selected).digest() == record.data
        case _:
            return sha512(selected).digest() == record.data


def _key_of(der: bytes) -> bytes:
    """The SubjectPublicKeyInfo of a certificate, octet for octet; b"" where there is none.

    It is cut out and not decoded: DANE-EE asks nothing of a certificate but to be the same, so a
    certificate that `cryptography` would refuse has its key all the same.
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

    A digest finds them among what the host sent; with matching type 0 the record brings its own.
    Of a record about a certificate the anchor's own constraints hold; one about a key says nothing
    but the key (RFC 7672 §3.1.2).
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
    """A key as the library wants an anchor: a certificate of it that says nothing else.

    Its signature is of no meaning, and never looked at: it is an anchor.
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
    return key  # type: ignore[return-value]  # what else it may be, the builder refuses: TypeError
