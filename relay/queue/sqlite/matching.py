"""Conditions of SQL for what an operator searches by: addresses, domains and filters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from relay.mail.address import domain_spellings, spellings
from relay.queue.rows import STATE_NUMBER, micros
from relay.queue.store import QueueFilter

__all__ = ["is_one_of", "matching"]


def is_one_of(column: str, spelled: Sequence[str], values: dict[str, object]) -> str:
    """The condition that an address or a domain is written in one of these ways.

    One way is the usual case, and with `=` an index gives the rows in the order of their numbers.
    """
    name = column.replace(".", "_")
    values |= {f"{name}{number}": text for number, text in enumerate(spelled)}
    parameters = ", ".join(f":{name}{number}" for number in range(len(spelled)))
    return (
        f"{column} COLLATE NOCASE IN ({parameters})"
        if len(spelled) > 1
        else f"{column} = {parameters} COLLATE NOCASE"
    )


def matching(wanted: QueueFilter, now: datetime) -> tuple[str, str, dict[str, object]]:
    """The conditions on a message `m` and on a recipient `r`, and their values."""
    of_message, of_recipient = ["1"], ["1"]
    values: dict[str, object] = {}
    if wanted.queue_ids:
        of_message.append("m.queue_id IN (SELECT value FROM json_each(:ids))")
        values["ids"] = json.dumps(sorted(wanted.queue_ids))
    if wanted.sender:
        of_message.append(is_one_of("m.reverse_path", spellings(wanted.sender), values))
    if wanted.older_than is not None:
        of_message.append("m.arrived <= :arrived")
        values["arrived"] = micros(now - wanted.older_than)
    if wanted.domain:
        of_recipient.append(is_one_of("r.domain", domain_spellings(wanted.domain), values))
    if wanted.state is not None:
        of_recipient.append("r.state = :state")
        values["state"] = STATE_NUMBER[wanted.state]
    return " AND ".join(of_message), " AND ".join(of_recipient), values
