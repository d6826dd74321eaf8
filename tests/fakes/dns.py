"""A resolver whose answers are a literal table: records, and failures, as data.

    dns = FakeDns(
        mx_records={"example.net": [(10, "mx1.example.net")], "broken.example":
        Unanswered("SERVFAIL")}, hosts={"mx1.example.net": ["11.22.33.1"]},
    )

What is not in a table does not exist. Who asked for what is kept in `asked`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from relay.route.answers import (
    AddressAnswer,
    AddressLookup,
    MxAnswer,
    MxLookup,
    MxRecord,
    NoSuchName,
    TlsaLookup,
    TxtAnswer,
    TxtLookup,
    Unanswered,
)


@dataclass
class FakeDns:
    """Answers like `relay.route.dns.DnsResolver`, without a network."""

    mx_records: Mapping[str, Sequence[tuple[int, str]] | MxLookup] = field(default_factory=dict)
    hosts: Mapping[str, Sequence[str] | AddressLookup] = field(default_factory=dict)
    texts: Mapping[str, Sequence[bytes] | TxtLookup] = field(default_factory=dict)
    tlsa_records: Mapping[str, TlsaLookup] = field(default_factory=dict)
    is_validating: bool = True
    asked: list[str] = field(default_factory=list)

    async def mx(self, domain: str) -> MxLookup:
        self.asked.append(f"MX {domain}")
        found = self.mx_records.get(domain)
        if isinstance(found, (MxAnswer, NoSuchName, Unanswered)):
            return found
        if found is None:
            return MxAnswer(()) if domain in self.hosts else NoSuchName()
        return MxAnswer(tuple(MxRecord(preference, exchange) for preference, exchange in found))

    async def addresses(self, host: str) -> AddressLookup:
        self.asked.append(f"A {host}")
        found = self.hosts.get(host)
        if isinstance(found, (AddressAnswer, NoSuchName, Unanswered)):
            return found
        return NoSuchName() if found is None else AddressAnswer(tuple(found))

    async def txt(self, name: str, *, anew: bool = False) -> TxtLookup:
        self.asked.append(f"TXT {name}{' anew' if anew else ''}")
        found = self.texts.get(name)
        if isinstance(found, (TxtAnswer, NoSuchName, Unanswered)):
            return found
        return NoSuchName() if found is None else TxtAnswer(tuple(found))

    async def tlsa(self, name: str) -> TlsaLookup:
        self.asked.append(f"TLSA {name}")
        return self.tlsa_records.get(name, NoSuchName())

    async def validates(self) -> bool:
        return self.is_validating
