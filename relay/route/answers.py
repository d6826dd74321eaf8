"""Answers of the DNS as values, by which routing decides.

    MxAnswer, AddressAnswer,  the records; without a record, the name has no such data
    TxtAnswer, TlsaAnswer     (RFC 2308 §2.2)
    NoSuchName                NXDOMAIN, or a name that cannot exist: permanent
    Unanswered                SERVFAIL, a timeout, nonsense: nothing is known. Temporary, and never
                              a reason to use another kind of record instead (RFC 5321 §5.1)

`expires`: until when the answer may be used, in seconds of the monotonic clock. `authenticated`:
a trusted resolver has validated the answer, including its aliases (the AD bit, RFC 4035 §3.2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Protocol


@dataclass(frozen=True, slots=True)
class MxRecord:
    """One MX record, without the final dot of `exchange`, which is "" in a null MX."""

    preference: int
    exchange: str


@dataclass(frozen=True, slots=True)
class MxAnswer:
    """The MX records of a domain; none: it has no such data.

    `canonical`: the domain that it is an alias of.
    """

    records: tuple[MxRecord, ...]
    expires: float = inf
    authenticated: bool = False
    canonical: str = ""


@dataclass(frozen=True, slots=True)
class AddressAnswer:
    """A host's addresses of both families; none: it has no such data.

    `authenticated`: the answer for one family is enough. `canonical`: the name at the end of the
    host's aliases, "" where it is no alias. `alias_authenticated`: the alias record itself was
    validated.
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
    """The TLSA records of a name as octets, unchanged; none: it has no such data."""

    records: tuple[bytes, ...]
    expires: float = inf
    authenticated: bool = False


@dataclass(frozen=True, slots=True)
class NoSuchName:
    """The name does not exist, or cannot exist. `reason` completes "example.net …"."""

    reason: str = "does not exist (NXDOMAIN)"
    expires: float = inf


@dataclass(frozen=True, slots=True)
class Unanswered:
    """There was no answer. `reason`: what happened instead."""

    reason: str
    expires: float = 0.0


MxLookup = MxAnswer | NoSuchName | Unanswered
AddressLookup = AddressAnswer | NoSuchName | Unanswered
TxtLookup = TxtAnswer | NoSuchName | Unanswered
TlsaLookup = TlsaAnswer | NoSuchName | Unanswered


class TrustAd(StrEnum):
    """Whether the relay trusts the resolver's statement that it validated an answer."""

    AUTO = "auto"
    """Trust it where every name server is on this machine and validates."""
    ALWAYS = "always"
    NEVER = "never"


class Resolver(Protocol):
    """Answers questions. No method raises because of what a domain or a name server does."""

    async def mx(self, domain: str) -> MxLookup:
        """The MX records of a domain."""

    async def addresses(self, host: str) -> AddressLookup:
        """The A and AAAA records of a host, aliases followed."""

    async def txt(self, name: str, *, anew: bool = False) -> TxtLookup:
        """The TXT records of a name, aliases followed; `anew`: ask again in spite of the cache."""

    async def tlsa(self, name: str) -> TlsaLookup:
        """The TLSA records of a name, aliases followed."""

    async def validates(self) -> bool:
        """Whether the resolver validates, so that `authenticated` can be true."""
