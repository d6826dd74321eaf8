"""A Postfix with `smtp_tls_policy_maps`, and a relay with the rules imported from that table.

For each line of the table tests/fixtures/smtp_tls_policy, a Postfix with that table and a relay
with the rules of `relay policy import postfix` send to the same host in the same situation. Each
gives a verdict. Where the import said "the same", the verdicts are equal; where it said "stricter",
the relay is never less safe. `DIFFERENCES` lists every pair that is not equal, with the words of
docs/decisions.md that say why.

RELAY_LONG=1 plays more situations (`make torture`).
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import smtplib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from relay.policy.postfix_import import ImportedLine, imported
from relay.policy.postfix_remarks import Difference, OurTls, PostfixNextHop
from relay.policy.postfix_table import PostfixLevel, read_table
from relay.sandbox.certificates import Authority, Kind
from tests.fakes.waiting import patient
from tests.rigs.dane import associated
from tests.rigs.dnssec import ValidatingDns, Zone, validating_dns
from tests.rigs.ports import free_port, wait_until
from tests.rigs.postfix import Postfix, postfix
from tests.rigs.relay import Relay, relay_process
from tests.rigs.tls_hosts import Issuers, Seat, Situation, TlsHost

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torture,
    pytest.mark.needs("root", "postfix", "knotd", "keymgr", "unbound", "unshare"),
    pytest.mark.timeout(300),
]

LONG = os.environ.get("RELAY_LONG") == "1"
TABLE = Path(__file__).parents[1] / "fixtures" / "smtp_tls_policy"
DECISIONS = Path(__file__).parents[2] / "docs" / "decisions.md"

ROUTES = {
    "gateway.example": PostfixNextHop("gateway.intern.example", 2525),
    "archive.example": PostfixNextHop("archive.intern.example"),
    "provider.example": PostfixNextHop("smtp.provider.example", 587),
}
"""`routes` here, transport_maps there."""

_USUAL = 25
"""The port where the table names none. Hosts have another here: a mail server may be running."""

HOSTS = {"auditor.example": "mx1.mailfarm.example"}
"""Mail hosts that are not `mx.` and the domain."""


class Verdict(IntEnum):
    """What becomes of a message, by how safe it is."""

    CLEAR = 1
    ENCRYPTED = 2
    VERIFIED = 3
    DEFERRED = 4


C, E, V, D = Verdict


class Records(IntEnum):
    """The TLSA records of the hosts, by the port that they are for."""

    NONE = 0
    MATCH = 1
    """Of the certificate in `Situation.UNKNOWN_CA`."""
    UNUSABLE = 2


@dataclass(frozen=True)
class Round:
    """What all hosts are like, for one message to each."""

    situation: Situation
    records: Records = Records.NONE

    def __str__(self) -> str:
        told = {Records.MATCH: ", TLSA", Records.UNUSABLE: ", TLSA unusable"}
        return f"{self.situation}{told.get(self.records, '')}"

    @property
    def sender(self) -> str:
        return f"{self.situation.name}-{self.records.name}@client.example".lower()


S = Situation
_CERTIFICATES = (
    S.GOOD,
    S.SELF_SIGNED,
    S.UNKNOWN_CA,
    S.WRONG_NAME,
    S.BESIDE,
    S.FOR_DOMAIN,
    S.EXPIRED,
    *((S.NOT_YET_VALID, S.COMMON_NAME_ONLY, S.WILDCARD) if LONG else ()),
)
_HANDSHAKES = (
    S.NO_STARTTLS,
    S.REFUSED,
    S.TLS_1_0_ONLY,
    S.TLS_1_2_ONLY,
    *((S.CLOSES_IN_HANDSHAKE, S.REFUSED_FOR_GOOD) if LONG else ()),
)
ROUNDS = [
    *map(Round, (*_CERTIFICATES, *_HANDSHAKES)),
    *(Round(each, Records.MATCH) for each in (S.UNKNOWN_CA, S.GOOD, S.NO_STARTTLS)),
    *(Round(each, Records.UNUSABLE) for each in (S.GOOD, S.UNKNOWN_CA, S.NO_STARTTLS)),
]
if LONG:
    ROUNDS += [
        Round(each, Records.MATCH) for each in (S.REFUSED, S.TLS_1_0_ONLY, S.CLOSES_IN_HANDSHAKE)
    ]


@dataclass(frozen=True)
class Known:
    """A difference, and the first words of the paragraph of docs/decisions.md that says why.

    `keys`: of the lines, apart by a space.
    """

    reason: str
    keys: str
    rounds: tuple[Round, ...]
    there: Verdict
    here: Verdict

    @property
    def pairs(self) -> dict[tuple[str, str], tuple[Verdict, Verdict]]:
        return {
            (key, str(each)): (self.there, self.here)
            for key in self.keys.split()
            for each in self.rounds
            if each in ROUNDS
        }


def known(
    reason: str, keys: str, there: Verdict, here: Verdict, *situations: Situation | Round
) -> Known:
    rounds = tuple(each if isinstance(each, Round) else Round(each) for each in situations)
    return Known(reason, keys, rounds, there, here)


OWN_NAME = "A certificate is for the mail host's own name"
NO_TLS = "`none` becomes TLS that nobody looks at"
TOO_OLD = "TLS 1.0 does not count where TLS is required"
OLD = "TLS 1.0 is better than clear text"
NO_NAME = "A subject's common name is never looked at"
NEAREST = "A line without equivalent gets the strictest rule there is"

DIFFERENCES = [
    known(OWN_NAME, "bank.example auditor.example lawyer.example", V, D, S.BESIDE),
    known(OWN_NAME, "bank.example insurer.example registry.example", V, D, S.FOR_DOMAIN),
    known(NO_TLS, "fax.example .fax.example", C, E, *_CERTIFICATES, S.TLS_1_0_ONLY, S.TLS_1_2_ONLY),
    known(
        TOO_OLD,
        "supplier.example .supplier.example hotel.example printer.example travel.example"
        " letters.example Rail.Example [gateway.intern.example]:2525",
        E,
        D,
        S.TLS_1_0_ONLY,
    ),
    known(
        NO_NAME,
        "bank.example auditor.example clinic.example lawyer.example court.example ministry.example"
        " registry.example tax.example [archive.intern.example] [smtp.provider.example]:587",
        V,
        D,
        S.COMMON_NAME_ONLY,
    ),
    known(OLD, "hosting.example library.example", C, E, S.TLS_1_0_ONLY),
    known(NEAREST, "payroll.example pension.example", D, V, S.GOOD, S.TLS_1_2_ONLY, S.WILDCARD),
    known(NEAREST, "payroll.example", V, D, S.UNKNOWN_CA),
    known(NEAREST, "pension.example", V, D, S.SELF_SIGNED),
    known(NEAREST, "freight.example typo.example", D, V, S.GOOD, S.TLS_1_2_ONLY, S.WILDCARD),
    known(
        NEAREST,
        "registrar.example",
        D,
        V,
        *(S.GOOD, S.TLS_1_2_ONLY, S.WILDCARD, Round(S.GOOD, Records.UNUSABLE)),
    ),
    known(NEAREST, "airline.example", D, E, S.TLS_1_2_ONLY),
]


def recipient_of(each: ImportedLine) -> str:
    """Somebody whose mail the line is for."""
    domain = each.domains[0]
    return f"bob@{domain.replace('*', 'sub')}"


def lines_of(text: str) -> list[ImportedLine]:
    """Those with a rule, as our configuration has it."""
    every = imported(text, OurTls(routes=tuple(ROUTES.items())))
    return [each for each in every if each.rule is not None]


LINES = lines_of(TABLE.read_text("utf-8"))


@dataclass
class World:
    """All hosts, and the resolver that knows them. `text`: the table with what exists here."""

    dns: ValidatingDns
    hosts: dict[str, dict[Records, TlsHost]]
    ports: dict[Records, int]
    ca_file: Path
    table: Path


def has_dane(each: ImportedLine) -> bool:
    return each.rule is not None and each.rule.dane is not None


def seat_of(each: ImportedLine, at: int, port: int) -> Seat:
    domain = recipient_of(each).partition("@")[2]
    hop = ROUTES.get(domain)
    name = hop.host if hop else HOSTS.get(domain, f"mx.{domain}")
    own_port = hop is not None and hop.port != _USUAL
    return Seat(name, domain, f"127.30.{at + 1}.1", hop.port if hop and own_port else port)


async def _open_world(directory: Path, servers: AsyncExitStack) -> World:
    issuers = Issuers(Authority(), Authority("Unknown CA"))
    ca_file = directory / "ca.pem"
    ca_file.write_bytes(issuers.trusted.ca_pem)
    ports = {kind: free_port("0.0.0.0") for kind in Records}
    hosts: dict[str, dict[Records, TlsHost]] = {}
    records: list[str] = []
    for at, each in enumerate(LINES):
        recipient = recipient_of(each)
        hosts[recipient] = {}
        for kind, port in ports.items():
            if kind is not Records.NONE and not has_dane(each):
                continue
            host = TlsHost(seat_of(each, at, port), issuers)
            await servers.enter_async_context(host)
            hosts[recipient][kind] = host
            records += _tlsa(host, kind, issuers)
        records += [f"{host.name}. A {host.address}", f"{recipient[4:]}. MX 10 {host.name}."]
    table = directory / "tls_policy"
    table.write_text(_with_what_exists(TABLE.read_text("utf-8"), directory, issuers))
    directory.chmod(0o755)
    zone = Zone("example", "\n".join(records))
    stack = servers.enter_context(ExitStack())
    dns = await asyncio.to_thread(stack.enter_context, validating_dns(zone))
    return World(dns, hosts, ports, ca_file, table)


def _tlsa(host: TlsHost, kind: Records, issuers: Issuers) -> list[str]:
    if kind is Records.NONE:
        return []
    shown = x509.load_pem_x509_certificate(issuers.unknown.leaf(host.name).chain_pem)
    digest = associated(shown.public_bytes(Encoding.DER), 1, 1).hex()
    usage = {Records.MATCH: 3, Records.UNUSABLE: 1}[kind]
    return [f"_{host.port}._tcp.{host.name}. TLSA {usage} 1 1 {digest}"]


def _with_what_exists(text: str, directory: Path, issuers: Issuers) -> str:
    """The table with a fingerprint and a file of authorities that a host here meets."""
    shown = issuers.trusted.leaf("mx.pension.example", Kind.SELF_SIGNED)
    digest = x509.load_pem_x509_certificate(shown.chain_pem).fingerprint(hashes.SHA256())
    text = re.sub(r"match=1f:[0-9a-f:]+", f"match={digest.hex(':')}", text)
    authorities = directory / "payroll.pem"
    authorities.write_bytes(issuers.unknown.ca_pem)
    return text.replace("/etc/postfix/ca/payroll.pem", str(authorities))


def _hand_in(port: int, sender: str, lines: Sequence[ImportedLine]) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=patient(60)) as session:
        for recipient in map(recipient_of, lines):
            content = f"From: {sender}\r\nTo: {recipient}\r\nSubject: x\r\n\r\nHi.\r\n"
            session.sendmail(sender, [recipient], content)


def _lines_in(each: Round) -> list[ImportedLine]:
    return [line for line in LINES if each.records is Records.NONE or has_dane(line)]


# --- Postfix --------------------------------------------------------------------------------------


def _postfix_settings(world: World) -> dict[str, str]:
    transport = world.table.with_name("transport")
    transport.write_text("".join(f"{d} smtp:{_as_key(hop)}\n" for d, hop in ROUTES.items()))
    senders = world.table.with_name("senders")
    senders.write_text(
        "".join(f"postfix-{each.sender} {_service(each.records)}:\n" for each in ROUNDS)
    )
    return {
        "myhostname": "postfix.client.example",
        "smtp_tls_security_level": "may",
        "smtp_tls_policy_maps": f"hash:{world.table}",
        "smtp_tls_fingerprint_digest": "sha256",
        "smtp_tcp_port": str(world.ports[Records.NONE]),
        "transport_maps": f"texthash:{transport}",
        "sender_dependent_default_transport_maps": f"texthash:{senders}",
        "smtp_dns_support_level": "dnssec",
        "smtp_host_lookup": "dns",
        "smtp_tls_CAfile": str(world.ca_file),
        "smtp_tls_loglevel": "1",
        "smtp_connection_cache_on_demand": "no",
        # A host that fails is asked again, in clear where that may be, after a second. The waits
        # grow, since else the first of the deferred messages would keep all others waiting.
        "minimal_backoff_time": "1s",
        "maximal_backoff_time": "1h",
        "queue_run_delay": "1s",
        "default_destination_concurrency_failed_cohort_limit": "0",
    }


def _service(kind: Records) -> str:
    return f"smtp{kind.value}"


def _as_key(hop: PostfixNextHop) -> str:
    """As the table has it."""
    return f"[{hop.host}]" if hop.port == _USUAL else str(hop)


@dataclass
class OldPostfix:
    """The Postfix that the table is from."""

    world: World
    running: Postfix
    offset: int = 0

    def prepare(self) -> None:
        """Compile the table, and give each port a delivery service, chosen by the sender."""
        self.command("postmap", f"hash:{self.world.table}")
        for kind, port in self.world.ports.items():
            service = f"{_service(kind)}/unix={_service(kind)} unix - - n - - smtp"
            self.command("postconf", "-M", "-e", f"{service} -o smtp_tcp_port={port}")
        self.command("postfix", "reload")

    def play(self, each: Round) -> dict[str, Verdict]:
        """What becomes of a message for each line."""
        self.offset = self.running.log.stat().st_size if self.running.log.exists() else 0
        lines = _lines_in(each)
        _hand_in(self.running.port, f"postfix-{each.sender}", lines)
        enough = 3 if each.situation.breaks_handshake else 1
        wait_until(
            lambda: all(self._is_decided(recipient_of(line), enough) for line in lines),
            seconds=120,
            what=f"{each}: an attempt of Postfix for each line",
        )
        found = {line.line.key: self._verdict(each, recipient_of(line)) for line in lines}
        self.command("postsuper", "-d", "ALL")
        return found

    def command(self, program: str, *arguments: str) -> None:
        run = [f"/usr/sbin/{program}", "-c", f"{self.running.directory}/etc", *arguments]
        subprocess.run(run, check=True, capture_output=True, timeout=60)

    def _log(self, *words: str) -> list[str]:
        text = self.running.log.read_bytes()[self.offset :].decode(errors="replace")
        return [line for line in text.splitlines() if all(word in line for word in words)]

    def _is_decided(self, recipient: str, enough: int) -> bool:
        told = self._log("/smtp", f"to=<{recipient}>", "status=")
        return any("status=sent" in line for line in told) or len(told) >= enough

    def _verdict(self, each: Round, recipient: str) -> Verdict:
        host = self.world.hosts[recipient][each.records]
        took = host.took(f"postfix-{each.sender}")
        is_sent = bool(self._log("/smtp", f"to=<{recipient}>", "status=sent"))
        assert len(took) == is_sent
        if not took:
            return D
        if not took[0]:
            return C
        said = self._log(" TLS connection established to", f"[{host.address}]")
        return V if "Verified TLS" in said[-1] else E


# --- the relay ------------------------------------------------------------------------------------


def _forget_dead_hosts(relay: Relay) -> None:
    """A host of a next hop that failed in one round is tried in the next."""
    reloads = relay.stderr.count("reloaded")
    relay.signal(signal.SIGHUP)
    wait_until(
        lambda: relay.stderr.count("reloaded") > reloads, seconds=30, what="the relay's reload"
    )


@dataclass
class NewRelay:
    """The relays that have the rules made from the table, one for each port of the hosts."""

    world: World
    directory: Path
    stack: ExitStack
    policy: Mapping[str, Any]
    relays: dict[Records, Relay] = field(default_factory=dict)

    def play(self, each: Round) -> dict[str, Verdict]:
        relay = self._relay(each.records)
        _forget_dead_hosts(relay)
        lines = _lines_in(each)
        sender = f"relay-{each.sender}"
        _hand_in(relay.port, sender, lines)

        def attempts() -> dict[str, dict[str, Any]]:
            return {
                event["recipient"]: event
                for event in relay.events()
                if event["event"] != "accepted" and event["envelope"]["sender"] == sender
            }

        wait_until(
            lambda: len(attempts()) >= len(lines),
            seconds=120,
            what=f"{each}: an attempt of the relay for each line",
        )
        events = attempts()
        return {
            line.line.key: self._verdict(each, recipient_of(line), sender, events) for line in lines
        }

    def _relay(self, kind: Records) -> Relay:
        if kind not in self.relays:
            directory = self.directory / kind.name
            directory.mkdir()
            self.relays[kind] = self.stack.enter_context(
                relay_process(
                    directory,
                    dns=self.world.dns.address,
                    delivery_port=self.world.ports[kind],
                    ca_file=self.world.ca_file,
                    resolver={"trust_ad": "auto"},
                    policy=self.policy,
                    routes=_routes(self.world.ports[Records.NONE]),
                )
            )
        return self.relays[kind]

    def _verdict(
        self, each: Round, recipient: str, sender: str, events: Mapping[str, dict[str, Any]]
    ) -> Verdict:
        took = self.world.hosts[recipient][each.records].took(sender)
        event = events[recipient]
        if event["event"] != "delivered":
            assert event["severity"] == "temporary"
            assert not took
            return D
        status = event["delivery-status"]
        assert list(took) == [status["tls"]]
        if not status["tls"]:
            return C
        return V if status["certificate-verified"] else E


def _routes(usual: int = _USUAL) -> dict[str, Any]:
    """`routes`, with another port in the place of the usual one."""
    return {
        domain: {"host": hop.host, "port": usual if hop.port == _USUAL else hop.port}
        for domain, hop in ROUTES.items()
    }


def _rules_of(world: World, directory: Path) -> dict[str, Any]:
    """What the command prints for the table, read as the configuration is."""
    (directory / "routes.yaml").write_text(yaml.safe_dump({"routes": _routes()}))
    run = [sys.executable, "-m", "relay", "policy", "import", "postfix", str(world.table)]
    done = subprocess.run(
        [*run, "-c", str(directory / "routes.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # some lines have no equivalent
    document: dict[str, Any] = yaml.safe_load(done.stdout)
    return document


# --- both -----------------------------------------------------------------------------------------

Outcome = dict[tuple[str, str], tuple[Verdict, Verdict]]
"""By the key of a line and a round: what came of it in Postfix, and here."""


async def _play(directory: Path) -> Outcome:
    async with AsyncExitStack() as servers:
        world = await _open_world(directory, servers)
        stack = servers.enter_context(ExitStack())
        rules = await asyncio.to_thread(_rules_of, world, directory)
        running = await asyncio.to_thread(
            stack.enter_context,
            postfix(
                _postfix_settings(world),
                port=free_port(),
                name="policy",
                resolv_conf=world.dns.resolv_conf(),
            ),
        )
        old = OldPostfix(world, running)
        await asyncio.to_thread(old.prepare)
        new = NewRelay(world, directory, stack, rules["policy"])
        came: Outcome = {}
        for each in ROUNDS:
            for hosts in world.hosts.values():
                for host in hosts.values():
                    host.meet(each.situation)
            there, here = await asyncio.gather(
                asyncio.to_thread(old.play, each), asyncio.to_thread(new.play, each)
            )
            came |= {(key, str(each)): (there[key], here[key]) for key in there}
        return came


@pytest.fixture(scope="module")
def came_of_it() -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="policy-") as directory:
        yield asyncio.run(_play(Path(directory)))


def each_line() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("each", LINES, ids=lambda each: each.line.key)


def _differing(each: ImportedLine, outcome: Outcome) -> Outcome:
    return {
        (key, played): (there, here)
        for (key, played), (there, here) in outcome.items()
        if key == each.line.key and there is not here
    }


def test_the_table_is_an_old_one_of_forty_lines() -> None:
    table = read_table(TABLE.read_text("utf-8"))
    assert len(table) == 40
    assert len({line.value.split()[0].lower() for line in table}) == len(PostfixLevel) + 1


@each_line()
def test_a_line_comes_to_the_verdicts_of_postfix_or_to_known_others(
    each: ImportedLine, came_of_it: Outcome
) -> None:
    every = {pair: verdicts for one in DIFFERENCES for pair, verdicts in one.pairs.items()}
    expected = {pair: both for pair, both in every.items() if pair[0] == each.line.key}
    assert _differing(each, came_of_it) == expected


FOR_ALL_LINES = {str(S.TLS_1_0_ONLY), str(S.COMMON_NAME_ONLY)}
"""Where we are stricter whatever the line says; the head of what is printed tells it once."""


@each_line()
def test_a_line_told_to_be_the_same_differs_only_where_all_lines_do(
    each: ImportedLine, came_of_it: Outcome
) -> None:
    if {one.difference for one in each.remarks} <= {Difference.NO_EFFECT}:
        assert {played for _, played in _differing(each, came_of_it)} <= FOR_ALL_LINES


@each_line()
def test_a_line_is_less_safe_here_only_if_it_was_told_to_have_no_equivalent(
    each: ImportedLine, came_of_it: Outcome
) -> None:
    if each.has_equivalent:
        weaker = {
            played: verdicts
            for (_, played), verdicts in _differing(each, came_of_it).items()
            if verdicts[1] < verdicts[0]
        }
        assert weaker == {}


def test_each_difference_has_its_reason_in_the_decisions() -> None:
    decisions = " ".join(DECISIONS.read_text("utf-8").split())
    assert [one.reason for one in DIFFERENCES if f"**{one.reason}" not in decisions] == []
