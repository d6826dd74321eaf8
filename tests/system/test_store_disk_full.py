"""A full disk: new mail waits outside, mail inside still leaves, and it ends without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import EventFilter, EventPage, QueueFilter, QueueFull, SpoolError
from tests.fakes.queued import DELIVERED, content_of, event, new_message, settled
from tests.fakes.waiting import patient
from tests.rigs.small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


async def accepted(store: SqliteStore, content: bytes, *, until_full: int) -> list[str]:
    """Accept until the store says it is full."""
    taken: list[str] = []
    for _ in range(until_full):
        new = new_message(content=content, arrived=datetime.now(UTC))
        try:
            await store.accept(new)
        except QueueFull:
            return taken
        taken.append(new.message.queue_id)
    raise AssertionError("the disk did not get full")


async def delivered(store: SqliteStore, count: int) -> list[str]:
    """Let some mail leave."""
    left: list[str] = []
    while len(left) < count:
        entries = await store.claim_due(now=datetime.now(UTC), limit=min(20, count - len(left)))
        assert entries
        for entry in entries:
            queue_id = entry.message.queue_id
            await store.record(
                settled(entry, DELIVERED), events=[event("delivered", queue_id, "b")]
            )
            left.append(queue_id)
    return left


async def ids(store: SqliteStore) -> set[str]:
    now = datetime.now(UTC)
    return {item.queue_id for item in await store.list_messages(QueueFilter(), now=now, limit=9999)}


async def takes_mail_again(store: SqliteStore) -> None:
    async with asyncio.timeout(patient(10)):
        while True:
            with contextlib.suppress(QueueFull):
                await store.accept(new_message(content=b"x" * 20_000, arrived=datetime.now(UTC)))
                return
            await asyncio.sleep(0.05)


@pytest.mark.needs("root", "mount")
async def test_mail_that_fills_the_disk_is_delivered_and_frees_it(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        store = await SqliteStore.open(disk / "spool")
        taken = await accepted(store, b"x" * 20_000, until_full=1000)
        assert len(taken) > 150, "most of the disk is for mail"
        with pytest.raises(QueueFull):
            await store.stage("q", 0, b"x" * 100_000)
        left = await delivered(store, len(taken) // 2)
        assert await ids(store) == set(taken) - set(left)
        await takes_mail_again(store)
        again = await accepted(store, b"x" * 20_000, until_full=1000)
        assert len(again) > len(left) // 2, "the room inside the database is used again"
        await store.close()
        store = await SqliteStore.open(disk / "spool")
        assert len(await ids(store)) == len(taken) - len(left) + len(again) + 1
        await store.close()


@pytest.mark.needs("root", "mount")
async def test_queued_mail_leaves_while_another_program_fills_the_disk(tmp_path):
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        store = await SqliteStore.open(disk / "spool")
        for _ in range(150):
            await store.accept(new_message(content=b"x" * 20_000, arrived=datetime.now(UTC)))
        before = await ids(store)
        filler = fill(disk)
        refused = 0
        left: list[str] = []
        for _ in range(10):
            with contextlib.suppress(QueueFull):
                await store.accept(new_message(content=b"x" * 300_000, arrived=datetime.now(UTC)))
                refused -= 1
            refused += 1
            left += await delivered(store, 10)
        assert refused == 10
        assert await ids(store) == before - set(left)
        filler.unlink()
        await takes_mail_again(store)
        left += await delivered(store, 30)
        await store.close()

        store = await SqliteStore.open(disk / "spool")
        told = await store.find_events(
            EventFilter(names=frozenset({"delivered"})), EventPage(limit=9999)
        )
        assert {one.event.queue_id for one in told} == set(left)
        for queue_id in await ids(store):
            assert len(await content_of(store, queue_id)) == 20_000
        await store.close()


@pytest.mark.needs("root", "mount")
async def test_relay_that_starts_on_a_full_disk_delivers_its_queue(tmp_path):
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        store = await SqliteStore.open(disk / "spool")
        for _ in range(50):
            await store.accept(new_message(content=b"x" * 20_000, arrived=datetime.now(UTC)))
        await store.close()
        fill(disk)
        store = await SqliteStore.open(disk / "spool")
        with pytest.raises(QueueFull):
            await store.accept(new_message(content=b"x" * 20_000))
        assert len(await delivered(store, 50)) == 50
        await store.close()


@pytest.mark.needs("root", "mount")
async def test_read_only_directory_is_a_temporary_error_of_the_spool(tmp_path):
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        store = await SqliteStore.open(disk / "spool")
        await store.accept(new_message())
        before = await ids(store)
        # A mount cannot be made read-only while files are open for writing; losing them comes to
        # the same.
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
            with pytest.raises(SpoolError):
                await store.accept(new_message(content=b"x" * 60_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert await ids(store) == before
        await takes_mail_again(store)
        await store.close()


@pytest.mark.parametrize(("limit_kib", "options"), [(1000, []), (500, ["--large"])])
def test_relay_at_a_limit_on_file_sizes_refuses_mail_and_keeps_running(
    tmp_path, limit_kib, options
):
    """`ulimit -f` ends a program that does not expect it with SIGXFSZ."""
    command = [
        sys.executable,
        "-m",
        "tests.rigs.acceptor",
        str(tmp_path / "spool"),
        "--count",
        "400",
    ]
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'ulimit -f {limit_kib}; exec "$@"',
            "bash",
            *command,
            "--lanes",
            "4",
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patient(100),
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "open", done.stderr
    assert lines[-1] == "end", done.stderr
    assert any(line.startswith("ok ") for line in lines) or options
    assert any(line.startswith("no ") for line in lines)
    again = subprocess.run(
        [*command, "--deliver"], cwd=ROOT, capture_output=True, text=True, timeout=patient(100)
    )
    assert again.stdout.splitlines()[-1] == "end", again.stderr
    told = {line.split()[1] for line in again.stdout.splitlines() if line.startswith("done ")}
    assert {line.split()[1] for line in lines if line.startswith("ok ")} <= told
