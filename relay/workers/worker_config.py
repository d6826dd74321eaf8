"""What one worker of several gets of what the configuration gives the whole relay. Pure.

    queue.path       worker 0 has the queue of a relay with one worker, the others theirs below it
    admin.socket     worker 0 answers there, the others beside it; worker 0 asks them
    admin.http       worker 0
    policies         all workers share those below queue.path; fetches at a time are divided
    delivery         concurrency is divided: the sum over the workers is what was written
    next_hops        every worker has the whole limits: they are kept together
                     (`relay.workers.shared_limits`)
    limits           every worker has the whole limit: connections are counted together
                     (`relay.workers.shared_counters`)

Deliveries are divided and connections are not, since the kernel spreads connections over the
workers as it likes, and each worker delivers what it has accepted: so mail is spread as evenly as
clients are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from relay.config import Config
from relay.queue.division import share
from relay.queue.engine import WORKER_SPOOL

__all__ = ["control_socket", "part", "shared_spool", "spool", "worker_config"]


def worker_config(config: Config, worker: int, workers: int) -> Config:
    """The configuration of one worker."""
    if workers == 1:
        return config
    delivery = replace(
        config.delivery,
        concurrency=part(config.delivery.concurrency, worker, workers),
        concurrency_per_destination=part(
            config.delivery.concurrency_per_destination, worker, workers
        ),
    )
    admin = replace(config.admin, socket=control_socket(config.admin.socket, worker))
    if worker:
        admin = replace(admin, http="")
    queue = replace(config.queue, path=spool(config.queue.path, worker))
    return replace(config, delivery=delivery, admin=admin, queue=queue)


def part(whole: int, worker: int, workers: int) -> int:
    """One worker's part of a number; those of all add up to it."""
    return share(whole, worker, workers)


def spool(path: str, worker: int) -> str:
    """Where a worker has its queue."""
    return path if worker == 0 else str(PurePath(path, f"{WORKER_SPOOL}{worker}"))


def shared_spool(path: str, worker: int) -> str:
    """The first worker's queue, by the path of a worker's: what all share is there."""
    return path if worker == 0 else str(PurePath(path).parent)


def control_socket(path: str, worker: int) -> str:
    """Where a worker can be asked."""
    return path if worker == 0 else f"{path}.{worker}"
