"""TLSA records against certificates of every kind: which records count, and which certificate meets
them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from relay.mail.outcome import VerifiedBy
from relay.route.answers import AddressAnswer, NoSuchName, TlsaAnswer, Unanswered
from relay.route.dane import base_domains, look_up, matched, parse_tlsa, usable
from relay.route.floor import DaneFloor, DaneState, Tlsa
from tests.fakes.certificates import DAY, NOW, issue, usage
from tests.fakes.dns import FakeDns

NAME = "mx.example.net"
EE, TA = VerifiedBy.DANE_EE, VerifiedBy.DANE_TA


# --- certificates -----------------------------------------------------------------------------


ROOT = issue("Root", ca=True)
MIDDLE = issue("Middle", ROOT, ca=True)
LEAF = issue("leaf", MIDDLE, ca=False, names=[NAME])
CHAIN = (LEAF, MIDDLE, ROOT)
OTHER = issue("Other", ca=True)


def record(usage, selector, matching, issued):
    selected = issued.der if selector == 0 else issued.spki
    if matching:
        selected = hashlib.new(("sha256", "sha512")[matching - 1], selected).digest()
    return Tlsa(usage, selector, matching, selected)


def met(records, chain=CHAIN, names=(NAME,), now=NOW):
    floor = DaneFloor(DaneState.USABLE, base=NAME, names=names, records=usable(records))
    return matched(floor, [issued.der for issued in chain], now=now)


KINDS = [(selector, matching) for selector in (0, 1) for matching in (0, 1, 2)]


# --- records ----------------------------------------------------------------------------------


def test_a_record_is_read_from_its_octets():
    assert parse_tlsa(b"\x03\x01\x02" + b"d" * 64) == Tlsa(3, 1, 2, b"d" * 64)
    assert str(parse_tlsa(b"\x02\x00\x01\xab\xcd")) == "2 0 1 abcd"
    assert str(parse_tlsa(b"\x03\x01\x01")) == "3 1 1 "


@pytest.mark.parametrize("rdata", [b"", b"\x03", b"\x03\x01", b"\x03\x01\x01"])
def test_a_record_that_is_too_short_is_one_that_does_not_count(rdata):
    assert usable([parse_tlsa(rdata)]) == ()


@pytest.mark.parametrize("usage", range(6))
@pytest.mark.parametrize("selector", range(4))
@pytest.mark.parametrize("matching", range(5))
def test_usages_selectors_and_matching_types_that_count(usage, selector, matching):
    data = {0: LEAF.der if selector == 0 else LEAF.spki, 1: b"d" * 32, 2: b"d" * 64}
    record = Tlsa(usage, selector, matching, data.get(matching, b"d" * 32))
    counts = usage in (2, 3) and selector in (0, 1) and matching in (0, 1, 2)
    assert usable([record]) == ((record,) if counts else ())


@pytest.mark.parametrize(("matching", "octets"), [(1, 31), (1, 33), (1, 0), (2, 63), (2, 32)])
def test_a_digest_of_the_wrong_length_does_not_count_and_spoils_no_other_record(matching, octets):
    good = record(3, 1, 1, LEAF)
    assert usable([Tlsa(3, 1, matching, b"d" * octets), good]) == (good,)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(
    "data", [b"", b"no certificate", LEAF.der[:-1]], ids=["nothing", "no certificate", "cut short"]
)
def test_a_whole_certificate_or_key_counts_only_if_it_can_be_read(selector, data):
    assert usable([Tlsa(3, selector, 0, data)]) == ()
    assert usable([Tlsa(2, 1 - selector, 0, (LEAF.der, LEAF.spki)[selector])]) == ()


def test_only_the_strongest_digests_with_one_usage_and_selector_count():
    weak, strong = record(3, 1, 1, LEAF), record(3, 1, 2, OTHER)
    whole, elsewhere, other_usage = (
        record(3, 1, 0, ROOT),
        record(3, 0, 1, LEAF),
        record(2, 1, 1, ROOT),
    )
    everything = [weak, strong, whole, elsewhere, other_usage]
    assert usable(everything) == (strong, whole, elsewhere, other_usage)
    assert met([weak, strong]) is None
    assert met([weak]) is EE


def test_a_strong_digest_that_is_broken_does_not_hide_a_weaker_one():
    weak = record(3, 1, 1, LEAF)
    assert usable([weak, Tlsa(3, 1, 2, b"short")]) == (weak,)


def test_a_record_that_is_there_twice_counts_once():
    assert len(usable([record(3, 1, 1, LEAF)] * 3)) == 1


# --- the look-up ------------------------------------------------------------------------------

FOUND = TlsaAnswer((b"\x03\x01\x01" + b"d" * 32,), authenticated=True)
ANCHORED = TlsaAnswer((b"\x02\x01\x01" + b"d" * 32,), authenticated=True)
BROKEN = TlsaAnswer((b"\x03\x01\x01" + b"short", b""), authenticated=True)
ADDRESSES = AddressAnswer(("192.0.2.1",))


@pytest.mark.parametrize(
    ("found", "bases"),
    [
        (ADDRESSES, ()),
        (replace(ADDRESSES, authenticated=True), (NAME,)),
        (replace(ADDRESSES, authenticated=True, canonical="a.example"), ("a.example", NAME)),
        (replace(ADDRESSES, alias_authenticated=True, canonical="a.example"), (NAME,)),
        (replace(ADDRESSES, canonical="a.example"), ()),
        (AddressAnswer((), authenticated=True), ()),
        (NoSuchName(), ()),
        (Unanswered("SERVFAIL"), ()),
    ],
)
def test_records_of_a_host_are_looked_up_at_these_names(found, bases):
    assert base_domains(NAME, found) == bases


async def looked_up(bases, records, *, names=(), is_enforced=True, is_validating=True):
    dns = FakeDns(tlsa_records=records, is_validating=is_validating)
    floor = await look_up(dns, bases, 2525, names=names, is_enforced=is_enforced)
    return floor, dns.asked


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (FOUND, DaneState.USABLE),
        (BROKEN, DaneState.UNUSABLE),
        (replace(FOUND, authenticated=False), DaneState.NONE),
        (TlsaAnswer((), authenticated=True), DaneState.NONE),
        (TlsaAnswer(()), DaneState.NONE),
        (NoSuchName(), DaneState.NONE),
        (Unanswered("SERVFAIL from 127.0.0.1"), DaneState.FAILED),
    ],
)
@pytest.mark.parametrize("is_enforced", [False, True])
async def test_tlsa_answer_decides_the_state_of_the_host(answer, state, is_enforced):
    floor, asked = await looked_up([NAME], {f"_2525._tcp.{NAME}": answer}, is_enforced=is_enforced)
    assert (floor.state, floor.is_enforced) == (state, is_enforced)
    assert asked == [f"TLSA _2525._tcp.{NAME}"]
    assert floor.base == (NAME if state is not DaneState.NONE else "")
    assert floor.error == ("SERVFAIL from 127.0.0.1" if state is DaneState.FAILED else "")
    assert bool(floor.records) is (state in (DaneState.USABLE, DaneState.UNUSABLE))


@pytest.mark.parametrize("is_validating", [False, True])
async def test_records_of_a_host_with_unsigned_addresses_are_not_looked_up(is_validating):
    floor, asked = await looked_up([], {}, is_validating=is_validating)
    assert floor.state is (DaneState.INSECURE if is_validating else DaneState.OFF)
    assert asked == []


async def test_an_alias_has_its_records_at_its_end_or_else_at_its_beginning():
    end, beginning = "_2525._tcp.a.example", f"_2525._tcp.{NAME}"
    bases = ["a.example", NAME]
    floor, asked = await looked_up(bases, {end: FOUND, beginning: ANCHORED})
    assert (floor.base, len(asked)) == ("a.example", 1)
    floor, asked = await looked_up(bases, {end: NoSuchName(), beginning: FOUND})
    assert (floor.base, len(asked)) == (NAME, 2)
    floor, asked = await looked_up(bases, {end: Unanswered("x"), beginning: FOUND})
    assert (floor.state, floor.base, len(asked)) == (DaneState.FAILED, "a.example", 1)
    floor, asked = await looked_up(bases, {end: BROKEN, beginning: FOUND})
    assert (floor.state, len(asked)) == (DaneState.UNUSABLE, 1)


async def test_names_are_kept_where_they_count_so_that_domains_can_share_connections():
    name = f"_2525._tcp.{NAME}"
    floor, _ = await looked_up([NAME], {name: FOUND}, names=("example.net",))
    assert floor.names == ()
    floor, _ = await looked_up([NAME], {name: ANCHORED}, names=("example.net", NAME))
    assert floor.names == (NAME, "example.net")


# --- DANE-EE(3) -------------------------------------------------------------------------------


@pytest.mark.parametrize(("selector", "matching"), KINDS)
def test_dane_ee_is_the_certificate_itself(selector, matching):
    assert met([record(3, selector, matching, LEAF)]) is EE
    assert met([record(3, selector, matching, MIDDLE)]) is None
    assert met([record(3, selector, matching, ROOT)]) is None


def test_dane_ee_asks_for_no_name_no_date_and_no_issuer():
    expired = issue("self", names=["elsewhere.example"], begins=NOW - 9 * DAY, ends=NOW - 8 * DAY)
    assert met([record(3, 1, 1, expired)], chain=[expired]) is EE
    assert met([record(3, 0, 2, expired)], chain=[expired], names=()) is EE


def test_dane_ee_by_key_takes_any_certificate_of_that_key():
    renewed = issue("leaf", OTHER, names=[NAME], key=LEAF.key)
    assert met([record(3, 1, 1, LEAF)], chain=[renewed]) is EE
    assert met([record(3, 0, 1, LEAF)], chain=[renewed]) is None


def test_the_key_is_cut_out_of_a_certificate_that_the_library_cannot_read():
    # A serial number of no octets is not DER, and some old appliance has one.
    der = LEAF.der
    length = LEAF.certificate.serial_number.to_bytes(21, "big").lstrip(b"\0")
    at = der.index(length)
    broken = der[:at] + b"\xff" * len(length) + der[at + len(length) :]
    floor = DaneFloor(DaneState.USABLE, base=NAME, records=(record(3, 1, 1, LEAF),))
    assert matched(floor, [broken], now=NOW) is EE


def test_the_key_of_a_certificate_of_version_1_is_found_too():
    version = bytes.fromhex("a003020102")
    tbs = LEAF.certificate.tbs_certificate_bytes
    shorter = _element(0x30, tbs[tbs.index(version) + len(version) :])
    rest = LEAF.der[LEAF.der.index(tbs) + len(tbs) :]
    floor = DaneFloor(DaneState.USABLE, base=NAME, records=(record(3, 1, 1, LEAF),))
    assert matched(floor, [_element(0x30, shorter + rest)], now=NOW) is EE


def _element(tag, content):
    return bytes((tag, 0x82)) + len(content).to_bytes(2, "big") + content


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x82\xff\xff", b"\x30\x80", b"\x02\x01\x01"])
@pytest.mark.parametrize("usage", [2, 3])
def test_nonsense_in_place_of_a_certificate_meets_nothing(usage, der):
    floor = DaneFloor(
        DaneState.USABLE, base=NAME, names=(NAME,), records=(record(usage, 1, 1, LEAF),)
    )
    assert matched(floor, [der], now=NOW) is None
    assert matched(floor, [der, LEAF.der], now=NOW) is None
    assert matched(floor, [], now=NOW) is None


# --- DANE-TA(2) -------------------------------------------------------------------------------


@pytest.mark.parametrize(("selector", "matching"), KINDS)
@pytest.mark.parametrize("anchor", [MIDDLE, ROOT])
def test_dane_ta_is_an_issuer_above_the_certificate(selector, matching, anchor):
    assert met([record(2, selector, matching, anchor)]) is TA
    assert met([record(2, selector, matching, OTHER)]) is None


@pytest.mark.parametrize(("selector", "matching"), KINDS)
def test_dane_ta_is_never_the_certificate_itself(selector, matching):
    assert met([record(2, selector, matching, LEAF)]) is None
    alone = issue("alone", names=[NAME], ca=True)
    # A whole key is an anchor without a certificate: this one has signed, its own certificate too.
    whole_key = (selector, matching) == (1, 0)
    assert met([record(2, selector, matching, alone)], chain=[alone]) is (TA if whole_key else None)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("matching", [1, 2])
def test_a_digest_finds_only_what_the_host_sent(selector, matching):
    assert met([record(2, selector, matching, ROOT)], chain=[LEAF, MIDDLE]) is None


@pytest.mark.parametrize("selector", [0, 1])
def test_a_whole_anchor_need_not_be_sent(selector):
    assert met([record(2, selector, 0, ROOT)], chain=[LEAF, MIDDLE]) is TA
    assert met([record(2, selector, 0, MIDDLE)], chain=[LEAF]) is TA


def test_a_chain_with_a_gap_leads_nowhere():
    assert met([record(2, 0, 1, ROOT)], chain=[LEAF, ROOT]) is None


def test_the_order_of_the_chain_does_not_matter():
    assert met([record(2, 0, 1, ROOT)], chain=[LEAF, ROOT, OTHER, MIDDLE]) is TA


def test_an_anchor_that_only_has_the_issuers_name_has_issued_nothing():
    namesake = issue("Middle", ca=True)
    assert met([record(2, 0, 1, namesake)], chain=[LEAF, namesake]) is None
    assert met([record(2, 1, 0, namesake)], chain=[LEAF, namesake]) is None


@pytest.mark.parametrize(
    ("san", "names", "good"),
    [
        ([NAME], (NAME,), True),
        ([NAME.upper()], (NAME,), True),
        (["elsewhere.example"], (NAME,), False),
        (["example.net"], (NAME, "example.net"), True),
        (["*.example.net"], (NAME,), True),
        (["*.net"], (NAME,), False),
        (["*.example.net"], ("a.mx.example.net",), False),
        ([], (NAME,), False),
        ([NAME], (), False),
        ([NAME], ("not a name", NAME), True),
    ],
)
def test_dane_ta_asks_for_one_of_the_names(san, names, good):
    leaf = issue("leaf", MIDDLE, ca=False, names=san or None)
    chain = [leaf, MIDDLE, ROOT]
    assert met([record(2, 0, 1, ROOT)], chain=chain, names=names) is (TA if good else None)


def test_the_common_name_is_no_name():
    leaf = issue(NAME, MIDDLE, ca=False)
    assert met([record(2, 0, 1, ROOT)], chain=[leaf, MIDDLE, ROOT]) is None


@pytest.mark.parametrize("days", [-2, 2])
def test_dane_ta_asks_for_certificates_in_date(days):
    assert met([record(2, 0, 1, ROOT)], now=NOW + days * DAY) is None


def test_dates_of_an_anchor_count_if_it_is_known_as_certificate_and_not_by_its_key():
    old = issue("Old", ca=True, begins=NOW - 9 * DAY, ends=NOW - 8 * DAY)
    leaf = issue("leaf", old, ca=False, names=[NAME])
    assert met([record(2, 1, 1, old)], chain=[leaf, old]) is TA
    assert met([record(2, 0, 1, old)], chain=[leaf, old]) is None


def test_the_constraints_of_an_anchor_known_as_certificate_hold():
    only = x509.NameConstraints([x509.DNSName("example.org")], None)
    narrow = issue("Narrow", ca=True, constraints=only)
    leaf = issue("leaf", narrow, ca=False, names=[NAME])
    assert met([record(2, 0, 1, narrow)], chain=[leaf, narrow]) is None
    assert met([record(2, 1, 1, narrow)], chain=[leaf, narrow]) is TA
    middle = issue("Below", narrow, ca=True)
    below = issue("leaf", middle, ca=False, names=[NAME])
    assert met([record(2, 0, 1, narrow)], chain=[below, middle, narrow]) is None


def test_the_constraints_of_certificates_below_the_anchor_hold():
    only = x509.NameConstraints([x509.DNSName("example.org")], None)
    narrow = issue("Narrow", ROOT, ca=True, constraints=only)
    leaf = issue("leaf", narrow, ca=False, names=[NAME])
    assert met([record(2, 1, 1, ROOT)], chain=[leaf, narrow, ROOT]) is None
    short = issue("Short", ROOT, ca=True, path_length=0)
    middle = issue("Below", short, ca=True)
    below = issue("leaf", middle, ca=False, names=[NAME])
    assert met([record(2, 1, 1, ROOT)], chain=[below, middle, short, ROOT]) is None


@pytest.mark.parametrize("ca", [False, None])
def test_a_certificate_that_is_no_authority_issues_nothing(ca):
    host = issue("another host", ROOT, ca=ca, names=["other.example"])
    forged = issue("leaf", host, ca=False, names=[NAME])
    assert met([record(2, 0, 1, ROOT)], chain=[forged, host, ROOT]) is None


def test_a_key_that_may_not_sign_certificates_issues_nothing():
    signs_mail = usage(digital_signature=True)
    other = issue("Signs mail only", ROOT, ca=True, key_usage=signs_mail)
    leaf = issue("leaf", other, ca=False, names=[NAME])
    assert met([record(2, 0, 1, ROOT)], chain=[leaf, other, ROOT]) is None


@pytest.mark.parametrize(
    ("use", "good"),
    [
        (ExtendedKeyUsageOID.SERVER_AUTH, True),
        (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, True),
        (ExtendedKeyUsageOID.CODE_SIGNING, False),
    ],
)
def test_a_certificate_for_other_uses_is_not_for_a_server(use, good):
    leaf = issue("leaf", MIDDLE, ca=False, names=[NAME], uses=[use])
    assert met([record(2, 0, 1, ROOT)], chain=[leaf, MIDDLE, ROOT]) is (TA if good else None)


def test_a_certificate_in_the_chain_that_cannot_be_read_is_passed_over():
    floor = DaneFloor(
        DaneState.USABLE, base=NAME, names=(NAME,), records=(record(2, 0, 1, MIDDLE),)
    )
    assert matched(floor, [LEAF.der, b"nonsense", MIDDLE.der], now=NOW) is TA


def broken(issued, part):
    """A certificate one part of which `cryptography` cannot read, as some hosts send them."""
    names = issued.certificate.subject.public_bytes()
    before, after = {
        "version": (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x60"),
        "subject": (names, names.replace(b"\x0c", b"\x0b")),
        "key": (b"\x2a\x86\x48\xce\x3d\x02\x01", b"\x2a\x81\x48\xce\x3d\x02\x01"),
    }[part]
    assert before in issued.der
    return issued.der.replace(before, after)


@pytest.mark.parametrize("part", ["version", "subject", "key"])
def test_a_certificate_of_which_a_part_cannot_be_read_meets_no_record_about_issuers(part):
    bad = broken(MIDDLE, part)
    digest = Tlsa(2, 0, 1, hashlib.sha256(bad).digest())
    itself, key = Tlsa(2, 0, 0, bad), Tlsa(2, 1, 1, hashlib.sha256(MIDDLE.spki).digest())
    known = usable([digest, itself, key])
    floor = DaneFloor(DaneState.USABLE, base=NAME, names=(NAME,), records=known)
    assert matched(floor, [LEAF.der, bad], now=NOW) is None
    assert matched(floor, [broken(LEAF, part), MIDDLE.der], now=NOW) is None
    assert matched(floor, [LEAF.der, bad, MIDDLE.der], now=NOW) is TA


@pytest.mark.parametrize("part", ["version", "subject", "key"])
def test_a_certificate_of_which_a_part_cannot_be_read_meets_a_record_about_itself(part):
    bad = broken(LEAF, part)
    [record_of_it] = usable([Tlsa(3, 0, 1, hashlib.sha256(bad).digest())])
    floor = DaneFloor(DaneState.USABLE, base=NAME, names=(NAME,), records=(record_of_it,))
    assert matched(floor, [bad], now=NOW) is EE


# --- both -------------------------------------------------------------------------------------


def test_one_record_that_matches_is_enough_of_either_usage():
    wrong_ee, wrong_ta = record(3, 1, 1, OTHER), record(2, 0, 1, OTHER)
    assert met([wrong_ee, record(2, 0, 1, ROOT), wrong_ta]) is TA
    assert met([wrong_ta, wrong_ee, record(3, 0, 1, LEAF)]) is EE
    assert met([record(2, 0, 1, ROOT), record(3, 0, 1, LEAF)]) is EE
    assert met([wrong_ee, wrong_ta]) is None
