"""From mail hosts and their addresses to what an attempt tries, in order.

`plan` judges the addresses once, and its result is kept as long as the DNS allows.
`arrange` chooses the addresses of each attempt from it:

* lower preference first, equal preference shuffled each time (RFC 5321 §5.1);
* at most `limit` addresses, given out in rounds: every host gets a first address before any host
  gets a second, so that a host with fifty addresses does not displace the others;
* if there are more hosts than `limit`, the best half of `limit` and a random choice of the others,
  so that each host is tried in one attempt or another;
* for one host, the address families alternate, and either comes first, so that a family without
  connectivity costs one address and not all of them (RFC 8305 §4).

The result of all look-ups together:

    at least one allowed address                    a plan, with troubles noted
    none, and a look-up had no answer, or           4.4.3: a temporary error outweighs permanent
    was left out because there are so many          ones, and the relay's limit makes no bounce
    none, and the only host is the relay itself     5.4.6
    none                                            5.4.4, with the first reason
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from relay.mail.outcome import Code, Deferred
from relay.route.addresses import Rejection, parse_address
from relay.route.answers import AddressAnswer, AddressLookup, NoSuchName, Unanswered
from relay.route.mx import MailHost, MailHosts, best_and_others, loops_to_us, no_mail_host
from relay.route.next_hop import Host, NoRoute

_MakeHost = Callable[[str, str, int], Host]

_MOST_LINES = 20
"""Lines of trouble and of rejection that are kept for the log and the DSN."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mail host with its allowed addresses, at least one."""

    preference: int
    ipv4: tuple[Host, ...]
    ipv6: tuple[Host, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A domain's candidates in groups of equal preference, the lowest first; `trouble` and
    `rejected` as in `Hosts`."""

    groups: tuple[tuple[Candidate, ...], ...]
    trouble: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def hosts(self) -> int:
        """How many mail hosts it holds."""
        return sum(map(len, self.groups))

    @property
    def weight(self) -> int:
        """How many addresses it holds."""
        return sum(len(c.ipv4) + len(c.ipv6) for group in self.groups for c in group)


def plan(
    domain: str,
    listed: MailHosts,
    lookups: Mapping[str, AddressLookup],
    *,
    make_host: _MakeHost,
    judge: Callable[[str], Rejection | None],
) -> Plan | NoRoute:
    """The plan for `domain`, from its mail hosts and the look-ups that were made.

    `make_host` returns a `Host` for a name, an address and a preference.
    """
    findings = [
        _finding(host, lookups[host.name], make_host, judge)
        for host in listed.hosts
        if host.name in lookups
    ]
    ours = min((finding.preference for finding in findings if finding.ourselves), default=None)
    # RFC 5321 §5.1: all hosts of the relay's own preference or a worse one are discarded.
    better = [finding for finding in findings if ours is None or finding.preference < ours]
    candidates = [finding.candidate for finding in better if finding.candidate is not None]
    trouble = [line for finding in better for line in finding.trouble][:_MOST_LINES]
    if listed.left_out and ours is None:
        trouble.append(f"{listed.left_out} more mail hosts were not looked up this time")
    rejected = [*listed.rejected, *(line for finding in findings for line in finding.rejected)][
        :_MOST_LINES
    ]
    if candidates:
        groups = groupby(candidates, key=lambda candidate: candidate.preference)
        return Plan(tuple(tuple(group) for _, group in groups), tuple(trouble), tuple(rejected))
    if trouble:
        text = f"no address is known for now of the mail hosts of {domain}: {trouble[0]}"
        lines = tuple(trouble + rejected)
        return NoRoute(Deferred("4.4.3", Code.NO_USABLE_MX, "", text, hosts=lines))
    return NoRoute(
        loops_to_us(domain) if ours is not None else no_mail_host(domain, tuple(rejected))
    )


def not_found(names: Iterable[str], found: Collection[str], lines: Iterable[str]) -> dict[str, str]:
    """Why each of the mail hosts `names` that is not in `found` is not, by its name. `lines`: the
    trouble and the rejections of their plan, each of which begins with the name.
    """
    missing: dict[str, list[str]] = {name: [] for name in names if name not in found}
    for line in lines:
        name, _, why = line.partition(" ")
        missing.get(name.removesuffix(":"), []).append(why)
    return {name: ", ".join(why) or "has no address" for name, why in missing.items()}


def arrange(
    plan: Plan, limit: int, random: Random, *, shuffles_equals: bool = True
) -> tuple[Host, ...]:
    """The addresses of one attempt, in order; of every mail host if `Plan.hosts` <= `limit`."""
    if len(plan.groups) == 1 and len(plan.groups[0]) == 1:
        return tuple(_interleaved(plan.groups[0][0], random)[:limit])
    queues: list[list[Host]] = []
    for group in plan.groups:
        shuffled = list(group)
        if shuffles_equals:
            random.shuffle(shuffled)
        queues += (_interleaved(candidate, random) for candidate in shuffled)
    if sum(map(len, queues)) <= limit:
        return tuple(host for queue in queues for host in queue)
    if len(queues) > limit:
        queues = best_and_others(queues, limit, random)
    shares = _shares([len(queue) for queue in queues], limit)
    return tuple(
        host for queue, share in zip(queues, shares, strict=True) for host in queue[:share]
    )


@dataclass(frozen=True, slots=True)
class _Finding:
    """The result of the look-up of one mail host."""

    preference: int
    candidate: Candidate | None = None
    trouble: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    ourselves: bool = False


def _finding(
    host: MailHost,
    answer: AddressLookup,
    make_host: _MakeHost,
    judge: Callable[[str], Rejection | None],
) -> _Finding:
    match answer:
        case Unanswered():
            return _Finding(host.preference, trouble=(f"{host.name}: {answer.reason}",))
        case NoSuchName():
            return _Finding(host.preference, rejected=(f"{host.name} {answer.reason}",))
        case AddressAnswer(addresses=()):
            return _Finding(host.preference, rejected=(f"{host.name} has no address",))
        case AddressAnswer():
            judged = {address: judge(address) for address in answer.addresses}
    bad = {address: rejection for address, rejection in judged.items() if rejection is not None}
    good = [
        make_host(host.name, address, host.preference) for address in judged if address not in bad
    ]
    return _Finding(
        host.preference,
        candidate=_candidate(host.preference, good) if good else None,
        rejected=tuple(
            f"{_of(host, address)} {rejection.reason}" for address, rejection in bad.items()
        ),
        ourselves=any(rejection.ourselves for rejection in bad.values()),
    )


def _of(host: MailHost, address: str) -> str:
    return address if address == host.name else f"{host.name}: {address}"


def _candidate(preference: int, hosts: Sequence[Host]) -> Candidate:
    ipv4 = tuple(host for host in hosts if _is_ipv4(host.address))
    ipv6 = tuple(host for host in hosts if not _is_ipv4(host.address))
    return Candidate(preference, ipv4, ipv6)


def _is_ipv4(address: str) -> bool:
    parsed = parse_address(address)
    return parsed is not None and parsed.version == 4


def _interleaved(candidate: Candidate, random: Random) -> list[Host]:
    """A host's addresses: each family shuffled, the families alternating, either one first."""
    if not candidate.ipv6:
        return _shuffled(candidate.ipv4, random)
    if not candidate.ipv4:
        return _shuffled(candidate.ipv6, random)
    first, second = _shuffled(candidate.ipv4, random), _shuffled(candidate.ipv6, random)
    if random.random() < 0.5:
        first, second = second, first
    turns = min(len(first), len(second))
    mixed = [host for pair in zip(first, second, strict=False) for host in pair]
    return mixed + first[turns:] + second[turns:]


def _shuffled(hosts: tuple[Host, ...], random: Random) -> list[Host]:
    shuffled = list(hosts)
    if len(shuffled) > 1:
        random.shuffle(shuffled)
    return shuffled


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """How many addresses each host gets, given out one by one in rounds up to `limit`."""
    shares = [0] * len(sizes)
    left = min(limit, sum(sizes))
    while left:
        for index, size in enumerate(sizes):
            if left and shares[index] < size:
                shares[index] += 1
                left -= 1
    return shares
