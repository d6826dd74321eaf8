"""200 means ours: what was answered 200 over HTTP arrives, though the relay is killed in the middle."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
import urllib.parse
from pathlib import Path

import pytest

from tests.rigs.ports import free_port, wait_until
from tests.rigs.relay import relay_process
from tests.rigs.sink import sink

pytestmark = pytest.mark.timeout(180)

KEY = "a-long-random-key"
AUTHORIZATION = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
FIELDS = {"Authorization": AUTHORIZATION, "Content-Type": "application/x-www-form-urlencoded"}


def _stream(port: int, tokens: list[str], answered: list[str]) -> None:
    """Send a message for each token; note those answered 200; end when the relay is gone."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with contextlib.suppress(OSError, http.client.HTTPException):
        for number, token in enumerate(tokens):
            text = "x" * (400_000 if number % 10 == 9 else 3000)  # some are staged in pieces
            form = {"from": "a@client.example", "to": "b@dest.example", "subject": token, "text": text}
            client.request("POST", "/v3/client.example/messages", urllib.parse.urlencode(form), FIELDS)
            response = client.getresponse()
            body = response.read()
            if response.status == 200 and json.loads(body)["message"] == "Queued. Thank you.":
                answered.append(token)
    client.close()


@pytest.mark.parametrize("die_after", [10, 90])
def test_every_message_answered_200_arrives_after_kill_9(tmp_path: Path, die_after: int) -> None:
    tokens = [f"token-{number:04}" for number in range(300)]
    answered: list[str] = []
    port = free_port()
    admin = {"http": f"127.0.0.1:{port}", "api_keys": [KEY]}
    with sink() as mx, relay_process(tmp_path, routes=mx.route, admin=admin) as relay:
        clients = [
            threading.Thread(target=_stream, args=(port, tokens[first::4], answered)) for first in range(4)
        ]
        for client in clients:
            client.start()
        wait_until(lambda: len(answered) >= die_after, what="the stream")
        relay.kill()
        for client in clients:
            client.join(timeout=60)
        assert len(answered) < len(tokens), "the kill came too late to mean anything"

        relay.start()
        known = set(tokens)
        wait_until(
            lambda: set(answered) <= set(mx.tokens(known)), seconds=60, what="the arrival of all answered 200"
        )
        wait_until(lambda: relay.run("queue", "list", "--json").stdout.strip() == "[]", what="an empty queue")
        delivered = relay.events(event="delivered")
        assert len({event["queue-id"] for event in delivered}) >= len(answered)
