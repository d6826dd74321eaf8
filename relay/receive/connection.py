"""One client's connection: the I/O of a session, on `aiosmtpd.smtp.SMTP`.

`relay.receive.protocol` decides the dialogue, without I/O. This module feeds it with the octets
that arrive and performs its actions. Work that takes time (the store, a password, a handshake) runs
in a task, and no input is read meanwhile.

aiosmtpd remains the base: its state, and its parser of PROXY headers. These methods are overridden:

    _handle_client    aiosmtpd reads lines from a stream, with one wake-up and one write for each.
                      Here all octets that have arrived go to the protocol at once, and all replies
                      leave in one write
    data_received,    so octets do not go into aiosmtpd's stream
    connection_made
    eof_received,     aiosmtpd cancels the handler, also in the middle of a commit. Here a task is
    connection_lost   never cancelled: a client that vanishes after the end of data has sent its
                      message, and a client that closes only its half still gets its replies
    smtp_…            `ServerProtocol` has its own verbs: those of aiosmtpd decode encoded words
                      inside addresses, keep what they refuse, and start TLS by private names of
                      asyncio
    _timeout_cb       aiosmtpd closes, and so waits for a client that never reads; here it aborts

A new release of aiosmtpd that changes one of these names fails a test
(tests/unit/receive/test_connection.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
from collections.abc import Callable, Coroutine
from typing import TypeVar, cast

from aiosmtpd.proxy_protocol import AF, ProxyData, get_proxy
from aiosmtpd.smtp import SMTP

from relay.mail.ip import canonical
from relay.receive.access import User, may_relay
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
    text_of,
)
from relay.receive.listener_state import ListenerState
from relay.receive.protocol import ServerProtocol
from relay.receive.session import Session, TlsFacts
from relay.receive.spec import ListenerTls
from relay.submit.certificates import ServerTls
from relay.submit.message import Refusal
from relay.submit.secrets import SecretVerdict, log_refused

log = logging.getLogger(__name__)

T = TypeVar("T")

LINGER_SECONDS = 5.0
"""How long a client may take to read the last reply before the connection is aborted."""
HANDSHAKE_SECONDS = 30.0
PROXY_SECONDS = 10.0
LONGEST_AUTH_DELAY_SECONDS = 5.0
AUTH_REFUSAL_SECONDS = 1.0

_SHUTTING_DOWN = b"421 4.3.2 Going down for a while, try again later\r\n"
_TIMED_OUT = b"421 4.4.2 You took too long\r\n"
_INTERNAL_ERROR = b"421 4.3.0 Trouble of our own, try again later\r\n"


class Connection(SMTP):
    """An open connection of a listener."""

    def __init__(self, listener: ListenerState) -> None:
        # aiosmtpd's own __init__ inspects all members of the class, which takes a quarter of a
        # millisecond. So its state is made once for each listener.
        self.__dict__.update(listener.smtp_state)
        self.transport: asyncio.Transport
        self._listener = listener
        self._reception = listener.reception
        self._session = Session(listener.spec)
        self._protocol = ServerProtocol(listener, self._session)
        self._proxy_header: asyncio.StreamReader | None = None
        self._unread = b""
        """Octets that came while the protocol waited for a result."""
        self._output: list[bytes] = []
        self._work: asyncio.Task[object] | None = None
        self._is_paused = False
        self._is_writable = True
        self._is_closing = False
        self._is_lost = False
        self._is_admitted = False
        self._had_eof = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._transactions = 0
        self._transaction_deadline = math.inf
        """Of the last transaction, whether it has ended or not; no deadline is later in it."""

    # --- callbacks of the transport -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._listener.enter(self)
        self._watch(self._reception.limits.idle_seconds)
        if self._listener.spec.proxy_protocol:
            self._proxy_header = asyncio.StreamReader()
            self._wait_for(self._read_proxy_header(self._proxy_header), self._on_proxy_header)
        else:
            self._begin(_address(transport.get_extra_info("peername")))

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        if self._proxy_header is not None:
            self._proxy_header.feed_data(data)
        elif self._work is not None or not self._is_writable:
            self._unread += data
            self._pause()
        else:
            self._process(data)

    def eof_received(self) -> bool:
        """The client closed its half. It still gets its replies if the other half can stay open."""
        self._had_eof = True
        if self._proxy_header is not None:
            self._proxy_header.feed_eof()
        awaits_reply = self._work is not None or not self._is_writable
        return awaits_reply and self._session.tls is None

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self._read_on()

    # --- actions of the protocol ----------------------------------------------------------------

    def _process(self, octets: bytes) -> None:
        """Feed the protocol with the octets, and send its replies in one write."""
        try:
            self._perform(self._protocol.feed(octets))
        except Exception:
            log.exception("%s: a session failed", self._who)
            self._close_with(_INTERNAL_ERROR)
            return
        if self._is_closing:
            return
        self._flush()
        if self._work is not None:
            return
        if self._had_eof:
            self._close()
        elif self._listener.is_closing and not self._protocol.is_reading_content:
            self._close_with(_SHUTTING_DOWN)
        elif self._protocol.has_progressed:
            self._set_deadline()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, bytes):
                self._output.append(action)
            else:
                self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        match action:
            case Finish(intake):
                self._wait_for(self._finish(intake), self._resume)
            case StagePiece(intake):
                self._wait_for(intake.stage(), self._resume)
            case Abandon(intake):
                self._listener.spawn(intake.abandon())
            case CheckPassword():
                # The client has no more to send now (RFC 4954 §4), so the kernel may keep it.
                self._pause()
                self._wait_for(self._check_password(action), self._resume)
            case BeginTls():
                assert self._listener.tls is not None
                self._pause()
                self._flush()
                self._wait_for(self._start_tls(self._listener.tls), self._on_tls)
            case Log(text, is_limited=True):
                self._log_limited(text)
            case Log(text):
                log.info("%s: %s", self._who, text)
            case Close(linger):
                self._close(linger=linger)

    async def _finish(self, intake: Incoming) -> Refusal | None:
        refusal = await intake.finish()
        if refusal is None and self._is_lost:
            log.info(
                "%s: accepted from %s, who did not wait for the reply", intake.queue_id, self._who
            )
        return refusal

    async def _check_password(self, asked: CheckPassword) -> User | SecretVerdict:
        """Check a password. The answer to a wrong one is delayed."""
        passwords, client = self._listener.passwords, self._session.client or "local"
        name, begun = asked.name.decode("utf-8", "replace"), self.loop.time()
        user = self._reception.access().users.get(name)
        known = user.password if user is not None else None
        verdict = await passwords.judge_user(asked.password, known, client=client, name=name)
        if user is not None and verdict is SecretVerdict.RIGHT:
            return user
        log_refused(log, verdict, client=client, service="smtp", user=asked.name)
        if verdict is SecretVerdict.WAIT:
            # The same delay for all, so that it does not tell which passwords were checked.
            await asyncio.sleep(begun + AUTH_REFUSAL_SECONDS - self.loop.time())
        else:
            count = passwords.failures_of(name, client)
            await asyncio.sleep(min(2.0 ** (count - 3), LONGEST_AUTH_DELAY_SECONDS))
        return verdict

    # --- the start ------------------------------------------------------------------------------

    def _begin(self, client: str | None) -> None:
        """The client's address is known: count the connection, and send the greeting."""
        self._session.client = client
        if self._listener.is_closing:
            self._output.append(_SHUTTING_DOWN)
            self._close()
            return
        refusal = self._reception.connections.admit(client or "", self._reception.limits)
        if refusal is not None:
            self._log_limited(f"{refusal.code} {refusal.status} {refusal.text}")
            self._output.append(refusal.encode())
            self._close()
            return
        self._is_admitted = True
        self._session.in_networks = may_relay(self._reception.access(), client)
        if self._listener.spec.tls is ListenerTls.IMPLICIT and self._listener.tls is not None:
            self._wait_for(self._start_tls(self._listener.tls), self._on_implicit_tls)
        else:
            self._output.append(self._listener.greeting)
            self._flush()

    async def _read_proxy_header(self, header: asyncio.StreamReader) -> ProxyData | None:
        """The PROXY header that the proxy sends before the session; None without one."""
        try:
            async with asyncio.timeout(PROXY_SECONDS):
                data = await get_proxy(header)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            data = None
        self._proxy_header = None
        header.feed_eof()
        self._unread = await header.read() + self._unread
        return data or None

    def _on_proxy_header(self, data: ProxyData | None) -> None:
        if self._is_lost:
            return
        if data is None:
            self._session.client = _address(self.transport.get_extra_info("peername"))
            self._log_limited("no PROXY header from here")
            self.abort()
        else:
            self._begin(_proxied(data))

    async def _start_tls(self, tls: ServerTls) -> TlsFacts | None:
        """The handshake; None where it failed, and the connection with it."""
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
        await asyncio.sleep(0)  # from now on the TLS protocol gets the octets
        if self._unread:
            unread, self._unread = self._unread, b""
            # On both loops TLS is an `asyncio.BufferedProtocol`, though uvloop's does not say so.
            self.loop.call_soon(
                _feed, cast(asyncio.BufferedProtocol, self.transport.get_protocol()), unread
            )
        try:
            transport = await handshake
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            self._log_limited(f"no TLS: {error}")
            transport = None
        if transport is None:
            # asyncio does not tell a protocol about a connection that ended in the handshake.
            self.abort()
            self.connection_lost(None)
            return None
        self.transport = transport
        self._is_paused = False
        name, version, _ = transport.get_extra_info("cipher") or ("unknown", "TLS", 0)
        session_tls = transport.get_extra_info("ssl_object")
        return TlsFacts(session_tls.version() if session_tls else version, name)

    def _on_tls(self, facts: TlsFacts | None) -> None:
        if facts is not None:
            self._resume(facts)

    def _on_implicit_tls(self, facts: TlsFacts | None) -> None:
        """Implicit TLS began: the greeting follows (RFC 8314 §3.3)."""
        if facts is not None:
            self._session.tls = facts
            self._output.append(self._listener.greeting)

    # --- writing --------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._output:
            if not self._is_lost:
                self.transport.write(b"".join(self._output))
            self._output.clear()

    # --- waiting --------------------------------------------------------------------------------

    def _wait_for(self, work: Coroutine[object, object, T], then: Callable[[T], None]) -> None:
        """Run this in a task and read no input until it is done.

        The task is not cancelled if the client goes.
        """
        self._work = self._listener.spawn(self._run(work, then))

    def _resume(self, result: ActionResult) -> None:
        self._perform(self._protocol.resume(result))

    async def _run(self, work: Coroutine[object, object, T], then: Callable[[T], None]) -> None:
        """Do the work, and send the reply at once: in this task, and not in a callback of its end,
        before which the event loop would begin the delivery of a message that is committed.
        """
        try:
            result = await work
            self._work = None
            then(result)
        except (Exception, asyncio.CancelledError) as failure:
            self._work = None
            log.error("%s: a session failed", self._who, exc_info=failure)
            self._perform(self._protocol.resume_failed())
            self._close_with(_INTERNAL_ERROR)
        if self._is_lost:
            return
        self._flush()
        if self._work is None and not self._is_closing:
            self._set_deadline()
            self._read_on()

    def _read_on(self) -> None:
        """Process the unread octets, and let the transport read again."""
        if self._work is None and self._is_writable and not self._is_closing:
            if self._unread or self._had_eof or self._listener.is_closing:
                unread, self._unread = self._unread, b""
                self._process(unread)
            if self._work is None and self._is_paused and not self._is_closing:
                self._is_paused = False
                self.transport.resume_reading()

    def _pause(self) -> None:
        if not self._is_paused and not self.transport.is_closing():
            self._is_paused = True
            self.transport.pause_reading()

    # --- timers ---------------------------------------------------------------------------------

    def _set_deadline(self) -> None:
        """Wait for a command or for more content, for at most `idle` from now.

        A command that comes octet by octet does not get more time with each octet.
        """
        now, limits, protocol = self.loop.time(), self._reception.limits, self._protocol
        if protocol.transactions != self._transactions:
            self._transactions = protocol.transactions
            self._transaction_deadline = now + limits.transaction_seconds
        deadline = now + limits.idle_seconds
        if self._transaction_deadline < deadline and protocol.in_transaction:
            deadline = self._transaction_deadline
        self._deadline = deadline
        if deadline < self._timer_due:
            self._watch(deadline - now)

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
        if self._work is not None:
            self._watch(self._reception.limits.idle_seconds)  # the client waits
        elif left > 0.001:
            self._watch(left)
        else:
            self._log_limited(text_of(_TIMED_OUT))
            self._close_with(_TIMED_OUT)

    # --- the end --------------------------------------------------------------------------------

    def _close_with(self, reply: bytes) -> None:
        """Close with a last reply."""
        if not self._is_closing:
            self._output.append(reply)
            self._close(linger=True)

    def _log_limited(self, text: str) -> None:
        """Log a line about this client, unless it has had too many."""
        now = self._reception.clock()
        line = self._reception.log_limit.line(self._session.client or "", text, now)
        if line is not None:
            log.info("%s: %s", self._who, line)

    def _close(self, *, linger: bool = False) -> None:
        """Send the pending replies and close; abort if the client does not read them.

        To close while the client is still sending would reset the connection, and the client would
        lose the reply that says why. With `linger` the relay first closes only its own half, and
        for a while reads and discards what comes.
        """
        if self._is_closing:
            return
        self._is_closing = True
        self._flush()
        self._unread = b""
        self._perform(self._protocol.end())
        if self._is_lost:
            return
        if not (linger and not self._had_eof and self._close_our_half()):
            self.transport.close()
        self._stop_timer()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.abort)

    def _close_our_half(self) -> bool:
        """Close the relay's half. False in TLS, and after the client has closed first."""
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

    def abort(self) -> None:
        self._is_closing = True
        if not self._is_lost:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """A task that still runs goes on; all other state is dropped."""
        if self._is_lost:
            return
        if not self._is_closing and (unfinished := self._unfinished()):
            self._log_limited(unfinished)
        self._is_lost = self._is_closing = True
        self._stop_timer()
        self._unread = b""
        self._listener.leave(self)
        if self._is_admitted:
            self._reception.connections.leave(self._session.client or "")
        if self._proxy_header is not None:
            self._proxy_header.feed_eof()
        self._perform(self._protocol.end())

    def _unfinished(self) -> str:
        """What a client that goes now leaves unfinished; "" for nothing."""
        if self._protocol.in_message:
            return "gone in the middle of a message"
        is_silent = self._is_admitted and not self._protocol.commands
        # A task at this point is a handshake, which logs how it ended.
        return "gone without a command" if is_silent and self._work is None else ""

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def drain(self) -> None:
        """The listener closes: send 421 now, or after the message that is coming in."""
        if self._work is None and not self._protocol.is_reading_content:
            self._close_with(_SHUTTING_DOWN)

    @property
    def _who(self) -> str:
        return "[?]" if self._session.client is None else f"[{self._session.client or 'local'}]"


def _feed(protocol: asyncio.BufferedProtocol, octets: bytes) -> None:
    """Give TLS the octets that came before it: a client of implicit TLS does not wait."""
    while octets:
        buffer = memoryview(protocol.get_buffer(len(octets)))
        count = min(len(buffer), len(octets))
        buffer[:count] = octets[:count]
        protocol.buffer_updated(count)
        octets = octets[count:]


def _address(peername: object) -> str:
    """The address of a peer in its one form; "" of a UNIX socket."""
    if not isinstance(peername, tuple):
        return ""
    return canonical(str(peername[0]))


def _proxied(data: ProxyData) -> str | None:
    """The client's address in the PROXY header.

    None for the proxy's own checks, and for a header without an address. The proxy's own address
    must not take its place: it may be in `access.networks`.
    """
    if data.version == 2 and data.command == 0:
        return None
    if data.family not in (AF.INET, AF.INET6) or data.src_addr is None:
        return None
    return _address((data.src_addr,))
