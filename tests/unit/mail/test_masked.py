from __future__ import annotations

import html
import json
from base64 import b64encode
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.masked import MASK, SecretMask

SECRET = "EwBwA8l6BAAUO9chh8cJscQLmU+LSWpbnr0vmwwAAeuN"
_WORDS = st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=8, max_size=60)


@pytest.mark.parametrize(
    "said",
    [
        SECRET,
        SECRET[:20],
        SECRET[5:13],
        quote(SECRET, safe=""),
        b64encode(SECRET.encode()).decode(),
        b64encode(f"user=a\x01auth=Bearer {SECRET}\x01\x01".encode()).decode(),
        b64encode(SECRET[:33].encode()).decode(),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        SECRET.upper(),
        SECRET.lower(),
    ],
    ids=[
        "whole",
        "beginning",
        "eight-characters",
        "percent",
        "base64",
        "xoauth2",
        "part",
        "hex",
        "upper-hex",
        "upper",
        "lower",
    ],
)
def test_no_form_of_a_secret_stays_in_a_text(said: str) -> None:
    blob = f"user=a\x01auth=Bearer {SECRET}\x01\x01".encode()
    secrets = SecretMask([SECRET], [blob])
    assert secrets.masked(f"535 token <{said}> refused") == f"535 token <{MASK}> refused"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", '{"token":"'])
def test_secret_in_base64_is_found_whatever_stands_before_it(before: str) -> None:
    said = b64encode(f"{before}{SECRET}".encode()).decode()
    masked = SecretMask([SECRET]).masked(said)
    assert MASK in masked
    assert len(masked) < len(before) * 2 + 14


def test_text_without_a_secret_stays_as_it_is() -> None:
    text = "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect"
    assert SecretMask([SECRET]).masked(text) == text


def test_each_of_two_secrets_is_masked_where_both_stand() -> None:
    secrets = SecretMask(["first-secret", "other-secret"])
    assert secrets.masked("a first-secret b other-secret c") == f"a {MASK} b {MASK} c"


def test_short_secret_is_masked_as_a_whole() -> None:
    assert SecretMask(["hunter2"]).masked("wrong: hunter2, hunter") == f"wrong: {MASK}, hunter"


def test_short_secret_is_masked_in_any_case_and_in_hex() -> None:
    secrets = SecretMask(["hunter2"])
    assert secrets.masked("wrong: HUNTER2") == f"wrong: {MASK}"
    assert secrets.masked(f"wrong: {b'hunter2'.hex()}") == f"wrong: {MASK}"


@pytest.mark.parametrize("secret", ['a"b\\c"d\\e"f', "a<b&c>d'e<f\"g", "äöüß<éàè", "ab/cd/ef/gh"])
def test_secret_is_masked_as_json_and_html_escape_it(secret: str) -> None:
    secrets = SecretMask([secret])
    as_json = json.dumps(secret)[1:-1]
    plain_json = json.dumps(secret, ensure_ascii=False)[1:-1]
    for said in (as_json, plain_json, as_json.replace("/", r"\/"), html.escape(secret)):
        assert secrets.masked(f"535 <{said}>") == f"535 <{MASK}>"


def test_user_name_is_shown_where_the_password_begins_with_it() -> None:
    user = "relay@example.com"
    secrets = SecretMask([f"{user}-2026!x"], public=user)
    assert secrets.masked(f"535 no such user {user}") == f"535 no such user {user}"
    assert "2026" not in secrets.masked(f"535 password {user}-2026!x is wrong")


@pytest.mark.parametrize("password", ["relay@example", "aaaaaaaaaaaa", "relay"])
def test_password_that_is_a_part_of_the_user_name_is_masked(password: str) -> None:
    secrets = SecretMask([password], public="relay@example.com aaaaaaaaa")
    assert password not in secrets.masked(f"535 password {password} is wrong")


def test_masked_text_keeps_characters_whose_lower_case_is_longer() -> None:
    assert SecretMask([SECRET]).masked(f"İİ {SECRET} İ") == f"İİ {MASK} İ"


def test_secret_of_two_characters_is_not_looked_for() -> None:
    assert SecretMask(["ab"]).masked("about abbeys") == "about abbeys"


def test_secrets_do_not_show_themselves() -> None:
    secrets = SecretMask([SECRET])
    assert SECRET not in repr(secrets)
    assert SECRET not in f"{secrets}"


@given(before=_WORDS, secret=_WORDS, after=_WORDS)
def test_secret_is_never_in_a_masked_text(before: str, secret: str, after: str) -> None:
    masked = SecretMask([secret]).masked(f"{before}{secret}{after}")
    assert secret not in masked or secret in MASK
