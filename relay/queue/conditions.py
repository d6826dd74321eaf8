"""What the filters of messages, events and counts mean, as conditions of an SQL statement. Pure.

Which fields a filter has, and how an address or a domain may be spelled, is the same for every
engine; an engine's `Values` says how a condition is written in its SQL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from datetime import datetime

from relay.mail.address import domain_spellings, spellings
from relay.queue.rows import STATE_NUMBER, micros
from relay.queue.statistics import CountFilter, ExceptionPage
from relay.queue.store import EventFilter, QueueFilter


class Values(ABC):
    """The parameters of a statement, and the conditions that use them."""

    @abstractmethod
    def add(self, value: int | str) -> str:
        """The name of a parameter with this value."""

    @abstractmethod
    def is_among(self, column: str, texts: Iterable[str]) -> str:
        """The condition that a column is one of these."""

    @abstractmethod
    def is_spelled(self, column: str, spelled: Sequence[str]) -> str:
        """The condition that an address or a domain is written in one of these ways, in any
        case.
        """

    @abstractmethod
    def is_in_domain(self, column: str, domains: Sequence[str]) -> str:
        """The condition that an address is in a domain, written in one of these ways."""

    @abstractmethod
    def has_recipient_in(self, domains: Sequence[str]) -> str:
        """The condition that a recipient of an event is in a domain; the event of a message with
        several recipients names them all in its line.
        """

    @abstractmethod
    def has_field(self, field: str, value: str) -> str:
        """The condition on a field of `EventFilter.fields`."""


def all_of(conditions: Sequence[str]) -> str:
    """All these conditions together."""
    return " AND ".join(conditions) or "true"


def message_conditions(wanted: QueueFilter, now: datetime, values: Values) -> list[str]:
    """The conditions on a message `m`."""
    found = []
    if wanted.queue_ids:
        found.append(values.is_among("m.queue_id", sorted(wanted.queue_ids)))
    if wanted.sender:
        found.append(values.is_spelled("m.reverse_path", spellings(wanted.sender)))
    if wanted.older_than is not None:
        found.append(f"m.arrived <= {values.add(micros(now - wanted.older_than))}")
    return found


def recipient_conditions(wanted: QueueFilter, values: Values) -> list[str]:
    """The conditions on a recipient `r`."""
    found = []
    if wanted.domain:
        found.append(values.is_spelled("r.domain", domain_spellings(wanted.domain)))
    if wanted.state is not None:
        found.append(f"r.state = {values.add(STATE_NUMBER[wanted.state])}")
    return found


def indexed_conditions(wanted: EventFilter, values: Values) -> list[str]:
    """The conditions on an event for which there is an index: its recipient and its queue id."""
    found = []
    if wanted.recipient:
        found.append(values.is_spelled("recipient", spellings(wanted.recipient)))
        found.append("recipient <> ''")  # so that the partial index can serve
    if wanted.queue_id:
        found.append(f"queue_id = {values.add(wanted.queue_id)}")
    return found


def period_conditions(wanted: EventFilter, values: Values) -> list[str]:
    """The conditions on the time of an event."""
    found = []
    if wanted.begin is not None:
        found.append(f"at >= {values.add(micros(wanted.begin))}")
    if wanted.end is not None:
        found.append(f"at <= {values.add(micros(wanted.end))}")
    return found


def event_conditions(wanted: EventFilter, values: Values) -> list[str]:
    """The other conditions on an event."""
    found = period_conditions(wanted, values)
    if wanted.names:
        found.append(values.is_among("name", sorted(wanted.names)))
    if wanted.sender:
        found.append(values.is_spelled("sender", spellings(wanted.sender)))
    if wanted.sender_domain:
        found.append(values.is_in_domain("sender", domain_spellings(wanted.sender_domain)))
    if wanted.recipient_domain:
        found.append(values.has_recipient_in(domain_spellings(wanted.recipient_domain)))
    return found + [values.has_field(field, value) for field, value in wanted.fields]


def domain_conditions(wanted: CountFilter, values: Values, *, has_sums: bool) -> list[str]:
    """The conditions on the two domains of what is counted. `has_sums`: there are rows of the sums,
    for all domains and for each sender domain.
    """
    found = []
    if wanted.recipient_domain:
        found.append(f"recipient_domain = {values.add(wanted.recipient_domain)}")
    elif has_sums:
        found.append("recipient_domain = ''")
    if wanted.sender_domain:
        found.append(f"sender_domain = {values.add(wanted.sender_domain)}")
    elif has_sums and not wanted.recipient_domain:
        found.append("sender_domain = ''")
    return found


def exceptions_query(
    wanted: CountFilter, page: ExceptionPage, values: Values, *, table: str
) -> str:
    """The query for a page of exceptions."""
    begin, last = page.after if page.after is not None else (wanted.begin, "")
    where = domain_conditions(wanted, values, has_sums=False)
    first = values.add(micros(begin))
    where += [f"at >= {first}", f"at < {values.add(micros(wanted.end))}"]
    where.append(f"(at > {first} OR event_id > {values.add(last)})")
    order = "DESC" if page.newest else "ASC"
    return (
        "SELECT at, event_id, queue_id, sender_domain, recipient_domain, result, protection,"
        f" sentence FROM {table} WHERE {all_of(where)}"
        f" ORDER BY at {order}, event_id {order} LIMIT CAST({values.add(page.limit)} AS integer)"
    )
