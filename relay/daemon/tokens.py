"""Who asks the token servers of a configuration, and by which rules.

For a relay, and for the commands that ask as a relay would (`cli`).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from relay.config import Config
from relay.deliver.https import HttpsClient
from relay.deliver.tls import TlsContexts
from relay.deliver.tokens import REQUEST_SECONDS, TokenClient
from relay.route.addresses import Rejection
from relay.route.answers import Resolver

_AT_ONCE = 20


def make_token_client(
    config: Callable[[], Config],
    *,
    resolver: Resolver,
    judge: Callable[[str, int], Rejection | None],
    contexts: TlsContexts,
) -> TokenClient:
    """Token servers are under the same rules as mail hosts: roots, versions of TLS, addresses."""
    https = HttpsClient(
        resolver,
        judge=judge,
        context=lambda: contexts.verifying(config().tls.min_version),
        timeout=timedelta(seconds=REQUEST_SECONDS),
        at_once=_AT_ONCE,
        port=0,
        dead_for=timedelta(0),  # `oauth2.pause_after` says when a server is asked again
    )
    return TokenClient(https)
