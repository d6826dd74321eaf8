"""Next hops of the operator's own: credentials, TLS from the first byte; and hosts with odd
manners.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

import pytest

from relay.mail.outcome import Bounced, Code, Deferred, Delivered, DowngradeReason
from relay.route.next_hop import Credentials, Host, NextHop, TlsMode
from relay.route.security import OnTlsUnmet
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.mail import entry
from tests.unit.deliver.conftest import QUICK, milliseconds

LOGIN = Credentials("app", "open sesame")
HOP = NextHop("hop", (("hop.example",),))
WAYS = [(False, False), (False, True), (True, False), (True, True)]


def words(said: bytes) -> str:
    """All that base64 hides, in clear."""
    found = []
    for word in said.split():
        try:
            found.append(base64.b64decode(word, validate=True).decode("latin-1"))
        except ValueError:
            continue
    return " ".join(found)


@pytest.mark.parametrize(
    "mechanisms", ["AUTH PLAIN", "AUTH LOGIN", "AUTH GSSAPI LOGIN PLAIN", "AUTH=PLAIN"]
)
@pytest.mark.parametrize(("require", "skip"), WAYS)
@pytest.mark.parametrize("mode", list(TlsMode))
async def test_credentials_are_sent_in_verified_tls_before_the_message(
    rig, mechanisms, require, skip, mode
):
    script = Script(offers=(mechanisms, "PIPELINING"), implicit_tls=mode is TlsMode.IMPLICIT)
    mx = await rig.mx(script, credentials=LOGIN, tls=mode)
    outcome = await rig.send(entry(require=require, skip=skip))
    assert isinstance(outcome, Delivered)
    assert outcome.session is not None
    assert outcome.session.certificate_verified
    (connection,) = mx.connections
    assert set(connection.clear_verbs) <= {"EHLO", "STARTTLS"}
    assert "open sesame" in words(connection.in_tls)
    assert connection.verbs.index("AUTH") < connection.verbs.index("MAIL")


@pytest.mark.parametrize(("require", "skip"), WAYS)
@pytest.mark.parametrize(
    "script",
    [
        Script(certificate=Kind.EXPIRED),
        Script(certificate=Kind.WRONG_NAME),
        Script(starttls=StartTls.ABSENT),
        Script(starttls=StartTls.REFUSED_454),
        Script(starttls=StartTls.GARBAGE),
        Script(implicit_tls=True, certificate=Kind.EXPIRED),
    ],
)
async def test_credentials_are_never_sent_without_verified_tls(rig, require, skip, script):
    mode = TlsMode.IMPLICIT if script.implicit_tls else TlsMode.STARTTLS
    script = replace(script, offers=("AUTH PLAIN",))
    mx = await rig.mx(script, credentials=LOGIN, tls=mode)
    outcome = await rig.send(entry(require=require, skip=skip))
    assert isinstance(outcome, Deferred)
    assert outcome.tls_unmet
    for connection in mx.connections:
        assert set(connection.verbs) <= {"EHLO", "HELO", "STARTTLS", "QUIT"}


@pytest.mark.parametrize(("require", "skip"), WAYS)
@pytest.mark.parametrize("credentials", [None, LOGIN])
async def test_message_is_returned_for_lack_of_tls_only_where_no_login_asks_for_tls(
    rig, require, skip, credentials
):
    await rig.mx(Script(starttls=StartTls.ABSENT), credentials=credentials)
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    outcome = await rig.send(entry(require=require, skip=skip))
    if require and credentials is None:
        assert isinstance(outcome, Bounced)
        assert outcome.status == "5.7.4"
    else:
        assert isinstance(outcome, Deferred if credentials else Delivered)


@pytest.mark.parametrize(
    ("script", "code", "status", "told"),
    [
        (
            Script(offers=("AUTH PLAIN",), replies={"AUTH": "535 5.7.8 wrong"}),
            535,
            "4.7.8",
            "5.7.8 wrong",
        ),
        (
            Script(offers=("AUTH LOGIN",), replies={"AUTH": "454 4.7.0 later"}),
            454,
            "4.7.0",
            "4.7.0 later",
        ),
        (Script(offers=("AUTH GSSAPI",)), Code.NONE, "4.7.0", "neither AUTH PLAIN nor LOGIN"),
        (Script(offers=()), Code.NONE, "4.7.0", "AUTH is not offered"),
        (
            Script(offers=("AUTH PLAIN",), offers_in_tls=()),
            Code.NONE,
            "4.7.0",
            "AUTH is not offered",
        ),
    ],
)
async def test_credentials_that_are_not_taken_are_no_reason_to_return_the_mail(
    rig, script, code, status, told
):
    await rig.mx(script, credentials=LOGIN)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.code, outcome.status) == (code, status)
    assert told in outcome.description
    assert "sesame" not in outcome.description + outcome.message


def test_a_password_is_in_no_text_about_a_host():
    assert "sesame" not in repr(LOGIN)


@pytest.mark.parametrize(
    ("kind", "require", "skip", "delivered"),
    [
        (Kind.GOOD, False, False, True),
        (Kind.GOOD, True, False, True),
        (Kind.EXPIRED, False, True, True),
        (Kind.EXPIRED, True, True, True),
        (Kind.EXPIRED, True, False, False),
        # There is no clear text to fall back on.
        (Kind.EXPIRED, False, False, False),
    ],
)
async def test_implicit_tls_sends_nothing_in_clear(rig, kind, require, skip, delivered):
    mx = await rig.mx(Script(implicit_tls=True, certificate=kind), tls=TlsMode.IMPLICIT)
    outcome = await rig.send(entry(require=require, skip=skip))
    assert isinstance(outcome, Delivered) is delivered
    assert len(mx.messages) == delivered
    assert outcome.session is not None
    assert outcome.session.downgrade is None
    assert all(connection.clear == b"" for connection in mx.connections)
    if delivered:
        assert (outcome.session.tls, outcome.session.certificate_verified) == (True, not skip)
        assert mx.messages[0].sni == mx.name
    else:
        assert (outcome.status, len(mx.connections)) == ("4.7.5", 1)


async def test_clear_reply_on_a_port_with_implicit_tls_is_ignored(rig):
    mx = await rig.mx(Script(), tls=TlsMode.IMPLICIT)
    outcome = await rig.send(entry())
    assert (outcome.status, mx.messages) == ("4.7.5", [])


@pytest.mark.parametrize("require", [False, True])
async def test_host_that_closes_at_starttls_gets_the_message_over_a_new_connection(rig, require):
    said: list[list[str]] = []
    replies = {
        "EHLO": "250-mx\r\n250 STARTTLS",
        "STARTTLS": "421 4.7.0 TLS is out",
        "DATA": "354 go on",
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verbs: list[str] = []
        said.append(verbs)
        writer.write(b"220 mx\r\n")
        async for line in reader:
            verbs.append(line.decode().split()[0])
            writer.write(replies.get(verbs[-1], "250 2.0.0 OK").encode() + b"\r\n")
            if verbs[-1] == "DATA":
                await reader.readuntil(b"\r\n.\r\n")
                writer.write(b"250 2.0.0 OK\r\n")
            if verbs[-1] in ("STARTTLS", "QUIT"):
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    rig.hosts.append(Host("mx.dest.example", *server.sockets[0].getsockname()[:2]))
    outcome = await rig.send(entry(require=require))
    server.close()
    assert outcome.session is not None
    if require:
        assert (outcome.status, outcome.code) == ("4.7.4", 421)
        assert said == [["EHLO", "STARTTLS"]]
        return
    assert isinstance(outcome, Delivered)
    assert outcome.session.downgrade is not None
    assert outcome.session.downgrade.reason is DowngradeReason.REFUSED
    assert said[0] == ["EHLO", "STARTTLS"]
    assert said[1][:4] == ["EHLO", "MAIL", "RCPT", "DATA"]


async def test_a_refusal_inside_tls_that_speaks_of_tls_is_a_refusal(rig):
    await rig.mx(Script(replies={"MAIL": "550 5.7.1 TLS with a client certificate is required"}))
    outcome = await rig.send(entry())
    assert isinstance(outcome, Bounced)
    assert outcome.status == "5.7.1"


async def test_dead_kept_connection_closes_the_others_to_that_host(rig):
    dying = Script(
        starttls=StartTls.ABSENT,
        replies={
            "MAIL": ("250 OK", ScriptedReply(None, then=Then.CLOSE)),
            "CONTENT": ScriptedReply("250 OK", delay=0.1),
        },
    )
    mx = await rig.mx(dying, dying, dying, Script(starttls=StartTls.ABSENT))
    await asyncio.gather(*(rig.send(entry()) for _ in range(3)))
    assert len(rig.attempt._pool) == 3
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(rig.attempt._pool) == 1
    await asyncio.sleep(0.05)
    assert [connection.verbs.count("MAIL") for connection in mx.connections] in (
        [1, 1, 2, 1],
        [1, 2, 1, 1],
        [2, 1, 1, 1],
    )


async def test_the_time_for_the_last_answer_begins_when_the_host_has_read_all(rig):
    content = b"Subject: slow\r\n\r\n" + b"0123456789abcdef" * 12_000 + b"\r\n"
    mx = await rig.mx(Script(starttls=StartTls.ABSENT, read_bytes_per_second=100_000))
    rig.delivery["timeouts"] = replace(
        QUICK, data_block=milliseconds(900), final_reply=milliseconds(200)
    )
    outcome = await rig.send(entry(content=content))
    assert isinstance(outcome, Delivered)
    assert len(mx.messages) == 1
    assert outcome.session is not None
    assert outcome.session.seconds > 1


@pytest.mark.parametrize("name", ["127.0.1.1", "bad..name", "x" * 64 + ".example", ".example"])
@pytest.mark.parametrize(("require", "skip"), WAYS)
async def test_a_name_that_no_certificate_can_be_for_never_counts_as_verified(
    rig, name, require, skip
):
    mx = await rig.mx(Script(certificate=Kind.IP_SAN), name="mx.dest.example")
    rig.hosts[:] = [replace(rig.hosts[0], name=name)]
    outcome = await rig.send(entry(require=require, skip=skip))
    assert outcome.session is not None
    assert not outcome.session.certificate_verified
    if require and not skip:
        assert (outcome.status, mx.messages) == ("4.7.5", [])


async def test_next_hop_with_a_dead_address_is_reached_at_its_other_one(rig):
    await rig.mx(name="hop.example", hop=HOP)
    good = await rig.mx(name="hop.example", hop=HOP)
    await rig.servers[0].close()
    for number in range(3):
        assert isinstance(await rig.send(entry()), Delivered), number
    assert len(good.messages) == 3
