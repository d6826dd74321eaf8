"""What one worker of several gets of what the configuration gives the whole relay. Pure.

    queue.path       worker 0 has the queue of a relay with one worker, the others theirs below it
    queue.node       with `queue.url` each worker is a node: worker 0 has this name, worker 2 is
                     `NAME.2`
    admin.socket     worker 0 answers there, the others beside it; worker 0 asks them
    admin.http       worker 0
    policies         all workers share those below queue.path; fetches at a time are divided
    delivery         concurrency is divided: the sum over the workers is what was written; so is
                     concurrency_per_destination, which nodes divide among each other
    next_hops        every worker has the whole limits: they are kept together
                     (`relay.workers.shared_limits`), or divided among the nodes
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

__all__ = ["control_socket", "node_name", "part", "shared_spool", "spool", "worker_config"]


def worker_config(config: Config, worker: int, workers: int) -> Config:
    """The configuration of one worker."""
    if workers == 1:
        return config
    location, delivery = config.queue.location, config.delivery
    delivery = replace(delivery, concurrency=part(delivery.concurrency, worker, workers))
    if location.is_shared:
        queue = replace(config.queue, node=node_name(location.node, worker))
    else:
        of_destination = part(delivery.concurrency_per_destination, worker, workers)
        delivery = replace(delivery, concurrency_per_destination=of_destination)
        queue = replace(config.queue, path=spool(config.queue.path, worker))
    admin = replace(config.admin, socket=control_socket(config.admin.socket, worker))
    if worker:
        admin = replace(admin, http="")
    return replace(config, delivery=delivery, admin=admin, queue=queue)


def part(whole: int, worker: int, workers: int) -> int:
    """One worker's part of a number; those of all add up to it."""
    return share(whole, worker, workers)


def node_name(name: str, worker: int) -> str:
    """The name of a worker among the nodes that share a queue."""
    return name if worker == 0 else f"{name}.{worker}"


def spool(path: str, worker: int) -> str:
    """Where a worker has its queue."""
    return path if worker == 0 else str(PurePath(path, f"{WORKER_SPOOL}{worker}"))


def shared_spool(path: str, worker: int) -> str:
    """The first worker's queue, by the path of a worker's: what all share is there."""
    return path if worker == 0 else str(PurePath(path).parent)


def control_socket(path: str, worker: int) -> str:
    """Where a worker can be asked."""
    return path if worker == 0 else f"{path}.{worker}"
