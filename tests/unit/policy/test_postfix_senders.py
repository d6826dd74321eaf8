"""What a line of a Postfix table that chooses a next hop by sender becomes."""

from __future__ import annotations

import pytest

from relay.policy.postfix_remarks import Difference
from relay.policy.postfix_senders import ImportedSender, SenderHop, by_pattern, imported_senders


def only(line: str, *, transport: bool = False) -> ImportedSender:
    [found] = imported_senders(line, has_transports=transport)
    return found


@pytest.mark.parametrize(
    ("line", "pattern", "hop"),
    [
        (
            "@example.com [smtp.example.net]:587",
            "example.com",
            SenderHop(("smtp.example.net",), 587),
        ),
        ("Bot@Example.com [a.example]", "bot@example.com", SenderHop(("a.example",))),
        ("@example.com [a.example]:submission", "example.com", SenderHop(("a.example",), 587)),
        ("@example.com [192.0.2.1]:26", "example.com", SenderHop(("192.0.2.1",), 26)),
        ("@example.com [2001:db8::1]", "example.com", SenderHop(("2001:db8::1",))),
        (
            "@example.com [a.example], [b.example]",
            "example.com",
            SenderHop(("a.example", "b.example")),
        ),
    ],
)
def test_relay_host_of_a_sender_is_a_next_hop(line: str, pattern: str, hop: SenderHop) -> None:
    found = only(line)
    assert (found.pattern, found.hop, found.remarks) == (pattern, hop, ())
    key, _, value = line.partition(" ")
    for name in ("smtp", "relay"):
        of_transport = only(f"{key} {name}:{value}", transport=True)
        assert (of_transport.pattern, of_transport.hop) == (pattern, hop)


@pytest.mark.parametrize(
    ("line", "transport", "hop", "said"),
    [
        (
            "@x.example a.example",
            False,
            SenderHop(("a.example",)),
            "looks up the MX records of a.ex",
        ),
        (
            "@x.example [a.example]:587 [b.example]",
            False,
            SenderHop(("a.example", "b.example"), 587),
            "one",
        ),
        ("@x.example DUNNO", False, None, "no route of this sender's"),
        ("@x.example [a.example]:http", False, None, "[a.example]:http is no next hop"),
        ("@x.example [a b]", False, None, "is no next hop"),
        ("/x/ [a.example]", False, None, "a regular expression"),
        ("<> [a.example]", False, None, "null reverse-path"),
        ("user [a.example]", False, None, "no sender that a route can be for"),
        ("@x.example", False, None, "not of the form"),
        ("@x.example bot:s3cret", True, None, "no transport with a host"),
        ("@x.example b@x.example:s3.cret", True, None, "no transport with a host"),
        ("@x.example b@x.example:s3cret", False, None, "(not shown"),
        ("@x.example error:no", True, None, "no transport error"),
        (
            "@x.example bulk:[a.example]",
            True,
            SenderHop(("a.example",)),
            "master.cf says of the transp",
        ),
    ],
)
def test_line_without_equivalent_gets_the_nearest_next_hop_and_a_remark(
    line: str, transport: bool, hop: SenderHop | None, said: str
) -> None:
    found = only(line, transport=transport)
    assert found.hop == hop
    assert not found.has_equivalent
    assert any(said in remark.text for remark in found.remarks), found.remarks


def test_transport_without_a_next_hop_is_no_route() -> None:
    found = only("@x.example smtp:", transport=True)
    assert (found.hop, found.has_equivalent) == (None, True)
    assert [remark.difference for remark in found.remarks] == [Difference.NO_EFFECT]


def test_names_of_next_hops_are_names_and_differ_by_port() -> None:
    names = [
        SenderHop(hosts, port).name
        for hosts, port in [
            (("a.example",), 25),
            (("a.example",), 587),
            (("192.0.2.1",), 25),
            (("2001:db8::1",), 25),
            (("a.example", "b.example"), 25),
        ]
    ]
    assert names == [
        "a.example",
        "a.example-587",
        "hop-192.0.2.1",
        "hop-2001-db8--1",
        "a.example-and-1-more",
    ]


def test_transports_come_before_relay_hosts_and_the_first_line_of_a_sender_counts() -> None:
    relayhosts = imported_senders(
        "@a.example [r.example]\n@b.example [r.example]\n@b.example [s.example]\n"
        "@c.example [r.example]",
        has_transports=False,
    )
    transports = imported_senders(
        "@a.example smtp:[t.example]\n@c.example smtp:\n", has_transports=True
    )
    found = {each.pattern: each.hop for each in by_pattern((transports, relayhosts))}
    assert found == {
        "a.example": SenderHop(("t.example",)),
        "b.example": SenderHop(("r.example",)),
        "c.example": SenderHop(("r.example",)),
    }


def test_domain_without_at_sign_has_no_effect_in_postfix_and_is_told_how_to_write_it() -> None:
    found = only("other.example mailhub.example")
    [remark] = found.remarks
    assert (found.pattern, found.hop, remark.difference) == ("", None, Difference.NO_EFFECT)
    assert remark.text.endswith("write @other.example")


@pytest.mark.parametrize("key", ["@x.example", "[a.example]:587", "x.example", "b@x.example"])
@pytest.mark.parametrize("transport", [True, False])
def test_value_that_is_no_next_hop_and_may_be_a_password_is_not_shown(
    key: str, transport: bool
) -> None:
    found = only(f"{key} b@x.example:s3cret", transport=transport)
    assert "s3cret" not in f"{found.shown}{found.shown_key}{found.remarks}"
    assert found.shown.startswith(key)
