"""A Postfix TLS policy table, read as Postfix reads it."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.policy.postfix_table import (
    PolicyValueError,
    PostfixLevel,
    PostfixPolicy,
    allowed_versions,
    read_policy,
    read_table,
)

ODD = """\
# a comment
one.example may

two.example
\tencrypt
  # a comment does not end the line
\tprotocols=>=TLSv1.2

# nor does one that stands further left
 ciphers=high
"three four" may
"fi\\"ve\\\\" may
lonely.example
six.example\tnone # no comment
Seven.Example   MAY
  # the last line is a comment
"""


def entries(text: str) -> dict[str, str]:
    return {
        line.key.lower(): " ".join(line.value.split())
        for line in read_table(text)
        if not line.fault
    }


def test_a_table_is_read_line_by_logical_line() -> None:
    assert entries(ODD) == {
        "one.example": "may",
        "two.example": "encrypt protocols=>=TLSv1.2 ciphers=high",
        '"three four"': "may",
        r'"fi\"ve\\"': "may",
        "six.example": "none # no comment",
        "seven.example": "MAY",
    }


def test_a_line_has_the_number_of_its_first_physical_line() -> None:
    numbers = {line.key: line.number for line in read_table(ODD)}
    assert (numbers["two.example"], numbers['"three four"'], numbers["lonely.example"]) == (
        4,
        11,
        13,
    )


@pytest.mark.parametrize(
    ("text", "reason"), [("lonely.example", "`key value`"), ("  may", "white space")]
)
def test_a_line_that_postmap_passes_over_says_why(text: str, reason: str) -> None:
    [line] = read_table(text)
    assert reason in line.fault


@pytest.mark.needs("postmap")
def test_postmap_reads_the_same_of_an_odd_table(tmp_path: Path) -> None:
    (tmp_path / "main.cf").write_text("compatibility_level = 3.6\n")
    (tmp_path / "table").write_text(ODD)
    postmap = ["/usr/sbin/postmap", "-c", str(tmp_path)]
    table = f"hash:{tmp_path}/table"
    subprocess.run([*postmap, table], check=True, capture_output=True)
    for key, value in entries(ODD).items():
        asked = [*postmap, "-q", key, table]
        done = subprocess.run(asked, check=True, capture_output=True, text=True)
        assert " ".join(done.stdout.split()) == value
    listed = subprocess.run([*postmap, "-s", table], check=True, capture_output=True)
    assert listed.stdout.count(b"\n") == len(entries(ODD))


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("may", PostfixPolicy(PostfixLevel.MAY)),
        ("  Encrypt  ", PostfixPolicy(PostfixLevel.ENCRYPT)),
        ("none match=x,y=z nonsense", PostfixPolicy(PostfixLevel.NONE)),
        (
            "secure match=nexthop:.a.example, MATCH=b.example",
            PostfixPolicy(PostfixLevel.SECURE, match=("nexthop", ".a.example", "b.example")),
        ),
        (
            "fingerprint match=aa:bb|cc:dd match=ee:ff",
            PostfixPolicy(PostfixLevel.FINGERPRINT, match=("aa:bb", "cc:dd", "ee:ff")),
        ),
        (
            "verify tafile=/a.pem tafile=/b.pem servername=hostname",
            PostfixPolicy(PostfixLevel.VERIFY, tafile=("/a.pem", "/b.pem"), servername="hostname"),
        ),
        (
            "encrypt { protocols = >=TLSv1.2 } exclude=RC4:3DES ciphers=high",
            PostfixPolicy(
                PostfixLevel.ENCRYPT, protocols=">=TLSv1.2", exclude="RC4:3DES", ciphers="high"
            ),
        ),
        (
            "dane connection_reuse=no connection_reuse=YES enable_rpk=yes",
            PostfixPolicy(PostfixLevel.DANE, connection_reuse=True, enable_rpk=True),
        ),
        (
            "secure match=.mx.example policy_type=sts policy_ttl=86400",
            PostfixPolicy(
                PostfixLevel.SECURE, match=(".mx.example",), others=("policy_type", "policy_ttl")
            ),
        ),
    ],
)
def test_a_value_is_a_level_and_its_attributes(value: str, policy: PostfixPolicy) -> None:
    assert read_policy(value) == policy


@pytest.mark.parametrize(
    "value",
    [
        "encrpyt",
        "",
        "must_nopeermatch",
        "encrypt match=hostname",
        "may tafile=/a.pem",
        "fingerprint tafile=/a.pem",
        "secure match=",
        "encrypt ciphers=high ciphers=low",
        "encrypt ciphers=hihg",
        "encrypt protocols=!SSLv3,!TLSv1",
        "encrypt protocols=>=TLSv1.4",
        "encrypt protocols=SSLv3 protocols=TLSv1",
        "encrypt servername=a..example",
        "encrypt connection_reuse=maybe",
        "encrypt enable_rpk=1",
        "encrypt # a comment",
        "encrypt nonsense=1",
    ],
)
def test_a_value_that_makes_postfix_defer_the_mail_is_an_error(value: str) -> None:
    with pytest.raises(PolicyValueError):
        read_policy(value)


@pytest.mark.parametrize(
    ("protocols", "allowed"),
    [
        ("!SSLv2:!SSLv3", "TLSv1 TLSv1.1 TLSv1.2 TLSv1.3"),
        ("!SSLv2, !SSLv3 !TLSv1 !TLSv1.1", "TLSv1.2 TLSv1.3"),
        (">=TLSv1.2", "TLSv1.2 TLSv1.3"),
        (">=tlsv1.2:<=TLSv1.2", "TLSv1.2"),
        (">=0x0303", "TLSv1.2 TLSv1.3"),
        ("TLSv1.2", "TLSv1.2"),
        ("TLSv1.2:TLSv1.3:!TLSv1.3", "TLSv1.2"),
        (">=TLSv1.3:<=TLSv1.2", ""),
        ("", "SSLv2 SSLv3 TLSv1 TLSv1.1 TLSv1.2 TLSv1.3"),
    ],
)
def test_protocols_say_which_versions_are_allowed(protocols: str, allowed: str) -> None:
    assert allowed_versions(protocols) == tuple(allowed.split())


@given(st.text(alphabet=' \t\n#"\\{}=,:|>!abc[].1', max_size=80))
def test_any_text_is_a_table_and_any_value_a_policy_or_an_error(text: str) -> None:
    for line in read_table(text):
        assert line.number <= text.count("\n") + 1
        with contextlib.suppress(PolicyValueError):
            read_policy(line.value)
