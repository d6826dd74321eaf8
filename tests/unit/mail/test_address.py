"""What is an address, and what is refused because somebody may read it as another."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.mail import address
from relay.mail.address import (
    AddressError,
    domain_of,
    in_header,
    normalise_domain,
    parse_path,
    spellings,
)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (b"<a@b.example>", "a@b.example"),
        (b"<>", ""),
        (b"<some.one+tag=x@Mail.Example.COM>", "some.one+tag=x@Mail.Example.COM"),
        (b"<#$&'*+-/=^_`{|}~@b.example>", "#$&'*+-/=^_`{|}~@b.example"),
        (b"<who?@b.example>", "who?@b.example"),
        (b'<"john smith"@b.example>', '"john smith"@b.example'),
        (b'<"a\\"b>c"@b.example>', '"a\\"b>c"@b.example'),
        (b'<""@b.example>', '""@b.example'),
        (b"<a@localhost>", "a@localhost"),
        (b"<a@b_c.example>", "a@b_c.example"),
        (b"<a@b.example.>", "a@b.example"),
        (b"<a@[192.0.2.1]>", "a@[192.0.2.1]"),
        (b"<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]"),
        (b"<@one.example,@two.example:a@b.example>", "a@b.example"),
        (b"<" + b"l" * 300 + b"@b.example>", "l" * 300 + "@b.example"),
        (b"<.a@b.example>", ".a@b.example"),
        (b"<a.@b.example>", "a.@b.example"),
        (b"<a..b@c.example>", "a..b@c.example"),
        (b"<..?.@c.example>", "..?.@c.example"),
    ],
)
def test_a_path_gives_the_address_in_it(path, text):
    assert parse_path(path, smtputf8=False) == (text, b"")
    assert parse_path(path + b"  SIZE=1 ORCPT=rfc822;A@b ", smtputf8=True) == (
        text,
        b"SIZE=1 ORCPT=rfc822;A@b",
    )


SMUGGLED = b"=?utf-8?q?a=0d=0aRCPT_TO=3a=3cv=40evil.example=3e?="


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"<",
        b">",
        b"<<>>",
        b"<a@",
        b"<\\@[ @x.example>",
        b"<a@b.example",
        b"a@b.example>",
        b"a@b.example",
        b" <a@b.example>",
        b"<a@b.example>SIZE=1",
        b"<a@b.example><c@d.example>",
        b"<a@b.example> \r\nRCPT TO:<v@evil.example>"[:13] + b"\r\n",
        b"<postmaster>",
        b"<a>",
        b"<@>",
        b"<@b.example>",
        b"<a@>",
        b'<"@">',
        b"<a@b@c.example>",
        b"<a@@b.example>",
        b"<a b@c.example>",
        b"<a @c.example>",
        b"< a@c.example>",
        b"<a@c.example >",
        b"<a(comment)@b.example>",
        b"<(comment)a@b.example>",
        b"<a@(comment)b.example>",
        b"<a@b.example(comment)>",
        b"<A Name <a@b.example>>",
        b'<"a"b@c.example>',
        b'<"a@c.example>',
        b'<"a\\"@c.example>',
        b"<a;b@c.example>",
        b"<a,b@c.example>",
        b"<a:b@c.example>",
        b"<a\\b@c.example>",
        b"<a%evil.example@b.example>",
        b"<evil.example!a@b.example>",
        b'<"a@evil.example"@b.example>',
        b'<"a\\@evil.example"@b.example>',
        b'<"a%evil.example"@b.example>',
        b'<"evil.example!a"@b.example>',
        b"<" + SMUGGLED + b"@b.example>",
        b'<"' + SMUGGLED + b'"@b.example>',
        b'<"=\\?utf-8?q?a?="@b.example>',
        b"<a@=?utf-8?q?evil.example=3e?=.b.example>",
        b"<a@-b.example>",
        b"<a@b-.example>",
        b"<a@b..example>",
        b"<a@.b.example>",
        b"<a@b.example..>",
        b"<a@.>",
        b"<a@b/c.example>",
        b"<a@192.0.2.1>",
        b"<a@2130706433>",
        b"<a@0x7f000001>",
        b"<a@[192.0.2]>",
        b"<a@[192.0.2.256]>",
        b"<a@[192.0.2.01]>",
        b"<a@[192.0.2.1>",
        b"<a@[192.0.2.1]x>",
        b"<a@[IPv6:fe80::1%eth0]>",
        b"<a@[IPv6:192.0.2.1]>",
        b"<a@[2001:db8::1]>",
        b"<a@[x400:c=de]>",
        b"<@one.example a@b.example>",
        b"<@one.example:@two.example:a@b.example>",
        b"<a@" + b"l" * 64 + b".example>",
        b"<a@" + b"l." * 126 + b"ee>",
        b"<" + b"a" * 900 + b"@b.example>",
        b"<a@" + b"b." * 160 + b"example>",
        "<é@b.example>".encode(),
        "<a@bücher.example>".encode(),
        b"<\xff@b.example>",
    ],
)
def test_invalid_address_is_refused(path):
    with pytest.raises(AddressError) as refused:
        parse_path(path, smtputf8=False)
    assert refused.value.status in {"5.1.3", "5.6.7"}
    assert str(refused.value).isascii()
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("octet", [*range(0x20), 0x7F], ids=hex)
@pytest.mark.parametrize(
    "form",
    [b"<a%cb@c.example>", b'<"a%cb"@c.example>', b'<"a\\%cb"@c.example>', b"<a@b%c.example>"],
)
def test_a_control_character_is_refused_wherever_it_stands(octet, form):
    for lenient in (False, True):
        with pytest.raises(AddressError):
            parse_path(form % octet, smtputf8=True, lenient=lenient)


@pytest.mark.parametrize("name", [b"postmaster", b"Postmaster", b"POSTMASTER"])
def test_postmaster_needs_no_domain_where_it_is_allowed(name):
    assert parse_path(b"<%s>" % name, smtputf8=False, allow_postmaster=True) == ("postmaster", b"")
    with pytest.raises(AddressError):
        parse_path(b"<%s>" % name, smtputf8=False)


@pytest.mark.parametrize(
    ("path", "text", "rest"),
    [
        (b" <a@b.example> SIZE=1", "a@b.example", b"SIZE=1"),
        (b"a@b.example", "a@b.example", b""),
        (b"  a@b.example SIZE=1", "a@b.example", b"SIZE=1"),
        (b'"a b"@c.example SIZE=1', '"a b"@c.example', b"SIZE=1"),
        (b" <>", "", b""),
        (b"< >", "", b""),
        (b"\t<a@b.example>\tSIZE=1\tBODY=7BIT", "a@b.example", b"SIZE=1\tBODY=7BIT"),
        (b"< a@b.example\t> SIZE=1", "a@b.example", b"SIZE=1"),
        (b"<<a@b.example>> SIZE=1", "a@b.example", b"SIZE=1"),
        (b'<<"a>b"@c.example>>', '"a>b"@c.example', b""),
    ],
)
def test_a_legacy_client_may_leave_out_the_brackets_and_put_in_a_space(path, text, rest):
    assert parse_path(path, smtputf8=False, lenient=True) == (text, rest)
    with pytest.raises(AddressError):
        parse_path(path, smtputf8=False)


@pytest.mark.parametrize(
    "path",
    [
        *(b"", b" ", b"<a@b.example", b"a@b.example>", b"a%x@b.example", b"a b@c.example"),
        *(
            b"a@b@c.d",
            b"<a @b.example>",
            b"<a b@c.example>",
            b"<a@b.example(c)>",
            b"<<a@b.example>",
        ),
        *(b"<a@b.example>>", b"<<<a@b.example>>>", b"<<a@b.example>c@d.example>", b"a@b.example>>"),
    ],
)
def test_lenient_parser_accepts_missing_brackets_and_white_space_at_the_ends(path):
    with pytest.raises(AddressError):
        parse_path(path, smtputf8=False, lenient=True)


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("jörg@b.example", "b.example"),
        ("用户@例え.example", "xn--r8jz45g.example"),
        ("a@bücher.example", "xn--bcher-kva.example"),
        ("a@Bücher_x.bücher.example", "xn--bcher_x-n2a.xn--bcher-kva.example"),
        ('"jörg m"@b.example', "b.example"),
        ("می‌خواهم@b.example", "b.example"),
    ],
)
def test_an_address_in_utf8_needs_smtputf8(text, domain):
    path = f"<{text}>".encode()
    with pytest.raises(AddressError) as refused:
        parse_path(path, smtputf8=False)
    assert refused.value.status == "5.6.7"
    if domain.startswith(
        "xn--bcher_x"
    ):  # an underscore in a label that needs Punycode has no A-label
        with pytest.raises(AddressError):
            parse_path(path, smtputf8=True)
        return
    assert parse_path(path, smtputf8=True) == (text, b"")
    assert domain_of(text) == domain


@pytest.mark.parametrize(
    "text",
    [
        "a\u202eb@c.example",  # the right-to-left override
        "a\u2066b@c.example",
        "a\u200bb@c.example",  # zero width space
        "a\u0085b@c.example",
        "a\u2028b@c.example",
        "a\u00a0b@c.example",
        "a\ufeffb@c.example",
        "a\ue000b@c.example",
        "a＠evil.example@c.example",  # NFKC makes it an @
        "a％evil@c.example",
        "evil！a@c.example",
        "＝？utf-8？q？a？＝@c.example",
        "a＞b@c.example",
        "a@c\u202e.example",
        "a@c\u200d.example",
    ],
)
def test_utf8_that_hides_or_turns_into_something_else_is_refused(text):
    with pytest.raises(AddressError):
        parse_path(f"<{text}>".encode(), smtputf8=True)


@pytest.mark.parametrize(
    "octets", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc3"]
)
def test_octets_that_are_no_utf8_are_refused(octets):
    with pytest.raises(AddressError):
        parse_path(b"<a" + octets + b"@b.example>", smtputf8=True)


@pytest.mark.parametrize(
    ("given_text", "normal"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("bücher。example．", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("_x.bücher.example", "_x.xn--bcher-kva.example"),
        ("ＥＸＡＭＰＬＥ.com", "example.com"),
        ("[IPV6:2001:DB8:0:0::1]", "[IPv6:2001:db8::1]"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("x" * 63 + ".example", "x" * 63 + ".example"),
    ],
)
def test_spellings_of_one_domain_are_equal(given_text, normal):
    assert normalise_domain(given_text) == normal
    assert normalise_domain(normal) == normal


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a b",
        "a..b",
        "*",
        "x" * 64,
        "ü" * 300,
        "a." * 127 + "b",
        "x" * 5000,
        "１２７.0.0.1",
    ],
)
def test_invalid_domain_is_refused(text):
    with pytest.raises(AddressError):
        normalise_domain(text)


def test_the_null_reverse_path_has_no_domain_and_an_address_must_have_one():
    assert domain_of("") == ""
    with pytest.raises(AddressError):
        domain_of("postmaster")


@pytest.mark.parametrize("local_part", [b"a", b"?"])
def test_a_path_has_at_most_900_octets_with_its_brackets(local_part):
    domain = b"b.example"
    local_part *= 900 - len(domain) - 3
    path = b"<" + local_part + b"@" + domain + b">"
    assert len(path) == 900
    assert parse_path(path, smtputf8=False) == (path[1:-1].decode(), b"")
    with pytest.raises(AddressError):
        parse_path(b"<" + local_part + b"@" + domain + b"l>", smtputf8=False)


def test_long_nonsense_is_refused_at_once():
    nasty = [
        b'<"' + b"\\" * 60001,
        b"<" + b"a." * 30000,
        b"<" + b"@a," * 20000,
        b'<"a"' * 20000,
        b"<" + b"?" * 60000 + b"@a>",
    ]
    begun = time.process_time()
    for path in nasty:
        for lenient in (False, True):
            with pytest.raises(AddressError):
                parse_path(path, smtputf8=True, lenient=lenient)
    assert time.process_time() - begun < 0.5


_WORDS = (
    b'< > @ . a b.example " \\ =? ?= % ! [ ] - 1 postmaster \r \n \0 : , ( ) \xc3\xa9 \xff _'.split(
        b" "
    )
)
_PIECES = st.lists(st.sampled_from([*_WORDS, b" "]), max_size=12).map(b"".join)
_PATHS = st.one_of(
    _PIECES, _PIECES.map(lambda inner: b"<a" + inner + b"@b.example>"), st.binary(max_size=80)
)


@given(_PATHS, st.booleans(), st.booleans())
@example(b"<a@b.example> ", False, False)
def test_an_address_that_is_accepted_can_be_sent_as_it_is(arg, smtputf8, lenient):
    try:
        text, rest = parse_path(arg, smtputf8=smtputf8, lenient=lenient)
    except AddressError:
        return
    sent = b"<%s>" % text.encode()
    assert not any(octet < 0x20 or octet == 0x7F for octet in sent)
    assert len(sent) <= 900
    assert text.isascii() or smtputf8
    assert rest == rest.strip(b" ")
    # Who reads the command next sees the same address and the same domain.
    assert parse_path(sent, smtputf8=smtputf8) == (text, b"")
    if text:
        assert text.count("@") == 1
        assert normalise_domain(domain_of(text)) == domain_of(text)


@given(_PATHS)
def test_common_form_and_full_parser_agree(arg):
    if address._COMMON_PATH.fullmatch(arg) is None:
        return
    path, rest = address._split_path(arg, lenient=False)
    try:
        slow = (address._read_address(path, smtputf8=False, allow_postmaster=False), rest)
    except AddressError:
        with pytest.raises(AddressError):
            parse_path(arg, smtputf8=False)
        return
    assert parse_path(arg, smtputf8=False) == slow


@pytest.mark.parametrize(
    ("meant", "stored"),
    [
        ("<>", ("",)),
        ("A@Example.com.", ("a@example.com",)),
        ("<a@Example.com>", ("a@example.com",)),
        ("postmaster", ("postmaster",)),
        ("a@BÜCHER.example", ("a@xn--bcher-kva.example", "a@bücher.example")),
        ("a@xn--bcher-kva.example", ("a@xn--bcher-kva.example", "a@bücher.example")),
        ("a@xn--zzzz.example", ("a@xn--zzzz.example",)),
        ("a@[IPv6:2001:DB8:0::1]", ("a@[IPv6:2001:db8::1]",)),
        ("a@b c", ("a@b c",)),
    ],
)
def test_an_operator_means_every_spelling_of_an_address(
    meant: str, stored: tuple[str, ...]
) -> None:
    assert spellings(meant) == stored


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("a.b@c.example", "a.b@c.example"),
        ("a..b@c.example", '"a..b"@c.example'),
        (".a@c.example", '".a"@c.example'),
        ("a.@c.example", '"a."@c.example'),
        ('"a b"@c.example', '"a b"@c.example'),
    ],
)
def test_dots_that_a_header_field_allows_only_in_quotes_are_quoted(
    address: str, written: str
) -> None:
    assert in_header(address) == written
