"""From the answer to an MX lookup to the mail hosts of a domain, by name (RFC 5321 §5.1).

    answer of the DNS                     meaning
    records                               these hosts, the lowest preference first
    none, but the domain exists           the domain itself is the host: implicit MX
    one record, "0 ."                     takes no mail at all (null MX, RFC 7505): 5.1.10, code 556
    "." among others                      the others (RFC 7505 §3 forbids the mixture)
    no such domain                        5.1.2
    no answer                             4.4.3; never the address record instead
    only the relay itself, or only
    names that cannot be used             5.4.6, or 5.4.4

The relay's own host name ends the list: it and every host of the same or a worse preference is
dropped, because mail would loop.

Names are normalised here (lower case, A-labels, no final dot): this form is sent as SNI, verified
and logged. A name that is an address in digits, has no dot, or is `localhost` is not accepted as a
mail host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from relay.mail.address import AddressError, normalise_domain
from relay.mail.outcome import Bounced, Code, Deferred
from relay.route.addresses import parse_address, parse_address_literal
from relay.route.answers import MxAnswer, MxLookup, MxRecord, NoSuchName, Unanswered
from relay.route.next_hop import NextHop, NoRoute

T = TypeVar("T")

NULL_MX = 556
"""RFC 7505 §4: the reply code for a domain that takes no mail."""


@dataclass(frozen=True, slots=True)
class MailHost:
    """A host that may take a domain's mail, by its normalised name."""

    preference: int
    name: str


@dataclass(frozen=True, slots=True)
class MailHosts:
    """The hosts of a domain, at least one, each name once, lowest preference first.

    `rejected`: one line for each name that cannot be used. `expires`: of the answer.
    `left_out`: how many more hosts there are, which are not looked up this time.
    """

    hosts: tuple[MailHost, ...]
    rejected: tuple[str, ...]
    expires: float
    left_out: int = 0


def mail_hosts(domain: str, answer: MxLookup, *, hostname: str) -> MailHosts | NoRoute:
    """The mail hosts of `domain`, without the relay itself (`hostname`) and those after it."""
    match answer:
        case Unanswered():
            return NoRoute(
                Deferred(
                    "4.4.3", Code.NO_USABLE_MX, "", f"MX lookup of {domain} failed: {answer.reason}"
                )
            )
        case NoSuchName():
            return NoRoute(Bounced("5.1.2", Code.NO_USABLE_MX, "", f"{domain} {answer.reason}"))
        case MxAnswer(records=()):
            # Implicit MX, because the answer says that the domain exists and has no MX record.
            return _without_ourselves(domain, [MailHost(0, domain)], (), hostname, answer.expires)
        case MxAnswer():
            return _from_records(domain, answer, hostname)


def best_and_others(ordered: Sequence[T], limit: int, random: Random) -> list[T]:
    """The first `limit` / 2 of them and a random choice of the others, in the same order."""
    best = -(-limit // 2)
    others = random.sample(range(best, len(ordered)), limit - best)
    return [*ordered[:best], *(ordered[index] for index in sorted(others))]


def hop_host(named: str) -> str | None:
    """A host of a next hop as it is looked up: a name, or an address; None where it is neither."""
    literal = parse_address_literal(named) or parse_address(named)
    return str(literal) if literal is not None else host_name(named)


def hop_host_names(hop: NextHop) -> list[str]:
    """The names of all hosts of a next hop, as `Host.name` has them."""
    return [hop_host(named) or named for named in hop.every_host()]


def host_name(text: str) -> str | None:
    """A normalised name; None if the text cannot be the name of a host.

    An underscore is allowed: such host names are wrong (RFC 1123 §2.1), but they exist and can be
    looked up.
    """
    if text.startswith("["):  # an address literal is no name
        return None
    try:
        return normalise_domain(text)
    except AddressError:
        return None


def unusable(name: str) -> str:
    """Why a name in the DNS or in an address is not a host to look up; "" if it is one."""
    last = name.rpartition(".")[2].lower()
    if last.isdigit():
        return "is an address, not a name (RFC 5321 §5.1)"
    if host_name(name) is None:
        return "is not a host name"
    if last == "localhost":
        return "is this machine (RFC 6761 §6.3)"
    if "." not in name:
        return "has no dot (RFC 7085)"
    return ""


def _from_records(domain: str, answer: MxAnswer, hostname: str) -> MailHosts | NoRoute:
    named = [record for record in answer.records if record.exchange not in ("", ".")]
    if not named:
        return NoRoute(
            Bounced("5.1.10", NULL_MX, "", f"{domain} takes no mail (null MX, RFC 7505)")
        )
    hosts, rejected = _usable(named)
    return _without_ourselves(domain, hosts, rejected, hostname, answer.expires)


def _usable(records: Iterable[MxRecord]) -> tuple[list[MailHost], tuple[str, ...]]:
    """The hosts of the records, sorted, each once at its best preference; lines about others."""
    hosts: dict[str, MailHost] = {}
    rejected: dict[str, None] = {}
    for record in sorted(records, key=lambda record: record.preference):
        name = host_name(record.exchange)
        if (reason := unusable(name or record.exchange)) or name is None:
            rejected[f"{record.exchange} {reason}"] = None
        else:
            hosts.setdefault(name, MailHost(record.preference, name))
    return list(hosts.values()), tuple(rejected)


def _without_ourselves(
    domain: str, hosts: Sequence[MailHost], rejected: tuple[str, ...], hostname: str, expires: float
) -> MailHosts | NoRoute:
    """Drop the relay itself, and all hosts of its preference or a worse one (RFC 5321 §5.1)."""
    ours = min((host.preference for host in hosts if host.name == hostname), default=None)
    others = tuple(host for host in hosts if ours is None or host.preference < ours)
    if others:
        return MailHosts(others, rejected, expires)
    if ours is not None:
        return NoRoute(loops_to_us(domain))
    return NoRoute(no_mail_host(domain, rejected))


def loops_to_us(domain: str) -> Bounced:
    """The outcome where the relay itself is the best host of the domain."""
    return Bounced("5.4.6", Code.NO_USABLE_MX, "", f"mail for {domain} loops back to ourselves")


def no_mail_host(domain: str, reasons: tuple[str, ...]) -> Bounced:
    """The outcome where the MX records have no usable host (RFC 5321 §5.1)."""
    why = f": {reasons[0]}" if reasons else ""
    return Bounced(
        "5.4.4", Code.NO_USABLE_MX, "", f"no usable mail host for {domain}{why}", hosts=reasons
    )
