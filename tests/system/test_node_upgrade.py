"""Two versions of the relay with one queue, beside each other, while mail flows.

The newer version is a copy of this one that knows one migration more, whose tables have one column
more each.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import asyncpg
import pytest

import relay
from relay.queue.postgres import NoServer, schema
from relay.queue.postgres.schema import MIGRATIONS, Migration
from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, tokens
from tests.rigs.nodes import accepts, check_both_ends, node
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay
from tests.rigs.sink import sink

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(300)]

SOURCE = Path(relay.__file__).parent
KNOWN = len(MIGRATIONS)


def newer_version(directory: Path, *, oldest_compatible: list[int]) -> Path:
    """A copy of the source that knows a migration more for each of these; its directory."""
    shutil.copytree(SOURCE, directory / "relay", ignore=shutil.ignore_patterns("__pycache__"))
    schema = directory / "relay/queue/postgres/schema.py"
    added = "".join(
        f"    Migration((\n{_columns(number)}    ), oldest_compatible={oldest}),\n"
        for number, oldest in enumerate(oldest_compatible)
    )
    known = r"^(MIGRATIONS: Sequence\[Migration\] = \([^)]*)\)$"
    text, count = re.subn(known, rf"\1,\n{added})", schema.read_text(), flags=re.MULTILINE)
    assert count == 1
    schema.write_text(text)
    return directory


def _columns(number: int) -> str:
    return "".join(
        f'        "ALTER TABLE relay.{table} ADD COLUMN new_{number} {type}",\n'
        for table, type in (
            ("message", "text"),
            ("recipient", "integer NOT NULL DEFAULT 7"),
            ("event", "text"),
            ("lease", "boolean NOT NULL DEFAULT true"),
        )
    )


def started(one: Relay, source: Path) -> Relay:
    """A node of another version."""
    one.environment["PYTHONPATH"] = str(source)
    one.start(seconds=150)
    return one


def test_nodes_of_two_versions_share_the_queue_while_mail_flows(tmp_path, server):
    newer = newer_version(tmp_path / "newer", oldest_compatible=[1])
    ledger, url = Ledger(), server.url()
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", url=url) as old,
        node(tmp_path, server, mx, "b", url=url, start=False) as new,
    ):
        wait_until(lambda: accepts(old, ledger), what="mail")
        with ledger.crowd(old, clients=1):
            started(new, newer)
            ledger.hand_in(new, tokens(20))
        assert server.sql("SELECT version FROM relay.meta") == str(KNOWN + 1)
        assert set(ledger.codes.values()) == {250}, "the change of the tables refused nothing"
        # What the older version has deferred, the newer one delivers.
        mx.deferred.set()
        left = tokens(5)
        ledger.hand_in(old, left)
        wait_until(lambda: len(old.events(severity="temporary")) >= 5, what="deferrals")
        assert old.stop() == 0
        mx.deferred.clear()
        check_both_ends([old, new], mx, ledger)
        old.start()
        assert accepts(old, ledger), "the older version starts on the newer tables, too"
        check_both_ends([old, new], mx, ledger)


async def test_change_of_the_tables_does_not_wait_in_the_way_of_mail(server, monkeypatch):
    """Behind a lock that waits for another program, everybody else waits, too."""
    monkeypatch.setattr(schema, "_LOCK_SECONDS", 1)
    column = Migration(("ALTER TABLE relay.message ADD COLUMN new text",), oldest_compatible=1)
    db, other = await asyncpg.connect(server.url()), await asyncpg.connect(server.url())
    try:
        await schema.migrate(db)
        await other.execute("BEGIN")
        await other.execute("SELECT count(*) FROM relay.message")
        with pytest.raises(NoServer, match="another program uses the tables"):
            await schema.migrate(db, (*MIGRATIONS, column))
        await other.execute("COMMIT")
        await schema.migrate(db, (*MIGRATIONS, column))
        assert await db.fetchval("SELECT version FROM relay.meta") == KNOWN + 1
    finally:
        await db.close()
        await other.close()


def test_older_node_drains_and_exits_when_a_newer_version_needs_it_gone(tmp_path, server):
    newest = newer_version(tmp_path / "newest", oldest_compatible=[1, KNOWN + 2])
    ledger, url = Ledger(), server.url()
    with (
        sink() as mx,
        node(tmp_path, server, mx, "a", url=url) as old,
        node(tmp_path, server, mx, "b", url=url, start=False) as new,
    ):
        wait_until(lambda: accepts(old, ledger), what="mail")
        with ledger.crowd(old, clients=1):
            started(new, newest)
            assert old.process is not None
            assert old.process.wait(timeout=patient(60)) == 1
        says = f"need a relay that knows {KNOWN + 2}; this one knows {KNOWN}"
        assert says in old.stderr
        ledger.hand_in(new, tokens(5))
        check_both_ends([old, new], mx, ledger)
