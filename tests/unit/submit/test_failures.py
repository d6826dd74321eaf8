"""How often a password may be wrong, and what is looked at after that."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from relay.submit.failures import Failures, client_key
from relay.workers.shared_counters import SharedCounters

NOW = datetime(2026, 11, 20, tzinfo=UTC)
CLIENT, OTHER = "192.0.2.1", "192.0.2.2"


def guess(failures: Failures, name: str, times: int) -> None:
    for _ in range(times):
        assert not failures.must_wait(CLIENT, name, NOW)
        failures.count(CLIENT, name, NOW)


def test_ten_wrong_passwords_of_a_name_are_too_many_for_this_name_at_this_client_alone() -> None:
    failures = Failures()
    guess(failures, "app1", 10)
    assert failures.must_wait(CLIENT, "app1", NOW)
    assert not failures.must_wait(CLIENT, "app2", NOW)
    assert not failures.must_wait(OTHER, "app1", NOW)
    assert not failures.must_wait(CLIENT, "app1", NOW + timedelta(minutes=10))


def test_thirty_wrong_passwords_are_too_many_for_a_client_whatever_the_names() -> None:
    failures = Failures()
    for number in range(30):
        guess(failures, f"name{number}", 1)
    assert failures.must_wait(CLIENT, "app1", NOW)
    assert not failures.must_wait(OTHER, "app1", NOW)


def test_a_right_password_is_not_counted_and_forgives_no_wrong_one() -> None:
    """Who has one right password of a client's, or waits for its owner, gets no more guesses."""
    failures = Failures()
    guess(failures, "app1", 9)
    for _ in range(20):
        failures.count(CLIENT, "app1", NOW)
        failures.take_back(CLIENT, "app1")
    guess(failures, "app1", 1)
    assert failures.must_wait(CLIENT, "app1", NOW)


def test_new_password_and_a_repeated_one_each_have_a_turn_for_a_name_that_must_wait() -> None:
    failures = Failures()
    guess(failures, "app1", 10)

    def has_turn(mark: bytes, seconds: int, name: str = "app1") -> bool:
        return failures.has_turn(CLIENT, name, mark, NOW + timedelta(seconds=seconds))

    assert not has_turn(b"right", 1), "the last guess was just now"
    assert not has_turn(b"guess", 1)
    assert has_turn(b"right", 2), "it comes again"
    assert not has_turn(b"guess", 3), "it comes again, but the turn is taken"
    assert has_turn(b"new", 10)
    assert not has_turn(b"newer", 19)
    assert has_turn(b"newer", 20)
    assert has_turn(b"x", 10, "app2"), "each name has its own"


def test_wrong_password_that_is_repeated_for_ever_takes_no_turn_of_others() -> None:
    """An application with an old password, beside one that has just been given the new one."""
    failures = Failures()
    guess(failures, "app1", 10)

    def looked_at(mark: bytes, seconds: int) -> bool:
        now = NOW + timedelta(seconds=seconds)
        if not failures.has_turn(CLIENT, "app1", mark, now):
            return False
        failures.count(CLIENT, "app1", now)
        return True

    assert [second for second in range(1, 300) if looked_at(b"old", second)] == [2]
    assert looked_at(b"right", 300)
    assert not looked_at(b"old", 590)
    assert looked_at(b"old", 602)


def test_workers_count_wrong_passwords_together() -> None:
    board = SharedCounters(3)
    one, other, third = (Failures(elsewhere=board.row(number)) for number in range(3))
    for failures in (one, other, third, one, other, third, one, other, third, one):
        assert not one.must_wait(CLIENT, "app1", NOW)
        failures.count(CLIENT, "app1", NOW)
    assert all(each.must_wait(CLIENT, "app1", NOW) for each in (one, other, third))
    assert not other.must_wait(OTHER, "app1", NOW)
    board.clear(0)  # a worker that ended has not been forgotten
    assert other.must_wait(CLIENT, "app1", NOW)
    one.take_back(CLIENT, "app1")
    assert not other.must_wait(CLIENT, "app1", NOW)
    one.count(CLIENT, "app1", NOW)
    assert other.must_wait(CLIENT, "app1", NOW)
    assert not other.must_wait(CLIENT, "app1", NOW + timedelta(minutes=11))


def test_no_more_clients_are_remembered_than_there_is_room_for() -> None:
    failures = Failures(remembered=10)
    for number in range(100):
        failures.count(f"192.0.2.{number}", "x", NOW)
    assert not failures.has_failed("192.0.2.89", NOW)
    assert failures.has_failed("192.0.2.99", NOW)


def test_a_network_of_ipv6_is_one_client() -> None:
    assert client_key("2001:db8::1") == client_key("2001:db8::ffff") != client_key("2001:db8:0:1::")
