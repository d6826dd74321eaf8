"""What each of several workers gets: nothing more than was written, and nothing left over."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from relay.config import load
from relay.queue.division import share
from relay.receive.limits import Connections, Limits
from relay.workers.shared_counters import SharedCounters
from relay.workers.worker_config import worker_config


@pytest.mark.parametrize(("whole", "workers"), [(200, 1), (200, 3), (20, 20), (7, 2), (1000, 64)])
def test_limits_of_workers_add_up_and_none_is_zero(whole: int, workers: int) -> None:
    parts = [share(whole, worker, workers) for worker in range(workers)]
    assert sum(parts) == whole
    assert max(parts) - min(parts) <= 1
    assert min(parts) >= 1


def test_a_worker_has_its_own_queue_and_socket_and_the_first_has_the_port(tmp_path: Path) -> None:
    file = tmp_path / "relay.yaml"
    file.write_text(
        "workers: 3\nqueue: {path: /srv/spool}\n"
        "admin: {socket: /run/relay.sock, http: '127.0.0.1:8025'}\n"
        "delivery: {concurrency: 100, concurrency_per_destination: 10}\n"
    )
    config = load(file, {})
    first, second, third = (worker_config(config, worker, 3) for worker in range(3))
    assert (first.queue.path, second.queue.path) == ("/srv/spool", "/srv/spool/worker-1")
    assert (first.admin.socket, third.admin.socket) == ("/run/relay.sock", "/run/relay.sock.2")
    assert first.admin.http == "127.0.0.1:8025"
    assert not second.admin.http
    assert [one.delivery.concurrency_per_destination for one in (first, second, third)] == [4, 3, 3]
    assert second.limits == config.limits
    assert worker_config(config, 0, 1) == config


def test_worker_whose_queue_is_shared_is_a_node_with_the_whole_limit_of_a_destination(
    tmp_path: Path,
) -> None:
    file = tmp_path / "relay.yaml"
    file.write_text(
        "workers: 3\nqueue: {url: 'postgresql://relay@db/relay', node: mx-a}\n"
        "delivery: {concurrency: 100, concurrency_per_destination: 2}\n"
    )
    config = load(file, {})
    workers = [worker_config(config, worker, 3) for worker in range(3)]
    assert [one.queue.location.node for one in workers] == ["mx-a", "mx-a.1", "mx-a.2"]
    assert [one.delivery.concurrency_per_destination for one in workers] == [2, 2, 2]
    assert sum(one.delivery.concurrency for one in workers) == 100


def test_connections_elsewhere_count_until_their_worker_is_gone() -> None:
    counters = SharedCounters(2)
    here, there = Connections(counters.row(0)), Connections(counters.row(1))
    limits = Limits(connections=4, connections_per_client=2, idle=timedelta(minutes=1))
    assert there.admit("192.0.2.1", limits) is None
    assert here.admit("192.0.2.1", limits) is None
    for side in (here, there):
        refusal = side.admit("192.0.2.1", limits)
        assert refusal is not None
        assert refusal.status == "4.7.0"
    assert here.admit("192.0.2.2", limits) is None
    assert there.admit("192.0.2.3", limits) is None
    refusal = here.admit("192.0.2.4", limits)
    assert refusal is not None
    assert refusal.status == "4.3.2"
    here.leave("192.0.2.1")
    assert there.admit("192.0.2.1", limits) is None
    counters.clear(1)  # it died
    assert here.admit("192.0.2.1", limits) is None
    assert here.admit("192.0.2.1", limits) is None
    assert here.admit("192.0.2.1", limits) is not None
