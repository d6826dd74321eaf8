"""The HTTP interface against its own description, by a tool that makes requests up (schemathesis).

No 5yz, and no answer that is not described: neither its status, nor its kind, nor its shape.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ports import free_port
from tests.rigs.relay import relay_process
from tests.rigs.sink import sink

pytestmark = pytest.mark.timeout(300)

KEY = "a-long-random-key"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)


def test_no_request_is_answered_in_a_way_that_is_not_described(tmp_path: Path) -> None:
    examples = "100" if os.environ.get("RELAY_LONG") == "1" else "8"
    port = free_port()
    admin = {
        "http": f"127.0.0.1:{port}",
        "api_keys": [KEY],
        "webhook_signing_key": "signs",
        "webhook_networks": ["127.0.0.0/8"],
    }
    resolver = {"timeout": "1s"}
    with (
        sink() as mx,
        relay_process(tmp_path, routes=mx.route, admin=admin, resolver=resolver) as relay,
    ):
        url = f"http://127.0.0.1:{port}/relay/v1/openapi.json"
        authorization = base64.b64encode(f"api:{KEY}".encode()).decode()
        run = [sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", CHECKS]
        run += ["--header", f"Authorization: Basic {authorization}", "--max-examples", examples]
        run += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "30", "--seed", "1"]
        run += ["--exclude-path", "/relay/v1/probe/{domain}", "--generation-database", "none"]
        done = subprocess.run(
            run, cwd=tmp_path, capture_output=True, text=True, timeout=patient(280), check=False
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert relay.process is not None
        assert relay.process.poll() is None
        assert "500 Internal" not in done.stdout
        assert "Traceback" not in relay.stderr
