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
    from relay.route.dns import DnsResolver


@dataclass(frozen=True, slots=True)
class Asking:
    """The client of token servers, and what else connects by the rules of the configuration."""

    client: TokenClient
    contexts: TlsContexts
    resolver: DnsResolver


@asynccontextmanager
async def asking(config: Config) -> AsyncIterator[Asking]:
    """Everything is closed at the end."""
    from relay.cli.routing import make_router
    from relay.config.parts import resolver_options
    from relay.daemon.tokens import make_token_client
    from relay.deliver.tls import TlsContexts
    from relay.route.dns import DnsResolver

    logging.getLogger("relay").addHandler(logging.NullHandler())  # the answer has the same facts
    resolver = DnsResolver(resolver_options(config))
    contexts = TlsContexts(config.tls.ca_file)
    judge = make_router(config, resolver).judge
    client = make_token_client(lambda: config, resolver=resolver, judge=judge, contexts=contexts)
    try:
        yield Asking(client, contexts, resolver)
    finally:
        await resolver.close()
