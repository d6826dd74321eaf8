"""The budget of open files: connections give way before queue and log do."""

from __future__ import annotations

import resource

import pytest

from relay.daemon.files import budget, files_needed, raise_limit


def test_where_there_is_room_everybody_gets_what_was_asked() -> None:
    files = budget(2400, clients=1000, deliveries=200, queries=100)
    assert (files.clients, files.deliveries, files.queries, files.is_short) == (
        1000,
        200,
        100,
        False,
    )


@pytest.mark.parametrize("limit", [1024, 256, 100])
def test_where_there_is_not_all_give_way_in_proportion(limit: int) -> None:
    files = budget(limit, clients=1000, deliveries=200, queries=100, http=256)
    assert files.is_short
    assert min(files.clients, files.deliveries, files.queries, files.http) >= 1
    taken = {"clients": files.clients, "deliveries": files.deliveries, "queries": files.queries}
    assert files_needed(**taken, http=files.http) <= limit
    assert files.clients >= files.deliveries >= files.queries


def test_what_is_not_served_gets_no_share() -> None:
    assert budget(100, clients=1000, deliveries=200, queries=100).http == 0


def test_the_soft_limit_is_raised_as_far_as_the_hard_one_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert raise_limit(600) == 600
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        assert raise_limit(100) == 600, "never lowered"
        if hard != resource.RLIM_INFINITY:
            assert raise_limit(hard + 1) == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
