from __future__ import annotations

from base64 import b64decode, b64encode

import pytest

from relay.deliver.sasl import Exchange, Mechanism, begin, choose, secrets_of
from relay.mail.reply import Reply
from relay.route.next_hop import AuthMechanism, Credentials

PASSWORD = Credentials("relay@example.com", "open sesame")
TOKEN = Credentials("relay@example.com", token="ya29.token")
NOTHING = Credentials("")
ALL = frozenset({"PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER", "EXTERNAL", "GSSAPI"})
GO_ON = Reply(334, "", "")


def of(mechanism: Mechanism, credentials: Credentials) -> Exchange:
    return begin(mechanism, credentials, host="smtp.example.com", port=587)


def said(exchange: Exchange, *challenges: str) -> list[str]:
    """The lines of a client, with what base64 hides."""
    lines = [exchange.first(), *(exchange.after(Reply(334, "", text)) for text in challenges)]
    return [" ".join(map(clear, line.decode().split(" "))) for line in lines]


def clear(word: str) -> str:
    if word in ("AUTH", "=", "*", "") or word in ALL:
        return word
    return b64decode(word, validate=True).decode()


@pytest.mark.parametrize(
    ("credentials", "offered", "chosen"),
    [
        (TOKEN, ALL, Mechanism.OAUTHBEARER),
        (TOKEN, ALL - {"OAUTHBEARER"}, Mechanism.XOAUTH2),
        (PASSWORD, ALL, Mechanism.PLAIN),
        (PASSWORD, {"LOGIN", "XOAUTH2"}, Mechanism.LOGIN),
        (NOTHING, ALL, Mechanism.EXTERNAL),
        (Credentials("us"), ALL, Mechanism.EXTERNAL),
    ],
)
def test_auto_takes_the_strongest_mechanism_that_host_and_login_have(credentials, offered, chosen):
    assert choose(credentials, offered) is chosen


@pytest.mark.parametrize(
    ("credentials", "offered", "why"),
    [
        (TOKEN, {"PLAIN"}, "neither AUTH OAUTHBEARER nor XOAUTH2 is offered"),
        (PASSWORD, {"XOAUTH2"}, "neither AUTH PLAIN nor LOGIN is offered"),
        (NOTHING, {"PLAIN"}, "AUTH EXTERNAL is not offered"),
        (PASSWORD, set(), "AUTH is not offered"),
    ],
)
def test_login_without_a_mechanism_that_the_host_offers_says_so(credentials, offered, why):
    found = choose(credentials, offered)
    assert not isinstance(found, Mechanism)
    assert found == why


@pytest.mark.parametrize("wanted", [one for one in AuthMechanism if one is not AuthMechanism.AUTO])
def test_mechanism_of_the_configuration_is_taken_and_no_other(wanted):
    credentials = Credentials("us", "p", "t", wanted)
    assert choose(credentials, ALL) == wanted.value.upper()
    found = choose(credentials, ALL - {wanted.value.upper()})
    assert found == f"AUTH {wanted.value.upper()} is not offered"


def test_plain_says_name_and_password_with_the_command():
    assert said(of(Mechanism.PLAIN, PASSWORD)) == ["AUTH PLAIN \0relay@example.com\0open sesame"]


def test_login_answers_two_questions():
    exchange = of(Mechanism.LOGIN, PASSWORD)
    lines = said(exchange, "VXNlcm5hbWU6", "UGFzc3dvcmQ6")
    assert lines == ["AUTH LOGIN", "relay@example.com", "open sesame"]


def test_xoauth2_says_name_and_token_with_the_command():
    assert said(of(Mechanism.XOAUTH2, TOKEN)) == [
        "AUTH XOAUTH2 user=relay@example.com\1auth=Bearer ya29.token\1\1"
    ]


def test_oauthbearer_says_name_host_port_and_token():
    assert said(of(Mechanism.OAUTHBEARER, TOKEN)) == [
        "AUTH OAUTHBEARER n,a=relay@example.com,\1host=smtp.example.com\1port=587\1"
        "auth=Bearer ya29.token\1\1"
    ]


def test_name_in_oauthbearer_is_escaped():
    line = said(of(Mechanism.OAUTHBEARER, Credentials("a=b,c", token="t")))[0]
    assert line.startswith("AUTH OAUTHBEARER n,a=a=3Db=2Cc,\1")


def test_external_says_nothing_but_a_name_where_there_is_one():
    assert said(of(Mechanism.EXTERNAL, NOTHING)) == ["AUTH EXTERNAL ="]
    assert said(of(Mechanism.EXTERNAL, Credentials("us"))) == ["AUTH EXTERNAL us"]


REFUSAL = b64encode(b'{"status":"401","schemes":"bearer"}').decode()


@pytest.mark.parametrize(
    ("mechanism", "answer"), [(Mechanism.XOAUTH2, b""), (Mechanism.OAUTHBEARER, b"AQ==")]
)
def test_refused_token_is_acknowledged_so_that_the_reply_comes(mechanism, answer):
    exchange = of(mechanism, TOKEN)
    exchange.first()
    assert exchange.after(Reply(334, "", REFUSAL)) == answer
    assert exchange.refusal == '{"status":"401","schemes":"bearer"}'
    assert not exchange.is_cancelled


@pytest.mark.parametrize("text", ["no base64!", "", "4pyT4"])
def test_refusal_that_cannot_be_read_is_acknowledged_too(text):
    exchange = of(Mechanism.XOAUTH2, TOKEN)
    exchange.first()
    assert exchange.after(Reply(334, "", text)) == b""
    assert exchange.refusal == ""


@pytest.mark.parametrize(
    ("mechanism", "credentials"),
    [
        (Mechanism.PLAIN, PASSWORD),
        (Mechanism.LOGIN, PASSWORD),
        (Mechanism.XOAUTH2, TOKEN),
        (Mechanism.OAUTHBEARER, TOKEN),
        (Mechanism.EXTERNAL, NOTHING),
    ],
)
def test_host_that_asks_on_and_on_is_told_that_the_login_is_cancelled(mechanism, credentials):
    exchange = of(mechanism, credentials)
    exchange.first()
    for _ in range(5):
        line = exchange.after(GO_ON)
        if exchange.is_cancelled:
            break
    assert line == b"*"


LONG = Credentials("relay@example.com", "p" * 400, "t" * 2000)


@pytest.mark.parametrize("mechanism", [Mechanism.PLAIN, Mechanism.XOAUTH2, Mechanism.OAUTHBEARER])
def test_response_too_long_for_a_command_waits_for_the_host(mechanism):
    exchange = of(mechanism, LONG)
    assert exchange.first() == b"AUTH " + mechanism.encode()
    assert b64decode(exchange.after(GO_ON)).startswith((b"\0relay", b"user=", b"n,a="))
    assert not exchange.is_cancelled


def test_command_is_never_longer_than_512_octets():
    for length in range(250, 400):
        exchange = of(Mechanism.XOAUTH2, Credentials("us", token="t" * length))
        assert len(exchange.first()) + 2 <= 512


def test_nothing_that_was_said_comes_through_the_mask():
    for credentials in (PASSWORD, TOKEN, LONG):
        secrets = secrets_of(credentials, host="smtp.example.com", port=587)
        for mechanism in (Mechanism.PLAIN, Mechanism.XOAUTH2, Mechanism.OAUTHBEARER):
            wanted = credentials.password if mechanism is Mechanism.PLAIN else credentials.token
            if wanted is None:
                continue
            exchange = of(mechanism, credentials)
            exchange.first()
            whole = (of(mechanism, credentials).first() + b" " + exchange.after(GO_ON)).decode()
            masked = secrets.masked(f"535 what is {whole}? and {wanted}!")
            assert wanted not in masked
            for at in range(len(masked) - 12):
                assert masked[at : at + 12] not in b64encode(wanted.encode()).decode()


def test_login_shows_no_secret():
    shown = repr((PASSWORD, TOKEN, of(Mechanism.PLAIN, PASSWORD), of(Mechanism.XOAUTH2, TOKEN)))
    assert "sesame" not in shown
    assert "ya29" not in shown


def test_logins_with_another_token_are_the_same_login():
    other = Credentials("relay@example.com", token="ya29.other", is_fresh=True)
    assert other == TOKEN
    assert hash(other) == hash(TOKEN)
    assert Credentials("relay@example.com", "another") != PASSWORD
