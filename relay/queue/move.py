"""Takes the messages of a queue to a directory, and brings them from there into another queue.

A message is in one place at any moment, whoever is killed when:

    take      the queue notes that the message is leaving, and to which directory; from then on
              nothing but the export touches it
    write     the file, under another name; then it is synced, renamed, and the name is synced
    remove    the message leaves the queue
    add       the other queue commits the message together with the stamp of the file
    unlink    the file

A move that was cut short goes on where it is run again. The file of a message that was being taken
is written again, with the same stamp. A file whose stamp the queue has seen is only unlinked: the
message may have been delivered, and may have left.

The queue of a directory belongs to the move alone meanwhile. A queue on a server may be in use: its
nodes are asked to give back what they have not begun on, and what they are trying stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum, auto
from pathlib import Path
from typing import Protocol

from relay.mail.files import sync_directory
from relay.queue.api_state import CallsAbout, PendingCall
from relay.queue.move_directory import (
    NOTE,
    Arrival,
    Target,
    files_of,
    give_name,
    held_to_read,
    held_to_write,
    read_arrival,
    read_files,
    read_whole,
    written,
)
from relay.queue.move_file import (
    CALL_SUFFIX,
    MESSAGE_SUFFIX,
    DamagedFile,
    MovedMessage,
    head_of_call,
    head_of_message,
    new_stamp,
    read_call,
)
from relay.queue.store import SpoolError

REMEMBERED = timedelta(days=90)
"""How long a queue keeps the stamps of what came."""
EVENTS_AT_ONCE = 1000
"""Of so many events the calls are added at a time."""

_BATCH = 100
_BATCH_BYTES = 16 * 1024 * 1024
_PATIENCE_SECONDS = 30.0
"""How long an export waits for attempts that are under way."""
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Taken:
    """Messages that are leaving now. `until`: where to go on, None at the end.

    `busy`: how many messages are being tried, and stay. `damaged`: by queue id, why it stays.
    """

    messages: Sequence[MovedMessage]
    until: str | None
    busy: int = 0
    damaged: Mapping[str, str] = field(default_factory=dict)


class Came(Enum):
    """What became of a message that was brought to a queue."""

    ADDED = auto()
    BEFORE = auto()
    """It had come before, or is there."""
    OTHER_THERE = auto()
    """Another message has its queue id."""


class MovingQueue(Protocol):
    """A queue that messages are taken from or brought to. Methods may raise `SpoolError`."""

    async def quiet(self) -> None:
        """Have every claim given back that no attempt was begun for."""

    async def unfinished(self, target: Target) -> list[MovedMessage]:
        """The messages that are leaving for this directory already."""

    async def take(self, target: Target, *, after: str, limit: int) -> Taken:
        """Note of the next messages behind `after` that they are leaving."""

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content of a message in pieces."""

    async def put_back(self, messages: Sequence[MovedMessage]) -> None:
        """These messages stay: what was due is due."""

    async def remove(self, messages: Sequence[MovedMessage]) -> None:
        """These messages have left."""

    async def leaving_elsewhere(self, target: Target) -> list[str]:
        """The places of other directories that messages are leaving for."""

    async def count_messages(self) -> int:
        """How many messages there are."""

    async def add(self, arrivals: Sequence[Arrival]) -> dict[str, Came]:
        """Commit messages; what became of each, by queue id."""

    async def calls(self, about: CallsAbout, *, limit: int) -> list[PendingCall]:
        """The next calls that webhooks wait for, and that nobody is making."""

    async def remove_calls(self, calls: Sequence[PendingCall]) -> None:
        """These calls have left."""

    async def add_call(self, call: PendingCall, stamp: str) -> None:
        """Commit a call, unless its stamp was seen before."""

    async def close(self) -> None:
        """Let the queue go."""


@dataclass(slots=True)
class MoveResult:
    """How many messages were moved, how many stay where they were, and why, in sentences."""

    moved: int = 0
    left: int = 0
    reasons: list[str] = field(default_factory=list)


Progress = Callable[[int], None]
"""Is told how many messages were moved so far."""


# --- export ---------------------------------------------------------------------------------------


async def export_queue(
    queue: MovingQueue, directory: Path, *, about: CallsAbout, progress: Progress
) -> MoveResult:
    """Move all messages of a queue to files in a directory. OSError, `SpoolError`."""
    result = MoveResult()
    damaged: dict[str, str] = {}
    with held_to_write(directory) as target:
        moved = _Export(queue, directory, target, result, damaged, progress)
        await moved.batch(await queue.unfinished(target))
        until = time.monotonic() + _PATIENCE_SECONDS
        while busy := await moved.all():
            if time.monotonic() >= until:
                result.reasons.append(
                    f"{busy} messages are being tried by a node: run this again to move them"
                )
                break
            await asyncio.sleep(_PAUSE_SECONDS)
        await moved.calls(about)
        result.left = await queue.count_messages()
        elsewhere = await queue.leaving_elsewhere(target)
    result.reasons += [
        f"{queue_id}: {why}; it stays in the queue" for queue_id, why in sorted(damaged.items())
    ]
    result.reasons += [
        f"messages are on their way to {place}: that export runs, or was cut short; run it again"
        for place in elsewhere
    ]
    return result


@dataclass(slots=True)
class _Export:
    queue: MovingQueue
    directory: Path
    target: Target
    result: MoveResult
    damaged: dict[str, str]
    progress: Progress

    async def all(self) -> int:
        """One walk through the queue; how many messages are being tried at the moment."""
        await self.queue.quiet()
        after: str | None = ""
        busy = 0
        while after is not None:
            taken = await self.queue.take(self.target, after=after, limit=_BATCH)
            self.damaged.update(taken.damaged)
            busy += taken.busy
            await self.batch(taken.messages)
            after = taken.until
        return busy

    async def batch(self, messages: Sequence[MovedMessage]) -> None:
        """Write the files of some messages that were taken, then remove the messages."""
        written: list[MovedMessage] = []
        unreadable: list[MovedMessage] = []
        try:
            for message in messages:
                try:
                    await self._write(message)
                    written.append(message)
                except SpoolError as error:
                    self.damaged[message.queue_id] = str(error)
                    unreadable.append(message)
        except OSError:
            # No file has its name yet, but those of an export that was cut short.
            fresh = [one for one in messages if not self._path(one).exists()]
            await self.queue.put_back(fresh)
            raise
        if unreadable:
            await self.queue.put_back(unreadable)
        if not written:
            return
        for message in written:
            give_name(self._path(message))
        sync_directory(self.directory)
        await self.queue.remove(written)
        self.result.moved += len(written)
        self.progress(self.result.moved)

    def _path(self, message: MovedMessage) -> Path:
        return self.directory / f"{message.queue_id}{MESSAGE_SUFFIX}"

    async def _write(self, message: MovedMessage) -> None:
        path = self._path(message)
        if path.exists():
            self._expect_same(path, message)
            return
        with written(path) as write:
            write(head_of_message(message))
            async for piece in self.queue.read_content(message.queue_id):
                write(piece)

    def _expect_same(self, path: Path, message: MovedMessage) -> None:
        """A file that is there has to be of this very move. `SpoolError`."""
        with contextlib.suppress(DamagedFile):
            if read_arrival(path).message.stamp == message.stamp:
                return
        raise SpoolError(f"{path} is there already, and is of another message")

    async def calls(self, about: CallsAbout) -> None:
        """Move the calls that webhooks wait for. One that is cut short may be made twice."""
        while calls := await self.queue.calls(about, limit=_BATCH):
            for call in calls:
                path = self.directory / f"{_name_of(call)}{CALL_SUFFIX}"
                with written(path) as write:
                    write(head_of_call(call, new_stamp()))
                give_name(path)
            sync_directory(self.directory)
            await self.queue.remove_calls(calls)


def _name_of(call: PendingCall) -> str:
    """The name of a call's file, the same where the export is run again."""
    said = f"{call.url} {call.line} {call.attempts} {call.due.isoformat()}"
    return hashlib.sha256(said.encode()).hexdigest()[:32]


# --- import ---------------------------------------------------------------------------------------


async def import_queue(queue: MovingQueue, directory: Path, *, progress: Progress) -> MoveResult:
    """Bring the messages in a directory into a queue. OSError, `SpoolError`."""
    result = MoveResult()
    with held_to_read(directory):
        batch: list[Arrival] = []
        for one in read_files(directory):
            if isinstance(one, str):
                result.left += 1
                result.reasons.append(f"{one}; it stays there")
                continue
            batch.append(one)
            size = sum(each.content_bytes for each in batch)
            if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                await _add(queue, directory, batch, result)
                progress(result.moved)
                batch = []
        await _add(queue, directory, batch, result)
        progress(result.moved)
        await _add_calls(queue, directory, result)
        if not result.left and not result.reasons:
            (directory / NOTE).unlink(missing_ok=True)
    return result


async def _add(
    queue: MovingQueue, directory: Path, batch: Sequence[Arrival], result: MoveResult
) -> None:
    if not batch:
        return
    came = await queue.add(batch)
    for one in batch:
        if came[one.message.queue_id] is Came.OTHER_THERE:
            result.left += 1
            result.reasons.append(
                f"{one.path}: another message of the queue is called {one.message.queue_id};"
                " both are kept"
            )
        else:
            one.path.unlink()
            result.moved += 1
    sync_directory(directory)


async def _add_calls(queue: MovingQueue, directory: Path, result: MoveResult) -> None:
    for path in files_of(directory, CALL_SUFFIX):
        try:
            call, stamp = read_call(read_whole(path)[0])
        except DamagedFile as error:
            result.reasons.append(f"{path}: {error}; it stays there")
            continue
        await queue.add_call(call, stamp)
        path.unlink()
    sync_directory(directory)
