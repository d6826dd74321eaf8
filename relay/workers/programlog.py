"""The program's own log: on stderr, for people; as JSON where a program reads it.

Where stderr is the journal (JOURNAL_STREAM, systemd.exec(5)) a line begins with its priority,
as sd-daemon(3) has it, and leaves the time to the journal.

One event a line. What a peer said may be in it, so nothing in a line moves the cursor or
begins another line. Lines are written by a thread of their own: a reader of stderr that
stands still must not stop the mail. When it stands still for long, lines are dropped and
their number is told.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from queue import Full, Queue
from typing import TextIO

_WAITING = 10_000
_LIBRARIES = ("asyncio", "mail.log", "aiosmtpd", "dns")


class ProgramLog:
    """Sends what the modules log to a stream, from `start` to `stop`."""

    def __init__(
        self, *, level: str, as_json: bool, stream: TextIO | None = None, to_journal: bool = False
    ) -> None:
        self._lines: Queue[logging.LogRecord] = Queue(_WAITING)
        self._entrance = _Entrance(self._lines)
        stderr = logging.StreamHandler(stream or sys.stderr)
        formatter = _JsonFormatter() if as_json else _TextFormatter(stamped=not to_journal)
        stderr.setFormatter(_ForJournal(formatter) if to_journal else formatter)
        self._listener = logging.handlers.QueueListener(self._lines, stderr)
        self._level = level.upper()

    def start(self) -> None:
        """From now on everything logged goes here, and only here."""
        root = logging.getLogger()
        for handler in list(root.handlers):
            root.removeHandler(handler)
        root.addHandler(self._entrance)
        self.set_level(self._level)
        logging.raiseExceptions = False  # a log that cannot be written is no reason to write more
        self._listener.start()

    def set_level(self, level: str) -> None:
        """From now on this is the least important that is written."""
        self._level = level.upper()
        root = logging.getLogger()
        root.setLevel(self._level)
        for library in _LIBRARIES:
            logging.getLogger(library).setLevel(max(logging.WARNING, root.level))

    def stop(self) -> None:
        """Write what is waiting."""
        logging.getLogger().removeHandler(self._entrance)
        self._listener.stop()

    def stop_within(self, seconds: float) -> None:
        """The same, but a reader that stands still is not waited for longer."""
        writing = threading.Thread(target=self.stop, daemon=True)
        writing.start()
        writing.join(seconds)


class _Entrance(logging.handlers.QueueHandler):
    """Puts records into the queue, and counts those there is no room for."""

    def __init__(self, lines: Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._lines = lines
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                self._lines.put_nowait(self._confession())
                self._dropped = 0
            self._lines.put_nowait(record)
        except Full:
            self._dropped += 1

    def _confession(self) -> logging.LogRecord:
        text = "%d lines of this log were dropped: nobody read them"
        return logging.LogRecord(
            __name__, logging.WARNING, __file__, 0, text, (self._dropped,), None
        )

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # Formatted on the other side, but the arguments' text is fixed here, while they are what
        # they were.
        record.message = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.msg, record.args, record.exc_info = record.message, None, None
        return record


def is_journal(environ: Mapping[str, str], stream: TextIO | None = None) -> bool:
    """Whether a stream (stderr) is the journal's."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat((stream or sys.stderr).fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}


class _ForJournal(logging.Formatter):
    """`<4>` before each line of what another formatter says."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(mark + line for line in self._inner.format(record).split("\n"))


class _TextFormatter(logging.Formatter):
    """`2030-01-31 12:00:00.123 warning 01J…: mx1.example.net fell silent`."""

    def __init__(self, *, stamped: bool = True) -> None:
        super().__init__()
        self._stamped = stamped

    def format(self, record: logging.LogRecord) -> str:
        text = _one_line(record.getMessage())
        if self._stamped:
            at = datetime.fromtimestamp(record.created, UTC).astimezone()
            stamp = at.strftime("%Y-%m-%d %H:%M:%S.") + f"{int(record.msecs):03d}"
            text = f"{stamp} {record.levelname.lower()} {text}"
        if record.exc_text:
            # Indented, so that each line shows whose it is.
            text += "".join(f"\n    {_one_line(line)}" for line in record.exc_text.splitlines())
        return text


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _sound(record.getMessage()),
        }
        if record.exc_text:
            fields["exception"] = _sound(record.exc_text)
        return json.dumps(fields)


def _one_line(text: str) -> str:
    """The text with everything escaped that is not to be seen."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _sound(text: str) -> str:
    """Text without lone surrogates, which strict JSON parsers refuse."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
