"""The MTA-STS policies of a configuration: who fetches them, and by which rules.

For a relay, and for the commands that ask as a relay would (`cli`), which keep nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime

from relay.config import Config
from relay.deliver.https import HttpsClient
from relay.deliver.sts_fetch import AT_ONCE, PolicyFetcher
from relay.deliver.sts_policies import OnFetch, StsPolicies
from relay.deliver.tls import TlsContexts
from relay.queue.policies import PolicyCache
from relay.route.answers import Resolver
from relay.route.router import Router


def make_policies(
    config: Config,
    cache: PolicyCache,
    *,
    resolver: Resolver,
    router: Router,
    contexts: TlsContexts,
    clock: Callable[[], datetime],
    at_once: int = AT_ONCE,
    on_fetch: OnFetch = lambda domain, found, before: None,
) -> StsPolicies:
    """Policy hosts are under the same rules as mail hosts: roots, versions of TLS, addresses."""
    https = HttpsClient(
        resolver,
        judge=router.judge,
        context=lambda: contexts.verifying(config.tls.min_version),
        timeout=config.delivery.timeouts.policy_fetch,
        at_once=at_once,
    )
    fetch = PolicyFetcher(https).fetch
    return StsPolicies(
        resolver, cache, fetch, clock=clock, random=random.SystemRandom(), on_fetch=on_fetch
    )
