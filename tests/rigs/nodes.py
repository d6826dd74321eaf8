"""Relays that share a queue on PostgreSQL, and what all of them together say of the mail."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, tokens
from tests.rigs.ports import free_port, wait_until
from tests.rigs.postgres import Postgres
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink

LEASE_SECONDS = 6


@contextlib.contextmanager
def node(
    directory: Path,
    server: Postgres,
    mx: Sink,
    name: str,
    *,
    start: bool = True,
    url: str | None = None,
    **more: Any,
) -> Iterator[Relay]:
    """A relay that is a node of the queue on the server; it has a directory of its own, and a port
    for HTTP. `url`: another way to the server.
    """
    home = directory / name
    home.mkdir()
    admin = {"http": f"127.0.0.1:{free_port()}", "api_keys": ["a-long-random-key"]}
    admin |= more.pop("admin", {})
    with relay_process(home, start=False, routes=mx.route, admin=admin, **more) as relay:
        relay.config["queue"] = {
            "url": url or server.url(),
            "node": name,
            "lease": f"{LEASE_SECONDS}s",
            "retry": ["1s"],
        }
        if start:
            relay.start()
        yield relay


def health(relay: Relay, path: str) -> int:
    """The code of `/healthz` or `/readyz`."""
    try:
        with urllib.request.urlopen(
            f"http://{relay.config['admin']['http']}{path}", timeout=10
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def states(relay: Relay) -> dict[str, str]:
    """The state of each node, as one of them says."""
    return {one["name"]: one["state"] for one in relay.ask("nodes")}


def arrived(mx: Sink, words: Iterable[str]) -> bool:
    """Whether all of them did."""
    words = set(words)
    return set(mx.tokens(words)) == words


def accepts(relay: Relay, ledger: Ledger) -> bool:
    """Whether a relay takes a message, which the ledger notes."""
    word = tokens(1)
    ledger.hand_in(relay, word)
    return bool(ledger.accepted & set(word))


@contextlib.contextmanager
def handing_in(relay: Relay, ledger: Ledger, words: Sequence[str], **more: Any) -> Iterator[None]:
    """A client that waits for its replies while the body of the `with` runs."""
    client = threading.Thread(target=ledger.hand_in, args=(relay, words), kwargs=more)
    client.start()
    try:
        yield
    finally:
        client.join(timeout=patient(60))
        assert not client.is_alive(), "a client hangs"


def check_both_ends(
    relays: Sequence[Relay], mx: Sink, ledger: Ledger, *, twice: int = 0, seconds: float = 60
) -> None:
    """What clients heard, what the host saw and what all logs together say are one story.

    `twice`: how many messages may have come again, because they were past MAIL.
    """
    wait_until(lambda: arrived(mx, ledger.accepted), seconds=seconds, what="all that had a 250")
    ledger.check_refused(mx)
    assert ledger.duplicates(mx) <= twice
    own = ledger.queue_ids()
    wait_until(
        lambda: own <= _ids(relays, "accepted") and own <= _ids(relays, "delivered"),
        seconds=seconds,
        what="the lines of the delivery logs",
    )
    ends: dict[tuple[str, str], set[str]] = defaultdict(set)
    for relay in relays:
        for event in relay.events():
            if event["event"] == "delivered" or event.get("severity") == "permanent":
                ends[event["queue-id"], event["recipient"]].add(event["id"])
    more = {key: ids for key, ids in ends.items() if len(ids) != 1}
    assert not more, f"more than one end: {more}"


def _ids(relays: Sequence[Relay], event: str) -> set[str]:
    return {one["queue-id"] for relay in relays for one in relay.events(event=event)}
