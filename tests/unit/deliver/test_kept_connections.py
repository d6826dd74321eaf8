"""A kept connection that takes no more messages: the message goes once more, over a fresh one.

The table: the command that the host refuses, its code, and whether it took a message over this
connection before. What the fresh connection says counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from relay.deliver.destinations import NotNow
from relay.mail.outcome import Bounced, Deferred, Delivered
from relay.route.next_hop import NextHop
from relay.sandbox.script import ReplyOrText, Script, StartTls
from tests.fakes.mail import entry

PIPELINING = ("PIPELINING", "8BITMIME")
PLAIN = ("8BITMIME",)
OK = "250 2.0.0 OK"
GOOD = Script(offers=PIPELINING, starttls=StartTls.ABSENT)

COMMANDS = ["MAIL", "RCPT", "DATA"]
CODES = ["421 4.3.2 enough", "452 4.3.1 enough", "554 5.5.0 enough"]
both = pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelined", "one-by-one"])


def goes_on(verb: str) -> str:
    """The reply with which a host goes on after a command."""
    return "354 go on" if verb == "DATA" else OK


def after_one(verb: str, text: str) -> Sequence[ReplyOrText]:
    """A host's replies to a command: the first is good, all after it are not."""
    return [goes_on(verb), text]


def host(offers: tuple[str, ...], **answers: ReplyOrText | Sequence[ReplyOrText]) -> Script:
    return Script(offers=offers, starttls=StartTls.ABSENT, replies=answers)


@both
@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("code", CODES)
async def test_message_goes_over_a_fresh_connection_after_one_that_went_well(
    rig, offers, verb, code
):
    mx = await rig.mx(host(offers, **{verb: after_one(verb, code)}), replace(GOOD, offers=offers))
    assert isinstance(await rig.send(entry()), Delivered)
    assert isinstance(await rig.send(entry()), Delivered)
    assert [len(connection.messages) for connection in mx.connections] == [1, 1]


@both
@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("code", CODES)
async def test_fresh_connection_is_asked_once_and_what_it_says_counts(rig, offers, verb, code):
    mx = await rig.mx(host(offers, **{verb: after_one(verb, code)}), host(offers, **{verb: code}))
    assert isinstance(await rig.send(entry()), Delivered)
    try:
        outcome = await rig.send(entry())
    except NotNow as not_now:
        assert (verb, code[:3]) == ("MAIL", "421"), "only this turns a connection away"
        outcome = not_now.turned_away[0]
    assert isinstance(outcome, Bounced if code.startswith("554") else Deferred)
    assert outcome.code == int(code[:3])
    assert len(mx.connections) == 2


@both
@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("code", CODES)
async def test_refusal_counts_at_once_where_no_message_went_over_the_connection(
    rig, offers, verb, code
):
    mx = await rig.mx(host(offers, **{verb: code}), replace(GOOD, offers=offers))
    assert (await rig.send(entry())).code == int(code[:3])
    assert len(mx.connections) == 1


@both
@pytest.mark.parametrize("code", CODES[1:])
async def test_kept_connection_over_which_every_message_failed_is_not_replaced(rig, offers, code):
    refused = ["550 5.1.1 no such user", code]
    mx = await rig.mx(host(offers, RCPT=refused), replace(GOOD, offers=offers))
    assert isinstance(await rig.send(entry()), Bounced)
    assert (await rig.send(entry())).code == int(code[:3])
    assert len(mx.connections) == 1


@both
@pytest.mark.parametrize("code", ["450 4.2.1 busy", "451 4.3.0 trouble", "550 5.1.1 unknown"])
@pytest.mark.parametrize("verb", COMMANDS)
async def test_any_other_refusal_on_a_kept_connection_counts_at_once(rig, offers, verb, code):
    mx = await rig.mx(host(offers, **{verb: after_one(verb, code)}), replace(GOOD, offers=offers))
    await rig.send(entry())
    assert (await rig.send(entry())).code == int(code[:3])
    assert len(mx.connections) == 1


THREE = ("bob@dest.example", "carol@dest.example", "dave@dest.example")


def second_time(name: str, text: str) -> dict[str, ReplyOrText | Sequence[ReplyOrText]]:
    return {f"RCPT <{name}@dest.example>": [OK, text]}


@both
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("verb", COMMANDS)
async def test_all_recipients_of_a_message_go_over_the_fresh_connection(rig, offers, verb, code):
    ok = goes_on(verb)
    replies = [ok] * (3 if verb == "RCPT" else 1) + [code]
    mx = await rig.mx(host(offers, **{verb: replies}), replace(GOOD, offers=offers))
    await rig.deliver(entry(*THREE))
    outcomes = await rig.deliver(entry(*THREE))
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert [len(message.recipients) for message in mx.messages] == [3, 3]


@both
@pytest.mark.parametrize("code", CODES)
async def test_recipient_refused_for_itself_is_not_asked_again_over_the_fresh_connection(
    rig, offers, code
):
    replies = {
        **second_time("bob", "550 5.1.1 no such user"),
        **second_time("carol", code),
        **second_time("dave", code),
    }
    mx = await rig.mx(host(offers, **replies), replace(GOOD, offers=offers))
    await rig.deliver(entry(*THREE))
    bob, carol, dave = (await rig.deliver(entry(*THREE))).values()
    assert isinstance(bob, Bounced)
    assert isinstance(carol, Delivered)
    assert isinstance(dave, Delivered)
    assert mx.messages[1].forward_paths == ("carol@dest.example", "dave@dest.example")


@both
async def test_recipient_refused_beside_one_that_has_its_message_is_refused(rig, offers):
    mx = await rig.mx(
        host(offers, **second_time("carol", "554 5.7.1 not for her")), replace(GOOD, offers=offers)
    )
    await rig.deliver(entry(*THREE))
    bob, carol, dave = (await rig.deliver(entry(*THREE))).values()
    assert isinstance(bob, Delivered)
    assert isinstance(carol, Bounced)
    assert isinstance(dave, Delivered)
    assert len(mx.connections) == 1


@both
async def test_fresh_connection_is_asked_after_each_message_that_went_well(rig, offers):
    """100 recipients go over each connection; the second transaction on it is refused."""
    once = host(offers, MAIL=[OK, "452 4.3.2 enough"])
    mx = await rig.mx(once)
    names = [f"r{n}@dest.example" for n in range(250)]
    outcomes = await rig.deliver(entry(*names))
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert [len(message.recipients) for message in mx.messages] == [100, 100, 50]
    assert len(mx.connections) == 3


@pytest.mark.parametrize("most", [1, 2])
async def test_connection_of_a_next_hop_is_replaced_after_so_many_messages(rig, most):
    hop = NextHop("provider", (("mx1.dest.example",),), max_messages_per_connection=most)
    mx = await rig.mx(GOOD, hop=hop)
    for _ in range(4):
        assert isinstance(await rig.send(entry()), Delivered)
    assert [len(connection.messages) for connection in mx.connections] == [most] * (4 // most)
