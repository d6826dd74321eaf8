"""Postfix's smtp-sink as the next hop, in each of its moods: what becomes of a message there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, free_port, wait_until
from tests.rigs.sandbox import Sandbox

pytestmark = [pytest.mark.needs("smtp-sink"), pytest.mark.timeout(120)]

DELIVERED, DEFERRED, BOUNCED = ("delivered", None), ("failed", "temporary"), ("failed", "permanent")


@dataclass(frozen=True)
class Mood:
    """Arguments of smtp-sink; the event they lead to, its code, and what is in doubt after the
    final dot.
    """

    arguments: str
    outcome: tuple[str, str | None]
    code: int
    status: str = ""
    in_doubt: bool = False


MOODS = (
    Mood("", DELIVERED, 250),
    Mood("-8 -e", DELIVERED, 250),
    Mood("-8", DELIVERED, 250),
    Mood("-p -E -N", DELIVERED, 250),
    Mood("-P", DELIVERED, 250),
    Mood("-F -C -a", DELIVERED, 250),
    Mood("-f EHLO", DELIVERED, 250),
    Mood("-f RSET", DELIVERED, 250),
    Mood("-f QUIT", DELIVERED, 250),
    Mood("-q QUIT", DELIVERED, 250),
    Mood("-Q QUIT", DELIVERED, 250),
    # Refused for good: only from MAIL on is it about the message (RFC 5321 §4.2.1).
    Mood("-f CONNECT", DEFERRED, 500, "4.4.1"),
    Mood("-f EHLO,HELO", DEFERRED, 500, "4.4.1"),
    Mood("-f MAIL", BOUNCED, 500, "5.3.0"),
    Mood("-f RCPT", BOUNCED, 500, "5.3.0"),
    Mood("-f DATA", BOUNCED, 500, "5.3.0"),
    Mood("-f .", BOUNCED, 500, "5.3.0"),
    Mood("-f RCPT -E -B 550_no_such_user", BOUNCED, 550, "5.0.0"),
    # Refused for now.
    Mood("-r CONNECT", DEFERRED, 450, "4.4.1"),
    Mood("-r EHLO,HELO", DEFERRED, 450, "4.4.1"),
    Mood("-r MAIL", DEFERRED, 450, "4.3.0"),
    Mood("-r RCPT", DEFERRED, 450, "4.3.0"),
    Mood("-r DATA", DEFERRED, 450, "4.3.0"),
    Mood("-r .", DEFERRED, 450, "4.3.0"),
    # 421, and the connection closes.
    Mood("-Q CONNECT", DEFERRED, 421),
    Mood("-Q EHLO", DEFERRED, 421),
    # With PIPELINING it closes on commands it has not read, and the reset may overtake the 421.
    Mood("-p -Q MAIL", DEFERRED, 421),
    Mood("-p -Q RCPT", DEFERRED, 421),
    Mood("-Q DATA", DEFERRED, 421),
    Mood("-Q .", DEFERRED, 421),
    # The connection closes without a word.
    Mood("-q CONNECT", DEFERRED, 680),
    Mood("-q EHLO", DEFERRED, 0),
    Mood("-q MAIL", DEFERRED, 0),
    Mood("-q RCPT", DEFERRED, 0),
    Mood("-q DATA", DEFERRED, 0),
    Mood("-q .", DEFERRED, 0, in_doubt=True),
)


@contextlib.contextmanager
def smtp_sink(mood: Mood) -> Iterator[int]:
    """A sink on a port of its own, which it returns."""
    port = free_port()
    program = shutil.which("smtp-sink", path="/usr/sbin:/usr/bin:/sbin:/bin") or "smtp-sink"
    arguments = [word.replace("_", " ") for word in mood.arguments.split()]
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    command = [program, "-4", *user, *arguments, f"127.0.0.1:{port}", "100"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: accepts_connections("127.0.0.1", port), what="smtp-sink")
        yield port
    finally:
        process.terminate()
        process.wait(timeout=patient(10))


async def test_each_behaviour_of_smtp_sink_has_the_expected_outcome(sandbox: Sandbox) -> None:
    with contextlib.ExitStack() as stack:
        routes = {}
        for number, mood in enumerate(MOODS):
            port = stack.enter_context(smtp_sink(mood))
            routes[f"mood{number}.example"] = {"host": "[127.0.0.1]", "port": port}
        await sandbox.start(routes=routes)
        for number in range(len(MOODS)):
            await sandbox.submit("ann@sender.example", f"b@mood{number}.example", body="grüße")
        recipients = {f"b@mood{number}.example" for number in range(len(MOODS))}
        found = await sandbox.all_attempted(recipients, seconds=30)
    told = {
        mood.arguments: (
            (event["event"], event.get("severity")),
            event["delivery-status"]["code"],
            mood.status and event["delivery-status"]["enhanced-code"],
            event["delivery-status"].get("in-doubt", False),
        )
        for number, mood in enumerate(MOODS)
        for event in found[f"b@mood{number}.example"][:1]
    }
    assert told == {
        mood.arguments: (mood.outcome, mood.code, mood.status, mood.in_doubt) for mood in MOODS
    }


@pytest.mark.parametrize("arguments", ["-A 0", "-A 1", "-Q MAIL", "-q RCPT"])
async def test_a_host_that_ends_the_session_at_the_wrong_moment_has_taken_nothing(
    sandbox: Sandbox, arguments: str
) -> None:
    """What is read of its last words depends on the moment; that nothing was delivered does not."""
    with smtp_sink(Mood(arguments, DEFERRED, 0)) as port:
        await sandbox.start(routes={"mood.example": {"host": "[127.0.0.1]", "port": port}})
        await sandbox.submit("ann@sender.example", "b@mood.example")
        [event] = await sandbox.attempts("b@mood.example")
    status = event["delivery-status"]
    assert event["event"] == "failed"
    assert (event["severity"], status["code"]) in [
        ("temporary", 0),
        ("temporary", 421),
        ("permanent", 550),
    ]
