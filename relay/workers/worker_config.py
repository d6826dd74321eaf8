"""The configuration of one worker: what it has alone, and its part of what all have. Pure.

    queue.path       worker 0 has the queue of a relay with one worker, the others theirs below it
    queue.node       with `queue.url` each worker is a node: worker 0 has this name, worker 2 is
                     `NAME.2`
    admin.socket     worker 0 answers there, the others beside it; worker 0 asks them
    admin.http       worker 0 only
    policies         all workers share those below queue.path; fetches at a time are divided
    delivery         concurrency is divided; so is concurrency_per_destination, which nodes divide
                     by `relay.queue.division` instead
    next_hops        every worker has the limits unchanged: workers count together
                     (`relay.workers.shared_limits`), nodes divide the limits
    limits           every worker has the limits unchanged: workers count connections together
                     (`relay.workers.shared_counters`)

Connections are not divided, because the kernel spreads them over the workers unevenly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath

from relay.config import Config
from relay.queue.division import share
from relay.queue.engine import WORKER_SPOOL


def worker_config(config: Config, worker: int, workers: int) -> Config:
    """The configuration of one worker."""
    if workers == 1:
        return config
    location, delivery = config.queue.location, config.delivery
    delivery = replace(delivery, concurrency=share(delivery.concurrency, worker, workers))
    if location.is_shared:
        queue = replace(config.queue, node=node_name(location.node, worker))
    else:
        of_destination = share(delivery.concurrency_per_destination, worker, workers)
        delivery = replace(delivery, concurrency_per_destination=of_destination)
        queue = replace(config.queue, path=spool(config.queue.path, worker))
    admin = replace(config.admin, socket=control_socket(config.admin.socket, worker))
    if worker:
        admin = replace(admin, http="")
    return replace(config, delivery=delivery, admin=admin, queue=queue)


def node_name(name: str, worker: int) -> str:
    """The name of a worker among the nodes that share a queue."""
    return name if worker == 0 else f"{name}.{worker}"


def spool(path: str, worker: int) -> str:
    """Where a worker has its queue."""
    return path if worker == 0 else str(PurePath(path, f"{WORKER_SPOOL}{worker}"))


def shared_spool(path: str, worker: int) -> str:
    """Where the first worker has its queue, and all workers their policies. `path`: of a worker."""
    return path if worker == 0 else str(PurePath(path).parent)


def control_socket(path: str, worker: int) -> str:
    """Where a worker answers the CLI, or the first worker."""
    return path if worker == 0 else f"{path}.{worker}"
