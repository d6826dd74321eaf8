"""The budget of open files: connections give way before queue and log do."""

from __future__ import annotations

import resource

import pytest

from relay.daemon.files import budget, files_needed, raise_limit


def test_shares_are_as_configured_where_files_are_enough() -> None:
    files = budget(2600, clients=1000, deliveries=200, queries=100)
    assert (files.clients, files.deliveries, files.queries, files.is_short) == (
        1000,
        200,
        100,
        False,
    )


@pytest.mark.parametrize("limit", [1024, 256, 100])
def test_shares_shrink_in_proportion_where_files_are_few(limit: int) -> None:
    files = budget(limit, clients=1000, deliveries=200, queries=100, http=256)
    assert files.is_short
    assert min(files.clients, files.deliveries, files.queries, files.http) >= 1
    taken = {"clients": files.clients, "deliveries": files.deliveries, "queries": files.queries}
    assert files_needed(**taken, http=files.http) <= limit
    assert files.clients >= files.deliveries >= files.queries


def test_service_that_is_off_gets_no_share_of_the_files() -> None:
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
