"""The first worker's view of all queues: what the HTTP interface lists, shows, changes and pages
through.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest

from relay.mail.event import Event
from relay.queue.entry import State
from relay.queue.sqlite.reader import Reader
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import EventFilter, EventPage, QueueFilter, SpoolError
from relay.queue.tls_sessions import CountedSessions, DomainSessions, day_of
from relay.workers.all_queues import AllQueues
from tests.contract.store.test_tls_sessions import BAD, EXPIRED, GOOD, STS
from tests.fakes.queued import CONTENT, NOW, event, new_message


@dataclass
class Two:
    """The first worker's store, another's, and the view of both."""

    first: SqliteStore
    other: SqliteStore
    whole: AllQueues


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    first = await SqliteStore.open(tmp_path / "spool", now=NOW, synchronous="OFF")
    other = await SqliteStore.open(tmp_path / "spool/worker-1", now=NOW, synchronous="OFF")
    reader = Reader.of(tmp_path / "spool/worker-1")
    yield Two(first, other, AllQueues([first, reader]))
    await reader.close()
    await other.close()
    await first.close()


def at(name: str, seconds: float, number: int = 0) -> Event:
    return event("accepted", name, at=NOW + timedelta(seconds=seconds), number=number)


async def test_pages_of_the_queue_go_through_all_workers(two: Two) -> None:
    for number in range(6):
        await (two.first, two.other)[number % 2].accept(new_message(queue_id=f"M{number}"))
    found, after = [], ""
    while page := await two.whole.list_messages(QueueFilter(), now=NOW, after=after, limit=2):
        found += [item.queue_id for item in page]
        after = found[-1]
    assert found == [f"M{number}" for number in range(6)]
    assert (await two.whole.counts())[State.QUEUED] == 6
    assert await two.whole.read_header("M1") == CONTENT.partition(b"body")[0]
    assert b"".join([piece async for piece in two.whole.read_content("M1")]) == CONTENT
    with pytest.raises(SpoolError):
        await two.whole.read_header("M9")
    with pytest.raises(SpoolError):
        [piece async for piece in two.whole.read_content("M9")]


async def test_a_page_that_many_recipients_fill_passes_over_no_message(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("relay.queue.answers", "relay.queue.store"):
        monkeypatch.setattr(f"{module}.PAGE_RECIPIENTS", 4)
    for number in range(8):
        store, recipients = (two.other, 1) if number % 2 else (two.first, 3)
        addresses = [f"{n}@example.net" for n in range(recipients)]
        await store.accept(new_message(*addresses, queue_id=f"M{number}"))
    found, after = [], ""
    while page := await two.whole.list_messages(QueueFilter(), now=NOW, after=after, limit=100):
        found += [item.queue_id for item in page]
        after = found[-1]
    assert found == [f"M{number}" for number in range(8)]
    page = await two.whole.list_messages(QueueFilter(), now=NOW, after="M1", limit=100)
    assert [listed.queue_id for listed in page] == ["M2", "M3", "M4"]


async def test_a_message_is_found_though_another_queue_cannot_be_read(two: Two) -> None:
    await two.other.accept(new_message(queue_id="M1"))
    await two.first.close()
    found = await two.whole.find_message("M1")
    assert found is not None
    with pytest.raises(SpoolError):
        await two.whole.find_message("M2")


async def test_a_listing_that_lacks_a_queue_is_an_error(two: Two) -> None:
    await two.other.accept(new_message(queue_id="M1"))
    await two.first.close()
    with pytest.raises(SpoolError):
        await two.whole.list_messages(QueueFilter(), now=NOW)
    with pytest.raises(SpoolError):
        await two.whole.find_events(EventFilter())


async def test_events_that_come_to_a_queue_where_none_matched_are_behind_the_page(two: Two) -> None:
    """A log that is followed begins there, and need not look at what it has looked at."""
    await two.first.accept(new_message(queue_id="A", events=(at("A", 1),)))
    await two.other.accept(new_message(queue_id="B", events=(at("B", 2),)))
    [only] = await two.whole.find_events(EventFilter(queue_id="A"))
    found = await two.whole.find_events(EventFilter(), EventPage(only.seq))
    assert found == []
    await two.other.accept(new_message(queue_id="C", events=(at("C", 0),)))
    found = await two.whole.find_events(EventFilter(), EventPage(only.seq))
    assert [one.event.queue_id for one in found] == ["C"]


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_pages_of_events_miss_none_and_repeat_none(
    two: Two, ascending: bool, limit: int
) -> None:
    await two.first.accept(
        new_message(queue_id="A", events=(at("A", 1), at("A", 3), at("A", 3, 1)))
    )
    await two.other.accept(new_message(queue_id="B", events=(at("B", 2), at("B", 3), at("B", 4))))
    expected = ["A.0 1", "B.0 2", "A.0 3", "A.1 3", "B.0 3", "B.0 4"]

    def name(one: Event) -> str:
        queue_id, _, number = one.id.split(".")
        return f"{queue_id}.{number} {(one.at - NOW).total_seconds():g}"

    found, after = [], 0
    while page := await two.whole.find_events(EventFilter(), EventPage(after, limit, ascending)):
        found += [name(one.event) for one in page]
        after = page[-1].seq
    assert sorted(found) == sorted(expected)
    odd = EventPage(1 << 200, 9, ascending)
    assert await two.whole.find_events(EventFilter(), odd) is not None
    times = [one.rpartition(" ")[2] for one in found]
    assert times == sorted(times, reverse=not ascending)


@pytest.mark.parametrize("ascending", [True, False])
async def test_a_page_is_full_though_one_queue_has_nearly_all(two: Two, ascending: bool) -> None:
    await two.other.accept(new_message(queue_id="M0", events=(at("M0", 0),)))
    for number in range(1, 9):
        name = f"M{number}"
        await two.first.accept(new_message(queue_id=name, events=(at(name, number),)))
    events = await two.whole.find_events(EventFilter(), EventPage(limit=6, ascending=ascending))
    names = [f"M{number}" for number in range(9)]
    assert [one.event.queue_id for one in events] == (names if ascending else names[::-1])[:6]
    listed = await two.whole.list_messages(QueueFilter(), now=NOW, limit=6)
    assert [one.queue_id for one in listed] == names[:6]


async def test_events_that_commit_late_are_not_passed_over(two: Two) -> None:
    """A long message has the time of its beginning, and is committed at its end."""
    await two.first.accept(
        new_message(queue_id="A", events=(at("A", 9), at("A", 1, 1), at("A", 10, 2)))
    )
    await two.other.accept(new_message(queue_id="B", events=(at("B", 2), at("B", 11, 1))))
    found, after = [], 0
    while page := await two.whole.find_events(EventFilter(), EventPage(after, 2)):
        found += [one.event.id for one in page]
        after = page[-1].seq
        if len(found) == 4:
            await two.other.accept(new_message(queue_id="C", events=(at("C", 0),)))
    assert len(found) == len(set(found)) == 6
    assert found[-1].startswith("C"), "told last, though it began first"


@pytest.mark.parametrize("ascending", [True, False])
async def test_a_page_that_ends_early_keeps_to_the_order_of_time(
    two: Two, ascending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.queue.sqlite.events._WINDOW", 2)
    await two.first.accept(
        new_message(queue_id="A", events=tuple(at("A", n, n) for n in (1, 2, 3, 8, 9)))
    )
    await two.other.accept(
        new_message(queue_id="B", events=tuple(at("B", n, n) for n in (4, 5, 6, 7)))
    )
    found, after = [], 0
    while page := await two.whole.find_events(
        EventFilter(), EventPage(after, ascending=ascending, patience=timedelta(0))
    ):
        found += [(one.event.at - NOW).total_seconds() for one in page]
        after = page[-1].seq
    assert found == [float(n) for n in range(1, 10)][:: 1 if ascending else -1]


@pytest.mark.parametrize("ascending", [True, False])
async def test_paging_can_turn_back_between_the_queues(two: Two, ascending: bool) -> None:
    for moment in range(1, 9):
        store = (two.first, two.other)[moment % 2]
        await store.accept(new_message(queue_id=f"M{moment}", events=(at(f"M{moment}", moment),)))

    async def page(after: int, *, back: bool = False) -> tuple[list[float], list[int]]:
        direction = ascending != back
        found = await two.whole.find_events(EventFilter(), EventPage(after, 3, direction))
        found = found[::-1] if back else found
        return [(one.event.at - NOW).total_seconds() for one in found], [one.seq for one in found]

    order = [float(moment) for moment in range(1, 9)][:: 1 if ascending else -1]
    first, numbers = await page(0)
    second, behind = await page(numbers[-1])
    assert first + second == order[:6]
    assert (await page(behind[0], back=True))[0] == first
    assert (await page(numbers[0], back=True))[0] == []
    # One beside an event is between it and its neighbour: how a listing turns round at its end.
    beside = 1 if ascending else -1
    assert (await page(numbers[0] - beside))[0] == first
    assert (await page(behind[-1] + beside, back=True))[0] == second


@pytest.mark.parametrize("ascending", [True, False])
async def test_event_that_comes_to_an_empty_queue_is_behind_the_page(
    two: Two, ascending: bool
) -> None:
    await two.first.accept(new_message(queue_id="A", events=(at("A", 5),)))
    [only] = await two.whole.find_events(EventFilter(), EventPage(ascending=ascending))
    await two.other.accept(new_message(queue_id="B", events=(at("B", 1),)))
    assert len(await two.whole.find_events(EventFilter(), EventPage(only.seq))) == 1


async def test_sessions_of_all_workers_are_added_up(two: Two) -> None:
    day = day_of(NOW)
    await two.first.count_sessions([GOOD, BAD], at=NOW)
    await two.other.count_sessions([GOOD, replace(GOOD, domain="c.example")], at=NOW)
    await two.other.count_sessions([GOOD], at=NOW + timedelta(days=1))
    assert set(await two.whole.tls_sessions(day, "b.example")) == {
        CountedSessions(STS, None, 2),
        CountedSessions(STS, EXPIRED, 1),
    }
    assert await two.whole.tls_domains(day) == [
        DomainSessions("b.example", 2, 1),
        DomainSessions("c.example", 1, 0),
    ]
    assert await two.whole.tls_days() == [day, day + timedelta(days=1)]


async def test_pages_of_domains_go_through_all_workers(two: Two) -> None:
    names = [f"{n}.example" for n in range(9)]
    for n, name in enumerate(names):
        some = (two.first, two.other)[n % 2] if n % 3 else two.first
        await some.count_sessions([replace(GOOD, domain=name)], at=NOW)
    await two.other.count_sessions([replace(GOOD, domain=names[0])], at=NOW)
    found: list[str] = []
    while page := await two.whole.tls_domains(
        day_of(NOW), after=found[-1] if found else "", limit=2
    ):
        found += [one.domain for one in page]
    assert found == names
