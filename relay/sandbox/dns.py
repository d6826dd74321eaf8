"""A DNS server on loopback whose answers and faults a test sets (RFC 1035).

It is authoritative and recursive at once, over UDP and TCP on one port that the
system chooses. A name that is not in its table does not exist (NXDOMAIN, RFC 2308 §2.1);
a name that has only other types there has no data (§2.2). A name of the form `*.example`
stands for all names below it that are not in the table. `Fault` lists the faults. The
server counts every query.

    async with DnsServer() as dns:
        dns.mx("example.net", (10, "mx1.example.net"))
        dns.a("mx1.example.net", "127.0.0.2")
        dns.fail("broken.example", "MX", Fault.SERVFAIL)
        resolver(nameservers=[dns.nameserver])
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

_LONGEST_CHAIN = 16
"""CNAMEs followed in one answer."""


_SOA = "ns.invalid. hostmaster.invalid. 1 3600 600 86400 60"


class Fault(StrEnum):
    """How a query fails, or what is wrong with its answer."""

    SERVFAIL = "servfail"
    REFUSED = "refused"
    NXDOMAIN = "nxdomain"
    NO_DATA = "no-data"
    DROP = "drop"
    """No answer ever."""
    TRUNCATED = "truncated"
    """TC over UDP; the answer is whole over TCP (RFC 7766 §5)."""
    TRUNCATED_NO_TCP = "truncated-no-tcp"
    """TC over UDP, and TCP closes without an answer."""
    WRONG_ID = "wrong-id"
    """A good answer with the id of another query."""
    GARBAGE = "garbage"
    """Bytes that are no message."""


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """The records of a name and type: `rdata` as in a zone file. `delay`: seconds to wait first.

    `authentic`: the AD bit, for a client that asked for it (RFC 6840 §5.8).
    """

    rdata: tuple[str, ...] = ()
    ttl: int = 300
    fault: Fault | None = None
    delay: float = 0.0
    authentic: bool = False


class DnsServer:
    """A table of answers, and the two sockets that serve it. The table may change at any time."""

    def __init__(self) -> None:
        self.address = "127.0.0.1"
        self.port = 0
        self.queries: Counter[tuple[str, str]] = Counter()
        """How many queries came for each name (lower case, no final dot) and type."""
        self.validates = True
        """Whether the server marks answers from signed zones (`sign`) as authentic."""
        self._signed: set[str] = set()
        self._table: dict[tuple[str, str], list[DnsAnswer]] = {}
        self._names: Counter[str] = Counter()
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def nameserver(self) -> str:
        """`address:port`, as the configuration of a resolver wants it."""
        return f"{self.address}:{self.port}"

    def mx(
        self, domain: str, *hosts: tuple[int, str], ttl: int = 300, authentic: bool = False
    ) -> None:
        """The MX records of a domain: preference and name. `(0, ".")` alone is the null MX (RFC
        7505 §3).
        """
        rdata = tuple(f"{preference} {_absolute(name)}" for preference, name in hosts)
        self.set(domain, "MX", DnsAnswer(rdata, ttl, authentic=authentic))

    def a(self, name: str, *addresses: str, ttl: int = 300, authentic: bool = False) -> None:
        """The IPv4 addresses of a host."""
        self.set(name, "A", DnsAnswer(addresses, ttl, authentic=authentic))

    def aaaa(self, name: str, *addresses: str, ttl: int = 300, authentic: bool = False) -> None:
        """The IPv6 addresses of a host."""
        self.set(name, "AAAA", DnsAnswer(addresses, ttl, authentic=authentic))

    def cname(self, name: str, target: str, *, ttl: int = 300) -> None:
        """An alias: every query for `name` gets the alias and the records of its target."""
        self.set(name, "CNAME", DnsAnswer((_absolute(target),), ttl))

    def tlsa(self, name: str, *records: str, port: int = 25) -> None:
        """The TLSA records of a host: usage, selector, matching type, and data in hex (RFC 6698
        §2.2).
        """
        self.set(f"_{port}._tcp.{name}", "TLSA", DnsAnswer(tuple(map(_tlsa, records)), 300))

    def sign(self, *zones: str) -> None:
        """Mark all answers of these zones as authentic from now on, also negative answers."""
        self.set(".", "SOA", DnsAnswer((_SOA,), authentic=True))
        self._signed |= {_clean(zone) for zone in zones}

    def txt(self, name: str, *texts: str, ttl: int = 300) -> None:
        """TXT records of one string each."""
        self.set(name, "TXT", DnsAnswer(tuple(f'"{text}"' for text in texts), ttl))

    def fail(self, name: str, rdtype: str, fault: Fault) -> None:
        """Make the queries for a name and type fail. `rdtype` `*`: all types of the name."""
        self.set(name, rdtype, DnsAnswer(fault=fault))

    def delay(self, name: str, rdtype: str, seconds: float) -> None:
        """Give the answers that are in the table after a delay."""
        self.set(
            name,
            rdtype,
            *(replace(answer, delay=seconds) for answer in self._table[_key(name, rdtype)]),
        )

    def set(self, name: str, rdtype: str, *answers: DnsAnswer) -> None:
        """Set the answers for a name and type.

        Of several answers, the first query gets the first, and so on; the last answer repeats.
        """
        key = _key(name, rdtype)
        if key not in self._table:
            self._names[key[0]] += 1
        self._table[key] = list(answers)

    def remove(self, name: str, rdtype: str) -> None:
        """Take a name and type out of the table."""
        key = _key(name, rdtype)
        if self._table.pop(key, None) is not None:
            self._names[key[0]] -= 1

    def asked(self, name: str, rdtype: str) -> int:
        """How many queries came for this name and type."""
        return self.queries[_key(name, rdtype)]

    async def start(self) -> None:
        """Listen, on one free port for both UDP and TCP."""
        loop = asyncio.get_running_loop()
        for _ in range(20):
            self._tcp = await asyncio.start_server(self._serve_tcp, self.address, self.port)
            port: int = self._tcp.sockets[0].getsockname()[1]
            try:
                self._udp, _protocol = await loop.create_datagram_endpoint(
                    lambda: _Udp(self), local_addr=(self.address, port)
                )
            except OSError:  # the same port is in use for UDP: try another
                self._tcp.close()
                continue
            self.port = port
            return
        raise OSError(f"no port of {self.address} is free in both TCP and UDP")

    async def close(self) -> None:
        """Close both sockets."""
        if self._udp is not None:
            self._udp.close()
        if self._tcp is not None:
            self._tcp.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> DnsServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def respond(self, wire: bytes, *, tcp: bool) -> bytes | None:
        """The octets of the answer to one query; None for no answer."""
        try:
            query = dns.message.from_wire(wire)
        except dns.exception.DNSException:
            return None
        if not query.question:
            return None
        question = query.question[0]
        name, rdtype = _text(question.name), dns.rdatatype.to_text(question.rdtype)
        self.queries[name, rdtype] += 1
        answer = self._take(name, rdtype)
        if answer is not None and answer.delay:
            await asyncio.sleep(answer.delay)
        return self._encode(query, name, rdtype, answer, tcp=tcp)

    def _encode(
        self,
        query: dns.message.Message,
        name: str,
        rdtype: str,
        answer: DnsAnswer | None,
        *,
        tcp: bool,
    ) -> bytes | None:
        fault = answer.fault if answer else None
        response = dns.message.make_response(query, recursion_available=True)
        match fault:
            case Fault.DROP:
                return None
            case Fault.GARBAGE:
                return query.id.to_bytes(2, "big") + os.urandom(40)
            case Fault.SERVFAIL:
                response.set_rcode(dns.rcode.SERVFAIL)
            case Fault.REFUSED:
                response.set_rcode(dns.rcode.REFUSED)
            case Fault.NXDOMAIN:
                response.set_rcode(dns.rcode.NXDOMAIN)
                _add_soa(response, name)
            case Fault.TRUNCATED_NO_TCP if tcp:
                return None
            case Fault.TRUNCATED | Fault.TRUNCATED_NO_TCP if not tcp:
                response.flags |= dns.flags.TC
            case _:
                self._fill(response, name, rdtype, answer)
        asks = query.flags & (dns.flags.AD | dns.flags.CD) or query.ednsflags & dns.flags.DO
        if asks and self._is_validated(name, answer, response):
            response.flags |= dns.flags.AD
        if fault is Fault.WRONG_ID:
            response.id = query.id ^ 0x5555
        limit = 65535 if tcp else max(512, query.payload or 512)
        try:
            return response.to_wire(max_size=limit)
        except dns.exception.TooBig:
            return self._truncated(query)

    def _is_validated(
        self, name: str, answer: DnsAnswer | None, response: dns.message.Message
    ) -> bool:
        """Whether this and every alias on the way is signed."""
        if not self.validates:
            return False
        if answer is not None and answer.authentic:
            return True
        aliases = [rrset for rrset in response.answer if rrset.rdtype == dns.rdatatype.CNAME]
        if response.question[0].rdtype == dns.rdatatype.CNAME:
            aliases = []  # the query did not ask for the target
        names = {name, *(_text(alias[0].target) for alias in aliases)}
        return all(self._is_signed(each) for each in names)

    def _is_signed(self, name: str) -> bool:
        return any(name == zone or name.endswith(f".{zone}") for zone in self._signed)

    def _truncated(self, query: dns.message.Message) -> bytes:
        response = dns.message.make_response(query, recursion_available=True)
        response.flags |= dns.flags.TC
        return response.to_wire()

    def _fill(
        self, response: dns.message.Message, name: str, rdtype: str, answer: DnsAnswer | None
    ) -> None:
        """Put the records in, with the aliases that lead to them; or a negative answer."""
        if answer is None:
            name, answer = self._follow_aliases(response, name, rdtype)
        if answer is not None and answer.fault is Fault.SERVFAIL:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif answer is not None and answer.rdata and answer.fault is not Fault.NO_DATA:
            response.answer.append(_rrset(name, rdtype, answer))
        else:
            if answer is None and not self._exists(name):
                response.set_rcode(dns.rcode.NXDOMAIN)
            _add_soa(response, name)

    def _follow_aliases(
        self, response: dns.message.Message, name: str, rdtype: str
    ) -> tuple[str, DnsAnswer | None]:
        for _ in range(_LONGEST_CHAIN):
            alias = self._take(name, "CNAME")
            if alias is None or not alias.rdata:
                return name, self._take(name, rdtype)
            response.answer.append(_rrset(name, "CNAME", alias))
            name = _clean(alias.rdata[0])
        return name, self._take(name, rdtype)

    def _take(self, name: str, rdtype: str) -> DnsAnswer | None:
        """The next of the answers for a name and type."""
        for candidate in _candidates(name):
            answers = self._table.get((candidate, rdtype)) or self._table.get((candidate, "*"))
            if answers:
                return answers.pop(0) if len(answers) > 1 else answers[0]
            if self._names[candidate]:
                return None
        return None

    def _exists(self, name: str) -> bool:
        return any(self._names[candidate] for candidate in _candidates(name))

    async def _serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Queries over one TCP connection, each with its length before it (RFC 1035 §4.2.2)."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
                response = await self.respond(await reader.readexactly(length), tcp=True)
                if response is None:
                    return
                writer.write(struct.pack("!H", len(response)) + response)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    def _serve_udp(
        self, transport: asyncio.DatagramTransport, wire: bytes, client: tuple[str, int]
    ) -> None:
        async def answer() -> None:
            response = await self.respond(wire, tcp=False)
            if response is not None and not transport.is_closing():
                transport.sendto(response, client)

        task = asyncio.ensure_future(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted by class: uvloop's UDP transport is none of asyncio's.
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None:
            self._server._serve_udp(self._transport, data, addr)


def _candidates(name: str) -> Iterator[str]:
    """A name, and the wildcards that could stand for it, closest first (RFC 4592 §3.3.1)."""
    yield name
    while "." in name:
        name = name.split(".", 1)[1]
        yield f"*.{name}"


def _rrset(name: str, rdtype: str, answer: DnsAnswer) -> dns.rrset.RRset:
    return dns.rrset.from_text_list(_absolute(name), answer.ttl, "IN", rdtype, answer.rdata)


def _add_soa(response: dns.message.Message, name: str) -> None:
    """Without an SOA a negative answer looks like a lame delegation (RFC 2308 §2.2)."""
    zone = _absolute(name.split(".", 1)[-1])
    response.authority.append(dns.rrset.from_text(zone, 60, "IN", "SOA", _SOA))


def _key(name: str, rdtype: str) -> tuple[str, str]:
    return _clean(name), rdtype.upper()


def _clean(name: str) -> str:
    return name.lower().removesuffix(".")


def _text(name: dns.name.Name) -> str:
    return _clean(name.to_text(omit_final_dot=True)) if name != dns.name.root else ""


def _absolute(name: str) -> str:
    return name if name.endswith(".") else f"{name}."


def _tlsa(text: str) -> str:
    """A TLSA record in the form for unknown types (RFC 3597 §5), so that it may be malformed."""
    usage, selector, matching, data = text.split(" ", 3)
    octets = bytes((int(usage), int(selector), int(matching))) + bytes.fromhex(data)
    return f"\\# {len(octets)} {octets.hex()}"
