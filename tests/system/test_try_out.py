"""`make run` as somebody new has it: one line with the page's address, and the first message on the
page with its story, without a network.
"""

from __future__ import annotations

import http.cookiejar
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_make_run_runs_the_demonstration() -> None:
    [command] = re.findall(
        r"^run:.*\n(?:\t.*\n)*\t@exec \$\(BIN\)/(.*)$", _makefile(), re.MULTILINE
    )
    assert command == "relay demo --run -c conf/relay.yaml"


def _makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipient", ["bob@example.net", "eve@anything.example"])
def test_first_message_is_on_the_page_with_its_story(tmp_path: Path, recipient: str) -> None:
    smtp, page = free_port(), free_port()
    document = {
        "listeners": [{"address": f"127.0.0.1:{smtp}"}],
        "admin": {"http": f"127.0.0.1:{page}"},
        "routes": {"example.com": {"host": "192.0.2.1"}},
    }
    (tmp_path / "relay.yaml").write_text(yaml.safe_dump(document))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "demo", "--run", "-c", "relay.yaml"],
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"page (\S+) \(sign in: (\S+) / (\S+)\)", line)
        assert found is not None, line
        address, name, password = found.groups()
        assert address == f"http://127.0.0.1:{page}/"

        assert accepts_connections("127.0.0.1", page), "the line comes once the page is there"
        send = (str(ROOT / "examples/send.py"), "alice@example.com", recipient)
        done = subprocess.run(
            [sys.executable, *send, f"127.0.0.1:{smtp}"],
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )
        assert done.stdout, done.stderr
        queue_id = done.stdout.rpartition(" ")[2].strip()
        opener = urllib.request.build_opener(
            urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        )
        form = urllib.parse.urlencode({"name": name, "password": password}).encode()

        def story() -> str:
            opener.open(f"{address}login", form, timeout=patient(20)).close()
            with opener.open(f"{address}message/{queue_id}", timeout=patient(20)) as answer:
                text = answer.read().decode()
            return text if "Sent by examples/send.py" in text else ""

        text = wait_until(story, what="the story with the content that arrived")
        assert "TLS verified, localhost: 250" in text
        assert "This is the demonstration" in text
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=patient(60))
    assert process.returncode == 0
    assert rest == ""


def test_a_demonstration_that_cannot_start_says_why_and_no_address(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        document = {"listeners": [{"address": f"127.0.0.1:{taken}"}]}
        (tmp_path / "relay.yaml").write_text(yaml.safe_dump(document))
        done = subprocess.run(
            [sys.executable, "-m", "relay", "demo", "--run", "-c", "relay.yaml"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=patient(60),
            check=False,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"127.0.0.1:{taken}" in done.stderr
