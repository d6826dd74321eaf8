"""Several workers on one port: nothing is lost when one dies, nothing stranded when there are
fewer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import smtplib
import socket
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, check_agreement, check_log, listed, tokens
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, is_alive, relay_of, relay_process, workers_of
from tests.rigs.sink import sink
from tests.rigs.strace import order_of_replies, strace

pytestmark = pytest.mark.timeout(180)


def spread(relay: Relay, ledger: Ledger, words: list[str], **more: Any) -> None:
    """Hand in over many connections, so that every worker gets some."""
    ledger.stream(relay, words, clients=12, **more)


def test_a_worker_killed_under_load_loses_nothing_and_comes_back(tmp_path: Path) -> None:
    words, ledger = tokens(600), Ledger()
    with sink() as mx, relay_of(tmp_path, 3, routes=mx.route) as relay:
        before = workers_of(relay)
        load = threading.Thread(target=spread, args=(relay, ledger, words))
        load.start()
        wait_until(lambda: len(ledger.texts) > 60, what="the stream")
        os.kill(before[1], signal.SIGKILL)
        load.join(timeout=patient(60))
        wait_until(lambda: len(workers_of(relay)) == 3, what="a new worker")
        assert set(before) - {before[1]} <= set(workers_of(relay)), "the others go on"
        assert len(ledger.accepted) > 60
        ledger.settle(relay, mx)
        after = Ledger()
        spread(relay, after, more := tokens(60))
        assert after.accepted == set(more), "all of them take mail again"
        after.settle(relay, mx)
        assert "was killed by SIGKILL: starting it again" in relay.stderr
    check_log(relay)


def test_every_worker_takes_part_and_the_operator_sees_one_relay(tmp_path: Path) -> None:
    words, ledger = tokens(60), Ledger()
    with sink() as mx, relay_of(tmp_path, 3, routes=mx.route) as relay:
        mx.gate.clear()
        spread(relay, ledger, words)
        assert ledger.accepted == set(words)
        wait_until(lambda: len(listed(relay)) == 60, what="the whole queue")
        for directory in ("spool", "spool/worker-1", "spool/worker-2"):
            assert (tmp_path / directory / "queue.db").exists()
        ids = [one["queue-id"] for one in listed(relay)]
        assert ids == sorted(ledger.queue_ids())
        assert relay.run("queue", "show", ids[30]).returncode == 0
        log = relay.run("log", "--event", "accepted", "--json").stdout.splitlines()
        assert len(log) == 60
        assert relay.run("health").stdout.strip() == "healthy"
        mx.gate.set()
        ledger.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")


def test_fewer_workers_deliver_what_more_of_them_had(tmp_path: Path) -> None:
    words, ledger = tokens(90), Ledger()
    with sink() as mx:
        with relay_of(tmp_path, 3, routes={"*": {"host": "[127.0.0.77]", "port": 9}}) as relay:
            spread(relay, ledger, words)
            assert ledger.accepted == set(words)
        # Stopped, the queue of all is there to be looked at.
        assert {one["queue-id"] for one in listed(relay)} == ledger.queue_ids()
        with relay_of(tmp_path, 1, routes=mx.route, queue={"path": "spool"}) as relay:
            assert not list((tmp_path / "spool").glob("worker-*"))
            relay.run("queue", "retry", "--all")
            ledger.settle(relay, mx)
            wait_until(lambda: listed(relay) == [], what="an empty queue")
            assert ledger.duplicates(mx) == 0
        check_log(relay)


@pytest.mark.needs("strace")
def test_no_worker_says_250_before_its_commit_is_synced(tmp_path: Path) -> None:
    with (
        sink() as mx,
        relay_of(tmp_path, 2, routes=mx.route) as relay,
        contextlib.ExitStack() as stack,
    ):
        traces = []
        for number, pid in enumerate(workers_of(relay)):
            traces.append(tmp_path / f"trace{number}")
            calls = "pwrite64,fdatasync,write,writev,sendto,sendmsg"
            stack.enter_context(strace(pid, calls=calls, output=traces[-1]))
        ledger = Ledger()
        spread(relay, ledger, words := tokens(48))
        assert ledger.accepted == set(words)
        ledger.settle(relay, mx)
        stack.close()
        orders = [order_of_replies(trace) for trace in traces]
    for order in orders:
        assert order.answered, "each of the two took part"
        assert order.syncs > 0
        assert order.too_early == ()


def test_a_limit_of_connections_holds_for_all_workers_together(tmp_path: Path) -> None:
    limits = {"connections": 10, "connections_per_client": 6}
    with sink() as mx, relay_of(tmp_path, 2, routes=mx.route, limits=limits) as relay:
        taken, refused = [], 0
        for _ in range(12):
            client = socket.create_connection(("127.0.0.1", relay.port), timeout=patient(10))
            words = client.recv(200)
            if words.startswith(b"220"):
                taken.append(client)
            else:
                assert words.startswith(b"421 4.7.0"), words
                refused += 1
                client.close()
        assert (len(taken), refused) == (6, 6)
        taken.pop().close()
        wait_until(lambda: _gets_in(relay), what="the place that is free again")
        # A worker that dies gives back what it held.
        for pid in workers_of(relay):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: relay.stderr.count("was killed by SIGKILL") == 2, what="both gone")
        others = [smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20)) for _ in range(6)]
        assert len(others) == 6
        for client in taken:
            client.close()
        for session in others:
            session.close()


def _gets_in(relay: Relay) -> bool:
    try:
        with smtplib.SMTP("127.0.0.1", relay.port) as another:
            return another.noop()[0] == 250
    except smtplib.SMTPConnectError:
        return False


def hasty(seconds: float) -> tuple[str, ...]:
    """A relay that has so many seconds' patience with a worker that hangs."""
    return ("tests.rigs.hasty_relay", str(60 / seconds))


def test_a_worker_that_hangs_is_ended_and_its_successor_has_its_mail(tmp_path: Path) -> None:
    words, ledger, seconds = tokens(40), Ledger(), 20
    with sink() as mx, relay_of(tmp_path, 2, program=hasty(seconds), routes=mx.route) as relay:
        mx.gate.clear()
        spread(relay, ledger, words)
        assert ledger.accepted == set(words)
        before = workers_of(relay)
        held = in_queue(tmp_path / "spool/worker-1/queue.db")
        assert 0 < held < 40, "each of the two has some"
        os.kill(before[1], signal.SIGSTOP)
        mx.gate.set()
        # The other goes on: its clients are served, its mail leaves.
        wait_until(lambda: len(mx.contents) == 40 - held, what="the other's mail")
        meanwhile = Ledger()
        crowd = threading.Thread(target=spread, args=(relay, meanwhile, more := tokens(24)))
        crowd.start()
        wait_until(lambda: meanwhile.accepted, what="a client that is served")
        assert workers_of(relay) == before, "before the end of patience"
        wait_until(lambda: before[1] not in workers_of(relay), what="the end of the one that hangs")
        # Who had come to its door was not turned away.
        crowd.join(timeout=patient(60))
        assert meanwhile.accepted == set(more)
        ledger.settle(relay, mx)
        meanwhile.settle(relay, mx)
        wait_until(lambda: listed(relay) == [], what="an empty queue")
        assert workers_of(relay)[0] == before[0]
        assert ledger.duplicates(mx) == 0
        assert check_agreement(relay, mx) == 64
        assert "worker 1 has not been well for 20 s: killing it" in relay.stderr
        assert "worker 1 was killed by SIGKILL: starting it again" in relay.stderr


def in_queue(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT count(*) FROM message").fetchone()[0])


def test_a_worker_that_hangs_does_not_keep_the_relay_from_ending(tmp_path: Path) -> None:
    with relay_of(tmp_path, 2, program=hasty(6)) as relay:
        os.kill(workers_of(relay)[1], signal.SIGSTOP)
        assert relay.stop() == 1
        assert "worker 1 has not ended" in relay.stderr


def test_workers_that_were_stopped_with_their_supervisor_are_not_killed(tmp_path: Path) -> None:
    """As in a container that is frozen and thawed: nobody was silent, time stood still."""
    with sink() as mx, relay_of(tmp_path, 2, program=hasty(6), routes=mx.route) as relay:
        before = workers_of(relay)
        for pid in (relay.pid, *before):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8)
        for pid in (relay.pid, *before):
            os.kill(pid, signal.SIGCONT)
        ledger = Ledger()
        spread(relay, ledger, words := tokens(24))
        assert ledger.accepted == set(words)
        ledger.settle(relay, mx)
        assert workers_of(relay) == before
        assert "not been well" not in relay.stderr


def test_a_supervisor_that_vanishes_leaves_no_worker_behind(tmp_path: Path) -> None:
    with sink() as mx, relay_of(tmp_path, 2, routes=mx.route) as relay:
        workers = workers_of(relay)
        relay.kill()
        assert not any(map(is_alive, workers))
        relay.start()
        ledger = Ledger()
        ledger.hand_in(relay, tokens(3))
        ledger.settle(relay, mx)


def test_a_broken_file_is_said_once_and_every_worker_keeps_the_old_one(tmp_path: Path) -> None:
    with sink() as mx, relay_of(tmp_path, 2, routes=mx.route) as relay:
        good = relay.config_file.read_text()
        relay.config_file.write_text("workers: [\n")
        relay.signal(signal.SIGHUP)
        wait_until(lambda: "the configuration in force is kept" in relay.stderr, what="the reload")
        relay.config_file.write_text(good)
        ledger = Ledger()
        spread(relay, ledger, words := tokens(24))
        assert ledger.accepted == set(words)
        ledger.settle(relay, mx)
        assert relay.stderr.count("the configuration in force is kept") == 1


def test_a_worker_that_cannot_start_ends_the_start(tmp_path: Path) -> None:
    with relay_process(tmp_path, start=False) as relay:
        relay.config["workers"] = 2
        (tmp_path / "spool" / "worker-1").mkdir(parents=True)
        (tmp_path / "spool/worker-1/queue.db").write_bytes(b"not a database at all" * 100)
        with contextlib.suppress(AssertionError):
            relay.start(seconds=10)
        assert relay.process is not None
        assert relay.process.wait(timeout=patient(20)) == 1
        assert "cannot start: queue.path:" in relay.stderr
