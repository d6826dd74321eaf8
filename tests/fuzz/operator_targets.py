"""What comes to the control socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Awaitable
from functools import cache
from pathlib import Path
from typing import Any, cast

from relay.admin import control
from relay.admin.control import Control
from relay.admin.control_socket import REQUEST_BYTES, ControlServer
from relay.admin.operator import Operator
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import QueueFilter
from relay.queue.verbs import VERBS
from tests.fakes.queued import NOW, new_message

control.FOLLOW_SECONDS = 0.01
_PATIENCE_SECONDS = 5.0
_FILTERS = ("ids", "domain", "sender", "older-than", "state")
_FOLLOWS = b"\xfe"


def requests(octets: bytes) -> None:
    """Every request is answered in lines of JSON, of which the last says how it ended; no mail is
    changed that was not named.
    """
    _desk().ask(octets)


class _Desk:
    """A control socket without the socket, on a real store with two messages."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._directory = tempfile.TemporaryDirectory(prefix="fuzz-")
        path = Path(self._directory.name)
        self.store = self._run(SqliteStore.open(path / "spool", now=NOW, synchronous="OFF"))
        answers = Control(Operator(self.store, lambda: NOW, self.store))
        self._server = ControlServer(answers, path / "relay.sock")

    def close(self) -> None:
        self._run(self.store.close())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._directory.cleanup()

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        return self._loop.run_until_complete(awaitable)

    def ask(self, octets: bytes) -> None:
        self._run(self._ask(octets))

    async def _ask(self, octets: bytes) -> None:
        await self._fill()
        said = _Said()
        reader = asyncio.StreamReader(limit=REQUEST_BYTES)
        reader.feed_data(octets + b"\n")
        writer = cast(asyncio.StreamWriter, said)
        asking = asyncio.ensure_future(self._server._one_request(reader, writer))
        follows = _value(octets).get("follow") is True
        if not follows:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await asking
            said.check()
        else:
            await asyncio.sleep(0.02)
            reader.feed_eof()
            await asking
        await self._check_changes(octets)

    async def _fill(self) -> None:
        for queue_id in ("M1", "M2"):
            if await self.store.find_message(queue_id) is None:
                await self.store.accept(new_message(queue_id=queue_id, sender="a@b.example"))

    async def _check_changes(self, octets: bytes) -> None:
        page = await self.store.list_messages(QueueFilter(), now=NOW, after="", limit=9)
        changed = {"M1", "M2"} - {
            message.queue_id
            for message in page
            if all(recipient.state == "queued" for recipient in message.recipients)
        }
        if not changed:
            return
        asked = _value(octets)
        assert asked["verb"] in VERBS
        assert (asked.get("all") is True) != any(asked.get(name, "") != "" for name in _FILTERS)
        assert changed <= set(asked.get("ids", changed))
        await self.store.change(QueueFilter(), verb="remove", now=NOW, after="", event_of=None)


class _Said:
    """What was written to the client."""

    def __init__(self) -> None:
        self.octets = b""

    def write(self, octets: bytes) -> None:
        self.octets += octets

    async def drain(self) -> None:
        pass

    def check(self) -> None:
        lines = [json.loads(line) for line in self.octets.split(b"\n")[:-1]]
        ends = [line for line in lines if "done" in line or "error" in line]
        assert self.octets.endswith(b"\n")
        assert self.octets.isascii()
        assert ends == lines[-1:], lines
        assert "relay's own" not in ends[0].get("error", ""), lines


def _value(octets: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(octets.split(b"\n")[0])
        if isinstance(value, dict):
            return value
    return {}


@cache
def _desk() -> _Desk:
    return _Desk()


def close() -> None:
    """Close the store, if it was opened."""
    if _desk.cache_info().currsize:
        _desk().close()
        _desk.cache_clear()
