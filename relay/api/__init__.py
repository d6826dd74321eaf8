"""The HTTP interface: Mailgun's, so far as a relay can have it, and the operator's own.

    entrance    the listening socket: how many get in, TLS
    server      what every request goes through
    keys        who may ask
    rate        how fast clients without a right key are answered
    origin      whether a page of another site asks
    bodies      a request's body: its size, its pace, and what all hold together
    forms       what a body says: `formparser` reads it as it comes
    endpoints   every path with what it takes and answers: routes and OpenAPI both come from there
    sending     messages
    domains     settings of sender domains
    events      the delivery log
    webhooks    who wants to be told; `caller` tells them, where `targets` allows
    operator    the operator's verbs, under /relay/v1/
    openapi     the description, made from the endpoints

What a form means, and what the message is that it makes, is decided beside this package, in
`relay.api.mailgun*`.
"""

from relay.api.caller import Caller
from relay.api.server import CONNECTIONS, HAS_KEY, HttpError, HttpServer, start_http
from relay.api.state import Api, HttpOptions
from relay.api.targets import Targets

__all__ = [
    "CONNECTIONS",
    "HAS_KEY",
    "Api",
    "Caller",
    "HttpError",
    "HttpOptions",
    "HttpServer",
    "Targets",
    "start_http",
]
