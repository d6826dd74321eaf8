"""The operator's verbs, said to a relay that runs: what they mean, and what they leave alone."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, listed, tokens
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink

NOBODY = {"host": "[127.0.0.31]", "port": 9}


@pytest.fixture
def relay(tmp_path: Path, mx: Sink) -> Iterator[Relay]:
    """With mail for two dead domains from two senders, deferred or put off, and a third that is
    well.
    """
    routes: dict[str, Any] = {"one.example": NOBODY, "two.example": NOBODY, **mx.route}
    with relay_process(tmp_path, routes=routes) as running:
        yield running


def fill(relay: Relay, *pairs: tuple[str, str]) -> list[str]:
    """A message for each (sender, recipient); their queue ids, when each dead domain has been
    tried.
    """
    ids: list[str] = []
    for sender, recipient in pairs:
        ledger = Ledger()
        ledger.hand_in(relay, tokens(1), sender=sender, recipient=recipient)
        ids += ledger.queue_ids()
        domain = recipient.partition("@")[2]
        tried = partial(relay.events, event="failed", recipient_domain=domain)
        wait_until(tried, what=f"a try at {domain}")
    return ids


MAIL = (
    ("a@a.example", "x@one.example"),
    ("b@b.example", "y@one.example"),
    ("a@a.example", "z@two.example"),
)


def found(relay: Relay, *filters: str) -> set[str]:
    return {item["queue-id"] for item in listed(relay, *filters)}


def states(relay: Relay) -> dict[str, str]:
    return {item["queue-id"]: item["state"] for item in listed(relay)}


def said(relay: Relay, *words: str, code: int = 0) -> str:
    done = relay.run("queue", *words)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_each_filter_finds_what_it_means_on_a_running_and_on_a_stopped_relay(relay: Relay) -> None:
    first, second, third = fill(relay, *MAIL)
    said(relay, "hold", second)

    def look() -> None:
        assert found(relay) == {first, second, third}
        assert found(relay, "--domain", "one.example") == {first, second}
        assert found(relay, "--domain", "ONE.example.") == {first, second}
        assert found(relay, "--sender", "a@a.example") == {first, third}
        assert found(relay, "--sender", "a@a.example", "--domain", "two.example") == {third}
        assert found(relay, "--state", "held") == {second}
        assert found(relay, "--older-than", "1h") == set()
        assert "3 messages" in said(relay, "list")
        shown = json.loads(said(relay, "show", first, "--json"))
        assert shown["sender"] == "a@a.example"
        assert shown["recipients"][0]["last"]["code"] == 680
        assert "Subject: token" in shown["header"]

    look()
    time.sleep(1)
    assert found(relay, "--older-than", "1s") == {first, second, third}
    relay.stop()
    look()
    for verb in ("retry", "hold", "release", "remove"):
        assert said(relay, verb, first, code=1) == ""


def test_held_mail_stays_over_a_restart_and_a_retry_until_it_is_released(
    relay: Relay, mx: Sink
) -> None:
    ids = fill(relay, *MAIL)
    assert said(relay, "hold", "--sender", "a@a.example") == "hold: 2 recipients\n"
    assert set(states(relay).values()) == {"held", "deferred"} or states(relay)[ids[1]] == "queued"
    relay.stop()
    relay.config["routes"] = mx.route
    relay.start()
    assert said(relay, "retry", "--all") == "retry: 1 recipient\n"
    wait_until(lambda: len(mx.contents) == 1, what="the one that is not held")
    time.sleep(0.5)
    assert set(states(relay).values()) == {"held"}
    assert said(relay, "release", ids[0]) == "release: 1 recipient\n"
    wait_until(lambda: len(mx.contents) == 2, what="the one released")
    assert said(relay, "release", "--domain", "two.example") == "release: 1 recipient\n"
    wait_until(lambda: len(mx.contents) == 3, what="the last")
    wait_until(lambda: listed(relay) == [], what="an empty queue")


def test_removed_mail_leaves_only_a_line_in_the_log(relay: Relay, mx: Sink) -> None:
    ids = fill(relay, *MAIL)
    assert (
        said(relay, "remove", "--domain", "one.example", "--sender", "b@b.example")
        == "remove: 1 recipient\n"
    )
    assert found(relay) == {ids[0], ids[2]}
    (told,) = relay.events(event="failed", severity="permanent")
    assert (told["queue-id"], told["reason"]) == (ids[1], "removed")
    assert said(relay, "remove", ids[1], code=1) == "remove: 0 recipients\n"
    assert said(relay, "show", ids[1], code=1) == ""
    assert said(relay, "remove", "--all", "--yes") == "remove: 2 recipients\n"
    assert listed(relay) == []
    time.sleep(0.3)
    assert mx.contents == [], "a report of what the operator removed"


def test_verb_without_a_filter_or_with_all_and_a_filter_changes_nothing(relay: Relay) -> None:
    ids = fill(relay, MAIL[0])
    for verb in ("retry", "hold", "release", "remove"):
        assert said(relay, verb, code=2) == ""
        assert said(relay, verb, "--all", "--domain", "one.example", code=2) == ""
    assert found(relay) == set(ids)


def test_retry_tries_a_silent_destination_at_once(relay: Relay) -> None:
    fill(relay, *MAIL)
    tried = len(relay.events(event="failed", recipient_domain="one.example"))
    assert said(relay, "retry", "--domain", "one.example") == "retry: 2 recipients\n"
    wait_until(
        lambda: len(relay.events(event="failed", recipient_domain="one.example")) > tried,
        what="a new attempt",
    )


@pytest.mark.needs("smtp-source")
@pytest.mark.torture
def test_long_work_shows_how_far_it_is_and_mail_flows_meanwhile(
    relay: Relay, mx: Sink, long_form: bool
) -> None:
    count = 100_000 if long_form else 2_000
    command = [
        "smtp-source",
        "-s",
        "20",
        "-m",
        str(count),
        "-f",
        "a@a.example",
        "-t",
        "x@one.example",
    ]
    subprocess.run([*command, f"127.0.0.1:{relay.port}"], check=True, timeout=900)
    took = {}
    for verb in ("hold", "release", "retry", "remove"):
        began = time.monotonic()
        shown = on_a_terminal(relay, verb, "--domain", "one.example")
        took[verb] = time.monotonic() - began
        (changed,) = re.findall(rf"{verb}: (\d+) recipients", shown)
        # What is being tried at this moment is left to its attempt.
        assert count - 25 <= int(changed) <= count
        assert re.search(r"\d recipients .*\d:\d\d:\d\d", shown), "no progress"
    ledger = Ledger()
    ledger.hand_in(relay, tokens(1))
    ledger.settle(relay, mx, seconds=5)
    assert len(listed(relay)) <= 25
    seconds = ", ".join(f"{verb} {value:.1f} s" for verb, value in took.items())
    sys.stderr.write(f"\nthe operator and {count} messages: {seconds}\n")


def on_a_terminal(relay: Relay, *words: str) -> str:
    """What a person sees of a command of `relay queue`."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "relay", "queue", "-c", str(relay.config_file), *words]
    process = subprocess.Popen(
        command,
        cwd=relay.directory,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    assert process.wait(timeout=patient(60)) == 0, shown
    return shown.decode("utf-8", "replace")
