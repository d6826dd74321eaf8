"""The operator's verbs for MTA-STS policies, over the control socket's requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from relay.admin.control import Control
from relay.admin.operator import Operator
from relay.admin.requests import RequestError
from relay.deliver.sts_fetch import Fetched, FetchFailed
from relay.deliver.sts_policies import StsPolicies
from relay.queue.sqlite.policies import SqlitePolicyCache
from relay.queue.store import Store
from relay.route.mta_sts import PolicyError, parse_policy
from relay.sandbox.policy_host import policy
from tests.fakes.dns import FakeDns

NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
TEXT = policy("mx.example.net", "*.example.net")
FAILURE = FetchFailed(PolicyError.FETCH, "mta-sts.example.net answers with status 500")


class Rig:
    def __init__(self, cache: SqlitePolicyCache) -> None:
        self.answer: Fetched | FetchFailed = Fetched(parse_policy(TEXT), TEXT)
        names = ("example.net", "b.example")
        dns = FakeDns(texts={f"_mta-sts.{name}": [b"v=STSv1; id=1;"] for name in names})
        self.policies = StsPolicies(dns, cache, self._fetch, clock=lambda: NOW)
        nothing = cast(Store, None)
        self.control = Control(Operator(nothing, lambda: NOW), policies=self.policies)

    async def _fetch(self, domain: str) -> Fetched | FetchFailed:
        return self.answer

    async def ask(self, verb: str, domain: str = "") -> list[dict[str, Any]]:
        request = {"verb": f"mta-sts-{verb}", "domain": domain}
        return [line async for line in self.control.answer(request)]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    cache = await SqlitePolicyCache.open(tmp_path)
    yield Rig(cache)
    await cache.close()


async def test_a_policy_is_shown_with_its_times(rig: Rig) -> None:
    await rig.policies.floor("example.net")
    item, done = await rig.ask("show", "Example.NET.")
    refresh_at = item["item"].pop("refresh-at")
    assert "2030-02-01T00:00:00+00:00" <= refresh_at <= "2030-02-01T12:00:00+00:00"
    assert item["item"] == {
        "domain": "example.net",
        "mode": "enforce",
        "id": "1",
        "mx": ["mx.example.net", "*.example.net"],
        "max-age": 604800,
        "fetched": "2030-01-31T12:00:00+00:00",
        "expires": "2030-02-07T12:00:00+00:00",
        "policy": TEXT.decode().splitlines(),
    }
    assert done == {"done": {"unknown": [], "reason": ""}}


async def test_policies_are_listed_by_domain_however_many(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("example.net", "b.example"):
        await rig.policies.floor(name)
    page = rig.policies.page
    monkeypatch.setattr(rig.policies, "page", lambda after: page(after=after, limit=1))
    lines = await rig.ask("list")
    domains = [item["domain"] for line in lines for item in line.get("items", ())]
    assert domains == ["b.example", "example.net"]
    assert lines[-1] == {"done": {}}


async def test_policy_is_refreshed_or_the_answer_has_the_reason(rig: Rig) -> None:
    item, done = await rig.ask("refresh", "example.net")
    assert item["item"]["domain"] == "example.net"
    assert done["done"]["reason"] == ""
    rig.answer = FAILURE
    item, done = await rig.ask("refresh", "example.net")
    assert item["item"]["id"] == "1"  # in force all the same
    assert done["done"]["reason"] == FAILURE.reason
    assert await rig.ask("refresh", "b.example") == [
        {"done": {"unknown": ["b.example"], "reason": FAILURE.reason}}
    ]


async def test_a_policy_is_forgotten_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await rig.policies.floor("example.net")
    assert await rig.ask("forget", "example.net") == [{"done": {"unknown": [], "reason": ""}}]
    for verb in ("forget", "show"):
        assert await rig.ask(verb, "example.net") == [
            {"done": {"unknown": ["example.net"], "reason": ""}}
        ]
    told = [record.getMessage() for record in caplog.records if "operator" in record.getMessage()]
    assert told == ["operator: the MTA-STS policy of example.net is forgotten"]


async def test_a_policy_that_could_not_be_fetched_is_shown_with_the_reason(rig: Rig) -> None:
    rig.answer = FAILURE
    await rig.policies.floor("example.net")
    assert await rig.ask("show", "example.net") == [
        {"done": {"unknown": ["example.net"], "reason": FAILURE.reason}}
    ]


@pytest.mark.parametrize("domain", ["", "[192.0.2.1]", "a b"])
async def test_address_literal_has_no_mta_sts_policy(rig: Rig, domain: str) -> None:
    with pytest.raises(RequestError):
        await rig.ask("show", domain)
