"""250 means ours, and 200 too: what was answered so arrives, though the relay is killed in the
middle.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.ledger import Ledger, cut_short, made_good
from tests.rigs.ports import free_port
from tests.rigs.relay import relay_process
from tests.rigs.sink import sink

pytestmark = pytest.mark.timeout(180)

KEY = "a-long-random-key"


@pytest.mark.parametrize("die_after", [20, 200, 350])
def test_every_message_answered_250_arrives_after_kill_9(tmp_path: Path, die_after: int) -> None:
    ledger = Ledger()
    with sink() as mx, relay_process(tmp_path, routes=mx.route) as relay:
        cut_short(
            relay, ledger, lambda some: ledger.hand_in(relay, some), clients=5, die_after=die_after
        )
        made_good(relay, ledger, mx)


@pytest.mark.parametrize("die_after", [10, 90])
def test_every_message_answered_200_arrives_after_kill_9(tmp_path: Path, die_after: int) -> None:
    ledger = Ledger()
    port = free_port()
    admin = {"http": f"127.0.0.1:{port}", "api_keys": [KEY]}
    with sink() as mx, relay_process(tmp_path, routes=mx.route, admin=admin) as relay:
        cut_short(
            relay,
            ledger,
            lambda some: ledger.post(port, some, key=KEY),
            clients=4,
            die_after=die_after,
        )
        made_good(relay, ledger, mx)
