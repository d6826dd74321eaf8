"""A message and its recipients come back from the disk as they went; damage is seen."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.envelope import Body, Notify, Ret
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import LastAttempt, MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.rows import (
    STATE_NUMBER,
    STATE_OF_NUMBER,
    BadRow,
    message_data,
    message_of,
    micros,
    moment,
    recipient_data,
    recipient_of,
)
from tests.fakes.queued import NOW, SETTINGS

TEXT = st.text(st.characters(codec=None), max_size=20)
SETTING = st.builds(Setting, st.booleans(), st.sampled_from(Source), TEXT)
MOMENT = st.integers(0, 4_000_000_000_000_000).map(moment)


@given(
    st.builds(
        QueuedMessage,
        queue_id=TEXT,
        reverse_path=TEXT,
        arrived=MOMENT,
        size_bytes=st.integers(0, 2**40),
        summary=st.builds(MessageSummary, TEXT, TEXT, TEXT, TEXT, st.booleans()),
        body=st.sampled_from(Body),
        eight_bit=st.booleans(),
        smtputf8=st.booleans(),
        ret=st.none() | st.sampled_from(Ret),
        envid=TEXT,
        origin=TEXT,
        client=TEXT,
        client_tls=TEXT,
        client_user=TEXT,
        requiretls=st.booleans(),
        is_dotless=st.booleans(),
        tls_required_no=st.booleans(),
    )
)
def test_a_message_comes_back_as_it_went(message):
    row = (message.queue_id, message.reverse_path, micros(message.arrived), message.size_bytes)
    assert message_of(*row, message_data(message)) == message


@given(
    st.builds(
        QueuedRecipient,
        index=st.integers(0, 1000),
        address=TEXT,
        domain=TEXT,
        settings=st.builds(TlsSettings, SETTING, SETTING),
        notify=st.frozensets(st.sampled_from(Notify)),
        orcpt=TEXT,
        state=st.sampled_from(State),
        attempts=st.integers(0, 1000),
        next_attempt=st.none() | MOMENT,
        last=st.none()
        | st.builds(LastAttempt, MOMENT, st.integers(0, 999), TEXT, TEXT, TEXT, st.booleans()),
        first_attempt=st.none() | MOMENT,
        delay_notified=st.booleans(),
    )
)
def test_a_recipient_comes_back_as_it_went(recipient):
    due = None if recipient.next_attempt is None else micros(recipient.next_attempt)
    row = (recipient.index, recipient.domain, STATE_NUMBER[recipient.state], due)
    assert recipient_of(*row, recipient_data(recipient)) == recipient


def test_every_state_has_a_number():
    assert set(STATE_OF_NUMBER) == set(State)
    assert all(STATE_OF_NUMBER[number] is state for state, number in STATE_NUMBER.items())
    assert [state for state in STATE_OF_NUMBER if not state.is_final] == list(STATE_OF_NUMBER[:3])


def test_values_that_a_later_version_adds_are_ignored():
    recipient = QueuedRecipient(0, "b@example.net", "example.net", SETTINGS)
    data = recipient_data(recipient)[:-1] + ',"new"]'
    assert recipient_of(0, "example.net", 0, None, data) == recipient


@pytest.mark.parametrize(
    "data",
    [
        "", "{", "[]", "null", "[1,2,3]", '{"a":1}', "[" * 100_000, b"\x00\xff", None, 7,
        '["b@example.net",[[1,"default",""],[false,"default"]],null,"",0,null,null,false]',
        '["b@example.net",[["yes","default",""],[false,"default",""]],null,"",0,null,null,false]',
        '["b@example.net",[[true,"nobody",""],[false,"default",""]],null,"",0,null,null,false]',
        '[7,[[true,"default",""],[false,"default",""]],null,"",0,null,null,false]',
        '["b@example.net",[[true,"default",""],[false,"default",""]],["SOMETIMES"],"",0,null,null,false]',
        '["b@example.net",[[true,"default",""],[false,"default",""]],null,"",0,[1],null,false]',
        '["b@example.net",[[true,"default",""],[false,"default",""]],null,"",0,null,1e99,false]',
    ],
)  # fmt: skip
def test_a_damaged_recipient_is_seen_to_be_damaged(data):
    with pytest.raises(BadRow):
        recipient_of(0, "example.net", 0, None, data)


@pytest.mark.parametrize("state", [-1, 7, None, "queued"])
def test_a_state_that_does_not_exist_is_damage(state):
    data = recipient_data(QueuedRecipient(0, "b@example.net", "example.net", SETTINGS))
    with pytest.raises(BadRow):
        recipient_of(0, "example.net", state, None, data)


@pytest.mark.parametrize(
    "data", ["", "[]", '[null,"9BIT",false,false,null,"","smtp",""]', None, '[["a"]]']
)
def test_a_damaged_message_is_seen_to_be_damaged(data):
    with pytest.raises(BadRow):
        message_of("1", "a@example.com", micros(NOW), 10, data)


def test_an_instant_keeps_its_microseconds():
    at = NOW + timedelta(microseconds=999_999)
    assert moment(micros(at)) == at
    assert replace(LastAttempt(at, 250, "", ""), at=moment(micros(at))).at == at
