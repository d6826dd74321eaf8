"""`relay queue export` and `import`: between directories and a server, by real processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from relay.admin.webhook_calls import calls_about
from relay.queue.engine import WORKER_SPOOL
from relay.queue.move import MoveResult, MovingQueue, export_queue, import_queue
from relay.queue.postgres import NodeOptions, PostgresMove, PostgresStore, Server, parse_url
from relay.queue.sqlite.move import SqliteMove
from relay.queue.store import Store
from tests.fakes.moved import EVERY_KIND, fill, seen
from tests.fakes.queued import NOW, claim_all, new_message, opened, queue_ids
from tests.fakes.waiting import patient
from tests.rigs.ledger import LARGE, Ledger, tokens
from tests.rigs.nodes import arrived, node
from tests.rigs.ports import wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink, sink

LONG = os.environ.get("RELAY_LONG") == "1"

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(300)]


class Sqlite:
    """A queue in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def store(self) -> contextlib.AbstractAsyncContextManager[Store]:
        return opened(self.path)

    async def to_move(self) -> MovingQueue:
        return await SqliteMove.open(self.path, workers=WORKER_SPOOL, make=True)


class Shared:
    """A queue on a server."""

    def __init__(self, url: str) -> None:
        self.server = Server(parse_url(url), name="relay", password=lambda: None)

    @contextlib.asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        store = await PostgresStore.open(self.server, NodeOptions("a"), now=NOW)
        try:
            yield store
        finally:
            await store.close()

    async def to_move(self) -> MovingQueue:
        return await PostgresMove.open(self.server)


async def exported(queue: Sqlite | Shared, directory: Path) -> MoveResult:
    moving = await queue.to_move()
    try:
        about = partial(calls_about, now=NOW)
        return await export_queue(moving, directory, about=about, progress=lambda count: None)
    finally:
        await moving.close()


async def imported(queue: Sqlite | Shared, directory: Path) -> MoveResult:
    moving = await queue.to_move()
    try:
        return await import_queue(moving, directory, progress=lambda count: None)
    finally:
        await moving.close()


async def test_queue_is_the_same_after_sqlite_postgresql_sqlite_sqlite(
    tmp_path: Path, server: Postgres
) -> None:
    files, count = tmp_path / "files", len(EVERY_KIND)
    stops: list[Sqlite | Shared] = [Sqlite(tmp_path / "a"), Shared(server.url())]
    stops += [Sqlite(tmp_path / "b"), Sqlite(tmp_path / "c")]
    async with stops[0].store() as store:
        await fill(store)
        before = await seen(store)
    for source, target in itertools.pairwise(stops):
        for result in (await exported(source, files), await imported(target, files)):
            assert (result.moved, result.left, result.reasons) == (count, 0, [])
        async with source.store() as store:
            assert await queue_ids(store) == []
        async with target.store() as store:
            assert await seen(store) == before
    async with stops[-1].store() as store:
        assert {one.message.queue_id for one in await claim_all(store)} == {"ready", "large"}


async def test_mail_that_live_nodes_are_trying_stays_on_the_server(
    tmp_path: Path, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.queue.move._PATIENCE_SECONDS", 0.0)
    shared = Shared(server.url())
    async with shared.store() as store:
        await store.accept(new_message("b@tried.example", queue_id="tried"))
        assert await store.claim_due(now=NOW, limit=1)
        await store.accept(new_message("b@free.example", queue_id="free"))  # handed over
        result = await exported(shared, tmp_path / "files")
        assert (result.moved, result.left) == (1, 1)
        assert "1 messages are being tried by a node" in result.reasons[0]
        assert await queue_ids(store) == ["tried"]


# --- by the command -------------------------------------------------------------------------------


def relay_command(relay: Relay, *arguments: str) -> tuple[int, str, str]:
    done = relay.run("queue", *arguments)
    return done.returncode, done.stdout, done.stderr


@contextlib.contextmanager
def stopped_with_mail(
    directory: Path, mx: Sink, words: Sequence[str]
) -> Iterator[tuple[Relay, Ledger]]:
    """A relay with a queue in a directory, which has mail and does not run."""
    home = directory / "single"
    home.mkdir()
    with relay_process(home, routes=mx.route, queue={"retry": ["1s"]}) as relay:
        mx.gate.clear()
        ledger = Ledger()
        ledger.stream(relay, list(words), tenth=LARGE)
        assert ledger.accepted == set(words)
        relay.kill()
        yield relay, ledger


def test_command_says_what_it_has_moved_and_changes_nothing_with_dry_run(tmp_path: Path) -> None:
    words = tokens(6)
    with sink() as mx, stopped_with_mail(tmp_path, mx, words) as (relay, _):
        files = tmp_path / "files"
        status, said, _ = relay_command(relay, "export", str(files), "--dry-run")
        assert (status, said.splitlines()[-1]) == (0, "Nothing was moved.")
        assert not files.exists()
        assert relay_command(relay, "export", str(files), "--json")[:2] == (
            0,
            '{"moved":6,"left":0}\n',
        )
        status, said, _ = relay_command(relay, "import", str(files), "--dry-run")
        assert (status, said.splitlines()[-1]) == (0, "6 messages. Nothing was moved.")
        status, said, _ = relay_command(relay, "import", str(files))
        assert (status, said) == (0, "6 messages moved into the queue\n")
        assert json.loads(relay.run("queue", "list", "--json").stdout)
        mx.gate.set()
        relay.start()
        wait_until(lambda: arrived(mx, words), what="the mail")


def test_running_relay_and_bad_directories_are_named(tmp_path: Path) -> None:
    with sink() as mx, relay_process(tmp_path, routes=mx.route) as relay:
        for verb in ("export", "import"):
            (tmp_path / "files").mkdir(exist_ok=True)
            status, _, said = relay_command(relay, verb, str(tmp_path / "files"))
            assert status == 1
            assert f"process {relay.pid} uses this queue already" in said
            assert "stop the relay first" in said
        relay.stop()
        (tmp_path / "file").write_text("")
        for place in ("/proc/nowhere", str(tmp_path / "none" / "files")):
            status, _, said = relay_command(relay, "export", place)
            assert status == 1
            assert place in said
        assert relay_command(relay, "export", str(tmp_path / "file"))[0] == 2
        status, _, said = relay_command(relay, "import", str(tmp_path / "none"))
        assert (status, said) == (1, f"{tmp_path / 'none'}: there is no such directory\n")


def killed_at(relay: Relay, verb: str, files: Path, call: str, nth: int) -> int:
    """Run the command under strace, which kills it at its N-th call; its exit status."""
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
    trace += ["-P", str(files), "-P", str(relay.directory / "spool")]
    for name in ("queue.db", "queue.db-wal"):
        trace += ["-P", str(relay.directory / "spool" / name)]
    trace = trace[:7] if call in ("rename", "unlink", "sendto") else trace
    inject = ["-e", f"inject={call}:signal=KILL:when={nth}"]
    command = [sys.executable, "-m", "relay", "queue", "-c", str(relay.config_file), verb]
    done = subprocess.run(
        [*trace, *inject, *command, str(files)],
        cwd=relay.directory,
        capture_output=True,
        check=False,
        timeout=patient(120),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.returncode


CALLS = [("pwrite64", 40), ("fdatasync", 24), ("fsync", 4), ("rename", 12), ("unlink", 12)]
SHORT = {"pwrite64": (12,), "rename": (5,), "unlink": (4,)}


@pytest.mark.needs("strace")
def test_move_killed_at_the_nth_storage_call_and_run_again_loses_and_doubles_nothing(
    tmp_path: Path, server: Postgres
) -> None:
    words = tokens(10)
    died = rounds = 0
    with (
        sink() as mx,
        stopped_with_mail(tmp_path, mx, words) as (relay, ledger),
        node(tmp_path, server, mx, "a", start=False) as shared,
    ):
        shared.config_file.write_text(json.dumps(shared.config))
        for call, most in CALLS:
            for nth in range(1, most) if LONG else SHORT.get(call, ()):
                files = tmp_path / f"{call}{nth}"
                for verb in ("export", "import"):
                    died += killed_at(relay, verb, files, call, nth) == -9
                    rounds += 1
                    status, said, error = relay_command(relay, verb, str(files), "--json")
                    assert status == 0, error
                    assert json.loads(said)["left"] == 0
            found = json.loads(relay.run("queue", "list", "--json").stdout)
            assert {one["queue-id"] for one in found} == ledger.queue_ids()
        assert died, "no kill came in time"
        sys.stderr.write(f"\nkill -9 during a move: {rounds} rounds, {died} killed, 0 lost\n")
        files = tmp_path / "files"
        assert relay_command(relay, "export", str(files))[0] == 0
        for nth in range(1, 40) if LONG else (12,):
            killed_at(shared, "import", files, "sendto", nth)
        status, said, error = relay_command(shared, "import", str(files), "--json")
        assert (status, json.loads(said)["left"]) == (0, 0), error
        mx.gate.set()
        shared.start()
        wait_until(lambda: arrived(mx, words), what="all mail")
        assert sorted(mx.tokens(set(words))) == sorted(words)


@pytest.mark.needs("strace")
def test_live_nodes_deliver_once_what_an_import_brings_that_is_killed_and_run_again(
    tmp_path: Path, server: Postgres
) -> None:
    words = tokens(60)
    files = tmp_path / "files"
    with (
        sink() as mx,
        stopped_with_mail(tmp_path, mx, words) as (relay, _),
        node(tmp_path, server, mx, "a") as one,
        node(tmp_path, server, mx, "b"),
    ):
        assert relay_command(relay, "export", str(files))[0] == 0
        mx.gate.set()
        killed_at(one, "import", files, "unlink", 2)  # committed, and most files still there
        assert list(files.glob("*.message"))
        wait_until(lambda: arrived(mx, words), what="the mail, before the files are gone")
        status, said, error = relay_command(one, "import", str(files), "--json")
        assert (status, json.loads(said)["left"]) == (0, 0), error
        assert list(files.iterdir()) == []
        wait_until(lambda: json.loads(one.run("queue", "list", "--json").stdout) == [])
        assert sorted(mx.tokens(set(words))) == sorted(words)
