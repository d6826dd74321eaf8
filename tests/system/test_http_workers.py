"""Several workers, asked over HTTP, answer as one relay: events, queue, status, webhooks."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ledger import Ledger, tokens
from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import relay_of
from tests.rigs.sink import sink

pytestmark = pytest.mark.timeout(180)

KEY = "a-long-random-key"
AUTHORIZATION = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()


class Api:
    """Asks the relay's HTTP interface."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.admin = {
            "http": f"127.0.0.1:{port}",
            "api_keys": [KEY],
            "webhook_signing_key": "signs",
            "webhook_networks": ["127.0.0.0/8"],
        }

    def ask(
        self,
        path: str,
        *,
        form: dict[str, Any] | None = None,
        body: Any = None,
        method: str | None = None,
    ) -> Any:
        """The answer's JSON; a form or a body is posted."""
        fields = {"Authorization": AUTHORIZATION}
        data = None
        if form is not None:
            data = urllib.parse.urlencode(form, doseq=True).encode()
        elif body is not None:
            data, fields["Content-Type"] = json.dumps(body).encode(), "application/json"
        url = path if "://" in path else self.url + path
        request = urllib.request.Request(url, data, fields, method=method)
        with urllib.request.urlopen(request, timeout=patient(20)) as response:
            return json.loads(response.read())

    def pages(self, path: str) -> list[dict[str, Any]]:
        """All items, following `next` to the empty page."""
        page = self.ask(path)
        found = []
        while page["items"]:
            found += page["items"]
            page = self.ask(page["paging"]["next"])
        return found


class Ear:
    """A webhook's server; deaf, it answers 500."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.is_deaf = False
        ear = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not ear.is_deaf:
                    ear.heard.append(told["event-data"])
                self.send_response(500 if ear.is_deaf else 200)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"

    def queue_ids(self) -> set[str]:
        return {one["queue-id"] for one in list(self.heard)}

    @contextlib.contextmanager
    def listening(self) -> Iterator[Self]:
        with self.server:
            thread = threading.Thread(target=self.server.serve_forever)
            thread.start()
            yield self
            self.server.shutdown()
            thread.join()


@pytest.fixture
def ear() -> Iterator[Ear]:
    with Ear().listening() as made:
        yield made


def test_the_interface_answers_for_all_workers(tmp_path: Path, ear: Ear) -> None:
    api, ledger, words = Api(free_port()), Ledger(), tokens(60)
    with sink() as mx, relay_of(tmp_path, 3, admin=api.admin, routes=mx.route) as relay:
        hooks = "/v3/domains/client.example/webhooks"
        api.ask(hooks, form={"id": "delivered", "url": ear.url})
        _kept_by_all(tmp_path, 3)
        mx.gate.clear()
        ledger.stream(relay, words, clients=12)
        assert ledger.accepted == set(words)
        ids = sorted(ledger.queue_ids())

        page = api.ask("/relay/v1/queue?limit=25")
        found = [one["queue-id"] for one in page["items"]]
        while page["next"]:
            page = api.ask(f"/relay/v1/queue?limit=25&after={page['next']}")
            found += [one["queue-id"] for one in page["items"]]
        assert found == ids
        for queue_id in ids[::10]:
            assert api.ask(f"/relay/v1/queue/{queue_id}")["queue-id"] == queue_id
        accepted = api.pages("/v3/client.example/events?event=accepted&limit=7&ascending=yes")
        assert sorted(one["queue-id"] for one in accepted) == ids
        status = api.ask("/relay/v1/status")
        assert sum(status["queue"].values()) == 60
        wait_until(
            lambda: api.ask("/relay/v1/status")["in-flight"] > 7, what="attempts of several workers"
        )

        mx.gate.set()
        ledger.settle(relay, mx)
        wait_until(lambda: ear.queue_ids() == set(ids), what="a call for each message")
        assert len({one["id"] for one in ear.heard}) == 60


def test_a_verb_over_http_is_done_by_the_worker_that_has_the_message(tmp_path: Path) -> None:
    api, ledger, words = Api(free_port()), Ledger(), tokens(30)
    nobody = {"*": {"host": "[127.0.0.77]", "port": 9}}
    with relay_of(tmp_path, 3, admin=api.admin, routes=nobody) as relay:
        ledger.stream(relay, words, clients=9)
        ids = sorted(ledger.queue_ids())
        wait_until(
            lambda: api.ask("/relay/v1/status")["in-flight"] == 0, what="the end of first attempts"
        )
        done = api.ask("/relay/v1/queue/hold", body={"ids": [*ids[:12], "nobody"]})
        assert done == {"changed": 12, "unknown": ["nobody"]}
        assert [one["queue-id"] for one in api.ask("/relay/v1/queue?state=held")["items"]] == ids[
            :12
        ]
        assert api.ask("/relay/v1/queue/remove", body={"all": True}) == {
            "changed": 30,
            "unknown": [],
        }
        assert api.ask("/relay/v1/queue")["items"] == []
        removed = api.pages("/v3/client.example/events?event=failed&severity=permanent&limit=11")
        assert sorted(one["queue-id"] for one in removed) == ids, "each is told of once"


def test_first_worker_makes_the_pending_webhook_calls_of_a_removed_worker(
    tmp_path: Path, ear: Ear
) -> None:
    api, ledger, words = Api(free_port()), Ledger(), tokens(45)
    ear.is_deaf = True
    with sink() as mx:
        with relay_of(tmp_path, 3, admin=api.admin, routes=mx.route) as relay:
            api.ask("/v3/domains/client.example/webhooks", form={"id": "accepted", "url": ear.url})
            _kept_by_all(tmp_path, 3)
            ledger.stream(relay, words, clients=9)
            ledger.settle(relay, mx)
            relay.kill()  # some events were looked at, some not
        ear.is_deaf = False
        with relay_of(tmp_path, 1, admin=api.admin, routes=mx.route, queue={"path": "spool"}):
            # Those that were tried are due again after five minutes.
            wanted = ledger.queue_ids()
            with contextlib.suppress(AssertionError):
                wait_until(lambda: ear.queue_ids() | _owed(tmp_path) == wanted, seconds=15)
        assert ear.queue_ids() | _owed(tmp_path) == wanted
        assert not list((tmp_path / "spool").glob("worker-*"))


def _kept_by_all(directory: Path, workers: int) -> None:
    """Until every worker knows the webhook."""
    spools = [directory / "spool", *(directory / f"spool/worker-{n}" for n in range(1, workers))]
    wait_until(
        lambda: all(_read(spool, "SELECT 1 FROM webhook") for spool in spools),
        what="a webhook that all workers keep",
    )


def _owed(directory: Path) -> set[str]:
    """The messages of calls that are still owed, by the store itself."""
    rows = _read(directory / "spool", "SELECT line FROM call")
    return {json.loads(line)["queue-id"] for (line,) in rows}


def _read(spool: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{spool}/queue.db?mode=ro", uri=True)) as db:
        return db.execute(query).fetchall()
