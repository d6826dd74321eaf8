"""The transfer of one message: MAIL, RCPT, DATA and the content, on an open session.

The result is one `Answer` for each recipient, also where the session breaks. With PIPELINING the
commands go out in one write (RFC 2920), and each reply belongs to its own command.

The limit for content counts from the last progress, so that a slow host is not taken for a dead
one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, closing

from aiosmtplib import SMTPReadTimeoutError

from relay.deliver.content import PIECE_BYTES, Content, ContentBroken, file_of, pieces
from relay.deliver.diagnosis import Answer, Stage
from relay.deliver.dialogue import Dialogue, SessionBroken
from relay.deliver.framing import BadReply, DotStuffing
from relay.deliver.transaction import TransactionCommands
from relay.mail.reply import Reply
from relay.queue.store import ClaimLost, ContentFile

FILE_BYTES = 1024 * 1024
"""The most that the system sends of a file before others get their turn."""
_WAIT_BYTES = 64 * 1024
"""How much is written where the socket has no room: with the last of it, it has room again."""
_CHECK_SECONDS = 0.5
"""Seconds between two checks of how much a host has read."""


def require_claim(may_go_on: Callable[[], bool]) -> None:
    """Raise `ClaimLost` where the claim of the message does not hold any more."""
    if not may_go_on():
        raise ClaimLost("the lease of this node is over: another node may have the message")


async def _read(file: ContentFile, offset: int) -> bytes:
    try:
        return await file.read(offset, _WAIT_BYTES)
    except Exception as error:
        raise ContentBroken(str(error) or type(error).__name__) from error


class Transfer:
    """The transactions of one connection, one after another.

    `was_cancelled`: the task was cancelled while the answer to the final dot was outstanding.
    """

    def __init__(self, dialogue: Dialogue) -> None:
        self.was_cancelled = False
        self._dialogue = dialogue
        self._protocol = dialogue.protocol
        self._seconds = dialogue.seconds
        self._needs_rset = False

    async def send(
        self, transaction: TransactionCommands, content: Content, may_go_on: Callable[[], bool]
    ) -> dict[int, Answer]:
        """Send one message. Returns the host's last answer for each recipient.

        Raises `ClaimLost` where the claim does not hold any more before MAIL or the final dot.
        """
        answers: dict[int, Answer] = {}
        try:
            require_claim(may_go_on)
            await self._transact(transaction, content, answers, may_go_on)
        except SessionBroken as broken:
            for index in transaction.rcpts:
                if index not in answers or answers[index].is_positive:
                    answers[index] = broken.answer
        except ContentBroken as error:
            answer = Answer(Stage.CONTENT, None, str(error), ours=True)
            answers.update({index: answer for index, told in answers.items() if told.is_positive})
            self._dialogue.abort()
        except BaseException:
            self._dialogue.abort()
            raise
        return answers

    async def _transact(
        self,
        transaction: TransactionCommands,
        content: Content,
        answers: dict[int, Answer],
        may_go_on: Callable[[], bool],
    ) -> None:
        if self._needs_rset:
            await self._reset_transaction()
        if self._dialogue.offers.pipelining:
            self._dialogue.send_commands(
                [transaction.mail, *transaction.rcpts.values(), b"DATA"], Stage.MAIL
            )
        mail = Answer(Stage.MAIL, await self._reply_to(transaction.mail, Stage.MAIL))
        self._needs_rset = is_open = mail.is_positive
        if not is_open:
            answers.update(dict.fromkeys(transaction.rcpts, mail))
            if not self._dialogue.offers.pipelining:
                return
        for index, line in transaction.rcpts.items():
            reply = await self._reply_to(line, Stage.RCPT)
            if is_open:
                answers[index] = Answer(Stage.RCPT, reply)
        accepted = [index for index, answer in answers.items() if answer.is_positive]
        if not accepted and not self._dialogue.offers.pipelining:
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
            self._dialogue.abort()

    async def _reply_to(self, line: bytes, stage: Stage) -> Reply:
        """The reply to a command of the transaction, if the session goes on after it. With
        PIPELINING the command is sent already (RFC 2920 §3.1).

        421 ends the session at any stage (RFC 5321 §3.8); so does a reply that cannot answer the
        command.
        """
        if not self._dialogue.offers.pipelining:
            self._dialogue.send_commands([line], stage)
        reply = self._dialogue.take_reply()
        if reply is None:
            reply = await self._dialogue.read_reply(stage, self._seconds.command)
        is_positive = reply.code == 354 if stage is Stage.DATA else 200 <= reply.code < 300
        if reply.code == 421 or not (is_positive or reply.code >= 400):
            self._dialogue.raise_refused(stage, reply)
        return reply

    async def _reset_transaction(self) -> None:
        """RSET after a transaction without content; without it the next MAIL would be refused."""
        reply = await self._dialogue.ask(b"RSET", Stage.MAIL)
        if not 200 <= reply.code < 300:
            self._dialogue.raise_lost(Stage.MAIL, BadReply(f"answered RSET with {reply}"))
        self._needs_rset = False

    async def _send_content(self, content: Content, may_go_on: Callable[[], bool]) -> Answer:
        """The content and the final dot, after 354."""
        self._dialogue.begin_content()
        stuffer = DotStuffing()
        try:
            if isinstance(content, bytes) and len(content) <= PIECE_BYTES:
                require_claim(may_go_on)
                self._dialogue.write(stuffer.stuff(content) + stuffer.end())
            elif await self._send_large(content, stuffer):
                require_claim(may_go_on)
                self._dialogue.write(stuffer.end())
            else:
                return self._early_answer()
        except SessionBroken:
            if self._protocol.has_reply:
                return self._early_answer()
            raise
        return await self._final_answer()

    async def _send_large(self, content: Content, stuffer: DotStuffing) -> bool:
        """Send the content without the final dot. Returns whether the host let it be completed."""
        file = await file_of(content) if self._protocol.sends_files else None
        if file is None:
            return await self._send_pieces(content, stuffer)
        with closing(file):
            self._protocol.pause_at(0)
            try:
                return await self._send_file(file)
            finally:
                self._protocol.pause_at(None)

    async def _send_file(self, file: ContentFile) -> bool:
        """The system sends what it has in memory, as much as the socket takes. Where that is
        nothing, a piece is written in the usual way, which waits for the disk or for room.
        """
        offset = 0
        while offset < file.size_bytes:
            count = min(FILE_BYTES, file.size_bytes - offset)
            sent = 0
            if file.is_in_memory(offset, count):
                sent = self._protocol.send_file(file.fileno(), offset, count)
            if sent:
                await asyncio.sleep(0)  # so that others get their turn
            else:
                piece = await _read(file, offset)
                sent = len(piece)
                self._dialogue.write(piece)
                await self._dialogue.drain()
            offset += sent
            if self._protocol.has_reply:
                return False
        return True

    async def _send_pieces(self, content: Content, stuffer: DotStuffing) -> bool:
        """Send the content without the final dot. Returns whether the host let it be completed."""
        async with aclosing(pieces(content)) as every:
            async for piece in every:
                self._dialogue.write(stuffer.stuff(piece))
                await self._dialogue.drain()
                if self._protocol.has_reply:
                    return False
        return True

    def _early_answer(self) -> Answer:
        """The reply of a host before the final dot. It may take further octets for commands."""
        reply = self._dialogue.take_reply()
        assert reply is not None
        self._dialogue.abort()
        if reply.code >= 400:
            return Answer(Stage.CONTENT, reply)
        return Answer(Stage.CONTENT, None, f"answered before the final dot: {reply}")

    async def _send_nothing(self) -> Answer:
        """Send a single dot: the host refused all recipients and still sent 354 (RFC 2920 §3.1)."""
        self._dialogue.begin_content()
        self._dialogue.write(b".\r\n")
        return await self._final_answer()

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
                self._dialogue.raise_lost(
                    Stage.FINAL_DOT, SMTPReadTimeoutError("the host stopped reading")
                )
            unread = left
        seconds = self._seconds.final_reply
        if not await self._wait_for_final_reply(seconds):
            self._dialogue.raise_lost(
                Stage.FINAL_DOT, SMTPReadTimeoutError(f"no answer within {seconds:g} s")
            )
        return await self._read_final_answer()

    async def _read_final_answer(self) -> Answer:
        """The answer that has come, or the end of the connection."""
        reply = self._dialogue.take_reply() or await self._dialogue.read_reply(Stage.FINAL_DOT, 0.0)
        return Answer(Stage.FINAL_DOT, reply)

    async def _wait_for_final_reply(self, seconds: float) -> bool:
        """Wait for the answer to the final dot, cancelled or not.

        The host may have taken the message already, and only this reply says so. `was_cancelled`
        tells the caller that it was cancelled meanwhile.
        """
        ends = time.monotonic() + seconds
        while True:
            try:
                return await self._protocol.wait(seconds)
            except asyncio.CancelledError:
                self.was_cancelled = True
                seconds = ends - time.monotonic()
                task = asyncio.current_task()
                if task is not None:
                    task.uncancel()
