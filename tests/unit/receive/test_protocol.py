"""The protocol of a session: octets in, actions out, without a loop or a socket."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.receive.access import User
from relay.receive.actions import (
    Abandon,
    Action,
    BeginTls,
    CheckPassword,
    Close,
    Finish,
    Log,
    StagePiece,
)
from relay.receive.content import BdatReader, DataReader
from relay.receive.limits import Limits
from relay.receive.protocol import ServerProtocol
from relay.receive.session import Session, TlsFacts, Transaction
from relay.receive.spec import ListenerAuth, ListenerSpec, ListenerTls
from relay.submit.message import Refusal, refuse
from relay.submit.secrets import SecretVerdict

MESSAGE = b"Subject: hello\r\n\r\n..dot\r\n.\r\n"
DIALOGUE = (
    b"EHLO client.example\r\nMAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\n" + MESSAGE
)


STARTTLS = ListenerSpec("127.0.0.1:25", tls=ListenerTls.STARTTLS)


@dataclass
class Message:
    """A message that is coming in: what the protocol sees of an `Intake`."""

    reader: DataReader | BdatReader
    queue_id: str = "Q1"
    refusal: Refusal | None = None
    stages: bool = False

    def should_stage(self) -> bool:
        stages, self.stages = self.stages, False
        return stages

    async def stage(self) -> None: ...
    async def finish(self) -> Refusal | None: ...
    async def abandon(self) -> None: ...


@dataclass
class Listener:
    """A `SessionContext`."""

    spec: ListenerSpec = STARTTLS
    limits: Limits = field(default_factory=lambda: Limits(message_size_bytes=1000))
    hostname: str = "relay.example"
    has_tls: bool = True
    stages: bool = False
    messages: list[Message] = field(default_factory=list)

    def ehlo_reply(self, session: Session) -> bytes:
        return b"250 relay.example\r\n"

    def begin_message(
        self, session: Session, transaction: Transaction, reader: DataReader | BdatReader
    ) -> Message:
        self.messages.append(Message(reader, stages=self.stages))
        return self.messages[-1]


def protocol(listener: Listener | None = None) -> ServerProtocol:
    listener = listener or Listener()
    return ServerProtocol(listener, Session(listener.spec, "192.0.2.1", in_networks=True))


def codes(actions: list[Action]) -> list[int]:
    return [int(action[:3]) for action in actions if isinstance(action, bytes)]


def only(actions: list[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


@given(st.lists(st.integers(0, len(DIALOGUE)), max_size=12))
def test_actions_are_the_same_however_the_octets_are_cut(cuts: list[int]):
    whole, pieces = protocol(), protocol()
    expected = whole.feed(DIALOGUE)
    edges = [0, *sorted(cuts), len(DIALOGUE)]
    got: list[Action] = []
    for begin, end in pairwise(edges):
        got += pieces.feed(DIALOGUE[begin:end])
    assert codes(got) == codes(expected) == [250, 250, 250, 354]
    assert len(only(got, Finish)) == len(only(expected, Finish)) == 1


def test_message_that_comes_octet_by_octet_is_accepted_after_its_commit():
    made = protocol()
    said: list[Action] = []
    for octet in DIALOGUE:
        said += made.feed(bytes([octet]))
    assert codes(said) == [250, 250, 250, 354]
    [finish] = only(said, Finish)
    assert finish.intake.reader.held.take_all() == b"Subject: hello\r\n\r\n.dot\r\n"
    assert made.resume(None) == [b"250 2.0.0 Ok: queued as Q1\r\n"]
    assert not made.in_transaction


def test_octets_that_come_while_it_waits_are_read_afterwards():
    made = protocol()
    made.feed(DIALOGUE)
    assert made.feed(b"NOOP\r\nQUIT\r\n") == []
    assert codes(made.resume(None)) == [250, 250, 221]
    assert made.has_ended


def test_a_message_that_is_refused_at_its_end_is_not_taken():
    made = protocol()
    made.feed(DIALOGUE)
    said = made.resume(refuse(452, "4.3.1", "full"))
    assert codes(said) == [452]
    assert codes(made.feed(b"MAIL FROM:<a@a.example>\r\n")) == [250]


def test_a_piece_is_staged_before_more_is_read():
    made = protocol(Listener(stages=True))
    said = made.feed(DIALOGUE[:-4])
    assert only(said, StagePiece)
    assert made.feed(DIALOGUE[-4:]) == []
    assert only(made.resume(None), Finish)


def test_commands_injected_behind_starttls_are_discarded():
    made = protocol()
    said = made.feed(b"EHLO c\r\nSTARTTLS\r\nMAIL FROM:<evil@a.example>\r\n")
    assert codes(said) == [250, 220]
    assert said[-1] == BeginTls()
    assert made.resume(TlsFacts("TLSv1.3", "X")) == []
    assert made.session.tls is not None
    assert made.session.helo == ""
    assert not made.in_transaction


def test_starttls_in_a_transaction_leaves_nothing_of_it():
    made = protocol()
    made.feed(b"EHLO c\r\nMAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nBDAT 3\r\nabc")
    assert made.in_message
    made.feed(b"STARTTLS\r\n")
    assert only(made.resume(TlsFacts("TLSv1.3", "X")), Abandon)
    assert not made.in_message


AUTH = Listener(
    ListenerSpec("127.0.0.1:25", auth=ListenerAuth.OPTIONAL, auth_without_tls=True), has_tls=False
)


def test_user_with_the_right_password_becomes_the_user_of_the_session():
    made = protocol(AUTH)
    said = made.feed(b"EHLO c\r\nAUTH PLAIN AHVzZXIAc2VjcmV0\r\nNOOP\r\n")
    assert said[-1] == CheckPassword(b"user", b"secret")
    user = User("user", "$argon2id$")
    assert codes(made.resume(user)) == [235, 250]
    assert made.session.user is user


@pytest.mark.parametrize(
    ("verdicts", "replies"),
    [([SecretVerdict.WRONG] * 3, [535, 535, 421]), ([SecretVerdict.WAIT], [421])],
)
def test_wrong_passwords_end_the_session(verdicts: list[SecretVerdict], replies: list[int]):
    made = protocol(AUTH)
    made.feed(b"EHLO c\r\n")
    said: list[Action] = []
    for verdict in verdicts:
        made.feed(b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n")
        said += made.resume(verdict)
    assert codes(said) == replies
    assert Close(linger=True) in said
    assert made.feed(b"NOOP\r\n") == []


def test_a_client_that_goes_leaves_nothing_of_a_message_in_the_store():
    made = protocol()
    made.feed(DIALOGUE[:-10])
    [abandon] = made.end()
    assert isinstance(abandon, Abandon)
    assert made.end() == []


def test_a_client_that_goes_after_the_end_of_its_message_has_sent_it():
    made = protocol()
    made.feed(DIALOGUE)
    assert made.end() == []  # what is being committed is not abandoned
    assert codes(made.resume(None)) == [250]


def test_a_client_that_goes_while_a_piece_is_staged_leaves_nothing_in_the_end():
    made = protocol(Listener(stages=True))
    made.feed(DIALOGUE[:-4])
    assert made.end() == []
    assert only(made.resume(None), Abandon)


def test_message_is_abandoned_after_an_error_of_the_relay():
    made = protocol(Listener(stages=True))
    made.feed(DIALOGUE[:-4])
    assert only(made.resume_failed(), Abandon)
    assert made.has_ended


@pytest.mark.parametrize(
    ("octets", "said"),
    [
        (b"GET / HTTP/1.1\r\n", b"554 5.5.1 This is SMTP\r\n"),
        (b"\x16\x03\x01\x02", b"554 5.5.1 This is SMTP\r\n"),
        (b"EHLO c\n", b"500 5.5.2 Lines end with CRLF\r\n"),
        (b"x" * 20000, b"500 5.5.2 Line too long\r\n"),
        (b"BDAT x\r\n", b"501 5.5.4 Syntax: BDAT size [LAST]\r\n"),
    ],
)
def test_client_that_speaks_no_smtp_is_refused_logged_and_disconnected(octets: bytes, said: bytes):
    made = protocol()
    actions = made.feed(octets)
    assert said in actions
    assert only(actions, Log)
    assert actions[-1] == Close(linger=True)
    assert made.feed(b"EHLO c\r\n") == []


def test_unproductive_commands_end_the_session():
    made = protocol()
    said = made.feed(b"NOOP\r\n" * 200)
    assert codes(said)[-1] == 421
    assert len(codes(said)) == 102


def test_a_message_far_over_the_limit_is_read_to_four_times_of_it_and_cut_off():
    made = protocol(replace(Listener(), limits=Limits(message_size_bytes=100)))
    made.feed(b"EHLO c\r\nMAIL FROM:<a@a.example>\r\nRCPT TO:<b@b.example>\r\nDATA\r\n")
    said = made.feed(b"x" * 350 + b"\r\n")
    assert said == []
    assert only(made.feed(b"x" * 100), Finish)
    assert Close(linger=True) in made.resume(refuse(552, "5.3.4", "too large"))
