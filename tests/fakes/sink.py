"""A sink of messages that fails when it is told to."""

from __future__ import annotations

from relay.queue.store import MessageSink, NewMessage


class TroubledSink:
    """`accept` raises `trouble` while that is set; all else goes to the sink behind it."""

    def __init__(self, sink: MessageSink, trouble: Exception | None = None) -> None:
        self._sink = sink
        self.trouble = trouble
        self.stage = sink.stage
        self.discard = sink.discard

    async def accept(self, new: NewMessage) -> None:
        if self.trouble is not None:
            raise self.trouble
        await self._sink.accept(new)
