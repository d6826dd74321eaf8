"""The queue in one SQLite file, synced at every commit: the embedded engine.

store       the `Store` itself, on the event loop
commit      the one thread that writes: group commit and failures; `disk_space`, `wal` serve it
statements  what a commit writes: rows of many requests, numbers of events
claims      what is done to recipients inside a transaction: claims, verbs, recovery
reader      the thread that reads; also for the queue of a relay that does not run
messages, events, matching
            the questions it answers
contents    large content in files of its own (`files`), `staging` before its commit
api_state   what the HTTP interface keeps beside the queue
tls_sessions
            what reports on TLS count, and which are sent
policies    what is kept of MTA-STS, in a file of its own for all workers
memory      what hosts have shown of TLS, in the same file
schema      tables and migrations
disk        the directory: lock, ballast, opening, translation of errors
adopt       the queue of a worker that does not exist any more
move        messages that leave the queue for another, or come from one

The modules are imported singly: a command that reads a queue needs few of them.
"""
