"""Conditions of SQL for what an operator searches by: addresses, domains and filters. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from relay.mail.address import domain_spellings, spellings
from relay.queue.rows import STATE_NUMBER, micros
from relay.queue.store import QueueFilter

__all__ = ["Values", "as_json", "matching"]


class Values:
    """The parameters of a statement, in the order in which they are named."""

    def __init__(self) -> None:
        self.all: list[object] = []

    def add(self, value: object) -> str:
        """The name of a parameter with this value."""
        self.all.append(value)
        return f"${len(self.all)}"

    def is_one_of(self, column: str, spelled: Sequence[str]) -> str:
        """The condition that an address or a domain is written in one of these ways."""
        return f"lower({column}) = ANY({self.add([text.lower() for text in spelled])}::text[])"


def as_json(column: str) -> str:
    """A column of JSON text, to be looked into: PostgreSQL has no NUL in text."""
    return f"replace({column}, '\\u0000', '\\ufffd')::jsonb"


def matching(wanted: QueueFilter, now: datetime, values: Values) -> tuple[str, str]:
    """The conditions on a message `m` and on a recipient `r`; "true" where there is none."""
    of_message, of_recipient = [], []
    if wanted.queue_ids:
        of_message.append(f"m.queue_id = ANY({values.add(sorted(wanted.queue_ids))}::text[])")
    if wanted.sender:
        of_message.append(values.is_one_of("m.reverse_path", spellings(wanted.sender)))
    if wanted.older_than is not None:
        of_message.append(f"m.arrived <= {values.add(micros(now - wanted.older_than))}")
    if wanted.domain:
        of_recipient.append(values.is_one_of("r.domain", domain_spellings(wanted.domain)))
    if wanted.state is not None:
        of_recipient.append(f"r.state = {values.add(STATE_NUMBER[wanted.state])}")
    return " AND ".join(of_message) or "true", " AND ".join(of_recipient) or "true"
