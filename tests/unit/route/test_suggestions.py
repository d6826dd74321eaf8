"""Rules that the mail of before would have met."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from relay.mail.memory import DomainMemory, HostMemory, KeptAlarm, Run, Shown
from relay.route.suggestions import Reason, Suggestion, suggested

NONE, ENCRYPTED, VERIFIED = Shown
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
DAY = timedelta(days=1)
SINCE = NOW - 30 * DAY
MX1, MX2 = "mx1.partner.example", "mx2.partner.example"


def memory(*levels: Shown, in_tls: int = 412, in_full: int = 412) -> DomainMemory:
    hosts = {
        f"mx{number}.partner.example": HostMemory(level, NOW)
        for number, level in enumerate(levels, start=1)
    }
    return DomainMemory(
        "partner.example", SINCE, NOW, Run(in_tls, SINCE), Run(in_full, SINCE), hosts
    )


def look(memory: DomainMemory, *, messages: int = 10, age: timedelta = 7 * DAY):
    return suggested(memory, keep=90 * DAY, messages=messages, age=age, now=NOW)


def rule(*, skip: bool, hosts: tuple[str, ...] = (MX1,), messages: int = 412) -> Suggestion:
    return Suggestion("partner.example", skip, messages, SINCE, NOW, hosts)


def test_domain_all_of_whose_mail_was_verified_can_require_it():
    assert look(memory(VERIFIED)) == rule(skip=False)
    assert look(memory(VERIFIED, VERIFIED)) == rule(skip=False, hosts=(MX1, MX2))


@pytest.mark.parametrize("levels", [(ENCRYPTED,), (VERIFIED, ENCRYPTED)])
def test_domain_all_of_whose_mail_went_in_tls_can_require_tls(levels):
    hosts = (MX1, MX2)[: len(levels)]
    assert look(memory(*levels, in_full=3)) == rule(skip=True, hosts=hosts)
    assert look(memory(*levels)) == rule(skip=True, hosts=hosts)  # mail that looks at nothing


def test_domain_whose_mail_is_verified_for_a_short_time_keeps_what_was_in_tls():
    assert look(memory(VERIFIED, in_full=3)) == rule(skip=True)


@pytest.mark.parametrize("levels", [(NONE,), (VERIFIED, NONE), (ENCRYPTED, NONE)])
def test_domain_with_a_host_in_clear_can_require_nothing(levels):
    assert look(memory(*levels)) is Reason.CLEAR


def test_domain_whose_last_message_went_in_clear_can_require_nothing():
    assert look(memory(VERIFIED, in_tls=0, in_full=0)) is Reason.CLEAR


@pytest.mark.parametrize(("messages", "enough"), [(412, True), (413, False)])
def test_few_messages_are_nothing_to_go_by(messages, enough):
    for level, skip in ((VERIFIED, False), (ENCRYPTED, True)):
        found = look(memory(level), messages=messages)
        assert found == (rule(skip=skip) if enough else Reason.FEW)


@pytest.mark.parametrize(("age", "enough"), [(30 * DAY, True), (31 * DAY, False)])
def test_a_short_time_is_nothing_to_go_by(age, enough):
    for level, skip in ((VERIFIED, False), (ENCRYPTED, True)):
        assert look(memory(level), age=age) == (rule(skip=skip) if enough else Reason.FEW)


def test_rule_counts_the_messages_that_prove_it():
    found = look(memory(ENCRYPTED, in_tls=50, in_full=20))
    assert found == rule(skip=True, messages=50)
    assert look(memory(VERIFIED, in_tls=50, in_full=20)) == rule(skip=False, messages=20)


def test_alarm_under_way_is_no_time_for_a_rule():
    kept = KeptAlarm(MX1, VERIFIED, NONE, False, NOW, NOW)
    assert look(replace(memory(VERIFIED), alarms=(kept,))) is Reason.ALARM
    ended = replace(kept, first=None)
    assert look(replace(memory(VERIFIED), alarms=(ended,))) == rule(skip=False)
    of_another = replace(kept, host="gone.example")
    assert look(replace(memory(VERIFIED), alarms=(of_another,))) == rule(skip=False)


def test_hosts_that_are_forgotten_do_not_count():
    old = replace(memory(VERIFIED, NONE))
    hosts = {**old.hosts, MX2: HostMemory(NONE, NOW - 90 * DAY)}
    assert look(replace(old, hosts=hosts)) == rule(skip=False)


def test_domain_without_a_known_host_is_nothing_to_go_by():
    assert look(memory()) is Reason.FEW
