"""The queue in one SQLite file, synced at every commit: the embedded engine.

store    the `Store` itself, on the event loop
writer   the one thread that writes: group commit, checkpoints, failures of the disk
reader   the thread that reads; also for the queue of a relay that does not run
api_state what the HTTP interface keeps beside the queue
policies what is kept of MTA-STS, in a file of its own for all workers
claims   what is done to recipients inside a transaction
schema   tables and migrations
disk     the directory: lock, ballast, opening, translation of errors
adopt    the queue of a worker that is no more
"""

from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.disk import DATABASE
from relay.queue.sqlite.policies import PoliciesToRead, SqlitePolicyCache
from relay.queue.sqlite.reader import StoppedQueue
from relay.queue.sqlite.store import SqliteStore

__all__ = [
    "DATABASE",
    "PoliciesToRead",
    "SqlitePolicyCache",
    "SqliteStore",
    "StoppedQueue",
    "orphans",
]
