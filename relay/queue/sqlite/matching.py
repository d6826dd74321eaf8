"""How SQLite writes what is searched by: addresses, domains and fields of events. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from relay.queue.conditions import Values

_FIELD_IS = {
    "severity": "json_extract(line, '$.severity') = :value",
    "about": "json_extract(line, '$.about') = :value",
    "message-id": "json_extract(line, '$.message.headers.message-id') = :value",
    "tag": "EXISTS (SELECT 1 FROM json_each(line, '$.tags') WHERE value = :value)",
    "protection": (
        "CASE WHEN json_type(line, '$.delivery-status') IS NULL THEN ''"
        " WHEN name <> 'delivered' OR json_extract(line, '$.delivery-status.tls') IS NULL"
        " THEN 'not-sent'"
        " WHEN NOT json_extract(line, '$.delivery-status.tls') THEN 'clear'"
        " WHEN json_extract(line, '$.delivery-status.certificate-verified') THEN 'verified'"
        " ELSE 'encrypted' END = :value"
    ),
    "policy-source": (
        "(json_extract(line, '$.policy.require-tls-source') = :value"
        " OR json_extract(line, '$.policy.skip-verification-source') = :value)"
    ),
    "text": (
        "instr(lower(queue_id || ' ' || id || ' ' || sender || ' ' || recipient || ' '"
        " || coalesce(json_extract(line, '$.envelope.targets'), '') || ' '"
        " || coalesce(json_extract(line, '$.message.headers.subject'), '') || ' '"
        " || coalesce(json_extract(line, '$.message.headers.message-id'), '')),"
        " lower(:value)) > 0"
    ),
} | {
    field: f"instr(lower(json_extract(line, '$.message.headers.{field}')), lower(:value)) > 0"
    for field in ("from", "to", "subject")
}
"""Conditions on fields of the event; few searches have them, so no column holds these fields."""


_HAS_RECIPIENT_IN = (
    "EXISTS (SELECT 1 FROM json_each(:value) WHERE CASE recipient WHEN ''"
    " THEN instr(lower(json_extract(line, '$.envelope.targets')) || ',', value || ',') > 0"
    " ELSE lower(substr(recipient, -length(value))) = value END)"
)
"""An accepted message with several recipients names them all in its line."""


class SqliteValues(Values):
    """Named parameters; those that are added have names of their own."""

    def __init__(self, given: Mapping[str, object] | None = None) -> None:
        self.all = dict(given or {})

    def add(self, value: int | str) -> str:
        name = f"value{len(self.all)}"
        self.all[name] = value
        return f":{name}"

    def is_among(self, column: str, texts: Iterable[str]) -> str:
        return f"{column} IN (SELECT value FROM json_each({self.add(json.dumps(list(texts)))}))"

    def is_spelled(self, column: str, spelled: Sequence[str]) -> str:
        # One way is the usual case, and with `=` an index gives the rows in the order of their
        # numbers.
        names = [self.add(text) for text in spelled]
        if len(names) == 1:
            return f"{column} = {names[0]} COLLATE NOCASE"
        return f"{column} COLLATE NOCASE IN ({', '.join(names)})"

    def is_in_domain(self, column: str, domains: Sequence[str]) -> str:
        names = self.add(json.dumps([f"@{domain}" for domain in domains]))
        return (
            f"EXISTS (SELECT 1 FROM json_each({names})"
            f" WHERE lower(substr({column}, -length(value))) = value)"
        )

    def has_recipient_in(self, domains: Sequence[str]) -> str:
        names = self.add(json.dumps([f"@{domain}" for domain in domains]))
        return _HAS_RECIPIENT_IN.replace(":value", names)

    def has_field(self, field: str, value: str) -> str:
        return _FIELD_IS[field].replace(":value", self.add(value))
