"""Asks the DNS with dnspython, and returns the answers as values.

`DnsResolver` returns values of `relay.route.answers` and keeps them as long as their TTL
allows. It translates the exceptions of dnspython:

    NXDOMAIN                                  NoSuchName
    a name too long, empty labels, bad IDNA   NoSuchName: it cannot exist
    YXDOMAIN                                  NoSuchName: too long behind a DNAME (RFC 6672 §2.2)
    no such data                              an answer without records
    SERVFAIL, REFUSED, FORMERR, garbage,
    timeouts, a referral, an endless chain of
    aliases, and any other error              Unanswered: temporary

The resolver asks for absolute names only and never uses a search list. EDNS with 1232 octets
(the value that avoids fragments) makes TCP unnecessary for most answers; an answer with TC=1 is
asked for again over TCP. The AD bit in the query asks whether the resolver validated (RFC 6840
§5.7); the signatures themselves are not requested.

The relay believes that an answer was validated if it trusts the resolver (`trust_ad`). It does so
if the operator says so, or if every name server is on this machine and marks the SOA record of the
root as validated. It asks for that record at the first look-up and once an hour. Otherwise all
answers count as not validated, and a warning says so.

There is one query at a time for one name and type: other callers wait for the same answer. At most
`concurrency` queries are under way, because each opens a socket. A quarter of these slots is
reserved for names that were answered at once the last time. So silent or slow name servers, with
any number of names, do not delay the other look-ups. dnspython measures its timeout with the wall
clock; a deadline on the monotonic clock limits each query, so that none can hang.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from math import inf

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.resolver

from relay.route.answers import (
    AddressAnswer,
    AddressLookup,
    MxAnswer,
    MxLookup,
    MxRecord,
    NoSuchName,
    TlsaAnswer,
    TlsaLookup,
    TrustAd,
    TxtAnswer,
    TxtLookup,
    Unanswered,
)
from relay.route.cache import ExpiringCache
from relay.route.dns_response import (
    BadName,
    NotAnAnswer,
    absolute,
    alias_target,
    failure,
    negative_ttl,
    refuse_referral,
    text_of,
    unfinished,
)
from relay.route.name_servers import (
    NameServers,
    ResolverError,
    ResolverOptions,
    not_on_this_machine,
)

log = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds to wait for the second address family once the first has given an address."""
_LONGEST_CHAIN = 8
"""How many aliases the relay follows after those that the resolver's answers follow."""
_SHORTEST = 1.0
"""Seconds an answer is kept even with a TTL of 0, so that a burst of mail is one query."""
_LONGEST = 3600.0
_LONGEST_NEGATIVE = 60.0
"""A repaired domain should not wait long for an old NXDOMAIN (RFC 2308 §5 allows hours)."""
_HALF = 300.0
"""Seconds until a family that did not answer is asked again while the other has an address."""
_TEMPORARY = 5.0
"""Seconds that a failure is kept: so a dead name server is not asked for each message."""

_TRUST_KEPT = 3600.0
"""Seconds until the resolver is asked again whether it validates."""
_TRUST_UNKNOWN = 5.0
"""The same, while it has not answered."""
_TRUST_DOUBTED = 60.0
"""Seconds that a resolver has for its first answer to that. Hosts whose addresses it calls
validated are not used until then; afterwards it is one that does not validate.
"""

_PROMPT = 3.0
_MOST_WELL = 20_000
"""How many names may be remembered as answered at once; slots are reserved for these names."""

_RECORDS_KEPT = 200_000
_RECORDS_OF_ONE_NAME = 1000


# The library refuses a complete answer because of one invalid record (a digest of the wrong
# length). So records are taken as octets, and `relay.route.dane` reads them one by one.
dns.rdata._rdata_classes[dns.rdataclass.IN, dns.rdatatype.TLSA] = dns.rdata.GenericRdata


@dataclass(frozen=True, slots=True)
class _Records:
    """The records of one name and type: addresses, MX records, texts, or other records as octets.

    `canonical`: the name at the end of the aliases, "" without an alias.
    """

    addresses: tuple[str, ...]
    expires: float
    authenticated: bool
    mx: tuple[MxRecord, ...] = ()
    texts: tuple[bytes, ...] = ()
    canonical: str = ""

    @property
    def weight(self) -> int:
        return 1 + len(self.addresses) + len(self.mx) + len(self.texts)


_Lookup = _Records | NoSuchName | Unanswered


class DnsResolver:
    """A caching stub resolver. Make it inside its event loop."""

    def __init__(
        self, options: ResolverOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises `ResolverError` if there is no name server to ask."""
        self._options = options
        self._clock = clock
        self._cache: ExpiringCache[_Lookup] = ExpiringCache(_RECORDS_KEPT)
        self._under_way: dict[str, asyncio.Task[_Lookup]] = {}
        self._slots = _Slots(options.concurrency)
        self._servers = NameServers(options, clock)
        self._trust: _Trust | None = None
        self._asking_trust: asyncio.Task[None] | None = None

    def note_prompt(self, names: Iterable[str]) -> None:
        """Names that were answered at once lately, before this process began."""
        for name in names:
            self._slots.note(name, is_well=True)

    async def mx(self, domain: str) -> MxLookup:
        """The MX records of a domain."""
        found = await self._lookup(domain, "MX")
        if isinstance(found, _Records):
            secure = await self.validates() and found.authenticated
            return MxAnswer(found.mx, found.expires, secure, found.canonical)
        return found

    async def addresses(self, host: str) -> AddressLookup:
        """The addresses of a host; A and AAAA are asked for at the same time.

        A failure for one family does not matter if the other family has an address.
        """
        now = self._clock()
        known = self._cache.get(f"A {host}", now=now), self._cache.get(f"AAAA {host}", now=now)
        if known[0] is not None and known[1] is not None:
            return await self._secured(host, _both_families(known[0], known[1]))
        tasks = [asyncio.create_task(self._lookup(host, rdtype)) for rdtype in ("A", "AAAA")]
        try:
            _, waiting = await asyncio.wait(tasks, timeout=_PATIENCE)
            if waiting and not any(_has_addresses(task) for task in tasks):
                await asyncio.wait(waiting)
            late = Unanswered("no answer yet", self._clock() + _TEMPORARY)
            both = _both_families(*(task.result() if task.done() else late for task in tasks))
            return await self._secured(host, both)
        finally:
            for task in tasks:
                task.cancel()

    async def txt(self, name: str, *, anew: bool = False) -> TxtLookup:
        """The TXT records of a name."""
        found = await self._lookup(name, "TXT", anew=anew)
        if isinstance(found, _Records):
            return TxtAnswer(found.texts, found.expires, found.authenticated)
        return found

    async def tlsa(self, name: str) -> TlsaLookup:
        """The TLSA records of a name."""
        found = await self._lookup(name, "TLSA")
        if isinstance(found, _Records):
            secure = found.authenticated and await self.validates()
            return TlsaAnswer(found.texts, found.expires, secure)
        return found

    async def _secured(self, host: str, found: AddressLookup) -> AddressLookup:
        """Addresses, with the facts whether they and the alias of the host were validated."""
        if not isinstance(found, AddressAnswer) or not (found.authenticated or found.canonical):
            return found
        if not await self.validates():
            if self._trust is not None and self._trust.is_given is None:
                reason = "the name server has not answered whether it validates (DNSSEC)"
                return Unanswered(reason, self._clock() + _TRUST_UNKNOWN)
            return replace(found, authenticated=False)
        if found.authenticated:
            return found
        # RFC 7672 §2.2.2: an alias in a signed zone may lead out of it, and has TLSA records of its
        # own.
        alias = await self._lookup(host, "CNAME")
        return replace(
            found, alias_authenticated=isinstance(alias, _Records) and alias.authenticated
        )

    async def validates(self) -> bool:
        """Whether there is a resolver whose validation is trusted."""
        match self._options.trust_ad:
            case TrustAd.ALWAYS:
                return True
            case TrustAd.NEVER:
                return False
        if not self._knows_trust():
            if self._asking_trust is None or self._asking_trust.done():
                self._asking_trust = asyncio.create_task(self._ask_trust())
            await asyncio.shield(self._asking_trust)
        return self._trust is not None and self._trust.is_given is True

    @property
    def last_validated(self) -> bool | None:
        """The last result of `validates`; None before the first answer."""
        return None if self._trust is None else self._trust.is_given

    async def _is_root_validated(self) -> bool | None:
        """Whether the resolver validated the root's signed SOA record; None without an answer."""
        try:
            answer = await self._resolve(dns.name.root, "SOA")
        except dns.resolver.NXDOMAIN:
            return False
        except (TimeoutError, OSError, ResolverError, dns.exception.DNSException):
            return None
        return bool(answer.response.flags & dns.flags.AD)

    def _knows_trust(self) -> bool:
        trust, servers = self._trust, self._servers.resolver()
        return trust is not None and trust.servers is servers and trust.until > self._clock()

    async def _ask_trust(self) -> None:
        """Ask whether the resolver validates."""
        servers, before = self._servers.resolver(), self._trust
        trouble = not_on_this_machine(servers)
        is_validated = False if trouble else await self._is_root_validated()
        if is_validated is None:
            self._trust = _without_answer(servers, before, self._clock())
        else:
            if not (trouble or is_validated):
                trouble = "the name server does not validate (DNSSEC)"
            self._trust = _Trust(servers, is_validated, self._clock() + _TRUST_KEPT, trouble)
        told = self._trust.told
        if told is not None and (before is None or before.told != told):
            _tell_of_trust(told, before)

    async def close(self) -> None:
        """Cancel the queries that are under way."""
        tasks: list[asyncio.Task[object]] = list(self._under_way.values())
        if self._asking_trust is not None:
            tasks.append(self._asking_trust)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lookup(self, name: str, rdtype: str, *, anew: bool = False) -> _Lookup:
        key = f"{rdtype} {name}"
        cached = None if anew else self._cache.get(key, now=self._clock())
        if cached is not None:
            return cached
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._ask(key, name, rdtype))
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        # All callers share the answer: a cancelled caller must not cancel it for the others.
        return await asyncio.shield(task)

    async def _ask(self, key: str, name: str, rdtype: str) -> _Lookup:
        async with self._slots.for_name(name):
            began = self._clock()
            found = await self._query(name, rdtype)
        is_prompt = self._clock() - began < _PROMPT
        self._slots.note(name, is_well=is_prompt and not isinstance(found, Unanswered))
        weight = found.weight if isinstance(found, _Records) else 1
        self._cache.put(key, found, expires=found.expires, weight=weight)
        return found

    async def _query(self, name: str, rdtype: str) -> _Lookup:
        """One name and type, aliases followed, as a value."""
        try:
            target = absolute(name)
            is_secure = True
            for _ in range(_LONGEST_CHAIN):
                answer = await self._resolve(target, rdtype)
                is_secure = is_secure and bool(answer.response.flags & dns.flags.AD)
                alias = unfinished(answer)
                if alias is None:
                    records = self._records(answer, is_secure)
                    return replace(records, canonical=alias_target(name, answer))
                target = alias
            return self._unanswered("a chain of aliases without end")
        except dns.resolver.NXDOMAIN as exc:
            return NoSuchName(expires=self._keep(negative_ttl(exc), _LONGEST_NEGATIVE))
        except (BadName, dns.resolver.YXDOMAIN):
            return NoSuchName("is not a name the DNS can hold", self._keep(_LONGEST, _LONGEST))
        except (TimeoutError, dns.exception.Timeout):
            return self._unanswered("the name servers did not answer in time")
        except dns.resolver.NoNameservers as exc:
            return self._unanswered(failure(exc))
        except NotAnAnswer as exc:
            return self._unanswered(str(exc))
        except ResolverError as exc:
            return self._unanswered(str(exc))
        except Exception as exc:
            # A bug here or in the library must not lose mail: it is temporary, and logged.
            log.warning("DNS lookup of %s %s failed: %r", ascii(name), rdtype, exc)
            return self._unanswered(f"the lookup failed ({type(exc).__name__})")

    async def _resolve(self, name: dns.name.Name, rdtype: str) -> dns.resolver.Answer:
        resolver = self._servers.resolver()
        # One second more than the library's own timeout, whose error message is more exact.
        async with asyncio.timeout(self._options.timeout.total_seconds() + 1):
            return await resolver.resolve(name, rdtype, raise_on_no_answer=False)

    def _records(self, answer: dns.resolver.Answer, authenticated: bool) -> _Records:
        ttl = float(answer.chaining_result.minimum_ttl)
        if answer.rrset is None:
            refuse_referral(answer.response)
            return _Records((), self._keep(ttl, _LONGEST_NEGATIVE), authenticated)
        expires = self._keep(ttl, _LONGEST)
        if answer.rdtype == dns.rdatatype.MX:
            mx = sorted(answer.rrset, key=lambda record: record.preference)[:_RECORDS_OF_ONE_NAME]
            records = tuple(MxRecord(record.preference, text_of(record.exchange)) for record in mx)
            return _Records((), expires, authenticated, records)
        if answer.rdtype == dns.rdatatype.TXT:
            texts = [b"".join(record.strings) for record in answer.rrset][:_RECORDS_OF_ONE_NAME]
            return _Records((), expires, authenticated, texts=tuple(texts))
        if answer.rdtype == dns.rdatatype.TLSA:
            octets = [record.data for record in answer.rrset][:_RECORDS_OF_ONE_NAME]
            return _Records((), expires, authenticated, texts=tuple(octets))
        if answer.rdtype not in (dns.rdatatype.A, dns.rdatatype.AAAA):
            return _Records((), expires, authenticated)
        addresses = [record.address for record in answer.rrset]
        return _Records(tuple(addresses[:_RECORDS_OF_ONE_NAME]), expires, authenticated)

    def _keep(self, ttl: float, longest: float) -> float:
        return self._clock() + min(max(ttl, _SHORTEST), longest)

    def _unanswered(self, reason: str) -> Unanswered:
        return Unanswered(reason, self._clock() + _TEMPORARY)


class _Slots:
    """The slots for queries.

    Names that were not answered at once the last time may use three quarters of them.
    """

    def __init__(self, slots: int) -> None:
        self._all = asyncio.Semaphore(slots)
        self._others = asyncio.Semaphore(slots - slots // 4)
        self._well: dict[str, None] = {}

    @asynccontextmanager
    async def for_name(self, name: str) -> AsyncIterator[None]:
        """A slot for the queries about a name."""
        if name in self._well:
            async with self._all:
                yield
        else:
            async with self._others, self._all:
                yield

    def note(self, name: str, *, is_well: bool) -> None:
        """Remember whether a name was answered at once; the oldest note is forgotten first."""
        self._well.pop(name, None)
        if is_well:
            self._well[name] = None
            if len(self._well) > _MOST_WELL:
                del self._well[next(iter(self._well))]


@dataclass(frozen=True, slots=True)
class _Trust:
    """Whether these name servers are trusted to validate, until when, and what was logged.

    `is_given` None: they have not answered yet; `doubt_ends`: when that is taken for a no.
    """

    servers: dns.asyncresolver.Resolver
    is_given: bool | None
    until: float
    told: str | None
    doubt_ends: float = inf


def _without_answer(
    servers: dns.asyncresolver.Resolver, before: _Trust | None, now: float
) -> _Trust:
    """What holds after a question whether they validate that was not answered: the last result."""
    until = now + _TRUST_UNKNOWN
    if before is None or before.servers is not servers:
        told = None if before is None else before.told
        return _Trust(servers, None, until, told, doubt_ends=now + _TRUST_DOUBTED)
    if before.is_given is None and now >= before.doubt_ends:
        told = "the name server does not answer whether it validates (DNSSEC)"
        return replace(before, is_given=False, until=until, told=told)
    return replace(before, until=until)


def _tell_of_trust(trouble: str, before: _Trust | None) -> None:
    if trouble:
        log.warning(
            "TLSA records (DANE) are not looked up: %s; run a validating resolver on this machine, "
            "or see resolver.trust_ad",
            trouble,
        )
    elif before is not None:
        log.info("the name servers validate: TLSA records (DANE) are looked up")


def _has_addresses(task: asyncio.Task[_Lookup]) -> bool:
    if not task.done():
        return False
    found = task.result()
    return isinstance(found, _Records) and bool(found.addresses)


def _both_families(ipv4: _Lookup, ipv6: _Lookup) -> AddressLookup:
    found = (ipv4, ipv6)
    records = [one for one in found if isinstance(one, _Records)]
    addresses = tuple(address for one in records for address in one.addresses)
    expires = min(one.expires for one in found)
    unanswered = next((one for one in found if isinstance(one, Unanswered)), None)
    if addresses:
        if unanswered is not None:
            expires = min(max(one.expires for one in found), unanswered.expires + _HALF)
        # RFC 7672 §2.2.2: one validated family is enough, and its canonical name counts.
        best = max((one for one in records if one.addresses), key=lambda one: one.authenticated)
        return AddressAnswer(addresses, expires, best.authenticated, best.canonical)
    if unanswered is not None:
        return unanswered
    if records:
        return AddressAnswer((), expires)
    return NoSuchName(_reason(found), expires)


def _reason(found: tuple[_Lookup, ...]) -> str:
    return next(one.reason for one in found if isinstance(one, NoSuchName))
