"""Two attacks from end to end: a message inside a message, and a relay for people who may not
relay.

What counts is what the mail hosts behind the relay saw.
"""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.rigs.ports import free_port
from tests.rigs.sandbox import Sandbox

# The published endings (SEC Consult, smtpsmug and smtp-smuggling tools), and a few more.
ENDINGS = [
    b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n.\r", b"\r.\n",
    b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\r\r\n", b"\n\n.\r\n", b"\r\n.\r\r\n", b"\r\r\n.\n",
]  # fmt: skip

SMUGGLED = (
    b"MAIL FROM:<evil@evil.example>\r\nRCPT TO:<victim@dest.example>\r\nDATA\r\n"
    b"Subject: evil\r\n\r\n.\r\n"
)


class Raw:
    """A client that says octets. From any address of loopback."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection(
            ("127.0.0.1", port), timeout=20, source_address=(source, 0)
        )
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Raw:
        assert self.reply() == 220
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def say(self, octets: bytes) -> int:
        self._socket.sendall(octets)
        return self.reply()

    def reply(self) -> int:
        """The code; 0 at the end of the connection."""
        while True:
            try:
                line = self._lines.readline()
            except ConnectionError:
                return 0
            if line[3:4] != b"-":
                return int(line[:3] or 0)


def smuggle(port: int, number: int, ending: bytes) -> int:
    """What the whole of it was answered."""
    with Raw(port) as client:
        for line in ("EHLO x", "MAIL FROM:<a@client.example>", f"RCPT TO:<r{number}@dest.example>"):
            assert client.say(line.encode() + b"\r\n") == 250
        assert client.say(b"DATA\r\n") == 354
        code = client.say(b"Subject: outer\r\n\r\n.first" + ending + SMUGGLED)
        assert client.say(b"QUIT\r\n") in (0, 221), "one reply to one message"
        return code


async def test_only_crlf_dot_crlf_ends_a_message_here_and_at_the_next_host(
    sandbox: Sandbox,
) -> None:
    mx = await sandbox.domain("dest.example")
    relay = await sandbox.prepare()
    modes = {mode: free_port() for mode in ("normalise", "line-end")}
    relay.config["listeners"] += [
        {"address": f"127.0.0.1:{port}", "bare_newline": mode} for mode, port in modes.items()
    ]
    await asyncio.to_thread(relay.start)
    for port in (relay.port, *modes.values()):
        for number, ending in enumerate(ENDINGS):
            code = await asyncio.to_thread(smuggle, port, number, ending)
            assert code == (550 if port == relay.port or b"\0" in ending else 250), ending
    taken = 2 * sum(b"\0" not in ending for ending in ENDINGS)
    await mx.wait_for_messages(taken)
    assert len(await sandbox.attempts("r0@dest.example", 2)) == 2
    assert len(mx.messages) == taken, "one message came of each"
    for message in mx.messages:
        assert message.reverse_path == "a@client.example"
        assert (
            message.content.count(b"\r")
            == message.content.count(b"\n")
            == message.content.count(b"\r\n")
        )
        assert b"MAIL FROM:<evil@evil.example>" in message.content, "it is text"
    for connection in mx.connections:
        assert "evil" not in " ".join(line for _, line in connection.commands)
        sent = connection.clear + connection.in_tls
        assert sent.count(b"\r\n.\r\n") == len(connection.messages)
        assert not any(bad in sent for bad in (b"\n.\n", b"\r.\r", b"\n.\r\r", b"\r\n.\r\r"))


# --- relaying -------------------------------------------------------------------------------------

# As nmap's smtp-open-relay has them; OUR is a domain whose mail host is known, EVIL the one meant.
FORMS = [
    "victim@EVIL",
    "victim%EVIL@[127.0.0.1]",
    "victim%EVIL@OUR",
    '"victim@EVIL"',
    '"victim%EVIL"',
    "victim@EVIL@[127.0.0.1]",
    '"victim@EVIL"@[127.0.0.1]',
    "victim@EVIL@OUR",
    '"victim@EVIL"@OUR',
    "@[127.0.0.1]:victim@EVIL",
    "@OUR:victim@EVIL",
    "EVIL!victim",
    "EVIL!victim@[127.0.0.1]",
    "EVIL!victim@OUR",
]
STRANGE = [
    "=?utf-8?q?a=0d=0aRCPT_TO=3a=3cvictim=40EVIL=3e?=@OUR",
    "a@=?utf-8?q?EVIL=3e?=.OUR",
    "=?us-ascii?q?victim=40EVIL=3E?=@OUR",
    "victim@EVIL\\@OUR",
    "a> RCPT TO:<victim@EVIL",
    "a@OUR> ORCPT=rfc822;x\rRCPT TO:<victim@EVIL",
    "a@OUR\0@EVIL",
    "(victim@EVIL)a@OUR",
    "a(victim@EVIL)@OUR",
    "a@OUR,victim@EVIL",
    "a@OUR;victim@EVIL",
    "a@OUR victim@EVIL",
    "victim@EVIL#@OUR",
    "a@OUR\uff20EVIL",
    "a@OUR\u3002EVIL",
    "a@[OUR]",
    "a@OUR..",
    "@OUR,@EVIL:a@OUR",
]
SENDERS = ["<>", "<a@EVIL>", "<a@OUR>", "<a@[127.0.0.1]>"]


def knock(port: int, source: str, sender: str, paths: list[str]) -> dict[str, int]:
    """The answer to each forward-path; what is accepted is sent."""
    codes = {}
    for path in paths:
        with Raw(port, source) as client:
            assert client.say(b"EHLO x\r\n") == 250
            utf8 = b"" if path.isascii() else b" SMTPUTF8"
            if client.say(f"MAIL FROM:{sender}".encode() + utf8 + b"\r\n") != 250:
                continue
            codes[path] = client.say(b"RCPT TO:<" + path.encode() + b">\r\n")
            if client.say(b"DATA\r\n") == 354:
                client.say(b"Subject: x\r\n\r\n.\r\n")
    return codes


@pytest.mark.parametrize("is_listed", [False, True], ids=["a stranger", "a client"])
async def test_no_path_leads_to_a_domain_that_was_not_authorised(
    sandbox: Sandbox, is_listed: bool
) -> None:
    ours, evil = await sandbox.domain("our.example"), await sandbox.domain("evil.example")
    relay = await sandbox.start(access={"networks": ["127.0.0.1/32"]})
    paths = [
        path.replace("OUR", "our.example").replace("EVIL", "evil.example")
        for path in FORMS + STRANGE
    ]
    source = "127.0.0.1" if is_listed else "127.0.0.66"
    for sender in SENDERS:
        sender = sender.replace("OUR", "our.example").replace("EVIL", "evil.example")
        codes = await asyncio.to_thread(knock, relay.port, source, sender, paths)
        assert codes
        if not is_listed:
            assert all(code >= 500 or code == 0 for code in codes.values()), codes
            continue
        accepted = {path for path, code in codes.items() if code == 250}
        # Who may relay may write to the other domain, and a source route is stripped (RFC 5321
        # §4.1.1.3).
        plain = {"victim@evil.example", "@our.example:victim@evil.example"}
        assert accepted <= plain | {
            "victim@evil.example#@our.example",
            "@our.example,@evil.example:a@our.example",
            # IDNA takes U+3002 for a dot, so this is a domain below evil.example to the relay.
            "a@our.example\u3002evil.example",
        }
        assert plain <= accepted
    await sandbox.submit("a@our.example", "last@our.example")
    await sandbox.attempts("last@our.example")
    for mx, domain in ((ours, "our.example"), (evil, "evil.example")):
        said = [
            line
            for each in mx.connections
            for _, line in each.commands
            if line.upper().startswith("RCPT")
        ]
        assert all(line.endswith(f"@{domain}>") and line.count("@") == 1 for line in said), said
    if not is_listed:
        assert evil.connections == []
        assert {message.forward_paths for message in ours.messages} == {("last@our.example",)}
