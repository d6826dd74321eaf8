"""What is wrong with a chain of certificates, found without a handshake: as OpenSSL would say."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from relay.mail.outcome import PolicyResult
from relay.route.chain import fault_of, readable, store_of
from relay.sandbox.certificates import Authority, Kind
from tests.fakes.certificates import NOW, issue, usage

NAME = "mx.dest.example"
AUTHORITY = Authority()
ROOTS = store_of([x509.load_pem_x509_certificate(AUTHORITY.ca_pem).public_bytes(Encoding.DER)])


def shown(kind: Kind) -> list[bytes]:
    chain = x509.load_pem_x509_certificates(AUTHORITY.leaf(NAME, kind).chain_pem)
    return [certificate.public_bytes(Encoding.DER) for certificate in chain]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Kind.GOOD, None),
        (Kind.WILDCARD, None),
        (Kind.WRONG_NAME, PolicyResult.HOST_MISMATCH),
        (Kind.WILDCARD_TWO_LABELS, PolicyResult.HOST_MISMATCH),
        (Kind.EXPIRED, PolicyResult.EXPIRED),
        (Kind.NOT_YET_VALID, PolicyResult.NOT_TRUSTED),
        (Kind.SELF_SIGNED, PolicyResult.NOT_TRUSTED),
        (Kind.UNKNOWN_CA, PolicyResult.NOT_TRUSTED),
        (Kind.MISSING_INTERMEDIATE, PolicyResult.NOT_TRUSTED),
    ],
)
def test_fault_of_a_certificate_is_named_as_tls_reports_name_it(kind: Kind, fault):
    assert fault_of(shown(kind), ROOTS, NAME, now=datetime.now(UTC)) is fault


@pytest.mark.parametrize("chain", [[], [b""], [b"\x30\x00"], [b"nonsense"]])
def test_a_chain_that_cannot_be_read_is_not_trusted(chain: list[bytes]):
    fault = fault_of(chain, ROOTS, NAME, now=datetime.now(UTC))
    assert fault is PolicyResult.NOT_TRUSTED


def test_certificate_without_a_root_or_a_name_is_not_valid():
    good, now = shown(Kind.GOOD), datetime.now(UTC)
    assert store_of([b"nonsense"]) is None
    assert fault_of(good, None, NAME, now=now) is PolicyResult.NOT_TRUSTED
    assert fault_of(good, ROOTS, None, now=now) is PolicyResult.HOST_MISMATCH


def test_a_certificate_that_makes_no_sense_does_not_spoil_its_neighbours():
    good = shown(Kind.GOOD)
    assert [der for _, der in readable([b"x", *good, b""])] == good
    assert fault_of([*good, b"x"], ROOTS, NAME, now=datetime.now(UTC)) is None


# --- who may issue, and for what ------------------------------------------------------------------

_SERVER, _ANY = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
_CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
_ROOT = issue("Root", ca=True)
_TRUSTED = store_of([_ROOT.der])


def _fault(*chain):
    return fault_of([issued.der for issued in chain], _TRUSTED, NAME, now=NOW)


@pytest.mark.parametrize(
    ("issuer", "fault"),
    [
        ({"ca": True}, None),
        ({"ca": True, "key_usage": usage(key_cert_sign=True)}, None),
        ({"ca": True, "key_usage": usage(digital_signature=True)}, PolicyResult.NOT_TRUSTED),
        ({"ca": True, "uses": [_SERVER]}, None),
        ({"ca": True, "uses": [_CLIENT]}, PolicyResult.NOT_TRUSTED),
        ({"ca": False}, PolicyResult.NOT_TRUSTED),
        ({}, PolicyResult.NOT_TRUSTED),
    ],
)
def test_intermediate_authority_counts_where_its_certificate_lets_it_sign(issuer, fault):
    middle = issue("Middle", _ROOT, **issuer)
    leaf = issue("leaf", middle, ca=False, names=[NAME])
    assert _fault(leaf, middle) is fault
    assert _fault(leaf) is PolicyResult.NOT_TRUSTED


@pytest.mark.parametrize(
    ("uses", "fault"),
    [
        (None, None),
        ([_SERVER], None),
        ([_ANY], None),
        ([_CLIENT, _SERVER], None),
        ([_CLIENT], PolicyResult.NOT_TRUSTED),
    ],
)
def test_certificate_for_other_uses_than_a_server_is_not_trusted(uses, fault):
    assert _fault(issue("leaf", _ROOT, ca=False, names=[NAME], uses=uses)) is fault
