"""How PostgreSQL writes what is searched by: addresses, domains and fields of events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from relay.queue.conditions import Values


def as_json(column: str) -> str:
    """A column of JSON text, to be looked into: PostgreSQL has no NUL in text."""
    return f"replace({column}, '\\u0000', '\\ufffd')::jsonb"


_LINE = as_json("line")

_FIELD_IS = {
    "severity": f"{_LINE} ->> 'severity' = :value",
    "about": f"{_LINE} ->> 'about' = :value",
    "message-id": f"{_LINE} #>> '{{message,headers,message-id}}' = :value",
    "tag": f"{_LINE} -> 'tags' ? :value",
    "protection": (
        f"CASE WHEN {_LINE} -> 'delivery-status' IS NULL THEN ''"
        f" WHEN name <> 'delivered' OR {_LINE} #>> '{{delivery-status,tls}}' IS NULL"
        " THEN 'not-sent'"
        f" WHEN {_LINE} #>> '{{delivery-status,tls}}' <> 'true' THEN 'clear'"
        f" WHEN {_LINE} #>> '{{delivery-status,certificate-verified}}' = 'true' THEN 'verified'"
        " ELSE 'encrypted' END = :value"
    ),
    "policy-source": (
        f"({_LINE} #>> '{{policy,require-tls-source}}' = :value"
        f" OR {_LINE} #>> '{{policy,skip-verification-source}}' = :value)"
    ),
    "text": (
        "strpos(lower(queue_id || ' ' || id || ' ' || sender || ' ' || recipient || ' '"
        f" || coalesce({_LINE} #>> '{{envelope,targets}}', '') || ' '"
        f" || coalesce({_LINE} #>> '{{message,headers,subject}}', '') || ' '"
        f" || coalesce({_LINE} #>> '{{message,headers,message-id}}', '')),"
        " lower(:value)) > 0"
    ),
} | {
    field: f"strpos(lower({_LINE} #>> '{{message,headers,{field}}}'), lower(:value)) > 0"
    for field in ("from", "to", "subject")
}
"""Conditions on fields of the event; few searches have them, so no column holds these fields."""


class PostgresValues(Values):
    """Parameters that are numbered in the order in which they are named."""

    def __init__(self, given: Iterable[object] = ()) -> None:
        self.all = list(given)

    def copy(self) -> PostgresValues:
        """The same, to be added to apart."""
        return PostgresValues(self.all)

    def add(self, value: object) -> str:
        self.all.append(value)
        return f"${len(self.all)}"

    def is_among(self, column: str, texts: Iterable[str]) -> str:
        return f"{column} = ANY({self.add(list(texts))}::text[])"

    def is_spelled(self, column: str, spelled: Sequence[str]) -> str:
        return self.is_among(f"lower({column})", [text.lower() for text in spelled])

    def is_in_domain(self, column: str, domains: Sequence[str]) -> str:
        # The part behind the last "@", with it.
        names = [f"@{name}".lower() for name in domains]
        return self.is_among(f"lower(substring({column} FROM '@[^@]*$'))", names)

    def has_recipient_in(self, domains: Sequence[str]) -> str:
        return (
            "CASE recipient WHEN '' THEN EXISTS (SELECT 1 FROM unnest(string_to_array("
            f"{_LINE} #>> '{{envelope,targets}}', ',')) AS target"
            f" WHERE {self.is_in_domain('target', domains)})"
            f" ELSE {self.is_in_domain('recipient', domains)} END"
        )

    def has_field(self, field: str, value: str) -> str:
        return _FIELD_IS[field].replace(":value", f"{self.add(value)}::text")
