"""The dialogue with a mail host: commands out, replies in (RFC 5321 §4.2).

`relay.deliver.protocol` has the octets. Here a reply gets the stage that it belongs to, and an
error of the library or of the system ends the connection and becomes `SessionBroken` with an
`Answer`. What a host repeats of the login is masked in all its replies.

Each wait has its own limit (RFC 5321 §4.5.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

from aiosmtplib.esmtp import parse_esmtp_extensions

from relay.deliver.diagnosis import Answer, Stage
from relay.deliver.options import Timeouts
from relay.deliver.protocol import CONNECTION_ERRORS, ClientProtocol, error_text
from relay.deliver.transaction import NO_EXTENSIONS, Extensions
from relay.mail.masked import SecretMask
from relay.mail.reply import Reply


class SessionBroken(Exception):
    """The session has ended at a stage, because of a reply or without one."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


class Dialogue:
    """Commands to one host, and its replies. An error ends it with `SessionBroken`.

    `offers`: the extensions that the host offers. `seconds`: the limits of the waits.
    """

    def __init__(self, protocol: ClientProtocol, *, hostname: str, timeouts: Timeouts) -> None:
        self.protocol = protocol
        self.offers = NO_EXTENSIONS
        self.seconds = Seconds.of(timeouts)
        self._hostname = hostname
        self._secrets: tuple[SecretMask, ...] = ()

    def mask(self, secrets: SecretMask) -> None:
        """Mask these secrets in all that the host says from now on."""
        self._secrets += (secrets,)

    async def greet(self) -> None:
        """Read the greeting and send EHLO, or HELO to a host without EHLO (RFC 5321 §3.2)."""
        greeting = await self.read_reply(Stage.GREETING, self.seconds.greeting)
        if not Answer(Stage.GREETING, greeting).is_positive:
            self.raise_refused(Stage.GREETING, greeting)
        await self.say_hello()

    async def say_hello(self) -> None:
        """Send EHLO and note the extensions that the host offers; after HELO there are none."""
        name = self._hostname.encode("ascii", "replace")
        reply = await self.ask(b"EHLO " + name, Stage.EHLO)
        if 200 <= reply.code < 300:
            self.offers = Extensions.offered(*parse_esmtp_extensions(reply.text))
            return
        self.offers = NO_EXTENSIONS
        if reply.code != 421:
            reply = await self.ask(b"HELO " + name, Stage.EHLO)
        if not 200 <= reply.code < 300:
            self.raise_refused(Stage.EHLO, reply)

    async def ask(self, line: bytes, stage: Stage) -> Reply:
        """Send a command and return its reply."""
        self.send_commands([line], stage)
        return await self.read_reply(stage, self.seconds.command)

    def send_commands(self, lines: Sequence[bytes], stage: Stage) -> None:
        """Send commands in one write, without a wait for their replies."""
        try:
            self.protocol.check_unsolicited()
            self.protocol.send_commands(lines)
        except CONNECTION_ERRORS as error:
            self.raise_lost(stage, error)

    async def read_reply(self, stage: Stage, seconds: float) -> Reply:
        """Wait for the next reply, at most so many seconds."""
        try:
            reply = await self.protocol.next_reply(seconds)
            # What a 334 to AUTH says is decoded first; masked octets could not be.
            is_challenge = stage is Stage.AUTH and reply.code == 334
            return reply if is_challenge else self.masked(reply)
        except CONNECTION_ERRORS as error:
            self.raise_lost(stage, error)

    def take_reply(self) -> Reply | None:
        """The next reply, if it has come."""
        reply = self.protocol.take_reply()
        return self.masked(reply) if reply is not None and self._secrets else reply

    def masked(self, reply: Reply) -> Reply:
        """The reply without what it repeats of the login."""
        if not self._secrets:
            return reply
        text = self.without_secrets(reply.text)
        return reply if text == reply.text else replace(reply, text=text)

    def without_secrets(self, text: str) -> str:
        """A text of the host without what it repeats of the login."""
        for secrets in self._secrets:
            text = secrets.masked(text)
        return text

    def begin_content(self) -> None:
        """Expect one reply: to the content, which follows."""
        try:
            self.protocol.check_unsolicited()
        except CONNECTION_ERRORS as error:
            self.raise_lost(Stage.CONTENT, error)
        self.protocol.expect_reply()

    def write(self, content: bytes) -> None:
        try:
            self.protocol.write(content)
        except CONNECTION_ERRORS as error:
            self.raise_lost(Stage.CONTENT, error)

    async def drain(self) -> None:
        """Wait until there is room for more content."""
        try:
            await self.protocol.drain(self.seconds.data_block)
        except CONNECTION_ERRORS as error:
            self.raise_lost(Stage.CONTENT, error)

    def raise_lost(self, stage: Stage, error: Exception) -> NoReturn:
        """Abort the connection after an error: lost, silent, or no SMTP."""
        self.abort()
        text = self.without_secrets(error_text(error))
        # After a login without the cause: a traceback would show what the host repeats.
        cause = None if self._secrets else error
        raise SessionBroken(Answer(stage, None, text)) from cause

    def raise_refused(self, stage: Stage, reply: Reply) -> NoReturn:
        """End the session because of this reply."""
        self.quit()
        raise SessionBroken(Answer(stage, reply))

    def quit(self) -> None:
        """Send QUIT and close, without waiting for its reply."""
        self.protocol.quit()

    def abort(self) -> None:
        """Close without QUIT."""
        self.protocol.abort()


@dataclass(frozen=True, slots=True)
class Seconds:
    """`Timeouts`, as the event loop counts."""

    greeting: float
    command: float
    data_block: float
    final_reply: float
    tls_handshake: float

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, timeouts: Timeouts) -> Seconds:
        return cls(
            timeouts.greeting.total_seconds(),
            timeouts.command.total_seconds(),
            timeouts.data_block.total_seconds(),
            timeouts.final_reply.total_seconds(),
            timeouts.tls_handshake.total_seconds(),
        )
