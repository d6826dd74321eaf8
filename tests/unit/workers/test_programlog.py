"""The program's own log: one event a line, whatever a peer said."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Iterator

import pytest

from relay.workers import programlog
from relay.workers.programlog import ProgramLog
from tests.fakes.waiting import patient

log = logging.getLogger("relay.test")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The logging of the tests themselves is put back after each."""
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    yield
    root.handlers[:], root.level, logging.raiseExceptions = handlers, level, raises


def written(*, as_json: bool = False) -> tuple[ProgramLog, io.StringIO]:
    stream = io.StringIO()
    own_log = ProgramLog(level="info", as_json=as_json, stream=stream)
    own_log.start()
    return own_log, stream


def test_a_line_has_time_level_and_text() -> None:
    own_log, stream = written()
    log.warning("%s: deferred", "01JABC")
    log.debug("not this")
    own_log.stop()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(stamp + r" warning 01JABC: deferred\n", stream.getvalue())


def test_text_of_a_peer_neither_breaks_a_line_nor_moves_the_cursor() -> None:
    own_log, stream = written()
    log.info("refused: %s", "no\r\n2030-01-01 info forged\x1b[2J\u2028\x00")
    own_log.stop()
    assert stream.getvalue().count("\n") == 1
    assert not set("\r\x1b\x00\u2028") & set(stream.getvalue())


def test_json_lines_are_what_strict_parsers_take() -> None:
    own_log, stream = written(as_json=True)
    log.error("bad octet \udce9 and ü")
    own_log.stop()
    fields = json.loads(stream.getvalue())
    assert fields["level"] == "error"
    assert fields["message"] == "bad octet \\udce9 and ü"
    assert stream.getvalue().isascii()


def test_a_traceback_is_kept_with_its_line() -> None:
    own_log, stream = written()
    try:
        raise ValueError("inside\nout")
    except ValueError:
        log.exception("a request failed")
    own_log.stop()
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error a request failed")
    assert all(line.startswith("    ") for line in rest)
    assert "ValueError: inside" in stream.getvalue()


def test_reader_that_stands_still_does_not_block_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programlog, "_WAITING", 10)
    goes_on = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            goes_on.wait(patient(30))
            return super().write(text)

    stream = Stuck()
    own_log = ProgramLog(level="info", as_json=False, stream=stream)
    own_log.start()
    for number in range(100):
        log.info("line %d", number)
    goes_on.set()
    own_log._lines.join()
    log.info("the last one")
    own_log.stop()
    assert "lines of this log were dropped" in stream.getvalue()
    assert "the last one" in stream.getvalue()
