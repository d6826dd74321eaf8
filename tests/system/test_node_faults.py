"""Several relays with one queue: faults of the server, of the way to it and of a node, asserted at
both ends: what clients heard, what the host saw, and the delivery logs of all nodes.

`make torture` has the server away for a minute.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pytest

from relay.queue.postgres.schema import MIGRATIONS
from tests.fakes.waiting import patient
from tests.rigs.cutter import Cut, Cutter, cutter_beside
from tests.rigs.ledger import LINES, Ledger, listed, tokens
from tests.rigs.nodes import (
    LEASE_SECONDS,
    accepts,
    arrived,
    check_both_ends,
    handing_in,
    health,
    node,
    states,
)
from tests.rigs.ports import accepts_connections, free_port, wait_until
from tests.rigs.postgres import Postgres, postgres, postgres_on_small_disk, standby
from tests.rigs.relay import Relay
from tests.rigs.sink import Sink, sink
from tests.rigs.small_disk import fill

pytestmark = [pytest.mark.needs("postgresql"), pytest.mark.timeout(300)]

OUTAGE_SECONDS = 60 if os.environ.get("RELAY_LONG") == "1" else 8


@dataclass
class Cluster:
    """Two nodes. Between `one` and the server is a proxy."""

    server: Postgres
    between: Cutter
    mx: Sink
    one: Relay
    two: Relay
    ledger: Ledger = field(default_factory=Ledger)

    def check(self) -> None:
        check_both_ends([self.one, self.two], self.mx, self.ledger)

    def is_well(self) -> bool:
        return health(self.one, "/readyz") == health(self.two, "/readyz") == 200


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Postgres
) -> Iterator[Cluster]:
    directory, server = tmp_path_factory.mktemp("nodes"), postgres_server
    server.sql("CREATE DATABASE shared")
    with (
        sink(idle_seconds=600) as mx,
        cutter_beside(server.port) as between,
        node(directory, server, mx, "b", url=server.url("shared")) as two,
        node(directory, server, mx, "a", url=server.tcp_url("shared", port=between.port)) as one,
    ):
        found = Cluster(server, between, mx, one, two)
        # A host that nobody knows gets few connections at first.
        for relay in (one, two):
            wait_until(partial(accepts, relay, found.ledger), what="mail")
        found.check()
        yield found


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Relay, float]]:
    """A node that looks for its server while the tests of this file run; when it began."""
    directory = tmp_path_factory.mktemp("unreachable")
    server, mx = Postgres(directory, free_port()), Sink("127.0.0.31", 9)
    with node(directory, server, mx, "a", url=server.tcp_url(), start=False) as relay:
        relay.launch()
        yield relay, time.monotonic()


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The nodes, which no fault before has ended, with a ledger of the test's own."""
    running.ledger = Ledger()
    wait_until(running.is_well, what="the end of the fault before")
    yield running
    running.mx.gate.set()
    running.mx.last_word.set()


@pytest.fixture
def database(postgres_server: Postgres, request: pytest.FixtureRequest) -> str:
    """A database for the nodes of one test, on the server of all; how to reach it."""
    name = f"own_{abs(hash(request.node.name))}"
    postgres_server.sql(f"CREATE DATABASE {name}")
    return postgres_server.url(name)


# --- the server -----------------------------------------------------------------------------------


@contextlib.contextmanager
def crash(server: Postgres) -> Iterator[None]:
    server.stop(signal.SIGQUIT)
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def hang(server: Postgres) -> Iterator[None]:
    stopped = server.pause()
    try:
        yield
    finally:
        server.go_on(stopped)


def is_away(relay: Relay) -> bool:
    return health(relay, "/readyz") == 503


@pytest.mark.torture
@pytest.mark.parametrize(("fault", "longest"), [(crash, 15), (hang, 30)], ids=["crash", "hang"])
def test_server_that_is_away_costs_no_mail_no_result_and_no_restart(cluster, fault, longest):
    one, two, mx, ledger = cluster.one, cluster.two, cluster.mx, cluster.ledger
    words, down = tokens(3), tokens(2)
    mx.last_word.clear()
    ledger.stream(one, words)
    wait_until(lambda: arrived(mx, words), what="attempts past the final dot")
    began = time.monotonic()
    with fault(cluster.server):
        mx.last_word.set()
        with handing_in(one, ledger, down[:1]), handing_in(two, ledger, down[1:]):
            for relay in (one, two):
                wait_until(partial(is_away, relay), what="503")
                assert health(relay, "/healthz") == 200, "a restart would bring no server back"
        assert time.monotonic() - began < longest
        assert {ledger.codes[word] for word in down} == {451}
        time.sleep(max(0, began + OUTAGE_SECONDS - time.monotonic()))
    began = time.monotonic()
    # No mail has to come for a node to see that it may take some again.
    wait_until(cluster.is_well, what="readiness")
    after = tokens(2)
    ledger.hand_in(one, after[:1])
    ledger.hand_in(two, after[1:])
    assert ledger.accepted == {*words, *after}
    wait_until(lambda: arrived(mx, after), what="the mail")
    assert time.monotonic() - began < 10
    cluster.check()


def test_client_hears_no_250_where_the_wait_for_a_standby_is_cancelled(cluster):
    server, ledger = cluster.server, cluster.ledger
    word = tokens(1)
    waits = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%relay.message%'"
    try:
        set_standby(server, "nobody")
        with handing_in(cluster.one, ledger, word):
            wait_until(lambda: server.sql(f"SELECT count(*) {waits}") != "0", what="the wait")
            server.sql(f"SELECT pg_cancel_backend(pid) {waits}")
        assert ledger.codes[word[0]] == 451
    finally:
        set_standby(server, "")
    wait_until(lambda: accepts(cluster.one, ledger), what="mail again")
    wait_until(lambda: listed(cluster.two) == [], what="an empty queue")
    cluster.check()


@pytest.mark.needs("root", "mount")
def test_full_disk_of_the_server_refuses_mail_for_now_and_recovers_alone(tmp_path):
    """First there is no room for rows, then none for the write-ahead log: that ends the server."""
    ledger, kept, refused = Ledger(), tokens(3), tokens(5)
    with (
        postgres_on_small_disk("64m") as server,
        sink() as mx,
        node(tmp_path, server, mx, "a") as relay,
    ):
        wait_until(partial(accepts, relay, ledger), what="mail")
        mx.gate.clear()
        ledger.hand_in(relay, kept)
        assert ledger.accepted >= set(kept)
        filler = fill(server.data)
        for word in refused:
            ledger.hand_in(relay, [word], body=LINES * 8)
        # A page that is there already may have room.
        assert {ledger.codes[word] for word in refused} <= {250, 452}
        assert 452 in {ledger.codes[word] for word in refused}
        write = (
            "DO $$ BEGIN PERFORM pg_logical_emit_message(true, 'x', repeat('y', 900000)); END $$"
        )
        with pytest.raises(subprocess.CalledProcessError):
            server.sql("; ".join([write] * 50))
        last = tokens(1)
        ledger.hand_in(relay, last)
        assert ledger.codes[last[0]] in (451, 452)
        filler.unlink()
        began = time.monotonic()
        wait_until(partial(accepts, relay, ledger), what="mail again")
        assert time.monotonic() - began < 10
        mx.gate.set()
        check_both_ends([relay], mx, ledger)


def set_standby(server: Postgres, name: str) -> None:
    server.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    server.sql("SELECT pg_reload_conf()")


def test_mail_flows_after_a_failover_from_a_server_that_hangs(tmp_path):
    ledger, words = Ledger(), tokens(20)
    with postgres() as server, standby(server) as second, sink() as mx:
        set_standby(server, "*")
        url = f"postgresql://relay@127.0.0.1:{server.port},127.0.0.1:{second.port}/postgres"
        with (
            node(tmp_path, server, mx, "a", url=url) as one,
            node(tmp_path, server, mx, "b", url=url) as two,
        ):
            mx.gate.clear()
            ledger.stream(one, words[:10])
            ledger.stream(two, words[10:])
            assert ledger.accepted == set(words)
            with hang(server):
                mx.gate.set()
                set_standby(second, "")
                second.sql("SELECT pg_promote()")
                began = time.monotonic()
                for relay in (one, two):
                    wait_until(partial(accepts, relay, ledger), what="mail")
                wait_until(lambda: arrived(mx, ledger.accepted), what="all mail")
                assert time.monotonic() - began < 30
                check_both_ends([one, two], mx, ledger)


# --- the way to the server ------------------------------------------------------------------------


def test_commit_that_is_cut_is_answered_250_where_its_outcome_is_learned(cluster):
    for how in Cut:
        [word] = tokens(1)
        cuts = cluster.between.cuts
        cluster.between.cut(how, word.encode())
        cluster.ledger.hand_in(cluster.one, [word])
        assert cluster.between.cuts == cuts + 1
        assert cluster.ledger.codes[word] == 250
    cluster.check()


def test_commit_that_is_cut_is_answered_451_where_its_outcome_stays_unknown(cluster):
    between, ledger = cluster.between, cluster.ledger
    [word] = tokens(1)
    # The other node would take the message over while this one is away.
    cluster.two.signal(signal.SIGSTOP)
    try:
        between.cut(Cut.AFTER, word.encode(), closes_then=True)
        ledger.hand_in(cluster.one, [word])
        assert ledger.codes[word] == 451
        assert cluster.server.sql("SELECT count(*) FROM relay.message", "shared") == "1"
    finally:
        between.is_open = True
        cluster.two.signal(signal.SIGCONT)
    wait_until(lambda: listed(cluster.two) == [], what="the message's removal")
    wait_until(lambda: accepts(cluster.one, ledger), what="mail again")
    cluster.check()


def test_node_that_is_cut_off_begins_nothing_and_comes_back_as_itself(cluster):
    one, two, mx, ledger = cluster.one, cluster.two, cluster.mx, cluster.ledger
    words, refused = tokens(10), tokens(1)
    mx.gate.clear()
    ledger.stream(one, words)
    cluster.between.line.clear()
    try:
        with handing_in(one, ledger, refused):
            began = time.monotonic()
            wait_until(lambda: states(two)["a"] == "lost", what="the loss")
            mx.gate.set()
            wait_until(lambda: arrived(mx, words), what="the mail at the other node")
            assert time.monotonic() - began < LEASE_SECONDS + 10
        assert ledger.codes[refused[0]] == 451
    finally:
        cluster.between.line.set()
    wait_until(lambda: health(one, "/readyz") == 200, what="its return")
    assert states(two)["a"] == "live"
    assert accepts(one, ledger)
    cluster.check()


# --- a node ---------------------------------------------------------------------------------------


@pytest.mark.needs("faketime")
def test_clock_that_is_a_day_wrong_has_no_effect(tmp_path, postgres_server, database):
    ledger = Ledger()
    # Not started by `faketime`, which stays as the relay's parent and takes its signals.
    library = subprocess.check_output(["faketime", "-f", "+0", "printenv", "LD_PRELOAD"], text=True)
    environment = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "LD_PRELOAD": library.strip()}
    program = ("tests.rigs.faketime_relay",)
    with sink() as mx, contextlib.ExitStack() as opened:
        relays = []
        for name, shift in (("ahead", "+1d"), ("behind", "-1d")):
            relay = opened.enter_context(
                node(
                    tmp_path, postgres_server, mx, name, url=database, start=False, program=program
                )
            )
            relay.environment = environment | {"FAKETIME": shift}
            relay.start()
            relays.append(relay)
        mx.deferred.set()
        for relay in relays:
            ledger.hand_in(relay, tokens(2))
        assert len(ledger.accepted) == 4
        wait_until(lambda: len(mx.refused) >= 4, what="attempts that are deferred")
        for message in listed(relays[0]):
            assert is_now(datetime.fromisoformat(message["arrived"]).timestamp())
        mx.deferred.clear()
        check_both_ends(relays, mx, ledger)
        for relay in relays:
            assert all(is_now(event["timestamp"]) for event in relay.events())
            assert relay.stderr.count("the clock of this machine differs") == 1
            assert not relay.events(severity="permanent")


def is_now(seconds: float) -> bool:
    return abs(seconds - datetime.now(UTC).timestamp()) < 120


# --- the start ------------------------------------------------------------------------------------

_SECRET = "a-secret-of-the-server"


def test_start_that_can_never_succeed_exits_with_1_names_the_key_and_shows_no_password(
    tmp_path, postgres_server
):
    server = postgres_server
    server.sql(f"CREATE ROLE locked LOGIN PASSWORD '{_SECRET}'")
    server.sql("CREATE ROLE plain LOGIN")
    server.sql("CREATE DATABASE newer")
    server.sql(
        "CREATE SCHEMA relay; CREATE TABLE relay.meta AS"
        " SELECT 9 AS version, 8 AS oldest_compatible, 0::bigint AS changes,"
        " 0::bigint AS give_back",
        "newer",
    )
    server.require_password("locked")
    (tmp_path / "secret").write_text(f"not-{_SECRET}\n")
    with cutter_beside(server.port) as old, contextlib.ExitStack() as opened:
        old.altered = (b"\x00\x06150", b"\x00\x06130")  # what server_version_num is
        at = f"@127.0.0.1:{server.port}"
        cases = {
            "password": (
                f"postgresql://locked:wrong-{_SECRET}{at}/postgres",
                "password authentication failed",
            ),
            "old": (server.tcp_url(port=old.port), "the server is PostgreSQL 13; 14 or later"),
            "newer": (server.tcp_url("newer"), "have version 9 and need a relay that knows 8"),
            "right": (f"postgresql://plain{at}/postgres", "may not make the schema relay"),
        }
        relays: dict[str, Relay] = {}
        for name, (url, _) in cases.items():
            relays[name] = opened.enter_context(
                node(tmp_path, server, Sink("127.0.0.31", 9), name, url=url, start=False)
            )
            if name == "password":
                relays[name].config["queue"]["password_file"] = str(tmp_path / "secret")
            relays[name].launch()
        for name, relay in relays.items():
            assert relay.process is not None
            assert relay.process.wait(timeout=patient(120)) == 1, name
            assert "queue.url" in relay.stderr, (name, relay.stderr)
            assert cases[name][1] in relay.stderr, (name, relay.stderr)
            assert _SECRET not in relay.stderr
            assert "Traceback" not in relay.stderr
        server.sql("ALTER SYSTEM SET fsync = off")
        server.sql("SELECT pg_reload_conf()")
        try:
            relay = opened.enter_context(
                node(tmp_path, server, Sink("127.0.0.31", 9), "fsync", start=False)
            )
            relay.launch()
            assert relay.process is not None
            assert relay.process.wait(timeout=patient(60)) == 1
            assert "queue.url" in relay.stderr
            assert "the server has fsync off" in relay.stderr
        finally:
            server.sql("ALTER SYSTEM RESET fsync")
            server.sql("SELECT pg_reload_conf()")


# --- a name, a version ----------------------------------------------------------------------------


def test_node_whose_name_is_taken_while_it_is_stopped_drains_and_exits(
    tmp_path, postgres_server, database
):
    ledger = Ledger()
    again = tmp_path / "again"
    again.mkdir()
    with (
        sink() as mx,
        node(tmp_path, postgres_server, mx, "a", url=database) as first,
        node(again, postgres_server, mx, "a", url=database, start=False) as second,
    ):
        first.signal(signal.SIGSTOP)
        second.start()  # it waits for the end of the lease
        first.signal(signal.SIGCONT)
        assert first.process is not None
        assert first.process.wait(timeout=patient(60)) == 1
        assert "another process is node a now" in first.stderr
        assert accepts(second, ledger)
        check_both_ends([first, second], mx, ledger)


def test_older_node_runs_beside_a_newer_one_until_the_tables_are_not_its_own(
    tmp_path, postgres_server, database
):
    ledger = Ledger()
    name = database.partition("@/")[2].partition("?")[0]
    with sink() as mx, node(tmp_path, postgres_server, mx, "a", url=database) as relay:
        relay.stop()
        postgres_server.sql("UPDATE relay.meta SET version = version + 1", name)
        relay.start()
        assert accepts(relay, ledger)
        postgres_server.sql("UPDATE relay.meta SET oldest_compatible = version", name)
        assert relay.process is not None
        assert relay.process.wait(timeout=patient(60)) == 1
        known = len(MIGRATIONS)
        says = (
            f"version {known + 1} and need a relay that knows {known + 1}; this one knows {known}"
        )
        assert relay.stderr.count(says) == 1
        with pytest.raises(AssertionError, match="the relay ended at its start"):
            relay.start()
        assert relay.process.wait(timeout=patient(60)) == 1
        assert relay.stderr.count(says) == 2
        check_both_ends([relay], mx, ledger)


def test_server_that_cannot_be_reached_is_tried_for_a_minute_by_a_relay_that_takes_no_mail(
    unreachable,
):
    """The last test of the file: the minute passes beside the others."""
    relay, began = unreachable
    while relay.process.poll() is None:
        assert not accepts_connections("127.0.0.1", relay.port)
        time.sleep(0.5)
    assert time.monotonic() - began > 60
    assert relay.process.returncode == 1
    assert relay.stderr.count("waiting for the queue's server") == 1
    assert "cannot start: queue.url: " in relay.stderr
    assert "listening at" not in relay.stderr
