"""Attempts at a next hop of the operator's with several hosts: which host has the message, and what
becomes of a host that has none.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest

from relay.deliver.destinations import NotNow
from relay.mail.outcome import Code, Deferred, Delivered
from relay.route.next_hop import Auth, Credentials, Host, NextHop, TlsMode
from relay.route.security import OnTlsUnmet
from relay.sandbox.certificates import Kind
from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply, StartTls, Then
from tests.fakes.mail import entry
from tests.unit.deliver.conftest import UNHURRIED, Rig

LOGIN = Credentials("app", "open sesame")
GOOD = Script(offers=("AUTH PLAIN", "PIPELINING"))


async def hosts_of(rig: Rig, *groups: list[Script], **hop: Any) -> list[MxServer]:
    """Hosts of one next hop, as these scripts play, in groups of equals."""
    hop = {"name": "provider", "hosts": (("x.example",),)} | hop
    servers = []
    for preference, scripts in enumerate(groups):
        for script in scripts:
            servers.append(await rig.mx(script, preference=preference))
    credentials = LOGIN if hop.get("auth") is not None else None
    rig.hosts[:] = [replace(one, hop=NextHop(**hop), credentials=credentials) for one in rig.hosts]
    return servers


REFUSED = "refused"
WAYS_TO_DIE = {
    "silent": Script(replies={"GREETING": ScriptedReply(None, then=Then.SILENCE)}),
    "421": replace(GOOD, replies={"GREETING": "421 4.3.2 closing for the night"}),
    "554": replace(GOOD, replies={"GREETING": "554 5.7.1 go away"}),
    "closed": replace(GOOD, replies={"GREETING": ScriptedReply(None, then=Then.CLOSE)}),
    "no STARTTLS": replace(GOOD, starttls=StartTls.ABSENT),
    "expired": replace(GOOD, certificate=Kind.EXPIRED),
    "wrong name": replace(GOOD, certificate=Kind.WRONG_NAME),
    "login": replace(GOOD, replies={"AUTH": "535 5.7.8 no"}),
    "login later": replace(GOOD, replies={"AUTH": "454 4.7.0 later"}),
    "no login": Script(offers=()),
}


@pytest.mark.parametrize("manner", [REFUSED, *WAYS_TO_DIE])
async def test_attempt_goes_on_to_the_next_host_at_once_and_leaves_the_dead_one_alone(
    rig, manner, caplog
):
    caplog.set_level(logging.INFO, "relay.deliver")
    script = WAYS_TO_DIE.get(manner, GOOD)
    first, second = await hosts_of(rig, [script], [GOOD], auth=Auth(username="app"))
    if manner == REFUSED:
        await first.close()
    for _ in range(3):
        outcome = await rig.send(entry())
        assert isinstance(outcome, Delivered)
        assert outcome.session is not None
        assert outcome.session.mx_host == second.name
    assert len(second.messages) == 3
    assert len(first.connections) == (0 if manner == REFUSED else 1)
    deaths = [record.message for record in caplog.records if " is dead, " in record.message]
    assert len(deaths) == 1
    assert f"next hop provider: {first.name} port {first.port} is dead, " in deaths[0]


async def test_new_message_goes_as_soon_as_the_login_is_corrected(rig):
    await rig.mx(WAYS_TO_DIE["login"], GOOD)
    hop = NextHop("provider", (("x.example",),), auth=Auth(username="app"))
    rig.hosts[:] = [replace(host, hop=hop, credentials=LOGIN) for host in rig.hosts]
    for said in ("answered AUTH with 535", "not tried, it failed"):
        outcome = await rig.send(entry())
        assert isinstance(outcome, Deferred)
        assert said in outcome.description
    corrected = Credentials("app", "another")
    rig.hosts[:] = [replace(host, credentials=corrected) for host in rig.hosts]
    assert isinstance(await rig.send(entry()), Delivered)


async def test_dead_host_is_tested_by_one_message_and_takes_the_next_ones(rig, caplog):
    caplog.set_level(logging.INFO, "relay.deliver")
    slow = replace(GOOD, replies={"GREETING": ScriptedReply("220 back", delay=0.2)})
    bad = WAYS_TO_DIE["421"]
    first = await rig.mx(bad, slow)
    second = await rig.mx(GOOD, preference=1)
    rig.hosts[:] = [replace(one, hop=NextHop("provider", (("x",),))) for one in rig.hosts]
    rig.delivery["timeouts"] = UNHURRIED
    await rig.send(entry())
    rig.attempt._destinations.hosts.retry()
    outcomes = await asyncio.gather(*(rig.send(entry()) for _ in range(5)))
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)
    assert (len(first.connections), len(first.messages), len(second.messages)) == (2, 1, 5)
    await rig.send(entry())
    assert len(first.messages) == 2
    told = [record.message for record in caplog.records if "provider" in record.message]
    assert [message.split(",")[0].rpartition(" is ")[2] for message in told] == [
        "dead",
        "alive again",
    ]


async def test_equals_have_half_of_100_messages_each(rig):
    a, b, c = await hosts_of(rig, [GOOD, GOOD], [GOOD])
    for _ in range(10):
        await asyncio.gather(*(rig.send(entry()) for _ in range(5)))
    for _ in range(50):
        await rig.send(entry())
    assert [len(server.messages) for server in (a, b, c)] == [50, 50, 0]


async def test_third_host_comes_when_both_equals_are_dead(rig):
    a, b, c = await hosts_of(rig, [GOOD, GOOD], [GOOD])
    await a.close()
    assert isinstance(await rig.send(entry()), Delivered)
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(b.messages) == 2
    await b.close()
    await rig.attempt._pool.close()
    rig.attempt._pool._closed = False
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(c.messages) == 1


@pytest.mark.parametrize(
    ("manners", "status"),
    [
        ((REFUSED, "silent"), "4.4.1"),
        (("421", "554"), "4.4.1"),
        ((REFUSED, "no STARTTLS"), "4.7.4"),
        (("expired", REFUSED), "4.7.5"),
        (("login", REFUSED), "4.7.8"),
        ((REFUSED,), "4.4.1"),
        (("silent",), "4.4.1"),
        (("554",), "4.4.1"),
    ],
)
async def test_message_is_deferred_with_the_reason_of_each_host_where_all_are_dead(
    rig, manners, status
):
    groups = [[WAYS_TO_DIE.get(manner, GOOD)] for manner in manners]
    servers = await hosts_of(rig, *groups, auth=Auth(username="app"))
    for server, manner in zip(servers, manners, strict=True):
        if manner == REFUSED:
            await server.close()
    for number in range(2):
        outcome = await rig.send(entry())
        assert isinstance(outcome, Deferred)
        assert outcome.status == status
        told = [outcome.description, *outcome.hosts]
        assert all(any(server.name in line for line in told) for server in servers)
        assert all("not tried" in line for line in told) is (number == 1)
    assert all(len(server.connections) <= 1 for server in servers)


async def test_next_hop_whose_hosts_are_all_dead_lets_one_message_test_them(rig):
    a, b = await hosts_of(rig, [WAYS_TO_DIE["421"]], [WAYS_TO_DIE["silent"]])
    await rig.send(entry())
    rig.attempt._destinations.hosts.retry()
    known = rig.attempt._destinations._known[rig.hosts[0].destination]
    known.suspended_until = 0.0
    messages = [entry() for _ in range(4)]
    for number, one in enumerate(messages):
        messages[number] = replace(one, message=replace(one.message, queue_id=f"Q{number}"))
    outcomes = await asyncio.gather(*map(rig.send, messages), return_exceptions=True)
    assert sum(isinstance(outcome, NotNow) for outcome in outcomes) == 3  # they wait in memory
    assert sum(isinstance(outcome, Deferred) for outcome in outcomes) == 1
    assert (len(a.connections), len(b.connections)) == (2, 2)


async def test_host_with_too_many_connections_is_passed_by_and_not_dead(rig, caplog):
    full = replace(GOOD, replies={"GREETING": "421 4.7.0 too many connections from you"})
    first, second = await hosts_of(rig, [full], [GOOD])
    for _ in range(3):
        assert isinstance(await rig.send(entry()), Delivered)
    assert (len(first.connections), len(second.messages)) == (3, 3)
    assert not [record for record in caplog.records if " is dead" in record.message]


@pytest.mark.parametrize("greeting", ["421 4.3.2 closing", "554 5.7.1 go away", None])
async def test_greeting_inside_tls_is_the_answer_of_a_dead_host_too(rig, greeting, caplog):
    answer = greeting or ScriptedReply(None, then=Then.CLOSE)
    script = replace(GOOD, implicit_tls=True, replies={"GREETING": answer})
    first = await rig.mx(script, tls=TlsMode.IMPLICIT)
    hop = NextHop("provider", (("x.example",),), tls=TlsMode.IMPLICIT)
    rig.hosts[:] = [replace(one, hop=hop) for one in rig.hosts]
    outcome = await rig.send(entry())
    assert outcome.status == "4.4.1"
    assert "is dead, it does not answer" in caplog.text
    assert rig.attempt._destinations.silence_of(rig.hosts[0].destination) is not None
    assert len(first.connections) == 1


async def test_refused_connection_beside_one_that_stands_is_no_death(rig):
    slow = replace(GOOD, replies={"CONTENT": ScriptedReply("250 2.0.0 OK", delay=1.0)})
    first, second = await hosts_of(rig, [slow], [GOOD])
    rig.delivery["timeouts"] = UNHURRIED
    under_way = asyncio.create_task(rig.send(entry()))
    while not any("DATA" in connection.verbs for connection in first.connections):
        await asyncio.sleep(0.01)
    assert first._server is not None
    first._server.close()  # it takes no other connection, and goes on with this one
    other = replace(entry(), message=replace(entry().message, queue_id="Q2"))
    assert isinstance(await rig.send(other), Delivered)
    assert len(second.messages) == 1
    assert isinstance(await under_way, Delivered)
    assert not rig.attempt._destinations.hosts._deaths


@pytest.mark.parametrize("manner", [REFUSED, "421"])
async def test_last_of_several_connections_that_fail_at_once_is_a_death(
    rig, manner, monkeypatch, caplog
):
    first, second = await hosts_of(rig, [WAYS_TO_DIE.get(manner, GOOD)], [GOOD])
    if manner == REFUSED:
        await first.close()
    at, everyone = rig.attempt._floors.at, asyncio.Barrier(3)

    async def at_once(host: Host, domain: Any) -> Any:
        if host.name == second.name:  # all have failed at the first host, and none is at this one
            await everyone.wait()
        return await at(host, domain)

    monkeypatch.setattr(rig.attempt._floors, "at", at_once)
    messages = [replace(entry().message, queue_id=f"Q{number}") for number in range(3)]
    await asyncio.gather(*(rig.send(replace(entry(), message=one)) for one in messages))
    assert len(second.messages) == 3
    assert any(" is dead, " in record.message for record in caplog.records)


async def test_refusal_of_a_recipient_is_no_death(rig):
    busy = replace(GOOD, replies={"RCPT": "450 4.2.0 busy"})
    first, second = await hosts_of(rig, [busy], [GOOD])
    for _ in range(3):
        assert isinstance(await rig.send(entry()), Delivered)
    assert sum(connection.verbs.count("RCPT") for connection in first.connections) == 3
    assert len(second.messages) == 3


async def test_no_second_host_has_a_message_whose_final_dot_was_not_answered(rig):
    lost = replace(GOOD, replies={"CONTENT": ScriptedReply(None, then=Then.RESET)})
    first, _, second = await hosts_of(rig, [lost, GOOD], [GOOD])
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert outcome.in_doubt
    assert [verb for one in first.connections for verb in one.verbs].count("DATA") == 1
    assert [server.connections for server in rig.servers[1:]] == [[], []]
    assert second.messages == []


@pytest.mark.parametrize("require", [False, True])
async def test_message_that_requires_tls_does_not_kill_a_host_for_the_others(rig, require):
    first, second = await hosts_of(rig, [replace(GOOD, starttls=StartTls.ABSENT)], [GOOD])
    assert isinstance(await rig.send(entry(require=True)), Delivered)
    assert len(second.messages) == 1
    await rig.send(entry(require=require))
    assert len(first.messages) == (not require)
    assert len(first.connections) == (1 if require else 2)


async def test_message_never_bounces_because_of_a_host_that_it_did_not_try(rig):
    rig.delivery["on_tls_unmet"] = OnTlsUnmet.BOUNCE
    await hosts_of(rig, [replace(GOOD, starttls=StartTls.ABSENT)])
    bounced = await rig.send(entry(require=True))
    assert bounced.status == "5.7.4"
    deferred = await rig.send(entry(require=True))
    assert isinstance(deferred, Deferred)
    assert deferred.status == "4.7.4"


async def test_refused_login_is_tried_at_one_address_of_a_host(rig):
    no = replace(GOOD, replies={"AUTH": "535 5.7.8 no"})
    first = await rig.mx(no, name="one.example")
    again = await rig.mx(no, name="one.example")
    second = await rig.mx(GOOD, preference=1)
    hop = NextHop("provider", (("x.example",),), auth=Auth(username="app"))
    rig.hosts[:] = [replace(one, hop=hop, credentials=LOGIN) for one in rig.hosts]
    assert isinstance(await rig.send(entry()), Delivered)
    assert (len(first.connections), len(again.connections)) == (1, 0)
    assert len(second.messages) == 1


async def test_attempt_keeps_its_place_while_it_goes_from_host_to_host(rig):
    rig.delivery["concurrency_per_destination"] = 1
    slow = replace(GOOD, replies={"GREETING": ScriptedReply(None, then=Then.SILENCE)})
    _, second = await hosts_of(rig, [slow], [GOOD])
    one, two = entry(), entry()
    two = replace(two, message=replace(two.message, queue_id="Q2"))
    first = asyncio.create_task(rig.send(one))
    await asyncio.sleep(0.2)
    with pytest.raises(NotNow):
        await rig.send(two)
    assert isinstance(await first, Delivered)
    assert len(second.messages) == 1


async def test_silence_of_a_host_has_the_code_of_no_connection(rig):
    (server,) = await hosts_of(rig, [GOOD])
    await server.close()
    outcome = await rig.send(entry())
    assert (outcome.status, outcome.code) == ("4.4.1", Code.NO_CONNECTION)


def test_host_of_a_next_hop_is_under_one_destination_with_the_others():
    hop = NextHop("provider", (("a.example",), ("b.example",)), 587)
    hosts = [Host(name, "192.0.2.1", 587, hop=hop) for name in ("a.example", "b.example")]
    assert len({host.destination for host in hosts}) == 1


@pytest.mark.parametrize(
    ("verb", "refusal"),
    [
        ("MAIL", "530 5.7.57 Client not authenticated to send mail"),
        ("RCPT", "550 5.7.64 TenantAttribution; Relay Access Denied"),
        ("RCPT", "503 AUTH first"),
        ("DATA", "530 5.7.1 Authentication required"),
    ],
)
async def test_message_waits_where_a_host_asks_for_a_login_unless_the_next_host_takes_it(
    rig, verb, refusal
):
    closed = replace(GOOD, replies={verb: refusal})
    await hosts_of(rig, [closed])
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code) == ("4.7.8", int(refusal[:3]))
    assert outcome.message == refusal[4:]
    rig.hosts.clear()
    first, second = await hosts_of(rig, [closed], [GOOD])
    assert isinstance(await rig.send(entry()), Delivered)
    assert (len(first.connections), len(second.messages)) == (1, 1)


async def test_host_that_blocks_one_source_address_gets_mail_from_another(rig):
    (server,) = await hosts_of(rig, [GOOD])
    await server.close()
    assert (await rig.send(entry())).status == "4.4.1"
    rig.hosts.clear()
    port = server.port
    hop = NextHop("other", (("x.example",),), source_address="127.0.0.1")
    rig.hosts[:] = [Host(server.name, "127.0.0.1", port, hop=hop)]
    outcome = await rig.send(entry())
    assert "not tried" not in outcome.description
    assert outcome.hosts == ()
