"""What a message may say about its own security, and in which words."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.section import HeaderSection, Sections
from relay.policy.fields import (
    NO_WISHES,
    BadField,
    Wishes,
    asks_for_no_tls,
    refuse_fields_in_body,
    refuse_folded,
    tls_wishes,
)
from relay.policy.fields import read_wishes as wishes_of_section
from tests.fakes.fields import iter_fields
from tests.fakes.growth import grows_linearly

YES = [b"true", b"yes", b"1", b"on"]
NO = [b"false", b"no", b"0", b"off"]
NAMES = [
    b"X-Require-TLS",
    b"X-Mailgun-Require-TLS",
    b"X-Skip-Verification",
    b"X-Mailgun-Skip-Verification",
]
POLICY_FIELDS = {name.lower() for name in NAMES}


def read_wishes(header: bytes) -> Wishes:
    return wishes_of_section(HeaderSection(header))


def strip_policy_fields(header: bytes) -> bytes:
    return HeaderSection(header).without()


def wish_of(name: bytes, value: bool) -> Wishes:
    return Wishes(require_tls=value) if b"Require" in name else Wishes(skip_verification=value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "value"), [(YES, True), (NO, False)])
def test_each_field_takes_each_word_in_any_case_with_white_space_and_folds_around_it(
    name, words, value
):
    for word in words:
        for spelling in (word, word.upper(), word.title()):
            for form in (
                b"%s: %s\r\n",
                b"%s:%s\r\n",
                b"%s: \t %s \t\r\n",
                b"%s:\r\n %s\r\n",
                b"%s: \r\n\t%s\r\n \r\n",
            ):
                header = b"From: a@b.example\r\n" + form % (name, spelling)
                assert read_wishes(header) == wish_of(name, value)
                assert read_wishes(header.swapcase()) == wish_of(name, value)


def test_a_message_without_the_fields_wishes_nothing():
    assert read_wishes(b"From: a@b.example\r\nSubject: x\r\n") == NO_WISHES
    assert read_wishes(b"") == NO_WISHES


UNKNOWN = [b"", b" ", b"maybe", b"y", b"2", b"true;", b"yes no", b"yes (really)", b'"yes"', b"\r\n"]
UNKNOWN += [b"y\r\n es", b"=?utf-8?q?yes?=", b"yes\0", b"yes\r", b"\nyes", b"\xa0yes", b"\x0byes"]
UNKNOWN += ["ｙｅｓ".encode()]


@pytest.mark.parametrize("value", UNKNOWN)
@pytest.mark.parametrize("name", NAMES)
def test_unknown_value_is_refused_with_the_name_of_its_field(name, value):
    with pytest.raises(BadField) as refused:
        read_wishes(name + b": " + value + b"\r\n")
    assert refused.value.field == name.decode()


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_two_fields_of_one_setting_must_agree(first, second):
    same_setting = (b"Require" in first) == (b"Require" in second)
    agreeing = b"%s: yes\r\nSubject: x\r\n%s: ON\r\n" % (first, second)
    contradicting = b"%s: yes\r\nSubject: x\r\n%s: off\r\n" % (first, second)
    if not same_setting:
        assert read_wishes(agreeing) == Wishes(require_tls=True, skip_verification=True)
        assert read_wishes(contradicting) != NO_WISHES
        return
    assert read_wishes(agreeing) == wish_of(first, True)
    with pytest.raises(BadField, match="contradicts") as refused:
        read_wishes(contradicting)
    assert refused.value.field == second.decode()
    assert refused.value.value == "off"


def test_refusal_quotes_short_printable_text_on_one_line():
    with pytest.raises(BadField) as refused:
        read_wishes(b'X-Require-TLS: \x1b]"\r\n \xe9\0\n550 no' + b"x" * 5000 + b"\r\n")
    text = str(refused.value)
    assert text.startswith("X-Require-TLS: \"\\x1b]' \\xe9\\x00\\n550 nox")
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 350


@pytest.mark.parametrize(
    "header",
    [
        b"Subject: hi\rX-Skip-Verification: yes\r\n",
        b"Subject: hi\nX-Skip-Verification: yes\r\n",
        b"Subject: hi\n\nX-Skip-Verification: yes\r\n",
        b"Subject: hi\r\n X-Skip-Verification: yes\r\n",
        b"Subject: hi\r\n\tX-Skip-Verification: yes\r\n",
        b"Subject: hi\0X-Skip-Verification: yes\r\n",
        b"Subject: hi\x85X-Skip-Verification: yes\r\n",
        b"X-Skip-Verification\r\n : yes\r\n",
        b"XX-Skip-Verification: yes\r\n",
        b"X-Skip-Verification-Not: yes\r\n",
    ],
)
def test_line_that_only_looks_like_a_field_stays(header):
    assert read_wishes(header) == NO_WISHES
    assert strip_policy_fields(header) == header


def test_all_four_fields_are_taken_out_and_nothing_else():
    kept = b"From: a@b.example\r\nSubject:  X-Require-TLS: yes\r\n\tx\r\nX-Require-TLSX: 1\r\n"
    header = (
        b"".join(b"%s:\r\n yes\r\n" % name for name in NAMES)
        + kept
        + b"x-mailgun-REQUIRE-tls: no\r\n"
    )
    assert strip_policy_fields(header) == kept
    assert strip_policy_fields(kept) is kept


_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"%s: %s\r\n" % (name, word) for name in NAMES for word in (b"yes", b"\r\n no ", b"?")]
        ),
        st.lists(
            st.sampled_from(
                [*NAMES, b":", b" ", b"\r", b"\n", b"yes", b"\r\n", b"Subject", b"\xff"]
            ),
            max_size=6,
        ).map(b"".join),
    ),
    max_size=8,
).map(b"".join)


@pytest.mark.parametrize("value", [b"yes", b"no"])
@pytest.mark.parametrize(
    "name",
    [
        b"X-Require-TLS ", b"X-Require-TLS\t", b"X_Require_TLS", b"X-RequireTLS", b"X-Require-TLS-",
        b"X-Skip-Verification ", b"x_mailgun_skip_verification", b"X-Require-TLS\xa0",
        b"X-Require-TLS\xe2\x80\x8b", b"X--Require-TLS", b"X-Require------TLS", b"X-Re-quire-TLS",
        b"X-Requ1re-TLS", b"0X-Requ1re-TLS", b"5$X-Mai1gun-Require-TLS", b"X-Require-TL5",
        b"X-Sk!p-Verificati0n", b"X-Require-TLS2",
    ],
)  # fmt: skip
def test_a_name_that_is_nearly_a_policy_field_is_refused_by_name(name, value):
    with pytest.raises(BadField, match="write its name X-"):
        read_wishes(b"From: a@b.example\r\n" + name + b": " + value + b"\r\nSubject: x\r\n")


@pytest.mark.parametrize(
    "lines",
    [
        b"garbage\r\nX-Require-TLS: yes\r\n", b"0 X-Sk1p-Verification: no\r\n",
        b"\xef\xbb\xbfX-Require-TLS: yes\r\n",
        b" X-Require-TLS: yes\r\n", b"X-Skip-Verification: no\r\n", b"X-Require-TLS: what\r\n",
        b"X-Require-TLS\r\n : yes\r\n", b"X-Require-TLS\xa0: yes\r\n", b"X-Require-TLS yes\r\n",
        b"X-\r\n Require-TLS: yes\r\n", b"text\r\nX-Requ\r\n\tire-\r\n TLS: yes\r\n",
        "X-Rеquire-TLS: yes\r\n".encode(), "X-Require-TLЅ: yes\r\n".encode(),
        "ｘ－Ｒｅｑｕｉｒｅ－ＴＬＳ: yes\r\n".encode(), "X-Re\u00adquire-TLS: yes\r\n".encode(),
        "X-\u200bRequire-TLS: yes\r\n".encode(), "X-Require-TLS： yes\r\n".encode(),
        "X-S\u212aip-Verification: no\r\n".encode(), "X-Réquire-TLS: yes\r\n".encode(),
        "Χ-Μailgun-ſkip-Verification: no\r\n".encode(), "X–Require–TLS: yes\r\n".encode(),
    ],
)  # fmt: skip
def test_a_wish_for_more_security_behind_the_header_section_is_refused(lines):
    with pytest.raises(BadField, match="behind a line that is no header field"):
        refuse_fields_in_body(lines)


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Hello,\r\nX-Require-TLS: no\r\n",
        b"X-Skip-Verification: yes\r\n",
        b"I require TLS\r\n",
        "X-Rеquire-TLS: no\r\n".encode(),
        "Хорошо: x\r\n Требуется TLS\r\n".encode(),
    ],
)
def test_body_line_that_would_weaken_the_rule_is_not_refused(lines):
    refuse_fields_in_body(lines)  # raises BadField where a line is refused


@pytest.mark.parametrize("fold", [b" ", b"\t", b" \t ", b" \r\n "])
@pytest.mark.parametrize(
    "line", [b"X-Require-TLS: yes", b"x-skip-verification : NO ", b"X-Mailgun-Drop-Message: yes"]
)
def test_a_wish_that_white_space_makes_a_part_of_another_field_is_refused(line, fold):
    header = b"Subject: x\r\n" + fold + line + b"\r\nTo: b@x.example\r\n"
    with pytest.raises(BadField, match="white space before its name"):
        refuse_folded(header)
    refuse_folded(header.replace(fold + line, b"DKIM-Signature: h=from:" + line))
    refuse_folded(header.replace(line, b"from:X-Require-TLS:X-Skip-Verification:"))
    refuse_folded(header.replace(line, b"X-Require-TLS: no"))


@given(_LINES)
def test_message_after_stripping_wishes_nothing_and_has_lost_nothing_else(header):
    stripped = strip_policy_fields(header)
    with suppress(BadField):  # a name that is nearly one of the four
        assert read_wishes(stripped) == NO_WISHES
    kept = [field.raw for field in iter_fields(header) if field.name.lower() not in POLICY_FIELDS]
    assert stripped == b"".join(kept)


@given(_LINES)
def test_a_wish_is_read_or_refused_but_never_overlooked(header):
    asked = {field.name.lower() for field in iter_fields(header)} & POLICY_FIELDS
    try:
        wishes = read_wishes(header)
    except BadField:
        nearly = {re.sub(rb"[^a-z]", b"", field.name.lower()) for field in iter_fields(header)}
        assert asked or nearly & {name.lower().replace(b"-", b"") for name in NAMES}
        return
    assert (wishes == NO_WISHES) == (not asked)


@pytest.mark.parametrize(
    "filler",
    [
        b"a:\r\n",
        b"S: x\r\n require-tls\r\n",
        b"X-Require-TLS: yes\r\n",
        b"S: require-tls\r\n",
        b"x:\r\n",
        b"to:\r\n",
        b"X-Requir: yes\r\n",
        b"X" + b"-" * 90 + b":\r\n",
    ],
)
def test_a_header_section_of_a_megabyte_with_a_policy_field_is_read_in_linear_time(filler):
    def read(octets: int) -> None:
        header = filler * (octets // len(filler)) + b"X-Require-TLS: yes\r\n"
        assert read_wishes(header) == Wishes(require_tls=True)
        assert b"X-Require" not in strip_policy_fields(header)

    assert grows_linearly(read, 100_000)


@pytest.mark.parametrize(
    "filler",
    [
        "x\r\n",
        "x-\r\n -\r\n",
        "ж\r\n",
        "х" * 50 + "\r\n",
        "X-Require-TL\r\n -",
        "X-Require-TLS: no\r\n",
        "X-Rеquire-TLS: no\r\n",
        " \r\n",
        "-",
    ],
)
def test_a_megabyte_behind_the_header_section_is_looked_at_in_linear_time(filler):
    octets = filler.encode()
    assert grows_linearly(
        lambda size: refuse_fields_in_body(octets * (size // len(octets))), 100_000
    )


# Hypothesis takes strings from the source, too: without "-" no name of a field is among them.
_ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n-"), max_size=60)


@given(
    st.lists(_ANY_TEXT, max_size=8),
    st.sampled_from(["", "Grüße, ", "Уважаемый ", "こんにちは", "x "]),
)
def test_no_text_in_any_script_is_taken_for_a_policy_field(lines, greeting):
    text = "\r\n".join(greeting + line for line in lines)
    refuse_fields_in_body(text.encode())
    header = b"".join(b"Subject: %s\r\n" % (greeting + line).encode() for line in lines)
    assert read_wishes(header) == NO_WISHES


_SPELLINGS = {
    "e": "eEеЕ\uff45é",
    "i": "iIіІ1!",
    "r": "rRгｒ",
    "s": "sSſѕ5$",
    "l": "lLⅼ1",
    "x": "xXхΧ",
}
_BETWEEN = st.sampled_from(
    ["", "", "-", "_", " ", "\u200b", "\u00ad", "\r\n ", "----", "‑", "\u0301"]
)


@given(st.data(), st.sampled_from(NAMES), st.booleans())
def test_a_name_that_a_person_reads_as_a_policy_field_is_obeyed_or_refused(data, name, tightens):
    letters = name.replace(b"-", b"").decode().lower()
    written = "".join(
        data.draw(st.sampled_from(_SPELLINGS.get(c, c + c.upper()))) + data.draw(_BETWEEN)
        for c in letters
    )
    value = "yes" if ("require" in letters) is tightens else "no"
    content = f"From: a@b.example\r\n{written}: {value}\r\n\r\nx\r\n".encode()
    sections = Sections.of(content)
    try:
        wishes = read_wishes(sections.header)
        refuse_fields_in_body(sections.behind)
    except BadField:
        return
    assert wishes != NO_WISHES or not tightens


@pytest.mark.parametrize(
    ("header", "asked"),
    [
        (b"TLS-Required: No\r\n", True),
        (b"tls-required:\r\n nO \r\n", True),
        (b"TLS-Required: yes\r\n", False),
        (b"TLS-Required: no, really\r\n", False),
        (b"TLS-Required: no\r\nSubject: x\r\nTLS-Required: no\r\n", False),
        (b"X-TLS-Required: no\r\n", False),
        (b"Subject: x\r\n", False),
    ],
)
def test_tls_required_no_is_one_field_that_says_no_and_nothing_else(header: bytes, asked: bool):
    section = HeaderSection(header)
    assert asks_for_no_tls(section) is asked
    assert section.without() == header  # it is passed on as it came


@pytest.mark.parametrize("require", [None, True, False])
@pytest.mark.parametrize("skip", [None, True, False])
def test_requiretls_beats_every_field_and_a_wish_for_tls_beats_tls_required_no(require, skip):
    wishes = Wishes(require, skip)
    strictest = Wishes(require_tls=True, skip_verification=False)
    for says_no in (True, False):
        assert tls_wishes(wishes, requiretls=True, says_no=says_no) == (strictest, False)
    assert tls_wishes(wishes, requiretls=False, says_no=False) == (wishes, False)
    with_no = (wishes, False) if require else (Wishes(False, skip), True)
    assert tls_wishes(wishes, requiretls=False, says_no=True) == with_no
