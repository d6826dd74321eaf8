"""Which file of a Postfix a text is."""

from __future__ import annotations

import pytest

from relay.policy.postfix_files import PostfixFile, holds_secret, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("[smtp.p.example]:587 relay@p.example:s3cret\n", PostfixFile.LOGINS),
        ("smtp.p.example apikey:SG.x-y_z\n", PostfixFile.LOGINS),
        ("[smtp.p.example]:587 relay:s3cret\n", PostfixFile.LOGINS),
        ("a@p.example a@p.example:a = b c\n", PostfixFile.LOGINS),
        ("# x\nmyhostname = a.example\nrelayhost = [b.example]:587\n", PostfixFile.MAIN_CF),
        ("relayhost=[b.example]:587\nmynetworks=127.0.0.0/8 10.0.0.0/8\n", PostfixFile.MAIN_CF),
        ("a.example smtp:[b.example]:25\n.a.example :\n", PostfixFile.TRANSPORTS),
        ("* relay:b.example\n", PostfixFile.TRANSPORTS),
        ("a.example error:no mail for it: never\n", PostfixFile.TRANSPORTS),
        ("@a.example slow:[b.example]\n", PostfixFile.SENDER_TRANSPORTS),
        ("@a.example [b.example]:587\nb@a.example hub.example\n", PostfixFile.SENDER_RELAYHOSTS),
        ("@a.example hub.example:587\n", PostfixFile.SENDER_RELAYHOSTS),
        ("a.example secure match=nexthop:.b.example\n[b.example] may\n", PostfixFile.TLS_POLICIES),
        ("a.example may\n[smtp.p.example]:587 b:s3cret\n", PostfixFile.TLS_POLICIES),
        ("hostname: relay.example.net\nroutes:\n", None),
        ("", None),
    ],
)
def test_kind_of_a_file_is_what_most_lines_are(text: str, kind: PostfixFile | None) -> None:
    assert kind_of(text, PostfixFile.TLS_POLICIES) is kind


@pytest.mark.parametrize(
    ("value", "is_hidden"),
    [
        ("user:password", True),
        ("us=er:password", True),
        ("encrypt user:password", True),
        ("encrypt,user:password", True),
        ("secure match=a.example:b.example", False),
        ("[a.example]:587", False),
        ("encrpyt", False),
    ],
)
def test_word_with_a_colon_may_hold_a_password(value: str, is_hidden: bool) -> None:
    assert holds_secret(value) is is_hidden
