"""The SMTP dialogue with a client: octets in, actions out. Pure.

    feed(octets)      octets from the client
    resume(result)    the result of the action that the protocol waits for
    resume_failed     that action failed: the session ends
    end               the connection ends, and the session with it

Each returns actions (`relay.receive.actions`), to be done in this order. The protocol waits for the
result of some of them (`Waiting`): such an action is the last one, and until `resume` the octets
that come are kept unread.

Each verb does its part of the state machine of RFC 5321 §4.1.4. `relay.receive.submission` judges
what a command asks for, `relay.receive.message_input` what follows each piece of content.

A command is unproductive if it brings no message nearer: it is refused, unknown, or one of NOOP,
RSET, VRFY, EHLO and the like. The protocol counts them (Postfix: `smtpd_junk_command_limit`,
`smtpd_hard_error_limit`), from zero after each accepted message, and ends the session after too
many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from relay.mail.reply import Reply
from relay.receive.access import User
from relay.receive.actions import (
    Abandon,
    Action,
    ActionResult,
    BeginTls,
    CheckPassword,
    Close,
    Finish,
    Incoming,
    Log,
    StagePiece,
    Waiting,
    text_of,
)
from relay.receive.content import BdatReader, DataReader
from relay.receive.limits import (
    AUTH_LINE_OCTETS,
    COMMAND_LINE_OCTETS,
    UNPRODUCTIVE_COMMANDS_PER_SESSION,
    Limits,
)
from relay.receive.message_input import DRAIN_FACTOR, MessageInput, parse_chunk
from relay.receive.sasl import AuthExchange, Challenge, GivenPassword
from relay.receive.session import Session, TlsFacts, Transaction, name_of
from relay.receive.spec import BareNewline, ListenerSpec
from relay.receive.submission import mail, rcpt
from relay.submit.message import Refusal
from relay.submit.secrets import SecretVerdict

AUTH_FAILURES_PER_SESSION = 3

_TLS_HANDSHAKE = b"\x16\x03"
"""How a TLS record with a ClientHello begins (RFC 8446 §5.1)."""

_OK = b"250 2.0.0 Ok\r\n"
_SENDER_OK = b"250 2.1.0 Ok\r\n"
_RECIPIENT_OK = b"250 2.1.5 Ok\r\n"
_SEND_DATA = b"354 End data with <CR><LF>.<CR><LF>\r\n"
_BYE = b"221 2.0.0 Bye\r\n"
_SYNTAX = b"500 5.5.2 Syntax error\r\n"
_BARE_LF = b"500 5.5.2 Lines end with CRLF\r\n"
_LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_NO_ARGUMENT = b"501 5.5.4 No argument is known here\r\n"
_HELO_FIRST = b"503 5.5.1 EHLO or HELO comes first\r\n"
_MAIL_FIRST = b"503 5.5.1 MAIL comes first\r\n"
_RCPT_FIRST = b"503 5.5.1 RCPT comes first: there is no recipient\r\n"
_NESTED_MAIL = b"503 5.5.1 A transaction has begun already\r\n"
_IN_BDAT = b"503 5.5.1 BDAT has begun: BDAT or RSET now\r\n"
_TLS_FIRST = b"530 5.7.0 STARTTLS comes first here\r\n"
_NOT_SMTP = b"554 5.5.1 This is SMTP\r\n"
_TOO_MANY_UNPRODUCTIVE = b"421 4.7.0 Too many commands that led nowhere\r\n"

_HTTP = frozenset({b"GET", b"POST", b"PUT", b"HEAD", b"CONNECT", b"OPTIONS", b"DELETE"})
_BEFORE_TLS = frozenset({b"NOOP", b"EHLO", b"STARTTLS", b"QUIT"})


class SessionContext(Protocol):
    """What a session needs of its listener: `relay.receive.listener_state.ListenerState`."""

    @property
    def spec(self) -> ListenerSpec: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def hostname(self) -> str: ...
    @property
    def has_tls(self) -> bool: ...

    def ehlo_reply(self, session: Session) -> bytes:
        """The reply to EHLO."""

    def begin_message(
        self, session: Session, transaction: Transaction, reader: DataReader | BdatReader
    ) -> Incoming:
        """Begin a message, which `reader` reads."""


class ServerProtocol:
    """A session, from the greeting to QUIT.

    `commands`: how many lines came. `transactions`: how many MAIL commands were accepted.
    `has_progressed`: whether the last octets completed a command or more of a message.
    """

    def __init__(self, context: SessionContext, session: Session) -> None:
        self.session = session
        self.commands = 0
        self.transactions = 0
        self.has_ended = False
        self.has_progressed = False
        self._context = context
        self._actions: list[Action] = []
        self._waiting: Waiting | None = None
        self._input = b""
        self._position = 0
        self._transaction: Transaction | None = None
        self._message: MessageInput | None = None
        self._octets_to_discard = 0
        self._reply_after_discard = b""
        self._exchange: AuthExchange | None = None
        self._unproductive = 0
        self._auth_failures = 0

    @property
    def in_transaction(self) -> bool:
        return self._transaction is not None

    @property
    def in_message(self) -> bool:
        return self._message is not None

    @property
    def is_reading_content(self) -> bool:
        """Whether the next octets are content, kept or discarded."""
        is_in_content = self._message is not None and self._message.is_reading
        return is_in_content or self._octets_to_discard > 0

    # --- octets in, actions out -----------------------------------------------------------------

    def feed(self, octets: bytes) -> list[Action]:
        """The actions that follow from octets of the client."""
        self._input = self._input + octets if self._input else octets
        return self._run()

    def resume(self, result: ActionResult) -> list[Action]:
        """The actions that follow from the result of the action that the protocol waited for."""
        waiting, self._waiting = self._waiting, None
        match waiting:
            case Finish():
                assert self._message is not None
                assert result is None or isinstance(result, Refusal)
                self._finish_message(self._message, result)
            case _ if self.has_ended:
                self._forget_transaction()
            case BeginTls():
                assert isinstance(result, TlsFacts)
                self.session.tls = result
                self.session.start_over()
                self._forget_transaction()
            case CheckPassword():
                assert isinstance(result, User | SecretVerdict)
                self._on_password_checked(result)
            case StagePiece():
                assert self._message is not None
                self._handle_content(self._message)
        return self._run()

    def end(self) -> list[Action]:
        """The connection ends. The action that the protocol waits for is still resumed."""
        self._end()
        return self._run()

    def resume_failed(self) -> list[Action]:
        """The action that the protocol waited for failed: the session ends."""
        self._waiting = None
        return self.end()

    def _end(self) -> None:
        self.has_ended = True
        self._input, self._position = b"", 0
        self._octets_to_discard = 0
        if self._waiting is None:
            self._forget_transaction()

    def _run(self) -> list[Action]:
        """Handle all that is complete in the input."""
        self.has_progressed = False
        while self._position < len(self._input) and self._waiting is None and not self.has_ended:
            if self.is_reading_content:
                self._read_content()
            else:
                line = self._next_line()
                if line is None:
                    break
                self._handle_command(line)
            self.has_progressed = True
        self._input = self._input[self._position :]
        self._position = 0
        actions, self._actions = self._actions, []
        return actions

    def _wait_for(self, action: Waiting) -> None:
        self._waiting = action
        self._actions.append(action)

    # --- lines ----------------------------------------------------------------------------------

    def _next_line(self) -> bytes | None:
        """The next command line without its CRLF (RFC 5321 §2.3.8), or None: there is none yet.

        A line that ends with a LF alone ends the session where the listener has
        `bare_newline: refuse`. Hosts that disagree about where a line ends disagree about where a
        message ends, and a client can hide a second message in the first (SMTP smuggling).
        """
        end = self._input.find(b"\n", self._position)
        length = (len(self._input) if end < 0 else end) - self._position
        if not self.commands and self._input.startswith(_TLS_HANDSHAKE):
            self._refuse_client(
                _NOT_SMTP, "a TLS handshake, where TLS begins with STARTTLS or never"
            )
            return None
        if length > AUTH_LINE_OCTETS:
            self._refuse_client(_LINE_TOO_LONG)
            return None
        if end < 0:
            return None
        line = self._input[self._position : end]
        self._position = end + 1
        self.commands += 1
        if line.endswith(b"\r"):
            return line[:-1]
        if self._context.spec.bare_newline is not BareNewline.REFUSE:
            return line
        self._refuse_client(_BARE_LF)
        return None

    def _handle_command(self, line: bytes) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            self._continue_auth(exchange, exchange.answer(line))
            return
        word, _, arg = line.partition(b" ")
        verb = word.upper()
        command = _VERBS.get(verb)
        if command is None:  # a tab behind the verb, or white space before it
            word, arg = _split_at_any_space(line)
            verb = word.upper()
            command = _VERBS.get(verb)
        if len(line) > COMMAND_LINE_OCTETS and verb != b"AUTH":
            self._reply_unproductive(_LINE_TOO_LONG)
        elif command is None:
            self._unknown_command(verb)
        elif self.session.must_start_tls and verb not in _BEFORE_TLS:
            self._reply_unproductive(_TLS_FIRST)
        else:
            command(self, arg.strip(b" \t"))

    def _unknown_command(self, verb: bytes) -> None:
        if verb in _HTTP:
            self._refuse_client(_NOT_SMTP, "HTTP, where SMTP is spoken")
        else:
            # Only the first line is quoted: a later one may be a password sent at the wrong moment.
            self._reply_unproductive(_SYNTAX, f": {verb[:40]!r}" if self.commands == 1 else "")

    # --- session --------------------------------------------------------------------------------

    def smtp_EHLO(self, arg: bytes) -> None:
        if self._identify(arg, extended=True):
            self._actions.append(self._context.ehlo_reply(self.session))

    def smtp_HELO(self, arg: bytes) -> None:
        if self._identify(arg, extended=False):
            self._actions.append(f"250 {self._context.hostname}\r\n".encode())

    def _identify(self, arg: bytes, *, extended: bool) -> bool:
        """Take the client's name without a check. EHLO ends a transaction (RFC 5321 §4.1.4)."""
        if not arg:
            self._reply_unproductive(b"501 5.5.4 Syntax: EHLO hostname\r\n")
            return False
        self.session.helo = name_of(arg)
        self.session.extended = extended
        self._forget_transaction()
        self._count_unproductive()
        return True

    def smtp_NOOP(self, arg: bytes) -> None:
        self._actions.append(_OK)
        self._count_unproductive()

    def smtp_RSET(self, arg: bytes) -> None:
        if arg:
            self._reply_unproductive(_NO_ARGUMENT)
            return
        self._forget_transaction()
        self._actions.append(_OK)
        self._count_unproductive()

    def smtp_QUIT(self, arg: bytes) -> None:
        self._actions.append(_BYE)
        self._close()

    def smtp_VRFY(self, arg: bytes) -> None:
        # RFC 5321 §3.5.3: 252, because the relay cannot verify the address and would not tell.
        self._reply_unproductive(
            b"252 2.5.2 Send some mail, it may arrive\r\n"
            if arg
            else b"501 5.5.4 Syntax: VRFY string\r\n"
        )

    def smtp_EXPN(self, arg: bytes) -> None:
        self._reply_unproductive(b"502 5.5.1 There are no lists here\r\n")

    def smtp_HELP(self, arg: bytes) -> None:
        self._reply_unproductive(b"214 2.0.0 RFC 5321\r\n")

    def smtp_STARTTLS(self, arg: bytes) -> None:
        if arg:
            self._reply_unproductive(_NO_ARGUMENT)
        elif self.session.tls is not None:
            self._reply_unproductive(b"503 5.5.1 TLS is active already\r\n")
        elif not self.session.offers_starttls or not self._context.has_tls:
            self._reply_unproductive(b"502 5.5.1 STARTTLS is not offered\r\n")
        else:
            # Octets after the command came in clear, perhaps from an attacker (CVE-2011-0411).
            self._input, self._position = b"", 0
            self._actions.append(b"220 2.0.0 Ready to start TLS\r\n")
            self._wait_for(BeginTls())

    # --- AUTH (RFC 4954) ------------------------------------------------------------------------

    def smtp_AUTH(self, arg: bytes) -> None:
        refusal = self._auth_refusal()
        if refusal:
            self._reply_unproductive(refusal)
        else:
            exchange = AuthExchange()
            self._continue_auth(exchange, exchange.begin(arg))

    def _continue_auth(
        self, exchange: AuthExchange, step: Challenge | GivenPassword | Reply
    ) -> None:
        match step:
            case Challenge():
                self._exchange = exchange
                self._actions.append(step.encode())
            case GivenPassword(name, password):
                self._wait_for(CheckPassword(name, password))
            case Reply():
                self._reply_unproductive(step.encode())

    def _auth_refusal(self) -> bytes:
        session = self.session
        if not session.takes_auth:
            return b"502 5.5.1 AUTH is not offered\r\n"
        if not session.offers_auth:
            return b"538 5.7.11 Encryption required\r\n"
        if session.user is not None or self._transaction is not None:
            return b"503 5.5.1 Not now\r\n"
        return b""

    def _on_password_checked(self, verdict: User | SecretVerdict) -> None:
        if isinstance(verdict, User):
            self.session.user = verdict
            self._actions.append(b"235 2.7.0 Welcome\r\n")
            return
        self._auth_failures += 1
        if verdict is SecretVerdict.WAIT or self._auth_failures >= AUTH_FAILURES_PER_SESSION:
            self._actions.append(b"421 4.7.0 Too many failures, try again later\r\n")
            self._close(linger=True)
        else:
            self._reply_unproductive(b"535 5.7.8 Authentication credentials invalid\r\n")

    # --- transaction ----------------------------------------------------------------------------

    def smtp_MAIL(self, arg: bytes) -> None:
        if not self.session.helo and self._context.spec.helo_required:
            self._reply_unproductive(_HELO_FIRST)
            return
        if self._transaction is not None:
            self._reply_unproductive(_NESTED_MAIL)
            return
        answer = mail(self.session, arg, self._context.limits)
        if isinstance(answer, Refusal):
            self._refuse(answer)
            return
        self._transaction = answer
        self.transactions += 1
        self._actions.append(_SENDER_OK)

    def smtp_RCPT(self, arg: bytes) -> None:
        if self._transaction is None:
            self._reply_unproductive(_MAIL_FIRST)
            return
        if self._message is not None:
            self._reply_unproductive(_IN_BDAT)
            return
        context = self._context
        answer = rcpt(
            self.session, self._transaction, arg, context.limits, hostname=context.hostname
        )
        if isinstance(answer, Refusal):
            self._refuse(answer, is_unproductive=not self.session.may_relay)
            return
        self._transaction.recipients.setdefault(answer.address, answer)
        self._actions.append(_RECIPIENT_OK)

    def smtp_DATA(self, arg: bytes) -> None:
        if arg:
            self._reply_unproductive(_NO_ARGUMENT)
        elif self._transaction is None:
            self._reply_unproductive(_MAIL_FIRST)
        elif self._message is not None:
            self._reply_unproductive(_IN_BDAT)
        elif not self._transaction.recipients:
            self._reply_unproductive(_RCPT_FIRST)
        else:
            reader = DataReader(
                limit_bytes=self._context.limits.message_size_bytes,
                bare_newline=self._context.spec.bare_newline,
                # A client that ended this very command with a bare LF knows no other line end.
                ends_with_lf=self._input[self._position - 2 : self._position] != b"\r\n",
            )
            self._message = self._begin_message(self._transaction, reader)
            self._actions.append(_SEND_DATA)

    def smtp_BDAT(self, arg: bytes) -> None:
        """RFC 3030 §2: the client sends the chunk without a wait, so it is read even if refused."""
        chunk = parse_chunk(arg)
        if chunk is None or chunk.octets > self._most_octets:
            self._refuse_client(b"501 5.5.4 Syntax: BDAT size [LAST]\r\n")
            return
        if self._transaction is None or not self._transaction.recipients:
            self._octets_to_discard = chunk.octets
            self._reply_after_discard = _MAIL_FIRST if self._transaction is None else _RCPT_FIRST
            self._discard(0)
            return
        if self._message is None:
            reader = BdatReader(
                limit_bytes=self._context.limits.message_size_bytes,
                bare_newline=self._context.spec.bare_newline,
            )
            self._message = self._begin_message(self._transaction, reader)
        self._message.begin_chunk(chunk)
        if not chunk.octets:
            self._handle_content(self._message)

    @property
    def _most_octets(self) -> int:
        return DRAIN_FACTOR * self._context.limits.message_size_bytes

    def _begin_message(
        self, transaction: Transaction, reader: DataReader | BdatReader
    ) -> MessageInput:
        intake = self._context.begin_message(self.session, transaction, reader)
        return MessageInput(intake, reader, most_octets=self._most_octets)

    def _read_content(self) -> None:
        """Take the octets of content out of the input, from `_position` on."""
        if self._octets_to_discard:
            self._discard(min(self._octets_to_discard, len(self._input) - self._position))
            return
        assert self._message is not None
        self._position = self._message.feed(self._input, self._position)
        self._handle_content(self._message)

    def _discard(self, count: int) -> None:
        self._position += count
        self._octets_to_discard -= count
        if not self._octets_to_discard:
            self._reply_unproductive(self._reply_after_discard)

    def _handle_content(self, message: MessageInput) -> None:
        match message.next_step():
            case bytes(reply):
                self._actions.append(reply)
            case Finish() | StagePiece() as action:
                self._wait_for(action)

    def _finish_message(self, message: MessageInput, refusal: Refusal | None) -> None:
        self._end_transaction()
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._unproductive = 0
            self.session.messages += 1
            queue_id = message.intake.queue_id
            self._actions.append(f"250 2.0.0 Ok: queued as {queue_id}\r\n".encode())
        if message.closes_session:
            self._close(linger=True)

    def _forget_transaction(self) -> None:
        """End the transaction, and remove what was staged of its message."""
        message = self._message
        self._end_transaction()
        if message is not None:
            self._actions.append(Abandon(message.intake))

    def _end_transaction(self) -> None:
        self._message = None
        self._transaction = None

    # --- refusals, and the end ------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, *, is_unproductive: bool = True) -> None:
        text = f"{refusal.reply.code}: {refusal.reason}"
        self._actions.append(Log(text, is_limited=not self.session.may_relay))
        self._actions.append(refusal.reply.encode())
        if refusal.closes:
            self._close(linger=True)
        elif is_unproductive:
            self._count_unproductive()

    def _reply_unproductive(self, reply: bytes, about: str = "") -> None:
        """Reply to an unproductive command and count it; log a refusal."""
        if reply.startswith(b"5"):
            self._actions.append(Log(text_of(reply) + about))
        self._actions.append(reply)
        self._count_unproductive()

    def _count_unproductive(self) -> None:
        self._unproductive += 1
        if self._unproductive > UNPRODUCTIVE_COMMANDS_PER_SESSION:
            self._refuse_client(_TOO_MANY_UNPRODUCTIVE)

    def _refuse_client(self, reply: bytes, why: str = "") -> None:
        """Refuse a client that is at fault, log it, and end the session."""
        if not self.has_ended:
            self._actions.append(Log(why or text_of(reply)))
            self._actions.append(reply)
            self._close(linger=True)

    def _close(self, *, linger: bool = False) -> None:
        if not self.has_ended:
            self._actions.append(Close(linger))
            self._end()


_VERBS: dict[bytes, Callable[[ServerProtocol, bytes], None]] = {
    name.removeprefix("smtp_").encode(): command
    for name, command in vars(ServerProtocol).items()
    if name.startswith("smtp_")
}


def _split_at_any_space(line: bytes) -> tuple[bytes, bytes]:
    """Verb and argument of a command, with any white space between them."""
    verb, _, arg = line.replace(b"\t", b" ").lstrip(b" ").partition(b" ")
    return verb, arg
