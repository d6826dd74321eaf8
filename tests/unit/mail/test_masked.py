from __future__ import annotations

from base64 import b64encode
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.masked import MASK, Secrets

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
    ],
    ids=["whole", "beginning", "eight-characters", "percent", "base64", "xoauth2", "part"],
)
def test_no_form_of_a_secret_stays_in_a_text(said: str) -> None:
    blob = f"user=a\x01auth=Bearer {SECRET}\x01\x01".encode()
    secrets = Secrets([SECRET], [blob])
    assert secrets.masked(f"535 token <{said}> refused") == f"535 token <{MASK}> refused"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", '{"token":"'])
def test_secret_in_base64_is_found_whatever_stands_before_it(before: str) -> None:
    said = b64encode(f"{before}{SECRET}".encode()).decode()
    masked = Secrets([SECRET]).masked(said)
    assert MASK in masked
    assert len(masked) < len(before) * 2 + 14


def test_text_without_a_secret_stays_as_it_is() -> None:
    text = "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect"
    assert Secrets([SECRET]).masked(text) == text


def test_each_of_two_secrets_is_masked_where_both_stand() -> None:
    secrets = Secrets(["first-secret", "other-secret"])
    assert secrets.masked("a first-secret b other-secret c") == f"a {MASK} b {MASK} c"


def test_short_secret_is_masked_as_a_whole() -> None:
    assert Secrets(["hunter2"]).masked("wrong: hunter2, hunter") == f"wrong: {MASK}, hunter"


def test_secret_of_two_characters_is_not_looked_for() -> None:
    assert Secrets(["ab"]).masked("about abbeys") == "about abbeys"


def test_secrets_do_not_show_themselves() -> None:
    secrets = Secrets([SECRET])
    assert SECRET not in repr(secrets)
    assert SECRET not in f"{secrets}"


@given(before=_WORDS, secret=_WORDS, after=_WORDS)
def test_secret_is_never_in_a_masked_text(before: str, secret: str, after: str) -> None:
    masked = Secrets([secret]).masked(f"{before}{secret}{after}")
    assert secret not in masked or secret in MASK
