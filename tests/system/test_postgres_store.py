"""The queue on PostgreSQL when something fails: cuts in a commit, lost leases, several nodes."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from relay.mail.outcome import Delivered
from relay.queue.api_state import DomainSettings
from relay.queue.entry import State
from relay.queue.handoff import HandOffLimits
from relay.queue.nodes import NodeState
from relay.queue.postgres import (
    NodeOptions,
    PostgresStore,
    Server,
    StartRefused,
    commit,
    lease,
    leftovers,
    transaction,
)
from relay.queue.postgres import store as postgres_store
from relay.queue.postgres.connection import Link
from relay.queue.server_address import parse_url
from relay.queue.store import ClaimLost, EventFilter, EventPage, QueueFilter, QueueFull, SpoolError
from tests.fakes.queued import (
    DEFERRED,
    DELIVERED,
    NOW,
    claim_all,
    content_of,
    event,
    new_message,
    queue_ids,
    settled,
)
from tests.fakes.waiting import patient
from tests.rigs.cutter import Cut, cutter
from tests.rigs.postgres import Postgres, pooler, standby

pytestmark = pytest.mark.needs("postgresql")

LEASE = timedelta(seconds=5)
COMMIT = b"COMMIT\0"
"""As the writer sends it: the end of a transaction of several statements."""
SMALL, LARGE = b"Subject: x\r\n\r\nCUTHERE\r\n", b"Subject: x\r\n\r\n" + b"y" * 300_000


@contextlib.asynccontextmanager
async def node(
    url: str, name: str = "a", *, length: timedelta = LEASE, limits: HandOffLimits | None = None
) -> AsyncIterator[PostgresStore]:
    """A node that is closed at the end, if it can be."""
    server = Server(parse_url(url), name="relay", password=lambda: None)
    store = await PostgresStore.open(server, NodeOptions(name, length), now=NOW, limits=limits)
    try:
        yield store
    finally:
        await store.close()


async def crash(store: PostgresStore) -> None:
    """End a node as `kill -9` does, as far as that goes within one process."""
    for task in store._tasks:
        task.cancel()
    await asyncio.gather(*store._tasks, return_exceptions=True)
    for link in (store._claim_link, store._stage_link, store._lease_link, *store._links):
        link.drop()
    store.writer._transactions.drop()


async def until(question, *, seconds: float = 20) -> None:
    async with asyncio.timeout(patient(seconds)):
        while not await question():
            await asyncio.sleep(0.1)


# --- a connection that is cut in a commit ---------------------------------------------------------


@pytest.mark.parametrize("how", list(Cut))
@pytest.mark.parametrize(
    ("content", "marker"), [(SMALL, b"CUTHERE"), (LARGE, COMMIT)], ids=["plain", "transaction"]
)
async def test_message_is_accepted_once_where_its_commit_is_cut(server, how, content, marker):
    async with cutter(server.port) as between, node(server.tcp_url(port=between.port)) as store:
        new = new_message(content=content, events=(event("accepted", "q"),))
        if marker == COMMIT:
            await store.stage(new.message.queue_id, 0, content[:200_000])
            new = new_message(
                queue_id=new.message.queue_id,
                content=content[200_000:],
                staged_bytes=200_000,
                events=(event("accepted", "q"),),
            )
        between.cut(how, marker)
        await store.accept(new)
        assert between.cuts == 1
        assert await queue_ids(store) == [new.message.queue_id]
        assert await content_of(store, new.message.queue_id) == content
        assert [one.seq for one in await store.events_after(0)] == [1]
        [entry] = await claim_all(store)
        await store.record(settled(entry, DELIVERED))
        assert await queue_ids(store) == []


@pytest.mark.parametrize("how", list(Cut))
async def test_client_without_a_250_has_no_message_in_the_queue_however_the_commit_ended(
    server, how, monkeypatch
):
    monkeypatch.setattr(commit, "PATIENCE", 1.5)
    async with cutter(server.port) as between, node(server.tcp_url(port=between.port)) as store:
        between.cut(how, b"CUTHERE", closes_then=True)
        with pytest.raises(SpoolError):
            await store.accept(new_message(content=SMALL))
        assert server.sql("SELECT count(*) FROM relay.message") == (
            "0" if how is Cut.BEFORE else "1"
        )
        between.is_open = True
        await store.accept(after := new_message("z@zz.example"))

        async def is_removed() -> bool:
            return await queue_ids(store) == [after.message.queue_id]

        await until(is_removed)
        assert [entry.message for entry in await claim_all(store)] == [after.message]


@pytest.mark.parametrize("how", list(Cut))
async def test_result_is_recorded_once_where_its_commit_is_cut(server, how):
    async with cutter(server.port) as between, node(server.tcp_url(port=between.port)) as store:
        await store.accept(new_message())
        [entry] = await claim_all(store)
        between.cut(how, b"delivered.7")
        done = event("delivered", entry.message.queue_id, number=7)
        await store.record(settled(entry, DELIVERED), events=[done])
        assert between.cuts == 1
        assert await queue_ids(store) == []
        assert [one.event.name for one in await store.events_after(0)] == ["delivered"]


async def test_message_refused_in_a_batch_of_unknown_outcome_is_refused_and_harms_no_other(server):
    """The refused one has the queue id of another message, which must not be removed for it."""
    async with cutter(server.port) as between, node(server.tcp_url(port=between.port)) as store:
        await store.accept(first := new_message(queue_id="taken"))
        between.cut(Cut.AFTER, COMMIT)
        results = await asyncio.gather(
            store.accept(new_message(queue_id="taken")),
            store.accept(new_message(queue_id="good")),
            return_exceptions=True,
        )
        assert between.cuts == 1
        assert [isinstance(one, SpoolError) for one in results] == [True, False]
        assert await queue_ids(store) == ["good", "taken"]
        assert {entry.message.queue_id for entry in await claim_all(store)} == {"good", "taken"}
        assert first.message.queue_id == "taken"


# --- leases ---------------------------------------------------------------------------------------


async def test_claims_of_a_lost_node_are_due_for_another(server):
    async with node(server.url(), "b") as other:
        server_of_a = Server(parse_url(server.url()), name="relay", password=lambda: None)
        lost = await PostgresStore.open(server_of_a, NodeOptions("a", LEASE), now=NOW)
        for _ in range(3):
            await lost.accept(new_message())
        claimed = await claim_all(lost)
        assert await claim_all(other) == []
        await crash(lost)
        found = []

        async def is_taken_over() -> bool:
            found.extend(await claim_all(other))
            return len(found) == 3

        await until(is_taken_over, seconds=LEASE.total_seconds() + 10)
        assert {one.message for one in found} == {one.message for one in claimed}
        states = {one.name: one.state for one in await other.nodes()}
        assert states == {"a": NodeState.LOST, "b": NodeState.LIVE}


async def test_lease_is_renewed_while_much_is_taken_over(server, monkeypatch):
    slowly = leftovers._TAKE_OVER + " AND pg_sleep(0.25) IS NOT NULL"
    monkeypatch.setattr(leftovers, "_TAKEN_AT_ONCE", 1)
    monkeypatch.setattr(leftovers, "_TAKE_OVER", slowly)
    async with node(server.url(), limits=HandOffLimits(entries=0)) as store:
        for _ in range(40):  # ten seconds of work, with a lease of five
            await store.accept(new_message())
        server.sql("UPDATE relay.recipient SET place = 2, lease = -1")
        held = []

        async def is_done() -> bool:
            held.append(not store.not_ready())
            return bool(server.sql("SELECT count(*) FROM relay.recipient WHERE place = 2") == "0")

        await until(is_done, seconds=40)
        assert all(held)


async def test_node_whose_lease_ran_out_may_begin_nothing(server):
    async with node(server.url()) as store:
        await store.accept(new_message())
        [entry] = await claim_all(store)
        assert store.may_begin(entry)
        store._tasks[0].cancel()  # the one that renews
        await asyncio.sleep(LEASE.total_seconds() * 5 / 6)
        assert not store.may_begin(entry)


async def test_node_that_lost_its_lease_comes_back_as_itself(server):
    async with node(server.url(), "a") as store:
        await store.accept(new_message("x@old.example"))
        [old] = await claim_all(store)
        before = store.lease.id
        server.sql("UPDATE relay.lease SET lost = now()")
        with pytest.raises(SpoolError):
            await store.accept(new_message())

        async def is_back() -> bool:
            with contextlib.suppress(SpoolError):
                await store.accept(new_message("y@new.example"))
                return True
            return False

        await until(is_back)
        assert store.lease.id != before
        assert not store.may_begin(old)
        domains = {entry.domain for entry in await claim_all(store)}
        assert "new.example" in domains


@pytest.mark.parametrize(("outcome", "is_taken"), [(DELIVERED, True), (DEFERRED, False)])
async def test_late_result_is_taken_only_where_it_saves_a_duplicate(server, outcome, is_taken):
    async with node(server.url(), limits=HandOffLimits(entries=0)) as store:
        await store.accept(new_message())
        [entry] = await claim_all(store)
        server.sql("UPDATE relay.lease SET lost = now()")
        store._renew_now()

        async def is_free() -> bool:
            return bool(server.sql("SELECT place FROM relay.recipient") == "1")

        await until(is_free)
        if is_taken:
            await store.record(settled(entry, outcome))
            assert await queue_ids(store) == []
        else:
            with pytest.raises(ClaimLost):
                await store.record(settled(entry, outcome), events=[event("failed", "q")])
            assert await store.events_after(0) == []
            assert len(await claim_all(store)) == 1


async def test_result_is_refused_while_another_node_has_the_message(server):
    async with (
        node(server.url(), "a", limits=HandOffLimits(entries=0)) as one,
        node(server.url(), "b", limits=HandOffLimits(entries=0)) as two,
    ):
        await one.accept(new_message())
        [entry] = await claim_all(one)
        server.sql(f"UPDATE relay.lease SET lost = now() WHERE id = {one.lease.id}")
        one._renew_now()
        found = []

        async def is_taken_over() -> bool:
            found.extend(await claim_all(two))
            return bool(found)

        await until(is_taken_over)
        with pytest.raises(ClaimLost):
            await one.record(settled(entry, Delivered("2.0.0", 250, "OK")))
        await two.record(settled(found[0], DELIVERED))
        assert await queue_ids(two) == []


async def test_claim_that_its_node_does_not_know_of_is_freed(server):
    async with node(server.url(), limits=HandOffLimits(entries=0)) as store:
        await store.accept(new_message())
        server.sql(f"UPDATE relay.recipient SET place = 2, lease = {store.lease.id}")
        found = []

        async def is_free() -> bool:
            found.extend(await claim_all(store))
            return bool(found)

        await until(is_free)
        assert [entry.message.queue_id for entry in found] == await queue_ids(store)


async def test_second_process_of_one_name_is_refused(server):
    async with node(server.url(), "a"):
        with pytest.raises(StartRefused, match="another process is node a"):
            async with node(server.url(), "a"):
                pass


async def test_node_restarted_after_a_crash_goes_on_at_once(server):
    first = await PostgresStore.open(
        Server(parse_url(server.url()), name="relay", password=lambda: None),
        NodeOptions("a", timedelta(minutes=5)),
        now=NOW,
    )
    await first.accept(new_message(events=(event("accepted", "q"),)))
    await crash(first)
    lease._HELD_HERE.discard(first.lease.id)
    async with asyncio.timeout(patient(5)), node(server.url(), "a") as again:
        assert len(await claim_all(again)) == 1
        assert again._numbers.last == 1


# --- several nodes, one queue ---------------------------------------------------------------------


async def test_each_node_lists_the_events_of_all_in_pages_without_gap_or_repetition(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        for number in range(12):
            store = (one, two)[number % 3 == 0]
            at = NOW + timedelta(seconds=number)
            await store.accept(
                new_message(events=(event("accepted", f"q{number}", number=number, at=at),))
            )
        for ascending in (True, False):
            found: list[str] = []
            after = 0
            while page := await two.find_events(EventFilter(), EventPage(after, 5, ascending)):
                found += [stored.event.queue_id for stored in page]
                after = page[-1].seq
            wanted = [f"q{number}" for number in range(12)]
            assert found == (wanted if ascending else wanted[::-1])


async def test_mail_deferred_by_one_node_is_tried_by_another_when_it_is_due(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        await one.accept(new_message())
        [entry] = await claim_all(one)
        work = asyncio.create_task(two.wait_for_work())
        await one.record(settled(entry, DEFERRED, wait=timedelta(minutes=1)))
        async with asyncio.timeout(patient(5)):
            await work
        [again] = await claim_all(two, now=NOW + timedelta(minutes=1))
        assert again.recipients[0].attempts == 1


async def test_results_of_two_nodes_for_one_message_remove_it_together(server):
    limits = HandOffLimits(entries=0)
    async with (
        node(server.url(), "a", limits=limits) as one,
        node(server.url(), "b", limits=limits) as two,
    ):
        for _ in range(20):
            await one.accept(new_message("x@one.example", "y@two.example"))
            [first] = await one.claim_due(now=NOW, limit=1)
            [second] = await two.claim_due(now=NOW, limit=1)
            await asyncio.gather(
                one.record(settled(first, DELIVERED)), two.record(settled(second, DELIVERED))
            )
            assert await queue_ids(one) == []


async def test_verb_reaches_mail_that_another_node_has_claimed_and_not_begun(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        await one.accept(new_message())  # it waits in the hand-off of this node
        done = await two.change(QueueFilter(), verb="hold", now=NOW)
        assert done.changed == 1
        assert await claim_all(one) == []


async def test_verb_on_mail_that_no_other_node_has_claimed_asks_none_to_stand_still(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        late = NOW + timedelta(hours=1)
        for _ in range(3):
            await one.accept(new_message(state=State.DEFERRED, due=late))
        before = server.sql("SELECT give_back FROM relay.meta")
        done = await two.change(QueueFilter(), verb="retry", now=NOW)
        assert done.changed == 3
        assert server.sql("SELECT give_back FROM relay.meta") == before


async def test_setting_made_at_one_node_is_told_to_the_others(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        await asyncio.sleep(1.5)
        told = asyncio.Event()

        async def changed() -> None:
            told.set()

        two.api_state.when_changed_elsewhere(changed)
        await one.api_state.set_domain_settings("a.example", DomainSettings(require_tls=True))
        async with asyncio.timeout(patient(3)):
            await told.wait()
        assert (await two.api_state.domain_settings())["a.example"].require_tls


async def test_host_that_hangs_or_refuses_costs_the_others_nothing(server):
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    hosts = f"127.0.0.1:1,127.0.0.1:{port},127.0.0.1:{server.port}"
    async with silent, node(f"postgresql://relay@{hosts}/postgres?connect_timeout=1") as store:
        await store.accept(new_message())
        assert len(await queue_ids(store)) == 1


async def test_host_that_refuses_the_login_does_not_end_the_search(server):
    """An old primary may be fenced so."""
    said = b"SFATAL\0VFATAL\0C28000\0Mno pg_hba.conf entry\0\0"

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"E" + (len(said) + 4).to_bytes(4, "big") + said)
        writer.close()

    fenced = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = fenced.sockets[0].getsockname()[1]
    options = "sslmode=disable"
    async with fenced:
        hosts = f"127.0.0.1:{port},127.0.0.1:{server.port}"
        async with node(f"postgresql://relay@{hosts}/postgres?{options}") as store:
            await store.accept(new_message())
        with pytest.raises(StartRefused, match="pg_hba"):
            async with node(f"postgresql://relay@127.0.0.1:{port}/postgres?{options}"):
                pass


async def test_client_waits_no_longer_because_several_hosts_hang(server, monkeypatch):
    monkeypatch.setattr(commit, "PATIENCE", 1.0)
    async with cutter(server.port) as between, cutter(server.port) as other:
        other.line.clear()
        hosts = f"127.0.0.1:{between.port}" + f",127.0.0.1:{other.port}" * 3
        async with node(f"postgresql://relay@{hosts}/postgres") as store:
            between.is_open = False
            store.writer._transactions.drop()
            with pytest.raises(SpoolError):
                async with asyncio.timeout(patient(6)):
                    await store.accept(new_message())
            assert store.not_ready()
            between.is_open = True

            async def is_ready() -> bool:
                return not store.not_ready()

            await until(is_ready)  # though nothing is to be written


async def test_question_in_a_transaction_ends_in_time_though_the_server_is_silent(server):
    async with cutter(server.port) as between:
        address = parse_url(server.tcp_url(port=between.port))
        link = Link(Server(address, name="relay", password=lambda: None), seconds=1)

        async def question(db) -> None:
            async with db.transaction():
                await db.execute("SELECT 1")
                between.line.clear()
                await db.execute("SELECT 2")

        with pytest.raises(SpoolError, match="no answer in time"):
            async with asyncio.timeout(patient(10)):
                await link.ask(question)
        between.line.set()

        async def answer(db) -> int:
            return int(await db.fetchval("SELECT 3"))

        assert await link.ask(answer) == 3
        await link.close()


async def test_kernel_is_told_to_watch_the_connection(server):
    address = parse_url(server.tcp_url())
    db: Any = await Server(address, name="relay", password=lambda: None).connect()
    sock = db._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
    await db.close()


async def test_full_disk_refuses_new_mail_and_takes_results(server):
    async with node(server.url()) as store:
        await store.accept(kept := new_message())
        [entry] = await claim_all(store)
        server.sql(
            "CREATE FUNCTION relay.full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$;"
            "CREATE TRIGGER full_disk BEFORE INSERT ON relay.message"
            " FOR EACH ROW EXECUTE FUNCTION relay.full()"
        )
        refused, taken = await asyncio.gather(
            store.accept(new_message()),
            store.record(settled(entry, DELIVERED)),
            return_exceptions=True,
        )
        assert isinstance(refused, QueueFull)
        assert not isinstance(taken, BaseException)
        server.sql("DROP TRIGGER full_disk ON relay.message")
        await store.accept(after := new_message())
        assert await queue_ids(store) == [after.message.queue_id] != [kept.message.queue_id]


@pytest.mark.needs("pgbouncer")
async def test_pooler_of_transactions_may_stand_between(server):
    """One older than 1.21 does not know what a client has prepared."""
    with pooler(server) as port:
        async with node(f"{server.tcp_url(port=port)}?prepared_statements=0") as store:
            await asyncio.gather(*(store.accept(new_message(content=SMALL)) for _ in range(20)))
            large = new_message(content=LARGE)
            await store.accept(large)
            assert await content_of(store, large.message.queue_id) == LARGE
            for entry in await claim_all(store):
                await store.record(settled(entry, DELIVERED))
            assert await queue_ids(store) == []
            await asyncio.sleep(LEASE.total_seconds() / 3)
            assert not store.not_ready()


async def test_commit_of_mail_does_not_change_the_mark_of_the_log(server, monkeypatch):
    """Each commit would leave a dead row, and none would be a single statement."""
    monkeypatch.setattr(postgres_store, "_LOOK_SECONDS", 60.0)
    async with node(server.url()) as store:
        for number in range(5):
            await store.accept(new_message(events=(event("accepted", f"q{number}"),)))
            await store.log_written(number + 1)
        assert server.sql("SELECT log_mark FROM relay.node") == "0"
    assert server.sql("SELECT log_mark FROM relay.node") == "5"


async def test_events_that_a_lost_node_has_not_written_are_given_to_one_of_the_others(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        for number in range(3):
            await one.accept(new_message(events=(event("accepted", f"q{number}"),)))
        assert await two.lost_events() == (0, [])
        await one.log_written(1)
        await one.write_event(event("operated", "q"))

        async def is_noted() -> bool:
            return bool(server.sql("SELECT max(log_mark) FROM relay.node") == "1")

        await until(is_noted)
        server.sql(f"UPDATE relay.lease SET lost = now() WHERE id = {one.lease.id}")
        number, rest = await two.lost_events()
        assert [stored.event.queue_id for stored in rest] == ["q1", "q2", "q"]
        await two.lost_written(number, rest[-1].seq)
        assert await two.lost_events() == (0, [])


# --- standbys -------------------------------------------------------------------------------------


def set_standby(server: Postgres, name: str) -> None:
    server.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
    server.sql("SELECT pg_reload_conf()")


async def test_client_hears_no_250_where_the_wait_for_a_standby_was_cancelled(server, monkeypatch):
    monkeypatch.setattr(commit, "PATIENCE", 2.0)
    monkeypatch.setattr(transaction, "SILENCE", 3.0)
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with node(server.url()) as store:
        set_standby(server, "nobody")
        try:
            accepting = asyncio.create_task(store.accept(new_message(content=SMALL)))

            async def is_waiting() -> bool:
                return bool(server.sql(waits) != "0")

            await until(is_waiting)
            server.sql(cancel)
            with pytest.raises(SpoolError):
                await accepting
        finally:
            set_standby(server, "")
        await store.accept(after := new_message("z@zz.example"))

        async def is_removed() -> bool:
            return await queue_ids(store) == [after.message.queue_id]

        await until(is_removed)


async def test_every_250_survives_a_failover_to_a_synchronous_standby(server):
    with standby(server) as second:
        set_standby(server, "*")
        hosts = f"127.0.0.1:{server.port},127.0.0.1:{second.port}"
        async with node(f"postgresql://relay@{hosts}/postgres") as store:
            accepted = [new_message() for _ in range(10)]
            await asyncio.gather(*(store.accept(new) for new in accepted))
            server.stop(signal.SIGQUIT)
            try:
                second.sql("SELECT pg_promote()")
                second.sql("ALTER SYSTEM SET synchronous_standby_names = ''")
                second.sql("SELECT pg_reload_conf()")

                async def takes_mail() -> bool:
                    with contextlib.suppress(SpoolError):
                        await store.accept(new_message("z@zz.example", queue_id="after"))
                        return True
                    return False

                await until(takes_mail, seconds=30)
                wanted = {new.message.queue_id for new in accepted} | {"after"}
                assert set(await queue_ids(store)) == wanted
            finally:
                server.start()
                set_standby(server, "")


# --- what each node has a part of -----------------------------------------------------------------


async def test_domain_that_a_node_does_not_serve_is_not_handed_over_and_left_to_others(server):
    async with node(server.url(), "a") as one, node(server.url(), "b") as two:
        one.limit_domains(lambda domain: int(domain == "z.example"))
        for number in range(30):  # more than one page of them
            await one.accept(new_message(f"x@d{number:02}.example"))
        await one.accept(new_message("x@z.example"))
        [entry] = await claim_all(one)
        await one.release(entry, due=NOW)
        assert [entry.domain for entry in await claim_all(one)] == ["z.example"]
        assert await one.next_due() is None
        assert len({entry.domain for entry in await claim_all(two)}) == 30


async def test_limit_is_divided_once_both_nodes_have_seen_each_other(server):
    async with node(server.url(), "a") as one:
        assert one.part(5, "dest.example") == 5
        async with node(server.url(), "b") as two:

            async def is_divided() -> bool:
                return two.part(5, "dest.example") > 0

            assert two.part(5, "dest.example") == 0, "the first has not seen it"
            await until(is_divided)
            assert {one.part(5, "dest.example"), two.part(5, "dest.example")} == {2, 3}

        async def has_all() -> bool:
            return one.part(5, "dest.example") == 5

        await until(has_all)


async def test_node_joins_once_another_uses_no_more_than_its_part_or_after_a_lease(server):
    async with node(server.url(), "a") as one:
        is_within = False

        async def answer() -> bool:
            return is_within

        one.when_divided_anew(answer)
        async with node(server.url(), "b") as two:
            await asyncio.sleep(LEASE.total_seconds() / 2)
            assert two.part(4, "dest.example") == 0
            is_within = True

            async def has_part() -> bool:
                return two.part(4, "dest.example") == 2

            await until(has_part)
            is_within = False
            async with node(server.url(), "c") as three:

                async def joined() -> bool:
                    return three.part(6, "dest.example") == 2

                await until(joined)
