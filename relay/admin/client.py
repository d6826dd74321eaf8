"""Asks a running relay over its control socket, for the command line.

`ask` sends one request and yields the lines of the answer as they come. It uses blocking sockets,
because a command has nothing else to do meanwhile, and starts faster without an event loop.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import pwd
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from relay.mail.jsontext import JsonDocument, of_json

_GONE = (errno.ENOENT, errno.ECONNREFUSED)


class NotRunning(Exception):
    """No relay answers at the control socket."""


class RelayError(Exception):
    """The relay answered with an error, or cannot be asked. The text says why."""


def ask(
    path: Path, request: Mapping[str, object], *, seconds: float | None = 60.0
) -> Iterator[JsonDocument]:
    """The lines that answer a request, the one with "done" last.

    `seconds`: how long to wait for each line. `NotRunning`, `RelayError`.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        try:
            connection.connect(os.fspath(path))
            # A relay that serves enough others says so and hangs up before it reads.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(json.dumps(request).encode("ascii") + b"\n")
        except OSError as error:
            if error.errno in _GONE:
                raise NotRunning(f"no relay answers at {path}") from None
            if isinstance(error, PermissionError):
                text = f"{path}: permission denied; run this as {who_may_open(path)}"
                raise RelayError(text) from None
            raise RelayError(f"{path}: {error.strerror or error}") from None
        yield from _lines(connection)


def who_may_open(path: Path) -> str:
    """The users that may open a file, in words that follow "run this as"."""
    for there in (path, *path.absolute().parents):
        try:
            found = there.stat()
        except OSError:
            continue
        with contextlib.suppress(KeyError):
            if found.st_gid and found.st_mode & 0o060:
                group = grp.getgrgid(found.st_gid).gr_name
                user = pwd.getpwuid(os.geteuid()).pw_name
                command = f"`usermod --append --groups {group} {user}`"
                return f"root, or join the group {group} ({command}, and a new login)"
            if found.st_uid:
                return f"root or {pwd.getpwuid(found.st_uid).pw_name}"
        break
    return "root"


def _lines(connection: socket.socket) -> Iterator[JsonDocument]:
    with connection.makefile("rb") as answers:
        try:
            for line in answers:
                answer = of_json(line)
                if "error" in answer:
                    raise RelayError(str(answer["error"]))
                yield answer
                if "done" in answer:
                    return
        except TimeoutError:
            raise RelayError("the relay does not answer") from None
        except (OSError, ValueError) as error:
            raise RelayError(f"the answer broke off: {error}") from None
    raise RelayError("the relay ended before its answer did")
