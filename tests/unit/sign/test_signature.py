"""DKIM: what is signed verifies, and nothing is signed in a name that is not the sender's."""

from __future__ import annotations

import hashlib
import random
import stat
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dkim
import pytest
from dkim.canonicalization import Relaxed
from hypothesis import given
from hypothesis import strategies as st

from relay.deliver.signing import Signature, Signer
from relay.queue.entry import MessageSummary, Terms
from relay.sign.body import BodyHash
from relay.sign.keys import KeyFileError, dns_record, load_key, load_keys, new_key
from relay.sign.options import DkimDomain
from relay.sign.signature import SigningKey, author_domain
from tests.fakes.mail import entry

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HEADER = (
    b"Received: by relay\r\nFrom: Ann <a@sender.example>\r\nTo: b@dest.example\r\n"
    b"Subject:  two\r\n   lines \r\n"
)
BODY = b"\r\nDear  Bob,\t\r\n\r\n.dot\r\n\xfc  \r\n\r\n\r\n"

LINES = st.lists(st.sampled_from([b"a", b" ", b"\t", b"\r\n", b"b  c", b"."]), max_size=40)


@given(LINES, st.randoms())
def test_a_bodys_hash_is_that_of_its_relaxed_form_however_it_is_cut(
    words: list[bytes], chance: random.Random
) -> None:
    body = b"".join(words) + b"\r\n"
    hashed, at = BodyHash(), 0
    while at < len(body):
        size = chance.randint(1, 5)
        hashed.update(body[at : at + size])
        at += size
    assert hashed.digest() == hashlib.sha256(Relaxed.canonicalize_body(body)).digest()


def test_a_body_of_nothing_but_line_ends_is_no_body_and_takes_no_memory() -> None:
    hashed = BodyHash()
    for _ in range(20):
        hashed.update(b"\r\n" * 50_000)
    assert hashed.digest() == hashlib.sha256(b"").digest()
    hashed.update(b"x")
    assert hashed.digest() == hashlib.sha256(b"\r\n" * 1_000_000 + b"x\r\n").digest()
    assert len(hashed._white) < 10


# --- what the host gets ---------------------------------------------------------------------------


@pytest.fixture(params=["rsa", "ed25519"])
def key(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    new_key(tmp_path / "key.pem", kind=request.param)
    return load_keys({"sender.example": DkimDomain("s1", str(tmp_path / "key.pem"))})


async def sent(
    keys: Mapping[str, SigningKey], content: bytes, *, pieces: int = 0, **fields: Any
) -> bytes:
    """What goes out of this content; `pieces`: read from the store in pieces of so many octets."""

    async def stored() -> AsyncIterator[bytes]:
        for at in range(0, len(content), pieces):
            yield content[at : at + pieces]

    message = entry(content=content, **fields).message
    signer = Signer(lambda: keys, clock=lambda: NOW)
    return (await signer.sign(message, stored if pieces else content)).field + content


def verifies(content: bytes, keys: Mapping[str, SigningKey]) -> bool:
    """What the MX says, which asks its DNS for the record we print."""

    def txt(name: bytes, timeout: int = 5) -> bytes | None:
        for signing in keys.values():
            if name.rstrip(b".") == f"{signing.selector}._domainkey.{signing.domain}".encode():
                zone = dns_record(signing.key, domain=signing.domain, selector=signing.selector)  # type: ignore[arg-type]
                return "".join(zone.split('"')[1::2]).encode()
        return None

    return bool(dkim.verify(content, dnsfunc=txt))


@pytest.mark.parametrize("pieces", [0, 7, 64])
async def test_a_signed_message_verifies_at_the_mx(key: Any, pieces: int) -> None:
    content = HEADER + BODY
    got = await sent(key, content, pieces=pieces)
    assert got.endswith(content)
    assert got.startswith(b"DKIM-Signature: v=1; a=")
    assert verifies(got, key)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b"Dear", b"Near"),
        (b"two", b"too"),
        (b"To: b@", b"To: c@"),
        (b"\r\nSubject:", b"\r\nSubject: another\r\nSubject:"),
        (b"\r\nTo:", b"\r\nFrom: x@other.example\r\nTo:"),
        (b"\r\nTo:", b"\r\nReply-To: x@other.example\r\nTo:"),
    ],
)
async def test_message_changed_on_the_way_does_not_verify(
    key: Any, was: bytes, becomes: bytes
) -> None:
    got = await sent(key, HEADER + BODY)
    signature, rest = got.split(b"Received:", 1)
    assert not verifies(signature + b"Received:" + rest.replace(was, becomes, 1), key)


async def test_signature_survives_a_change_of_white_space_by_a_host(key: Any) -> None:
    got = await sent(key, HEADER + BODY)
    assert verifies(
        got.replace(b"Dear  Bob,\t", b"Dear Bob,").replace(b"Subject:  two", b"subject: two"), key
    )


@pytest.mark.parametrize(
    ("reverse_path", "author"),
    [
        ("a@other.example", b"a@sender.example"),
        ("a@sender.example", b"a@other.example"),
        ("a@sub.sender.example", b"a@sender.example"),
        ("a@sender.example", b"a@sender.example, b@other.example"),
        ("a@sender.example", b"a@sender.example\r\nFrom: b@other.example"),
        ("a@sender.example", b'"<a@sender.example>" <a@other.example>'),
        ("", b"a@sender.example"),
        ("a@sender.example", b"nobody"),
    ],
)
async def test_sender_gets_no_signature_of_another_domain(
    key: Any, reverse_path: str, author: bytes
) -> None:
    content = b"From: " + author + b"\r\n\r\nhello\r\n"
    got = await sent(key, content, reverse_path=reverse_path)
    assert got == content


async def test_sender_for_one_domain_gets_no_signature_of_another_with_a_key(key: Any) -> None:
    both = key | {"other.example": replace(key["sender.example"], domain="other.example")}
    content = b"From: boss@other.example\r\n\r\nhello\r\n"
    assert await sent(both, content, reverse_path="a@sender.example") == content
    assert b" d=other.example;" in await sent(both, content, reverse_path="a@other.example")


async def test_our_own_report_is_signed_by_its_author_alone(key: Any) -> None:
    content = b"From: Mail system <MAILER-DAEMON@sender.example>\r\n\r\nSorry.\r\n"
    got = await sent(key, content, reverse_path="", origin="dsn")
    assert verifies(got, key)


async def test_content_of_an_unsigned_message_is_not_read_for_a_signature(key: Any) -> None:
    def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the content was read")

    for keys, sender in (({}, "a@sender.example"), (key, "a@other.example"), (key, "")):
        signer = Signer(lambda keys=keys: keys, clock=lambda: NOW)  # type: ignore[misc]
        assert await signer.sign(entry(reverse_path=sender).message, unread) == Signature()


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        (b"a@x.example", "x.example"),
        (b"Ann (at home) <a@X.Example>", "x.example"),
        (b'"Doe, Jane" <"j d"@x.example>', "x.example"),
        (b"\r\n Ann\r\n <a@x.example>", "x.example"),
        (b"=?utf-8?q?=3Cb=40y.example=3E?= <a@x.example>", "x.example"),
        ("Ann <a@bücher.example>".encode(), "xn--bcher-kva.example"),
        (b"a@x.example, b@x.example", ""),
        (b"friends: a@x.example;", ""),
        (b"<b@y.example> <a@x.example>", ""),
        (b"undisclosed", ""),
        (b"a@x.example\r\nFrom : b@y.example", ""),
    ],
)
def test_the_author_is_the_one_in_the_one_from_field(value: bytes, domain: str) -> None:
    assert author_domain(b"From: " + value + b"\r\n") == domain


# --- keys -----------------------------------------------------------------------------------------


def test_a_key_is_its_owners_only_and_is_never_written_over(tmp_path: Path) -> None:
    new_key(tmp_path / "key.pem", kind="rsa")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    with pytest.raises(KeyFileError, match="File exists"):
        new_key(tmp_path / "key.pem", kind="rsa")


def test_the_record_of_a_key_is_cut_into_strings_of_255_octets(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key.pem", kind="rsa")
    text = dns_record(key, domain="sender.example", selector="s1")
    assert text.startswith("s1._domainkey.sender.example. IN TXT (")
    strings = text.split('"')[1::2]
    assert len(strings) == 2
    assert max(map(len, strings)) <= 255
    assert "".join(strings).startswith("v=DKIM1; k=rsa; p=MIIB")


def test_a_key_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(KeyFileError, match="No such file"):
        load_key(path)
    path.write_text("no key")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="not an unencrypted private key"):
        load_key(path)
    path.chmod(0o604)
    with pytest.raises(KeyFileError, match="every user of this machine"):
        load_key(path)


async def test_a_key_that_comes_with_a_reload_signs_the_next_message(tmp_path: Path) -> None:
    keys: dict[str, SigningKey] = {}
    signer, content = Signer(lambda: keys, clock=lambda: NOW), HEADER + BODY
    assert await signer.sign(entry().message, content) == Signature()
    new_key(tmp_path / "key.pem", kind="ed25519")
    keys |= load_keys({"sender.example": DkimDomain("s2", str(tmp_path / "key.pem"))})
    field = (await signer.sign(entry().message, content)).field
    assert b" s=s2;" in field
    assert verifies(field + content, keys)


@pytest.mark.parametrize("filler", [b"a:\r\n", b"X:\r\n y\r\n", b"X: y\n\r\n"])
async def test_a_header_section_of_a_megabyte_is_signed_without_a_step_for_each_field(
    filler: bytes, key: Any
) -> None:
    content = HEADER + filler * (1_000_000 // len(filler)) + BODY
    began = time.process_time()
    signed = await sent(key, content)
    assert time.process_time() - began < 0.3
    assert signed.startswith(b"DKIM-Signature: ")
    field = signed[: -len(content)]
    assert verifies(field + HEADER + BODY, key)


async def test_a_message_with_hundreds_of_fields_to_sign_goes_out_unsigned(key: Any) -> None:
    content = HEADER + b"To: c@dest.example\r\n" * 300 + BODY
    assert await sent(key, content) == content


def test_endless_white_space_is_hashed_in_linear_time() -> None:
    hashed = BodyHash()
    hashed.update(b" \t" * 131_072 + b"x")
    assert hashed.digest() == hashlib.sha256(b" x\r\n").digest()


@pytest.mark.parametrize(
    ("reverse_path", "author"),
    [
        ("a@sender.example", "a@other.example"),
        ("bounces@sub.sender.example", "Ann <a@sender.example>"),
        ("a@sender.example", "a@sender.example, b@sender.example"),
    ],
)
async def test_a_message_whose_domain_has_a_key_and_gets_no_signature_says_why(
    key: Any, reverse_path: str, author: str
) -> None:
    content = f"From: {author}\r\n\r\nhello\r\n".encode()
    message = replace(
        entry(content=content, reverse_path=reverse_path).message,
        summary=MessageSummary(from_=author),
    )
    signature = await Signer(lambda: key, clock=lambda: NOW).sign(message, content)
    assert signature.field == b""
    assert "is not the author's" in signature.unsigned
    unwanted = replace(message, terms=Terms(is_signed=False))
    assert await Signer(lambda: key, clock=lambda: NOW).sign(unwanted, content) == Signature()


async def test_a_sender_over_http_may_have_its_message_unsigned(key: Any) -> None:
    message = replace(entry(content=HEADER + BODY).message, terms=Terms(is_signed=False))
    signer = Signer(lambda: key, clock=lambda: NOW)
    assert await signer.sign(message, HEADER + BODY) == Signature()
    assert (await signer.sign(replace(message, terms=Terms()), HEADER + BODY)).field


async def test_the_fields_of_a_report_on_tls_are_signed(key: Any) -> None:
    """RFC 8460 §3."""
    fields = b"TLS-Report-Domain: b.example\r\nTLS-Report-Submitter: sender.example\r\n"
    got = await sent(key, fields + HEADER + BODY)
    assert verifies(got, key)
    for was, becomes in ((b": b.example", b": c.example"), (b"Submitter: s", b"Submitter: x")):
        signature, rest = got.split(b"TLS-Report-Domain", 1)
        changed = (b"TLS-Report-Domain" + rest).replace(was, becomes, 1)
        assert not verifies(signature + changed, key)
