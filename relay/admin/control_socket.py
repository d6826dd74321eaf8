"""The control socket, over which the command line, or another worker, talks to a running relay.

Only the owner of the UNIX socket may open it (mode 0600), or also a group (0660). A connection
carries one request and its answer. Each line is a JSON object:

    → {"verb": "list", "domain": "example.net"}
    ← {"report": {…}}          the counts of a report; its exceptions follow as items
    ← {"items": [{…}, …]}      a page of a listing; any number of such lines
    ← {"item": {…}}            one thing; any number of such lines
    ← {"following": {}}        the lines after this one are new events of a log
    ← {"so-far": {…}}          how much of a long change is done
    ← {"done": {…}}            the last line: the result
    ← {"error": "…"}           or the last line: what is wrong with the request, or with the relay

A request has at most 1 MiB (a list of queue ids may be long) and has to come within ten seconds. At
most sixteen requests are served at a time. A client that stops reading is disconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Protocol

from relay.admin.requests import RequestError
from relay.mail.jsontext import JsonObject, to_json
from relay.queue.store import SpoolError

REQUEST_BYTES = 1024 * 1024
REQUEST_SECONDS = 10.0
WRITE_SECONDS = 60.0
AT_A_TIME = 16

log = logging.getLogger("relay.control")

AnswerLines = AsyncIterator[JsonObject]
"""The lines that answer a request."""


class SocketTaken(Exception):
    """Another process answers at this socket."""


class RequestHandler(Protocol):
    """Answers requests: `relay.admin.control.Control`."""

    def answer(self, request: Mapping[str, object]) -> AnswerLines: ...


class ControlServer:
    """The socket and its open connections."""

    def __init__(self, control: RequestHandler, path: Path, group: str | None = None) -> None:
        self.control = control
        self.path = path
        self.group = group
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._inode = 0

    async def start(self) -> None:
        """Listen. `SocketTaken` or OSError say why that is not possible."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(self.path)
        listening = _bind_private(self.path)
        self._inode = self.path.stat().st_ino
        if self.group is not None:
            if self.path.group() != self.group:
                shutil.chown(self.path, group=self.group)
            self.path.chmod(0o660)
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listening, limit=REQUEST_BYTES
        )

    async def close(self) -> None:
        """End all connections, and remove the socket if it is still the one that was opened."""
        if self._server is not None:
            self._server.close()
        for task in list(self._clients):
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients, timeout=5)
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > AT_A_TIME:
                await _send(writer, {"error": "too many requests at a time, try again"})
                await _finish(writer)
                return
            await self._one_request(reader, writer)
            await _finish(writer)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the client is gone or does not read, or the server closes
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _one_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                line = await reader.readline()
            request = json.loads(line)
            if not isinstance(request, dict):
                raise RequestError("a request is a JSON object")
        except (ValueError, RecursionError, RequestError) as error:
            await _send(writer, {"error": f"not a request: {error}"})
            return
        await self._reply(request, reader, writer)

    async def _reply(
        self,
        request: Mapping[str, object],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send the answer, until its end or until the client hangs up."""
        answering = asyncio.ensure_future(self._answer(request, writer))
        hanging_up = asyncio.ensure_future(_hung_up(reader))
        try:
            await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
        finally:
            for task in (answering, hanging_up):
                task.cancel()
            await asyncio.gather(answering, hanging_up, return_exceptions=True)

    async def _answer(self, request: Mapping[str, object], writer: asyncio.StreamWriter) -> None:
        try:
            async for line in self.control.answer(request):
                await _send(writer, line)
        except RequestError as error:
            await _send(writer, {"error": str(error)})
        except SpoolError as error:
            log.warning("control: %s", error)
            await _send(writer, {"error": f"the queue cannot be read or changed: {error}"})
        except OSError:
            raise
        except Exception:
            log.exception("control: a request failed")
            await _send(writer, {"error": "an error of the relay's own; its log has it"})


async def _hung_up(reader: asyncio.StreamReader) -> None:
    """Return when the client hangs up. Octets behind its request are ignored."""
    while await reader.read(4096):
        pass


async def _send(writer: asyncio.StreamWriter, line: Mapping[str, object]) -> None:
    writer.write(to_json(line).encode("ascii") + b"\n")
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.drain()


async def _finish(writer: asyncio.StreamWriter) -> None:
    """Close when all of the answer is sent, or when the client has not read for a minute."""
    writer.close()
    async with asyncio.timeout(WRITE_SECONDS):
        await writer.wait_closed()


def _clear_stale(path: Path) -> None:
    """Remove the socket of a relay that is gone.

    `SocketTaken` where a process answers, or where the file is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketTaken(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                path.unlink(missing_ok=True)
                return
            if not isinstance(error, TimeoutError) and error.errno != errno.EAGAIN:
                raise
    raise SocketTaken(f"another relay answers at {path}")


def _bind_private(path: Path) -> socket.socket:
    """A bound UNIX socket that only its owner can open, from its creation on."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listening.bind(os.fspath(path))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    return listening


async def start_control(
    control: RequestHandler, path: Path, *, group: str | None = None
) -> ControlServer:
    """Listen on a control socket, which its owner and a group may open."""
    server = ControlServer(control, path, group)
    await server.start()
    return server
