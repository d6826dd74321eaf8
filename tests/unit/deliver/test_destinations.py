"""How many connections a destination gets, by how it treats them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from relay.deliver.destinations import Destinations, Use, turns_away
from relay.deliver.diagnosis import Answer, Stage
from relay.mail.outcome import Code, Deferred
from relay.mail.reply import Reply
from relay.queue.retry import RetrySchedule

HOST = "[192.0.2.1]:25"
SILENCE = Deferred("4.4.1", Code.NO_CONNECTION, "", "mx.example [192.0.2.1]: timed out")


class World:
    """Destinations, and a clock that the test moves."""

    def __init__(self, most: int = 20) -> None:
        self.now = 1000.0
        self.count = 0
        self.known = Destinations(
            most, RetrySchedule(waits=(timedelta(minutes=5),)), clock=lambda: self.now
        )

    def begin(self, *, is_connected: bool = False) -> Use | None:
        self.count += 1
        use = self.known.begin(HOST, (f"Q{self.count}", "b.example"))
        if use is not None:
            use.is_connected = is_connected
        return use

    def uses(self, count: int, *, is_connected: bool = False) -> list[Use]:
        uses = [self.begin(is_connected=is_connected) for _ in range(count)]
        return [use for use in uses if use is not None]

    def serve(self, count: int, seconds: float = 0.0) -> None:
        for _ in range(count):
            use = self.begin(is_connected=True)
            assert use is not None
            self.now += seconds
            self.known.served(use)
            self.known.end(use)

    def room(self) -> int:
        uses = self.uses(30)
        for use in uses:
            self.known.end(use)
        return len(uses)


@pytest.fixture
def world() -> World:
    return World()


def test_a_new_destination_gets_five_connections_and_one_more_for_each_message(world):
    assert world.room() == 5
    world.serve(3)
    assert world.room() == 8
    world.serve(100)
    assert world.room() == 20


@pytest.mark.parametrize(("stand", "half"), [(8, 4), (3, 2), (2, 1), (1, 1)])
def test_a_destination_that_turns_away_gets_half_of_those_that_stand(world, stand, half):
    world.serve(10)
    *standing, last = world.uses(stand + 1, is_connected=True)
    last.is_connected = False
    assert world.known.turned_away(last, kept=0)
    for use in [*standing, last]:
        world.known.end(use)
    assert world.room() == half


def test_a_narrowed_destination_gets_one_more_for_every_twenty_messages(world):
    first, second = world.uses(2, is_connected=True)
    world.known.turned_away(second, kept=0)
    for use in (first, second):
        world.known.end(use)
    world.serve(19)
    assert world.room() == 1
    world.serve(1)
    assert world.room() == 2
    world.serve(20)
    assert world.room() == 3


def test_a_destination_that_turns_away_the_only_connection_rests_and_is_worth_no_waiting(world):
    [use] = world.uses(1)
    assert not world.known.turned_away(use, kept=0)
    world.known.end(use)
    assert world.room() == 0
    world.now += 5.1
    assert world.room() == 1


def test_destination_that_has_just_served_is_worth_waiting_for(world):
    world.serve(1)
    [use] = world.uses(1)
    assert world.known.turned_away(use, kept=0)
    world.known.end(use)
    assert world.room() == 0


def test_a_destination_without_a_greeting_is_left_alone_then_tried_once(world):
    [use] = world.uses(1)
    world.now += 30
    assert not world.known.unreached(use, 0, SILENCE)
    world.known.end(use)
    assert world.room() == 0
    told = world.known.silence_of(HOST)
    assert told is not None
    assert told.description.startswith("not tried, it gave no answer 0:00:00 ago: mx.example")
    world.now += 301
    assert world.known.silence_of(HOST) is None
    assert world.room() == 1
    world.serve(1)
    assert world.room() == 6


def test_connections_that_began_together_are_one_silence(world):
    uses = world.uses(5)
    world.now += 30
    for use in uses:
        assert not world.known.unreached(use, 0, SILENCE)
        world.known.end(use)
    assert uses[0].destination.silences == 1


def test_a_refused_connection_beside_one_that_stands_was_turned_away(world):
    standing, use = world.uses(2, is_connected=True)
    use.is_connected = False
    assert world.known.unreached(use, 0, SILENCE)
    world.known.end(use)
    world.known.end(standing)
    [alone] = world.uses(1)
    assert world.known.unreached(alone, 1, SILENCE), "an idle connection stands"


def test_last_of_several_refused_connections_shows_silence(world):
    one, other = world.uses(2)
    assert world.known.unreached(one, 0, SILENCE)
    world.known.end(one)
    assert not world.known.unreached(other, 0, SILENCE)


def test_a_connection_that_was_reserved_is_had_once(world):
    holder = ("Q1", "b.example")
    use = world.known.reserve(["[192.0.2.7]:25", HOST], holder)
    assert use is world.known.begin("[192.0.2.7]:25", holder)
    world.known.end(use)
    world.known.end(use)
    assert not use.destination.uses


def test_end_of_a_connection_reports_room(world):
    told: list[str] = []
    world.known.on_room = told.append
    for use in world.uses(2):
        world.known.end(use)
    assert told == [HOST, HOST]


def test_entries_wait_in_memory_only_if_they_have_a_connection_soon(world):
    world.serve(20, seconds=0.01)
    assert world.known.patience(HOST) == 200
    world.uses(5)
    world.now += 60
    assert world.known.patience(HOST) == 20, "it hangs: those that take the next connections"


def test_entries_turned_away_return_one_after_the_other_within_two_minutes(world):
    world.uses(5)
    world.now += 10
    turns = [world.known.next_turn(HOST) for _ in range(200)]
    assert turns[0] >= 1
    assert turns == sorted(turns)
    assert turns[100] <= 5, "a host that becomes faster does not idle for long"
    assert turns[199] == pytest.approx(10, abs=1)
    assert max(world.known.next_turn(HOST) for _ in range(3000)) == 120


def test_entries_return_as_fast_as_all_connections_of_a_slow_host_take_them():
    """It has got five, and would have four hundred before the last of them returned."""
    world = World(most=1000)
    world.serve(3, seconds=1.2)
    world.uses(5)
    turns = [world.known.next_turn(HOST) for _ in range(3000)]
    assert max(turns) == pytest.approx(5)
    world.known.turned_away(world.uses(1)[0], kept=0)
    assert max(world.known.next_turn(HOST) for _ in range(3000)) == 120, "it has enough of them"


def test_entries_for_many_destinations_return_less_often(world):
    names = [f"[192.0.2.{n}]:25" for n in range(50)]
    for name in names:
        world.known.begin(name, ("Q", "b.example"))
    world.now += 10
    turns = [world.known.next_turn(name) for _ in range(20) for name in names]
    assert max(turns[:100]) <= 5
    assert min(turns[-50:]) > 15


def test_a_destination_is_stuck_that_deals_with_no_message_for_seconds(world):
    assert not world.known.is_stuck(HOST)
    world.uses(2)
    assert not world.known.is_stuck(HOST)
    world.now += 6
    assert world.known.is_stuck(HOST)
    world.serve(1)
    assert not world.known.is_stuck(HOST)


def test_memory_for_destinations_is_bounded_and_those_in_use_stay(world):
    [use] = world.uses(1)
    for n in range(10_010):
        other = world.known.begin(f"[2001:db8::{n:x}]:25", ("Q", "d.example"))
        assert other is not None
        world.known.end(other)
    assert len(world.known._known) == 10_000
    assert world.known.begin(HOST, use.holder) is use


@pytest.mark.parametrize(
    ("stage", "code", "text", "is_load"),
    [
        (Stage.GREETING, 421, "4.7.0 come back later", True),
        (Stage.EHLO, 421, "too busy", True),
        (Stage.MAIL, 421, "closing", True),
        (Stage.MAIL, 451, "4.7.1 rate limit exceeded", True),
        (Stage.MAIL, 452, "4.3.2 too many connections", True),
        (Stage.MAIL, 432, "4.3.2 Concurrent connections limit exceeded", True),
        (Stage.MAIL, 454, "Throttling failure: Maximum sending rate exceeded", True),
        (Stage.GREETING, 450, "too many connections", True),
        (Stage.EHLO, 450, "too many connections", True),
        (Stage.MAIL, 550, "5.7.1 too many connections", False),
        (Stage.MAIL, 450, "4.7.1 Session encryption is required", False),
        (Stage.STARTTLS, 454, "4.7.0 too many sessions", False),
        (Stage.MAIL, 451, "4.3.0 local trouble", False),
        (Stage.MAIL, 451, "4.3.0 cannot operate", False),
        (Stage.MAIL, 452, "4.3.1 insufficient system storage", False),
        (Stage.AUTH, 421, "4.7.0 Maximum number of connections from user+IP exceeded", True),
        (Stage.AUTH, 432, "4.3.2 Concurrent connections limit exceeded", True),
        (Stage.AUTH, 454, "4.7.0 too many failed attempts", False),
        (Stage.AUTH, 421, "4.7.0 Too many login failures", False),
        (Stage.AUTH, 454, "4.7.0 Temporary authentication failure", False),
        (Stage.AUTH, 535, "5.7.8 too many sessions", False),
        (Stage.RCPT, 421, "4.7.0 too many connections", False),
        (Stage.GREETING, 554, "5.7.1 too many connections", False),
    ],
)
def test_only_some_replies_turn_a_connection_away(stage, code, text, is_load):
    assert turns_away(Answer(stage, Reply(code, "", text))) is is_load
