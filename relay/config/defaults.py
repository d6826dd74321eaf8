"""Defaults that give way to the keys a file has: a default never contradicts what somebody wrote.

A file that says `queue: {lifetime: 2h}` and nothing else is right, although the default of
`warn_after` is four hours. Where the file has both keys, `consider` judges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from relay.config.sections import Config
from relay.route.security import TlsVersion

IsGiven = Callable[[str], bool]
"""Whether a key stands in the file or in the environment."""


def adapted(config: Config, is_given: IsGiven) -> Config:
    """The configuration with each default in accord with the keys that are given."""
    for adapt in (_with_queue, _with_concurrency, _with_limits, _with_tls, _with_sockets):
        config = adapt(config, is_given)
    return config


def _with_sockets(config: Config, is_given: IsGiven) -> Config:
    """A group that a socket is given to may use it."""
    return replace(
        config,
        listeners=tuple(
            replace(one, socket_mode="0660")
            if one.socket_group is not None and not is_given(f"listeners.{i}.socket_mode")
            else one
            for i, one in enumerate(config.listeners)
        ),
    )


def _with_queue(config: Config, is_given: IsGiven) -> Config:
    """A delay is reported no later than after half of the lifetime."""
    queue = config.queue
    if queue.warn_after is None or is_given("queue.warn_after"):
        return config
    return replace(
        config, queue=replace(queue, warn_after=min(queue.warn_after, queue.lifetime / 2))
    )


def _with_concurrency(config: Config, is_given: IsGiven) -> Config:
    """Each worker has a connection to a destination, and a destination no more than there are."""
    delivery = config.delivery
    total, each = delivery.concurrency, delivery.concurrency_per_destination
    if not is_given("delivery.concurrency_per_destination"):
        each = max(min(each, total), config.workers)
    if not is_given("delivery.concurrency"):
        total = max(total, each)
    return replace(
        config, delivery=replace(delivery, concurrency=total, concurrency_per_destination=each)
    )


def _with_limits(config: Config, is_given: IsGiven) -> Config:
    """A client has no more connections than all have, and may be silent no longer than a
    transaction lasts.
    """
    limits = config.limits
    if not is_given("limits.connections_per_client"):
        each = min(limits.connections_per_client, limits.connections)
        limits = replace(limits, connections_per_client=each)
    if not is_given("limits.connections"):
        total = max(limits.connections, limits.connections_per_client)
        limits = replace(limits, connections=total)
    if not is_given("limits.idle"):
        limits = replace(limits, idle=min(limits.idle, limits.transaction))
    if not is_given("limits.transaction"):
        limits = replace(limits, transaction=max(limits.transaction, limits.idle))
    return replace(config, limits=limits)


def _with_tls(config: Config, is_given: IsGiven) -> Config:
    """TLS that is required is never older than TLS that is not."""
    tls, versions = config.tls, list(TlsVersion)
    if not is_given("tls.opportunistic_min_version"):
        oldest = min(tls.opportunistic_min_version, tls.min_version, key=versions.index)
        tls = replace(tls, opportunistic_min_version=oldest)
    if not is_given("tls.min_version"):
        newest = max(tls.min_version, tls.opportunistic_min_version, key=versions.index)
        tls = replace(tls, min_version=newest)
    return replace(config, tls=tls)
