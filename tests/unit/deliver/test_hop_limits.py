"""The limits of next hops, kept by several workers over one table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from relay.deliver.hop_limits import CELLS, CELLS_OF_A_WORKER, Cells, HopLimits
from relay.queue.division import share
from relay.route.next_hop import NextHop, Rate


class Shared:
    """A table of several workers in one process."""

    def __init__(self, number: int, workers: int, rows: dict[str, list[float]]) -> None:
        self.number = number
        self.workers = workers
        self.rows = rows
        self.is_locked = False

    @contextmanager
    def locked(self, name: str) -> Iterator[Cells | None]:
        yield None if self.is_locked else self.cells(name)

    def cells(self, name: str) -> Cells:
        return self.rows.setdefault(name, [0.0] * (CELLS + self.workers * CELLS_OF_A_WORKER))


class World:
    """Workers of one node, and a clock that the test moves."""

    def __init__(self, workers: int, node: tuple[int, int] = (0, 1)) -> None:
        self.now = 1000.0
        self.rows: dict[str, list[float]] = {}
        self.tables = [Shared(number, workers, self.rows) for number in range(workers)]
        self.workers = [
            HopLimits(table, clock=lambda: self.now, part=lambda limit, name: share(limit, *node))
            for table in self.tables
        ]
        self.count = 0

    def begin(self, worker: int, hop: NextHop) -> tuple[str, str] | None:
        self.count += 1
        holder = f"Q{self.count}", "b.example"
        limits = self.workers[worker]
        if not limits.begin(hop, holder):
            return None
        assert limits.may_open(hop)
        return holder

    def begin_all(self, worker: int, hop: NextHop) -> list[tuple[str, str]]:
        """As many as there is room for."""
        return list(iter(lambda: self.begin(worker, hop), None))

    def end(self, worker: int, hop: NextHop, holders: Iterable[tuple[str, str]]) -> None:
        """Their attempts end, and their connections."""
        for holder in holders:
            self.workers[worker].end(hop, holder)
            self.workers[worker].is_over(holder)
            self.workers[worker].gone(hop)

    def waits(self, *waiting: int) -> None:
        """So many entries wait in each worker."""
        for limits, count in zip(self.workers, waiting, strict=True):
            limits.waiting = {"m365": count}.__getitem__
            limits.look()

    def messages(self, worker: int, hop: NextHop) -> int:
        """How many messages may begin now."""
        holders = self.begin_all(worker, hop)
        self.end(worker, hop, holders)
        return len(holders)


def hop(name: str = "m365", connections: int | None = None, rate: Rate | None = None) -> NextHop:
    return NextHop(name, (("mx.example",),), max_connections=connections, rate=rate)


# --- connections ----------------------------------------------------------------------------------


def test_worker_alone_has_all_connections_and_no_more():
    world = World(1)
    assert len(world.begin_all(0, hop(connections=3))) == 3


def test_worker_without_mail_lends_its_connections():
    world = World(3)
    assert len(world.begin_all(0, hop(connections=6))) == 6


def test_workers_with_mail_have_equal_parts_as_attempts_end():
    world, six = World(2), hop(connections=6)
    first = world.begin_all(0, six)
    assert world.begin(1, six) is None
    world.waits(20, 20)
    world.end(0, six, first)
    assert len(world.begin_all(0, six)) == 3
    assert len(world.begin_all(1, six)) == 3


def test_connection_counts_until_the_host_has_closed_it():
    world, one = World(2), hop(connections=1)
    holder = world.begin(0, one)
    assert holder is not None
    world.workers[0].end(one, holder)  # it is idle, or being closed
    assert world.begin(1, one) is None
    world.now += 10  # the turn of the other worker
    world.waits(0, 1)
    world.workers[0].gone(one)
    assert world.begin(1, one) is not None


def test_idle_connections_of_a_worker_without_mail_are_given_up_for_another():
    world, four = World(2), hop(connections=4)
    for holder in world.begin_all(0, four):
        world.workers[0].end(four, holder)
    assert world.workers[0].look() == []
    assert world.begin(1, four) is None
    world.waits(0, 1)
    assert world.workers[0].look() == [(four, 3)]


def test_connection_that_cannot_be_divided_goes_from_worker_to_worker():
    world, one = World(2), hop(connections=1)
    world.waits(5, 5)
    had = []
    for _ in range(8):
        for worker in (0, 1):
            if (holder := world.begin(worker, one)) is not None:
                had.append(worker)
                world.end(worker, one, [holder])
        world.now += 5
        world.waits(5, 5)
    assert had.count(0) == had.count(1) == 4


def test_worker_that_stands_still_keeps_what_it_holds_and_nothing_more():
    world, six = World(2), hop(connections=6)
    world.waits(0, 20)
    assert world.begin(1, six) is not None
    world.waits(20, 20)
    world.now += 3  # worker 1 says nothing any more
    assert len(world.begin_all(0, six)) == 5


def test_locked_table_lets_nobody_in_and_is_asked_again_soon():
    world, six = World(1), hop(connections=6, rate=Rate(10, 1))
    world.tables[0].is_locked = True
    assert world.begin(0, six) is None
    assert world.workers[0].room_in("m365") == pytest.approx(0.1)


def test_two_next_hops_have_limits_of_their_own():
    world = World(1)
    assert len(world.begin_all(0, hop("one", connections=2))) == 2
    assert len(world.begin_all(0, hop("other", connections=3))) == 3


def test_reload_changes_the_limit_and_counts_connections_that_stand():
    world = World(2)
    holders = world.begin_all(0, hop(connections=4))
    assert world.begin(0, hop(connections=5)) is not None
    assert world.begin(0, hop(connections=5)) is None
    world.end(0, hop(connections=2), holders)
    assert world.begin(0, hop(connections=2)) is not None
    assert world.begin(0, hop(connections=2)) is None


def test_limit_that_a_reload_adds_counts_connections_begun_before():
    world = World(2)
    unlimited = hop(rate=Rate(100, 1))
    for _ in range(3):
        assert world.begin(0, unlimited) is not None
    assert len(world.begin_all(0, hop(connections=5))) == 2
    assert world.begin(1, hop(connections=5)) is None


def test_nodes_have_a_share_of_each_limit():
    for node, most in (((0, 3), 4), ((1, 3), 3), ((2, 3), 3)):
        world = World(2, node)
        assert len(world.begin_all(0, hop(connections=10))) == most
        assert world.workers[0].most(hop(connections=10)) == most


# --- messages -------------------------------------------------------------------------------------


def test_messages_begin_one_after_the_other_as_the_rate_says():
    world, thirty = World(1), hop(rate=Rate(30, 60))
    assert world.messages(0, thirty) == 1
    world.now += 1.9
    assert world.messages(0, thirty) == 0
    assert world.workers[0].room_in("m365") == pytest.approx(0.17, abs=0.05)
    world.now += 0.2
    assert world.messages(0, thirty) == 1


@pytest.mark.parametrize("with_mail", [{0}, {3}, {0, 1}, {0, 1, 2, 3}])
def test_rate_holds_for_all_workers_and_is_used_up_by_those_with_mail(with_mail):
    world, thirty = World(4), hop(rate=Rate(30, 60))
    world.waits(*(worker in with_mail for worker in range(4)))
    begun: list[tuple[float, int]] = []
    for step in range(18_000):
        world.now = 1000 + step / 100
        for worker in with_mail:
            if world.workers[worker].has_room(thirty):
                begun += [(world.now, worker)] * world.messages(worker, thirty)
        if step % 100 == 0:
            world.waits(*(worker in with_mail for worker in range(4)))
    for minute in range(120):
        in_minute = [w for at, w in begun if 1000 + minute <= at <= 1060 + minute]
        assert 28 <= len(in_minute) <= 30
        counts = [in_minute.count(worker) for worker in with_mail]
        assert max(counts) - min(counts) <= 1


def test_worker_that_died_while_it_waited_holds_up_nobody():
    world, rate = World(2), hop(rate=Rate(60, 60))
    assert world.messages(0, rate) == 1
    assert world.messages(1, rate) == 0  # it waits, and is not heard of again
    begun = 0
    for _ in range(200):
        world.now += 0.1
        begun += world.messages(0, rate)
    assert begun >= 17


def test_message_that_an_attempt_begins_anew_is_counted():
    world, thirty = World(1), hop(rate=Rate(30, 60))
    limits = world.workers[0]
    holder = world.begin(0, thirty)
    assert holder is not None
    assert limits.wait_for_message(thirty, holder) == 0
    assert limits.wait_for_message(thirty, holder) == pytest.approx(2.07, abs=0.05)
    world.now += 2.1
    assert limits.wait_for_message(thirty, holder) == 0
    limits.is_over(holder)


@pytest.mark.parametrize("rate", [Rate(30, 60), Rate(300, 60)])
@pytest.mark.parametrize("late", [1.9, 30.0])
def test_host_never_sees_more_than_the_rate_where_connections_come_late(rate, late):
    # For half a minute a connection takes long, then none does.
    world, limited = World(1), hop(rate=rate)
    limits = world.workers[0]
    connected: list[tuple[float, tuple[str, str]]] = []
    seen: list[float] = []
    for step in range(15_000):
        world.now = 1000 + step / 100
        if limits.has_room(limited):
            takes = late if step < 3000 else 0.0
            connected += [(world.now + takes, one) for one in world.begin_all(0, limited)]
        for at, holder in list(connected):
            if at <= world.now and not limits.wait_for_message(limited, holder):
                seen.append(world.now)
                connected.remove((at, holder))
                world.end(0, limited, [holder])
    for begin in seen:
        assert sum(begin <= at <= begin + 60 for at in seen) <= rate.messages
    last = sum(world.now - 60 <= at for at in seen)
    assert last >= 0.9 * rate.messages, "nothing is lost for long"


def test_message_whose_connection_comes_late_begins_before_those_that_have_none():
    world, thirty = World(1), hop(rate=Rate(30, 60))
    limits = world.workers[0]
    first = world.begin(0, thirty)
    world.now += 3
    second = world.begin(0, thirty)
    assert first is not None
    assert second is not None
    world.now += 3
    assert limits.wait_for_message(thirty, second) == 0, "none was let in since"
    assert limits.wait_for_message(thirty, first) == pytest.approx(2.07, abs=0.05)
    world.now += 2.1
    assert world.begin(0, thirty) is None
    assert limits.wait_for_message(thirty, first) == 0
    world.now += 2.1
    assert world.begin(0, thirty) is not None


def test_attempt_that_ends_while_it_waits_anew_holds_up_nobody():
    world, thirty = World(1), hop(rate=Rate(30, 60))
    first = world.begin(0, thirty)
    world.now += 3
    assert world.begin(0, thirty) is not None
    assert first is not None
    assert world.workers[0].wait_for_message(thirty, first) > 0
    world.end(0, thirty, [first])
    world.now += 2.1
    assert world.begin(0, thirty) is not None


def test_slow_rate_lets_a_message_go_whose_connection_takes_long():
    world, hourly = World(2), hop(rate=Rate(1, 3600))
    holder = world.begin(0, hourly)
    world.waits(0, 1)
    assert world.begin(1, hourly) is None
    world.now += 30
    assert holder is not None
    assert world.workers[0].wait_for_message(hourly, holder) == 0
    world.now += 3590
    assert world.begin(1, hourly) is None, "the hour begins when the host saw the message"


def test_next_host_of_an_attempt_needs_no_second_message():
    world, thirty = World(1), hop(rate=Rate(30, 60))
    limits, holder = world.workers[0], ("Q", "b.example")
    assert limits.begin(thirty, holder)
    limits.end(thirty, holder)
    assert limits.begin(thirty, holder)
    limits.end(thirty, holder)
    limits.is_over(holder)
    assert not limits.begin(thirty, holder)


def test_reload_changes_the_rate_at_once():
    world, slow, faster = World(1), hop(rate=Rate(1, 3600)), hop(rate=Rate(600, 60))
    assert world.messages(0, slow) == 1
    assert world.messages(0, slow) == 0
    assert not world.workers[0].has_room(slow)
    world.now += 1
    assert world.workers[0].has_room(faster)
    world.messages(0, faster)
    world.now += 0.2
    assert world.messages(0, faster) == 1
