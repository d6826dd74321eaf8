"""Content on its way from its file to a host: the same octets, whichever way they take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from relay.deliver.runner import Runner
from relay.mail.outcome import Deferred, Delivered, Outcome
from relay.queue.sqlite import files
from relay.queue.sqlite.files import WholeFile
from relay.queue.store import STAGE_BYTES
from relay.sandbox.script import Script, StartTls
from tests.fakes.mail import settings
from tests.fakes.queued import NOW, claim_all, new_message
from tests.unit.deliver.conftest import QUICK, Rig, milliseconds
from tests.unit.queue.test_sqlite_disk import opened

CLEAR = Script(starttls=StartTls.ABSENT)
LARGE = b"Subject: x\r\n\r\n" + b"no line begins with a dot. \r\n" * 200_000
DOTS = b"Subject: x\r\n\r\n" + b".\r\n..\r\n.dot\r\n" * 100_000


@dataclass
class Sent:
    """What the system was asked to send of files, and took."""

    octets: int = 0


@pytest.fixture
def sent(monkeypatch) -> Sent:
    counted, sendfile = Sent(), os.sendfile

    def counting(out, file, offset, count):
        found = sendfile(out, file, offset, count)
        counted.octets += found
        return found

    monkeypatch.setattr(os, "sendfile", counting)
    return counted


async def deliver(
    rig: Rig, tmp_path, content: bytes, *, is_dotless: bool = True, truncate: int = 0
) -> Outcome:
    """One attempt for a message of a real queue."""
    async with opened(tmp_path / "spool", synchronous="OFF") as store:
        new = new_message(queue_id="q1", content=content)
        message = replace(new.message, is_dotless=is_dotless)
        recipients = tuple(replace(one, settings=settings()) for one in new.recipients)
        await store.accept(replace(new, message=message, recipients=recipients))
        [entry] = await claim_all(store)
        if truncate:
            os.truncate(tmp_path / "spool" / "content" / "q1", truncate)
        open_files = len(os.listdir("/proc/self/fd"))
        outcomes = await Runner(store, rig.attempt, lambda: NOW).run(entry, [])
        assert len(os.listdir("/proc/self/fd")) <= open_files + 2  # the connection, that is kept
        assert isinstance(outcomes, Mapping)
        outcome: Outcome = outcomes[0]
        return outcome


async def test_content_without_a_dot_at_a_line_start_is_sent_by_the_system(rig, tmp_path, sent):
    mx = await rig.mx(CLEAR)
    assert isinstance(await deliver(rig, tmp_path, LARGE), Delivered)
    assert mx.messages[0].content == LARGE
    assert sent.octets > len(LARGE) // 10


async def test_content_with_dots_is_stuffed_and_not_sent_as_it_is(rig, tmp_path, sent):
    mx = await rig.mx(CLEAR)
    assert isinstance(await deliver(rig, tmp_path, DOTS, is_dotless=False), Delivered)
    assert mx.messages[0].content == DOTS
    assert sent.octets == 0


async def test_content_is_not_sent_as_it_is_inside_tls(rig, tmp_path, sent):
    mx = await rig.mx(Script())
    assert isinstance(await deliver(rig, tmp_path, LARGE), Delivered)
    assert mx.messages[0].tls_version
    assert mx.messages[0].content == LARGE
    assert sent.octets == 0


async def test_content_that_has_to_come_from_the_disk_is_read_on_a_thread(
    rig, tmp_path, sent, monkeypatch
):
    monkeypatch.setattr(files, "_NOWAIT", 0)
    mx = await rig.mx(CLEAR)
    assert isinstance(await deliver(rig, tmp_path, LARGE), Delivered)
    assert mx.messages[0].content == LARGE
    assert sent.octets == 0


async def test_slow_host_gets_all_of_a_file(rig, tmp_path):
    mx = await rig.mx(replace(CLEAR, read_bytes_per_second=6_000_000))
    rig.delivery["timeouts"] = replace(
        QUICK, data_block=milliseconds(900), final_reply=milliseconds(300)
    )
    assert isinstance(await deliver(rig, tmp_path, LARGE), Delivered)
    assert mx.messages[0].content == LARGE


async def test_host_that_stops_reading_a_file_is_left(rig, tmp_path):
    await rig.mx(replace(CLEAR, read_stops_after=200_000))
    outcome = await deliver(rig, tmp_path, LARGE * 3)
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.4.2", False)


async def test_file_that_is_not_whole_is_no_message_for_the_host(rig, tmp_path):
    mx = await rig.mx(CLEAR)
    outcome = await deliver(rig, tmp_path, LARGE, truncate=STAGE_BYTES)
    assert isinstance(outcome, Deferred)
    assert f"has {STAGE_BYTES} octets of {len(LARGE)}" in outcome.description
    assert not mx.messages


async def test_end_of_a_file_that_becomes_shorter_meanwhile_is_not_the_end_of_the_message(
    rig, tmp_path, monkeypatch
):
    def check(file, offset, count):
        os.truncate(tmp_path / "spool" / "content" / "q1", STAGE_BYTES)
        return offset < STAGE_BYTES

    monkeypatch.setattr(WholeFile, "is_in_memory", check)
    mx = await rig.mx(CLEAR)
    outcome = await deliver(rig, tmp_path, LARGE)
    assert isinstance(outcome, Deferred)
    assert not mx.messages
