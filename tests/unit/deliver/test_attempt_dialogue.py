"""What hosts answer, and fail to answer, in a dialogue, and what becomes of each recipient."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from relay.deliver import protocol
from relay.deliver.job import _surveyed
from relay.mail.envelope import Notify, Ret
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, HopSession, Outcome
from relay.queue.store import ClaimLost, SpoolError
from relay.sandbox.script import ReplyOrText, Script, ScriptedReply, StartTls, Then
from tests.fakes.mail import CONTENT, entry
from tests.fakes.waiting import idle_seconds, patient
from tests.unit.deliver.conftest import QUICK, milliseconds

CLEAR = StartTls.ABSENT
PIPELINING = ("PIPELINING", "8BITMIME", "DSN", "SMTPUTF8")
PLAIN = ("8BITMIME", "DSN", "SMTPUTF8")
THREE = ("bob@dest.example", "carol@dest.example", "dave@dest.example")


def script(**answers: ReplyOrText | Sequence[ReplyOrText]) -> Script:
    return Script(offers=PIPELINING, starttls=CLEAR, replies=answers)


def hop(outcome: Outcome) -> HopSession:
    assert outcome.session is not None
    return outcome.session


def rcpt(**by_name) -> dict[str, ReplyOrText]:
    return {f"RCPT <{name}@dest.example>": answer for name, answer in by_name.items()}


both = pytest.mark.parametrize("offers", [PIPELINING, PLAIN], ids=["pipelined", "one-by-one"])


@both
async def test_each_recipient_gets_the_answer_it_was_given(rig, offers):
    answers = rcpt(carol="450 4.2.1 busy", dave="550 5.1.1 no such user")
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR, replies=answers))
    bob, carol, dave = (await rig.deliver(entry(*THREE))).values()
    assert isinstance(bob, Delivered)
    assert (bob.code, bob.status, bob.message) == (250, "2.0.0", "2.0.0 OK")
    assert isinstance(carol, Deferred)
    assert (carol.code, carol.status, carol.message) == (450, "4.2.1", "4.2.1 busy")
    assert isinstance(dave, Bounced)
    assert (dave.code, dave.status) == (550, "5.1.1")
    assert mx.messages[0].forward_paths == ("bob@dest.example",)


@both
async def test_only_recipients_refused_temporarily_are_tried_at_the_next_host(rig, offers):
    answers = rcpt(carol="450 4.2.1 busy", dave="550 5.1.1 no such user")
    await rig.mx(Script(offers=offers, starttls=CLEAR, replies=answers))
    second = await rig.mx(Script(offers=offers, starttls=CLEAR))
    bob, carol, dave = (await rig.deliver(entry(*THREE))).values()
    assert isinstance(bob, Delivered)
    assert isinstance(carol, Delivered)
    assert isinstance(dave, Bounced)
    assert second.messages[0].forward_paths == ("carol@dest.example",)
    assert "4.2.1 busy" in carol.hosts[0]


@pytest.mark.parametrize(
    "data", ["354 go on", "503 5.5.1 no valid recipients", "554 5.5.1 no valid recipients"]
)
async def test_no_message_is_sent_where_all_recipients_were_refused(rig, data):
    mx = await rig.mx(script(RCPT="550 5.1.1 no such user", DATA=(data, "354 go on")))
    outcomes = await rig.deliver(entry(*THREE))
    assert {(type(o), o.status) for o in outcomes.values()} == {(Bounced, "5.1.1")}
    assert [message.content for message in mx.messages] in ([], [b""])
    # The connection is in order after that: the next message goes over it.
    mx.connections[0].messages.clear()
    assert (await rig.send(entry())).status == "5.1.1"
    assert len(mx.connections) == 1


@both
@pytest.mark.parametrize(
    ("verb", "reply", "kind", "status"),
    [
        ("GREETING", "421 4.3.2 later", Deferred, "4.3.2"),
        ("GREETING", "554 5.7.1 go away", Deferred, "4.7.1"),
        ("MAIL", "451 4.3.0 later", Deferred, "4.3.0"),
        ("MAIL", "421 4.3.2 shutting down", Deferred, "4.3.2"),
        ("MAIL", "550 5.7.1 not you", Bounced, "5.7.1"),
        ("RCPT", "552 5.2.2 mailbox full", Deferred, "4.2.2"),
        ("RCPT", "550", Bounced, "5.0.0"),
        ("RCPT", "550 4.1.1 confused", Bounced, "5.0.0"),
        ("RCPT", "251 2.1.5 will forward", Delivered, "2.0.0"),
        ("DATA", "451 4.3.0 later", Deferred, "4.3.0"),
        ("DATA", "554 5.6.0 no", Bounced, "5.6.0"),
        ("DATA", "250 2.0.0 what?", Deferred, "4.4.2"),
        ("CONTENT", "451 4.3.0 later", Deferred, "4.3.0"),
        ("CONTENT", "421 4.3.0 later", Deferred, "4.3.0"),
        ("CONTENT", "554 5.7.1 spam", Bounced, "5.7.1"),
        ("CONTENT", "251 taken", Delivered, "2.0.0"),
        ("CONTENT", "200 taken", Delivered, "2.0.0"),
    ],
)
async def test_a_reply_is_judged_by_its_first_digit_and_its_stage(
    rig, offers, verb, reply, kind, status
):
    await rig.mx(Script(offers=offers, starttls=CLEAR, replies={verb: reply}))
    outcome = await rig.send(entry())
    assert (type(outcome), outcome.status) == (kind, status)
    if kind is not Delivered and status != "4.4.2":
        assert outcome.code == int(reply[:3])
        assert outcome.description.startswith("mx1.dest.example [127.0.1.1] answered ")


@pytest.mark.parametrize("verb", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("then", [Then.SILENCE, Then.CLOSE, Then.RESET])
async def test_host_that_falls_silent_before_the_content_is_given_up_for_the_next(rig, verb, then):
    await rig.mx(script(**{verb: ScriptedReply(None, then=then)}))
    second = await rig.mx(script())
    outcome = await rig.send(entry())
    assert isinstance(outcome, Delivered)
    assert hop(outcome).mx_host == second.name
    assert len(outcome.hosts) == 1


@pytest.mark.parametrize("verb", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("then", [Then.SILENCE, Then.CLOSE, Then.RESET])
async def test_silence_of_the_last_host_defers(rig, verb, then):
    await rig.mx(script(**{verb: ScriptedReply(None, then=then)}))
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.4.2", False)
    assert outcome.code == (Code.NO_CONNECTION if verb == "GREETING" else Code.NONE)


@pytest.mark.parametrize("then", [Then.SILENCE, Then.CLOSE, Then.RESET])
@pytest.mark.parametrize("text", [None, b"garbage\r\n", b"354 go on\r\n"])
async def test_message_without_a_reply_to_the_final_dot_is_in_doubt_and_tried_at_no_other_host(
    rig, then, text
):
    await rig.mx(script(CONTENT=ScriptedReply(text, then=then)))
    second = await rig.mx(script())
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.4.2", True)
    assert second.connections == []


async def test_failed_connection_has_code_680(rig):
    mx = await rig.mx()
    await mx.close()
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.code, outcome.session) == ("4.4.1", Code.NO_CONNECTION, None)
    assert outcome.description == "mx1.dest.example [127.0.1.1]: Connection refused"


async def test_reply_of_a_host_decides_before_the_silence_of_another(rig):
    await rig.mx(script(MAIL="451 4.3.5 misconfigured"))
    gone = await rig.mx()
    await gone.close()
    outcome = await rig.send(entry())
    assert outcome.status == "4.3.5"
    assert "Connection refused" in outcome.hosts[0]


@both
@pytest.mark.parametrize("verb", ["MAIL", "RCPT", "DATA"])
async def test_421_in_the_middle_defers_only_what_was_not_settled_yet(rig, offers, verb):
    answers = rcpt(bob="550 5.1.1 no such user") | {
        verb: ScriptedReply("421 4.3.2 shutting down", then=Then.CLOSE)
    }
    if verb == "RCPT":
        answers = rcpt(
            bob="550 5.1.1 no", dave=ScriptedReply("421 4.3.2 shutting down", then=Then.CLOSE)
        )
    await rig.mx(Script(offers=offers, starttls=CLEAR, replies=answers))
    bob, carol, dave = (await rig.deliver(entry(*THREE))).values()
    assert isinstance(bob, Deferred if verb == "MAIL" else Bounced)
    assert (carol.status, dave.status) == ("4.3.2", "4.3.2")
    assert carol.code == 421


@both
async def test_too_many_recipients_are_named_in_another_transaction(rig, offers):
    limit = ["250 OK", "250 OK", "452 4.5.3 too many recipients", "250 OK"]
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR, replies={"RCPT": limit}))
    outcomes = await rig.deliver(entry(*(f"r{n}@dest.example" for n in range(4))))
    assert {type(outcome) for outcome in outcomes.values()} == {Delivered}
    assert [path for message in mx.messages for path in message.forward_paths] == [
        f"r{n}@dest.example" for n in (0, 1, 3, 2)
    ]
    assert len(mx.connections) == 1


async def test_host_that_refuses_every_recipient_is_not_asked_for_ever(rig):
    mx = await rig.mx(script(RCPT="452 4.2.2 mailbox full"))
    outcomes = await rig.deliver(entry(*THREE))
    assert {(type(o), o.status) for o in outcomes.values()} == {(Deferred, "4.2.2")}
    assert mx.connections[0].verbs.count("MAIL") == 1


@both
async def test_transaction_names_at_most_a_hundred_recipients(rig, offers):
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR))
    outcomes = await rig.deliver(entry(*(f"r{n}@dest.example" for n in range(250))))
    assert {type(outcome) for outcome in outcomes.values()} == {Delivered}
    assert [len(message.forward_paths) for message in mx.messages] == [100, 100, 50]
    assert len(mx.connections) == 1


@both
async def test_a_host_that_closes_after_each_message_gets_the_rest_over_new_connections(
    rig, offers
):
    closing = ScriptedReply("250 2.0.0 OK", then=Then.CLOSE)
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR, replies={"CONTENT": closing}))
    outcomes = await rig.deliver(entry(*(f"r{n}@dest.example" for n in range(250))))
    assert {type(outcome) for outcome in outcomes.values()} == {Delivered}
    assert [len(connection.messages) for connection in mx.connections] == [1, 1, 1]
    assert [len(message.forward_paths) for message in mx.messages] == [100, 100, 50]


async def test_recipient_with_a_reply_is_not_named_again_over_a_new_connection(rig):
    busy: dict[str, ReplyOrText] = {
        "RCPT <r0@dest.example>": "450 4.2.1 busy",
        "CONTENT": ScriptedReply("250 2.0.0 OK", then=Then.CLOSE),
    }
    mx = await rig.mx(Script(offers=PIPELINING, starttls=CLEAR, replies=busy))
    outcomes = await rig.deliver(entry(*(f"r{n}@dest.example" for n in range(150))))
    assert isinstance(outcomes[0], Deferred)
    assert outcomes[0].status == "4.2.1"
    said = b"".join(connection.clear for connection in mx.connections)
    assert [said.count(f"<r{n}@dest.example>".encode()) for n in range(150)] == [1] * 150


GARBAGE = {
    "no code": b"hello there\r\n",
    "binary": bytes(range(128, 256)) + b"\r\n",
    "letters for digits": b"2x0 OK\r\n",
    "a code of six": b"650 OK\r\n",
    "no separator": b"250OK\r\n",
    "two minds": b"250-OK\r\n550 not OK\r\n",
    "a line without end": b"250 " + b"x" * 9000,
    "a long line": b"250 " + b"x" * 9000 + b"\r\n",
    "endless continuation": b"250-more\r\n" * 5000,
    "empty lines": b"\r\n" * 40_000,
}


@pytest.mark.parametrize("verb", ["GREETING", "EHLO", "MAIL", "RCPT", "DATA"])
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_text_that_is_no_reply_defers(rig, verb, garbage):
    await rig.mx(script(**{verb: ScriptedReply(garbage)}))
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.4.2", False)


@pytest.mark.parametrize(
    "reply",
    [b"250-2.0.0 first\r\n250-2.0.0 second\r\n250 2.0.0 third\r\n", b"250\r\n", b"250 OK\n"],
)
async def test_unusual_replies_are_understood(rig, reply):
    await rig.mx(script(CONTENT=ScriptedReply(reply)))
    assert isinstance(await rig.send(entry()), Delivered)


async def test_a_reply_that_drips_is_read_within_the_time_of_one_reply(rig):
    await rig.mx(script(MAIL=ScriptedReply("250 2.1.0 OK", drip=0.001)))
    assert isinstance(await rig.send(entry()), Delivered)
    await rig.mx(script(MAIL=ScriptedReply("250 " + "x" * 100, drip=0.05)))
    rig.hosts.pop(0)
    began = idle_seconds()
    assert (await rig.send(entry())).status == "4.4.2"
    assert idle_seconds() - began < 4, "all of it comes in 5 s"


@pytest.mark.parametrize("verb", ["EHLO", "MAIL", "RCPT", "DATA"])
@both
async def test_unsolicited_line_is_never_taken_for_the_reply_to_the_next_command(rig, verb, offers):
    usual = {
        "EHLO": b"250-mx\r\n250 X\r\n",
        "MAIL": b"250 OK\r\n",
        "RCPT": b"550 no\r\n",
        "DATA": b"354 go on\r\n",
    }
    if verb == "EHLO" and offers is PIPELINING:
        usual["EHLO"] = b"250-mx\r\n250 PIPELINING\r\n"
    extra = {"RCPT": b"550 no\r\n250 surprise\r\n", "EHLO": usual["EHLO"] + b"250 surprise\r\n"}
    text = extra.get(verb, usual[verb] + b"250 2.0.0 surprise\r\n")
    mx = await rig.mx(
        Script(
            offers=offers, starttls=CLEAR, replies={verb: ScriptedReply(text), "CONTENT": "554 no"}
        )
    )
    outcome = await rig.send(entry())
    assert not isinstance(outcome, Delivered)
    assert mx.messages == []


async def test_reply_before_the_end_of_the_content_is_read(rig):
    big = CONTENT + b"x" * 70 + b"\r\n" * 2_000_000
    mx = await rig.mx(script())

    async def refuse_soon():
        while not mx.connections or len(mx.connections[0].clear) < 100_000:
            await asyncio.sleep(0.001)
        for at_host in mx._protocols:
            at_host.transport.pause_reading()
            at_host.write(b"552 5.3.4 too much for us\r\n")

    refusing = asyncio.create_task(refuse_soon())
    outcome = await rig.send(entry(content=big))
    await refusing
    assert isinstance(outcome, Bounced)
    assert (outcome.code, outcome.status) == (552, "5.3.4")


async def test_a_slow_host_gets_all_of_a_large_message(rig):
    content = CONTENT + b"0123456789abcdef" * 20_000 + b"\r\n"
    mx = await rig.mx(replace(script(), read_bytes_per_second=150_000))
    rig.delivery["timeouts"] = replace(
        QUICK, data_block=milliseconds(900), final_reply=milliseconds(300)
    )
    outcome = await rig.send(entry(content=content))
    assert isinstance(outcome, Delivered)
    assert mx.messages[0].content == content
    assert hop(outcome).seconds > 1.0


async def test_a_host_that_stops_reading_is_left_after_the_time_of_a_block(rig):
    content = CONTENT + b"0123456789abcdef" * 1_000_000 + b"\r\n"
    await rig.mx(replace(script(), read_stops_after=200_000))
    began = time.monotonic()
    outcome = await rig.send(entry(content=content))
    assert isinstance(outcome, Deferred)
    assert (outcome.status, outcome.in_doubt) == ("4.4.2", False)
    assert 0.4 < time.monotonic() - began < patient(10)


async def test_content_that_comes_in_pieces_arrives_as_it_is(rig):
    pieces = [
        b"From: a@b.example\r",
        b"\n",
        b"\r\n",
        b".",
        b"\r\n.",
        b".x\r\n..",
        b"\r\n" + b"y" * 300_000,
        b"\r\n",
        b".",
    ]
    mx = await rig.mx(script())

    async def content() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    outcome = (await rig.attempt.run(entry(content=None, size_bytes=5), content))[0]
    assert isinstance(outcome, Delivered)
    assert mx.messages[0].content == b"".join(pieces) + b"\r\n"


async def test_half_a_message_never_looks_complete_when_the_store_fails(rig):
    mx = await rig.mx(
        Script(offers=PIPELINING, starttls=CLEAR, replies=rcpt(carol="550 5.1.1 no such user"))
    )
    second = await rig.mx(script())

    async def content() -> AsyncIterator[bytes]:
        yield CONTENT
        raise SpoolError("disk on fire")

    bob, carol, _ = (await rig.attempt.run(entry(*THREE, content=None), content)).values()
    assert isinstance(bob, Deferred)
    assert (bob.status, bob.in_doubt) == ("4.3.0", False)
    assert "disk on fire" in bob.description
    assert isinstance(carol, Bounced)
    await asyncio.sleep(0.05)
    assert (mx.messages, second.connections) == ([], [])


async def test_attempt_cancelled_before_the_final_dot_breaks_off(rig):
    mx = await rig.mx(script(DATA=ScriptedReply("354 go on", delay=5)))
    task = asyncio.create_task(rig.send(entry()))
    while not mx.connections or "DATA" not in mx.connections[0].verbs:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    assert mx.messages == []


async def test_attempt_cancelled_after_the_final_dot_waits_for_the_reply(rig):
    mx = await rig.mx(script(CONTENT=ScriptedReply("250 2.0.0 taken at last", delay=0.3)))
    task = asyncio.create_task(rig.deliver(entry(*(f"r{n}@dest.example" for n in range(101)))))
    while not mx.connections or not mx.messages:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    outcomes = await task
    assert {type(outcomes[n]) for n in range(100)} == {Delivered}
    assert isinstance(outcomes[100], Deferred)
    assert outcomes[100].status == "4.3.0"
    assert len(mx.messages) == 1


@both
async def test_extensions_are_used_where_they_are_offered(rig, offers):
    mx = await rig.mx(Script(offers=(*offers, "SIZE 1000000"), starttls=CLEAR))
    mail = entry(
        "bøb@dest.example",
        notify=[Notify.FAILURE, Notify.DELAY],
        orcpt="rfc822;Bob+40here@dest.example",
        reverse_path="å@sender.example",
        eight_bit=True,
        smtputf8=True,
        ret=Ret.HDRS,
        envid="AbC+3D",
        size_bytes=4711,
    )
    outcome = await rig.send(mail)
    assert isinstance(outcome, Delivered)
    assert (outcome.dsn_passed_on, hop(outcome).utf8) == (True, True)
    (message,) = mx.messages
    assert (
        message.mail
        == "FROM:<å@sender.example> SIZE=4711 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=AbC+3D"
    )
    assert message.recipients == (
        "TO:<bøb@dest.example> NOTIFY=DELAY,FAILURE ORCPT=rfc822;Bob+40here@dest.example",
    )


async def test_extensions_are_not_used_where_they_are_not_offered(rig):
    mx = await rig.mx(Script(offers=(), starttls=CLEAR))
    outcome = await rig.send(entry(notify=[Notify.NEVER], ret=Ret.FULL, envid="x", smtputf8=True))
    assert isinstance(outcome, Delivered)
    assert not outcome.dsn_passed_on
    assert (mx.messages[0].mail, mx.messages[0].recipients) == (
        "FROM:<a@sender.example>",
        ("TO:<bob@dest.example>",),
    )


@pytest.mark.parametrize(
    ("offers", "fields", "status"),
    [
        (("SIZE 10",), {}, "5.3.4"),
        ((), {"eight_bit": True, "content": "DKIM-Signature: x\r\n\r\nå\r\n".encode()}, "5.6.3"),
        (("8BITMIME",), {"reverse_path": "å@sender.example"}, "5.6.7"),
        (
            ("8BITMIME",),
            {"smtputf8": True, "eight_bit": True, "content": "Subject: å\r\n\r\nå\r\n".encode()},
            "5.6.9",
        ),
    ],
)
async def test_message_that_a_host_cannot_take_is_not_sent(rig, offers, fields, status):
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR))
    outcome = await rig.send(entry(**fields))
    assert isinstance(outcome, Bounced)
    assert (outcome.status, outcome.code) == (status, Code.NONE)
    assert hop(outcome).mx_host == mx.name
    assert "MAIL" not in mx.connections[0].verbs


LESS_ABLE = [
    (("SIZE 10",), {}, ("SIZE 1000",), "5.3.4"),
    ((), {"reverse_path": "å@sender.example"}, ("8BITMIME", "SMTPUTF8"), "5.6.7"),
    (
        (),
        {"eight_bit": True, "content": "DKIM-Signature: x\r\n\r\nå\r\n".encode()},
        ("8BITMIME",),
        "5.6.3",
    ),
]


@pytest.mark.parametrize(("few", "fields", "enough", "status"), LESS_ABLE)
async def test_message_that_one_host_cannot_take_goes_to_another_that_can(
    rig, few, fields, enough, status
):
    await rig.mx(Script(offers=few, starttls=CLEAR))
    able = await rig.mx(Script(offers=enough, starttls=CLEAR))
    outcome = await rig.send(entry(**fields))
    assert isinstance(outcome, Delivered)
    assert hop(outcome).mx_host == able.name
    assert len(able.messages) == 1
    assert len(outcome.hosts) == 1


@pytest.mark.parametrize(("few", "fields", "enough", "status"), LESS_ABLE)
async def test_message_that_no_host_can_take_bounces_after_all_were_tried(
    rig, few, fields, enough, status
):
    first = await rig.mx(Script(offers=few, starttls=CLEAR))
    second = await rig.mx(Script(offers=few, starttls=CLEAR))
    outcome = await rig.send(entry(**fields))
    assert isinstance(outcome, Bounced)
    assert outcome.status == status
    assert hop(outcome).mx_host == second.name
    assert [line.partition(" ")[0] for line in outcome.hosts] == [first.name]


@pytest.mark.parametrize("order", [0, 1])
async def test_message_that_one_host_cannot_take_waits_while_another_is_unreachable(rig, order):
    await rig.mx(Script(offers=("SIZE 10",), starttls=CLEAR))
    await (await rig.mx()).close()
    if order:
        rig.hosts.reverse()
    outcome = await rig.send(entry())
    assert isinstance(outcome, Deferred)
    assert outcome.status == "4.4.1"
    assert any("takes 10 octets" in line for line in outcome.hosts)


async def test_only_the_recipient_a_host_cannot_take_is_named_to_the_next(rig):
    first = await rig.mx(Script(offers=("8BITMIME",), starttls=CLEAR))
    second = await rig.mx(Script(offers=("8BITMIME", "SMTPUTF8"), starttls=CLEAR))
    outcomes = await rig.deliver(entry("bøb@dest.example", "carol@dest.example", smtputf8=True))
    assert all(isinstance(outcome, Delivered) for outcome in outcomes.values())
    assert first.messages[0].forward_paths == ("carol@dest.example",)
    assert second.messages[0].forward_paths == ("bøb@dest.example",)


async def test_address_that_cannot_be_sent_safely_is_sent_to_no_other_host(rig):
    await rig.mx(script())
    second = await rig.mx(script())
    mail = entry()
    mail = replace(mail, recipients=(replace(mail.recipients[0], address="bob@evil.example"),))
    assert isinstance(await rig.send(mail), Bounced)
    assert second.connections == []


@both
async def test_8_bit_content_goes_to_a_host_without_8bitmime_in_7_bits(rig, offers):
    mx = await rig.mx(Script(offers=tuple(o for o in offers if o != "8BITMIME"), starttls=CLEAR))
    assert isinstance(
        await rig.send(entry(eight_bit=True, content="Subject: x\r\n\r\n.å\r\n".encode())),
        Delivered,
    )
    (message,) = mx.messages
    assert message.mail == "FROM:<a@sender.example>"
    assert message.content.endswith(
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n.=C3=A5\r\n"
    )


async def test_a_large_message_is_converted_in_pieces(rig):
    mx = await rig.mx(Script(offers=("SIZE 100000000",), starttls=CLEAR))
    text = "Zeile mit ü\r\n" * 200_000
    mail = entry(eight_bit=True, content=f"Subject: x\r\n\r\n{text}".encode())
    assert isinstance(await rig.send(mail), Delivered)
    content = mx.messages[0].content
    assert content.partition(b"\r\n\r\n")[2] == text.replace("ü", "=C3=BC").encode()
    said = int(mx.messages[0].mail.partition("SIZE=")[2])
    assert len(content) <= said < 1.2 * len(content)


async def test_content_of_many_empty_parts_delays_no_other_session():
    content = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 8000
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.001)
            turns += 1

    others_at_work = asyncio.create_task(others())
    await _surveyed(content[:60_000])
    others_at_work.cancel()
    assert turns > 1


async def test_a_message_too_large_for_a_host_once_it_is_converted_is_not_sent(rig):
    mx = await rig.mx(Script(offers=("SIZE 3000",), starttls=CLEAR))
    outcome = await rig.send(
        entry(eight_bit=True, content=f"Subject: x\r\n\r\n{'å' * 1000}\r\n".encode())
    )
    assert isinstance(outcome, Bounced)
    assert outcome.status == "5.3.4"
    assert "MAIL" not in mx.connections[0].verbs


async def test_a_recipient_in_utf8_does_not_keep_the_others_from_their_mail(rig):
    mx = await rig.mx(Script(offers=("8BITMIME",), starttls=CLEAR))
    outcomes = await rig.deliver(entry("bøb@dest.example", "carol@dest.example", smtputf8=True))
    assert isinstance(outcomes[0], Bounced)
    assert outcomes[0].status == "5.6.7"
    assert isinstance(outcomes[1], Delivered)
    assert mx.messages[0].forward_paths == ("carol@dest.example",)


async def test_utf8_in_the_body_alone_needs_only_8bitmime(rig):
    mx = await rig.mx(Script(offers=("8BITMIME",), starttls=CLEAR))
    mail = entry(smtputf8=True, eight_bit=True, content="Subject: a\r\n\r\nå\r\n".encode())
    assert isinstance(await rig.send(mail), Delivered)
    assert mx.messages[0].mail == "FROM:<a@sender.example> BODY=8BITMIME"


@pytest.mark.parametrize(
    "address",
    [
        "bob\r\nRCPT TO:<eve@evil.example>@dest.example",
        "bob> x@dest.example",
        "bob\x00@dest.example",
        "b b@dest.example",
    ],
)
@pytest.mark.parametrize("side", ["recipient", "sender"])
async def test_address_that_could_be_two_commands_is_never_sent(rig, address, side):
    mx = await rig.mx(script())
    mail = entry()
    if side == "recipient":
        mail = replace(mail, recipients=(replace(mail.recipients[0], address=address),))
    else:
        mail = replace(mail, message=replace(mail.message, reverse_path=address))
    outcome = await rig.send(mail)
    assert isinstance(outcome, Bounced)
    assert outcome.status == ("5.1.3" if side == "recipient" else "5.1.7")
    assert mx.messages == []
    assert b"evil" not in mx.connections[0].clear


async def test_address_in_another_domain_than_was_authorised_is_never_sent(rig):
    mx = await rig.mx(script())
    mail = entry()
    mail = replace(mail, recipients=(replace(mail.recipients[0], address="bob@evil.example"),))
    assert (await rig.send(mail)).status == "5.1.3"
    assert b"evil" not in mx.connections[0].clear


async def test_ehlo_refused_and_helo_accepted_is_a_session_without_extensions(rig):
    mx = await rig.mx(Script(no_ehlo=True))
    assert isinstance(await rig.send(entry()), Delivered)
    assert mx.connections[0].verbs == ["EHLO", "HELO", "MAIL", "RCPT", "DATA"]


@pytest.mark.parametrize(
    "quit_reply",
    [ScriptedReply(None, then=Then.SILENCE), ScriptedReply(None, then=Then.RESET), "500 what?"],
)
async def test_the_result_never_waits_for_the_answer_to_quit(rig, quit_reply, monkeypatch):
    monkeypatch.setattr(protocol, "_QUIT_SECONDS", 4)
    mx = await rig.mx(script(QUIT=quit_reply))
    rig.limits = replace(rig.limits, messages=1)
    began = idle_seconds()
    assert isinstance(await rig.send(entry()), Delivered)
    assert idle_seconds() - began < 4
    async with asyncio.timeout(patient(20)):
        while not mx.connections[0].closed:
            await asyncio.sleep(0.01)
    assert mx.connections[0].verbs[-1] == "QUIT"


@both
@pytest.mark.parametrize(
    ("looks", "said"),
    [(0, None), (1, {"EHLO"}), (2, {"EHLO", "MAIL", "RCPT", "DATA"})],
    ids=["before connecting", "before MAIL", "before the final dot"],
)
async def test_an_attempt_whose_claim_is_over_goes_no_further(rig, offers, looks, said):
    mx = await rig.mx(Script(offers=offers, starttls=CLEAR))
    held = iter([True] * looks)
    rig.may_begin = lambda entry: next(held, False)
    with pytest.raises(ClaimLost):
        await rig.deliver(entry())
    assert [set(one.verbs) - {"QUIT"} for one in mx.connections] == ([] if said is None else [said])
    assert mx.messages == []


async def test_an_attempt_whose_claim_ends_behind_the_final_dot_has_its_result(rig):
    mx = await rig.mx(script())
    held = iter([True] * 3)
    rig.may_begin = lambda entry: next(held, False)
    assert isinstance(await rig.send(entry()), Delivered)
    assert len(mx.messages) == 1
