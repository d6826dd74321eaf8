"""The program's own log in the journal: its priority, and no second time."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.workers.programlog import ProgramLog, is_journal

log = logging.getLogger("relay.test")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    yield
    root.handlers[:], root.level, logging.raiseExceptions = handlers, level, raises


def test_a_line_for_the_journal_begins_with_its_priority_and_leaves_the_time_to_it() -> None:
    stream = io.StringIO()
    own_log = ProgramLog(level="debug", as_json=False, stream=stream, to_journal=True)
    own_log.start()
    log.debug("d")
    log.info("i %s", "01JABC")
    log.warning("w\n<0>forged")
    try:
        raise OSError("no disk")
    except OSError:
        log.exception("e")
    own_log.stop()
    lines = stream.getvalue().splitlines()
    assert lines[:4] == ["<7>d", "<6>i 01JABC", r"<4>w\n<0>forged", "<3>e"]
    assert all(line.startswith("<3>    ") for line in lines[4:])


def test_json_in_the_journal_has_its_priority_too() -> None:
    stream = io.StringIO()
    own_log = ProgramLog(level="info", as_json=True, stream=stream, to_journal=True)
    own_log.start()
    log.error("gone")
    own_log.stop()
    assert stream.getvalue().startswith('<3>{"time": ')


def test_stderr_is_the_journal_where_systemd_says_that_very_file_is(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        found = os.fstat(stream.fileno())
        assert is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, stream)
        assert not is_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, stream)
        assert not is_journal({}, stream)
    assert not is_journal({"JOURNAL_STREAM": "1:2"}, io.StringIO())


def test_the_level_changes_while_it_runs() -> None:
    stream = io.StringIO()
    own_log = ProgramLog(level="warning", as_json=False, stream=stream)
    own_log.start()
    log.info("before")
    own_log.set_level("info")
    log.info("after")
    own_log.stop()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["after"]
