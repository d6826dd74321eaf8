"""The listener under clients that misbehave, vanish, flood, and never read."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import ssl
import struct
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import CHUNK_BYTES, STAGE_BYTES, QueueFull, SpoolError
from relay.receive import connection as connection_module
from relay.receive import protocol as protocol_module
from relay.receive.access import Access, User
from relay.receive.limits import Limits
from relay.receive.listener import start_listener
from relay.receive.spec import (
    BareNewline,
    ListenerAuth,
    ListenerSpec,
    ListenerTls,
    TcpAddress,
    UnixAddress,
)
from relay.route.security import TlsVersion
from relay.submit.certificates import CertificateError
from tests.fakes.client import Client
from tests.fakes.store import FakeStore
from tests.fakes.waiting import patient
from tests.unit.receive.conftest import USERS, Desk, hashed

MIB = 1024 * 1024
SMALL = b"Subject: x\r\n\r\nhello\r\n.\r\n"
LOCAL = ListenerSpec("127.0.0.1:0")


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def settled(desk: Desk) -> None:
    """The clients have gone, and what was to be done for them is done."""
    for client in desk.clients:
        await client.close()
    for _ in range(200):
        if all(listener.is_quiet for listener in desk.listeners):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("something is still going on")


async def send_for_ever(client: Client, octets: bytes) -> None:
    async with asyncio.timeout(patient(10)):
        while True:
            await client.send(octets)


async def talk_for_ever(deaf: socket.socket) -> None:
    async with asyncio.timeout(patient(10)):
        while True:
            await asyncio.get_running_loop().sock_sendall(deaf, b"EHLO x\r\n" * 1000)


# --- content ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 1000, CHUNK_BYTES - 300, CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 5 * MIB]
)
async def test_a_message_of_any_size_arrives_byte_for_byte(desk, size):
    body = bytes(range(1, 10)) + bytes(range(14, 256))
    body = (body * (size // len(body) + 1))[:size] + b"\r\n"
    client = await desk.client()
    await client.begin()
    stuffed = (b"Subject: big\r\nX-Require-TLS: yes\r\n\r\n" + body).replace(b"\r\n.", b"\r\n..")
    assert (await client.data(stuffed + b".\r\n")).startswith("250 2.0.0")
    content = desk.store.contents[0]
    assert content.startswith(b"Received: from client.example ([127.0.0.1])\r\n")
    assert content.endswith(b"\r\nSubject: big\r\n\r\n" + body)
    message = desk.store.messages[0].message
    assert message.size_bytes == len(content)
    assert message.eight_bit == (size > 200)
    assert message.summary.subject == "big"
    assert desk.store.messages[0].recipients[0].settings.require_tls.value
    assert desk.store.largest_piece <= STAGE_BYTES
    assert len(desk.store.messages[0].content) <= STAGE_BYTES
    assert not desk.store.staged


@pytest.mark.parametrize("chunk", [CHUNK_BYTES, CHUNK_BYTES - 1, 3 * CHUNK_BYTES, 100_000])
async def test_a_large_message_comes_in_chunks(desk, chunk):
    content = b"Subject: big\r\n\r\n" + b"0123456789\r\n" * 100_000
    client = await desk.client()
    await client.begin()
    for start in range(0, len(content), chunk):
        piece = content[start : start + chunk]
        await client.send(b"BDAT %d\r\n" % len(piece) + piece)
        assert (await client.reply()).startswith("250 2.0.0 ")
    assert (await client.say("BDAT 0 LAST")).startswith("250 2.0.0 Ok: queued as ")
    assert desk.store.contents[0].endswith(content)


async def test_a_long_header_section_ends_where_it_ends_however_it_comes(desk):
    header = b"X-Filler: x\r\n" * 30_000
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    for piece in (header, b"\r", b"\n", b"X-Require-TLS: no\r\n", b"x" * MIB, b"\r\n.\r\n"):
        await client.send(piece)
        await asyncio.sleep(0.02)
    assert (await client.reply()).startswith("250")
    # What follows the empty line is body, and stays.
    assert desk.store.contents[0].endswith(
        header + b"\r\nX-Require-TLS: no\r\n" + b"x" * MIB + b"\r\n"
    )


async def test_accepted_message_resets_the_count_of_unproductive_commands(desk):
    client = await desk.client()
    await client.greet()
    for _ in range(60):
        await client.say("RSET")
        await client.say("MAIL FROM:<a@example.com>")
        await client.say("RCPT TO:<b@example.net>")
        assert (await client.data(SMALL)).startswith("250")


async def test_a_large_message_with_a_header_section_that_is_refused_leaves_nothing(desk):
    client = await desk.client()
    await client.begin()
    content = b"X-Require-TLS: perhaps\r\n\r\n" + b"x" * MIB + b"\r\n.\r\n"
    assert (await client.data(content)).startswith("554 5.6.0 ")
    assert (await client.say("MAIL FROM:<a@example.com>")).startswith("250")
    assert not desk.store.staged


async def test_a_large_message_with_a_flaw_at_its_end_leaves_nothing(desk):
    client = await desk.client()
    await client.begin()
    content = b"Subject: x\r\n\r\n" + b"x" * MIB + b"\nbare\r\n.\r\n"
    assert (await client.data(content)).startswith("550 5.5.2 ")
    await settled(desk)
    assert not desk.store.staged
    assert not desk.store.messages


async def test_a_header_section_without_end_is_refused(desk):
    client = await desk.client()
    await client.begin()
    content = b"Subject: x\r\n" * 200_000 + b"\r\n.\r\n"
    assert (await client.data(content)).startswith("552 5.3.4 ")
    assert (await client.say("NOOP")).startswith("250")


async def test_message_larger_than_its_size_parameter_and_the_limit_is_refused(desk):
    desk.limits = Limits(message_size_bytes=MIB)
    client = await desk.client()
    await client.greet()
    await client.say("MAIL FROM:<a@example.com> SIZE=10")
    await client.say("RCPT TO:<b@example.net>")
    assert (await client.data(b"A: b\r\n\r\n" + b"x" * MIB + b"\r\n.\r\n")).startswith("552 5.3.4 ")
    await settled(desk)
    assert not desk.store.staged


async def test_content_far_over_the_limit_is_cut_off(desk, monkeypatch):
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.1)
    desk.limits = Limits(message_size_bytes=MIB)
    client = await desk.client()
    await client.begin()
    assert (await client.say("DATA")).startswith("354")
    with pytest.raises(ConnectionError):
        await send_for_ever(client, b"x" * MIB)
    await settled(desk)
    assert not desk.store.messages


async def flood(desk: Desk, piece: bytes, pieces: int) -> int:
    """How much memory it takes to be sent this in DATA."""
    desk.limits = Limits(message_size_bytes=50 * MIB)
    client = await desk.client()
    await client.begin()
    assert (await client.say("DATA")).startswith("354")
    gc.collect()
    before = resident_bytes()
    most = before
    for _ in range(pieces):
        await client.send(piece)
        most = max(most, resident_bytes())
    await client.send(b"\r\n.\r\n")
    assert (await client.reply())[0] in "25"
    return most - before


async def test_50_mib_without_a_line_end_are_read_in_bounded_memory(desk):
    assert await flood(desk, b"x" * 65536, 60 * 16) < 20 * MIB


async def test_tiny_lines_are_read_in_bounded_memory(desk):
    class Nothing(FakeStore):
        async def stage(self, queue_id, seq, chunk):
            pass

        async def accept(self, new):
            pass

    desk.store = Nothing()
    assert await flood(desk, b"\r\n" * 32768, 40 * 16) < 20 * MIB


@pytest.mark.parametrize(
    "ending",
    [
        b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n.\r", b"\r.\n",
        b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\r\r\n", b"\n\n.\r\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("bare_newline", list(BareNewline))
async def test_a_second_message_is_never_made_out_of_one(desk, ending, bare_newline):
    client = await desk.client(replace(LOCAL, bare_newline=bare_newline))
    await client.begin()
    smuggled = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<v@example.net>\r\nDATA\r\nevil\r\n.\r\n"
    await client.say("DATA")
    await client.send(b"Subject: one\r\n\r\nfirst" + ending)
    await asyncio.sleep(0.01)
    await client.send(smuggled + b"QUIT\r\n")
    await client.is_closed()
    await settled(desk)
    assert len(desk.store.messages) <= 1
    assert all(m.message.reverse_path == "a@example.com" for m in desk.store.messages)
    assert all(b"\n.\r\n" not in c and b"\r.\r\n" not in c for c in desk.store.contents)


# --- trouble of our own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (QueueFull("secret path"), "452 4.3.1 "),
        (SpoolError("secret path"), "451 4.3.0 "),
        (RuntimeError("secret path"), "451 4.3.0 "),
        (OSError(28, "secret path"), "451 4.3.0 "),
    ],
)
@pytest.mark.parametrize("size", [10, MIB])
@pytest.mark.parametrize("where", ["fail_with", "fail_stage_with"])
async def test_trouble_in_the_store_is_temporary_and_never_described(
    desk, error, reply, size, where
):
    client = await desk.client()
    await client.begin()
    setattr(desk.store, where, error)
    answer = await client.data(b"Subject: x\r\n\r\n" + b"x" * size + b"\r\n.\r\n")
    if where == "fail_stage_with" and size == 10:
        assert answer.startswith("250")
        return
    assert answer.startswith(reply)
    assert "secret" not in answer
    desk.store.fail_with = desk.store.fail_stage_with = None
    assert not desk.store.staged
    # The transaction is over, and the session goes on.
    assert (await client.say("MAIL FROM:<a@example.com>")).startswith("250")
    assert (await client.say("RCPT TO:<b@example.net>")).startswith("250")
    assert (await client.data(SMALL)).startswith("250")


async def test_error_of_the_relay_is_temporary_and_never_described(desk, monkeypatch):
    def fail(*args):
        raise IndexError("string index out of range")

    client = await desk.client()
    await client.greet()
    monkeypatch.setattr(protocol_module, "mail", fail)
    assert (
        await client.say("MAIL FROM:<a@example.com>")
        == "421 4.3.0 Trouble of our own, try again later"
    )
    assert await client.reply() == "closed"


async def test_client_gets_its_reply_before_the_delivery_of_its_message_begins(
    desk, tmp_path, monkeypatch
):
    desk.store = await SqliteStore.open(tmp_path / "spool", synchronous="OFF")
    order: list[str] = []
    flush = connection_module.Connection._flush

    def noted(connection: connection_module.Connection) -> None:
        order.extend("reply" for one in connection._output if b"queued as" in one)
        flush(connection)

    async def deliver() -> None:
        await desk.store.wait_for_work()
        order.append("delivery")

    monkeypatch.setattr(connection_module.Connection, "_flush", noted)
    delivering = asyncio.create_task(deliver())
    client = await desk.client()
    await client.begin()
    assert (await client.data(SMALL)).startswith("250 2.0.0 Ok: queued as ")
    await delivering
    assert order == ["reply", "delivery"]
    await settled(desk)
    await desk.store.close()


# --- clients that go ------------------------------------------------------------------------------


async def committing(desk) -> Client:
    """A client whose message is being committed, until the store's gate is set."""
    desk.store.gate = asyncio.Event()
    client: Client = await desk.client()
    await client.begin()
    await client.say("DATA")
    await client.send(SMALL)
    await desk.store.accepting.wait()
    return client


async def test_a_client_that_vanishes_during_the_commit_has_sent_its_message(desk):
    client = await committing(desk)
    client.vanish()
    await asyncio.sleep(0.05)
    desk.store.gate.set()
    await settled(desk)
    assert len(desk.store.messages) == 1


async def test_a_client_that_closes_its_half_during_the_commit_hears_the_reply(desk):
    client = await committing(desk)
    client.writer.write_eof()
    await asyncio.sleep(0.05)
    desk.store.gate.set()
    assert (await client.reply()).startswith("250 2.0.0 Ok: queued as ")
    assert await client.reply() == "closed"


@pytest.mark.parametrize("size", [10, MIB])
async def test_a_client_that_vanishes_inside_data_has_sent_nothing(desk, size):
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    await client.send(b"Subject: x\r\n\r\n" + b"x" * size + b"\r\n.\r")
    await asyncio.sleep(0.05)
    client.vanish()
    await settled(desk)
    assert not desk.store.messages
    assert not desk.store.staged


async def test_a_client_that_vanishes_while_a_piece_is_staged_leaves_nothing(desk):
    class Slow(FakeStore):
        async def stage(self, queue_id, seq, chunk):
            self.accepting.set()
            await asyncio.sleep(0.1)
            await super().stage(queue_id, seq, chunk)

    desk.store = Slow()
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    await client.send(b"Subject: x\r\n\r\n" + b"x" * (STAGE_BYTES - 1000))
    await asyncio.sleep(0.05)
    await client.send(
        b"x" * 2000
    )  # all that comes has been read: the end of the connection is seen at once
    await desk.store.accepting.wait()
    client.vanish()
    await asyncio.sleep(0.05)
    await settled(desk)
    assert not desk.store.staged


@pytest.mark.parametrize("wait", [0, 0.001, 0.01, 0.03])
async def test_client_that_vanishes_at_any_moment_leaves_nothing_behind(desk, wait):
    wire = b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n" + SMALL
    for end in range(0, len(wire), 7):
        client = await desk.client()
        await client.send(wire[:end])
        await asyncio.sleep(wait / 10)
        client.vanish()
    await settled(desk)
    assert not desk.store.messages
    assert desk.reception.connections.total == 0


# --- time -----------------------------------------------------------------------------------------


async def test_a_silent_client_hears_421_and_is_cut_off(desk):
    desk.limits = Limits(idle=timedelta(seconds=1))
    client = await desk.client()
    await client.greet()
    assert (await client.reply()).startswith("421 4.4.2 ")
    assert await client.reply() == "closed"


async def test_a_command_that_comes_octet_by_octet_gets_no_more_time(desk):
    desk.limits = Limits(idle=timedelta(seconds=1))
    client = await desk.client()
    await client.greet()
    begun = time.monotonic()
    for _ in range(100):
        await client.send(b"N")
        await asyncio.sleep(0.02)
        if time.monotonic() - begun > 1.5:
            break
    assert (await client.reply()).startswith("421 4.4.2 ")


async def test_a_transaction_ends_at_its_deadline_however_busy_the_client_is(desk):
    desk.limits = Limits(idle=timedelta(seconds=30), transaction=timedelta(seconds=1.5))
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    begun = time.monotonic()
    while time.monotonic() - begun < 2:
        await client.send(b"x")
        await asyncio.sleep(0.02)
    assert (await client.reply()).startswith("421 4.4.2 ")
    assert time.monotonic() - begun < patient(15), "not the idle time, which is 30 s"
    await settled(desk)
    assert not desk.store.messages


async def test_content_that_keeps_coming_gets_more_time(desk):
    desk.limits = Limits(idle=timedelta(seconds=2))
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    for _ in range(8):
        await client.send(b"x\r\n")
        await asyncio.sleep(0.35)
    await client.send(b".\r\n")
    assert (await client.reply()).startswith("250")


async def test_a_client_that_never_reads_is_cut_off(desk, monkeypatch):
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(protocol_module, "UNPRODUCTIVE_COMMANDS_PER_SESSION", 10**9)
    desk.limits = Limits(idle=timedelta(seconds=0.3))
    listener = await desk.open()
    assert isinstance(listener.address, TcpAddress)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await asyncio.get_running_loop().sock_connect(
            deaf, (listener.address.host, listener.address.port)
        )
        with pytest.raises(ConnectionError):
            await talk_for_ever(deaf)
        await settled(desk)
        assert listener.connections == 0


async def test_a_stalled_handshake_is_cut_off(desk, monkeypatch):
    monkeypatch.setattr(connection_module, "HANDSHAKE_SECONDS", 0.2)
    client = await desk.client(replace(LOCAL, tls=ListenerTls.STARTTLS))
    await client.greet()
    await client.say("STARTTLS")
    assert await client.is_closed(5)
    await settled(desk)
    assert desk.reception.connections.total == 0


@pytest.mark.parametrize("tls", [ListenerTls.STARTTLS, ListenerTls.IMPLICIT])
async def test_garbage_instead_of_a_handshake_ends_the_session(desk, tls):
    client = await desk.client(replace(LOCAL, tls=tls))
    if tls is ListenerTls.STARTTLS:
        await client.greet()
        await client.say("STARTTLS")
    await client.send(b"MAIL FROM:<a@example.com>\r\n" * 10)
    assert await client.is_closed()
    await settled(desk)
    assert desk.reception.connections.total == 0


# --- how many -------------------------------------------------------------------------------------


async def test_one_client_cannot_have_all_connections(desk):
    desk.limits = Limits(connections_per_client=2)
    first, second, third = [await desk.client() for _ in range(3)]
    assert (await first.reply()).startswith("220")
    assert (await second.reply()).startswith("220")
    assert (await third.reply()).startswith("421 4.7.0 ")
    assert await third.reply() == "closed"
    await first.say("QUIT")
    await first.is_closed()
    fourth = await desk.client()
    assert (await fourth.reply()).startswith("220")


async def test_all_listeners_together_have_a_limit(desk):
    desk.limits = Limits(connections=1)
    first = await desk.client(LOCAL)
    assert (await first.reply()).startswith("220")
    second = await desk.client(LOCAL)
    assert (await second.reply()).startswith("421 4.3.2 ")


PASSWORDS = replace(LOCAL, auth=ListenerAuth.REQUIRED, auth_without_tls=True)
WRONG, RIGHT = "AUTH PLAIN AGFwcDEAd3Jvbmc=", "AUTH PLAIN AGFwcDEAc2VjcmV0"
RIGHT_OF_OTHER = "AUTH PLAIN AGFueQBvdGhlcg=="


@pytest.fixture
def no_delay(monkeypatch):
    monkeypatch.setattr(connection_module, "LONGEST_AUTH_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(connection_module, "AUTH_REFUSAL_SECONDS", 0.0)


async def greeted(desk):
    client = await desk.client()
    await client.greet()
    return client


@pytest.mark.usefixtures("no_delay")
async def test_ten_wrong_passwords_of_one_user_stop_no_other_user(desk):
    now = datetime(2026, 11, 20, tzinfo=UTC)
    desk.now = lambda: now
    desk.access = Access(users={**USERS, "any": User("any", hashed("other"))})
    await desk.open(PASSWORDS)
    assert (await (await greeted(desk)).say(RIGHT_OF_OTHER)).startswith("235 ")
    for _ in range(4):
        client = await greeted(desk)
        for _ in range(3):
            answer = await client.say(WRONG)
    assert answer.startswith(("421", "closed"))
    assert (await (await greeted(desk)).say(RIGHT_OF_OTHER)).startswith("235 "), "remembered"
    assert (await (await greeted(desk)).say(RIGHT)).startswith("421 4.7.0 "), "new"
    now += timedelta(seconds=10)
    assert (await (await greeted(desk)).say(RIGHT)).startswith("235 ")
    assert (await (await greeted(desk)).say(WRONG)).startswith("421 4.7.0 ")
    now += timedelta(minutes=11)
    assert (await (await greeted(desk)).say(WRONG)).startswith("535 ")


async def test_a_name_that_exists_is_refused_no_later_than_one_that_does_not(desk, monkeypatch):
    monkeypatch.setattr(connection_module, "LONGEST_AUTH_DELAY_SECONDS", 0.0)
    now = datetime(2026, 11, 20, tzinfo=UTC)
    desk.now = lambda: now
    await desk.open(PASSWORDS)
    for _ in range(4):
        client = await greeted(desk)
        for _ in range(3):
            await client.say(WRONG)
    now += timedelta(seconds=20)
    times = []
    for _ in range(2):  # the first is looked at, the second not
        client = await greeted(desk)
        begun = asyncio.get_running_loop().time()
        assert (await client.say(WRONG)).startswith("421 4.7.0 ")
        times.append(asyncio.get_running_loop().time() - begun)
    assert min(times) >= 0.99


@pytest.mark.usefixtures("no_delay")
async def test_passwords_sent_over_many_connections_at_once_are_counted_like_any(desk):
    await desk.open(replace(LOCAL, auth=ListenerAuth.REQUIRED, auth_without_tls=True))
    other = replace(LOCAL, auth=ListenerAuth.OPTIONAL, auth_without_tls=True)
    await desk.open(other)  # one count for all listeners

    async def guess(listener: int) -> str:
        address = desk.listeners[listener].address
        client = await Client.connect(address.host, address.port)
        desk.clients.append(client)
        await client.greet()
        return await client.say("AUTH PLAIN AGFwcDEAd3Jvbmc=")

    answers = await asyncio.gather(*(guess(number % 2) for number in range(40)))
    assert sum(answer.startswith("535 ") for answer in answers) == 10
    assert sum(answer.startswith("421 4.7.0 ") for answer in answers) == 30


async def test_many_connections_may_log_in_at_once(desk):
    await desk.open(replace(LOCAL, auth=ListenerAuth.REQUIRED, auth_without_tls=True))

    async def log_in() -> str:
        client = await desk.client()
        await client.greet()
        answer: str = await client.say("AUTH PLAIN AGFwcDEAc2VjcmV0")
        return answer

    answers = await asyncio.gather(*(log_in() for _ in range(40)))
    assert {answer[:3] for answer in answers} == {"235"}


# --- doors ----------------------------------------------------------------------------------------


async def test_a_unix_socket_is_its_own_permission(desk, tmp_path):
    desk.access = Access(networks=(), users=USERS)
    path = str(tmp_path / "smtp.sock")
    client = await desk.client(ListenerSpec(f"unix:{path}"))
    await client.begin()
    assert (await client.data(SMALL)).startswith("250")
    assert b"from client.example (local)\r\n" in desk.store.contents[0]
    assert desk.listeners[0].address == UnixAddress(path)
    await desk.listeners[0].close()
    assert not Path(path).exists()


@pytest.mark.parametrize(("mode", "bits"), [("0600", 0o600), ("660", 0o660)])
async def test_a_unix_socket_is_for_those_whom_its_mode_admits(desk, tmp_path, mode, bits):
    path = tmp_path / "smtp.sock"
    await desk.open(ListenerSpec(f"unix:{path}", socket_mode=mode))
    assert path.stat().st_mode & 0o777 == bits


@pytest.mark.needs("root")
async def test_a_unix_socket_is_given_to_a_group(desk, tmp_path):
    path = tmp_path / "smtp.sock"
    await desk.open(ListenerSpec(f"unix:{path}", socket_mode="0660", socket_group="mail"))
    assert path.group() == "mail"
    assert path.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize(
    ("least", "is_served"),
    [(TlsVersion.TLS_1_0, True), (TlsVersion.TLS_1_1, False), (TlsVersion.TLS_1_2, False)],
)
async def test_old_tls_is_for_old_devices_where_that_is_asked_for(desk, least, is_served):
    await desk.open(ListenerSpec("127.0.0.1:0", tls=ListenerTls.IMPLICIT, min_tls=least))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.maximum_version = old.minimum_version = ssl.TLSVersion.TLSv1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    address = desk.listeners[-1].address
    if not is_served:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await Client.connect(address.host, address.port, tls=old)
        return
    client = await Client.connect(address.host, address.port, tls=old)
    desk.clients.append(client)
    await client.begin()
    assert (await client.data(SMALL)).startswith("250")
    assert b"(using TLSv1 with cipher " in desk.store.contents[0]


async def test_a_socket_file_left_by_a_crash_is_no_hindrance(desk, tmp_path):
    path = str(tmp_path / "smtp.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    client = await desk.client(ListenerSpec(f"unix:{path}"))
    assert (await client.reply()).startswith("220")


async def test_a_bound_socket_can_be_handed_in(desk):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await desk.open()
    listener = await start_listener(LOCAL, desk.reception, sock=sock)
    desk.listeners.append(listener)
    assert (await (await desk.client()).reply()).startswith("220")


async def test_a_reload_of_access_counts_for_the_next_session(desk):
    client = await desk.client()
    await client.begin()
    desk.access = Access(networks=())
    client = await desk.client()
    await client.greet()
    await client.say("MAIL FROM:<a@example.com>")
    assert (await client.say("RCPT TO:<b@example.net>")).startswith("554 5.7.1 ")


async def test_a_new_certificate_is_shown_after_a_reload_and_a_broken_one_never(desk, tmp_path):
    certificate, key = tmp_path / "tls.pem", tmp_path / "tls.key"
    certificate.write_text(Path(desk.certificate).read_text())
    key.write_text(Path(desk.key).read_text())
    spec = replace(LOCAL, tls=ListenerTls.IMPLICIT, certificate=str(certificate), key=str(key))
    assert (await (await desk.client(spec, tls=True)).reply()).startswith("220")

    certificate.write_text("nonsense")
    with pytest.raises(CertificateError):
        desk.listeners[0].reload_certificate()
    assert (await (await desk.client(tls=True)).reply()).startswith("220")

    other = trustme.CA()
    issued = other.issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    issued.private_key_pem.write_to_path(str(key))
    desk.listeners[0].reload_certificate()
    with pytest.raises(ssl.SSLCertVerificationError):
        await desk.client(tls=True)
    desk.trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    other.configure_trust(desk.trust)
    assert (await (await desk.client(tls=True)).reply()).startswith("220")


def proxy_header(command: int, client: str) -> bytes:
    """PROXY version 2, TCP over IPv4; command 1 is PROXY, 0 is LOCAL (the proxy itself)."""
    addresses = (
        socket.inet_aton(client) + socket.inet_aton("198.51.100.1") + struct.pack("!HH", 51234, 25)
    )
    return (
        b"\r\n\r\n\x00\r\nQUIT\n"
        + struct.pack("!BBH", 0x20 | command, 0x11, len(addresses))
        + addresses
    )


@pytest.mark.parametrize(
    ("command", "client", "reply"),
    [(1, "127.0.0.9", "250"), (1, "192.0.2.7", "554 5.7.1"), (0, "127.0.0.9", "554 5.7.1")],
)
async def test_a_client_behind_a_proxy_may_relay_by_its_own_address(desk, command, client, reply):
    through = await desk.client(replace(LOCAL, proxy_protocol=True))
    await through.send(proxy_header(command, client))
    await through.greet()
    await through.say("MAIL FROM:<a@example.com>")
    assert (await through.say("RCPT TO:<b@example.net>")).startswith(reply)


async def test_tls_may_begin_right_behind_a_proxy_header(desk):
    client = await desk.client(replace(LOCAL, proxy_protocol=True, tls=ListenerTls.IMPLICIT))
    client.writer.write(proxy_header(1, "127.0.0.9"))
    await client.start_tls(desk.trust)
    assert "250-" in await client.greet()
    assert desk.reception.connections.of("127.0.0.9") == 1


# --- going down -----------------------------------------------------------------------------------


async def test_idle_session_hears_421_when_the_relay_stops(desk):
    client = await desk.client()
    await client.greet()
    await client.say("MAIL FROM:<a@example.com>")
    closing = asyncio.create_task(desk.listeners[0].close(timedelta(seconds=5)))
    assert (await client.reply()).startswith("421 4.3.2 ")
    assert await client.reply() == "closed"
    await client.close()
    await closing
    with pytest.raises(OSError, match=r"refused|Connect"):
        await desk.client()


async def test_a_message_that_is_coming_in_may_be_finished(desk):
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    await client.send(b"Subject: x\r\n")
    closing = asyncio.create_task(desk.listeners[0].close(timedelta(seconds=5)))
    await asyncio.sleep(0.05)
    await client.send(b"\r\nhello\r\n.\r\n")
    assert (await client.reply()).startswith("250 2.0.0 ")
    assert (await client.reply()).startswith("421 4.3.2 ")
    await client.close()
    await closing
    assert len(desk.store.messages) == 1


async def test_a_message_that_does_not_come_to_its_end_is_not_waited_for_longer_than_the_grace(
    desk,
):
    client = await desk.client()
    await client.begin()
    await client.say("DATA")
    await desk.listeners[0].close(timedelta(seconds=0.1))
    assert await client.is_closed()
    assert not desk.store.messages


async def test_commit_under_way_ends_before_the_listener_is_closed(desk):
    await committing(desk)
    closing = asyncio.create_task(desk.listeners[0].close(timedelta(seconds=0.05)))
    await asyncio.sleep(0.2)
    assert not closing.done()
    desk.store.gate.set()
    await closing
    assert len(desk.store.messages) == 1


async def test_many_sessions_at_once_all_get_their_replies(desk):
    async def one(number: int) -> None:
        client = await desk.client()
        await client.begin(f"a{number}@example.com")
        assert (await client.data(SMALL)).startswith("250")
        assert (await client.say("QUIT")).startswith("221")

    await desk.open()
    await asyncio.gather(*(one(number) for number in range(100)))
    assert {message.message.reverse_path for message in desk.store.messages} == {
        f"a{number}@example.com" for number in range(100)
    }


async def test_a_pipelined_flood_of_commands_is_answered_in_order(desk):
    client = await desk.client()
    await client.greet()
    for _ in range(40):
        await client.send(
            b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n" + SMALL
        )
    for _ in range(40):
        assert [reply[:3] for reply in await client.replies(4)] == ["250", "250", "354", "250"]
    assert isinstance(client, Client)
    assert len(desk.store.messages) == 40


@pytest.mark.parametrize(
    ("of_listener", "of_user", "login", "kept"),
    [
        (None, None, RIGHT, ""),
        ("by-listener", None, RIGHT, "by-listener"),
        (None, "by-user", RIGHT, "by-user"),
        ("by-listener", "by-user", RIGHT, "by-user"),
        ("by-listener", "by-user", None, "by-listener"),
        (None, "by-user", None, ""),
    ],
)
async def test_message_keeps_the_next_hop_of_its_user_or_listener(
    desk, of_listener, of_user, login, kept
):
    desk.access = Access(users={"app1": replace(USERS["app1"], next_hop=of_user)})
    auth = replace(PASSWORDS, auth=ListenerAuth.OPTIONAL, next_hop=of_listener)
    client = await desk.client(auth)
    await client.greet()
    if login is not None:
        assert (await client.say(login)).startswith("235 ")
    await client.say("MAIL FROM:<a@example.com>")
    await client.say("RCPT TO:<b@example.net>")
    assert (await client.data(b"Subject: x\r\n\r\nx\r\n.\r\n")).startswith("250 ")
    [new] = desk.store.messages
    assert new.message.next_hop == kept
    assert (new.message.terms is None) == (kept == "")
