"""The queue in PostgreSQL, shared by several nodes.

address      `queue.url`
connection   connections to the primary, and what errors mean
store        the `Store` itself
lease        who is alive; the fencing of claims
commit       the one connection that writes: batches, and commits of unknown outcome
statements   what a commit writes
claims       what is done to recipients inside a transaction: claims, verbs
staging      large content before its message
reader       what is read; `messages`, `events`, `statistics`, `destinations`, `matching` are the
             questions
api_state    what the HTTP interface keeps beside the queue
tls_sessions what reports on TLS count, and which are sent
policies     MTA-STS policies, and what hosts have shown of TLS
schema       tables and migrations
"""

from relay.queue.postgres.address import ServerAddress, parse_url
from relay.queue.postgres.connection import NoServer, Server, StartRefused
from relay.queue.postgres.lease import NodeOptions
from relay.queue.postgres.store import PostgresStore

__all__ = [
    "NoServer",
    "NodeOptions",
    "PostgresStore",
    "Server",
    "ServerAddress",
    "StartRefused",
    "parse_url",
]
