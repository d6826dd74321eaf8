"""What mail hosts of few extensions get, and what the delivery log says of what they do not get."""

from __future__ import annotations

from email import message_from_bytes

from relay.sandbox.script import Script
from tests.rigs.sandbox import Sandbox

HEADER = b"From: a@client.example\r\nTo: b@dest.example\r\nSubject: x\r\nMIME-Version: 1.0\r\n"
TEXT = HEADER + "Content-Type: text/plain; charset=utf-8\r\n\r\n.Grüße\r\n".encode()
SIGNED = (
    HEADER
    + "Content-Type: multipart/signed; boundary=s\r\n\r\n--s\r\n\r\nGrüße\r\n--s--\r\n".encode()
)
LONG = HEADER + b"\r\n" + b"long " * 1000 + b"\r\nend\r\n"

OLD = Script(offers=("SIZE 20000", "PIPELINING"))
ABLE = Script(offers=("8BITMIME", "SIZE 20000000"))


async def hand_in(sandbox: Sandbox, recipient: str, content: bytes) -> None:
    async with sandbox.client() as client:
        await client.ehlo()
        mail = b"MAIL FROM:<a@client.example>" + (b"" if recipient.isascii() else b" SMTPUTF8")
        assert (await client.execute_command(mail)).code == 250
        assert (await client.execute_command(f"RCPT TO:<{recipient}>".encode())).code == 250
        assert (await client.data(content)).code == 250


async def test_a_host_gets_what_it_can_take_and_the_sender_hears_what_it_cannot(
    sandbox: Sandbox,
) -> None:
    old = await sandbox.domain("old.example", OLD)
    able = await sandbox.domain("able.example", ABLE)
    await sandbox.start()
    submitted = {
        "text@old.example": TEXT,
        "signed@old.example": SIGNED,
        "large@old.example": HEADER + b"\r\n" + b"x" * 70 + b"\r\n" * 20_000,
        "å@able.example": TEXT,
        "text@able.example": TEXT,
        "long@able.example": LONG,
    }
    for recipient, content in submitted.items():
        await hand_in(sandbox, recipient, content)
    outcomes = {}
    for recipient in submitted:
        [event] = await sandbox.attempts(recipient)
        status = event["delivery-status"]
        outcomes[recipient] = (event["event"], status["enhanced-code"], status["mx-host"])
    assert outcomes == {
        "text@old.example": ("delivered", "2.0.0", "mx.old.example"),
        "signed@old.example": ("failed", "5.6.3", "mx.old.example"),
        "large@old.example": ("failed", "5.3.4", "mx.old.example"),
        "å@able.example": ("failed", "5.6.7", "mx.able.example"),
        "text@able.example": ("delivered", "2.0.0", "mx.able.example"),
        "long@able.example": ("delivered", "2.0.0", "mx.able.example"),
    }
    [converted] = old.messages
    assert "BODY=" not in converted.mail
    assert converted.content.endswith(
        b"charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n.Gr=C3=BC=C3=9Fe\r\n"
    )
    assert message_from_bytes(converted.content).get_payload(decode=True) == ".Grüße\r\n".encode()
    as_it_is = {message.forward_paths[0]: message for message in able.messages}
    assert as_it_is["text@able.example"].content.endswith(TEXT)
    assert as_it_is["text@able.example"].mail.endswith("BODY=8BITMIME")
    assert as_it_is["long@able.example"].content.endswith(LONG)
    assert "BODY=" not in as_it_is["long@able.example"].mail
