"""What a command needs to ask a token server as the running relay does."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.tls import TlsContexts
    from relay.deliver.tokens import TokenClient
    from relay.route.credentials import RouteCredentials
    from relay.route.dns import DnsResolver
    from relay.route.router import Router

__all__ = ["Asking", "asking"]


@dataclass(frozen=True, slots=True)
class Asking:
    """The client of token servers, and what else connects by the rules of the configuration."""

    client: TokenClient
    contexts: TlsContexts
    resolver: DnsResolver
    config: Config

    def router(self, logins: RouteCredentials | None = None) -> Router:
        """A router with these logins."""
        from relay.config.parts import route_options
        from relay.route.router import Router

        options = route_options(self.config)
        return Router(self.resolver, options, hostname=self.config.hostname, credentials=logins)


@asynccontextmanager
async def asking(config: Config) -> AsyncIterator[Asking]:
    """Everything is closed at the end."""
    from relay.config.parts import resolver_options, route_options
    from relay.daemon.tokens import make_token_client
    from relay.deliver.tls import TlsContexts
    from relay.route.dns import DnsResolver
    from relay.route.router import Router

    logging.getLogger("relay").addHandler(logging.NullHandler())  # the answer has the same facts
    resolver = DnsResolver(resolver_options(config))
    contexts = TlsContexts(config.tls.ca_file)
    judge = Router(resolver, route_options(config), hostname=config.hostname).judge
    client = make_token_client(lambda: config, resolver=resolver, judge=judge, contexts=contexts)
    try:
        yield Asking(client, contexts, resolver, config)
    finally:
        await resolver.close()
