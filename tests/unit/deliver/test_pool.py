"""When a connection is used again, and when it must not be."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from relay.mail.outcome import Bounced, Deferred, Delivered
from relay.route.next_hop import Credentials
from relay.sandbox.certificates import Kind
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.mail import entry
from tests.fakes.waiting import until

WAYS = [(False, False), (False, True), (True, False), (True, True)]
CLEAR = Script(starttls=StartTls.ABSENT)


async def test_one_connection_serves_one_message_after_the_other(rig):
    mx = await rig.mx()
    for _ in range(5):
        outcome = await rig.send(entry())
        assert outcome.session.tls
        assert outcome.session.certificate_verified
    assert len(mx.connections) == 1
    assert mx.connections[0].verbs.count("STARTTLS") == 1


async def test_each_message_says_why_its_connection_was_in_clear(rig):
    mx = await rig.mx(Script(certificate=Kind.EXPIRED))
    first, second = await rig.send(entry()), await rig.send(entry())
    assert first.session.downgrade == second.session.downgrade is not None
    assert len(mx.connections) == 2


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
async def test_only_messages_with_the_same_needs_share_a_connection(rig, first, second):
    mx = await rig.mx()
    for require, skip in (first, second):
        assert isinstance(await rig.send(entry(require=require, skip=skip)), Delivered)
    assert len(mx.connections) == (1 if first == second else 2)


async def test_message_that_requires_tls_never_uses_a_connection_made_in_clear(rig):
    mx = await rig.mx(CLEAR, CLEAR)
    assert isinstance(await rig.send(entry("carol@dest.example")), Delivered)
    await asyncio.sleep(0.2)
    outcome = await rig.send(entry("bob@dest.example", require=True))
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.7.4"
    assert all(b"bob" not in connection.clear for connection in mx.connections)


async def test_pool_never_lends_a_clear_connection_for_tls(rig):
    """The guard behind the key: the connection itself refuses."""
    await rig.mx(CLEAR)
    await rig.send(entry())
    (waiting,) = rig.attempt._pool._idle.values()
    waiting[0].connection.must_encrypt = True
    with pytest.raises(AssertionError, match="without it"):
        await rig.send(entry())


async def test_a_connection_knows_that_it_was_made_for_tls(rig):
    await rig.mx()
    for require in (False, True):
        await rig.send(entry(require=require))
    kept = [idle.connection for waiting in rig.attempt._pool._idle.values() for idle in waiting]
    assert [connection.must_encrypt for connection in kept] == [False, True]


@pytest.mark.parametrize("offers", [("PIPELINING",), ()])
@pytest.mark.parametrize(
    ("verb", "reply"), [("MAIL", "354 go on"), ("RCPT", "354 go on"), ("DATA", "250 OK")]
)
async def test_a_connection_whose_host_lost_the_thread_is_not_kept(rig, offers, verb, reply):
    mx = await rig.mx(replace(CLEAR, offers=offers, replies={verb: (reply, "250 OK")}), CLEAR)
    assert isinstance(await rig.send(entry()), Deferred)
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 2


async def test_hosts_with_the_same_name_share_no_connection(rig):
    one, other = await rig.mx(name="mx.dest.example"), await rig.mx(name="mx.dest.example")
    await rig.send(entry())
    rig.hosts.reverse()
    await rig.send(entry())
    assert [len(one.connections), len(other.connections)] == [1, 1]


async def test_names_with_the_same_address_share_no_connection(rig):
    mx = await rig.mx(name="mx.dest.example")
    await rig.send(entry(require=True))
    rig.hosts[:] = [replace(rig.hosts[0], name="mx.other.example")]
    outcome = await rig.send(entry(require=True))
    assert outcome.status == "4.7.5"
    assert "ismatch" in outcome.description
    assert len(mx.connections) == 2


async def test_the_preference_of_a_host_is_no_reason_to_connect_anew(rig):
    mx = await rig.mx()
    await rig.send(entry())
    rig.hosts[:] = [replace(rig.hosts[0], preference=50)]
    await rig.send(entry())
    assert len(mx.connections) == 1


async def test_connections_with_other_credentials_are_other_connections(rig):
    mx = await rig.mx(Script(offers=("AUTH PLAIN",)))
    for name in ("one", "two", "two"):
        rig.hosts[:] = [replace(rig.hosts[0], credentials=Credentials(name, "secret"))]
        assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 2


@pytest.mark.parametrize("offers", [("PIPELINING",), ()])
@pytest.mark.parametrize("verb", ["MAIL", "RSET"])
@pytest.mark.parametrize(
    "end",
    [
        ScriptedReply(None, then=Then.CLOSE),
        ScriptedReply(None, then=Then.RESET),
        ScriptedReply("421 4.4.2 idle for too long", then=Then.CLOSE),
        ScriptedReply(None, then=Then.SILENCE),
    ],
)
async def test_a_kept_connection_that_is_dead_is_replaced_and_counts_for_nothing(
    rig, offers, verb, end
):
    # RSET comes first where the message before had no recipient left.
    first = (
        {"RCPT": "550 5.1.1 no such user", "DATA": "503 5.5.1 no recipients"}
        if verb == "RSET"
        else {}
    )
    answers = {"MAIL": ("250 OK", end)} if verb == "MAIL" else {"RSET": end} | first
    dying = Script(starttls=StartTls.ABSENT, offers=offers, replies=answers)
    mx = await rig.mx(dying, replace(CLEAR, offers=offers))
    assert isinstance(await rig.send(entry()), Bounced if verb == "RSET" else Delivered)
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert outcome.hosts == ()
    assert len(mx.connections) == 2


async def test_a_kept_connection_that_the_host_closed_is_not_used(rig):
    mx = await rig.mx()
    await rig.send(entry())
    for protocol in list(mx._protocols):
        protocol.transport.write(b"421 4.4.2 idle for too long\r\n")
        protocol.close()
    await asyncio.sleep(0.05)
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.connections) == 2


async def test_text_on_an_idle_connection_is_no_reply_to_the_next_message(rig):
    mx = await rig.mx(CLEAR)
    await rig.send(entry())
    for protocol in list(mx._protocols):
        protocol.write(b"250 2.1.0 OK\r\n250 2.1.5 OK\r\n354 go on\r\n250 2.0.0 taken\r\n")
    await asyncio.sleep(0.05)
    assert isinstance(await rig.send(entry()), Delivered)
    assert [len(connection.messages) for connection in mx.connections] == [1, 1]


async def test_a_connection_that_died_with_the_message_on_it_is_not_replaced(rig):
    dying = Script(
        starttls=StartTls.ABSENT,
        replies={"CONTENT": ("250 OK", ScriptedReply(None, then=Then.CLOSE))},
    )
    mx = await rig.mx(dying)
    await rig.send(entry())
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert outcome.in_doubt
    assert len(mx.connections) == 1


@pytest.mark.parametrize(
    "limits",
    [
        {"messages": 2},
        {"age": timedelta(milliseconds=80)},
        {"idle": timedelta(milliseconds=30)},
        {"connections": 0},
    ],
)
async def test_a_connection_does_not_last_for_ever(rig, limits):
    mx = await rig.mx()
    rig.limits = replace(rig.limits, **limits)
    for _ in range(3):
        await rig.send(entry())
        await asyncio.sleep(0.06)
    assert len(mx.connections) > 1
    await until(lambda: mx.connections[0].closed)
    assert mx.connections[0].verbs[-1] == "QUIT"


async def test_connection_that_idled_longest_is_closed_where_all_places_are_taken(rig):
    hosts = [await rig.mx(name=f"mx{number}.dest.example") for number in range(3)]
    rig.limits = replace(rig.limits, connections=2)
    routes = list(rig.hosts)
    for number in (0, 1, 0, 2, 0, 2):
        rig.hosts[:] = [routes[number]]
        await rig.send(entry())
    assert [len(mx.connections) for mx in hosts] == [1, 1, 1]
    await until(lambda: hosts[1].connections[0].closed)
    assert [mx.connections[0].closed for mx in hosts] == [False, True, False]


async def test_messages_at_the_same_time_have_connections_of_their_own(rig):
    mx = await rig.mx(replace(CLEAR, replies={"CONTENT": ScriptedReply("250 2.0.0 OK", delay=0.1)}))
    await asyncio.gather(*(rig.send(entry()) for _ in range(8)))
    assert len(mx.connections) == 8
    await asyncio.gather(*(rig.send(entry()) for _ in range(8)))
    assert len(mx.connections) == 8


async def test_closed_pool_keeps_no_connection(rig):
    mx = await rig.mx()
    await rig.send(entry())
    await rig.attempt.close()
    assert len(rig.attempt._pool) == 0
    await until(lambda: mx.connections[0].verbs[-1] == "QUIT")
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(rig.attempt._pool) == 0
