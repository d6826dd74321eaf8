"""What clients were answered, set against what became of it: the oracle of the fault tests.

A client notes the reply to each message it hands in. Afterwards:

    answered 2yz    has arrived, or its sender has a report, or it is in the queue and listed
    answered else   never arrives
    not answered    may have arrived, once
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import smtplib
import threading
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from relay.admin.client import NotRunning
from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay
from tests.rigs.sink import Sink

LINES = ("x" * 74 + "\r\n") * 40
LARGE = ("y" * 74 + "\r\n") * 8000
"""What goes through a file of its own in the queue."""
_numbers = itertools.count(1)


def tokens(count: int) -> list[str]:
    """Words no other message has."""
    return [f"token{next(_numbers):06}z" for _ in range(count)]


@dataclass
class Ledger:
    """Messages by their token: answered with which code, or 0 for none."""

    codes: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> set[str]:
        return {token for token, code in list(self.codes.items()) if 200 <= code < 300}

    @property
    def refused(self) -> set[str]:
        return {token for token, code in list(self.codes.items()) if code >= 400}

    def queue_ids(self) -> set[str]:
        """Of what was accepted, by the reply's last word."""
        return {self.texts[token].split()[-1] for token in self.accepted}

    def hand_in(
        self,
        relay: Relay,
        some: Iterable[str],
        *,
        recipient: str | Sequence[str] = "b@dest.example",
        sender: str = "a@client.example",
        body: str = LINES,
        tenth: str | None = None,
        timeout: float = 30,
    ) -> None:
        """One connection, one message after the other; ends where the relay ends it.

        `tenth`: the body of each tenth message.
        """
        left = list(some)
        self.codes |= dict.fromkeys(left, 0)
        with contextlib.suppress(OSError, smtplib.SMTPServerDisconnected, smtplib.SMTPConnectError):
            client = smtplib.SMTP("127.0.0.1", relay.port, timeout=timeout)
            try:
                client.ehlo("client.example")
                for token in left:
                    is_tenth = tenth is not None and token.endswith("0z")
                    self.one(
                        client, token, sender, recipient, tenth if tenth and is_tenth else body
                    )
                client.quit()
            finally:
                client.close()

    def one(
        self,
        client: smtplib.SMTP,
        token: str,
        sender: str,
        recipient: str | Sequence[str],
        body: str,
    ) -> None:
        """One message on a connection that is open."""
        recipients = [recipient] if isinstance(recipient, str) else recipient
        for command in (
            partial(client.mail, sender),
            *(partial(client.rcpt, each) for each in recipients),
        ):
            code, text = command()
            if code >= 400:
                self.codes[token], self.texts[token] = code, text.decode("utf-8", "replace")
                client.rset()
                return
        try:
            header = f"Subject: {token}\r\nFrom: {sender}\r\nTo: {recipients[0]}\r\n"
            code, text = client.data(f"{header}\r\n{body}")
        except smtplib.SMTPDataError as refused:
            code, said = refused.smtp_code, refused.smtp_error
            text = said if isinstance(said, bytes) else said.encode()
        self.codes[token], self.texts[token] = code, text.decode("utf-8", "replace")

    def post(self, port: int, some: Iterable[str], *, key: str) -> None:
        """One connection over HTTP; now and then a message that is staged in pieces."""
        left = list(some)
        self.codes |= dict.fromkeys(left, 0)
        fields = {
            "Authorization": "Basic " + base64.b64encode(f"api:{key}".encode()).decode(),
            "Content-Type": "application/x-www-form-urlencoded",
        }
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=patient(30))
        with contextlib.suppress(OSError, http.client.HTTPException):
            for number, token in enumerate(left):
                text = "x" * (400_000 if number % 10 == 9 else 3000)
                form = {
                    "from": "a@client.example",
                    "to": "b@dest.example",
                    "subject": token,
                    "text": text,
                }
                client.request(
                    "POST", "/v3/client.example/messages", urllib.parse.urlencode(form), fields
                )
                response = client.getresponse()
                said = response.read().decode()
                self.codes[token], self.texts[token] = response.status, said
        client.close()

    def stream(self, relay: Relay, some: list[str], *, clients: int = 3, **more: Any) -> None:
        """The same over several connections at once; returns when all have ended."""
        threads = [
            threading.Thread(target=self.hand_in, args=(relay, some[first::clients]), kwargs=more)
            for first in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=patient(120))
            assert not thread.is_alive(), "a client hangs"

    @contextlib.contextmanager
    def crowd(self, relay: Relay, *, clients: int = 3, **more: Any) -> Iterator[None]:
        """While the body of the `with` runs, clients send mail and reconnect if the relay ends."""
        over = threading.Event()

        def client() -> None:
            while not over.wait(0.02):
                self.hand_in(relay, tokens(10), **more)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(timeout=patient(60))
                assert not thread.is_alive(), "a client hangs"

    # --- afterwards -------------------------------------------------------------------------------

    def settle(self, relay: Relay, mx: Sink, *, seconds: float = 60) -> None:
        """Wait until all that was accepted has arrived; AssertionError that names what is lost."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.accepted <= set(mx.tokens(self.accepted)), seconds=seconds)
        missing = self.accepted - set(mx.tokens(self.accepted))
        assert not missing, f"answered 250 and lost: {sorted(missing)}\n{relay.stderr[-2000:]}"

    def check_refused(self, mx: Sink) -> None:
        """What was answered otherwise has not arrived."""
        invented = set(mx.tokens(self.refused))
        assert not invented, f"refused and delivered: {sorted(invented)}"

    def duplicates(self, mx: Sink) -> int:
        """How many copies came more than once."""
        arrived = mx.tokens(set(self.codes))
        return len(arrived) - len(set(arrived))


def cut_short(
    relay: Relay,
    ledger: Ledger,
    hand_in: Callable[[list[str]], None],
    *,
    clients: int,
    die_after: int,
) -> None:
    """Several clients hand in; the relay is killed once `die_after` messages were accepted."""
    words = tokens(100 * clients)
    threads = [
        threading.Thread(target=hand_in, args=(words[first::clients],)) for first in range(clients)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(ledger.accepted) >= die_after, what="the stream")
    relay.kill()
    for thread in threads:
        thread.join(timeout=patient(60))
    assert len(ledger.accepted) < len(words), "the kill came too late to mean anything"


def made_good(relay: Relay, ledger: Ledger, mx: Sink, *, in_flight: int = 20) -> None:
    """Started again, it delivers all it accepted; only what was being delivered may come twice."""
    relay.start()
    ledger.settle(relay, mx)
    wait_until(lambda: listed(relay) == [], what="an empty queue")
    assert ledger.duplicates(mx) <= in_flight
    wait_for_log(relay)
    assert len({event["queue-id"] for event in relay.events(event="delivered")}) >= len(
        ledger.accepted
    )


def wait_for_log(relay: Relay) -> None:
    """Wait until the delivery log has the lines of what is committed: they follow it at once, so
    there are none to come when none has come for a moment.
    """
    path, before = relay.directory / "log/delivery.log", -1
    while (size := path.stat().st_size) != before:
        before = size
        time.sleep(patient(0.3))


def listed(relay: Relay, *filters: str) -> list[dict[str, Any]]:
    """What `relay queue list --json` shows, of a relay that runs or of the queue of one that does
    not.
    """
    if not filters:
        with contextlib.suppress(NotRunning):
            return relay.ask("list")
    done = relay.run("queue", "list", "--json", *filters)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check_agreement(relay: Relay, mx: Sink, *, sender: str = "a@client.example") -> int:
    """`check_log`, and the next hop says the same of each recipient. `sender` gets reports only."""
    ended = check_log(relay)
    delivered = {
        (event["queue-id"], event["recipient"])
        for event in relay.events(event="delivered")
        if event["recipient"] != sender
    }
    assert delivered == mx.taken, f"only in the log or only at the host: {delivered ^ mx.taken}"
    failed = {
        (event["queue-id"], event["recipient"]) for event in relay.events(severity="permanent")
    }
    assert not failed & mx.taken, f"failed in the log, and arrived: {failed & mx.taken}"
    return ended


def check_log(relay: Relay) -> int:
    """Each recipient of each message ends in exactly one way in the log; a line may come twice
    (same id).

    Returns how many have ended.
    """
    wait_for_log(relay)
    ends: dict[tuple[str, str], set[str]] = defaultdict(set)
    names: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for event in relay.events():
        if event["event"] == "delivered" or event.get("severity") == "permanent":
            key = (event["queue-id"], event["recipient"])
            if event["id"] not in ends[key]:
                names[key][event["event"]] += 1
            ends[key].add(event["id"])
    twice = {key: names[key] for key, ids in ends.items() if len(ids) != 1}
    assert not twice, f"more than one end: {twice}"
    return len(ends)
