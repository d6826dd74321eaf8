"""One connection to one address of a mail host: the dialogue of RFC 5321 from the client's side.

aiosmtplib's protocol does the transport, the flow control, and STARTTLS, which discards earlier
bytes. `relay.deliver.protocol` reads the replies: a group of commands that went out together (RFC
2920) has several replies outstanding, and each belongs to its own command. An unsolicited line
belongs to no command: it makes the connection unusable.

This module looks nothing up and decides nothing. `open` connects to the given address, `start_tls`
and `begin_in_tls` return the result of TLS (a `TlsResult`), and `transact` always returns one
`Answer` for each recipient. Exceptions of the library and of the system become `SessionBroken`
with an `Answer`.

Each wait has its own limit (RFC 5321 §4.5.3.2). The limit for content counts from the last
progress, so that a slow host is not taken for a dead one.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

from aiosmtplib import (
    SMTPReadTimeoutError,
    SMTPResponseException,
)
from aiosmtplib.esmtp import parse_esmtp_extensions

from relay.deliver import sasl
from relay.deliver.certificate_facts import facts_of
from relay.deliver.content import PIECE_BYTES, Content, ContentBroken, pieces
from relay.deliver.diagnosis import Answer, Stage, shown
from relay.deliver.framing import DotStuffing, Garbled
from relay.deliver.options import Timeouts
from relay.deliver.protocol import (
    LOST,
    ClientProtocol,
    SourceAddressError,
    connect,
    error_text,
)
from relay.deliver.tls import (
    CertificateVerdict,
    Handshake,
    KeptSession,
    Resumption,
    carrying,
    sent_chain,
)
from relay.deliver.transaction import NO_EXTENSIONS, Extensions, TransactionCommands
from relay.mail.masked import SecretMask
from relay.mail.outcome import Downgrade, HopLogin, HopSession, PolicyResult
from relay.mail.printable import printable
from relay.mail.reply import Reply
from relay.queue.store import ClaimLost
from relay.route.next_hop import Credentials, Host
from relay.route.security import Situation

__all__ = ["Connection", "SessionBroken", "TlsResult", "require_claim"]

_CHECK_SECONDS = 0.5
"""Seconds between two checks of how much a host has read."""

_NO_NAME = "no name that a certificate could be for"


class SessionBroken(Exception):
    """The session has ended at a stage, because of a reply or without one."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class TlsResult:
    """The result of TLS with a host.

    `error`: the text of the error, or of the peer. `fault`: the fault of the certificate under a
    policy of the recipient's domain.
    """

    situation: Situation
    error: str = ""
    reply: Reply | None = None
    fault: PolicyResult | None = None


def require_claim(may_go_on: Callable[[], bool]) -> None:
    """Raise `ClaimLost` where the claim of the message does not hold any more."""
    if not may_go_on():
        raise ClaimLost("the lease of this node is over: another node may have the message")


class Connection:
    """A session with a host, from the connect to QUIT. Used by one delivery at a time.

    `must_encrypt`: no part of a message or password may be sent before TLS. The table of TLS rules
    ensures that; the check here is a second guard. `session`: what the delivery log says of this
    session. `local_ip`: the relay's address.
    """

    def __init__(
        self,
        host: Host,
        protocol: ClientProtocol,
        resumption: Resumption,
        *,
        hostname: str,
        timeouts: Timeouts,
    ) -> None:
        self.host = host
        self.resumption = resumption
        self.must_encrypt = False
        self.offers = NO_EXTENSIONS
        self.session = HopSession(host.name, host.address)
        self.local_ip = protocol.local_ip
        self.opened_at = 0.0
        self.messages = 0
        self.has_delivered = False
        self.was_cancelled = False
        self._protocol = protocol
        self._hostname = hostname
        self._seconds = _Seconds.of(timeouts)
        self._needs_rset = False
        self._verdict = CertificateVerdict()
        self._secrets: tuple[SecretMask, ...] = ()

    @classmethod
    async def open(cls, host: Host, *, hostname: str, timeouts: Timeouts) -> Connection:
        """Connect to exactly this address; no command is sent yet. A next hop may name the address
        that the relay connects from, and the name that it says in EHLO.
        """
        source = host.hop.source_address if host.hop is not None else None
        if host.hop is not None and host.hop.hello is not None:
            hostname = host.hop.hello
        opened_at = time.monotonic()
        resumption = Resumption()
        seconds = timeouts.connect.total_seconds()
        try:
            with carrying(resumption):
                protocol = await connect(host.address, host.port, seconds, source)
        except SourceAddressError as error:
            raise SessionBroken(Answer(Stage.CONNECT, None, str(error), ours=True)) from error
        except TimeoutError as error:
            text = f"no connection within {seconds:g} s"
            raise SessionBroken(Answer(Stage.CONNECT, None, text)) from error
        except OSError as error:
            raise SessionBroken(Answer(Stage.CONNECT, None, error_text(error))) from error
        connection = cls(host, protocol, resumption, hostname=hostname, timeouts=timeouts)
        connection.opened_at = opened_at
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether another transaction may begin: it is connected and no unsolicited text came."""
        return self._protocol.is_quiet

    @property
    def secured(self) -> TlsResult:
        """The result of TLS, on a connection in TLS."""
        return TlsResult(Situation.SECURED, fault=self._verdict.fault)

    @property
    def kept_session(self) -> KeptSession | None:
        """The TLS session that a later connection may resume; TLS 1.3 sends it late."""
        kept = self._protocol.ssl_object.session if self.session.tls else None
        return KeptSession(kept, self._verdict) if kept is not None else None

    async def greet(self) -> None:
        """Read the greeting and send EHLO, or HELO to a host without EHLO (RFC 5321 §3.2)."""
        greeting = await self._read_reply(Stage.GREETING, self._seconds.greeting)
        if not Answer(Stage.GREETING, greeting).is_positive:
            self._raise_refused(Stage.GREETING, greeting)
        await self.say_hello()

    async def say_hello(self) -> None:
        """Send EHLO and note the extensions that the host offers; after HELO there are none."""
        name = self._hostname.encode("ascii", "replace")
        reply = await self._ask(b"EHLO " + name, Stage.EHLO)
        if 200 <= reply.code < 300:
            self.offers = Extensions.offered(*parse_esmtp_extensions(reply.text))
            return
        self.offers = NO_EXTENSIONS
        if reply.code != 421:
            reply = await self._ask(b"HELO " + name, Stage.EHLO)
        if not 200 <= reply.code < 300:
            self._raise_refused(Stage.EHLO, reply)

    async def start_tls(self, handshake: Handshake) -> TlsResult:
        """STARTTLS, the handshake, and a new EHLO, which replaces earlier facts (RFC 3207 §4.2)."""
        if not self.offers.starttls:
            return TlsResult(Situation.NOT_OFFERED, "STARTTLS not offered")
        return await self._begin_tls(handshake, self._protocol.start_tls, self.say_hello)

    async def begin_in_tls(self, handshake: Handshake) -> TlsResult:
        """Implicit TLS (RFC 8314 §3.3), then the greeting and EHLO."""
        return await self._begin_tls(handshake, self._protocol.handshake, self.greet)

    async def _begin_tls(
        self,
        handshake: Handshake,
        shake_hands: Callable[[ssl.SSLContext, str | None, float], Awaitable[object]],
        begin: Callable[[], Awaitable[None]],
    ) -> TlsResult:
        """Judge the certificate; a host that does not prove enough gets no further command."""
        if handshake.verifies and handshake.server_name is None:
            return TlsResult(Situation.UNVERIFIED, _NO_NAME)
        try:
            with carrying(self.resumption):
                await shake_hands(
                    handshake.context, handshake.server_name, self._seconds.tls_handshake
                )
        except SMTPResponseException as refused:
            reply = self._protocol.refusal or Reply(refused.code, "", refused.message)
            text = f"STARTTLS refused: {reply.code} {shown(reply)}".rstrip()
            return TlsResult(Situation.REFUSED, text, reply)
        except (*LOST, ValueError) as error:
            return self._failed_handshake(handshake, error)
        in_tls, resumed = self._protocol.ssl_object, self.resumption.kept_session
        if resumed is not None and in_tls.session_reused:
            self._verdict = resumed.verdict
        else:
            self._verdict = handshake.judge(in_tls)
        self._note_tls(self._verdict)
        if self._verdict.error:
            return TlsResult(Situation.UNVERIFIED, self._verdict.error, fault=self._verdict.fault)
        await begin()
        return self.secured

    def downgraded(self, downgrade: Downgrade) -> None:
        """Note why this session goes on in clear."""
        self.session = replace(self.session, downgrade=downgrade)

    async def authenticate(self, credentials: Credentials) -> Reply:
        """AUTH (RFC 4954), inside verified TLS and nowhere else. Returns the last reply, positive
        or not; the words of a host that refuses a token are added to it.

        From now on, what the host repeats of the login is masked in all that it says.
        """
        if not self.session.certificate_verified:
            raise AssertionError("credentials over a session that is not verified TLS")
        mechanism = sasl.choose(credentials, self.offers.auth)
        if not isinstance(mechanism, sasl.Mechanism):
            self.quit()
            raise SessionBroken(Answer(Stage.AUTH, None, mechanism, status="4.7.0"))
        host, port = self.host.name, self.host.port
        self._secrets += (sasl.secrets_of(credentials, host=host, port=port),)
        self.session = replace(self.session, login=HopLogin(mechanism.value, credentials.username))
        exchange = sasl.begin(mechanism, credentials, host=host, port=port)
        reply = await self._ask(exchange.first(), Stage.AUTH)
        while reply.code == 334 and not exchange.is_cancelled:
            reply = await self._ask(exchange.after(reply), Stage.AUTH)
        reply = self._masked(reply)
        if not exchange.refusal:
            return reply
        words = printable(self._without_secrets(exchange.refusal))
        return replace(reply, text=f"{reply.text} ({words})")

    async def transact(
        self,
        transaction: TransactionCommands,
        content: Content,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> dict[int, Answer]:
        """Send one message. Returns the host's last answer for each recipient.

        `may_go_on`: whether the claim of the message still holds. Where not, before MAIL or before
        the final dot, this raises `ClaimLost`, and the host has not taken the message.
        """
        if self.must_encrypt and not self.session.tls:
            raise AssertionError("a message that needs TLS over a session without it")
        answers: dict[int, Answer] = {}
        try:
            require_claim(may_go_on)
            await self._transact(transaction, content, answers, may_go_on)
        except SessionBroken as broken:
            for index in transaction.rcpts:
                if index not in answers or answers[index].is_positive:
                    answers[index] = broken.answer
        except ContentBroken as trouble:
            answer = Answer(Stage.CONTENT, None, str(trouble), ours=True)
            answers.update({index: answer for index, told in answers.items() if told.is_positive})
            self.abort()
        except BaseException:
            self.abort()
            raise
        self.messages += 1
        self.has_delivered |= any(answer.is_positive for answer in answers.values())
        return answers

    def quit(self) -> None:
        """Send QUIT and close, without waiting for its reply."""
        self._protocol.quit()

    def abort(self) -> None:
        """Close without QUIT."""
        self._protocol.abort()

    async def wait_closed(self) -> None:
        """Return when the connection is gone."""
        await self._protocol.gone.wait()

    async def _transact(
        self,
        transaction: TransactionCommands,
        content: Content,
        answers: dict[int, Answer],
        may_go_on: Callable[[], bool],
    ) -> None:
        if self._needs_rset:
            await self._reset_transaction()
        if self.offers.pipelining:
            self._send_commands(
                [transaction.mail, *transaction.rcpts.values(), b"DATA"], Stage.MAIL
            )
        mail = Answer(Stage.MAIL, await self._reply_to(transaction.mail, Stage.MAIL))
        self._needs_rset = is_open = mail.is_positive
        if not is_open:
            answers.update(dict.fromkeys(transaction.rcpts, mail))
            if not self.offers.pipelining:
                return
        for index, line in transaction.rcpts.items():
            reply = await self._reply_to(line, Stage.RCPT)
            if is_open:
                answers[index] = Answer(Stage.RCPT, reply)
        accepted = [index for index, answer in answers.items() if answer.is_positive]
        if not accepted and not self.offers.pipelining:
            return
        data = await self._reply_to(b"DATA", Stage.DATA)
        if data.code == 354:
            sending = self._send_content(content, may_go_on) if accepted else self._send_nothing()
            last = await sending
            self._needs_rset = False
        else:
            last = Answer(Stage.DATA, data)
        answers.update(dict.fromkeys(accepted, last))
        if last.reply is not None and last.reply.code == 421:
            self.abort()

    async def _reply_to(self, line: bytes, stage: Stage) -> Reply:
        """The reply to a command of the transaction. With PIPELINING it is sent already (RFC 2920
        §3.1).
        """
        if not self.offers.pipelining:
            self._send_commands([line], stage)
        reply = self._reply_at_hand()
        if reply is None:
            reply = await self._read_reply(stage, self._seconds.command)
        return self._checked(reply, stage)

    async def _reset_transaction(self) -> None:
        """RSET after a transaction without content; without it the next MAIL would be refused."""
        reply = await self._ask(b"RSET", Stage.MAIL)
        if not 200 <= reply.code < 300:
            self._raise_lost(Stage.MAIL, Garbled(f"answered RSET with {reply}"))
        self._needs_rset = False

    def _checked(self, reply: Reply, stage: Stage) -> Reply:
        """The reply, if the session goes on after it.

        421 ends it at any stage (RFC 5321 §3.8); so does a reply that cannot answer the command.
        """
        if stage is Stage.DATA:
            fits = reply.code == 354 or reply.code >= 400
        else:
            fits = 200 <= reply.code < 300 or reply.code >= 400
        if reply.code == 421 or not fits:
            self._raise_refused(stage, reply)
        return reply

    async def _send_content(self, content: Content, may_go_on: Callable[[], bool]) -> Answer:
        """The content and the final dot, after 354."""
        self._expect_silence(Stage.CONTENT)
        self._protocol.expect_reply()
        stuffer = DotStuffing()
        try:
            if isinstance(content, bytes) and len(content) <= PIECE_BYTES:
                require_claim(may_go_on)
                self._write(stuffer.stuff(content) + stuffer.end())
            elif await self._send_pieces(content, stuffer):
                require_claim(may_go_on)
                self._write(stuffer.end())
            else:
                return self._early_answer()
        except SessionBroken:
            if self._protocol.has_reply:
                return self._early_answer()
            raise
        return await self._final_answer()

    async def _send_pieces(self, content: Content, stuffer: DotStuffing) -> bool:
        """Send the content without the final dot. Returns whether the host let it be completed."""
        async with aclosing(pieces(content)) as every:
            async for piece in every:
                self._write(stuffer.stuff(piece))
                await self._drain()
                if self._protocol.has_reply:
                    return False
        return True

    def _early_answer(self) -> Answer:
        """The reply of a host before the final dot. It may take further octets for commands."""
        reply = self._reply_at_hand()
        assert reply is not None
        self.abort()
        if reply.code >= 400:
            return Answer(Stage.CONTENT, reply)
        return Answer(Stage.CONTENT, None, f"answered before the final dot: {reply}")

    async def _send_nothing(self) -> Answer:
        """Send a single dot: the host refused all recipients and still sent 354 (RFC 2920 §3.1)."""
        self._expect_silence(Stage.CONTENT)
        self._protocol.expect_reply()
        self._write(b".\r\n")
        return await self._final_answer()

    def _write(self, data: bytes) -> None:
        try:
            self._protocol.write(data)
        except LOST as error:
            self._raise_lost(Stage.CONTENT, error)

    async def _drain(self) -> None:
        """Wait until there is room for the next piece."""
        try:
            await self._protocol.drain(self._seconds.data_block)
        except LOST as error:
            self._raise_lost(Stage.CONTENT, error)

    async def _final_answer(self) -> Answer:
        """The answer to the final dot. Its time begins when the host has read all that was sent.

        The system may still hold megabytes for a slow host; a host that fetches them is alive.
        """
        check_seconds = min(_CHECK_SECONDS, self._seconds.data_block)
        if await self._wait_for_final_reply(check_seconds):
            return await self._read_final_answer()
        loop = asyncio.get_running_loop()
        moved, unread = loop.time(), self._protocol.unacknowledged_bytes()
        while unread and not await self._wait_for_final_reply(check_seconds):
            left = self._protocol.unacknowledged_bytes()
            if left < unread:
                moved = loop.time()
            elif loop.time() - moved >= self._seconds.data_block:
                self._raise_lost(Stage.FINAL_DOT, SMTPReadTimeoutError("the host stopped reading"))
            unread = left
        seconds = self._seconds.final_reply
        if not await self._wait_for_final_reply(seconds):
            self._raise_lost(
                Stage.FINAL_DOT, SMTPReadTimeoutError(f"no answer within {seconds:g} s")
            )
        return await self._read_final_answer()

    async def _read_final_answer(self) -> Answer:
        """The answer that has come, or the end of the connection."""
        reply = self._reply_at_hand() or await self._read_reply(Stage.FINAL_DOT, 0.0)
        return Answer(Stage.FINAL_DOT, reply)

    async def _wait_for_final_reply(self, seconds: float) -> bool:
        """Wait for the answer to the final dot, cancelled or not.

        The host may have taken the message already, and only this reply says so. `was_cancelled`
        tells the caller that it was cancelled meanwhile.
        """
        ends = time.monotonic() + seconds
        while True:
            try:
                return await self._protocol.wait(ends - time.monotonic())
            except asyncio.CancelledError:
                self.was_cancelled = True
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()

    async def _ask(self, line: bytes, stage: Stage) -> Reply:
        self._send_commands([line], stage)
        return await self._read_reply(stage, self._seconds.command)

    def _send_commands(self, lines: Sequence[bytes], stage: Stage) -> None:
        self._expect_silence(stage)
        try:
            self._protocol.say(lines)
        except LOST as error:
            self._raise_lost(stage, error)

    async def _read_reply(self, stage: Stage, seconds: float) -> Reply:
        try:
            reply = await self._protocol.next_reply(seconds)
            # What a 334 to AUTH says is decoded first; masked octets could not be.
            is_challenge = stage is Stage.AUTH and reply.code == 334
            return reply if is_challenge else self._masked(reply)
        except LOST as error:
            self._raise_lost(stage, error)

    def _reply_at_hand(self) -> Reply | None:
        """The next reply, if it has come."""
        reply = self._protocol.take_reply()
        return self._masked(reply) if reply is not None and self._secrets else reply

    def _masked(self, reply: Reply) -> Reply:
        """The reply without what it repeats of the login."""
        if not self._secrets:
            return reply
        text = self._without_secrets(reply.text)
        return reply if text == reply.text else replace(reply, text=text)

    def _without_secrets(self, text: str) -> str:
        for secrets in self._secrets:
            text = secrets.masked(text)
        return text

    def _expect_silence(self, stage: Stage) -> None:
        try:
            self._protocol.expect_silence()
        except LOST as error:
            self._raise_lost(stage, error)

    def _raise_lost(self, stage: Stage, error: Exception) -> NoReturn:
        self.abort()
        text = self._without_secrets(error_text(error))
        # After a login without the cause: a traceback would show what the host repeats.
        cause = None if self._secrets else error
        raise SessionBroken(Answer(stage, None, text)) from cause

    def _raise_refused(self, stage: Stage, reply: Reply) -> NoReturn:
        self.quit()
        raise SessionBroken(Answer(stage, reply))

    def _failed_handshake(self, handshake: Handshake, error: Exception) -> TlsResult:
        self.abort()
        if isinstance(error, ssl.SSLCertVerificationError):
            made = self.resumption.made
            verdict = handshake.judge_refused(error, made)
            if made is not None and (chain := sent_chain(made)):
                self.session = replace(self.session, certificate=facts_of(chain[0]))
            return TlsResult(Situation.UNVERIFIED, verdict.error, fault=verdict.fault)
        return TlsResult(Situation.HANDSHAKE_FAILED, f"TLS handshake failed: {error_text(error)}")

    def _note_tls(self, verdict: CertificateVerdict) -> None:
        in_tls = self._protocol.ssl_object
        cipher = in_tls.cipher()
        der = in_tls.getpeercert(binary_form=True)
        self.session = replace(
            self.session,
            tls=True,
            tls_version=in_tls.version(),
            tls_cipher=cipher[0] if cipher else None,
            verified_by=verdict.verified_by,
            pin=verdict.pin,
            certificate=facts_of(der) if der else None,
        )


@dataclass(frozen=True, slots=True)
class _Seconds:
    """`Timeouts`, as the event loop counts."""

    greeting: float
    command: float
    data_block: float
    final_reply: float
    tls_handshake: float

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, timeouts: Timeouts) -> _Seconds:
        return cls(
            timeouts.greeting.total_seconds(),
            timeouts.command.total_seconds(),
            timeouts.data_block.total_seconds(),
            timeouts.final_reply.total_seconds(),
            timeouts.tls_handshake.total_seconds(),
        )
