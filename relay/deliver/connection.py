"""One connection to one address of a mail host: the session from the connect over TLS and AUTH to
QUIT.

`relay.deliver.dialogue` sends the commands and reads the replies, `relay.deliver.transfer` sends a
message. This module looks nothing up and decides nothing: `open` connects to the given address,
`start_tls` and `begin_in_tls` return the result of TLS (a `TlsResult`). What ends a session raises
`SessionBroken`.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from aiosmtplib import SMTPResponseException

from relay.deliver import sasl
from relay.deliver.certificate_facts import facts_of
from relay.deliver.content import Content
from relay.deliver.diagnosis import Answer, Stage, shown
from relay.deliver.dialogue import Dialogue, SessionBroken
from relay.deliver.options import Timeouts
from relay.deliver.protocol import (
    CONNECTION_ERRORS,
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
from relay.deliver.transaction import Extensions, TransactionCommands
from relay.deliver.transfer import Transfer
from relay.mail.outcome import Downgrade, HopLogin, HopSession, PolicyResult
from relay.mail.printable import printable
from relay.mail.reply import Reply
from relay.route.next_hop import Credentials, Host
from relay.route.security import Situation

_NO_NAME = "no name that a certificate could be for"


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
        self.session = HopSession(host.name, host.address)
        self.local_ip = protocol.local_ip
        self.opened_at = 0.0
        self.messages = 0
        self.has_delivered = False
        self._protocol = protocol
        self._dialogue = Dialogue(protocol, hostname=hostname, timeouts=timeouts)
        self._transfer = Transfer(self._dialogue)
        self._verdict = CertificateVerdict()

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
        return self._protocol.is_usable

    @property
    def offers(self) -> Extensions:
        """The extensions that the host offers."""
        return self._dialogue.offers

    @property
    def was_cancelled(self) -> bool:
        """Whether the task was cancelled during the final dot, whose answer was still awaited."""
        return self._transfer.was_cancelled

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
        """Read the greeting and send EHLO."""
        await self._dialogue.greet()

    async def start_tls(self, handshake: Handshake) -> TlsResult:
        """STARTTLS, the handshake, and a new EHLO, which replaces earlier facts (RFC 3207 §4.2)."""
        if not self.offers.starttls:
            return TlsResult(Situation.NOT_OFFERED, "STARTTLS not offered")
        return await self._begin_tls(handshake, self._protocol.start_tls, self._dialogue.say_hello)

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
                    handshake.context, handshake.server_name, self._dialogue.seconds.tls_handshake
                )
        except SMTPResponseException as refused:
            reply = self._protocol.starttls_reply or Reply(refused.code, "", refused.message)
            text = f"STARTTLS refused: {reply.code} {shown(reply)}".rstrip()
            return TlsResult(Situation.REFUSED, text, reply)
        except (*CONNECTION_ERRORS, ValueError) as error:
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
        self._dialogue.mask(sasl.secrets_of(credentials, host=host, port=port))
        self.session = replace(self.session, login=HopLogin(mechanism.value, credentials.username))
        exchange = sasl.begin(mechanism, credentials, host=host, port=port)
        reply = await self._dialogue.ask(exchange.first(), Stage.AUTH)
        while reply.code == 334 and not exchange.is_cancelled:
            reply = await self._dialogue.ask(exchange.after(reply), Stage.AUTH)
        reply = self._dialogue.masked(reply)
        if not exchange.refusal:
            return reply
        words = printable(self._dialogue.without_secrets(exchange.refusal))
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
        answers = await self._transfer.send(transaction, content, may_go_on)
        self.messages += 1
        if not self.has_delivered:
            self.has_delivered = any(answer.is_positive for answer in answers.values())
        return answers

    def quit(self) -> None:
        """Send QUIT and close, without waiting for its reply."""
        self._protocol.quit()

    def abort(self) -> None:
        """Close without QUIT."""
        self._protocol.abort()

    async def wait_closed(self) -> None:
        """Return when the connection is closed."""
        await self._protocol.closed.wait()

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
