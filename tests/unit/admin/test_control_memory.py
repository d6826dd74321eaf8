"""The operator's verbs for what hosts have shown before, over the control socket's requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from relay.admin.control import Control
from relay.admin.operator import Operator
from relay.admin.requests import RequestError
from relay.deliver.memory import DowngradeMemory
from relay.mail.memory import DowngradeAlarm, Shown
from relay.queue.sqlite.memory import SqliteMemory
from relay.queue.store import Store
from relay.route.memory import MemoryOptions

NONE, ENCRYPTED, VERIFIED = Shown
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)
MX1, MX2 = "mx1.partner.example", "mx2.partner.example"


class Rig:
    def __init__(self, store: SqliteMemory) -> None:
        self.now = NOW
        self.memory = DowngradeMemory(store, MemoryOptions, clock=lambda: self.now)
        operator = Operator(cast(Store, None), lambda: self.now)
        self.control = Control(operator, memory=self.memory)

    def learn(
        self, domain: str, host: str, shown: Shown, at: datetime = NOW, messages: int = 1
    ) -> None:
        """So many messages, the first of several 30 days before the others."""
        times = [at - 30 * DAY] * (messages > 1)
        before = self.now
        for self.now in times + [at] * (messages - len(times)):
            self.memory.learn(domain, host, shown, VERIFIED)
        self.now = before

    async def ask(self, verb: str, **filters: Any) -> list[dict[str, Any]]:
        request = {"verb": f"memory-{verb}", **filters}
        return [line async for line in self.control.answer(request)]

    async def listed(self, **filters: Any) -> dict[str, list[str]]:
        """The hosts that are listed, by domain."""
        items = [
            item for line in await self.ask("list", **filters) for item in line.get("items", ())
        ]
        return {item["domain"]: [host["host"] for host in item["hosts"]] for item in items}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    store = await SqliteMemory.open(tmp_path)
    rig = Rig(store)
    rig.learn("partner.example", MX1, VERIFIED)
    rig.learn("partner.example", MX2, ENCRYPTED)
    rig.learn("other.example", "mx.other.example", NONE)
    alarm = DowngradeAlarm(VERIFIED, NONE, MX1, NOW)
    await rig.memory.ring("partner.example", alarm, host=MX1)
    yield rig
    await store.close()


async def test_all_that_is_remembered_is_listed(rig: Rig) -> None:
    rig.now = NOW + timedelta(hours=1)
    rig.learn("partner.example", MX1, NONE, rig.now)
    at, later = "2030-01-31T12:00:00+00:00", "2030-01-31T13:00:00+00:00"
    items, done = await rig.ask("list", domain="Partner.Example.")
    assert items == {
        "items": [
            {
                "domain": "partner.example",
                "first": at,
                "last": later,
                "in-tls": {"messages": 0, "since": later},
                "in-full": {"messages": 0, "since": later},
                "hosts": [
                    {
                        "host": MX1,
                        "level": "verified",
                        "seen": at,
                        "less": "none",
                        "less-since": later,
                    },
                    {
                        "host": MX2,
                        "level": "encrypted",
                        "seen": at,
                        "less": None,
                        "less-since": None,
                    },
                ],
                "alarms": [
                    {
                        "host": MX1,
                        "before": "verified",
                        "now": "none",
                        "by": "host",
                        "first": at,
                        "told": at,
                    }
                ],
            }
        ]
    }
    assert done == {"done": {}}


@pytest.mark.parametrize(
    ("filters", "hosts"),
    [
        ({}, {"other.example": ["mx.other.example"], "partner.example": [MX1, MX2]}),
        ({"domain": "partner.example"}, {"partner.example": [MX1, MX2]}),
        ({"domain": "nobody.example"}, {}),
        ({"host": MX2}, {"partner.example": [MX2]}),
        ({"level": "none"}, {"other.example": ["mx.other.example"]}),
        ({"level": "verified", "host": MX2}, {}),
        ({"alarm": True}, {"partner.example": [MX1]}),
    ],
)
async def test_only_the_hosts_that_a_filter_selects_are_forgotten(
    rig: Rig, filters: dict[str, Any], hosts: dict[str, list[str]]
) -> None:
    every = await rig.listed()
    assert await rig.listed(**filters) == hosts
    everything = {"all": True} if not filters else {}
    assert await rig.ask("forget", **filters, **everything) == [{"done": {"domains": len(hosts)}}]
    left = {
        domain: [name for name in names if name not in hosts.get(domain, ())]
        for domain, names in every.items()
    }
    assert await rig.listed() == {domain: names for domain, names in left.items() if names}


@pytest.mark.parametrize(
    ("verb", "filters", "said"),
    [
        ("forget", {}, "forget what"),
        ("forget", {"domain": ""}, "domain is empty"),
        ("forget", {"host": " "}, "host is empty"),
        ("forget", {"all": True, "domain": "a.example"}, "forget what"),
        ("forget", {"all": False}, "all is true"),
        ("forget", {"alarm": False}, "alarm is true"),
        ("forget", {"sender": "a@b.example"}, "no such filter: sender"),
        ("list", {"level": "clear"}, "no such level: clear; known are none, encrypted, verified"),
        ("list", {"domain": "a b"}, "domain"),
        ("list", {"all": True}, "no such filter: all"),
        ("suggest", {"messages": "x"}, "messages is a number"),
        ("suggest", {"seconds": -1}, "seconds is a number"),
        ("suggest", {"domain": "a.example"}, "no such filter"),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused_and_nothing_is_forgotten(
    rig: Rig, verb: str, filters: dict[str, Any], said: str
) -> None:
    before = await rig.listed()
    with pytest.raises(RequestError, match=said):
        await rig.ask(verb, **filters)
    assert await rig.listed() == before


async def test_memory_that_is_too_old_is_not_listed(rig: Rig) -> None:
    rig.now = NOW + timedelta(days=90)
    assert await rig.listed() == {}
    assert await rig.ask("suggest") == [{"done": {}}]


async def test_domain_is_forgotten_whose_row_cannot_be_read(rig: Rig) -> None:
    await rig.memory.write()
    store = cast(SqliteMemory, rig.memory._store)
    sql = "UPDATE memory SET data = 'x' WHERE domain = 'other.example'"
    await store._on_thread(lambda db: db.execute(sql))
    assert await rig.ask("forget", domain="other.example") == [{"done": {"domains": 1}}]
    assert list(await rig.listed()) == ["partner.example"]


async def test_rules_are_suggested_and_the_reasons_why_others_are_not(rig: Rig) -> None:
    rig.learn("good.example", "mx.good.example", VERIFIED, messages=412)
    rig.learn("fair.example", "mx.fair.example", ENCRYPTED, messages=20)
    rig.learn("new.example", "mx.new.example", VERIFIED)
    *items, done = await rig.ask("suggest")
    assert done == {"done": {}}
    assert [line["item"] for line in items] == [
        {
            "domain": "fair.example",
            "rule": {"require_tls": True, "skip_verification": True},
            "messages": 20,
            "first": "2030-01-01T12:00:00+00:00",
            "last": "2030-01-31T12:00:00+00:00",
            "hosts": ["mx.fair.example"],
        },
        {
            "domain": "good.example",
            "rule": {"require_tls": True},
            "messages": 412,
            "first": "2030-01-01T12:00:00+00:00",
            "last": "2030-01-31T12:00:00+00:00",
            "hosts": ["mx.good.example"],
        },
        {"domain": "new.example", "reason": "too-few"},
        {"domain": "other.example", "reason": "in-clear"},
        {"domain": "partner.example", "reason": "alarm"},
    ]
    items = await rig.ask("suggest", messages=1, seconds=0)
    assert {"item": {"domain": "new.example", "reason": "too-few"}} not in items


async def test_memory_cannot_be_changed_without_a_running_relay() -> None:
    control = Control(Operator(cast(Store, None), lambda: NOW))
    with pytest.raises(RequestError, match="no relay is running"):
        [line async for line in control.answer({"verb": "memory-list"})]
