"""The transport to one mail host: aiosmtplib's protocol, with another reader of replies.

Of the library's `SMTPProtocol` these private parts are used, each with a test
(tests/unit/deliver/test_protocol.py), so that a release that changes one is noticed:

    _buffer             emptied before a handshake: earlier octets are discarded (RFC 3207 §4.2)
    _over_ssl           refuses a second STARTTLS
    _paused, _drain_waiters, _drain_helper      flow control
    _loop, transport
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from aiosmtplib import SMTPException, SMTPReadTimeoutError, SMTPServerDisconnected
from aiosmtplib.protocol import SMTPProtocol
from aiosmtplib.response import SMTPResponse

from relay.deliver.framing import MAX_REPLY_BYTES, BadReply, ReplyReader
from relay.deliver.transaction import is_clean
from relay.mail.reply import Reply

try:
    import fcntl
    import termios
except ImportError:  # pragma: no cover - not on every system
    fcntl = termios = None  # type: ignore[assignment]

_QUIT_SECONDS = 1.0
"""Seconds a connection stays open for the reply to QUIT, for which the relay does not wait."""

CONNECTION_ERRORS = (SMTPException, BadReply, OSError, EOFError, RuntimeError)
"""The exceptions of a dead, silent or broken connection.

uvloop's transport raises RuntimeError without its handle.
"""


def error_text(error: BaseException) -> str:
    """The text of an error, safe for a log and a DSN."""
    if isinstance(error, ssl.SSLError):
        return _SOURCE_LINE.sub("", str(error.args[-1] if error.args else error))
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = (
        error.message
        if isinstance(error, SMTPException) and hasattr(error, "message")
        else str(error)
    )
    return text or type(error).__name__


_SOURCE_LINE = re.compile(r" \(_ssl\.c:\d+\)$")


class SourceAddressError(OSError):
    """The relay cannot use the address that a connection is to come from; the text says why."""


async def connect(
    address: str, port: int, seconds: float, source: str | None = None
) -> ClientProtocol:
    """A connection to this address, without another look-up (no DNS rebinding); from the address
    `source` of the relay, if there is one.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio sets TCP_NODELAY on a socket that names its protocol, and on no other.
    connecting = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        connecting.setblocking(False)
        if source is not None:
            _bind(connecting, source)
        async with asyncio.timeout(seconds):
            await loop.sock_connect(connecting, (address, port))
            _, protocol = await loop.create_connection(
                lambda: ClientProtocol(loop), sock=connecting
            )
    except BaseException:
        connecting.close()
        raise
    return protocol


def _bind(connecting: socket.socket, source: str) -> None:
    with suppress(OSError):  # the system then chooses the port when it knows the other end
        connecting.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        connecting.bind((source, 0))
    except OSError as error:
        text = f"source_address {source} cannot be used: {error_text(error)}"
        raise SourceAddressError(text) from error


_IP_BIND_ADDRESS_NO_PORT = 24
"""Of Linux: without it, all connections from one address share its ports, whatever host they lead
to. Python has no name for it before 3.12; other systems refuse it.
"""


class ClientProtocol(SMTPProtocol):
    """Returns one reply for each command, in order."""

    transport: asyncio.Transport | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._reader = ReplyReader()
        # The library empties this very buffer before a handshake: octets that came in clear are
        # discarded.
        self._buffer = self._reader.buffer
        self._replies: deque[Reply] = deque()
        self._expected = 1
        """How many replies are outstanding. The greeting is one."""
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_quitting = False
        self.closed = asyncio.Event()
        self.starttls_reply: Reply | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it is connected and no unsolicited octets have come."""
        transport = self.transport
        return (
            self._error is None
            and not self._is_quitting
            and transport is not None
            and not transport.is_closing()
            and self._reader.is_empty
        )

    @property
    def local_ip(self) -> str:
        """Our own address on this connection; "" where it is gone already."""
        name = self.transport.get_extra_info("sockname") if self.transport is not None else None
        return str(name[0]) if name else ""

    @property
    def ssl_object(self) -> ssl.SSLObject:
        assert self.transport is not None
        in_tls: ssl.SSLObject = self.transport.get_extra_info("ssl_object")
        return in_tls

    def data_received(self, data: bytes) -> None:
        if self._is_quitting:
            self._close()
            return
        if self._error is not None:
            return
        self._buffer += data
        self._read()
        if len(self._buffer) > MAX_REPLY_BYTES:
            self._fail(BadReply("talks on without being asked"))
        if self._paused:
            # A reply that comes while content waits to be sent is about that content.
            self.resume_writing_once()

    def eof_received(self) -> bool:
        self._fail(SMTPServerDisconnected("the host closed the connection"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        text = f"the connection was lost ({error_text(exc)})" if exc else "the connection was lost"
        self._fail(SMTPServerDisconnected(text))
        self._stop_timer()
        self.closed.set()

    def resume_writing_once(self) -> None:
        """Wake the writer that waits, although there is no room."""
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def send_commands(self, lines: Sequence[bytes]) -> None:
        """Send commands; as many replies are expected."""
        if not is_clean(b"".join(lines)):
            raise AssertionError("a command with a control character in it")
        self._expected += len(lines)
        self.write(b"\r\n".join(lines) + b"\r\n")

    def check_unsolicited(self) -> None:
        """Fail if unsolicited octets came: they would be taken for the next reply.

        421 may come at any time (RFC 5321 §3.8); it counts as the reply to the next command.
        """
        if self._error is not None:
            raise self._error
        if not self._reader.is_empty and not self._buffer.startswith(b"421"):
            error = BadReply(f"said without being asked: {bytes(self._buffer[:80])!r}")
            self._fail(error)
            raise error

    def expect_reply(self) -> None:
        """One more reply is expected than commands were sent: to the content."""
        self._expected += 1
        if self._buffer:
            self._read()

    async def next_reply(self, seconds: float) -> Reply:
        """The reply to the oldest open command. After a timeout the connection is unusable."""
        if not self._replies:
            if self._buffer:
                self._read()
            if not self._replies and not await self.wait(seconds):
                self._fail(SMTPReadTimeoutError(f"no answer within {seconds:g} s"))
        reply = self.take_reply()
        if reply is None:
            assert self._error is not None
            raise self._error
        return reply

    async def wait(self, seconds: float) -> bool:
        """Wait for a reply or the end of the connection; whether either came in time."""
        if self._replies or self._error is not None:
            return True
        self._waiter = self._loop.create_future()
        self._deadline = self._loop.time() + seconds
        if self._timer is None or self._timer.when() > self._deadline:
            self._start_timer()
        try:
            await self._waiter
        finally:
            self._waiter = None
        return bool(self._replies) or self._error is not None

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self._loop.call_at(self._deadline, self._on_deadline)

    def _on_deadline(self) -> None:
        """End the wait if its time is over. A timer that has begun serves later waits, too."""
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() >= self._deadline:
            _wake(self._waiter)
        else:
            self._start_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def has_reply(self) -> bool:
        """Whether a reply is there to be taken."""
        return bool(self._replies)

    def take_reply(self) -> Reply | None:
        """The reply to the oldest open command, if it has come."""
        if not self._replies:
            return None
        self._expected -= 1
        return self._replies.popleft()

    @property
    def sends_files(self) -> bool:
        """Whether octets of a file can go to the socket as they are: not in TLS."""
        transport = self.transport
        return transport is not None and transport.get_extra_info("ssl_object") is None

    def pause_at(self, unsent_bytes: int | None) -> None:
        """Have `drain` wait while more than this is unsent; None: the event loop's own limit."""
        if self.transport is not None:
            self.transport.set_write_buffer_limits(unsent_bytes)

    def send_file(self, file: int, offset: int, count: int) -> int:
        """Have the system send octets of a file; how many the socket took. 0: it has no room, or
        this cannot be done: `write` waits for room, and finds what is wrong.
        """
        transport = self.transport
        # The socket of a transport that closes may be another connection's by now.
        if transport is None or transport.is_closing() or self._error is not None:
            return 0
        if transport.get_write_buffer_size():
            return 0
        try:
            sock = transport.get_extra_info("socket").fileno()
            return os.sendfile(sock, file, offset, count) if sock >= 0 else 0
        except OSError:
            return 0

    async def drain(self, seconds: float) -> None:
        """Wait for room to write, or for a reply. Fails after so many seconds without progress."""
        while self._paused and not self._replies:
            before = self._unsent_bytes()
            try:
                async with asyncio.timeout(seconds):
                    await self._drain_helper()
            except TimeoutError:
                if self._unsent_bytes() >= before:
                    raise SMTPReadTimeoutError(f"took no content for {seconds:g} s") from None
            if self._error is not None:
                raise self._error

    def unacknowledged_bytes(self) -> int:
        """How many sent bytes the peer's system has not confirmed, as far as the kernel knows."""
        return self._unsent_bytes() + self._in_system_bytes()

    def _unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def _in_system_bytes(self) -> int:
        if fcntl is None or self.transport is None:
            return 0
        count = bytearray(4)
        with suppress(OSError, AttributeError, ValueError):
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
        return int.from_bytes(count, sys.byteorder)

    async def start_tls(
        self,
        tls_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> SMTPResponse:
        self.check_unsolicited()
        self._expected += 1
        return await super().start_tls(
            tls_context, server_hostname=server_hostname, timeout=timeout
        )

    async def handshake(
        self, context: ssl.SSLContext, server_hostname: str | None, timeout: float
    ) -> None:
        """Implicit TLS: the handshake comes first; octets that came in clear are discarded."""
        self._expected = 0
        self._replies.clear()
        self._reader.reset()
        if self.transport is None:
            raise SMTPServerDisconnected("the connection was lost")
        self.transport = await self._loop.start_tls(
            self.transport,
            self,
            context,
            server_hostname=server_hostname,
            ssl_handshake_timeout=timeout,
        )
        self._over_ssl = True
        self.expect_reply()

    async def read_response(self, timeout: float | None = None) -> SMTPResponse:
        """For `start_tls` of the library."""
        reply = self.starttls_reply = await self.next_reply(timeout or 0.0)
        return SMTPResponse(reply.code, reply.text)

    def quit(self) -> None:
        """Send QUIT; the connection ends with or without a reply."""
        if not self.is_usable:
            self.abort()
            return
        self._is_quitting = True
        self.write(b"QUIT\r\n")
        self._loop.call_later(_QUIT_SECONDS, self.abort)

    def abort(self) -> None:
        """Close the connection at once."""
        if self.transport is not None:
            self.transport.abort()
        self._fail(SMTPServerDisconnected("the connection is closed"))
        self.closed.set()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def _read(self) -> None:
        """Read the expected replies from the octets that came. After an error there are none."""
        try:
            while self._error is None and len(self._replies) < self._expected:
                reply = self._reader.take()
                if reply is None:
                    return
                self._replies.append(reply)
        except BadReply as error:
            self._fail(error)
        finally:
            if self._replies and self._waiter is not None:
                _wake(self._waiter)

    def _fail(self, error: Exception) -> None:
        """Read no more replies. The first error is the one to report."""
        if self._error is None:
            self._error = error
        if self._waiter is not None:
            _wake(self._waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
