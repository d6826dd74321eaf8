"""Which next hop mail takes, seen at the hosts that get it and in the delivery log."""

from __future__ import annotations

import contextlib
import signal
import smtplib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from argon2 import PasswordHasher

from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_process
from tests.rigs.sink import Sink, sink

PASSWORD = "open sesame"
NAMES = ("all", "of-recipient", "of-user", "of-listener", "of-sender", "of-domain")
REFUSED = "refused@example.net"


class Routed:
    """A relay with a next hop for each rule, and a host for each next hop."""

    def __init__(self, relay: Relay, hosts: dict[str, Sink], by_listener: int) -> None:
        self.relay = relay
        self.hosts = hosts
        self.by_listener = by_listener
        self._count = 0

    def send(
        self, sender: str, recipient: str, *, port: int | None = None, user: str = ""
    ) -> tuple[str, str]:
        """Send a message; where it came out, and the `route` of its line in the log."""
        self._count += 1
        subject = f"message-{self._count}"
        with smtplib.SMTP("127.0.0.1", port or self.relay.port, timeout=patient(20)) as client:
            if user:
                client.login(user, PASSWORD)
            client.sendmail(sender, recipient, f"Subject: {subject}\r\n\r\nbody\r\n")

        [event] = wait_for(lambda: self.delivered(subject), what="delivery")
        [host] = [name for name, one in self.hosts.items() if one.tokens({subject})]
        return host, event["delivery-status"]["route"]

    def delivered(self, subject: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self.relay.events(event="delivered")
            if event["message"]["headers"]["subject"] == subject
        ]


def wait_for(found: Callable[[], list[dict[str, Any]]], *, what: str) -> list[dict[str, Any]]:
    wait_until(lambda: bool(found()), what=what)
    return found()


def hop(host: Sink) -> dict[str, Any]:
    return {"host": f"[{host.address}]", "port": host.port}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    directory, by_listener = tmp_path_factory.mktemp("routes"), free_port()
    with contextlib.ExitStack() as stack:
        hosts = {
            name: stack.enter_context(sink(f"127.0.0.{40 + number}"))
            for number, name in enumerate(NAMES)
        }
        hosts["of-sender"].unknown = frozenset({REFUSED})
        relay = stack.enter_context(relay_process(directory, start=False))
        password = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
        login = {"auth": "optional", "auth_without_tls": True}
        relay.config |= {
            "listeners": [
                {"address": f"127.0.0.1:{relay.port}", **login},
                {"address": f"127.0.0.1:{by_listener}", "next_hop": "of-listener", **login},
            ],
            "access": {
                "users": {
                    "app1": {"password": password, "next_hop": "of-user"},
                    "app2": {"password": password},
                }
            },
            "next_hops": {name: hop(host) for name, host in hosts.items()},
            "routes": {"*": "all", "*.partner.example": "of-recipient"},
            "routes_by_sender": {
                "bot@example.com": {"next_hop": "of-sender"},
                "example.com": {"next_hop": "of-domain"},
            },
        }
        relay.start()
        yield Routed(relay, hosts, by_listener)


def came_out_at(name: str) -> tuple[str, str]:
    return name, name


def test_mail_goes_by_its_sender_and_else_by_the_route_of_all(routed: Routed) -> None:
    assert routed.send("a@example.org", "b@example.net") == came_out_at("all")
    assert routed.send("Bot@example.com", "b@example.net") == came_out_at("of-sender")
    assert routed.send("a@example.com", "b@example.net") == came_out_at("of-domain")


def test_mail_goes_by_the_user_and_else_by_the_listener(routed: Routed) -> None:
    to, by_listener = "b@example.net", routed.by_listener
    assert routed.send("bot@example.com", to, user="app1") == came_out_at("of-user")
    assert routed.send("bot@example.com", to, port=by_listener) == came_out_at("of-listener")
    assert routed.send("a@x.example", to, port=by_listener, user="app1") == came_out_at("of-user")
    assert routed.send("bot@example.com", to, user="app2") == came_out_at("of-sender")


def test_mail_goes_by_its_recipient_before_all_else(routed: Routed) -> None:
    to = "b@mail.partner.example"
    assert routed.send("bot@example.com", to, user="app1") == came_out_at("of-recipient")
    assert routed.send("", to) == came_out_at("of-recipient")


def test_mail_with_the_null_reverse_path_goes_by_no_client_and_no_sender(routed: Routed) -> None:
    sent = routed.send("", "b@example.net", port=routed.by_listener, user="app2")
    assert sent == came_out_at("all")


def test_report_on_mail_of_a_sender_goes_by_the_route_of_all(routed: Routed) -> None:
    with smtplib.SMTP("127.0.0.1", routed.relay.port, timeout=patient(20)) as client:
        client.sendmail("bot@example.com", REFUSED, "Subject: token-refused\r\n\r\nbody\r\n")
    [failed] = wait_for(
        lambda: routed.relay.events(event="failed", recipient=REFUSED), what="refusal"
    )
    assert failed["delivery-status"]["route"] == "of-sender"
    [report] = wait_for(
        lambda: routed.relay.events(event="delivered", recipient="bot@example.com"), what="report"
    )
    assert report["delivery-status"]["route"] == "all"
    assert routed.hosts["all"].reported({"token-refused"}) == ["token-refused"]


def test_mail_whose_next_hop_a_reload_removed_waits_and_goes_when_it_is_back(
    tmp_path: Path,
) -> None:
    with (
        sink("127.0.0.50") as elsewhere,
        sink("127.0.0.51") as wanted,
        relay_process(tmp_path, start=False) as relay,
    ):
        address = f"127.0.0.1:{relay.port}"
        dead = {"host": "[127.0.0.52]", "port": free_port("127.0.0.52")}
        relay.config |= {
            "listeners": [{"address": address, "next_hop": "mine"}],
            "next_hops": {"mine": dead, "all": hop(elsewhere)},
            "routes": {"*": "all"},
        }
        relay.start()
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(20)) as client:
            client.sendmail("a@x.example", "b@example.net", "Subject: token\r\n\r\nbody\r\n")

        def attempts() -> list[dict[str, Any]]:
            return relay.events(event="failed")

        def reloaded(times: int, **next_hops: Any) -> None:
            relay.config["next_hops"] = {"all": hop(elsewhere), **next_hops}
            relay.config["listeners"] = [{"address": address}]
            relay.config_file.write_text(yaml.safe_dump(relay.config))
            relay.signal(signal.SIGHUP)
            wait_until(lambda: relay.stderr.count("reloaded: ") == times, what="reload")
            assert relay.run("queue", "retry", "--all").returncode == 0

        wait_until(lambda: len(attempts()) == 1, what="first attempt")
        reloaded(1)
        wait_until(lambda: len(attempts()) == 2, what="second attempt")
        status = attempts()[1]["delivery-status"]
        assert (status["route"], status["enhanced-code"]) == ("mine", "4.3.5")
        assert status["description"].endswith("message is not configured: mine")
        assert "mine; add next_hops.mine again, or remove the message" in relay.stderr
        queue_id = attempts()[1]["queue-id"]
        assert "next hop  mine\n" in relay.run("queue", "show", queue_id).stdout
        reloaded(2, mine=hop(wanted))
        [event] = wait_for(lambda: relay.events(event="delivered"), what="delivery")
        assert event["delivery-status"]["route"] == "mine"
        assert wanted.tokens({"token"}) == ["token"]
        assert elsewhere.tokens({"token"}) == []
