"""What `relay.receive.protocol` asks for: the actions of a session, and their results. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from relay.mail.record import record
from relay.receive.access import User
from relay.receive.session import TlsFacts
from relay.submit.message import Refusal
from relay.submit.secrets import SecretVerdict


class Incoming(Protocol):
    """A message that is coming in: `relay.receive.intake.Intake`."""

    queue_id: str
    refusal: Refusal | None

    def should_stage(self) -> bool:
        """Whether a piece of it should go to the store now."""

    async def stage(self) -> None: ...
    async def finish(self) -> Refusal | None: ...
    async def abandon(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Log:
    """Write a line to the log. `is_limited`: a stranger can cause it, so that the number of such
    lines is limited for each address.
    """

    text: str
    is_limited: bool = True


@dataclass(frozen=True, slots=True)
class Abandon:
    """Remove from the store what was staged of this message."""

    intake: Incoming


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection. `linger`: read and discard for a moment, so that a client that is still
    sending gets the last reply.
    """

    linger: bool = False


@dataclass(frozen=True, slots=True)
class BeginTls:
    """Make the TLS handshake. The result is what is known of it; where it fails the session is not
    resumed.
    """


@dataclass(frozen=True, slots=True)
class CheckPassword:
    """Check a name and a password. The result is the user, or why there is none."""

    name: bytes
    password: bytes


@record(frozen=True, slots=True)
class StagePiece:
    """Give the store a piece of a message. There is no result."""

    intake: Incoming


@record(frozen=True, slots=True)
class Finish:
    """The message is complete, or refused before its end: no more octets of it are read.

    The result is None once the message is committed and synced, or the refusal that the client
    gets.
    """

    intake: Incoming


Waiting = BeginTls | CheckPassword | StagePiece | Finish
Action = bytes | Log | Abandon | Close | Waiting
"""Octets are a reply."""
ActionResult = TlsFacts | User | SecretVerdict | Refusal | None


def text_of(reply: bytes) -> str:
    """A reply of one line, for the log."""
    return reply.decode("ascii").rstrip("\r\n")
