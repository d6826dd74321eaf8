"""The page of a whole relay: over HTTPS, of several workers, with the numbers of the command line,
after the log's file and the events are gone.
"""

from __future__ import annotations

import http.cookiejar
import json
import re
import smtplib
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from argon2 import PasswordHasher

from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import Relay, relay_of
from tests.rigs.sink import sink

pytestmark = pytest.mark.timeout(240)

PASSWORD = "correct horse"


@dataclass
class Window:
    """A browser's window on the page."""

    base: str
    authority: trustme.CA
    jar: http.cookiejar.CookieJar = field(default_factory=http.cookiejar.CookieJar)
    token: str = ""

    def __post_init__(self) -> None:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(self.jar),
            urllib.request.HTTPSHandler(context=context),
        )

    def open(self, place: str, **form: Any) -> str:
        data = urllib.parse.urlencode(form, doseq=True).encode() if form else None
        with self._opener.open(self.base + place, data, timeout=patient(30)) as answer:
            text: str = answer.read().decode()
        return text

    def sign_in(self) -> None:
        text = self.open("/login", name="olga", password=PASSWORD)
        found = re.search(r'name="token" value="([0-9a-f]+)"', text)
        assert found is not None, text
        self.token = found[1]


@dataclass
class Site:
    """A certificate and the configuration of a page."""

    directory: Path
    authority: trustme.CA = field(default_factory=trustme.CA)
    port: int = field(default_factory=free_port)

    @property
    def admin(self) -> dict[str, Any]:
        certificate = self.directory / "page.pem"
        leaf = self.authority.issue_cert("localhost", "127.0.0.1")
        leaf.private_key_and_cert_chain_pem.write_to_path(certificate)
        hashed = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
        return {
            "http": f"127.0.0.1:{self.port}",
            "certificate": str(certificate),
            "web": {"users": {"olga": {"password": hashed, "role": "operator"}}},
        }

    def window(self) -> Window:
        return Window(f"https://127.0.0.1:{self.port}", self.authority)


def _send(relay: Relay, recipient: str, count: int) -> None:
    for _ in range(count):  # each over a connection of its own: the workers share them
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=patient(60)) as client:
            client.sendmail("a@legal.example", recipient, b"Subject: figures\r\n\r\nhello\r\n")


def _counted(relay: Relay, *more: str) -> list[dict[str, Any]]:
    done = relay.run("report", "--json", "--recipient-domain", "dest.example", *more)
    assert done.returncode == 0, done.stderr
    counts: list[dict[str, Any]] = json.loads(done.stdout)["counts"]
    return counts


def _of(counts: list[dict[str, Any]], result: str) -> int:
    return sum(one["number"] for one in counts if one["result"] == result)


def test_page_and_command_line_tell_the_same_of_all_workers_after_the_log_is_gone(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path)
    with sink() as mx, relay_of(tmp_path, 2, admin=site.admin, routes=mx.route) as relay:
        _send(relay, "b@dest.example", 12)
        wait_until(
            lambda: _of(_counted(relay), "delivered") == 12, what="twelve deliveries that count"
        )
        window = site.window()
        window.sign_in()
        [cookie] = window.jar
        assert (cookie.name, cookie.secure) == ("__Host-relay", True)

        (tmp_path / "log/delivery.log").unlink()
        counts = _counted(relay)
        told = json.loads(window.open("/report.json?recipient=DEST.example"))
        assert told["counts"] == counts
        assert _of(counts, "accepted") == 12
        assert {one["protection"] for one in counts} == {"", "clear"}
        assert len(told["exceptions"]) == 12
        assert re.search(
            r"in clear</th><td class=\"num\">12<", window.open("/report?recipient=dest.example")
        )
        assert re.search(r"Delivered</span><strong>12<", window.open("/"))
        assert window.open("/log?event=delivered").count('<details class="row ') == 12
        assert "Workers</dt><dd>2<" in window.open("/health")

    for path in (tmp_path / "spool").rglob("queue.db"):
        db = sqlite3.connect(path)
        db.execute(
            "DELETE FROM event WHERE seq < (SELECT max(seq) FROM event)"
        )  # keep_events is over
        db.commit()
        db.close()
    assert _counted(relay) == counts  # and of a relay that does not run


def test_verb_on_the_page_reaches_the_mail_of_all_workers(tmp_path: Path) -> None:
    site = Site(tmp_path)
    unreachable = {"dest.example": {"host": "127.0.0.1", "port": free_port()}}
    with relay_of(tmp_path, 2, admin=site.admin, routes=unreachable) as relay:
        _send(relay, "b@dest.example", 8)
        window = site.window()
        window.sign_in()

        text = window.open("/queue/confirm", token=window.token, verb="hold", domain="dest.example")
        assert "Hold 8 messages?" in text

        # What is being tried at the moment of the verb is left alone, and held by the next.
        def hold() -> bool:
            text = window.open(
                "/queue/change", token=window.token, verb="hold", domain="dest.example"
            )
            found = re.search(r"<strong>(\d)</strong> recipients? changed(?! so far)", text)
            assert found is not None, text
            changed.append(int(found[1]))
            return sum(changed) == 8

        changed: list[int] = []
        wait_until(hold, what="eight messages that are held")
        listed = json.loads(relay.run("queue", "list", "--json").stdout)
        assert [one["state"] for one in listed] == ["held"] * 8
        assert "olga: hold, " in relay.run("log", "--event", "operator").stdout


def test_session_ends_with_the_relay(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with relay_of(tmp_path, 1, admin=site.admin) as relay:
        window = site.window()
        window.sign_in()
        assert "<h1>Health" in window.open("/health")
        relay.stop()
        relay.start()
        assert "<h1>Sign in" in window.open("/health")
        with pytest.raises(urllib.error.HTTPError) as refused:
            window.open("/queue/change", token=window.token, verb="remove", all="yes")
        with refused.value:
            assert refused.value.code == 401
