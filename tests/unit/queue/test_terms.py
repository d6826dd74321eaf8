"""What a sender asks for beyond an envelope: kept, obeyed, told."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from relay.mail.outcome import Deferred
from relay.queue.entry import QueuedRecipient, State, Terms
from relay.queue.retry import RetrySchedule
from relay.queue.rows import message_data, message_of, micros
from relay.queue.settle import settle
from relay.report import deliverylog
from tests.fakes.mail import ARRIVED, entry

HOUR = timedelta(hours=1)
BUSY = Deferred("4.2.1", 450, "mailbox busy")
ALL = Terms(
    ARRIVED + HOUR,
    timedelta(minutes=90),
    ("a", "b"),
    (("order", '{"id": 7}'),),
    is_test=True,
    is_signed=False,
    next_hop="provider",
)


@pytest.mark.parametrize("terms", [None, Terms(), ALL])
def test_the_terms_of_a_message_are_read_back_as_they_were_written(terms):
    message = replace(entry().message, terms=terms)
    columns = message.queue_id, message.reverse_path, micros(message.arrived), message.size_bytes
    assert message_of(*columns, message_data(message)) == message


def test_a_message_written_before_there_were_terms_has_none():
    message = entry().message
    data = json.dumps(json.loads(message_data(message))[:8])
    columns = message.queue_id, message.reverse_path, micros(message.arrived), message.size_bytes
    assert message_of(*columns, data) == message


def test_terms_written_before_dkim_was_one_of_them_are_read():
    message = replace(entry().message, terms=Terms(tags=("a",)))
    data = json.loads(message_data(message))
    data[-1] = data[-1][:5]
    columns = message.queue_id, message.reverse_path, micros(message.arrived), message.size_bytes
    assert message_of(*columns, json.dumps(data)) == message


def test_terms_written_before_a_client_could_have_a_next_hop_are_read():
    message = replace(entry().message, terms=Terms(tags=("a",)))
    assert len(json.loads(message_data(message))[-1]) == 6  # as before, where there is none
    assert message.next_hop == ""


def _settled(terms: Terms | None, *, after: timedelta) -> QueuedRecipient:
    one = entry()
    one = replace(one, message=replace(one.message, terms=terms))
    [change] = settle(one, {0: BUSY}, schedule=RetrySchedule(), now=ARRIVED + after).changes
    return change.recipient


def test_a_message_with_a_lifetime_of_its_own_expires_then():
    terms = Terms(lifetime=HOUR)
    assert _settled(terms, after=timedelta(minutes=58)).next_attempt == ARRIVED + HOUR
    assert _settled(terms, after=HOUR).state is State.EXPIRED
    assert _settled(None, after=HOUR).state is State.DEFERRED


def test_no_sender_makes_a_message_live_longer_than_others():
    assert (
        _settled(Terms(lifetime=timedelta(days=50)), after=timedelta(days=5)).state is State.EXPIRED
    )


def test_the_age_of_a_scheduled_message_counts_from_when_it_was_to_go_out():
    terms = Terms(not_before=ARRIVED + timedelta(days=6), lifetime=HOUR)
    assert _settled(terms, after=timedelta(days=6, minutes=1)).state is State.DEFERRED
    assert _settled(terms, after=timedelta(days=6, hours=1)).state is State.EXPIRED


def test_the_senders_own_words_are_in_each_event_of_a_message():
    one = replace(entry(), message=replace(entry().message, terms=ALL))
    [change] = settle(one, {0: BUSY}, schedule=RetrySchedule(), now=ARRIVED).changes
    told = [
        deliverylog.settled(one, change, now=ARRIVED),
        *deliverylog.accepted_events(one.message, one.recipients),
    ]
    assert len(told) == 3
    for event in map(json.loads, (event.line for event in told)):
        assert event["tags"] == ["a", "b"]
        assert event["user-variables"] == {"order": '{"id": 7}'}
    status = json.loads(told[2].line)["delivery-status"]
    assert (status["code"], status["tls"]) == (650, None)
