"""REQUIRETLS from the client to the host, and the bounce where no host offers it (RFC 8689)."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import aiosmtplib
import pytest

from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script
from tests.fakes.waiting import patient
from tests.rigs.sandbox import Sandbox

PASSES_ON = Script(
    offers=("PIPELINING", "8BITMIME", "DSN", "REQUIRETLS"), replies={"GREETING": "220 mx ESMTP"}
)
CONTENT = (
    b"From: a@sender.example\r\nTo: b@dest.example\r\nSubject: private\r\n\r\nsecret words\r\n"
)


async def start(sandbox: Sandbox, directory: Path) -> None:
    leaf = sandbox.authority.leaf("relay.test")
    pem = directory / "listener.pem"
    pem.write_bytes(leaf.chain_pem + leaf.key_pem)
    relay = await sandbox.prepare()
    relay.config["listeners"][0] |= {"tls": "starttls", "certificate": str(pem), "key": str(pem)}
    await asyncio.to_thread(relay.start)


async def submit(sandbox: Sandbox, *options: str, content: bytes = CONTENT) -> str:
    """One message, in TLS; the reply to its content."""
    assert sandbox.relay is not None
    trusted = ssl.create_default_context(cafile=str(sandbox.directory / "ca.pem"))
    trusted.check_hostname = False
    client = aiosmtplib.SMTP(
        hostname="127.0.0.1", port=sandbox.relay.port, start_tls=False, timeout=patient(30)
    )
    async with client:
        await client.ehlo()
        assert "requiretls" not in client.esmtp_extensions
        await client.starttls(tls_context=trusted)
        await client.ehlo()
        assert "requiretls" in client.esmtp_extensions
        await client.mail("a@sender.example", options=list(options))
        await client.rcpt("b@dest.example")
        return (await client.data(content)).message


async def signed_domain(sandbox: Sandbox, domain: str, *scripts: Script) -> MxServer:
    sandbox.dns.sign(domain)
    return await sandbox.domain(domain, *scripts)


async def test_requiretls_goes_from_client_to_host_and_the_log_says_so(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    mx = await signed_domain(sandbox, "dest.example", PASSES_ON)
    await start(sandbox, tmp_path)
    await submit(sandbox, "REQUIRETLS")
    (event,) = await sandbox.attempts("b@dest.example")
    assert event["event"] == "delivered"
    status, policy = event["delivery-status"], event["policy"]
    assert (status["requiretls"], status["certificate-verified"]) == (True, True)
    assert status["mx-secure"] is True
    assert (policy["requiretls"], policy["require-tls"], policy["skip-verification"]) == (
        True,
        True,
        False,
    )
    (message,) = mx.messages
    assert message.mail.endswith("REQUIRETLS")
    assert b"secret words" not in b"".join(connection.clear for connection in mx.connections)


async def test_bounce_for_lack_of_requiretls_returns_headers_only(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    refuses = await signed_domain(sandbox, "dest.example", Script())
    sender = await signed_domain(sandbox, "sender.example", PASSES_ON)
    await start(sandbox, tmp_path)
    await submit(sandbox, "REQUIRETLS", "RET=FULL")
    (event,) = await sandbox.attempts("b@dest.example")
    assert (event["event"], event["severity"]) == ("failed", "permanent")
    assert event["delivery-status"]["enhanced-code"] == "5.7.30"
    assert refuses.messages == []
    await sender.wait_for_messages(1, timeout=patient(20))
    (report,) = sender.messages
    assert report.mail.startswith("FROM:<>")
    assert report.mail.endswith("REQUIRETLS")
    assert report.in_tls
    assert b"Subject: private" in report.content
    assert b"secret words" not in report.content
    assert b"5.7.30" in report.content


async def test_requiretls_of_a_message_survives_a_crash(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.dns.sign("dest.example")
    await start(sandbox, tmp_path)
    sandbox.dns.mx("dest.example", (10, "mx.dest.example"))  # no address yet
    await submit(sandbox, "REQUIRETLS")
    assert sandbox.relay is not None
    await asyncio.to_thread(sandbox.relay.kill)
    mx = await sandbox.domain("dest.example", PASSES_ON)
    await asyncio.to_thread(sandbox.relay.start)
    await asyncio.to_thread(sandbox.relay.run, "queue", "retry", "--all")
    await mx.wait_for_messages(1, timeout=patient(30))
    assert mx.messages[0].mail.endswith("REQUIRETLS")


@pytest.mark.parametrize(
    ("field", "event", "waived"),
    [(b"TLS-Required: No\r\n", "delivered", "tls-required-no"), (b"", "failed", None)],
)
async def test_tls_required_no_delivers_where_tlsa_records_match_nothing(
    sandbox: Sandbox, tmp_path: Path, field: bytes, event: str, waived: str | None
) -> None:
    mx = await signed_domain(sandbox, "dest.example")
    sandbox.dns.tlsa(mx.name, "3 1 1 " + "00" * 32, port=mx.port)
    await start(sandbox, tmp_path)
    await submit(sandbox, content=field + CONTENT)
    (found,) = await sandbox.attempts("b@dest.example")
    assert found["event"] == event
    assert found["delivery-status"]["waived"] == waived
    assert found["policy"]["tls-required-no"] is bool(field)
    if field:
        assert mx.messages[0].content.count(b"TLS-Required: No") == 1  # it is passed on


async def test_explain_predicts_requiretls_and_tls_required_no(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    await signed_domain(sandbox, "dest.example", PASSES_ON)
    await sandbox.domain("other.example", PASSES_ON)
    await start(sandbox, tmp_path)
    relay = sandbox.relay
    assert relay is not None

    async def explain(domain: str, *options: str) -> str:
        question = ("explain", "--from", "a@sender.example", "--to", f"b@{domain}", *options)
        return (await asyncio.to_thread(relay.run, *question)).stdout

    sure = await explain("dest.example", "--requiretls")
    assert "the host must offer REQUIRETLS inside TLS" in sure
    assert "bounced 5.7.10" in sure
    unsure = await explain("other.example", "--requiretls")
    assert "not connected to: it has no name that is known for sure" in unsure
    assert "tls-required-no:" in await explain("dest.example", "--tls-required-no")
