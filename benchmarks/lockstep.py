"""The cheapest generator there is: clients and next hop in one process, one epoll loop, no asyncio.

    python -m benchmarks.lockstep ADDRESS PORT

It listens on ADDRESS:PORT as the next hop, from the start. For each line of JSON on stdin,
{"ports", "messages", "sessions", "size", "standing"}, it sends so many messages to 127.0.0.1, over
as many sessions to each port, and prints {"seconds", "intake_seconds"} once the next hop has them
all, or {"failed"} where a server refuses one. An empty line asks for {"taken"}, the messages that
the next hop has taken so far.

A client sends a command when it has the reply to the one before: no pipelining, as most clients of
a relay. What the generator costs, some 0.16 ms a message with its next hop, is not there for the
servers on the same cores, so it has to be little, and the same for all.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

_COMMANDS = (b"MAIL FROM:<a@client.example>\r\n", b"RCPT TO:<b@d0.example>\r\n", b"DATA\r\n")
_LINE = b"X" * 78 + b"\r\n"
_PATIENCE = 300.0


class Failed(Exception):
    """A server refused a message, or took too long."""


class Loop:
    """Calls a function for each descriptor that can be read."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}

    def add(self, descriptor: int, reader: Callable[[], None]) -> None:
        self._readers[descriptor] = reader
        self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        del self._readers[descriptor]

    def turn(self, seconds: float) -> None:
        for descriptor, _ in self._epoll.poll(seconds):
            reader = self._readers.get(descriptor)
            if reader is not None:
                reader()


class NextHop:
    """Takes everything; `taken` counts messages."""

    def __init__(self, loop: Loop, address: str, port: int) -> None:
        self.taken = 0
        self._loop = loop
        self._socket = socket.create_server((address, port), backlog=1000)
        loop.add(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self._socket.accept()
        _Taking(self, self._loop, connection)


class _Taking:
    """A session of the next hop."""

    def __init__(self, hop: NextHop, loop: Loop, connection: socket.socket) -> None:
        self._hop, self._loop, self._socket = hop, loop, connection
        self._input = b""
        self._in_data = False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add(connection.fileno(), self._read)
        connection.sendall(b"220 sink ESMTP\r\n")

    def _read(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            return
        self._input += data
        replies = b"".join(self._replies())
        if replies:
            self._socket.sendall(replies)

    def _replies(self) -> list[bytes]:
        replies = []
        while self._input:
            end = self._input.find(b"\r\n.\r\n" if self._in_data else b"\r\n")
            if end < 0:
                break
            if self._in_data:
                self._in_data, self._input = False, self._input[end + 5 :]
                self._hop.taken += 1
                replies.append(b"250 2.0.0 Ok\r\n")
                continue
            verb, self._input = self._input[:4].upper(), self._input[end + 2 :]
            if verb == b"DATA":
                self._in_data = True
                replies.append(b"354 Go on\r\n")
            elif verb == b"EHLO":
                replies.append(b"250-sink\r\n250-PIPELINING\r\n250 8BITMIME\r\n")
            elif verb == b"QUIT":
                replies.append(b"221 2.0.0 Bye\r\n")
            else:
                replies.append(b"250 2.0.0 Ok\r\n")
        return replies


class _Sending:
    """A session of a client: one message, and then others while `has_another` says so."""

    def __init__(
        self, loop: Loop, port: int, content: bytes, *, has_another: Callable[[], bool]
    ) -> None:
        self._loop = loop
        self._steps = (*_COMMANDS, content)
        self._has_another = has_another
        self._step = -2  # the greeting, then EHLO
        self._input = b""
        self.is_over = False
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add(self._socket.fileno(), self._read)

    def _read(self) -> None:
        data = self._socket.recv(4096)
        self._input += data
        if not data:
            raise Failed("the server closed a session")
        if not self._input.endswith(b"\r\n"):
            return
        last = self._input.rpartition(b"\r\n")[0].rpartition(b"\r\n")[2]
        if last[:1] not in (b"2", b"3"):
            raise Failed(f"refused: {self._input!r}")
        if last[3:4] == b" ":
            self._input = b""
            self._answered()

    def _answered(self) -> None:
        self._step += 1
        if self._step == -1:
            self._socket.sendall(b"EHLO client.example\r\n")
            return
        if self._step == len(self._steps):
            self._step = 0
            if not self._has_another():
                self._socket.sendall(b"QUIT\r\n")
                self.close()
                return
        self._socket.sendall(self._steps[self._step])

    def close(self) -> None:
        if not self.is_over:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self.is_over = True


def send(loop: Loop, hop: NextHop, wanted: dict[str, Any]) -> dict[str, float]:
    """Send the messages, and wait until the next hop has them; Failed if it cannot be done."""
    left: int = wanted["messages"]
    ports = cycle(wanted["ports"])
    sessions: list[_Sending] = []
    content = b"Subject: benchmark\r\nFrom: a@client.example\r\n\r\n"
    content += _LINE * max((wanted["size"] - len(content)) // len(_LINE), 1) + b".\r\n"
    before, began = hop.taken, time.monotonic()

    def has_another() -> bool:
        nonlocal left
        if not left or not wanted["standing"]:
            return False
        left -= 1
        return True

    try:
        while left or sessions:
            while left and len(sessions) < wanted["sessions"]:
                left -= 1
                sessions.append(_Sending(loop, next(ports), content, has_another=has_another))
            _turn(loop, began)
            sessions = [one for one in sessions if not one.is_over]
    finally:
        for one in sessions:
            one.close()
    intake = time.monotonic() - began
    while hop.taken - before < wanted["messages"]:
        _turn(loop, began)
    return {"seconds": time.monotonic() - began, "intake_seconds": intake}


def _turn(loop: Loop, began: float) -> None:
    loop.turn(1.0)
    if time.monotonic() - began > _PATIENCE:
        raise Failed("the server takes too long")


def main() -> None:
    """Serve as the next hop, and send what is asked for, until stdin ends."""
    loop = Loop()
    hop = NextHop(loop, sys.argv[1], int(sys.argv[2]))
    asked: list[bytes] = []
    loop.add(sys.stdin.fileno(), lambda: asked.append(sys.stdin.buffer.readline()))
    while True:
        loop.turn(1.0)
        while asked:
            line = asked.pop()
            if not line:
                return
            wanted = json.loads(line) if line.strip() else None
            said: dict[str, Any]
            try:
                said = {"taken": hop.taken} if wanted is None else send(loop, hop, wanted)
            except (Failed, OSError) as error:
                said = {"failed": str(error)}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
