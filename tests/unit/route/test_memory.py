"""What is remembered of a host, and what is held against it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from relay.mail.memory import (
    DomainMemory,
    DowngradeAlarm,
    HostMemory,
    KeptAlarm,
    Less,
    Run,
    Shown,
    Sighting,
)
from relay.policy.settings import MemoryAction
from relay.route.memory import (
    MOST_HOSTS,
    MemoryOptions,
    Recalled,
    alarm_of,
    held_until,
    is_as_known,
    learned,
    most_of,
    recalled,
    rung,
    without_expired,
    without_host,
)

NONE, ENCRYPTED, VERIFIED = Shown
NOW = datetime(2030, 1, 31, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
KEEP = timedelta(days=90)
MX1, MX2, MX3 = (f"mx{n}.partner.example" for n in (1, 2, 3))


def seen(
    shown: Shown,
    at: datetime = NOW,
    *,
    host: str = MX1,
    most: Shown = VERIFIED,
    messages: int = 1,
    first: datetime | None = None,
    is_old: bool = False,
) -> Sighting:
    return Sighting(host, shown, most, first or at, at, messages, is_old)


def after(*sightings: Sighting, memory: DomainMemory | None = None) -> DomainMemory:
    for sighting in sightings:
        memory = learned(memory, "partner.example", sighting, keep=KEEP)
    assert memory is not None
    return memory


def level(memory: DomainMemory) -> Shown:
    return memory.hosts[MX1].level


def held(
    memory: DomainMemory | None, host: str = MX1, most: Shown = VERIFIED, now: datetime = NOW
) -> Recalled | None:
    return recalled(memory, host, most, keep=KEEP, now=now)


def alarm(before: Shown, now: Shown, host: str = MX1) -> DowngradeAlarm:
    return DowngradeAlarm(before, now, host, NOW)


def ring(
    memory: DomainMemory, before: Shown, now: Shown, at: datetime, *, is_new_host: bool = False
) -> tuple[DomainMemory, bool]:
    return rung(memory, alarm(before, now), is_new_host=is_new_host, now=at)


# --- the levels -----------------------------------------------------------------------------------


def test_levels_are_ordered():
    assert NONE.rank < ENCRYPTED.rank < VERIFIED.rank


def test_options_are_those_of_the_documentation():
    assert MemoryOptions() == MemoryOptions(MemoryAction.LOG, KEEP, DAY)


@pytest.mark.parametrize(
    ("verify", "is_waived", "most"),
    [(True, False, VERIFIED), (False, False, ENCRYPTED), (True, True, NONE), (False, True, NONE)],
)
def test_most_that_can_be_seen_goes_by_the_settings_and_by_tls_required_no(verify, is_waived, most):
    assert most_of(verify=verify, is_waived=is_waived) is most


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", Shown)
def test_first_session_is_remembered_as_it_was(shown):
    memory = after(seen(shown))
    assert memory.domain == "partner.example"
    assert memory.hosts == {MX1: HostMemory(shown, NOW)}
    assert (memory.first, memory.last, memory.alarms) == (NOW, NOW, ())


@pytest.mark.parametrize("before", Shown)
@pytest.mark.parametrize("now", Shown)
def test_best_of_two_sessions_is_remembered(before, now):
    memory = after(seen(before), seen(now, NOW + HOUR))
    assert level(memory) is max(before, now, key=lambda one: one.rank)
    rose = now.rank >= before.rank
    assert memory.hosts[MX1].seen == (NOW + HOUR if rose else NOW)
    assert memory.hosts[MX1].less == (None if rose else Less(now, NOW + HOUR))


def test_skip_verification_shows_encrypted_and_is_no_less_than_verified():
    memory = after(seen(VERIFIED), seen(ENCRYPTED, NOW + HOUR, most=ENCRYPTED))
    assert memory.hosts[MX1] == HostMemory(VERIFIED, NOW)  # and it was not seen again


def test_clear_text_is_less_for_skip_verification_too():
    memory = after(seen(VERIFIED), seen(NONE, NOW + HOUR, most=ENCRYPTED))
    assert memory.hosts[MX1] == HostMemory(VERIFIED, NOW, Less(NONE, NOW + HOUR))


def test_waived_mail_teaches_more_and_never_less():
    memory = after(seen(ENCRYPTED), seen(NONE, NOW + HOUR, most=NONE))
    assert memory.hosts[MX1] == HostMemory(ENCRYPTED, NOW)
    assert level(after(seen(VERIFIED, most=NONE), memory=memory)) is VERIFIED


def test_one_session_with_as_much_ends_the_days_of_less():
    memory = after(seen(VERIFIED), seen(NONE, NOW + DAY), seen(VERIFIED, NOW + 2 * DAY))
    assert memory.hosts[MX1] == HostMemory(VERIFIED, NOW + 2 * DAY)
    assert after(seen(NONE, NOW + 8 * DAY), memory=memory).hosts[MX1].level is VERIFIED


def test_proof_that_is_older_than_less_does_not_end_it():
    memory = after(seen(VERIFIED), seen(NONE, NOW + 2 * HOUR), seen(VERIFIED, NOW + HOUR))
    assert memory.hosts[MX1].less == Less(NONE, NOW + 2 * HOUR)


def test_proof_at_the_very_moment_of_less_ends_it():
    memory = after(seen(VERIFIED), seen(NONE, NOW + HOUR), seen(VERIFIED, NOW + HOUR))
    assert memory.hosts[MX1] == HostMemory(VERIFIED, NOW + HOUR)


def test_time_of_a_sighting_never_goes_back():
    assert after(seen(VERIFIED), seen(VERIFIED, NOW - HOUR)).hosts[MX1].seen == NOW
    assert after(seen(VERIFIED), seen(VERIFIED, NOW - HOUR)).last == NOW


def test_less_for_seven_days_is_what_is_remembered_then():
    memory = after(seen(VERIFIED), seen(NONE, NOW + HOUR))
    almost = after(seen(NONE, NOW + HOUR + 7 * DAY - timedelta(seconds=1)), memory=memory)
    assert almost.hosts[MX1] == HostMemory(VERIFIED, NOW, Less(NONE, NOW + HOUR))
    assert after(seen(NONE, NOW + HOUR + 7 * DAY), memory=memory).hosts[MX1] == HostMemory(
        NONE, NOW + HOUR + 7 * DAY
    )


def test_best_of_the_seven_days_is_what_is_remembered():
    sightings = [seen(VERIFIED), seen(ENCRYPTED, NOW + DAY), seen(NONE, NOW + 9 * DAY)]
    assert after(*sightings).hosts[MX1] == HostMemory(ENCRYPTED, NOW + 9 * DAY)


def test_skip_verification_counts_as_more_in_the_days_of_less():
    sightings = [
        seen(VERIFIED),
        seen(NONE, NOW + DAY),
        seen(ENCRYPTED, NOW + 2 * DAY, most=ENCRYPTED),
    ]
    assert after(*sightings).hosts[MX1] == HostMemory(VERIFIED, NOW, Less(ENCRYPTED, NOW + DAY))


def test_days_of_less_count_from_the_first_of_what_is_told_together():
    memory = after(seen(VERIFIED), seen(NONE, NOW + HOUR, first=NOW + timedelta(minutes=1)))
    assert memory.hosts[MX1].less == Less(NONE, NOW + timedelta(minutes=1))


def test_host_not_seen_for_keep_is_forgotten_and_learned_anew():
    memory = after(seen(VERIFIED), seen(VERIFIED, NOW + DAY, host=MX2))
    later = after(seen(NONE, NOW + KEEP), memory=memory)
    assert later.hosts == {MX1: HostMemory(NONE, NOW + KEEP), MX2: memory.hosts[MX2]}


def test_hosts_of_a_domain_are_bounded_and_the_weakest_go_first():
    memory = after(seen(VERIFIED, NOW - DAY), seen(ENCRYPTED, host=MX2))
    for number in range(MOST_HOSTS):
        at = NOW + timedelta(minutes=number)
        memory = after(seen(NONE, at, host=f"forged{number}.example"), memory=memory)
    assert len(memory.hosts) == MOST_HOSTS == 64
    assert {MX1, MX2, f"forged{MOST_HOSTS - 1}.example"} <= set(memory.hosts)
    assert not {"forged0.example", "forged1.example"} & set(memory.hosts)
    assert "forged2.example" in memory.hosts


def test_a_new_host_is_remembered_however_many_are_known():
    memory = None
    for number in range(MOST_HOSTS):
        memory = after(seen(VERIFIED, host=f"mx{number}.example"), memory=memory)
    assert MX1 in after(seen(NONE), memory=memory).hosts


# --- runs of messages -----------------------------------------------------------------------------


def test_messages_are_counted_from_the_first():
    start = NOW - HOUR
    memory = after(seen(VERIFIED, messages=3, first=start), seen(VERIFIED, NOW + HOUR, messages=2))
    assert memory.in_full == memory.in_tls == Run(5, start)
    assert (memory.first, memory.last) == (start, NOW + HOUR)


@pytest.mark.parametrize(
    ("shown", "most", "in_tls", "in_full"),
    [
        (VERIFIED, VERIFIED, True, True),
        (ENCRYPTED, VERIFIED, True, False),
        (NONE, VERIFIED, False, False),
        (ENCRYPTED, ENCRYPTED, True, True),
        (NONE, ENCRYPTED, False, False),
        (VERIFIED, NONE, True, True),
    ],
)
def test_a_run_ends_with_mail_that_had_less_than_its_settings_let_it_have(
    shown, most, in_tls, in_full
):
    memory = after(seen(VERIFIED), seen(shown, NOW + HOUR, most=most))
    ended = Run(0, NOW + HOUR)
    assert memory.in_tls == (Run(2, NOW) if in_tls else ended)
    assert memory.in_full == (Run(2, NOW) if in_full else ended)


@pytest.mark.parametrize(
    ("shown", "most", "goes_on"),
    [(VERIFIED, VERIFIED, False), (ENCRYPTED, ENCRYPTED, False), (ENCRYPTED, NONE, True)],
)
def test_a_run_ends_with_tls_that_is_too_old_to_require(shown, most, goes_on):
    memory = after(seen(VERIFIED), seen(shown, NOW + HOUR, most=most, is_old=True))
    expected = Run(1, NOW) if goes_on else Run(0, NOW + HOUR)
    assert memory.in_tls == memory.in_full == expected
    assert level(memory) is VERIFIED


@pytest.mark.parametrize(("shown", "in_tls"), [(NONE, 1), (ENCRYPTED, 2)])
def test_waived_mail_with_less_neither_counts_as_verified_nor_is_an_exception(shown, in_tls):
    memory = after(seen(VERIFIED), seen(shown, NOW + HOUR, most=NONE))
    assert (memory.in_tls, memory.in_full) == (Run(in_tls, NOW), Run(1, NOW))
    assert after(seen(shown, most=NONE)).in_full == Run(0, NOW)


# --- what is held against a host ------------------------------------------------------------------


@pytest.mark.parametrize("remembered", Shown)
@pytest.mark.parametrize("most", Shown)
def test_a_known_host_is_held_to_what_it_has_shown_as_far_as_the_message_looks(remembered, most):
    memory = after(seen(remembered, NOW - HOUR))
    before = min(remembered, most, key=lambda one: one.rank)
    expected = None if before is NONE else Recalled(before, MX1, NOW - HOUR, False)
    assert held(memory, most=most) == expected


def test_nothing_is_held_where_nothing_is_known():
    assert held(None) is None
    assert held(after(seen(VERIFIED, NOW - KEEP))) is None


def test_a_host_seen_within_keep_is_known():
    assert held(after(seen(VERIFIED, NOW - KEEP + HOUR))) is not None


def test_a_new_host_is_held_to_the_least_that_every_known_one_has_shown():
    memory = after(
        seen(VERIFIED, NOW - HOUR), seen(ENCRYPTED, NOW - DAY, host=MX2), seen(VERIFIED, host=MX3)
    )
    assert held(memory, "new.example") == Recalled(ENCRYPTED, MX2, NOW - DAY, True)
    assert held(memory, MX2) == Recalled(ENCRYPTED, MX2, NOW - DAY, False)
    assert held(after(seen(NONE, host=MX2), memory=memory), "new.example") is not None  # MX2: less
    assert held(after(seen(NONE, host="bad.example"), memory=memory), "new.example") is None


def test_latest_of_equal_hosts_is_named_then_the_first_by_name():
    memory = after(seen(VERIFIED, NOW - DAY, host=MX1), seen(VERIFIED, NOW - HOUR, host=MX2))
    found = held(memory, "new.example")
    assert found is not None
    assert found.host == MX2
    found = held(after(seen(VERIFIED, host=MX2), seen(VERIFIED)), "new.example")
    assert found is not None
    assert found.host == MX1


@pytest.mark.parametrize("before", [ENCRYPTED, VERIFIED])
@pytest.mark.parametrize("now", Shown)
def test_an_alarm_is_less_than_before(before, now):
    found = Recalled(before, MX1, NOW, False)
    rings = now.rank < before.rank
    assert alarm_of(found, now) == (alarm(before, now) if rings else None)


def test_no_alarm_where_nothing_is_held():
    assert alarm_of(None, NONE) is None


# --- alarms ---------------------------------------------------------------------------------------


def test_an_alarm_is_told_at_once_and_once_a_day():
    memory, told = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW + HOUR)
    assert told
    assert memory.alarms == (KeptAlarm(MX1, VERIFIED, NONE, False, NOW + HOUR, NOW + HOUR),)
    same, told = ring(memory, VERIFIED, NONE, NOW + HOUR + DAY - timedelta(seconds=1))
    assert (same is memory, told) == (True, False)
    again, told = ring(memory, VERIFIED, NONE, NOW + HOUR + DAY)
    assert told
    assert again.alarms == (KeptAlarm(MX1, VERIFIED, NONE, False, NOW + HOUR, NOW + HOUR + DAY),)


def test_another_host_and_other_levels_are_other_alarms():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    for before, now in ((VERIFIED, ENCRYPTED), (ENCRYPTED, NONE)):
        memory, told = ring(memory, before, now, NOW)
        assert told
    memory, told = rung(memory, alarm(VERIFIED, NONE, MX2), is_new_host=False, now=NOW)
    assert told
    assert len(memory.alarms) == 4


def test_alarm_about_a_new_host_is_the_same_alarm_with_a_wait_of_its_own():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    memory, told = ring(memory, VERIFIED, NONE, NOW + HOUR, is_new_host=True)
    assert not told
    assert memory.alarms == (
        KeptAlarm(MX1, VERIFIED, NONE, False, NOW, NOW),
        KeptAlarm(MX1, VERIFIED, NONE, True, NOW + HOUR, NOW),
    )
    memory, told = ring(memory, VERIFIED, NONE, NOW + DAY)
    assert told
    same, told = ring(memory, VERIFIED, NONE, NOW + DAY + HOUR, is_new_host=True)
    assert (same is memory, told) == (True, False)


def test_an_alarm_that_ended_and_rings_again_is_not_told_twice_a_day():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW + HOUR)
    memory = after(seen(VERIFIED, NOW + 2 * HOUR), memory=memory)
    assert memory.alarms == (KeptAlarm(MX1, VERIFIED, NONE, False, None, NOW + HOUR),)
    memory, told = ring(memory, VERIFIED, NONE, NOW + 3 * HOUR)
    assert not told
    assert memory.alarms == (KeptAlarm(MX1, VERIFIED, NONE, False, NOW + 3 * HOUR, NOW + HOUR),)


def test_proof_ends_the_alarms_it_answers():
    memory = after(seen(VERIFIED))
    for before, now in ((VERIFIED, NONE), (VERIFIED, ENCRYPTED), (ENCRYPTED, NONE)):
        memory, _ = ring(memory, before, now, NOW)
    memory, _ = rung(memory, alarm(VERIFIED, NONE), is_new_host=True, now=NOW)

    def open_after(sighting: Sighting) -> list[tuple[Shown, Shown, bool]]:
        found = after(sighting, memory=memory).alarms
        return [(one.before, one.now, one.is_new_host) for one in found if one.first is not None]

    assert open_after(seen(VERIFIED)) == []
    encrypted = seen(ENCRYPTED, most=ENCRYPTED)
    of_verified = [(VERIFIED, NONE, False), (VERIFIED, ENCRYPTED, False), (VERIFIED, NONE, True)]
    assert open_after(encrypted) == of_verified
    by_another = open_after(seen(VERIFIED, host=MX2))
    assert by_another == [*of_verified[:2], (ENCRYPTED, NONE, False)]
    assert len(open_after(seen(VERIFIED, NOW - HOUR))) == 4  # proof of before the alarm


def test_an_alarm_that_ended_is_kept_for_the_day_it_was_told():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    memory = after(seen(VERIFIED, NOW + HOUR), memory=memory)
    assert len(after(seen(VERIFIED, NOW + DAY - HOUR), memory=memory).alarms) == 1
    assert after(seen(VERIFIED, NOW + DAY), memory=memory).alarms == ()


def test_an_alarm_under_way_is_kept_for_longer_than_a_day():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    assert len(after(seen(NONE, NOW + 3 * DAY), memory=memory).alarms) == 1


def test_alarms_go_with_the_level_they_are_about():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    memory, _ = ring(memory, ENCRYPTED, NONE, NOW + 8 * DAY)
    sightings = [seen(ENCRYPTED, NOW + HOUR), seen(NONE, NOW + HOUR + 7 * DAY)]
    after_days = after(*sightings, memory=memory)
    assert level(after_days) is ENCRYPTED
    assert [one.before for one in after_days.alarms] == [ENCRYPTED]


def test_alarms_go_with_a_host_that_is_forgotten():
    memory, _ = ring(
        after(seen(VERIFIED), seen(VERIFIED, NOW + DAY, host=MX2)), VERIFIED, NONE, NOW
    )
    assert without_expired(memory, keep=KEEP, now=NOW + KEEP - HOUR) is memory
    later = without_expired(memory, keep=KEEP, now=NOW + KEEP)
    assert (list(later.hosts), later.alarms) == ([MX2], ())
    memory, _ = rung(memory, alarm(VERIFIED, NONE, MX2), is_new_host=False, now=NOW)
    later = without_expired(memory, keep=KEEP, now=NOW + KEEP)
    assert [one.host for one in later.alarms] == [MX2]


# --- the wait -------------------------------------------------------------------------------------


def until(memory: DomainMemory, now: datetime, most: Shown = VERIFIED, host: str = MX1):
    found = held(memory, host, most, now)
    assert found is not None
    return held_until(memory, found, defer_for=DAY, now=now)


def test_wait_begins_with_the_first_alarm_and_ends_after_defer_for():
    memory = after(seen(VERIFIED))
    assert until(memory, NOW + HOUR) == NOW + HOUR + DAY  # it would last from now
    memory, _ = ring(memory, VERIFIED, ENCRYPTED, NOW + HOUR)
    memory, _ = ring(memory, VERIFIED, NONE, NOW + 2 * HOUR)
    assert until(memory, NOW + 3 * HOUR) == NOW + HOUR + DAY
    assert until(memory, NOW + HOUR + DAY - timedelta(seconds=1)) is not None
    assert until(memory, NOW + HOUR + DAY) is None


def test_proof_ends_the_wait_and_the_next_alarm_begins_another():
    memory, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    memory = after(seen(VERIFIED, NOW + 2 * DAY), memory=memory)
    assert until(memory, NOW + 3 * DAY) == NOW + 4 * DAY
    memory, _ = ring(memory, VERIFIED, NONE, NOW + 3 * DAY)
    assert until(memory, NOW + 3 * DAY + HOUR) == NOW + 4 * DAY


def test_wait_is_for_one_host_one_level_and_known_or_new():
    memory, _ = ring(after(seen(VERIFIED), seen(VERIFIED, host=MX2)), VERIFIED, NONE, NOW)
    later = NOW + 2 * DAY
    assert until(memory, later) is None
    assert until(memory, later, ENCRYPTED) == later + DAY
    assert until(memory, later, host=MX2) == later + DAY
    assert until(memory, later, host="new.example") == later + DAY


# --- what need not be written at once -------------------------------------------------------------


def test_more_of_the_same_changes_only_numbers():
    assert is_as_known(after(seen(VERIFIED)), MX1, VERIFIED)
    assert not is_as_known(after(seen(VERIFIED)), MX1, ENCRYPTED)
    assert not is_as_known(after(seen(ENCRYPTED)), MX1, VERIFIED)
    assert not is_as_known(after(seen(VERIFIED)), MX2, VERIFIED)
    in_days_of_less = after(seen(VERIFIED), seen(NONE, NOW + HOUR))
    assert not is_as_known(in_days_of_less, MX1, VERIFIED)
    alarmed, _ = ring(after(seen(VERIFIED)), VERIFIED, NONE, NOW)
    assert not is_as_known(alarmed, MX1, VERIFIED)
    ended = replace(alarmed, alarms=(replace(alarmed.alarms[0], first=None),))
    assert is_as_known(ended, MX1, VERIFIED)


def test_sightings_of_one_kind_are_joined():
    assert seen(VERIFIED, is_old=True).joined(seen(VERIFIED, is_old=True)).is_old
    one = seen(VERIFIED, NOW, first=NOW - HOUR, messages=3)
    other = seen(VERIFIED, NOW + HOUR, first=NOW + timedelta(minutes=1), messages=2)
    expected = seen(VERIFIED, NOW + HOUR, first=NOW - HOUR, messages=5)
    assert one.joined(other) == other.joined(one) == expected


def test_sighting_grows_with_each_message():
    one = seen(VERIFIED, NOW)
    one.again(NOW + HOUR)
    one.again(NOW + timedelta(minutes=1))
    assert one == seen(VERIFIED, NOW + HOUR, first=NOW, messages=3)


def test_one_host_is_forgotten_with_its_alarms_and_the_last_with_the_domain():
    memory, _ = ring(after(seen(VERIFIED), seen(VERIFIED, host=MX2)), VERIFIED, NONE, NOW)
    memory, _ = rung(memory, alarm(VERIFIED, NONE, MX2), is_new_host=False, now=NOW)
    left = without_host(memory, MX1)
    assert left is not None
    assert list(left.hosts) == [MX2]
    assert [one.host for one in left.alarms] == [MX2]
    assert without_host(left, MX2) is None
    assert without_host(left, MX3) == left
    assert without_host(None, MX1) is None
