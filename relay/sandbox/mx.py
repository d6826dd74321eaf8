"""A mail host that follows a script and records every byte it receives (RFC 5321, RFC 3207).

`relay.sandbox.script` says how the host behaves, `relay.sandbox.recording` what it received.

    script = Script(certificate=Kind.EXPIRED, replies={"RCPT": ("450 4.2.0 busy", "250 2.1.5 OK")})
    async with MxServer(script, name="mx.example.net", address="127.0.0.2") as mx:
        ...
    assert mx.messages[0].in_tls and b"MAIL" not in mx.connections[0].clear

The host insists on the order MAIL, RCPT, DATA (RFC 5321 §4.1.4), unless `DATA` is in its script.
It accepts other violations: it tests a client and needs no protection. It works on asyncio's loop
and on uvloop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from relay.sandbox.certificates import Authority, Certificate, server_context
from relay.sandbox.recording import (
    Ended,
    HostProtocol,
    Phase,
    ReceivedMessage,
    RecordedConnection,
    path_text,
)
from relay.sandbox.script import (
    STARTTLS_REPLIES,
    USUAL_REPLIES,
    Replies,
    ReplyOrText,
    Script,
    ScriptedReply,
    StartTls,
    Then,
    as_reply,
    begins_with,
    encoded,
)


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
        self._protocols: set[HostProtocol] = set()
        self._errors: list[BaseException] = []
        self._contexts: dict[int, ssl.SSLContext] = {}
        self._message_came = asyncio.Event()

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
                self._message_came.clear()
                await self._message_came.wait()
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
                lambda: HostProtocol(self._opened, self._protocols.discard),
                sock=listening,
                backlog=1024,
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
        for protocol in list(self._protocols):
            protocol.abort()
        await asyncio.sleep(0)
        if self._errors:
            raise self._errors[0]

    async def __aenter__(self) -> MxServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _opened(self, protocol: HostProtocol) -> RecordedConnection:
        peer = protocol.transport.get_extra_info("peername") or ("", 0)
        connection = RecordedConnection(len(self.connections), (peer[0], peer[1]))
        script = self.scripts[min(connection.number, len(self.scripts) - 1)]
        protocol.pace(script)
        self.connections.append(connection)
        self._protocols.add(protocol)
        session = asyncio.ensure_future(_Session(self, protocol, connection, script).run())
        self._sessions.add(session)
        session.add_done_callback(self._ended)
        return connection

    def _ended(self, session: asyncio.Task[None]) -> None:
        self._sessions.discard(session)
        error = None if session.cancelled() else session.exception()
        if error is not None:
            self._errors.append(error)


class _Session:
    """One SMTP session that follows the script."""

    def __init__(
        self,
        server: MxServer,
        protocol: HostProtocol,
        connection: RecordedConnection,
        script: Script,
    ) -> None:
        self._server = server
        self._protocol = protocol
        self._connection = connection
        self._script = script
        self._used: Counter[str] = Counter()
        self._mail: str | None = None
        self._recipients: list[str] = []
        self._chunks: list[bytes] = []

    async def run(self) -> None:
        """From the greeting to the end of the connection."""
        with suppress(Ended):
            if self._script.implicit_tls:
                await self._handshake()
            await self._answer("GREETING")
            while True:
                await self._handle(await self._protocol.line())
        self._protocol.close()

    async def _handle(self, line: str) -> None:
        self._connection.commands.append((self._protocol.phase, line))
        verb, _, argument = line.partition(" ")
        verb = verb.upper()
        match verb:
            case "EHLO" | "HELO":
                self._forget()
                await self._greet(verb)
            case "STARTTLS":
                await self._start_tls()
            case "MAIL":
                if await self._answer(verb, path_text(argument)):
                    self._mail, self._recipients, self._chunks = argument, [], []
            case "RCPT":
                if self._mail is None:
                    await self._perform("503 5.5.1 MAIL first")
                elif await self._answer(verb, path_text(argument)):
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
                raise Ended
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
        if self._protocol.phase is Phase.TLS:
            return script.offers if script.offers_in_tls is None else script.offers_in_tls
        return script.offers if script.starttls is StartTls.ABSENT else (*script.offers, "STARTTLS")

    async def _start_tls(self) -> None:
        mode = self._script.starttls
        if self._is_scripted("STARTTLS"):
            await self._answer("STARTTLS")
        elif mode in STARTTLS_REPLIES:
            await self._perform(STARTTLS_REPLIES[mode])
        elif mode is StartTls.CLOSE:
            raise Ended
        elif mode is StartTls.SILENCE:
            await self._protocol.until_closed()
        elif mode is StartTls.OK:
            self._protocol.write(b"220 2.0.0 ready\r\n" + self._script.inject)
            self._forget()
            await self._handshake()
        else:
            self._protocol.phase = Phase.HANDSHAKE
            self._protocol.write(b"220 2.0.0 ready\r\n")
            await self._spoil_handshake(mode)

    async def _handshake(self) -> None:
        context = self._server.context(self._script)
        context.sni_callback = self._note_sni
        await self._protocol.start_tls(context)
        await self._perform(self._find("TLS", "") or ScriptedReply(None))

    def _note_sni(self, _: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        self._connection.sni = name

    async def _spoil_handshake(self, mode: StartTls) -> None:
        if mode is StartTls.GARBAGE:
            self._protocol.write(b"\x00\xffthis is no TLS\r\n" * 8)
        if mode in (StartTls.RESET, StartTls.CLOSE_IN_HANDSHAKE):
            await self._protocol.anything()
            if mode is StartTls.RESET:
                self._protocol.reset()
            raise Ended
        await self._protocol.until_closed()

    async def _data(self) -> None:
        if not self._recipients and not self._is_scripted("DATA"):
            await self._perform("554 5.5.1 no valid recipients")
            return
        if not await self._answer("DATA", wanted="3"):
            return
        content = await self._protocol.content()
        await self._take(content, "CONTENT")

    async def _bdat(self, argument: str) -> None:
        """RFC 3030 §2."""
        size, _, last = argument.partition(" ")
        self._chunks.append(await self._protocol.exactly(int(size)))
        if last.strip().upper() == "LAST":
            await self._take(b"".join(self._chunks), "CONTENT")
        else:
            await self._answer("BDAT")

    async def _take(self, content: bytes, verb: str) -> None:
        message = ReceivedMessage(
            mail=self._mail or "",
            recipients=tuple(self._recipients),
            content=content,
            in_tls=self._protocol.phase is Phase.TLS,
            tls_version=self._connection.tls_version,
            sni=self._connection.sni,
            connection=self._connection,
        )
        self._forget()
        action = as_reply(self._find(verb, "") or USUAL_REPLIES[verb])
        # The host has taken the message before it sends 250, even if the client never gets the
        # reply. A message without a recipient is not kept.
        if message.recipients and action.text is not None and begins_with(action.text, "2"):
            self._connection.messages.append(message)
        await self._perform(action)
        self._server._message_came.set()

    async def _auth(self, argument: str) -> None:
        """PLAIN and LOGIN with any user and password (RFC 4954)."""
        mechanism, _, initial = argument.partition(" ")
        prompts = {"PLAIN": [""], "LOGIN": ["VXNlcm5hbWU6", "UGFzc3dvcmQ6"]}.get(
            mechanism.upper(), []
        )
        for prompt in prompts[1 if initial else 0 :]:
            self._protocol.write(f"334 {prompt}\r\n".encode())
            await self._protocol.line()
        await self._answer("AUTH")

    def _forget(self) -> None:
        self._mail, self._recipients, self._chunks = None, [], []

    async def _answer(self, verb: str, argument: str = "", *, wanted: str = "2") -> bool:
        """Answer a command. Returns whether the answer accepted it."""
        answer = self._find(verb, argument) or USUAL_REPLIES.get(verb, "500 5.5.2 what?")
        action = as_reply(answer)
        await self._perform(action)
        return action.text is not None and begins_with(action.text, wanted)

    def _is_scripted(self, verb: str) -> bool:
        return any(verb in table for table in self._tables())

    def _tables(self) -> tuple[Replies, ...]:
        script = self._script
        in_tls = self._protocol.phase is Phase.TLS
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
        turn = self._used[key]
        self._used[key] += 1
        return answers[min(turn, len(answers) - 1)]

    async def _perform(self, answer: ReplyOrText) -> None:
        action = as_reply(answer)
        if action.delay:
            await asyncio.sleep(action.delay)
        if action.text is not None:
            await self._protocol.send(encoded(action.text, self._server.name), action.drip)
        match action.then:
            case Then.CLOSE:
                raise Ended
            case Then.RESET:
                self._protocol.reset()
                raise Ended
            case Then.SILENCE:
                await self._protocol.until_closed()
            case Then.GO_ON:
                pass
