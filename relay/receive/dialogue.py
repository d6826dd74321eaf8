"""What is said in a session: the verbs, over a `Connection`.

Each verb does its part of the state machine of RFC 5321 §4.1.4 and leaves the judgement to
`relay.receive.submission`; the bytes of content go to an `Intake`. Commands that bring no
mail nearer are counted, and end the session when they are too many.
"""

# mypy: disable-error-code="override"
# aiosmtpd's verbs are coroutines over text; ours are functions over bytes, called by our own table
# only.

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any, cast

from relay.mail.reply import Reply
from relay.receive.access import User
from relay.receive.connection import NOT_SMTP, Connection, text_of
from relay.receive.content import BareNewlines, BdatReader, DataReader
from relay.receive.intake import Intake
from relay.receive.limits import COMMAND_LINE_OCTETS, MISTAKES_PER_SESSION
from relay.receive.listener_state import ListenerState
from relay.receive.sasl import Challenge, Credentials, Exchange
from relay.receive.session import Transaction, name_of
from relay.receive.spec import BareNewline
from relay.receive.submission import mail, rcpt
from relay.submit.message import Refusal
from relay.submit.secrets import Verdict

__all__ = ["Dialogue"]

log = logging.getLogger(__name__)

LONGEST_AUTH_DELAY_SECONDS = 5.0
AUTH_REFUSAL_SECONDS = 1.0
AUTH_FAILURES_PER_SESSION = 3
DRAIN_FACTOR = 4
"""A message over the limit is read to its end up to so many times the limit, then cut off."""

_OK = b"250 2.0.0 Ok\r\n"
_SENDER_OK = b"250 2.1.0 Ok\r\n"
_RECIPIENT_OK = b"250 2.1.5 Ok\r\n"
_SEND_DATA = b"354 End data with <CR><LF>.<CR><LF>\r\n"
_BYE = b"221 2.0.0 Bye\r\n"
_SYNTAX = b"500 5.5.2 Syntax error\r\n"
_NO_ARGUMENT = b"501 5.5.4 No argument is known here\r\n"
_HELO_FIRST = b"503 5.5.1 EHLO or HELO comes first\r\n"
_MAIL_FIRST = b"503 5.5.1 MAIL comes first\r\n"
_RCPT_FIRST = b"503 5.5.1 RCPT comes first: there is no recipient\r\n"
_NESTED_MAIL = b"503 5.5.1 A transaction has begun already\r\n"
_IN_BDAT = b"503 5.5.1 BDAT has begun: BDAT or RSET now\r\n"
_TLS_FIRST = b"530 5.7.0 STARTTLS comes first here\r\n"
_LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_TOO_MANY_MISTAKES = b"421 4.7.0 Too many commands that led nowhere\r\n"

_STRAYS = {
    BareNewline.REFUSE: BareNewlines.REFUSED,
    BareNewline.NORMALISE: BareNewlines.SPACES,
    BareNewline.LINE_END: BareNewlines.LINE_ENDS,
}
_HTTP = frozenset({b"GET", b"POST", b"PUT", b"HEAD", b"CONNECT", b"OPTIONS", b"DELETE"})
_BEFORE_TLS = frozenset({b"NOOP", b"EHLO", b"STARTTLS", b"QUIT"})


class Dialogue(Connection):
    """A session, from the greeting to QUIT."""

    def __init__(self, door: ListenerState) -> None:
        super().__init__(door)
        self._transaction: Transaction | None = None
        self._intake: Intake | None = None
        self._swallow = 0
        self._after_swallow = b""
        self._exchange: Exchange | None = None
        self._mistakes = 0
        self._auth_failures = 0

    def _obey(self, line: bytes) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            self._go_on_with(exchange, exchange.answer(line))
            return
        word, _, arg = line.partition(b" ")
        verb = word.upper()
        command = _VERBS.get(verb)
        if command is None:  # a tab behind the verb, or white space before it
            word, arg = _split(line)
            verb = word.upper()
            command = _VERBS.get(verb)
        if len(line) > COMMAND_LINE_OCTETS and verb != b"AUTH":
            self._complain(_LINE_TOO_LONG)
        elif command is None:
            self._unknown(verb)
        elif self._session.must_start_tls and verb not in _BEFORE_TLS:
            self._complain(_TLS_FIRST)
        else:
            command(self, arg.strip(b" \t"))

    def _unknown(self, verb: bytes) -> None:
        if verb in _HTTP:
            self._turn_away(NOT_SMTP, "HTTP, where SMTP is spoken")
        else:
            # What comes later may be a password that lost its way.
            self._complain(_SYNTAX, f": {verb[:40]!r}" if self._commands == 1 else "")

    # --- session --------------------------------------------------------------------------------

    def smtp_EHLO(self, arg: bytes) -> None:
        if self._introduce(arg, extended=True):
            self.push(self._door.ehlo_reply(self._session))

    def smtp_HELO(self, arg: bytes) -> None:
        if self._introduce(arg, extended=False):
            self.push(f"250 {self._reception.hostname}\r\n".encode())

    def _introduce(self, arg: bytes, *, extended: bool) -> bool:
        """RFC 5321 §4.1.4: EHLO also ends whatever transaction there was. Any name will do: it decides
        nothing.
        """
        if not arg:
            self._complain(b"501 5.5.4 Syntax: EHLO hostname\r\n")
            return False
        self._session.helo = name_of(arg)
        self._session.extended = extended
        self._forget_transaction()
        self._idle()
        return True

    def smtp_NOOP(self, arg: bytes) -> None:
        self.push(_OK)
        self._idle()

    def smtp_RSET(self, arg: bytes) -> None:
        if arg:
            self._complain(_NO_ARGUMENT)
            return
        self._forget_transaction()
        self.push(_OK)
        self._idle()

    def smtp_QUIT(self, arg: bytes) -> None:
        self.push(_BYE)
        self._close()

    def smtp_VRFY(self, arg: bytes) -> None:
        # RFC 5321 §3.5.3: 252 where we cannot tell, and would not.
        self._complain(
            b"252 2.5.2 Send some mail, it may arrive\r\n"
            if arg
            else b"501 5.5.4 Syntax: VRFY string\r\n"
        )

    def smtp_EXPN(self, arg: bytes) -> None:
        self._complain(b"502 5.5.1 There are no lists here\r\n")

    def smtp_HELP(self, arg: bytes) -> None:
        self._complain(b"214 2.0.0 RFC 5321\r\n")

    def smtp_STARTTLS(self, arg: bytes) -> None:
        if arg:
            self._complain(_NO_ARGUMENT)
        elif self._session.tls is not None:
            self._complain(b"503 5.5.1 TLS is active already\r\n")
        elif not self._session.offers_starttls or self._door.tls is None:
            self._complain(b"502 5.5.1 STARTTLS is not offered\r\n")
        else:
            # Whatever came behind the command came in clear, perhaps from somebody else
            # (CVE-2011-0411).
            self._input, self._position = b"", 0
            self._pause()
            self.push(b"220 2.0.0 Ready to start TLS\r\n")
            self._flush()
            self._wait_for(self._start_tls(self._door.tls))

    # --- AUTH (RFC 4954) ------------------------------------------------------------------------

    def smtp_AUTH(self, arg: bytes) -> None:
        refusal = self._no_auth_because()
        if refusal:
            self._complain(refusal)
        else:
            exchange = Exchange()
            self._go_on_with(exchange, exchange.begin(arg))

    def _go_on_with(self, exchange: Exchange, step: Challenge | Credentials | Reply) -> None:
        match step:
            case Challenge():
                self._exchange = exchange
                self.push(step.encode())
            case Credentials(name, password):
                # Nobody has to say more now (RFC 4954 §4), so it waits where it costs us nothing.
                self._pause()
                self._wait_for(self._authenticate(name, password))
            case Reply():
                self._complain(step.encode())

    def _no_auth_because(self) -> bytes:
        session = self._session
        if not session.takes_auth:
            return b"502 5.5.1 AUTH is not offered\r\n"
        if not session.offers_auth:
            return b"538 5.7.11 Encryption required\r\n"
        if session.user is not None or self._transaction is not None:
            return b"503 5.5.1 Not now\r\n"
        return b""

    async def _authenticate(self, name: bytes, password: bytes) -> None:
        passwords, client = self._door.passwords, self._session.client or "local"
        user_name, begun = name.decode("utf-8", "replace"), self.loop.time()
        verdict = await passwords.judge(
            self._reception.access(), user_name, password, client=client
        )
        if isinstance(verdict, User):
            self._session.user = verdict
            self.push(b"235 2.7.0 Welcome\r\n")
            return
        # This form is promised: docs/fail2ban reads it.
        said = "refused" if verdict is Verdict.WAIT else "failed"
        log.warning("auth %s: client=%s service=smtp user=%.80r", said, client, name)
        self._auth_failures += 1
        if verdict is Verdict.WAIT:
            # The same time for all, so that it does not tell which of them were looked at.
            await asyncio.sleep(begun + AUTH_REFUSAL_SECONDS - self.loop.time())
        else:
            count = passwords.failures_of(user_name, client)
            await asyncio.sleep(min(2.0 ** (count - 3), LONGEST_AUTH_DELAY_SECONDS))
        if verdict is Verdict.WAIT or self._auth_failures >= AUTH_FAILURES_PER_SESSION:
            self._end(b"421 4.7.0 Too many failures, try again later\r\n")
        else:
            self._complain(b"535 5.7.8 Authentication credentials invalid\r\n")

    # --- transaction ----------------------------------------------------------------------------

    def smtp_MAIL(self, arg: bytes) -> None:
        if not self._session.helo and self._door.spec.helo_required:
            self._complain(_HELO_FIRST)
            return
        if self._transaction is not None:
            self._complain(_NESTED_MAIL)
            return
        answer = mail(self._session, arg, self._reception.limits)
        if isinstance(answer, Refusal):
            self._refuse(answer)
            return
        self._transaction = answer
        self._latest = self.loop.time() + self._reception.limits.transaction.total_seconds()
        self.push(_SENDER_OK)

    def smtp_RCPT(self, arg: bytes) -> None:
        if self._transaction is None:
            self._complain(_MAIL_FIRST)
            return
        if self._intake is not None:
            self._complain(_IN_BDAT)
            return
        answer = rcpt(
            self._session,
            self._transaction,
            arg,
            self._reception.limits,
            hostname=self._reception.hostname,
        )
        if isinstance(answer, Refusal):
            self._refuse(answer, is_mistake=not self._session.may_relay)
            return
        self._transaction.recipients.setdefault(answer.address, answer)
        self.push(_RECIPIENT_OK)

    def smtp_DATA(self, arg: bytes) -> None:
        if arg:
            self._complain(_NO_ARGUMENT)
        elif self._transaction is None:
            self._complain(_MAIL_FIRST)
        elif self._intake is not None:
            self._complain(_IN_BDAT)
        elif not self._transaction.recipients:
            self._complain(_RCPT_FIRST)
        else:
            # A client that ended this very command with a bare LF knows no other line end.
            ends_with_lf = self._input[self._position - 2 : self._position] != b"\r\n"
            options = self._reader_options()
            self._begin_content(self._transaction, DataReader(ends_with_lf=ends_with_lf, **options))
            self._is_reading_content = True
            self.push(_SEND_DATA)

    def smtp_BDAT(self, arg: bytes) -> None:
        """RFC 3030 §2: the chunk follows whatever we think of it, so it is read in any case."""
        count, is_last, is_good = _chunk_size(arg)
        if not is_good or count > DRAIN_FACTOR * self._reception.limits.message_size_bytes:
            self._turn_away(b"501 5.5.4 Syntax: BDAT size [LAST]\r\n")
            return
        refusal = b""
        if self._transaction is None:
            refusal = _MAIL_FIRST
        elif not self._transaction.recipients:
            refusal = _RCPT_FIRST
        if refusal or self._transaction is None:
            self._swallow, self._after_swallow = count, refusal
            self._is_reading_content = True
            self._swallowed(0)
            return
        if self._intake is None:
            self._begin_content(self._transaction, BdatReader(**self._reader_options()))
        reader = self._chunk_reader
        reader.begin_chunk(count, last=is_last)
        self._is_reading_content = True
        if not count:
            self._look_at_content()

    @property
    def _chunk_reader(self) -> BdatReader:
        assert self._intake is not None
        assert isinstance(self._intake.reader, BdatReader)
        return self._intake.reader

    def _reader_options(self) -> dict[str, Any]:
        return {
            "limit_bytes": self._reception.limits.message_size_bytes,
            "strays": _STRAYS[self._door.spec.bare_newline],
        }

    def _begin_content(self, transaction: Transaction, reader: DataReader | BdatReader) -> None:
        self._intake = Intake(self._reception, self._session, transaction, reader)

    def _read_content(self) -> None:
        if self._swallow:
            self._swallowed(min(self._swallow, len(self._input) - self._position))
            return
        assert self._intake is not None
        reader = cast(DataReader | BdatReader, self._intake.reader)
        self._position = reader.feed(self._input, self._position)
        self._look_at_content()

    def _swallowed(self, count: int) -> None:
        self._position += count
        self._swallow -= count
        if not self._swallow:
            self._is_reading_content = False
            self._complain(self._after_swallow)

    def _look_at_content(self) -> None:
        """What to do with what was read: more, a piece to stage, the end of a chunk, or of all."""
        intake = self._intake
        assert intake is not None
        reader = intake.reader
        if reader.complete:
            self._is_reading_content = False
            self._wait_for(self._finish_message(intake))
        elif intake.should_stage():
            self._wait_for(self._stage(intake))
        elif isinstance(reader, BdatReader) and not reader.in_chunk:
            self._is_reading_content = False
            self._end_chunk(intake)
        elif isinstance(reader, DataReader) and reader.ends_with_bare_dot:
            # It waits for an answer that CRLF would have brought; what follows we would not take
            # either.
            self._wait_for(self._finish_message(intake, closes=True))
        elif reader.read_bytes > DRAIN_FACTOR * self._reception.limits.message_size_bytes:
            self._wait_for(self._finish_message(intake, closes=True))

    async def _stage(self, intake: Intake) -> None:
        await intake.stage()
        if not self._is_lost:
            self._look_at_content()

    def _end_chunk(self, intake: Intake) -> None:
        if intake.refusal is not None or intake.reader.flaw is not None:
            self._wait_for(self._finish_message(intake))
        else:
            self.push(b"250 2.0.0 Ok, go on\r\n")

    async def _finish_message(self, intake: Intake, *, closes: bool = False) -> None:
        refusal = await intake.finish()
        self._end_transaction()
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._mistakes = 0
            self._session.messages += 1
            self.push(f"250 2.0.0 Ok: queued as {intake.queue_id}\r\n".encode())
            if self._is_lost:
                log.info(
                    "%s: accepted from %s, who did not wait for the reply",
                    intake.queue_id,
                    self._who,
                )
        if closes:
            self._close(linger=True)

    def _forget_transaction(self) -> None:
        intake = self._intake
        self._end_transaction()
        if intake is not None:
            self._door.spawn(intake.abandon())

    @property
    def _unfinished(self) -> str:
        return "gone in the middle of a message" if self._intake else super()._unfinished

    def _end_transaction(self) -> None:
        self._intake = None
        self._transaction = None
        self._is_reading_content = False
        self._latest = math.inf

    # --- answers ----------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, *, is_mistake: bool = True) -> None:
        said = f"{refusal.reply.code}: {refusal.reason}"
        if self._session.may_relay:
            log.info("%s: %s", self._who, said)
        else:
            self._note(said)
        self.push(refusal.reply.encode())
        if refusal.closes:
            self._close(linger=True)
        elif is_mistake:
            self._idle()

    def _complain(self, reply: bytes, about: str = "") -> None:
        if reply.startswith(b"5"):
            self._note(text_of(reply) + about)
        self.push(reply)
        self._idle()

    def _idle(self) -> None:
        """Count a command that brought no mail nearer; after too many of them it ends."""
        self._mistakes += 1
        if self._mistakes > MISTAKES_PER_SESSION:
            self._turn_away(_TOO_MANY_MISTAKES)


_VERBS: dict[bytes, Callable[[Dialogue, bytes], None]] = {
    name.removeprefix("smtp_").encode(): getattr(Dialogue, name)
    for name in vars(Dialogue)
    if name.startswith("smtp_")
}


def _split(line: bytes) -> tuple[bytes, bytes]:
    """Verb and argument of a command with other white space than one blank between them."""
    verb, _, arg = line.replace(b"\t", b" ").lstrip(b" ").partition(b" ")
    return verb, arg


def _chunk_size(arg: bytes) -> tuple[int, bool, bool]:
    """Size, whether it is the last, and whether the argument can be read at all."""
    size, _, last = arg.partition(b" ")
    last = last.strip().upper()
    is_good = size.isdigit() and len(size) <= 20 and last in (b"", b"LAST")
    return (int(size), last == b"LAST", True) if is_good else (0, False, False)
