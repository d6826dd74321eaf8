"""The servers the other tests stand on do what they are told."""

import asyncio
import ssl
from contextlib import suppress

import aiosmtplib
import pytest

from relay.sandbox.certificates import Authority, Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.recording import Phase
from relay.sandbox.script import TLS_1_0_ONLY, Script, ScriptedReply, StartTls, Then
from tests.fakes.waiting import patient, until

AUTHORITY = Authority()
MESSAGE = b"Subject: hello\r\n\r\n.a line with a dot\r\nend\r\n"


def client_context(*, verify: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=AUTHORITY.ca_pem.decode())
    context.hostname_checks_common_name = False
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def send(mx: MxServer, *, tls: ssl.SSLContext | None, name: str = "mx.example.test") -> None:
    client = aiosmtplib.SMTP(
        hostname=mx.address, port=mx.port, start_tls=False, use_tls=False, timeout=patient(30)
    )
    async with client:
        if tls is not None:
            await client.starttls(server_hostname=name, tls_context=tls)
        await client.mail("a@example.org")
        await client.rcpt("b@example.net")
        await client.data(MESSAGE)


@pytest.mark.parametrize("kind", Kind)
async def test_only_a_good_certificate_and_a_wildcard_of_one_label_are_verified(kind):
    async with MxServer(Script(certificate=kind), authority=AUTHORITY) as mx:
        if kind in (Kind.GOOD, Kind.WILDCARD):
            await send(mx, tls=client_context())
        else:
            with pytest.raises((ssl.SSLError, aiosmtplib.SMTPException, OSError)):
                await send(mx, tls=client_context())


@pytest.mark.parametrize("kind", Kind)
async def test_any_certificate_serves_a_client_that_does_not_verify(kind):
    context = client_context(verify=False)
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with MxServer(Script(certificate=kind), authority=AUTHORITY) as mx:
        await send(mx, tls=context)
        (message,) = mx.messages
    assert message.in_tls
    assert message.content == MESSAGE
    assert message.sni == "mx.example.test"
    assert b"MAIL" not in mx.connections[0].clear
    assert b"MAIL" in mx.connections[0].in_tls


async def test_a_host_of_tls_1_0_only_talks_to_a_client_of_that_age():
    context = client_context(verify=False)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    async with MxServer(TLS_1_0_ONLY, authority=AUTHORITY) as mx:
        await send(mx, tls=context)
    assert mx.messages[0].tls_version == "TLSv1"


async def test_a_host_of_tls_1_0_only_refuses_a_modern_client():
    async with MxServer(TLS_1_0_ONLY, authority=AUTHORITY) as mx:
        with pytest.raises((ssl.SSLError, aiosmtplib.SMTPException, OSError)):
            await send(mx, tls=client_context(verify=False))
        # Debian's Python offers TLS 1.0, refuses the host's signature, and the host hears it later.
        async with asyncio.timeout(patient(10)):
            while not mx.connections[0].closed:
                await asyncio.sleep(0.01)
    assert mx.connections[0].tls_error


async def test_a_message_in_clear_is_noted_as_such():
    async with MxServer(Script(starttls=StartTls.ABSENT)) as mx:
        await send(mx, tls=None)
    assert not mx.messages[0].in_tls
    assert mx.messages[0].reverse_path == "a@example.org"
    assert mx.messages[0].forward_paths == ("b@example.net",)
    assert mx.connections[0].clear_verbs == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]


@pytest.mark.parametrize(
    "mode",
    [
        mode
        for mode in StartTls
        if mode not in (StartTls.OK, StartTls.ABSENT, StartTls.SILENCE, StartTls.HANG)
    ],
)
async def test_a_spoiled_starttls_leads_to_no_tls(mode):
    async with MxServer(Script(starttls=mode), authority=AUTHORITY) as mx:
        with pytest.raises((ssl.SSLError, aiosmtplib.SMTPException, OSError)):
            await send(mx, tls=client_context())
    assert not mx.messages
    assert not mx.connections[0].in_tls


async def test_a_hanging_handshake_keeps_the_bytes_apart():
    async with MxServer(Script(starttls=StartTls.HANG)) as mx:
        reader, writer = await asyncio.open_connection(mx.address, mx.port)
        await reader.readline()
        writer.write(b"STARTTLS\r\n")
        assert (await reader.readline()).startswith(b"220")
        writer.write(b"\x16\x03hello")
        await until(lambda: mx.connections[0].in_handshake == b"\x16\x03hello")
        writer.close()
        await writer.wait_closed()
    assert mx.connections[0].clear == b"STARTTLS\r\n"
    assert mx.connections[0].in_handshake == b"\x16\x03hello"


async def test_replies_follow_the_script_by_verb_and_by_turn():
    script = Script(
        replies={
            "RCPT": ("450 4.2.0 busy", "250 2.1.5 OK"),
            "RCPT <no@example.net>": "550 5.1.1 no such user",
            "MAIL": ScriptedReply(b"250-2.1.0 yes\r\n250 2.1.0 really\r\n"),
            "QUIT": ScriptedReply(None, then=Then.CLOSE),
        },
        replies_in_clear={"DATA": "530 5.7.0 Must issue a STARTTLS command first"},
    )
    async with MxServer(script) as mx:
        reader, writer = await asyncio.open_connection(mx.address, mx.port)
        writer.write(
            b"HELO me\r\nMAIL FROM:<a@b>\r\nRCPT TO:<x@example.net>\r\nRCPT TO:<x@example.net>\r\n"
            b"RCPT TO:<no@example.net>\r\nDATA\r\nQUIT\r\n"
        )
        said = (await reader.read()).decode().split("\r\n")
        writer.close()
        await writer.wait_closed()
    assert [line[:4] for line in said if line] == [
        "220 ",
        "250 ",
        "250-",
        "250 ",
        "450 ",
        "250 ",
        "550 ",
        "530 ",
    ]


async def test_message_needs_a_recipient_unless_the_script_accepts_data_without_one():
    said = b"HELO me\r\nRCPT TO:<x@example.net>\r\nMAIL FROM:<a@b>\r\nDATA\r\n.\r\nQUIT\r\n"
    expected = {"": "220 250 503 250 554 500 221", "DATA": "220 250 503 250 354 250 221"}
    for scripted, codes in expected.items():
        async with MxServer(Script(replies={scripted: "354 go on"} if scripted else {})) as mx:
            reader, writer = await asyncio.open_connection(mx.address, mx.port)
            writer.write(said)
            heard = (await reader.read()).decode().splitlines()
            writer.close()
            await writer.wait_closed()
        assert " ".join(line[:3] for line in heard) == codes
        assert mx.messages == []


async def test_each_connection_plays_the_next_script():
    async with MxServer(Script(replies={"GREETING": "421 4.3.2 later"}), Script()) as mx:
        with pytest.raises(aiosmtplib.SMTPException):
            await send(mx, tls=None)
        await send(mx, tls=None)
    assert len(mx.connections) == 2
    assert len(mx.messages) == 1


async def test_bytes_injected_behind_the_answer_to_starttls_come_in_one_segment():
    async with MxServer(Script(inject=b"250 injected\r\n")) as mx:
        reader, writer = await asyncio.open_connection(mx.address, mx.port)
        await reader.readline()
        writer.write(b"STARTTLS\r\n")
        assert await reader.read(1000) == b"220 2.0.0 ready\r\n250 injected\r\n"
        writer.close()
        await writer.wait_closed()


async def test_an_answer_may_end_in_a_reset():
    async with MxServer(
        Script(replies={"CONTENT": ScriptedReply("250 OK", then=Then.RESET)})
    ) as mx:
        with suppress(OSError, aiosmtplib.SMTPException):
            await send(mx, tls=None)
    assert len(mx.messages) == 1
    assert mx.connections[0].chunks[0][0] is Phase.CLEAR
