"""The HTTP interface: Mailgun's, as far as a relay can have it, and the operator's.

    entrance    the listening socket: limits of connections, TLS
    server      the checks of every request
    keys        the API keys
    rate        how fast clients without a right key get answers
    origin      whether a page of another site sends a request
    bodies      the body of a request: its size, its pace, the memory of all bodies
    forms       the fields of a body; `formparser` reads them as they come
    endpoints   every path with its parameters and answers, for routes and OpenAPI
    sending     messages
    domains     settings of sender domains
    events      the delivery log
    webhooks    the webhooks of a domain; `caller` makes the calls, `targets` says where to
    operator    the operator's verbs, under /relay/v1/
    openapi     the description, made from the endpoints

The modules `mailgun*` decide what a form means and make its message. They are pure.
"""

from relay.api.caller import Caller
from relay.api.entrance import HttpError
from relay.api.server import CONNECTIONS, HAS_KEY, HttpServer, start_http
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
