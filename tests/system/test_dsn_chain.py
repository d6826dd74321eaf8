"""Delivery status notifications at both ends: what a sender asks for (RFC 3461), and gets (RFC
3464).
"""

from __future__ import annotations

import asyncio
import email
import email.message
import smtplib
from dataclasses import dataclass
from email.policy import default
from pathlib import Path
from typing import Any

import pytest

from relay.sandbox.mx import MxServer
from relay.sandbox.script import Script, ScriptedReply
from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sandbox import Sandbox

NO_DSN = Script(offers=("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES"))
REFUSES = Script(replies={"RCPT": "550 5.1.1 no such user"})
BUSY = Script(replies={"RCPT": "450 4.2.1 busy"})
CLOSED = Script(replies={"GREETING": "421 4.3.2 not now"})
SILENT = Script(replies={"GREETING": ScriptedReply(None)})
CONTENT = (
    b"Subject: hello\r\nFrom: a@client.example\r\nMessage-ID: <m1@client.example>\r\n\r\n"
    b"the body\r\n"
)


@dataclass(frozen=True)
class Dsn:
    """A report as it arrived at the sender's host."""

    envelope: str
    message: email.message.EmailMessage

    @property
    def status(self) -> list[email.message.Message]:
        """The groups of fields: the message's, then each recipient's."""
        (part,) = [
            p for p in self.message.walk() if p.get_content_type() == "message/delivery-status"
        ]
        groups: Any = part.get_payload()
        return list(groups)

    @property
    def actions(self) -> dict[str, str]:
        return {
            str(group["Final-Recipient"]).partition(";")[2].strip(): str(group["Action"])
            for group in self.status[1:]
        }

    @property
    def returned(self) -> bytes:
        """The last part: what of the message came back."""
        parts: Any = self.message.get_payload()
        return bytes(parts[-1].as_bytes())


@dataclass
class World:
    """The sender's own host, which gets the reports, and a relay."""

    sandbox: Sandbox
    sender: MxServer

    async def start(self, **sections: Any) -> Relay:
        return await self.sandbox.start(**sections)

    def hand_in(
        self,
        *recipients: str,
        sender: str = "a@client.example",
        mail: tuple[str, ...] = (),
        rcpt: tuple[str, ...] = (),
        content: bytes = CONTENT,
    ) -> None:
        assert self.sandbox.relay is not None
        with smtplib.SMTP("127.0.0.1", self.sandbox.relay.port, timeout=patient(20)) as client:
            client.ehlo("client.example")
            assert client.mail(sender, list(mail))[0] == 250
            for recipient in recipients:
                code, text = client.rcpt(recipient, list(rcpt))
                assert code == 250, text
            assert client.data(content)[0] == 250

    async def give(self, *recipients: str, **more: Any) -> None:
        await asyncio.to_thread(self.hand_in, *recipients, **more)

    async def reports(self, count: int, *, seconds: float = 60) -> list[Dsn]:
        await self.sender.wait_for_messages(count, timeout=patient(seconds))
        await asyncio.sleep(0.3)
        assert len(self.sender.messages) == count, "more reports than that"
        return [
            Dsn(one.mail, email.message_from_bytes(one.content, policy=default))
            for one in self.sender.messages
        ]

    async def nothing_left(self) -> None:
        """The queue is empty, and nothing more comes."""
        relay = self.sandbox.relay
        assert relay is not None
        await asyncio.to_thread(wait_until, lambda: relay.ask("list") == [], what="an empty queue")


@pytest.fixture
async def world(sandbox: Sandbox) -> World:
    return World(sandbox, await sandbox.domain("client.example"))


async def test_dsn_parameters_of_a_sender_are_passed_on_unchanged(world: World) -> None:
    mx = await world.sandbox.domain("dest.example")
    await world.start()
    await world.give(
        "b@dest.example",
        mail=("RET=HDRS", "ENVID=QQ+3D314159"),
        rcpt=("NOTIFY=SUCCESS,DELAY", "ORCPT=rfc822;old+2Bname@dest.example"),
    )
    (message,) = await mx.wait_for_messages(1)
    assert {"RET=HDRS", "ENVID=QQ+3D314159"} <= set(message.mail.split())
    (recipient,) = message.recipients
    words = recipient.split()
    assert "ORCPT=rfc822;old+2Bname@dest.example" in words
    (notify,) = [word for word in words if word.startswith("NOTIFY=")]
    assert set(notify.removeprefix("NOTIFY=").split(",")) == {"SUCCESS", "DELAY"}
    await world.nothing_left()
    assert world.sender.messages == [], "that report is the next host's duty (RFC 3461 §5.2.1)"


async def test_relay_sends_the_relayed_report_for_a_host_without_dsn(world: World) -> None:
    mx = await world.sandbox.domain("plain.example", NO_DSN)
    await world.start()
    await world.give(
        "b@plain.example",
        mail=("RET=FULL", "ENVID=E1"),
        rcpt=("NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;first@plain.example"),
    )
    (report,) = await world.reports(1)
    assert not {"RET", "ENVID", "NOTIFY", "ORCPT"} & {
        word.partition("=")[0]
        for said in (mx.messages[0].mail, *mx.messages[0].recipients)
        for word in said.split()
    }
    assert report.envelope.startswith("FROM:<> ")
    assert report.actions == {"b@plain.example": "relayed"}
    assert report.status[0]["Original-Envelope-Id"] == "E1"
    assert (
        str(report.status[1]["Original-Recipient"]).replace(" ", "") == "rfc822;first@plain.example"
    )
    assert str(report.status[1]["Status"]).startswith("2.")
    assert b"the body" not in report.returned  # RFC 3461 §4.3: FULL is for failures
    await world.nothing_left()


@pytest.mark.parametrize(("ret", "is_whole"), [("FULL", True), ("HDRS", False), (None, False)])
async def test_bounce_returns_what_ret_asks_for(
    world: World, ret: str | None, is_whole: bool
) -> None:
    await world.sandbox.domain("no.example", REFUSES)
    await world.start()
    await world.give("b@no.example", mail=(f"RET={ret}",) if ret else ())
    (report,) = await world.reports(1)
    assert report.actions == {"b@no.example": "failed"}
    assert report.status[1]["Status"] == "5.1.1"
    assert b"<m1@client.example>" in report.returned
    assert (b"the body" in report.returned) is is_whole
    await world.nothing_left()


async def test_sender_who_asks_for_no_report_gets_none(world: World) -> None:
    await world.sandbox.domain("no.example", REFUSES)
    await world.sandbox.domain("plain.example", NO_DSN)
    await world.start()
    await world.give("b@no.example", "c@plain.example", rcpt=("NOTIFY=NEVER",))
    await world.give("b@no.example", rcpt=("NOTIFY=SUCCESS,DELAY",))
    await world.nothing_left()
    await asyncio.sleep(0.3)
    assert world.sender.messages == []


async def test_sender_gets_one_delay_notice_and_one_bounce(world: World) -> None:
    await world.sandbox.domain("busy.example", BUSY)
    await world.start(queue={"retry": ["3s"], "lifetime": "12s", "warn_after": "6s"})
    await world.give("b@busy.example", mail=("ENVID=E2",))
    delayed, failed = await world.reports(2)
    assert delayed.actions == {"b@busy.example": "delayed"}
    assert delayed.status[1]["Will-Retry-Until"]
    assert failed.actions == {"b@busy.example": "failed"}
    assert failed.status[1]["Status"] == "4.4.7"
    assert "450 4.2.1 busy" in str(failed.status[1]["Diagnostic-Code"])
    assert (
        delayed.status[0]["Original-Envelope-Id"]
        == failed.status[0]["Original-Envelope-Id"]
        == "E2"
    )
    await world.nothing_left()


async def test_recipients_in_three_domains_are_one_report(world: World) -> None:
    for domain in ("one.example", "two.example", "three.example"):
        await world.sandbox.domain(domain, REFUSES)
    good = await world.sandbox.domain("good.example")
    await world.start()
    await world.give(
        "a@one.example", "b@good.example", "c@two.example", "d@three.example", "e@one.example"
    )
    (report,) = await world.reports(1)
    assert set(report.actions) == {
        "a@one.example",
        "c@two.example",
        "d@three.example",
        "e@one.example",
    }
    assert set(report.actions.values()) == {"failed"}
    assert len(good.messages) == 1
    await world.nothing_left()


async def test_three_dead_domains_are_one_delay_notice_and_one_bounce(world: World) -> None:
    """One is busy, one closes at once, and at one nobody listens."""
    await world.sandbox.domain("busy.example", BUSY)
    await world.sandbox.domain("closed.example", CLOSED)
    world.sandbox.dns.a("mx.gone.example", "127.7.250.250")
    world.sandbox.dns.mx("gone.example", (10, "mx.gone.example"))
    recipients = {"a@busy.example", "b@closed.example", "c@gone.example"}
    await world.start(queue={"retry": ["3s"], "lifetime": "12s", "warn_after": "6s"})
    await world.give(*recipients)
    delayed, failed = await world.reports(2)
    assert delayed.actions == dict.fromkeys(recipients, "delayed")
    assert all(group["Will-Retry-Until"] for group in delayed.status[1:])
    assert failed.actions == dict.fromkeys(recipients, "failed")
    assert delayed.status[0]["X-Queue-ID"] == failed.status[0]["X-Queue-ID"]
    await world.nothing_left()
    told = world.sandbox.events(event="failed", severity="permanent")
    assert sorted(event["recipient"] for event in told) == sorted(recipients)
    assert {event["delivery-status"]["code"] for event in told} == {602}
    to_sender = world.sandbox.events(event="delivered", recipient="a@client.example")
    assert len(to_sender) == 2
    queue_ids = {event["queue-id"] for event in world.sandbox.events(event="accepted")}
    assert len(queue_ids) == 3  # the message and two reports


async def test_results_before_and_after_kill_9_are_one_report(world: World) -> None:
    """One domain has told its last when the relay dies, and another, asked at the same moment, has
    not.
    """
    first = [CLOSED] * 2  # each attempt is a connection
    silent = [
        await world.sandbox.domain(f"{name}.example", *first, SILENT) for name in ("two", "four")
    ]
    await world.sandbox.domain("one.example", CLOSED)
    await world.sandbox.domain("three.example", *first, REFUSES)
    relay = await world.start(queue={"retry": ["4s"], "lifetime": "5d", "warn_after": "8s"})
    await world.give("a@one.example", "b@two.example")
    await world.give("c@three.example", "d@four.example")
    await world.sandbox.attempts("a@one.example", 3)
    await world.sandbox.attempts("c@three.example", 3)
    await asyncio.to_thread(
        wait_until,
        lambda: all(len(mx.connections) == 3 for mx in silent),
        what="the others' third attempts",
    )
    await asyncio.to_thread(relay.kill)
    assert world.sender.messages == []
    for mx, then in zip(silent, (CLOSED, REFUSES), strict=True):
        mx.scripts = (then,)
    await asyncio.to_thread(relay.start)
    one, other = await world.reports(2)
    assert sorted([one.actions, other.actions], key=str) == [
        {"a@one.example": "delayed", "b@two.example": "delayed"},
        {"c@three.example": "failed", "d@four.example": "failed"},
    ]


async def test_report_that_kill_9_interrupts_is_sent_once(world: World) -> None:
    await world.sandbox.domain("one.example", REFUSES)
    hanging = await world.sandbox.domain("two.example", CLOSED)
    relay = await world.start()
    await world.give("a@one.example", "b@two.example")
    await world.reports(1)
    await asyncio.to_thread(relay.kill)
    await asyncio.to_thread(relay.start)
    await asyncio.sleep(1)
    assert len(await world.reports(1)) == 1
    assert hanging.messages == []


async def test_no_report_goes_to_the_null_reverse_path_or_is_about_a_report(world: World) -> None:
    await world.sandbox.domain("no.example", REFUSES)
    # The sender's own host refuses reports, too: there is nobody left to tell.
    mean = await world.sandbox.domain(
        "mean.example", Script(replies={"MAIL": "550 5.7.1 no bounces here"})
    )
    await world.start()
    await world.give("b@no.example", sender="")
    await world.give("b@no.example", sender="c@mean.example")
    await world.give("b@no.example", sender="d@no.example")
    await world.nothing_left()
    await asyncio.sleep(0.3)
    assert world.sender.messages == mean.messages == []
    ends = [
        event for event in world.sandbox.events(event="failed") if event["severity"] == "permanent"
    ]
    assert len(ends) == 5  # three messages and two reports, each ended in the log
    assert [event["envelope"]["sender"] for event in ends].count("") == 3


async def test_a_message_in_circles_ends_and_its_sender_is_told(
    world: World, tmp_path: Path
) -> None:
    """Two relays that send each other the same domain: a mistake of their administrators."""
    relay = await world.sandbox.prepare(limits={"received_hops": 8})
    back: dict[str, Any] = {"routes": {"loop.example": {"host": "[127.0.0.1]", "port": relay.port}}}
    name_server = world.sandbox.dns.nameserver
    with relay_process(
        tmp_path, dns=name_server, delivery_port=world.sandbox.delivery_port, **back
    ) as other:
        relay.config["routes"] = {"loop.example": {"host": "[127.0.0.1]", "port": other.port}}
        await asyncio.to_thread(relay.start)
        await world.give("b@loop.example")
        (report,) = await world.reports(1)
        await world.nothing_left()
        assert report.actions == {"b@loop.example": "failed"}
        assert report.status[1]["Status"] == "5.4.6"
        assert len(world.sandbox.events(event="accepted")) <= 8
