"""The queue in PostgreSQL, shared by several nodes.

connection   connections to the primary, and what errors mean
store        the `Store` itself
lease        who is alive; the fencing of claims; `leftovers` is what a lease that is over leaves,
             `nodes` the list for the operator
commit       the writer: which requests make a batch, and what becomes of them in trouble
transaction  the one connection that writes: transactions, and whether one was committed
statements   what a commit writes; `inserts` are its large statements, `plain` is the commit of most
             mail in one of them, `late_results` what becomes of results whose claim is lost
claims       what is done to recipients inside a transaction: claims, verbs
node_claims  what this node has claimed, and what it does not know of
staging      large content before its message
reader       what is read; `messages`, `events`, `statistics`, `destinations`, `matching` are the
             questions
api_state    what the HTTP interface keeps beside the queue
tls_sessions what reports on TLS count, and which are sent
policies     MTA-STS policies, and what hosts have shown of TLS
move         messages that leave the queue for another, or come from one
schema       tables and migrations
partitions   the days of the table of events
look_around  what a node looks at once a second: work, settings and nodes that are new
watching     what a node tells of the database: transactions, dead rows, standbys
"""

from relay.queue.postgres.connection import NoServer, Server, StartRefused
from relay.queue.postgres.lease import NodeOptions
from relay.queue.postgres.move import PostgresMove
from relay.queue.postgres.policies import PoliciesToRead, PostgresMemory, PostgresPolicyCache
from relay.queue.postgres.reader import Reader
from relay.queue.postgres.schema import describe
from relay.queue.postgres.store import PostgresStore
from relay.queue.server_address import ServerAddress, parse_url

__all__ = [
    "NoServer",
    "NodeOptions",
    "PoliciesToRead",
    "PostgresMemory",
    "PostgresMove",
    "PostgresPolicyCache",
    "PostgresStore",
    "Reader",
    "Server",
    "ServerAddress",
    "StartRefused",
    "describe",
    "parse_url",
]
