"""Clients as people have them: plain, with TLS, with AUTH; what they send arrives byte for byte.

(Postfix is in test_postfix_chain.py.) One relay serves them all, with a listener of each kind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import smtplib
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from relay.sandbox.mx import MxServer
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port
from tests.rigs.sandbox import Sandbox

CLIENTS = Path(__file__).parents[1] / "clients"
USER, PASSWORD, SENDER = "app", "s3cret", "alice@client.example"
PROTOCOLS = {"auth": "ESMTPSA", "tls": "ESMTPS", "helo": "SMTP"}
LETTER = (
    "From: Alice <alice@client.example>\r\nTo: Bob <bob@dest.example>\r\n"
    "Subject: =?utf-8?Q?Gr=C3=BC=C3=9Fe?=\r\n"
    "Date: Fri, 20 Nov 2026 08:00:00 +0000\r\nMessage-ID: <1@client.example>\r\n"
    "MIME-Version: 1.0\r\n"
    "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
    ".a dot\r\n..two\r\n.\r\n \r\nGrüße, 日本\r\nFrom here\r\n" + "long " * 190 + "\r\n\r\nend\r\n"
).encode()


@dataclass(frozen=True)
class Bench:
    """The relay, and its ports: in clear; with STARTTLS and AUTH; in TLS from the start, AUTH a
    must.
    """

    directory: Path
    mx: MxServer
    plain: int
    starttls: int
    implicit: int

    @property
    def ca(self) -> str:
        return str(self.directory / "ca.pem")

    @property
    def letter(self) -> str:
        return str(self.directory / "letter")

    async def run(self, *command: str, stdin: bytes = b"", cwd: Path | None = None) -> None:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd or self.directory,
        )
        told, _ = await asyncio.wait_for(process.communicate(stdin), patient(60))
        assert process.returncode == 0, f"{command}:\n{told.decode(errors='replace')}"

    async def assert_all_have_the_letter(self, *names: str) -> None:
        """Each of them has the letter once, unchanged, under one Received field, which names the
        kind of session that the recipient's name tells.
        """
        await self.mx.wait_for_messages(len(names))
        assert {message.forward_paths for message in self.mx.messages} == {
            (_to(name),) for name in names
        }
        assert len(self.mx.messages) == len(names)
        for message in self.mx.messages:
            name = message.forward_paths[0].partition("@")[0]
            received, _, letter = message.content.partition(b"\r\nFrom: Alice")
            assert b"From: Alice" + letter == LETTER, name
            assert message.reverse_path == SENDER
            how = (
                "ESMTPSA"
                if "auth" in name
                else "ESMTPS"
                if "tls" in name
                else "SMTP"
                if "helo" in name
                else "ESMTP"
            )
            assert received.startswith(b"Received: from "), name
            assert received.count(b"\r\n\t") == received.count(b"\r\n"), name
            assert f" with {how} id " in received.decode(), name


def _to(name: str) -> str:
    return f"{name}@dest.example"


def _go_without(reason: str) -> None:
    """As for the marker `needs`: skipped, and failed where nothing may be."""
    if os.environ.get("RELAY_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
async def bench(sandbox: Sandbox) -> Bench:
    mx = await sandbox.domain("dest.example")
    leaf = sandbox.authority.leaf("localhost")
    (sandbox.directory / "tls.pem").write_bytes(leaf.chain_pem + leaf.key_pem)
    (sandbox.directory / "letter").write_bytes(LETTER)
    relay = await sandbox.prepare()
    starttls, implicit = free_port(), free_port()
    relay.config["listeners"] += [
        {
            "address": f"127.0.0.1:{starttls}",
            "tls": "starttls",
            "auth": "optional",
            "certificate": "tls.pem",
        },
        {
            "address": f"127.0.0.1:{implicit}",
            "tls": "implicit",
            "auth": "required",
            "certificate": "tls.pem",
        },
    ]
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    relay.config["access"] = {"users": {USER: {"password": cheap.hash(PASSWORD)}}}
    await asyncio.to_thread(relay.start)
    return Bench(sandbox.directory, mx, relay.port, starttls, implicit)


@pytest.mark.needs("swaks")
async def test_swaks_sends_mail_through_the_relay(bench: Bench) -> None:
    async def swaks(name: str, port: int, *options: str) -> None:
        await bench.run(
            *("swaks", "--silent", "2", "--server", f"localhost:{port}", "--ehlo", "swaks.example"),
            *("--from", SENDER, "--to", _to(name), "--data", "@letter"),
            *options,
        )

    # It puts CRLF.CRLF behind whatever it is given.
    (bench.directory / "letter").write_bytes(LETTER.removesuffix(b"\r\n"))
    login = ("--auth-user", USER, "--auth-password", PASSWORD)
    verified = ("--tls-verify", "--tls-ca-path", bench.ca)
    await swaks("swaks", bench.plain)
    await swaks("swaks-helo", bench.plain, "--protocol", "SMTP")
    await swaks("swaks-pipelining", bench.plain, "--pipeline")
    await swaks("swaks-tls", bench.starttls, "--tls", *verified)
    await swaks("swaks-auth-plain", bench.starttls, "--tls", "--auth", "PLAIN", *login)
    await swaks(
        "swaks-auth-login", bench.implicit, "--tls-on-connect", "--auth", "LOGIN", *login, *verified
    )
    await bench.assert_all_have_the_letter(
        "swaks",
        "swaks-helo",
        "swaks-pipelining",
        "swaks-tls",
        "swaks-auth-plain",
        "swaks-auth-login",
    )


@pytest.mark.needs("curl")
async def test_curl_sends_mail_through_the_relay(bench: Bench) -> None:
    async def curl(name: str, url: str, *options: str) -> None:
        letter = ("--mail-from", SENDER, "--mail-rcpt", _to(name), "--upload-file", bench.letter)
        await bench.run(
            "curl", "-sS", "--max-time", "30", "--cacert", bench.ca, *letter, *options, url
        )

    user = ("--user", f"{USER}:{PASSWORD}")
    await curl("curl", f"smtp://localhost:{bench.plain}/curl.example")
    await curl("curl-tls", f"smtp://localhost:{bench.starttls}", "--ssl-reqd")
    await curl("curl-auth", f"smtp://localhost:{bench.starttls}", "--ssl-reqd", *user)
    await curl(
        "curl-auth-login",
        f"smtps://localhost:{bench.implicit}",
        "--login-options",
        "AUTH=LOGIN",
        *user,
    )
    await bench.assert_all_have_the_letter("curl", "curl-tls", "curl-auth", "curl-auth-login")


@pytest.mark.needs("msmtp")
async def test_msmtp_sends_mail_through_the_relay(bench: Bench) -> None:
    async def msmtp(name: str, port: int, *options: str) -> None:
        # It reads lines as a program on UNIX writes them.
        letter = LETTER.replace(b"\r\n", b"\n")
        command = (
            "msmtp",
            "--file=/dev/null",
            "--host=localhost",
            f"--port={port}",
            f"--from={SENDER}",
        )
        await bench.run(*command, f"--tls-trust-file={bench.ca}", *options, _to(name), stdin=letter)

    auth = ("--tls=on", "--auth=plain", f"--user={USER}", f"--passwordeval=echo {PASSWORD}")
    await msmtp("msmtp", bench.plain)
    await msmtp("msmtp-tls", bench.starttls, "--tls=on")
    await msmtp("msmtp-auth", bench.starttls, *auth)
    await msmtp("msmtp-auth-implicit", bench.implicit, "--tls-starttls=off", *auth)
    await bench.assert_all_have_the_letter(
        "msmtp", "msmtp-tls", "msmtp-auth", "msmtp-auth-implicit"
    )


async def test_smtplib_sends_mail_through_the_relay(bench: Bench) -> None:
    trust = ssl.create_default_context(cafile=bench.ca)

    def send(name: str, session: smtplib.SMTP, *, tls: bool = False, auth: bool = False) -> None:
        with session:
            if tls:
                session.starttls(context=trust)
            if auth:
                session.login(USER, PASSWORD)
            session.sendmail(SENDER, [_to(name)], LETTER, ["BODY=8BITMIME"])

    def send_all() -> None:
        send("smtplib", smtplib.SMTP("localhost", bench.plain, timeout=patient(20)))
        send(
            "smtplib-tls", smtplib.SMTP("localhost", bench.starttls, timeout=patient(20)), tls=True
        )
        send(
            "smtplib-auth",
            smtplib.SMTP("localhost", bench.starttls, timeout=patient(20)),
            tls=True,
            auth=True,
        )
        implicit = smtplib.SMTP_SSL("localhost", bench.implicit, timeout=patient(20), context=trust)
        send("smtplib-auth-implicit", implicit, auth=True)

    await asyncio.to_thread(send_all)
    await bench.assert_all_have_the_letter(
        "smtplib", "smtplib-tls", "smtplib-auth", "smtplib-auth-implicit"
    )


@pytest.mark.needs("perl")
async def test_net_smtp_of_perl_sends_mail_through_the_relay(bench: Bench) -> None:
    modules = ["perl", "-MIO::Socket::SSL", "-MAuthen::SASL", "-e", "1"]
    if subprocess.run(modules, capture_output=True, check=False).returncode:
        _go_without("libio-socket-ssl-perl and libauthen-sasl-perl are not installed")

    async def perl(name: str, port: int, user: str, password: str, tls: str) -> None:
        script = str(CLIENTS / "net_smtp.pl")
        more = (SENDER, _to(name), user, password, tls)
        await bench.run("perl", script, "localhost", str(port), bench.ca, *more, stdin=LETTER)

    await perl("perl", bench.plain, "", "", "none")
    await perl("perl-tls", bench.starttls, "", "", "starttls")
    await perl("perl-auth", bench.starttls, USER, PASSWORD, "starttls")
    await perl("perl-auth-implicit", bench.implicit, USER, PASSWORD, "ssl")
    await bench.assert_all_have_the_letter("perl", "perl-tls", "perl-auth", "perl-auth-implicit")


@pytest.mark.needs("node", "npm")
async def test_nodemailer_sends_mail_through_the_relay(bench: Bench, tmp_path: Path) -> None:
    for name in ("package.json", "send.js"):
        shutil.copy(CLIENTS / "nodemailer" / name, tmp_path)
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund"]
    done = await asyncio.to_thread(
        subprocess.run,
        install,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patient(90),
        check=False,
    )
    if done.returncode:
        _go_without(f"nodemailer could not be installed: {done.stderr[-200:]}")

    def way(name: str, port: int, **transport: object) -> dict[str, object]:
        trust = {"ca": Path(bench.ca).read_text()}
        return {
            "transport": {"host": "localhost", "port": port, "tls": trust, **transport},
            "sender": SENDER,
            "recipient": _to(name),
            "file": bench.letter,
        }

    auth = {"user": USER, "pass": PASSWORD}
    ways = [
        way("nodemailer", bench.plain, ignoreTLS=True),
        way("nodemailer-tls", bench.starttls, requireTLS=True),
        way("nodemailer-auth", bench.starttls, requireTLS=True, auth=auth),
        way("nodemailer-auth-login", bench.implicit, secure=True, auth=auth, authMethod="LOGIN"),
    ]
    await bench.run("node", "send.js", stdin=json.dumps(ways).encode(), cwd=tmp_path)
    await bench.assert_all_have_the_letter(
        "nodemailer", "nodemailer-tls", "nodemailer-auth", "nodemailer-auth-login"
    )
