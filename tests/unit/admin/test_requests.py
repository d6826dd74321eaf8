"""A filter of the queue and the request that means it."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from relay.admin.requests import queue_filter, queue_request
from relay.queue.entry import State
from relay.queue.store import QueueFilter

FILTERS = st.builds(
    QueueFilter,
    queue_ids=st.frozensets(st.text("ABC123", min_size=1), max_size=3),
    domain=st.sampled_from(["", "example.net", "xn--bcher-kva.example"]),
    sender=st.sampled_from(["", "<>", "a@example.com"]),
    older_than=st.none() | st.integers(0, 10**6).map(lambda n: timedelta(seconds=n)),
    state=st.none() | st.sampled_from(State),
)


@given(FILTERS)
def test_a_request_made_of_a_filter_is_read_as_that_filter(wanted: QueueFilter) -> None:
    assert queue_filter({"verb": "list", **queue_request(wanted)}) == wanted
