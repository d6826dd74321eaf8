"""What the DNS said, as values: what routing decides by.

    MxAnswer, AddressAnswer,  there are records; or, with none, the name has no such data
    TxtAnswer, TlsaAnswer     (RFC 2308 §2.2)
    NoSuchName                NXDOMAIN, or a name that cannot exist: permanent
    Unanswered                SERVFAIL, a timeout, nonsense: nothing is known. Temporary, and never
                              a reason to use another kind of record instead (RFC 5321 §5.1)

`expires` is an instant of the monotonic clock, in seconds, until when the answer may
be used. `authenticated`: a resolver that is trusted says that it validated the answer, aliases
included (the AD bit, RFC 4035 §3.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Protocol

__all__ = [
    "AddressAnswer",
    "AddressLookup",
    "MxAnswer",
    "MxLookup",
    "MxRecord",
    "NoSuchName",
    "Resolver",
    "TlsaAnswer",
    "TlsaLookup",
    "TrustAd",
    "TxtAnswer",
    "TxtLookup",
    "Unanswered",
]


@dataclass(frozen=True, slots=True)
class MxRecord:
    """One MX record as it came, without the final dot; `exchange` of a null MX is ""."""

    preference: int
    exchange: str


@dataclass(frozen=True, slots=True)
class MxAnswer:
    """The MX records of a domain; none: it has no such data. `canonical`: the domain it is an alias
    of.
    """

    records: tuple[MxRecord, ...]
    expires: float = inf
    authenticated: bool = False
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class AddressAnswer:
    """A host's addresses of both families; none: it has no such data.

    `authenticated`: those of one family are enough. `canonical`: the name that the host is an alias
    of in the end, "" where it is none. `alias_authenticated`: the alias itself is, whatever is
    behind.
    """

    addresses: tuple[str, ...]
    expires: float = inf
    authenticated: bool = False
    canonical: str = ""
    alias_authenticated: bool = False


@dataclass(frozen=True, slots=True)
class TxtAnswer:
    """The TXT records of a name, the strings of each joined; none: it has no such data."""

    texts: tuple[bytes, ...]
    expires: float = inf
    authenticated: bool = False


@dataclass(frozen=True, slots=True)
class TlsaAnswer:
    """The TLSA records of a name as they came, octet for octet; none: it has no such data."""

    records: tuple[bytes, ...]
    expires: float = inf
    authenticated: bool = False


@dataclass(frozen=True, slots=True)
class NoSuchName:
    """The name does not exist, or cannot. `reason` completes "example.net …"."""

    reason: str = "does not exist (NXDOMAIN)"
    expires: float = inf


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Nothing is known for now. `reason`: what happened instead of an answer."""

    reason: str
    expires: float = 0.0


MxLookup = MxAnswer | NoSuchName | Unanswered
AddressLookup = AddressAnswer | NoSuchName | Unanswered
TxtLookup = TxtAnswer | NoSuchName | Unanswered
TlsaLookup = TlsaAnswer | NoSuchName | Unanswered


class TrustAd(StrEnum):
    """Whether the resolver's word that it validated an answer is believed."""

    AUTO = "auto"
    """Where every name server is on this machine, and validates."""
    ALWAYS = "always"
    NEVER = "never"


class Resolver(Protocol):
    """Who answers. No method raises for anything that a domain or a name server does."""

    async def mx(self, domain: str) -> MxLookup:
        """The MX records of a domain."""

    async def addresses(self, host: str) -> AddressLookup:
        """The A and AAAA records of a host, aliases followed."""

    async def txt(self, name: str, *, anew: bool = False) -> TxtLookup:
        """The TXT records of a name, aliases followed; `anew`: asked for although an answer is
        kept.
        """

    async def tlsa(self, name: str) -> TlsaLookup:
        """The TLSA records of a name, aliases followed."""

    async def validates(self) -> bool:
        """Whether answers come validated: whether `authenticated` may ever be true."""
