"""Files of content: what is read from them, and when a read waits for the disk."""

from __future__ import annotations

import os

import pytest

from relay.queue.sqlite import files
from relay.queue.sqlite.files import WholeFile, pieces_of
from relay.queue.store import CHUNK_BYTES, SpoolError
from tests.fakes.queued import content_of, new_message
from tests.unit.queue.test_sqlite_disk import opened

CONTENT = os.urandom(3 * CHUNK_BYTES + 5)


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "q1"
    found.write_bytes(CONTENT)
    return found


def in_pieces(file: WholeFile, read: str) -> list[bytes]:
    found, offset = [], 0
    while offset < len(CONTENT):
        found.append(getattr(file, read)(offset))
        offset += len(found[-1])
    return found


@pytest.mark.parametrize("read", ["read", "read_at_once"])
def test_file_that_was_just_written_is_read_in_pieces_with_or_without_waiting(path, read):
    found = in_pieces(WholeFile(path, len(CONTENT)), read)
    assert b"".join(found) == b"".join(pieces_of(path, len(CONTENT))) == CONTENT
    assert {len(piece) for piece in found[:-1]} == {CHUNK_BYTES}


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_file_of_another_size_is_not_opened(path, size):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        SpoolError, match=f"q1: its content, .*, has {len(CONTENT)} octets of {size}"
    ):
        WholeFile(path, size)
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_that_ends_early_while_it_is_read_is_an_error_and_not_the_end(path):
    file = WholeFile(path, len(CONTENT))
    os.truncate(path, CHUNK_BYTES)
    assert file.read_at_once(CHUNK_BYTES) == b""
    with pytest.raises(SpoolError, match=f"has {CHUNK_BYTES} octets of {len(CONTENT)}"):
        file.read(CHUNK_BYTES)


async def test_content_that_the_system_has_in_memory_is_read_without_a_thread(
    tmp_path, monkeypatch
):
    def read(file, offset):
        raise AssertionError("a read that may wait for the disk")

    monkeypatch.setattr(WholeFile, "read", read)
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(queue_id="q1", content=CONTENT))
        assert await content_of(store, "q1") == CONTENT


async def test_content_that_has_to_come_from_the_disk_is_read_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_NOWAIT", 0)
    async with opened(tmp_path / "spool") as store:
        await store.accept(new_message(queue_id="q1", content=CONTENT))
        before = len(os.listdir("/proc/self/fd"))
        assert await content_of(store, "q1") == CONTENT
        assert len(os.listdir("/proc/self/fd")) == before
