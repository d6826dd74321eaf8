"""A 250 goes out after the sync that covers its message, seen from outside: by the system calls."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rigs.ledger import Ledger, tokens
from tests.rigs.relay import relay_process
from tests.rigs.strace import Order, order_of_replies, strace

pytestmark = [pytest.mark.needs("strace"), pytest.mark.timeout(120)]

CALLS = "pwrite64,fdatasync,write,writev,sendto,sendmsg"


def trace_of(
    directory: Path, *, clients: int, messages: int = 50, program: tuple[str, ...] = ("relay",)
) -> Order:
    """The order of calls while messages are taken in; none can leave."""
    ledger = Ledger()
    with relay_process(directory, program=program) as relay:
        with strace(relay.pid, calls=CALLS, output=directory / "trace"):
            ledger.stream(relay, tokens(messages), clients=clients)
        assert len(ledger.accepted) == messages, ledger.texts
    order = order_of_replies(directory / "trace")
    assert set(order.answered) == ledger.queue_ids()
    return order


def test_each_250_follows_the_sync_of_its_message(tmp_path: Path) -> None:
    order = trace_of(tmp_path, clients=1)
    assert order.too_early == ()
    assert order.syncs >= 50


def test_many_clients_share_a_sync_and_none_is_answered_before_it(tmp_path: Path) -> None:
    order = trace_of(tmp_path, clients=25, messages=100)
    assert order.too_early == ()
    assert order.syncs < 100, "no group commit"


@pytest.mark.parametrize("fault", ["never-sync", "reply-first"])
def test_order_check_detects_a_relay_that_answers_too_early(tmp_path: Path, fault: str) -> None:
    order = trace_of(tmp_path, clients=5, program=("tests.rigs.broken_relay", fault))
    assert len(order.too_early) > 25
