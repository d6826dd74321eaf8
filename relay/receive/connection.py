"""One client's connection: an `aiosmtpd.smtp.SMTP` that reads, waits and writes in its own way.

What stays of aiosmtpd is the shape (a protocol with `smtp_…` verbs and `push`) and its parser
of PROXY headers. What is overridden, here and in `relay.receive.dialogue`, and why:

    __init__          it inspects itself anew for each connection
    _handle_client    it reads lines from a stream, one wake-up and one write each. Here all that has
                      arrived is taken out of one buffer, and the replies to it leave in one write
    eof_received,     it cancels the handler, in the middle of a commit too. Here a task is never
    connection_lost   cancelled: who vanishes after the end of data still has sent the message,
                      and who only closes his half still gets his replies
    smtp_MAIL, RCPT   it decodes encoded words inside addresses, and refuses most parameters
    smtp_DATA         it holds what it refuses, and refuses long lines
    smtp_STARTTLS     it uses the private half of asyncio, which is not uvloop's
    handle_exception  it sends the exception's text
    _timeout_cb       it closes, and so waits for a client that never reads; here the end is an abort

A session is a state machine driven by `data_received`; a task exists only while something
has to be waited for (the store, a password, a handshake), and input rests meanwhile. This
module is the machine; what is said is in `relay.receive.dialogue`, and what is decided in
`relay.receive.submission`.
"""

# mypy: disable-error-code="override"
# aiosmtpd's `push` is a coroutine; ours need not be waited for.

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Coroutine
from typing import Any, cast

from aiosmtpd.proxy_protocol import AF, ProxyData, get_proxy
from aiosmtpd.smtp import SMTP

from relay.mail.ip import canonical
from relay.receive.access import may_relay
from relay.receive.limits import AUTH_LINE_OCTETS
from relay.receive.listener_state import ListenerState
from relay.receive.session import Session, TlsFacts
from relay.receive.spec import BareNewline, ListenerTls
from relay.submit.certificates import ServerTls

__all__ = ["NOT_SMTP", "Connection", "text_of"]

log = logging.getLogger(__name__)

LINGER_SECONDS = 5.0
"""How long a client may take to read our last reply before the connection is aborted."""
HANDSHAKE_SECONDS = 30.0
PROXY_SECONDS = 10.0

_TLS_HANDSHAKE = b"\x16\x03"
"""How a TLS record with a ClientHello begins (RFC 8446 §5.1)."""

_BARE_LF = b"500 5.5.2 Lines end with CRLF\r\n"
_LINE_TOO_LONG = b"500 5.5.2 Line too long\r\n"
_SHUTTING_DOWN = b"421 4.3.2 Going down for a while, try again later\r\n"
NOT_SMTP = b"554 5.5.1 This is SMTP\r\n"
_TIMED_OUT = b"421 4.4.2 You took too long\r\n"
_OUR_TROUBLE = b"421 4.3.0 Trouble of our own, try again later\r\n"


class Connection(SMTP):
    """Reads, waits and writes. What is said is for `Dialogue`."""

    transport: asyncio.Transport

    def __init__(self, door: ListenerState) -> None:
        self.loop = asyncio.get_running_loop()
        self._door = door
        self._reception = door.reception
        self._session = Session(door.spec)
        self._is_reading_content = False
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
        self._commands = 0
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._latest = math.inf
        """No deadline is later: the transaction's own."""

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
        """The client closed its half. What it is still owed it gets, where the other half may stay
        open.
        """
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
            if self._is_reading_content:
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
        """A line of a command, without its CRLF (RFC 5321 §2.3.8). Whoever ends lines otherwise is
        sent away: where two hosts see different lines, one smuggles.
        """
        end = self._input.find(b"\n", self._position)
        length = (len(self._input) if end < 0 else end) - self._position
        if not self._commands and self._input.startswith(_TLS_HANDSHAKE):
            self._turn_away(NOT_SMTP, "a TLS handshake, where TLS begins with STARTTLS or never")
            return None
        if length > AUTH_LINE_OCTETS:
            self._turn_away(_LINE_TOO_LONG)
            return None
        if end < 0:
            return None
        line = self._input[self._position : end]
        self._position = end + 1
        self._commands += 1
        if line.endswith(b"\r"):
            return line[:-1]
        if self._door.spec.bare_newline is not BareNewline.REFUSE:
            return line
        self._turn_away(_BARE_LF)
        return None

    # --- what is said, for `relay.receive.dialogue` ---------------------------------------------

    def _obey(self, line: bytes) -> None:
        """A line of a command has come."""
        raise NotImplementedError

    def _read_content(self) -> None:
        """Octets of content have come: take what is ours, from `_position` on."""
        raise NotImplementedError

    def _forget_transaction(self) -> None:
        """No transaction any more, and nothing left of it in the store."""
        raise NotImplementedError

    @property
    def _unfinished(self) -> str:
        """What a client leaves unfinished that goes now; "" for nothing."""
        is_silent = self._is_admitted and not self._commands
        # A task at this point is a handshake, which says itself how it ended.
        return "gone without a command" if is_silent and self._task is None else ""

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
            self._note(f"{refusal.code} {refusal.status} {refusal.text}")
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
            self._session.client = _address(self.transport.get_extra_info("peername"))
            self._note("no PROXY header from here")
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
            self.loop.call_soon(
                _feed, cast(asyncio.BufferedProtocol, self.transport.get_protocol()), early
            )
        try:
            transport = await handshake
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            self._note(f"no TLS: {error}")
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
        deadline = min(self.loop.time() + self._reception.limits.idle.total_seconds(), self._latest)
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
            self._turn_away(_TIMED_OUT)

    # --- ending ---------------------------------------------------------------------------------

    def _end(self, last_words: bytes) -> None:
        """Say this and end the session."""
        if not self._is_closing:
            self.push(last_words)
            self._close(linger=True)

    def _turn_away(self, last_words: bytes, why: str = "") -> None:
        """End the session of a client that is at fault, with a line in the log."""
        self._note(why or text_of(last_words))
        self._end(last_words)

    def _note(self, said: str) -> None:
        """A line in the log about this client, if it had not too many."""
        now = self._reception.clock()
        line = self._reception.oddities.line(self._session.client or "", said, now)
        if line is not None:
            log.info("%s: %s", self._who, line)

    def _close(self, *, linger: bool = False) -> None:
        """Send what was said and close; abort if the client does not read it.

        To close while the client is still sending would reset the connection, and with it take away
        the reply that says why. `linger` closes our half only, for a while, and reads on without
        looking.
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
        if not self._is_closing and self._unfinished:
            self._note(self._unfinished)
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


def _feed(protocol: asyncio.BufferedProtocol, octets: bytes) -> None:
    """What was read before TLS listened: a client that need not wait for us begins at once."""
    while octets:
        buffer = memoryview(protocol.get_buffer(len(octets)))
        count = min(len(buffer), len(octets))
        buffer[:count] = octets[:count]
        protocol.buffer_updated(count)
        octets = octets[count:]


def text_of(reply: bytes) -> str:
    """A reply of one line, for the log."""
    return reply.decode("ascii").rstrip("\r\n")


def _address(peername: object) -> str:
    """The address of a peer in its one form; "" of a UNIX socket."""
    if not isinstance(peername, tuple):
        return ""
    return canonical(str(peername[0]))


def _proxied(data: ProxyData) -> str | None:
    """The client's address by the PROXY header; None for the proxy's own checks and where it does
    not say.

    Never the proxy's address instead, which may well be in our networks.
    """
    if data.version == 2 and data.command == 0:
        return None
    if data.family not in (AF.INET, AF.INET6) or data.src_addr is None:
        return None
    return _address((data.src_addr,))
