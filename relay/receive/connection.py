"""One client's connection: an `aiosmtpd.smtp.SMTP` that reads, waits and writes in its own way.

What stays of aiosmtpd is the shape (a protocol, its `smtp_…` verbs, `push`), PROXY headers
and their parser. What is overridden, and why:

    __init__          aiosmtpd inspects itself anew for each connection
    _handle_client    it reads lines from a stream, one wake-up and one write each. Here all that has
                      arrived is taken out of one buffer, and the replies to it leave in one write
    eof_received,     it cancels the handler, in the middle of a commit too. Here a task is never
    connection_lost   cancelled: who says goodbye early still has sent the message, and who only
                      closes his half still gets his replies
    smtp_MAIL, …RCPT  it decodes encoded words inside addresses, and refuses most parameters
    smtp_DATA         it holds what it refuses, and refuses long lines (relay.receive.content)
    smtp_STARTTLS     it uses the private half of asyncio, which is not uvloop's
    handle_exception  it sends the exception's text
    _timeout_cb       it waits for a client that never reads

A session is a state machine driven by `data_received`; a task exists only while something
has to be waited for (the store, a password, a handshake), and input rests meanwhile. All that
is decided is decided in `relay.receive.submission`.
"""

# mypy: disable-error-code="override"
# aiosmtpd's verbs are coroutines over text; ours are functions over bytes, called by our own table only.

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, cast

from aiosmtpd.proxy_protocol import AF, ProxyData, get_proxy
from aiosmtpd.smtp import SMTP

from relay.receive.access import may_relay
from relay.receive.certificates import ServerTls
from relay.receive.content import BdatReader, DataReader
from relay.receive.intake import Intake, Reception
from relay.receive.limits import AUTH_LINE_OCTETS, COMMAND_LINE_OCTETS, MISTAKES_PER_SESSION
from relay.receive.passwords import Passwords
from relay.receive.session import Session, TlsFacts, Transaction
from relay.receive.spec import BareNewline, ListenerSpec, ListenerTls
from relay.receive.submission import Refusal, mail, rcpt

__all__ = ["Connection", "Door"]

log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0
"""How long a client may take to read our last reply before the connection is aborted."""
HANDSHAKE_SECONDS = 30.0
PROXY_SECONDS = 10.0
LONGEST_AUTH_DELAY_SECONDS = 5.0
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
_BARE_LF = b"500 5.5.2 Lines end with CRLF\r\n"
_LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_SHUTTING_DOWN = b"421 4.3.2 Going down for a while, try again later\r\n"
_TIMED_OUT = b"421 4.4.2 You took too long\r\n"
_OUR_TROUBLE = b"421 4.3.0 Trouble of our own, try again later\r\n"
_TOO_MANY_MISTAKES = b"421 4.7.0 Too many commands that led nowhere\r\n"
_NOT_SMTP = b"554 5.5.1 This is SMTP\r\n"

_PRINTABLE = re.compile(rb"[!-~]++")
_HTTP = frozenset({b"GET", b"POST", b"PUT", b"HEAD", b"CONNECT", b"OPTIONS", b"DELETE"})
_BEFORE_TLS = frozenset({b"NOOP", b"EHLO", b"STARTTLS", b"QUIT"})


class Door:
    """A listener as its connections see it: what they share, and who is inside."""

    def __init__(
        self, spec: ListenerSpec, reception: Reception, tls: ServerTls | None, passwords: Passwords
    ) -> None:
        self.spec = spec
        self.reception = reception
        self.tls = tls
        self.passwords = passwords
        self.is_closing = False
        self.inside: set[Connection] = set()
        self.empty = asyncio.Event()
        self.empty.set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.greeting = f"220 {reception.hostname} ESMTP ready\r\n".encode()
        self._ehlo_replies: dict[tuple[bool, bool], bytes] = {}

    def enter(self, connection: Connection) -> None:
        self.inside.add(connection)
        self.empty.clear()

    def leave(self, connection: Connection) -> None:
        self.inside.discard(connection)
        if not self.inside:
            self.empty.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that lives as long as it needs, whatever becomes of the connection."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def ehlo_reply(self, session: Session) -> bytes:
        """What EHLO is answered: who we are and what we can (RFC 5321 §4.1.1.1)."""
        key = (session.offers_starttls, session.offers_auth)
        reply = self._ehlo_replies.get(key)
        if reply is None:
            lines = [self.reception.hostname, *self._keywords(*key)]
            text = "".join(f"250-{line}\r\n" for line in lines[:-1]) + f"250 {lines[-1]}\r\n"
            reply = self._ehlo_replies[key] = text.encode()
        return reply

    def _keywords(self, offers_starttls: bool, offers_auth: bool) -> list[str]:
        limits = self.reception.limits
        return [
            "PIPELINING",
            f"SIZE {limits.message_size_bytes}",
            *(["STARTTLS"] if offers_starttls else []),
            *(["AUTH PLAIN LOGIN"] if offers_auth else []),
            "8BITMIME",
            "SMTPUTF8",
            "ENHANCEDSTATUSCODES",
            "DSN",
            "CHUNKING",
            f"LIMITS RCPTMAX={limits.recipients}",
        ]


class Connection(SMTP):
    """See the module's text."""

    transport: asyncio.Transport

    def __init__(self, door: Door) -> None:
        self.loop = asyncio.get_running_loop()
        self._door = door
        self._reception = door.reception
        self._session = Session(door.spec)
        self._transaction: Transaction | None = None
        self._intake: Intake | None = None
        self._is_reading_content = False
        self._swallow = 0
        self._after_swallow = b""
        self._exchange: Callable[[bytes], None] | None = None
        self._proxy_header: asyncio.StreamReader | None = None
        self._input = b""
        self._position = 0
        self._output: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._is_paused = False
        self._is_writable = True
        self._is_closing = False
        self._is_lost = False
        self._is_admitted = False
        self._had_eof = False
        self._mistakes = 0
        self._auth_failures = 0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._transaction_ends = 0.0

    # --- the transport speaks -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._door.enter(self)
        self._watch(self._reception.limits.idle.total_seconds())
        if self._door.spec.proxy_protocol:
            self._proxy_header = asyncio.StreamReader()
            self._wait_for(self._read_proxy_header(self._proxy_header))
        else:
            self._arrive(_address(transport.get_extra_info("peername")))

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        if self._proxy_header is not None:
            self._proxy_header.feed_data(data)
            return
        self._input = self._input + data if self._input else data
        if self._task is not None or not self._is_writable:
            self._pause()
        else:
            self._process()

    def eof_received(self) -> bool:
        """The client closed its half. What it is still owed it gets, where the other half may stay open."""
        self._had_eof = True
        if self._proxy_header is not None:
            self._proxy_header.feed_eof()
        is_owed = self._task is not None or not self._is_writable
        return is_owed and self._session.tls is None

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._go_on()

    # --- reading --------------------------------------------------------------------------------

    def _process(self) -> None:
        """Take all that is complete out of the input, and say the replies in one piece."""
        try:
            made_progress = self._take_all()
        except Exception:
            log.exception("%s: a session failed", self._who)
            self._end(_OUR_TROUBLE)
            return
        if self._is_closing:
            return
        self._flush()
        if self._task is not None:
            return
        if self._had_eof:
            self._close()
        elif self._door.is_closing and not self._is_reading_content:
            self._end(_SHUTTING_DOWN)
        elif made_progress:
            self._expect_more()

    def _take_all(self) -> bool:
        made_progress = False
        while self._task is None and self._is_writable and not self._is_closing:
            if self._is_reading_content or self._swallow:
                if self._position == len(self._input):
                    break
                self._read_content()
            else:
                line = self._next_line()
                if line is None:
                    break
                self._obey(line)
            made_progress = True
        self._input = self._input[self._position :] if self._position < len(self._input) else b""
        self._position = 0
        return made_progress

    def _next_line(self) -> bytes | None:
        """A line of a command, without its CRLF (RFC 5321 §2.3.8). Whoever ends lines otherwise is sent away:
        where two hosts see different lines, one smuggles."""
        end = self._input.find(b"\n", self._position)
        length = (len(self._input) if end < 0 else end) - self._position
        if length > AUTH_LINE_OCTETS:
            self._end(_LINE_TOO_LONG)
            return None
        if end < 0:
            return None
        line = self._input[self._position : end]
        self._position = end + 1
        if line.endswith(b"\r"):
            return line[:-1]
        if self._door.spec.bare_newline is BareNewline.NORMALISE:
            return line
        self._end(_BARE_LF)
        return None

    def _obey(self, line: bytes) -> None:
        if self._exchange is not None:
            exchange, self._exchange = self._exchange, None
            exchange(line)
            return
        word, _, arg = line.partition(b" ")
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
            self._end(_NOT_SMTP)
        else:
            self._complain(_SYNTAX)

    # --- session --------------------------------------------------------------------------------

    def smtp_EHLO(self, arg: bytes) -> None:
        if self._introduce(arg, extended=True):
            self.push(self._door.ehlo_reply(self._session))

    def smtp_HELO(self, arg: bytes) -> None:
        if self._introduce(arg, extended=False):
            self.push(f"250 {self._reception.hostname}\r\n".encode())

    def _introduce(self, arg: bytes, *, extended: bool) -> bool:
        """RFC 5321 §4.1.4: EHLO also ends whatever transaction there was."""
        if len(arg) > 255 or not _PRINTABLE.fullmatch(arg):
            self._complain(b"501 5.5.4 Syntax: EHLO hostname\r\n")
            return False
        self._session.helo = arg.decode("ascii")
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
        if arg:
            self._complain(_NO_ARGUMENT)
        else:
            self.push(_BYE)
            self._close()

    def smtp_VRFY(self, arg: bytes) -> None:
        # RFC 5321 §3.5.3: 252 where we cannot tell, and would not.
        self._complain(
            b"252 2.5.2 Send some mail, it may arrive\r\n" if arg else b"501 5.5.4 Syntax: VRFY string\r\n"
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
        elif not self._session.offers_starttls or not self._session.extended or self._door.tls is None:
            self._complain(b"502 5.5.1 STARTTLS is not offered\r\n")
        else:
            # Whatever came behind the command came in clear, perhaps from somebody else (CVE-2011-0411).
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
            return
        mechanism, _, initial = arg.partition(b" ")
        match mechanism.upper():
            case b"PLAIN":
                self._challenge(b"", self._plain, initial.strip())
            case b"LOGIN":
                self._challenge(b"Username:", self._login_name, initial.strip())
            case b"":
                self._complain(b"501 5.5.4 Syntax: AUTH mechanism\r\n")
            case _:
                self._complain(b"504 5.5.4 This mechanism is not known here\r\n")

    def _no_auth_because(self) -> bytes:
        session = self._session
        if not session.takes_auth:
            return b"502 5.5.1 AUTH is not offered\r\n"
        if not session.offers_auth:
            return b"538 5.7.11 Encryption required\r\n"
        if not session.extended:
            return b"503 5.5.1 EHLO comes first\r\n"
        if session.user is not None or self._transaction is not None:
            return b"503 5.5.1 Not now\r\n"
        return b""

    def _challenge(self, text: bytes, answer: Callable[[bytes], None], initial: bytes = b"") -> None:
        def decode(line: bytes) -> None:
            if line == b"*":
                self._complain(b"501 5.7.0 Authentication cancelled\r\n")
                return
            try:
                octets = b"" if line == b"=" else base64.b64decode(line, validate=True)
            except binascii.Error:
                self._complain(b"501 5.5.2 That is not base64\r\n")
                return
            answer(octets)

        if initial:
            decode(initial)
        else:
            self.push(b"334 " + base64.b64encode(text) + b"\r\n")
            self._exchange = decode

    def _plain(self, octets: bytes) -> None:
        """authzid NUL authcid NUL passwd (RFC 4616 §2); nobody may act for another."""
        parts = octets.split(b"\0")
        if len(parts) != 3 or not parts[1] or parts[0] not in (b"", parts[1]):
            self._complain(b"501 5.5.2 That is not PLAIN\r\n")
        else:
            self._wait_for(self._authenticate(parts[1], parts[2]))

    def _login_name(self, name: bytes) -> None:
        self._challenge(b"Password:", lambda password: self._wait_for(self._authenticate(name, password)))

    async def _authenticate(self, name: bytes, password: bytes) -> None:
        failures, client = self._reception.failures, self._session.client or "local"
        if failures.must_wait(client, self._reception.clock()):
            log.warning("%s: too many wrong passwords, not looking at another", self._who)
            self._end(b"421 4.7.0 Too many failures, try again later\r\n")
            return
        user = await self._door.passwords.verify(
            self._reception.access(), name.decode("utf-8", "replace"), password.decode("utf-8", "replace")
        )
        if user is not None:
            failures.forgive(client)
            self._session.user = user
            self.push(b"235 2.7.0 Welcome\r\n")
            return
        count = failures.note(client, self._reception.clock())
        log.warning("%s: wrong password for %.80r", self._who, name)
        await asyncio.sleep(min(2.0 ** (count - 3), LONGEST_AUTH_DELAY_SECONDS))
        self._auth_failures += 1
        if self._auth_failures >= AUTH_FAILURES_PER_SESSION:
            self._end(b"421 4.7.0 Too many failures, try again later\r\n")
        else:
            self._complain(b"535 5.7.8 Authentication credentials invalid\r\n")

    # --- transaction ----------------------------------------------------------------------------

    def smtp_MAIL(self, arg: bytes) -> None:
        if not self._session.helo:
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
        self._transaction_ends = self.loop.time() + self._reception.limits.transaction.total_seconds()
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
            self._begin_content(self._transaction, DataReader(**self._reader_options()))
            self._is_reading_content = True
            self.push(_SEND_DATA)

    def smtp_BDAT(self, arg: bytes) -> None:
        """RFC 3030 §2: the chunk follows whatever we think of it, so it is read in any case."""
        count, is_last, is_good = _chunk_size(arg)
        if not is_good or count > DRAIN_FACTOR * self._reception.limits.message_size_bytes:
            self._end(b"501 5.5.4 Syntax: BDAT size [LAST]\r\n")
            return
        refusal = b""
        if self._transaction is None:
            refusal = _MAIL_FIRST
        elif not self._transaction.recipients:
            refusal = _RCPT_FIRST
        if refusal or self._transaction is None:
            self._swallow, self._after_swallow = count, refusal
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
            "normalise": self._door.spec.bare_newline is BareNewline.NORMALISE,
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
            self._wait_for(intake.stage())
        elif isinstance(reader, BdatReader) and not reader.in_chunk:
            self._is_reading_content = False
            self._end_chunk(intake)
        elif isinstance(reader, DataReader) and reader.ends_with_bare_dot:
            # It waits for an answer that CRLF would have brought; what follows we would not take either.
            self._wait_for(self._finish_message(intake, closes=True))
        elif reader.read_bytes > DRAIN_FACTOR * self._reception.limits.message_size_bytes:
            self._wait_for(self._finish_message(intake, closes=True))

    def _end_chunk(self, intake: Intake) -> None:
        if intake.refusal is not None or intake.reader.flaw is not None:
            self._wait_for(self._finish_message(intake))
        else:
            self.push(b"250 2.0.0 Ok, go on\r\n")

    async def _finish_message(self, intake: Intake, *, closes: bool = False) -> None:
        refusal = await intake.finish()
        self._intake = None
        self._transaction = None
        self._is_reading_content = False
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._mistakes = 0
            self._session.messages += 1
            self.push(f"250 2.0.0 Ok: queued as {intake.queue_id}\r\n".encode())
            if self._is_lost:
                log.info("%s: accepted from %s, who did not wait for the reply", intake.queue_id, self._who)
        if closes:
            self._close(linger=True)

    def _forget_transaction(self) -> None:
        intake, self._intake = self._intake, None
        self._transaction = None
        self._is_reading_content = False
        if intake is not None:
            self._door.spawn(intake.abandon())

    # --- arriving -------------------------------------------------------------------------------

    def _arrive(self, client: str | None) -> None:
        """The client is known: let it in, and greet it."""
        self._session.client = client
        if self._door.is_closing:
            self.push(_SHUTTING_DOWN)
            self._close()
            return
        refusal = self._reception.connections.admit(client or "", self._reception.limits)
        if refusal is not None:
            self.push(refusal.encode())
            self._close()
            return
        self._is_admitted = True
        self._session.in_networks = may_relay(self._reception.access(), client)
        if self._door.spec.tls is ListenerTls.IMPLICIT and self._door.tls is not None:
            self._wait_for(self._start_tls(self._door.tls, greets=True))
        else:
            self.push(self._door.greeting)
            self._flush()

    async def _read_proxy_header(self, header: asyncio.StreamReader) -> None:
        """Learn from the proxy in front of us who the client is."""
        try:
            async with asyncio.timeout(PROXY_SECONDS):
                data = await get_proxy(header)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            data = None
        if not data:
            log.warning("%s: no PROXY header from here", _address(self.transport.get_extra_info("peername")))
            self._abort()
            return
        self._proxy_header = None
        header.feed_eof()
        self._input = await header.read() + self._input
        self._task = None
        self._arrive(_proxied(data))

    async def _start_tls(self, tls: ServerTls, *, greets: bool = False) -> None:
        handshake = self.loop.create_task(
            self.loop.start_tls(
                self.transport,
                self,
                tls.context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=LINGER_SECONDS,
            )
        )
        await asyncio.sleep(0)  # now TLS listens, and not we
        if self._input:
            early, self._input = self._input, b""
            # On both loops TLS is an `asyncio.BufferedProtocol`, though uvloop's does not say so.
            self.loop.call_soon(_feed, cast(asyncio.BufferedProtocol, self.transport.get_protocol()), early)
        try:
            transport = await handshake
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            log.info("%s: no TLS: %s", self._who, error)
            transport = None
        if transport is None:
            # asyncio does not tell a protocol about a connection that ended in the handshake.
            self._abort()
            self._leave()
            return
        self.transport = transport
        self._is_paused = False
        name, version, _ = transport.get_extra_info("cipher") or ("unknown", "TLS", 0)
        session_tls = transport.get_extra_info("ssl_object")
        self._session.tls = TlsFacts(session_tls.version() if session_tls else version, name)
        self._session.start_over()
        self._forget_transaction()
        if greets:
            self.push(self._door.greeting)

    # --- writing --------------------------------------------------------------------------------

    def push(self, reply: bytes) -> None:
        """Say something, at the next `_flush`."""
        self._output.append(reply)

    def _refuse(self, refusal: Refusal, *, is_mistake: bool = True) -> None:
        log.info("%s: %s: %s", self._who, refusal.reply.code, refusal.reason)
        self.push(refusal.reply.encode())
        if refusal.closes:
            self._close(linger=True)
        elif is_mistake:
            self._idle()

    def _complain(self, reply: bytes) -> None:
        self.push(reply)
        self._idle()

    def _idle(self) -> None:
        """Count a command that brought no mail nearer; after too many of them it ends."""
        self._mistakes += 1
        if self._mistakes > MISTAKES_PER_SESSION:
            self._end(_TOO_MANY_MISTAKES)

    def _flush(self) -> None:
        if self._output:
            if not self._is_lost:
                self.transport.write(b"".join(self._output))
            self._output.clear()

    # --- waiting --------------------------------------------------------------------------------

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this, and look at no input until it is done. It is never cancelled: the client may go."""
        self._task = self._door.spawn(work)
        self._task.add_done_callback(self._waited)

    def _waited(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.error("%s: a session failed", self._who, exc_info=failure)
            self._end(_OUR_TROUBLE)
        if self._is_lost:
            self._forget_transaction()
            return
        self._flush()
        if self._task is None and not self._is_closing:
            self._expect_more()
            self._go_on()

    def _go_on(self) -> None:
        """Look at what waited in the input, and listen again."""
        if self._task is None and self._is_writable and not self._is_closing:
            self._process()
            if self._task is None and self._is_paused and not self._is_closing:
                self._is_paused = False
                self.transport.resume_reading()

    def _pause(self) -> None:
        if not self._is_paused and not self.transport.is_closing():
            self._is_paused = True
            self.transport.pause_reading()

    # --- timers ---------------------------------------------------------------------------------

    def _expect_more(self) -> None:
        """The client's turn: for a command, or more content, it has `idle` from now.

        A command that comes octet by octet does not get more time with each.
        """
        deadline = self.loop.time() + self._reception.limits.idle.total_seconds()
        if self._transaction is not None:
            deadline = min(deadline, self._transaction_ends)
        self._deadline = deadline
        if deadline < self._timer_due:
            self._watch(deadline - self.loop.time())

    def _watch(self, seconds: float) -> None:
        """One timer for a connection, which looks at the deadline of the moment when it fires."""
        if self._timer is not None:
            self._timer.cancel()
        seconds = max(0.0, seconds)
        self._timer_due = self.loop.time() + seconds
        if not self._deadline:
            self._deadline = self._timer_due
        self._timer = self.loop.call_later(seconds, self._timeout_cb)

    def _timeout_cb(self) -> None:
        left = self._deadline - self.loop.time()
        if self._is_closing:
            return
        if self._task is not None:
            self._watch(self._reception.limits.idle.total_seconds())  # it waits for us
        elif left > 0.001:
            self._watch(left)
        else:
            log.info("%s: timed out", self._who)
            self._end(_TIMED_OUT)

    # --- ending ---------------------------------------------------------------------------------

    def _end(self, last_words: bytes) -> None:
        """Say this and end the session."""
        if not self._is_closing:
            self.push(last_words)
            self._close(linger=True)

    def _close(self, *, linger: bool = False) -> None:
        """Send what was said and close; abort if the client does not read it.

        To close while the client is still sending would reset the connection, and with it take away the reply
        that says why. `linger` closes our half only, for a while, and reads on without looking.
        """
        if self._is_closing:
            return
        self._is_closing = True
        self._flush()
        self._input, self._position = b"", 0
        if self._task is None:
            self._forget_transaction()
        if self._is_lost:
            return
        if not (linger and not self._had_eof and self._close_our_half()):
            self.transport.close()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._abort)

    def _close_our_half(self) -> bool:
        """Whether that could be done: not in TLS, and not when the client went first."""
        if self.transport.is_closing() or not self.transport.can_write_eof():
            return False
        try:
            self.transport.write_eof()
        except OSError:
            return False
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()
        return True

    def _abort(self) -> None:
        self._is_closing = True
        if not self._is_lost:
            self.transport.abort()

    def _leave(self) -> None:
        """The connection is gone. A task that still runs goes on; everything else is forgotten."""
        if self._is_lost:
            return
        self._is_lost = self._is_closing = True
        self._stop_timer()
        self._input, self._position = b"", 0
        self._door.leave(self)
        if self._is_admitted:
            self._reception.connections.leave(self._session.client or "")
        if self._proxy_header is not None:
            self._proxy_header.feed_eof()
        if self._task is None:
            self._forget_transaction()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def drain(self) -> None:
        """The listener closes: say so now, or after the message that is coming in."""
        if self._task is None and not self._is_reading_content:
            self._end(_SHUTTING_DOWN)

    def abort(self) -> None:
        """The grace is over."""
        self._abort()

    @property
    def _who(self) -> str:
        return "[?]" if self._session.client is None else f"[{self._session.client or 'local'}]"


_VERBS: dict[bytes, Callable[[Connection, bytes], None]] = {
    name.removeprefix("smtp_").encode(): getattr(Connection, name)
    for name in vars(Connection)
    if name.startswith("smtp_")
}


def _feed(protocol: asyncio.BufferedProtocol, octets: bytes) -> None:
    """What was read before TLS listened: a client that need not wait for us begins at once."""
    while octets:
        buffer = memoryview(protocol.get_buffer(len(octets)))
        count = min(len(buffer), len(octets))
        buffer[:count] = octets[:count]
        protocol.buffer_updated(count)
        octets = octets[count:]


def _chunk_size(arg: bytes) -> tuple[int, bool, bool]:
    """Size, whether it is the last, and whether the argument can be read at all."""
    size, _, last = arg.partition(b" ")
    last = last.strip().upper()
    is_good = size.isdigit() and len(size) <= 20 and last in (b"", b"LAST")
    return (int(size), last == b"LAST", True) if is_good else (0, False, False)


def _address(peername: object) -> str:
    """The address of a peer; "" of a UNIX socket. IPv4 in IPv6 is IPv4 (RFC 4291 §2.5.5.2)."""
    if not isinstance(peername, tuple):
        return ""
    host = str(peername[0]).partition("%")[0]
    return host.removeprefix("::ffff:") if "." in host else host


def _proxied(data: ProxyData) -> str | None:
    """The client's address by the PROXY header; None for the proxy's own checks and where it does not say.

    Never the proxy's address instead, which may well be in our networks.
    """
    if data.version == 2 and data.command == 0:
        return None
    if data.family not in (AF.INET, AF.INET6) or data.src_addr is None:
        return None
    return _address((data.src_addr,))
