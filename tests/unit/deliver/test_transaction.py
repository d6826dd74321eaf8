"""What is said about a message, to hosts of all abilities."""

from __future__ import annotations

from dataclasses import replace

import pytest

from relay.deliver.transaction import NO_EXTENSIONS, Extensions, is_clean, prepare
from relay.mail.envelope import Notify, Ret
from tests.fakes.mail import entry

ALL = Extensions(pipelining=True, size=True, eight_bit_mime=True, smtputf8=True, dsn=True)


def lines(mail, offers, **more):
    transaction, unsendable = prepare(mail.message, mail.recipients, offers, **more)
    said = (
        (transaction.mail.decode(), [line.decode() for line in transaction.rcpts.values()])
        if transaction
        else None
    )
    return said, {index: what.status for index, what in unsendable.items()}


def test_the_ehlo_list_is_read_for_what_we_use():
    keywords = {
        "size": "1000",
        "8bitmime": "",
        "smtputf8": "",
        "dsn": "",
        "starttls": "",
        "pipelining": "",
        "x": "",
    }
    assert Extensions.offered(keywords, ["plain", "Login"]) == Extensions(
        True, True, True, 1000, True, True, True, auth=frozenset({"PLAIN", "LOGIN"})
    )
    assert Extensions.offered({}) == NO_EXTENSIONS


@pytest.mark.parametrize("limit", ["", "0", "many", "-1", "9" * 5000, "١٢"])
def test_a_size_that_is_no_limit_limits_nothing(limit):
    offers = Extensions.offered({"size": limit})
    assert (offers.size, offers.size_bytes) == (True, 0)


def test_nothing_is_asked_of_a_host_that_offers_nothing():
    mail = entry(notify=[Notify.SUCCESS], orcpt="rfc822;x", ret=Ret.FULL, envid="e")
    assert lines(mail, NO_EXTENSIONS) == (
        ("MAIL FROM:<a@sender.example>", ["RCPT TO:<bob@dest.example>"]),
        {},
    )


def test_null_reverse_path_is_sent_as_empty_brackets():
    assert lines(entry(reverse_path=""), NO_EXTENSIONS)[0][0] == "MAIL FROM:<>"


def test_dsn_parameters_go_on_as_they_were_given():
    mail = entry(
        notify=[Notify.SUCCESS, Notify.FAILURE],
        orcpt="rfc822;A+2Bb@x",
        ret=Ret.FULL,
        envid="QQ+3D",
        size_bytes=9,
    )
    assert lines(mail, ALL)[0] == (
        "MAIL FROM:<a@sender.example> SIZE=9 RET=FULL ENVID=QQ+3D",
        ["RCPT TO:<bob@dest.example> NOTIFY=FAILURE,SUCCESS ORCPT=rfc822;A+2Bb@x"],
    )


def test_a_parameter_that_could_be_another_command_is_left_out():
    mail = entry(orcpt="rfc822;a\r\nRCPT", envid="a b")
    assert lines(mail, ALL)[0][0].endswith(f" SIZE={mail.message.size_bytes}")
    assert lines(mail, ALL)[0][1] == ["RCPT TO:<bob@dest.example>"]


def test_the_size_is_compared_before_anything_is_said():
    offers = replace(ALL, size_bytes=100)
    assert lines(entry(size_bytes=100), offers)[1] == {}
    assert lines(entry(size_bytes=101), offers) == (None, {0: "5.3.4"})


def test_smtputf8_is_sent_only_where_it_is_needed():
    assert "SMTPUTF8" not in lines(entry(smtputf8=True), ALL)[0][0]
    assert "SMTPUTF8" in lines(entry("å@dest.example"), ALL)[0][0]
    assert "SMTPUTF8" in lines(entry(reverse_path="å@b.example"), ALL)[0][0]
    assert "SMTPUTF8" in lines(entry(), ALL, header_is_utf8=True)[0][0]


@pytest.mark.parametrize(
    ("address", "sayable"),
    [
        ("bob@dest.example", True),
        ("b.o'b+x=y{z}@dest.example", True),
        ('"bob b"@dest.example', True),
        ('"bob > b"@dest.example', True),
        ('"b\\"ob"@dest.example', True),
        ("bob@DEST.example", True),
        ('"b@ob"@dest.example', False),
        ('"b\\@ob"@dest.example', False),
        ('"bob@dest.example', False),
        ("bob>@dest.example", False),
        ("<bob@dest.example", False),
        ("bob bob@dest.example", False),
        ("bob@dest.example\r", False),
        ("bob\n@dest.example", False),
        ("b\x7fob@dest.example", False),
        ("bob@x@dest.example", False),
        ("bob@other.example", False),
        ("bob", False),
        ("", False),
    ],
)
def test_address_is_sent_unchanged_or_not_at_all(address, sayable):
    mail = entry()
    mail = replace(mail, recipients=(replace(mail.recipients[0], address=address),))
    said, unsendable = lines(mail, ALL)
    if sayable:
        assert said[1] == [f"RCPT TO:<{address}>"]
    else:
        assert (said, unsendable) == (None, {0: "5.1.3"})


def test_a_domain_in_another_script_is_the_same_domain():
    mail = entry("bob@bücher.example")
    assert mail.domain == "xn--bcher-kva.example"
    assert lines(mail, ALL)[0][1] == ["RCPT TO:<bob@bücher.example>"]


def test_only_recipients_that_cannot_be_named_are_left_out():
    said, unsendable = lines(
        entry("å@dest.example", "bob@dest.example"), replace(ALL, smtputf8=False)
    )
    assert said[1] == ["RCPT TO:<bob@dest.example>"]
    assert unsendable == {0: "5.6.7"}


@pytest.mark.parametrize("line", [b"NOOP\r", b"NOOP\nX", b"NO\x00OP", b"NO\x1bOP", b"NO\x7fOP"])
def test_a_line_with_a_control_character_is_not_clean(line):
    assert not is_clean(line)
    assert is_clean("RCPT TO:<å@b.example>".encode())
