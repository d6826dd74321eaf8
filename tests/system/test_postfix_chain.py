"""The main job on real parts: Postfix ─► relay ─► MX found by Knot DNS ─► Postfix with STARTTLS.

The first Postfix has a `relayhost` line and nothing else changed. The last one
shows a certificate of a test CA. What is asserted is what arrived, byte for byte,
and what the delivery log says of it.
"""

from __future__ import annotations

import random
import smtplib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path

import pytest
import trustme

from tests.fakes.waiting import patient
from tests.rigs.knot import knot
from tests.rigs.ports import free_port, wait_until
from tests.rigs.postfix import Postfix, mx_host, smarthost_client
from tests.rigs.relay import Relay, relay_process

pytestmark = [pytest.mark.needs("root", "postfix", "knotd"), pytest.mark.timeout(300)]

ZONES = {
    "dest.example": "@ MX 10 mx1\nmx1 A 127.0.0.21",
    "clear.example": "@ MX 10 mx2\nmx2 A 127.0.0.22",
}


@dataclass
class Chain:
    client: Postfix
    relay: Relay
    mx: Postfix
    clear_mx: Postfix


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    directory: Path = tmp_path_factory.mktemp("chain")
    authority = trustme.CA()
    leaf = authority.issue_cert("mx1.dest.example")
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    leaf.private_key_pem.write_to_path(str(directory / "mx.key"))
    with (directory / "mx.pem").open("wb") as chain_file:
        chain_file.writelines(blob.bytes() for blob in leaf.cert_chain_pems)
    port = free_port("127.0.0.21")
    with (
        knot(ZONES) as dns,
        mx_host(
            hostname="mx1.dest.example",
            domains="dest.example",
            address="127.0.0.21",
            port=port,
            certificate=directory / "mx.pem",
            key=directory / "mx.key",
        ) as mx,
        mx_host(
            hostname="mx2.clear.example", domains="clear.example", address="127.0.0.22", port=port
        ) as clear_mx,
        relay_process(
            directory,
            dns=dns,
            delivery_port=port,
            ca_file=directory / "ca.pem",
            policy={"domains": {"legal.example": {"require_tls": True}}},
        ) as relay,
        smarthost_client(port=free_port(), relay_port=relay.port) as client,
    ):
        yield Chain(client, relay, mx, clear_mx)


@dataclass(frozen=True)
class Letter:
    """A message to send, and what of it has to arrive: the same, less the policy fields."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    arrives: bytes


def _head(number: int, *, more: bytes = b"") -> bytes:
    return (
        b"From: Alice <alice@client.example>\r\nTo: Bob <bob@dest.example>\r\n"
        b"Subject: letter %d\r\nDate: Fri, 20 Nov 2026 08:00:00 +0000\r\n"
        b"Message-ID: <letter-%d@client.example>\r\n%b" % (number, number, more)
    )


def _attachment(number: int, size_bytes: int) -> bytes:
    message = EmailMessage(policy=SMTP)
    message["From"], message["To"] = "alice@client.example", "bob@dest.example"
    message["Subject"] = f"letter {number}: Größe"
    message["Date"] = "Fri, 20 Nov 2026 08:00:00 +0000"
    message["Message-ID"] = f"<letter-{number}@client.example>"
    message.set_content("See the attachment.\n")
    data = random.Random(number).randbytes(size_bytes)
    message.add_attachment(
        data, maintype="application", subtype="octet-stream", filename="data.bin"
    )
    return message.as_bytes()


def _contents(number: int) -> tuple[bytes, bytes]:
    """What is sent and what arrives, of the kind that this number is."""
    plain = _head(number) + b"\r\nHello, Bob.\r\n"
    mime = (
        b"MIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: 8bit\r\n"
    )
    eight_bit = _head(number, more=mime) + "\r\nGrüße aus Zürich, ½ Pfund: 日本\r\n".encode()
    dots = _head(number) + b"\r\n.\r\n..\r\n.hidden\r\n\r\n \r\n.\r\n\r\n"
    folded = (
        _head(number, more=b"X-Long: one\r\n two\r\n\tthree " + b"x" * 900 + b"\r\n")
        + b"\r\nfolded\r\n"
    )
    wish = _head(number, more=b"X-Require-TLS: Yes\r\nX-Other: kept\r\n") + b"\r\nprotected\r\n"
    wish_arrives = wish.replace(b"X-Require-TLS: Yes\r\n", b"")
    quoted = _head(number) + b"\r\nX-Require-TLS: in the body\r\n\r\nFrom nobody\r\n"
    match number % 10:
        case 0:
            return eight_bit, eight_bit
        case 1:
            return dots, dots
        case 2:
            return folded, folded
        case 3:
            return wish, wish_arrives
        case 4:
            return quoted, quoted
        case 5:
            attached = _attachment(number, 5_000_000 * 3 // 4 if number == 5 else 30_000)
            return attached, attached
        case 6:
            empty = _head(number) + b"\r\n"
            return empty, empty
        case _:
            return plain, plain


def _letter(number: int) -> Letter:
    sent, arrives = _contents(number)
    many = tuple(f"user{i}@dest.example" for i in range(1 + 4 * (number % 10 == 7)))
    sender = "counsel@legal.example" if number % 3 == 0 else "alice@client.example"
    return Letter(sender, many, sent, arrives)


def _hand_in(client: Postfix, letters: list[Letter]) -> None:
    with smtplib.SMTP(client.address, client.port, timeout=patient(60)) as session:
        session.ehlo("application.example")
        for letter in letters:
            code, text = session.mail(letter.sender, ["BODY=8BITMIME"])
            assert code == 250, text
            for recipient in letter.recipients:
                assert session.rcpt(recipient)[0] == 250
            assert session.data(letter.content)[0] == 250


def test_a_hundred_messages_arrive_byte_for_byte_with_a_true_log_line_each(chain: Chain) -> None:
    letters = [_letter(number) for number in range(100)]
    copies = sum(len(letter.recipients) for letter in letters)
    _hand_in(chain.client, letters)
    wait_until(
        lambda: len(chain.mx.delivered()) >= copies, seconds=120, what="the arrival of all copies"
    )
    wait_until(
        lambda: len(chain.relay.events(event="delivered")) >= copies,
        what="a delivered line for each copy",
    )

    arrived = chain.mx.delivered()
    assert len(arrived) == copies
    missing = Counter({letter.arrives: len(letter.recipients) for letter in letters})
    for content in arrived:
        [original] = [letter.arrives for letter in letters if content.endswith(letter.arrives)][
            :1
        ] or [b""]
        added = content[: len(content) - len(original)]
        assert original, f"arrived changed: {content[:2000]!r}"
        # On top stand only Postfix's own fields and one Received of each hop.
        assert b"by relay.test.example" in added
        assert added.count(b"Received:") == 3
        missing[original] -= 1
    assert not +missing
    assert not -missing

    lines = chain.relay.events(event="delivered")
    assert len(lines) == copies
    for line in lines:
        status = line["delivery-status"]
        assert (status["tls"], status["certificate-verified"]) == (True, True)
        assert (status["mx-host"], status["code"]) == ("mx1.dest.example", 250)
        assert status["downgrade"] is None
        by_rule = line["envelope"]["sender"] == "counsel@legal.example"
        if by_rule:
            assert line["policy"]["require-tls"] is True
            assert line["policy"]["require-tls-source"] in ("domain", "message")
    assert len(chain.relay.events(event="accepted")) == len(letters)
    # The MX saw every one of them in TLS.
    assert not chain.mx.log_lines("disconnect", "mail=", "starttls=0")
    assert all("starttls=1" in line for line in chain.mx.log_lines("disconnect from", " mail="))


def test_message_that_requires_tls_never_leaves_in_clear(chain: Chain) -> None:
    content = _head(1000) + b"\r\nsecret\r\n"
    letters = [
        Letter("counsel@legal.example", ("bob@clear.example",), content, content),
        Letter(
            "alice@client.example",
            ("carol@clear.example",),
            content.replace(b"Subject:", b"X-Require-TLS: true\r\nSubject:"),
            content,
        ),
    ]
    _hand_in(chain.client, letters)
    for recipient in ("bob@clear.example", "carol@clear.example"):
        [line] = wait_until(
            lambda to=recipient: chain.relay.events(event="failed", recipient=to),  # type: ignore[misc]
            what=f"the log line for {recipient}",
        )
        assert line["severity"] == "temporary"
        assert line["delivery-status"]["enhanced-code"] == "4.7.4"
    assert chain.clear_mx.delivered() == []
    said = [line for line in chain.clear_mx.log_lines("disconnect from") if "ehlo=" in line]
    assert said
    # Greeting, EHLO, QUIT: no MAIL, no RCPT, no DATA was ever said.
    assert all("mail=" not in line and "rcpt=" not in line and "data=" not in line for line in said)

    _hand_in(
        chain.client, [Letter("alice@client.example", ("dave@clear.example",), content, content)]
    )
    [line] = wait_until(
        lambda: chain.relay.events(event="delivered", recipient="dave@clear.example"),
        what="the delivery of what may go in clear",
    )
    assert line["delivery-status"]["tls"] is False
    assert line["delivery-status"]["downgrade"]["reason"] == "starttls-not-offered"
    assert [c.endswith(content) for c in chain.clear_mx.delivered()] == [True]
