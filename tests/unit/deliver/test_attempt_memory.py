"""What hosts have shown before, against what real mail hosts offer now.

3 levels remembered × 8 kinds of host × 4 settings × log, defer, ignore
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.deliver.memory import DowngradeMemory
from relay.mail.memory import DowngradeAlarm, HostMemory, Shown, Sighting
from relay.mail.outcome import Deferred, Delivered, Outcome
from relay.policy.rules import DestinationRule, PolicyRules
from relay.policy.settings import MemoryAction
from relay.queue.sqlite.memory import SqliteMemory
from relay.route.memory import MemoryOptions, learned
from relay.route.next_hop import Hosts, Naming
from relay.route.security import OnUnverified
from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.fakes.floors import Published, floors_of
from tests.fakes.mail import CONTENT, entry
from tests.unit.deliver.test_attempt_floors import (
    HOSTS,
    NAME,
    SETTINGS,
    Expected,
    Met,
    by_settings,
    key_record,
    named,
    sent_in_clear,
    tlsa,
)

NONE, ENCRYPTED, VERIFIED = Shown
LOG, DEFER, IGNORE = MemoryAction.LOG, MemoryAction.DEFER, MemoryAction.IGNORE
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
STRIPPED = Script(starttls=StartTls.ABSENT)


class World:
    """The store, the memory over it, a clock, and what is told."""

    def __init__(self, rig: Any, store: SqliteMemory) -> None:
        self.rig = rig
        self.store = store
        self.options = MemoryOptions()
        self.now = NOW
        self.seconds = 100.0
        self.told: list[DowngradeAlarm] = []
        self.memory = DowngradeMemory(
            store,
            lambda: self.options,
            clock=lambda: self.now,
            monotonic=lambda: self.seconds,
            on_alarm=self.told.append,
        )
        self.use()

    def use(self, rules: PolicyRules | None = None, published: Published | None = None) -> None:
        floors = floors_of(published or Published(), rules)
        floors._memory = self.memory
        self.rig.floors = floors

    def act(self, action: MemoryAction, **options: Any) -> None:
        self.options = replace(self.options, action=action, **options)

    async def seed(self, shown: Shown, host: str = NAME, *, at: datetime = NOW - HOUR) -> None:
        sighting = Sighting(host, shown, VERIFIED, at, at)
        await self.store.change(
            {"dest.example": lambda m: learned(m, "dest.example", sighting, keep=90 * DAY)}
        )

    async def hosts(self) -> dict[str, HostMemory]:
        await self.memory.write()
        found = await self.store.memory("dest.example")
        return dict(found.hosts) if found is not None else {}

    async def send(self, **message: Any) -> Outcome:
        outcome: Outcome = await self.rig.send(entry(**message))
        return outcome


@pytest.fixture
async def world(rig, tmp_path: Path) -> AsyncIterator[World]:
    store = await SqliteMemory.open(tmp_path)
    yield World(rig, store)
    await store.close()


def alarm_in(outcome: Outcome) -> DowngradeAlarm | None:
    policy = outcome.session.policy if outcome.session is not None else outcome.policy
    assert policy is not None
    return policy.memory


def level_of(expected: Expected) -> Shown:
    return VERIFIED if expected.by else ENCRYPTED if expected.tls else NONE


def lesser(one: Shown, other: Shown) -> Shown:
    return min(one, other, key=lambda level: level.rank)


@dataclass(frozen=True)
class Held:
    """What has to come of a message: as without memory, with `alarm` or not, or held."""

    expected: Expected
    alarm: tuple[Shown, Shown] | None = None


def held(met: Met, remembered: Shown, settings: tuple[bool, bool], action: MemoryAction) -> Held:
    """The rule of the documentation, told a second time."""
    plain = by_settings(met, *settings)
    before = lesser(remembered, ENCRYPTED if settings[1] else VERIFIED)
    now = level_of(plain)
    if plain.status or action is IGNORE or now.rank >= before.rank:
        return Held(plain)
    if action is LOG:
        return Held(plain, (before, now))
    if met.kind is None:
        return Held(Expected(met.unmet), (before, now))
    if before is ENCRYPTED:
        return Held(Expected())  # its TLS is as good as before: mail does not go in clear
    return Held(Expected("4.7.5"), (before, now))


@pytest.mark.parametrize("action", [LOG, DEFER, IGNORE])
@pytest.mark.parametrize(("require", "skip"), SETTINGS)
@pytest.mark.parametrize("met", HOSTS, ids=named)
@pytest.mark.parametrize("remembered", Shown)
async def test_tls_offered_now_is_compared_with_tls_shown_before(
    rig, world: World, remembered: Shown, met: Met, require: bool, skip: bool, action: MemoryAction
):
    await world.seed(remembered)
    world.act(action)
    mx = await rig.mx(met.script)
    outcome = await world.send(require=require, skip=skip)
    rule = held(met, remembered, (require, skip), action)
    alarm = alarm_in(outcome)
    assert (None if alarm is None else (alarm.before, alarm.now)) == rule.alarm
    assert world.told == ([alarm] if alarm else [])
    if alarm is not None:
        assert (alarm.host, alarm.since) == (NAME, NOW - HOUR)
    if rule.expected.status:
        assert isinstance(outcome, Deferred)
        assert (outcome.status, outcome.tls_unmet) == (rule.expected.status, True)
        assert not any(verb in sent_in_clear(mx) for verb in (b"MAIL", b"RCPT", b"DATA"))
        assert mx.messages == []
    else:
        assert isinstance(outcome, Delivered)
        (message,) = mx.messages
        assert (message.in_tls, message.content) == (rule.expected.tls, CONTENT)
        assert outcome.session is not None
        assert outcome.session.verified_by == rule.expected.by
    known = (await world.hosts())[NAME]
    now = level_of(rule.expected)
    most = ENCRYPTED if skip else VERIFIED
    if rule.expected.status or action is IGNORE:
        assert known == HostMemory(remembered, NOW - HOUR)
    else:
        assert known.level is max(remembered, now, key=lambda level: level.rank)
        is_less = now.rank < lesser(remembered, most).rank
        assert (known.less is not None) == is_less


# --- the wait -------------------------------------------------------------------------------------


async def test_stripped_mail_waits_for_a_day_and_then_goes_with_the_alarm(rig, world: World):
    await world.seed(VERIFIED)
    world.act(DEFER)
    mx = await rig.mx(STRIPPED)
    outcome = await world.send()
    assert outcome.status == "4.7.4"
    assert outcome.description == (
        "mx1.dest.example [127.0.1.1]: STARTTLS not offered; it has shown verified TLS before "
        "(last at 2030-01-31T11:00:00+00:00), so mail waits until 2030-02-01T12:00:00+00:00 "
        "(downgrade_memory.action: defer); if less is meant: relay memory forget dest.example"
    )
    world.now += DAY - timedelta(seconds=1)
    assert (await world.send()).status == "4.7.4"
    assert sent_in_clear(mx).count(b"MAIL") == 0
    world.now += timedelta(seconds=1)
    outcome = await world.send()
    assert isinstance(outcome, Delivered)
    assert alarm_in(outcome) == DowngradeAlarm(VERIFIED, NONE, NAME, NOW - HOUR)
    assert len(world.told) == 2  # at once, and a day later


async def test_proof_during_the_wait_ends_it(rig, world: World):
    await world.seed(VERIFIED)
    world.act(DEFER)
    await rig.mx(STRIPPED, Script(), STRIPPED)
    rig.limits = replace(rig.limits, messages=1)
    assert (await world.send()).status == "4.7.4"
    world.now += HOUR
    assert isinstance(await world.send(), Delivered)
    assert (await world.hosts())[NAME] == HostMemory(VERIFIED, world.now)
    world.now += DAY
    assert (await world.send()).status == "4.7.4"


async def test_mail_goes_to_the_next_host_that_shows_as_much_as_before(rig, world: World):
    world.act(DEFER)
    first, second = await rig.mx(STRIPPED), await rig.mx()
    await world.seed(VERIFIED)
    await world.seed(VERIFIED, second.name)
    outcome = await world.send()
    assert isinstance(outcome, Delivered)
    assert (len(first.messages), len(second.messages)) == (0, 1)
    assert any("it has shown verified TLS before" in line for line in outcome.hosts)
    assert [one.host for one in world.told] == [NAME]


async def test_new_host_is_held_to_what_every_known_host_has_shown(rig, world: World):
    await world.seed(VERIFIED, "old1.dest.example")
    await world.seed(ENCRYPTED, "old2.dest.example")
    world.act(DEFER)
    mx = await rig.mx(STRIPPED)
    outcome = await world.send()
    assert outcome.status == "4.7.4"
    assert "every known host (old2.dest.example) has shown TLS before" in outcome.description
    assert alarm_in(outcome) == DowngradeAlarm(ENCRYPTED, NONE, "old2.dest.example", NOW - HOUR)
    assert mx.messages == []
    world.act(LOG)
    assert isinstance(await world.send(), Delivered)
    assert (await world.hosts())[NAME] == HostMemory(NONE, NOW)
    assert alarm_in(await world.send()) is None  # known by now


async def test_first_host_of_a_domain_is_held_to_nothing(rig, world: World):
    world.act(DEFER)
    await rig.mx(STRIPPED)
    outcome = await world.send()
    assert isinstance(outcome, Delivered)
    assert alarm_in(outcome) is None


# --- who is held, and who is not ------------------------------------------------------------------


async def test_tls_required_no_is_not_held_and_teaches_nothing_less(rig, world: World):
    await world.seed(VERIFIED)
    world.act(DEFER)
    await rig.mx(STRIPPED)
    outcome = await world.send(tls_required_no=True)
    assert isinstance(outcome, Delivered)
    assert alarm_in(outcome) is None
    assert (await world.hosts())[NAME] == HostMemory(VERIFIED, NOW - HOUR)


@pytest.mark.parametrize(
    ("action", "rule", "status"),
    [
        (DEFER, IGNORE, "2.0.0"),
        (DEFER, LOG, "2.0.0"),
        (LOG, DEFER, "4.7.4"),
        (IGNORE, DEFER, "4.7.4"),
    ],
)
async def test_rule_for_the_domain_beats_the_action_for_all(
    rig, world: World, action, rule, status
):
    await world.seed(VERIFIED)
    world.act(action)
    world.use(PolicyRules(destinations={"dest.example": DestinationRule(downgrade_memory=rule)}))
    await rig.mx(STRIPPED)
    outcome = await world.send()
    assert outcome.status == status
    assert (alarm_in(outcome) is None) == (rule is IGNORE)


async def test_route_of_the_operators_is_neither_held_nor_remembered(
    rig, world: World, monkeypatch
):
    await world.seed(VERIFIED)
    world.act(DEFER)
    await rig.mx(STRIPPED)

    async def route(*_: str) -> Hosts:
        return Hosts(tuple(rig.hosts), naming=Naming(is_secure=True, route_host=NAME))

    monkeypatch.setattr(type(rig), "route", property(lambda _: route))
    outcome = await world.send()
    assert isinstance(outcome, Delivered)
    assert alarm_in(outcome) is None
    assert (await world.hosts())[NAME] == HostMemory(VERIFIED, NOW - HOUR)


async def test_old_tls_that_was_good_enough_before_still_is(rig, world: World):
    world.act(DEFER)
    await rig.mx(TLS_1_0_ONLY)
    for _ in range(2):
        outcome = await world.send(skip=True)
        assert isinstance(outcome, Delivered)
        assert outcome.session is not None
        assert outcome.session.tls_version == "TLSv1"
    assert (await world.hosts())[NAME].level is ENCRYPTED
    kept = await world.store.memory("dest.example")
    assert kept is not None
    assert kept.in_tls.messages == 0  # with require_tls it would not have gone


async def test_unverified_tls_that_was_kept_before_is_kept_under_defer(rig, world: World):
    world.act(DEFER)
    rig.delivery["on_unverified"] = OnUnverified.ENCRYPTED
    await rig.mx(Script(certificate=Kind.EXPIRED))
    for _ in range(2):
        outcome = await world.send()
        assert isinstance(outcome, Delivered)
        assert outcome.session is not None
        assert outcome.session.tls
    assert (await world.hosts())[NAME].level is ENCRYPTED
    assert world.told == []


async def test_host_verified_by_dane_is_remembered_as_verified(rig, world: World):
    mx = await rig.mx(Script(certificate=Kind.SELF_SIGNED), tlsa_bases=(NAME,))
    published = Published({f"_{mx.port}._tcp.{NAME}": tlsa(key_record(rig, Kind.SELF_SIGNED))})
    world.use(published=published)
    world.act(DEFER)
    assert isinstance(await world.send(), Delivered)
    assert (await world.hosts())[NAME].level is VERIFIED
    published.tlsa.clear()
    outcome = await world.send()
    assert outcome.status == "4.7.5"  # whoever hides the records gains nothing for a day
    assert alarm_in(outcome) == DowngradeAlarm(VERIFIED, NONE, NAME, NOW)


async def test_kept_connection_rings_for_each_domain_by_its_own_memory(rig, world: World):
    """A host in clear, whose connection is kept, is known to one domain only."""
    mx = await rig.mx(STRIPPED)
    assert isinstance(await world.send(), Delivered)
    sighting = Sighting(NAME, VERIFIED, VERIFIED, NOW, NOW)
    await world.store.change(
        {"other.example": lambda m: learned(m, "other.example", sighting, keep=90 * DAY)}
    )
    outcome = await rig.send(entry("bob@other.example"))
    assert alarm_in(outcome) == DowngradeAlarm(VERIFIED, NONE, NAME, NOW)
    assert len(mx.connections) == 1
    world.act(DEFER)
    assert (await rig.send(entry("bob@other.example"))).status == "4.7.4"
    assert len(mx.connections) == 2


async def test_nothing_is_learned_of_a_session_that_carried_no_mail(rig, world: World):
    await rig.mx(Script(replies={"RCPT": "550 5.1.1 no such user"}))
    await world.send()
    assert await world.hosts() == {}


# --- alarms ---------------------------------------------------------------------------------------


async def test_alarm_is_told_once_a_day_and_noted_in_each_line(rig, world: World, caplog):
    caplog.set_level(logging.WARNING, "relay.deliver.memory")
    await world.seed(VERIFIED)
    await rig.mx(STRIPPED)
    for _ in range(3):
        assert alarm_in(await world.send()) is not None
        world.now += HOUR
    assert caplog.messages == [
        "TLS downgrade: mail for dest.example: mx1.dest.example has no TLS now, and it has shown "
        "verified TLS before (last at 2030-01-31T11:00:00+00:00): "
        "docs/tls.md, When there is an alarm"
    ]
    world.now += DAY
    await world.send()
    assert len(caplog.messages) == 2


async def test_alarm_rings_when_the_store_is_in_trouble(rig, world: World, caplog):
    await world.seed(VERIFIED)
    await rig.mx(STRIPPED)
    await world.memory.known("dest.example")
    await world.store._on_thread(lambda db: db.execute("PRAGMA query_only = 1"))
    for _ in range(2):
        outcome = await world.send()
        assert isinstance(outcome, Delivered)
        assert alarm_in(outcome) is not None
    assert len(world.told) == 1
    assert any("cannot be looked up or kept" in line for line in caplog.messages)
    await world.store._on_thread(lambda db: db.execute("PRAGMA query_only = 0"))
    assert (await world.hosts())[NAME].less is not None  # learned all the same


async def test_hosts_that_never_had_tls_cost_no_alarm(rig, world: World):
    mx: MxServer = await rig.mx(STRIPPED)
    for _ in range(3):
        assert alarm_in(await world.send()) is None
    assert len(mx.messages) == 3
    assert (await world.hosts())[NAME] == HostMemory(NONE, NOW)
