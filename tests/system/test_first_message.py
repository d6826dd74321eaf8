"""The README's first message: handed in by the example as it stands there, and by swaks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until
from tests.rigs.relay import relay_process
from tests.rigs.sink import sink

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _command(beginning: str) -> list[str]:
    """The README's line that begins so, as it would be typed."""
    [line] = re.findall(rf"^    ({re.escape(beginning)}.*)$", README, re.MULTILINE)
    return [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)]


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param("python3 examples/send.py", id="python"),
        pytest.param("swaks", marks=pytest.mark.needs("swaks"), id="swaks"),
    ],
)
def test_the_readme_s_first_line_leaves_a_delivery_status_in_the_log(
    tmp_path: Path, beginning: str
) -> None:
    with sink() as mx, relay_process(tmp_path, routes=mx.route) as relay:
        typed = _command(beginning)
        if typed[0] == "python3":
            typed = [sys.executable, *typed[1:], f"127.0.0.1:{relay.port}"]
        else:
            typed = [part.replace("127.0.0.1:2525", f"127.0.0.1:{relay.port}") for part in typed]
        done = subprocess.run(
            typed, cwd=ROOT, capture_output=True, text=True, timeout=patient(60), check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "250 2.0.0 Ok: queued as" in done.stdout

        [line] = wait_until(lambda: relay.events(event="failed"), what="the attempt")
        # The message asks for TLS, which the sink has not: it waits, and the log says why.
        assert line["delivery-status"]["enhanced-code"] == "4.7.4"
        assert line["policy"]["require-tls-source"] == "message"
        assert mx.contents == []
        assert "4.7.4" in relay.run("log").stdout
