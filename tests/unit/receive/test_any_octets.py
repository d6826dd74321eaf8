"""Whatever a client says: replies are replies, nobody relays who may not, and nothing of ours
breaks.
"""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from relay.policy.rules import PolicyRules
from relay.receive.access import Access
from relay.receive.connection import Connection
from relay.receive.intake import Reception
from relay.receive.limits import Limits
from relay.receive.listener_state import ListenerState
from relay.receive.spec import BareNewline, ListenerAuth, ListenerSpec
from relay.route.addresses import Network
from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker
from tests.fakes.store import FakeStore
from tests.unit.receive.conftest import USERS

CLOCK = datetime(2026, 11, 20, tzinfo=UTC)
PASSWORDS = SecretChecker(Failures(), clock=lambda: CLOCK)
COMMANDS = """
EHLO x|HELO x|MAIL FROM:<a@example.com>|MAIL FROM:<> SIZE=9 BODY=8BITMIME|RCPT TO:<b@example.net>|
DATA|BDAT 5|BDAT 3 LAST|BDAT 0 LAST|RSET|NOOP|AUTH PLAIN|AUTH LOGIN|AUTH PLAIN AGFwcDEAc2VjcmV0|
*|STARTTLS|
VRFY x|X-Require-TLS: yes|X-Require-TLS: what|Subject: x""".replace("\n", "").split("|")
OCTETS = [
    b"\r\n.\r\n",
    b"\r\n",
    b".",
    b"\r",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b" ",
    b":",
    b"<",
    b">",
    b"a" * 5000,
]
WORDS = st.sampled_from([command.encode() + b"\r\n" for command in COMMANDS] + OCTETS)
REPLY = re.compile(
    rb"(?:[2345][0-9]{2}(?:-[^\r\n]*\r\n[2345][0-9]{2})*(?: [^\r\n]*)\r\n)*", re.DOTALL
)


class Wire(asyncio.Transport):
    """A transport that remembers what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_open = True

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1234) if name == "peername" else default

    def write(self, data):
        assert self.is_open
        self.written += data

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.is_open = False

    def is_closing(self):
        return not self.is_open

    def close(self):
        self.is_open = False

    abort = close

    def pause_reading(self):
        pass

    resume_reading = pause_reading


async def _until_it_waits(door: ListenerState, connection: Connection) -> None:
    """Until what is under way needs more octets of the client's."""
    while door.tasks and connection._proxy_header is None:
        await asyncio.wait(list(door.tasks))
        await asyncio.sleep(0)
    for _ in range(5 if door.tasks else 0):
        await asyncio.sleep(0)


async def converse(
    pieces: list[bytes],
    *,
    may_relay: bool = False,
    bare_newline: BareNewline = BareNewline.REFUSE,
    networks: tuple[Network, ...] = (),
    proxied: bool = False,
) -> tuple[bytes, FakeStore]:
    store = FakeStore()
    access = Access(users=USERS) if may_relay else Access(networks=networks)
    reception = Reception(
        "relay.example",
        store,
        PolicyRules,
        lambda: access,
        lambda: CLOCK,
        Limits(message_size_bytes=20_000),
    )
    spec = ListenerSpec(
        "127.0.0.1:0",
        auth=ListenerAuth.OPTIONAL if may_relay else ListenerAuth.NONE,
        auth_without_tls=True,
        bare_newline=bare_newline,
        proxy_protocol=proxied,
    )
    door = ListenerState(spec, reception, None, PASSWORDS)
    wire, connection = Wire(), Connection(door)
    connection.connection_made(wire)
    for piece in pieces:
        if not wire.is_open:
            break
        connection.data_received(piece)
        await _until_it_waits(door, connection)
    connection.eof_received()
    await _until_it_waits(door, connection)
    connection.connection_lost(None)
    while door.tasks:
        await asyncio.wait(list(door.tasks))
    return wire.written, store


@given(
    st.lists(WORDS, max_size=40),
    st.booleans(),
    st.sampled_from(BareNewline),
    st.randoms(use_true_random=False),
)
def test_any_octets_are_answered_with_replies_however_they_are_cut(
    words, may_relay, bare_newline, random
):
    octets = b"".join(words)
    marks = sorted(random.randrange(len(octets) + 1) for _ in range(5))
    pieces = [octets[a:b] for a, b in zip([0, *marks], [*marks, len(octets)], strict=True) if b > a]
    failures: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = failures.append  # type: ignore[assignment, method-assign]
    logging.getLogger("relay.receive").addHandler(handler)
    try:
        written, store = asyncio.run(
            converse(pieces, may_relay=may_relay, bare_newline=bare_newline)
        )
    finally:
        logging.getLogger("relay.receive").removeHandler(handler)
    assert not failures
    assert REPLY.fullmatch(written), written
    assert not store.staged
    assert written.count(b"queued as") == len(store.messages)
    if not may_relay:
        assert not store.messages
    for content in store.contents:
        assert content.count(b"\r") == content.count(b"\n") == content.count(b"\r\n")
        assert b"X-Require-TLS: yes\r\n" not in content.partition(b"\r\n\r\n")[0]
