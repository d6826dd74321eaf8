"""The name of a node in the lines of its events."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from relay.mail.event import of_node
from relay.report import deliverylog
from tests.fakes.queued import event, new_message

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_line_names_its_node_and_keeps_all_else() -> None:
    new = new_message()
    plain = deliverylog.accepted(new.message, new.recipients)
    named = of_node(plain, 'mx-"a"')
    assert json.loads(named.line) == {**json.loads(plain.line), "node": 'mx-"a"'}
    assert (named.id, named.counted, named.queue_id) == (plain.id, plain.counted, plain.queue_id)


def test_event_about_no_message_has_an_id_of_its_node() -> None:
    plain = deliverylog.operated("alice", "hold", {}, count=1, now=NOON)
    ids = set()
    for node in ("mx-a", "mx-b"):
        named = of_node(plain, node)
        assert json.loads(named.line)["id"] == named.id
        ids.add(named.id)
    assert len(ids) == 2
    assert of_node(event("accepted", "q1"), "mx-a").id == event("accepted", "q1").id
