"""A mail host that follows a script and records every byte it receives (RFC 5321, RFC 3207).

A `Script` is data: what the host offers, how its TLS behaves, its answers to each verb,
and where it stops to answer or closes the connection. `MxServer` plays a script on an
address of its own. It keeps each byte with the phase of the connection (clear, the
handshake, inside TLS), each finished message, and the name that the client sent as SNI.

    script = Script(certificate=Kind.EXPIRED, replies={"RCPT": ("450 4.2.0 busy", "250 2.1.5 OK")})
    async with MxServer(script, name="mx.example.net", address="127.0.0.2", authority=authority) as
    mx:
        ...
    assert mx.messages[0].in_tls and b"MAIL" not in mx.connections[0].clear

The keys of `replies` are the verbs of SMTP, and `GREETING`, `CONTENT` (the final dot) and `TLS`
(after the handshake, where the host sends nothing but may close the connection). A key with an
argument, such as `RCPT <bob@example.net>`, comes before a key without.

The host insists on the order MAIL, RCPT, DATA (RFC 5321 §4.1.4), unless `DATA` is in its script.
It accepts other violations: it tests a client and needs no protection. It works on asyncio's loop
and on uvloop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from relay.sandbox.certificates import Authority, Certificate, Kind, server_context

__all__ = [
    "MxServer",
    "Phase",
    "ReceivedMessage",
    "RecordedConnection",
    "Replies",
    "ReplyOrText",
    "Script",
    "ScriptedReply",
    "StartTls",
    "Then",
]


class Phase(StrEnum):
    """The phase of the connection in which a byte came."""

    CLEAR = "clear"
    HANDSHAKE = "handshake"
    """After 220 to STARTTLS, where the handshake did not succeed."""
    TLS = "tls"


class StartTls(StrEnum):
    """How the host behaves at STARTTLS."""

    OK = "ok"
    ABSENT = "absent"
    """Not in the EHLO list; the command gets 502."""
    REFUSED_454 = "454"
    REFUSED_502 = "502"
    REPLY_354 = "354"
    CLOSE = "close"
    """No answer; the connection closes."""
    SILENCE = "silence"
    """No answer ever."""
    GARBAGE = "garbage"
    """220, then bytes that are no TLS."""
    HANG = "hang"
    """220, then nothing."""
    RESET = "reset"
    """220, then RST on the first bytes of the handshake."""
    CLOSE_IN_HANDSHAKE = "close-in-handshake"


class Then(StrEnum):
    """What the host does after an answer."""

    GO_ON = "go-on"
    CLOSE = "close"
    RESET = "reset"
    SILENCE = "silence"
    """The host reads on and sends nothing more."""


@dataclass(frozen=True, slots=True)
class ScriptedReply:
    """An answer and how to send it. `text` None: no answer. `bytes` are sent unchanged.

    `delay`: seconds before the answer. `drip`: seconds between its single bytes.
    """

    text: str | bytes | None
    delay: float = 0.0
    then: Then = Then.GO_ON
    drip: float = 0.0


ReplyOrText = str | ScriptedReply
"""A string is a reply without its line end; LF separates lines, each with its own code."""
Replies = Mapping[str, ReplyOrText | Sequence[ReplyOrText]]
"""The answers by verb. Of several answers, each use on a connection takes the next; the last one
repeats.
"""

_OFFERS = ("PIPELINING", "SIZE 52428800", "8BITMIME", "ENHANCEDSTATUSCODES", "DSN", "SMTPUTF8")

_USUAL: dict[str, str] = {
    "GREETING": "220 {name} ESMTP",
    "HELO": "250 {name}",
    "MAIL": "250 2.1.0 OK",
    "RCPT": "250 2.1.5 OK",
    "DATA": "354 go on",
    "CONTENT": "250 2.0.0 OK",
    "BDAT": "250 2.0.0 OK",
    "RSET": "250 2.0.0 OK",
    "NOOP": "250 2.0.0 OK",
    "AUTH": "235 2.7.0 OK",
    "QUIT": "221 2.0.0 bye",
}

_STARTTLS_REPLIES = {
    StartTls.ABSENT: "502 5.5.1 not implemented",
    StartTls.REFUSED_454: "454 4.7.0 TLS not available",
    StartTls.REFUSED_502: "502 5.5.1 not implemented",
    StartTls.REPLY_354: "354 go on",
}


@dataclass(frozen=True, slots=True)
class Script:
    """How a host behaves. The default is a good host with a good certificate.

    `offers`: the EHLO list (the host adds STARTTLS where it applies); `offers_in_tls`: the list
    after the handshake. `no_ehlo`: EHLO gets 502, HELO works. `inject`: bytes sent in clear in one
    segment with the 220 to STARTTLS. `replies_in_clear`: answers outside TLS, before `replies`.
    `resumes_tls`: one TLS context for all connections, so that a client may resume a session (RFC
    8446 §2.2). `read_bytes_per_second`: how fast the host reads content; `read_stops_after`: after
    how many bytes it stops. `client_ca`: the host asks for a client certificate, and takes none but
    of this authority (PEM).
    """

    offers: tuple[str, ...] = _OFFERS
    offers_in_tls: tuple[str, ...] | None = None
    no_ehlo: bool = False
    starttls: StartTls = StartTls.OK
    implicit_tls: bool = False
    certificate: Kind = Kind.GOOD
    minimum_tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    maximum_tls: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    resumes_tls: bool = False
    client_ca: bytes = b""
    inject: bytes = b""
    replies: Replies = field(default_factory=dict)
    replies_in_clear: Replies = field(default_factory=dict)
    read_bytes_per_second: int | None = None
    read_stops_after: int | None = None


TLS_1_0_ONLY = Script(minimum_tls=ssl.TLSVersion.TLSv1, maximum_tls=ssl.TLSVersion.TLSv1)


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """A message that got 250 at its final dot (or at BDAT LAST), with the client's arguments."""

    mail: str
    recipients: tuple[str, ...]
    content: bytes
    in_tls: bool
    tls_version: str | None
    sni: str | None
    connection: RecordedConnection = field(repr=False)

    @property
    def reverse_path(self) -> str:
        return _path(self.mail)

    @property
    def forward_paths(self) -> tuple[str, ...]:
        return tuple(_path(recipient) for recipient in self.recipients)


@dataclass(eq=False, slots=True)
class RecordedConnection:
    """One connection from its first byte to its last."""

    number: int
    peer: tuple[str, int]
    chunks: list[tuple[Phase, bytes]] = field(default_factory=list)
    """Every byte that came, in order; inside TLS, the decrypted bytes."""
    commands: list[tuple[Phase, str]] = field(default_factory=list)
    messages: list[ReceivedMessage] = field(default_factory=list)
    sni: str | None = None
    tls_version: str | None = None
    client_name: str | None = None
    """The common name of the client's certificate."""
    resumed: bool = False
    """Whether the client resumed an earlier TLS session."""
    tls_error: str = ""
    """Why the handshake failed, as this host reports it."""
    closed: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def clear(self) -> bytes:
        """All that the client sent in clear, without the ClientHello of a handshake."""
        return self._bytes(Phase.CLEAR)

    @property
    def in_handshake(self) -> bytes:
        """All that came after a 220 to STARTTLS where the handshake did not succeed."""
        return self._bytes(Phase.HANDSHAKE)

    @property
    def in_tls(self) -> bytes:
        """All that the client sent inside TLS."""
        return self._bytes(Phase.TLS)

    @property
    def verbs(self) -> list[str]:
        """The commands' verbs, in order."""
        return [line.split(" ", 1)[0].upper() for _, line in self.commands]

    @property
    def clear_verbs(self) -> list[str]:
        """The verbs that came in clear, in order."""
        return [
            line.split(" ", 1)[0].upper() for phase, line in self.commands if phase is Phase.CLEAR
        ]

    def _bytes(self, phase: Phase) -> bytes:
        return b"".join(chunk for at, chunk in self.chunks if at is phase)


class MxServer:
    """One mail host on one address.

    Of several scripts, each connection plays the next; the last one repeats. Without an
    `authority` the host makes one; `port` 0 lets the system choose.
    """

    def __init__(
        self,
        *scripts: Script,
        name: str = "mx.example.test",
        address: str = "127.0.0.1",
        port: int = 0,
        authority: Authority | None = None,
    ) -> None:
        self.scripts = scripts or (Script(),)
        self.name = name
        self.address = address
        self.port = port
        self.authority = authority or Authority()
        self.connections: list[RecordedConnection] = []
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self._wires: set[HostProtocol] = set()
        self._mistakes: list[BaseException] = []
        self._contexts: dict[int, ssl.SSLContext] = {}
        self._news = asyncio.Event()

    @property
    def messages(self) -> list[ReceivedMessage]:
        """All messages this host took, connection by connection."""
        return [message for connection in self.connections for message in connection.messages]

    @property
    def certificate_sha256(self) -> str:
        """The digest of the certificate of the first script, in hex, as a TLSA record has it."""
        leaf = x509.load_pem_x509_certificate(self._leaf(self.scripts[0]).chain_pem)
        return leaf.fingerprint(hashes.SHA256()).hex()

    def _leaf(self, script: Script) -> Certificate:
        return self.authority.leaf(self.name, script.certificate, address=self.address)

    def context(self, script: Script) -> ssl.SSLContext:
        """The TLS context of a script: a new one for each connection, unless `resumes_tls`."""
        if id(script) in self._contexts:
            return self._contexts[id(script)]
        context = server_context(self._leaf(script), script.minimum_tls, script.maximum_tls)
        if script.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=script.client_ca.decode("ascii"))
        if script.resumes_tls:
            self._contexts[id(script)] = context
        return context

    async def wait_for_messages(
        self, count: int = 1, *, timeout: float = 60.0
    ) -> list[ReceivedMessage]:
        """The messages, as soon as there are `count`."""
        async with asyncio.timeout(timeout):
            while len(self.messages) < count:
                self._news.clear()
                await self._news.wait()
        return self.messages

    async def start(self) -> None:
        """Listen."""
        loop = asyncio.get_running_loop()
        listening = socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if any(
                script.read_bytes_per_second or script.read_stops_after for script in self.scripts
            ):
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listening.bind((self.address, self.port))
            self._server = await loop.create_server(
                lambda: HostProtocol(self), sock=listening, backlog=1024
            )
        except BaseException:
            listening.close()
            raise
        self.port = listening.getsockname()[1]

    async def close(self) -> None:
        """Stop listening and abort every connection; raise the errors of this host's own code."""
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        for wire in list(self._wires):
            wire.abort()
        await asyncio.sleep(0)
        if self._mistakes:
            raise self._mistakes[0]

    async def __aenter__(self) -> MxServer:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _opened(self, wire: HostProtocol) -> RecordedConnection:
        peer = wire.transport.get_extra_info("peername") or ("", 0)
        connection = RecordedConnection(len(self.connections), (peer[0], peer[1]))
        script = self.scripts[min(connection.number, len(self.scripts) - 1)]
        wire.pace(script)
        self.connections.append(connection)
        self._wires.add(wire)
        session = asyncio.ensure_future(_Session(self, wire, connection, script).run())
        self._sessions.add(session)
        session.add_done_callback(self._ended)
        return connection

    def _ended(self, session: asyncio.Task[None]) -> None:
        self._sessions.discard(session)
        error = None if session.cancelled() else session.exception()
        if error is not None:
            self._mistakes.append(error)

    def _lost(self, wire: HostProtocol) -> None:
        self._wires.discard(wire)

    def _tell(self) -> None:
        self._news.set()


class _Ended(Exception):
    """One side has closed the connection."""


class HostProtocol(asyncio.Protocol):
    """Reads and writes one connection, in clear and then in TLS, and records each byte."""

    def __init__(self, server: MxServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._more = asyncio.Event()
        self._ended = False
        self._read_bytes = 0
        self._rate: int | None = None
        self._stop_after: int | None = None
        self.phase = Phase.CLEAR

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted by class: uvloop's transports are none of asyncio's.
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.connection = self._server._opened(self)

    def pace(self, script: Script) -> None:
        """Read at the speed that the script sets."""
        self._rate, self._stop_after = script.read_bytes_per_second, script.read_stops_after

    def data_received(self, data: bytes) -> None:
        self.connection.chunks.append((self.phase, data))
        self._buffer += data
        self._more.set()
        self._read_bytes += len(data)
        if self._stop_after is not None and self._read_bytes >= self._stop_after:
            self.transport.pause_reading()
        elif self._rate is not None:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(len(data) / self._rate, self._resume)

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        self._ended = True
        self._more.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self.connection.closed = True
        self._more.set()
        self._server._lost(self)

    async def line(self) -> str:
        """The next line, without its end."""
        while (end := self._buffer.find(b"\n")) < 0:
            await self._wait()
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")

    async def content(self) -> bytes:
        """What follows DATA up to the final dot, with dot-stuffing undone (RFC 5321 §4.5.2)."""
        if self._buffer[:3] == b".\r\n":
            del self._buffer[:3]
            return b""
        searched = 0
        while (end := self._buffer.find(b"\r\n.\r\n", searched)) < 0:
            searched = max(0, len(self._buffer) - 4)
            await self._wait()
            if not searched and self._buffer[:3] == b".\r\n":
                del self._buffer[:3]
                return b""
        content = bytes(self._buffer[: end + 2])
        del self._buffer[: end + 5]
        return (
            content.removeprefix(b".")
            if content[:2] == b".."
            else content.replace(b"\r\n..", b"\r\n.")
        )

    async def exactly(self, count: int) -> bytes:
        """The next `count` bytes."""
        while len(self._buffer) < count:
            await self._wait()
        chunk = bytes(self._buffer[:count])
        del self._buffer[:count]
        return chunk

    async def anything(self) -> None:
        """Wait until the client has sent something."""
        while not self._buffer:
            await self._wait()

    async def until_closed(self) -> None:
        """Read and discard until the client closes the connection."""
        while True:
            self._buffer.clear()
            await self._wait()

    async def _wait(self) -> None:
        if self._ended:
            raise _Ended
        self._more.clear()
        await self._more.wait()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """The server's side of the handshake. Unread bytes that came in clear are discarded."""
        self._buffer.clear()
        # From here on `data_received` gets decrypted bytes only.
        self.phase = Phase.TLS
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=60
            )
        except (OSError, EOFError) as error:
            self.connection.tls_error = str(error) or type(error).__name__
            raise _Ended from error
        if transport is None:
            raise _Ended
        self.transport = transport
        session = transport.get_extra_info("ssl_object")
        self.connection.tls_version = session.version()
        self.connection.resumed = bool(session.session_reused)
        self.connection.client_name = _common_name(session.getpeercert())

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    def reset(self) -> None:
        """Break off with RST instead of FIN."""
        with suppress(OSError, AttributeError):
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self.transport.abort()


class _Session:
    """One SMTP session that follows the script."""

    def __init__(
        self, server: MxServer, wire: HostProtocol, connection: RecordedConnection, script: Script
    ) -> None:
        self._server = server
        self._wire = wire
        self._connection = connection
        self._script = script
        self._said: Counter[str] = Counter()
        self._mail: str | None = None
        self._recipients: list[str] = []
        self._chunks: list[bytes] = []

    async def run(self) -> None:
        """From the greeting to the end of the connection."""
        with suppress(_Ended):
            if self._script.implicit_tls:
                await self._handshake()
            await self._answer("GREETING")
            while True:
                await self._obey(await self._wire.line())
        self._wire.close()

    async def _obey(self, line: str) -> None:
        self._connection.commands.append((self._wire.phase, line))
        verb, _, argument = line.partition(" ")
        verb = verb.upper()
        match verb:
            case "EHLO" | "HELO":
                self._forget()
                await self._greet(verb)
            case "STARTTLS":
                await self._start_tls()
            case "MAIL":
                if await self._answer(verb, _path_text(argument)):
                    self._mail, self._recipients, self._chunks = argument, [], []
            case "RCPT":
                if self._mail is None:
                    await self._perform("503 5.5.1 MAIL first")
                elif await self._answer(verb, _path_text(argument)):
                    self._recipients.append(argument)
            case "DATA":
                await self._data()
            case "BDAT":
                await self._bdat(argument)
            case "AUTH":
                await self._auth(argument)
            case "RSET":
                self._forget()
                await self._answer(verb)
            case "QUIT":
                await self._answer(verb)
                raise _Ended
            case _:
                await self._answer(verb)

    async def _greet(self, verb: str) -> None:
        if verb == "EHLO" and self._script.no_ehlo:
            await self._perform("502 5.5.1 EHLO not implemented")
        elif verb == "EHLO" and not self._is_scripted(verb):
            await self._perform(
                "\n".join(f"250 {line}" for line in (self._server.name, *self._offers()))
            )
        else:
            await self._answer(verb)

    def _offers(self) -> tuple[str, ...]:
        script = self._script
        if self._wire.phase is Phase.TLS:
            return script.offers if script.offers_in_tls is None else script.offers_in_tls
        return script.offers if script.starttls is StartTls.ABSENT else (*script.offers, "STARTTLS")

    async def _start_tls(self) -> None:
        mode = self._script.starttls
        if self._is_scripted("STARTTLS"):
            await self._answer("STARTTLS")
        elif mode in _STARTTLS_REPLIES:
            await self._perform(_STARTTLS_REPLIES[mode])
        elif mode is StartTls.CLOSE:
            raise _Ended
        elif mode is StartTls.SILENCE:
            await self._wire.until_closed()
        elif mode is StartTls.OK:
            self._wire.write(b"220 2.0.0 ready\r\n" + self._script.inject)
            self._forget()
            await self._handshake()
        else:
            self._wire.phase = Phase.HANDSHAKE
            self._wire.write(b"220 2.0.0 ready\r\n")
            await self._spoil_handshake(mode)

    async def _handshake(self) -> None:
        context = self._server.context(self._script)
        context.sni_callback = self._note_sni
        await self._wire.start_tls(context)
        await self._perform(self._find("TLS", "") or ScriptedReply(None))

    def _note_sni(self, _: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        self._connection.sni = name

    async def _spoil_handshake(self, mode: StartTls) -> None:
        if mode is StartTls.GARBAGE:
            self._wire.write(b"\x00\xffthis is no TLS\r\n" * 8)
        if mode in (StartTls.RESET, StartTls.CLOSE_IN_HANDSHAKE):
            await self._wire.anything()
            if mode is StartTls.RESET:
                self._wire.reset()
            raise _Ended
        await self._wire.until_closed()

    async def _data(self) -> None:
        if not self._recipients and not self._is_scripted("DATA"):
            await self._perform("554 5.5.1 no valid recipients")
            return
        if not await self._answer("DATA", wanted="3"):
            return
        content = await self._wire.content()
        await self._take(content, "CONTENT")

    async def _bdat(self, argument: str) -> None:
        """RFC 3030 §2."""
        size, _, last = argument.partition(" ")
        self._chunks.append(await self._wire.exactly(int(size)))
        if last.strip().upper() == "LAST":
            await self._take(b"".join(self._chunks), "CONTENT")
        else:
            await self._answer("BDAT")

    async def _take(self, content: bytes, verb: str) -> None:
        message = ReceivedMessage(
            mail=self._mail or "",
            recipients=tuple(self._recipients),
            content=content,
            in_tls=self._wire.phase is Phase.TLS,
            tls_version=self._connection.tls_version,
            sni=self._connection.sni,
            connection=self._connection,
        )
        self._forget()
        action = _as_action(self._find(verb, "") or _USUAL[verb])
        # The host has taken the message before it sends 250, even if the client never gets the
        # reply. A message without a recipient is not kept.
        if message.recipients and action.text is not None and _is(action.text, "2"):
            self._connection.messages.append(message)
        await self._perform(action)
        self._server._tell()

    async def _auth(self, argument: str) -> None:
        """PLAIN and LOGIN with any user and password (RFC 4954)."""
        mechanism, _, initial = argument.partition(" ")
        prompts = {"PLAIN": [""], "LOGIN": ["VXNlcm5hbWU6", "UGFzc3dvcmQ6"]}.get(
            mechanism.upper(), []
        )
        for prompt in prompts[1 if initial else 0 :]:
            self._wire.write(f"334 {prompt}\r\n".encode())
            await self._wire.line()
        await self._answer("AUTH")

    def _forget(self) -> None:
        self._mail, self._recipients, self._chunks = None, [], []

    async def _answer(self, verb: str, argument: str = "", *, wanted: str = "2") -> bool:
        """Answer a command. Returns whether the answer accepted it."""
        answer = self._find(verb, argument) or _USUAL.get(verb, "500 5.5.2 what?")
        action = _as_action(answer)
        await self._perform(action)
        return action.text is not None and _is(action.text, wanted)

    def _is_scripted(self, verb: str) -> bool:
        return any(verb in table for table in self._tables())

    def _tables(self) -> tuple[Replies, ...]:
        script = self._script
        in_tls = self._wire.phase is Phase.TLS
        return (script.replies,) if in_tls else (script.replies_in_clear, script.replies)

    def _find(self, verb: str, argument: str) -> ReplyOrText | None:
        """The script's next answer to this verb; None where it has none."""
        for key in (f"{verb} {argument}", verb):
            for table in self._tables():
                if key in table:
                    return self._next(key, table[key])
        return None

    def _next(self, key: str, answers: ReplyOrText | Sequence[ReplyOrText]) -> ReplyOrText:
        if isinstance(answers, str | ScriptedReply):
            return answers
        turn = self._said[key]
        self._said[key] += 1
        return answers[min(turn, len(answers) - 1)]

    async def _perform(self, answer: ReplyOrText) -> None:
        action = _as_action(answer)
        if action.delay:
            await asyncio.sleep(action.delay)
        if action.text is not None:
            await self._say(_encode(action.text, self._server.name), action.drip)
        match action.then:
            case Then.CLOSE:
                raise _Ended
            case Then.RESET:
                self._wire.reset()
                raise _Ended
            case Then.SILENCE:
                await self._wire.until_closed()
            case Then.GO_ON:
                pass

    async def _say(self, data: bytes, drip: float) -> None:
        if not drip:
            self._wire.write(data)
            return
        for byte in data:
            self._wire.write(bytes([byte]))
            await asyncio.sleep(drip)


def _common_name(certificate: Mapping[str, Any] | None) -> str | None:
    fields = (pair for names in (certificate or {}).get("subject", ()) for pair in names)
    return next((value for name, value in fields if name == "commonName"), None)


def _as_action(answer: ReplyOrText) -> ScriptedReply:
    return answer if isinstance(answer, ScriptedReply) else ScriptedReply(answer)


def _is(text: str | bytes, first_digit: str) -> bool:
    return (
        text.startswith(first_digit)
        if isinstance(text, str)
        else text.startswith(first_digit.encode())
    )


def _encode(text: str | bytes, name: str) -> bytes:
    """The octets of a reply: a hyphen after each code but the last (RFC 5321 §4.2.1)."""
    if isinstance(text, bytes):
        return text
    lines = text.replace("{name}", name).split("\n")
    marked = [f"{line[:3]}-{line[4:]}" for line in lines[:-1]] + [lines[-1]]
    return "".join(f"{line}\r\n" for line in marked).encode("utf-8", "surrogateescape")


def _path_text(argument: str) -> str:
    """`FROM:<a@b> SIZE=1` → `<a@b>`."""
    return argument.partition(":")[2].strip().partition(" ")[0]


def _path(argument: str) -> str:
    return _path_text(argument).removeprefix("<").removesuffix(">")
