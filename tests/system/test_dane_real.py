"""DANE on real parts: zones that Knot DNS signs, unbound that validates, Postfix beside the relay.

Each case is a domain with mail hosts and TLSA records of its own; some have an MTA-STS policy. A
Postfix with `smtp_tls_security_level = dane` sends mail to the same domains. Each program gives one
of four verdicts, which the test reads from its log and compares with what the host received. The
expected verdicts follow RFC 7672; `DIFFERENCES` lists where Postfix differs, and docs/decisions.md
gives the reason.
"""

from __future__ import annotations

import asyncio
import re
import smtplib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pytest

from relay.sandbox.policy_host import PolicyHost, policy
from relay.sandbox.script import TLS_1_0_ONLY, Script, StartTls
from tests.fakes.waiting import patient
from tests.rigs.dane import Authorities, DaneHost, Shown
from tests.rigs.dnssec import Trust, ValidatingDns, Zone, validating_dns
from tests.rigs.ports import free_port, wait_until
from tests.rigs.postfix import Postfix, postfix
from tests.rigs.relay import relay_process
from tests.rigs.sandbox import Event, shared_authority

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "postfix", "knotd", "keymgr", "unbound", "unshare"),
    pytest.mark.timeout(300),
]


class Verdict(StrEnum):
    """What becomes of a message."""

    VERIFIED = "delivered in TLS, verified"
    ENCRYPTED = "delivered in TLS, unverified"
    CLEAR = "delivered in clear"
    DEFERRED = "deferred"


V, E, C, D = Verdict

SIGNED, UNSIGNED, BOGUS = "signed.example", "unsigned.example", "bogus.example"
ZONES = {SIGNED: Trust.SECURE, UNSIGNED: Trust.INSECURE, BOGUS: Trust.BOGUS}


class Owner(StrEnum):
    """Where TLSA records are."""

    ITSELF = "at the name that is asked for"
    WILDCARD = "at a wildcard for all ports"
    ALIAS = "at a name in the signed zone that it is an alias of"
    ALIAS_OUT = "at a name in the zone that is not signed"


@dataclass(frozen=True)
class Host:
    """A mail host. `records`: its TLSA records (`Identity.record`), `tlsa`: how they are signed.

    `alias`: the MX record has this name in the signed zone, an alias of the host; `alias_records`:
    that name's TLSA records. `owner`: how the name of the TLSA records leads to them.
    """

    records: tuple[str, ...] = ()
    shown: Shown = Shown.PRIVATE
    script: Script = Script()  # noqa: RUF009  # frozen
    zone: str = SIGNED
    tlsa: Trust = Trust.SECURE
    alias: str = ""
    alias_records: tuple[str, ...] = ()
    owner: Owner = Owner.ITSELF


@dataclass(frozen=True)
class Case:
    """A recipient domain, and what has to become of mail to it.

    `is_host`: it has no MX record, and is the mail host itself. `is_alias`: it is an alias.
    `sts`: the mode of its MTA-STS policy, `names`: whether that names its hosts.
    """

    name: str
    verdict: Verdict
    hosts: tuple[Host, ...]
    zone: str = SIGNED
    is_host: bool = False
    is_alias: bool = False
    sts: str = ""
    names: bool = True

    @property
    def domain(self) -> str:
        return f"{self.name}.{self.zone}"

    @property
    def last(self) -> Host:
        """The host that takes the mail, if any does."""
        return self.hosts[-1]

    @property
    def base(self) -> str:
        """The name with the TLSA records that count, which is sent as SNI; else the MX's name."""
        is_final = self.last.records and self.last.zone == SIGNED
        number = len(self.hosts) - 1
        return self.host_name(number) if is_final else self.exchange(number)

    @property
    def verified_by(self) -> str | None:
        if self.verdict is not V:
            return None
        if self.last.shown is Shown.TRUSTED:
            return "pkix"
        records = self.last.records + self.last.alias_records
        return "dane-ee" if any(re.fullmatch("3 .* leaf", one) for one in records) else "dane-ta"

    @property
    def recipient(self) -> str:
        return f"bob@{self.domain}"

    def host_name(self, number: int) -> str:
        if self.is_host:
            return self.domain
        return f"mx{number}.{self.name}.{self.hosts[number].zone}"

    def exchange(self, number: int) -> str:
        """The name in the MX record."""
        alias = self.hosts[number].alias
        return f"{alias}.{self.name}.{SIGNED}" if alias else self.host_name(number)


def _one(name: str, verdict: Verdict, *records: str, **host: object) -> Case:
    """A domain with one host, all of it signed."""
    return Case(name, verdict, (replace(Host(records), **host),))  # type: ignore[arg-type]


def _sts(name: str, verdict: Verdict, *records: str, **host: object) -> Case:
    """A domain that is not signed, with one host and a policy that names it."""
    case = _one(name, verdict, *records, **host)
    return replace(case, zone=UNSIGNED, sts="enforce")


NO_STARTTLS = Script(starttls=StartTls.ABSENT)

CASES = [
    # DANE-EE(3): the certificate, or its key, is the one in the record (RFC 7672 §3.1.1)
    _one("ee-key", V, "3 1 1 leaf"),
    _one("ee-cert", V, "3 0 1 leaf"),
    _one("ee-key-sha512", V, "3 1 2 leaf"),
    _one("ee-key-whole", V, "3 1 0 leaf"),
    _one("ee-cert-whole", V, "3 0 0 leaf"),
    _one("ee-expired", V, "3 1 1 leaf", shown=Shown.EXPIRED),
    _one("ee-wrong-name", V, "3 1 1 leaf", shown=Shown.WRONG_NAME),
    _one("ee-other", D, "3 1 1 other"),
    _one("ee-other-cert", D, "3 0 1 other"),
    _one("ee-other-and-trusted", D, "3 1 1 other", shown=Shown.TRUSTED),
    _one("ee-one-of-two", V, "3 1 1 other", "3 1 1 leaf"),
    # DANE-TA(2): a chain from it to what is in the record, and the name (§3.1.2, §3.2.2)
    _one("ta-cert", V, "2 0 1 root"),
    _one("ta-key", V, "2 1 1 root"),
    _one("ta-key-sha512", V, "2 1 2 root"),
    _one("ta-key-whole", V, "2 1 0 root"),
    _one("ta-cert-whole", V, "2 0 0 root"),
    _one("ta-cert-whole-not-sent", V, "2 0 0 root", shown=Shown.LEAF_ONLY),
    _one("ta-cert-not-sent", D, "2 0 1 root", shown=Shown.LEAF_ONLY),
    _one("ta-root-of-intermediate", V, "2 1 1 root", shown=Shown.INTERMEDIATE),
    _one("ta-intermediate", V, "2 0 1 issuer", shown=Shown.INTERMEDIATE),
    _one("ta-wildcard", V, "2 1 1 root", shown=Shown.WILDCARD),
    _one("ta-wrong-name", D, "2 1 1 root", shown=Shown.WRONG_NAME),
    _one("ta-expired", D, "2 1 1 root", shown=Shown.EXPIRED),
    _one("ta-for-domain", V, "2 1 1 root", shown=Shown.FOR_DOMAIN),
    _one("ta-other", D, "2 1 1 other"),
    _one("ta-is-leaf", D, "2 0 1 leaf"),
    _one("ta-other-ee-good", V, "2 1 1 other", "3 1 1 leaf"),
    # Digests: only the strongest of a usage and selector counts (RFC 7671 §9)
    _one("strongest-good", V, "3 1 2 leaf", "3 1 1 other"),
    _one("strongest-other", D, "3 1 2 other", "3 1 1 leaf"),
    _one("strongest-of-each", V, "3 1 2 other", "3 0 1 leaf"),
    # No record can be used: TLS, whatever the certificate (RFC 7672 §2.2, §3.1.3)
    _one("pkix-ee", E, "1 1 1 leaf"),
    _one("pkix-ta", E, "0 0 1 root"),
    _one("pkix-other", E, "1 1 1 other"),
    _one("short-digest", E, "3 1 1 short"),
    _one("unknown-usage", E, "4 1 1 leaf"),
    _one("unknown-selector", E, "3 2 1 leaf"),
    _one("unknown-matching", E, "3 1 3 leaf"),
    _one("unusable-trusted", V, "1 1 1 leaf", shown=Shown.TRUSTED),
    _one("unusable-no-starttls", D, "1 1 1 leaf", script=NO_STARTTLS),
    _one("short-digest-beside-good", V, "3 1 1 short", "3 1 1 leaf"),
    _one("pkix-beside-other", D, "1 1 1 leaf", "3 1 1 other"),
    # The host's TLS
    _one("no-starttls", D, "3 1 1 leaf", script=NO_STARTTLS),
    _one("starttls-454", D, "3 1 1 leaf", script=Script(starttls=StartTls.REFUSED_454)),
    _one("handshake", D, "3 1 1 leaf", script=Script(starttls=StartTls.CLOSE_IN_HANDSHAKE)),
    _one("tls-1-0-only", D, "3 1 1 leaf", script=TLS_1_0_ONLY),
    # None, or not to be had (§2.1.1, §2.1.2, §2.2.2)
    _one("none", E),
    _one("none-trusted", V, shown=Shown.TRUSTED),
    _one("none-no-starttls", C, script=NO_STARTTLS),
    _one("tlsa-not-signed", E, "3 1 1 other", tlsa=Trust.INSECURE),
    _one("tlsa-bogus", D, "3 1 1 leaf", tlsa=Trust.BOGUS),
    _one("tlsa-refused", D, "3 1 1 leaf", tlsa=Trust.REFUSED),
    _one("host-not-signed", E, "3 1 1 other", zone=UNSIGNED),
    _one("host-not-signed-tlsa-refused", E, zone=UNSIGNED, tlsa=Trust.REFUSED),
    _one("host-bogus", D, "3 1 1 leaf", zone=BOGUS),
    # The domain is not signed and its host is (§2.2.1)
    Case("mx-insecure", V, (Host(("3 1 1 leaf",)),), UNSIGNED),
    Case("mx-insecure-ta", V, (Host(("2 1 1 root",)),), UNSIGNED),
    Case("mx-insecure-other", D, (Host(("3 1 1 other",)),), UNSIGNED),
    Case("mx-insecure-ta-for-domain", D, (Host(("2 1 1 root",), Shown.FOR_DOMAIN),), UNSIGNED),
    Case("mx-insecure-ta-wrong-name", D, (Host(("2 1 1 root",), Shown.WRONG_NAME),), UNSIGNED),
    Case("mx-insecure-no-starttls", D, (Host(("3 1 1 leaf",), script=NO_STARTTLS),), UNSIGNED),
    Case("mx-bogus", D, (Host(("3 1 1 leaf",)),), BOGUS),
    # Records somewhere else, and more of them than fit into a datagram
    _one("tlsa-wildcard", V, "3 1 1 leaf", owner=Owner.WILDCARD),
    _one("tlsa-wildcard-other", D, "3 1 1 other", owner=Owner.WILDCARD),
    _one("tlsa-alias", V, "3 1 1 leaf", owner=Owner.ALIAS),
    _one("tlsa-alias-other", D, "3 1 1 other", owner=Owner.ALIAS),
    _one("tlsa-alias-leads-out", E, "3 1 1 other", owner=Owner.ALIAS_OUT),
    _one("tlsa-many", V, *(f"3 1 1 other{n}" for n in range(60)), "3 1 1 leaf"),
    _one("tlsa-many-other", D, *(f"3 1 1 other{n}" for n in range(60))),
    # Aliases (§2.2.2, §2.2.3)
    _one("alias", V, "3 1 1 leaf", alias="alias"),
    _one("alias-has-its-own", V, alias="alias", alias_records=("3 1 1 leaf",)),
    _one("alias-target-first", D, "3 1 1 other", alias="alias", alias_records=("3 1 1 leaf",)),
    _one("alias-leads-out", V, zone=UNSIGNED, alias="alias", alias_records=("3 1 1 leaf",)),
    _one("alias-leads-out-none", E, "3 1 1 other", zone=UNSIGNED, alias="alias"),
    Case("domain-alias", V, (Host(("3 1 1 leaf",)),), is_alias=True),
    Case(
        "domain-alias-ta-for-domain", V, (Host(("2 1 1 root",), Shown.FOR_DOMAIN),), is_alias=True
    ),
    # No MX record: the domain is the host
    Case("no-mx", V, (Host(("3 1 1 leaf",)),), is_host=True),
    Case("no-mx-other", D, (Host(("3 1 1 other",)),), is_host=True),
    # Two hosts: the next one is tried, and judged for itself
    Case("second-good", V, (Host(("3 1 1 other",)), Host(("3 1 1 leaf",)))),
    Case("second-without-dane", E, (Host(("3 1 1 other",)), Host())),
    Case("second-after-bogus", V, (Host(("3 1 1 leaf",), tlsa=Trust.BOGUS), Host(("2 1 1 root",)))),
    # MTA-STS, which Postfix does not know
    _sts("sts", V, shown=Shown.TRUSTED),
    _sts("sts-untrusted", D),
    _sts("sts-no-starttls", D, shown=Shown.TRUSTED, script=NO_STARTTLS),
    replace(_sts("sts-not-named", D, shown=Shown.TRUSTED), names=False),
    replace(_sts("sts-testing", E), sts="testing"),
    replace(_sts("sts-and-dane", V, "3 1 1 leaf"), zone=SIGNED),
    replace(_sts("sts-and-dane-other", D, "3 1 1 other", shown=Shown.TRUSTED), zone=SIGNED),
]  # fmt: skip

DIFFERENCES = {
    # Without TLSA records that count, Postfix never looks whether the name is in the certificate.
    "none-trusted": E,
    "unusable-trusted": E,
    # Held to its records all the same, but Postfix calls it no more than "Trusted".
    "mx-insecure": E,
    "mx-insecure-ta": E,
    # Postfix takes a certificate for the recipient domain, too.
    "mx-insecure-ta-for-domain": E,
    # Postfix does not know MTA-STS.
    "sts": E,
    "sts-untrusted": E,
    "sts-no-starttls": C,
    "sts-not-named": E,
}
"""Where Postfix does another thing. docs/decisions.md says why."""


@dataclass
class World:
    """All domains, their hosts, and the resolver that knows them."""

    dns: ValidatingDns
    hosts: dict[str, list[DaneHost]]
    port: int
    https_port: int
    ca_file: Path

    def seen(self, case: Case, sender: str) -> list[tuple[DaneHost, bool]]:
        """Which hosts took a message of this sender, and whether in TLS."""
        return [
            (host, message.in_tls)
            for host in self.hosts[case.name]
            for message in host.messages
            if message.reverse_path == sender
        ]


async def _open_world(directory: Path, servers: AsyncExitStack) -> World:
    authorities, port = Authorities(), free_port("0.0.0.0")
    ca_file = directory / "ca.pem"
    ca_file.write_bytes(authorities.trusted_pem + shared_authority().ca_pem)
    directory.chmod(0o755)
    hosts: dict[str, list[DaneHost]] = {}
    for at, case in enumerate(CASES):
        hosts[case.name] = []
        for number, host in enumerate(case.hosts):
            name = case.host_name(number)
            server = DaneHost(
                host.script,
                authorities.identity(host.shown, name, case.domain),
                name=name,
                address=f"127.22.{at + 1}.{number + 1}",
                port=port,
            )
            await servers.enter_async_context(server)
            hosts[case.name].append(server)
    records = {zone: [""] for zone in ZONES}
    https_port = await _publish_policies(records, servers)
    stack = servers.enter_context(ExitStack())
    zones = _zones(records, hosts, port)
    dns = await asyncio.to_thread(stack.enter_context, validating_dns(*zones))
    return World(dns, hosts, port, https_port, ca_file)


async def _publish_policies(records: dict[str, list[str]], servers: AsyncExitStack) -> int:
    """The policy hosts, all at one port, which is returned; and the records that tell of them."""
    port = free_port("0.0.0.0")
    for at, case in enumerate(case for case in CASES if case.sts):
        mx = case.exchange(0) if case.names else "mx.else.example"
        web = PolicyHost(
            case.domain,
            policy(mx, mode=case.sts),
            authority=shared_authority(),
            address=f"127.24.0.{at + 1}",
            port=port,
        )
        await servers.enter_async_context(web)
        records[case.zone] += [
            f'_mta-sts.{case.domain}. TXT "v=STSv1; id=1;"',
            f"{web.name}. A {web.address}",
        ]
    return port


def _zones(
    records: dict[str, list[str]], hosts: dict[str, list[DaneHost]], port: int
) -> list[Zone]:
    cut: list[Zone] = []
    for case in CASES:
        real = f"real.{case.domain}" if case.is_alias else case.domain
        if case.is_alias:
            records[case.zone].append(f"{case.domain}. CNAME {real}.")
        for number, (host, server) in enumerate(zip(case.hosts, hosts[case.name], strict=True)):
            if not case.is_host:
                exchange = case.exchange(number)
                records[case.zone].append(f"{real}. MX {10 + number} {exchange}.")
                if host.alias:
                    records[SIGNED].append(f"{exchange}. CNAME {server.name}.")
                    records[SIGNED] += _tlsa(exchange, port, server, host.alias_records)
            records[host.zone].append(f"{server.name}. A {server.address}")
            tlsa = _tlsa(server.name, port, server, host.records)
            if host.owner is not Owner.ITSELF:
                _publish_elsewhere(records, case, server, port)
                continue
            if host.tlsa is Trust.SECURE:
                records[host.zone] += tlsa
            else:
                cut.append(Zone(f"_tcp.{server.name}", "\n".join(tlsa), host.tlsa))
    return [Zone(name, "\n".join(records[name]), trust) for name, trust in ZONES.items()] + cut


def _publish_elsewhere(
    records: dict[str, list[str]], case: Case, server: DaneHost, port: int
) -> None:
    """The TLSA records of a host whose records are not simply at their name."""
    owner, asked = case.last.owner, f"_{port}._tcp.{server.name}"
    zone = UNSIGNED if owner is Owner.ALIAS_OUT else SIGNED
    place = f"*._tcp.{server.name}" if owner is Owner.WILDCARD else f"_dane.{case.name}.{zone}"
    if owner is not Owner.WILDCARD:
        records[SIGNED].append(f"{asked}. CNAME {place}.")
    records[zone] += [f"{place}. {server.identity.rdata(record)}" for record in case.last.records]


def _tlsa(name: str, port: int, server: DaneHost, records: Sequence[str]) -> list[str]:
    return [f"_{port}._tcp.{name}. {server.identity.rdata(record)}" for record in records]


@dataclass(frozen=True)
class Outcome:
    """What came of all cases. `events`: the relay's log. `sni`: as it came to the hosts."""

    by_postfix: dict[str, Verdict]
    by_relay: dict[str, Verdict]
    events: dict[str, Event]
    sni: dict[str, set[str | None]]


# --- Postfix --------------------------------------------------------------------------------------

POSTFIX_SENDER = "postfix@client.example"


def _postfix_settings(world: World) -> dict[str, str]:
    return {
        "myhostname": "postfix.client.example",
        "smtp_tls_security_level": "dane",
        "smtp_dns_support_level": "dnssec",
        "smtp_host_lookup": "dns",
        "smtp_tls_CAfile": str(world.ca_file),
        "smtp_tls_loglevel": "1",
        "smtp_tls_mandatory_protocols": ">=TLSv1.2",
        "smtp_tcp_port": str(world.port),
        "smtp_connect_timeout": "10s",
        "smtp_starttls_timeout": "10s",
    }


def _ask_postfix(world: World) -> dict[str, Verdict]:
    resolv_conf = world.dns.resolv_conf()
    with postfix(
        _postfix_settings(world), port=free_port(), name="dane", resolv_conf=resolv_conf
    ) as running:
        _hand_in(running.address, running.port, POSTFIX_SENDER)
        wait_until(
            lambda: all(_status_lines(running, case) for case in CASES),
            seconds=120,
            what="an attempt of Postfix for each case",
        )
        return {case.name: _verdict_of_postfix(world, running, case) for case in CASES}


def _hand_in(address: str, port: int, sender: str) -> None:
    with smtplib.SMTP(address, port, timeout=patient(60)) as session:
        for case in CASES:
            content = (
                f"From: {sender}\r\nTo: {case.recipient}\r\nSubject: {case.name}\r\n\r\nHi.\r\n"
            )
            session.sendmail(sender, [case.recipient], content)


def _status_lines(running: Postfix, case: Case) -> list[str]:
    return running.log_lines("/smtp[", f"to=<{case.recipient}>", "status=")


def _verdict_of_postfix(world: World, running: Postfix, case: Case) -> Verdict:
    (line,) = _status_lines(running, case)
    took = world.seen(case, POSTFIX_SENDER)
    if "status=sent" not in line:
        assert "status=deferred" in line
        assert not took
        return D
    ((host, in_tls),) = took
    words = [
        found[1]
        for said in running.log_lines("TLS connection established to", f"[{host.address}]")
        if (found := re.search(r": (\w+) TLS connection established", said))
    ]
    assert bool(words) is in_tls
    if not words:
        return C
    return V if words == ["Verified"] else E


# --- the relay ------------------------------------------------------------------------------------

RELAY_SENDER = "relay@client.example"


def _ask_relay(world: World, directory: Path) -> dict[str, Event]:
    with relay_process(
        directory,
        dns=world.dns.address,
        delivery_port=world.port,
        ca_file=world.ca_file,
        limits={"connections_per_client": 1000},
        program=("tests.rigs.policy_relay", str(world.https_port)),
        resolver={"trust_ad": "auto"},
        # As Postfix does where no certificate is asked for.
        delivery={"on_unverified": "encrypted"},
    ) as relay:
        _hand_in("127.0.0.1", relay.port, RELAY_SENDER)

        def attempts() -> dict[str, Event]:
            return {
                event["recipient"]: event
                for event in relay.events()
                if event["event"] != "accepted"
            }

        wait_until(
            lambda: len(attempts()) >= len(CASES), seconds=120, what="an attempt for each case"
        )
        found = attempts()
        return {case.name: found[case.recipient] for case in CASES}


def _verdict_of_relay(world: World, case: Case, event: Event) -> Verdict:
    took = world.seen(case, RELAY_SENDER)
    status = event["delivery-status"]
    if event["event"] != "delivered":
        assert event["severity"] == "temporary"
        assert not took
        return D
    ((host, in_tls),) = took
    assert (status["mx-ip"], status["tls"]) == (host.address, in_tls)
    if not in_tls:
        return C
    return V if status["certificate-verified"] else E


@pytest.fixture(scope="module")
def came_of_it() -> Iterator[Outcome]:
    """What each client did with each case."""
    with tempfile.TemporaryDirectory(prefix="dane-") as directory:
        yield asyncio.run(_play(Path(directory)))


async def _play(directory: Path) -> Outcome:
    async with AsyncExitStack() as servers:
        world = await _open_world(directory, servers)
        by_postfix = await asyncio.to_thread(_ask_postfix, world)
        events = await asyncio.to_thread(_ask_relay, world, directory)
        by_relay = {case.name: _verdict_of_relay(world, case, events[case.name]) for case in CASES}
        sni = {
            case.name: {
                message.sni
                for host in world.hosts[case.name]
                for message in host.messages
                if message.reverse_path == RELAY_SENDER
            }
            for case in CASES
        }
        return Outcome(by_postfix, by_relay, events, sni)


def each_case(*verdicts: Verdict) -> pytest.MarkDecorator:
    """The cases that have to come to one of these."""
    cases = [case for case in CASES if not verdicts or case.verdict in verdicts]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@each_case()
def test_postfix_judges_a_host_as_the_rules_say_or_differs_as_documented(
    case: Case, came_of_it: Outcome
) -> None:
    assert came_of_it.by_postfix[case.name] is DIFFERENCES.get(case.name, case.verdict)


@each_case()
def test_the_relay_judges_a_host_as_the_rules_say(case: Case, came_of_it: Outcome) -> None:
    assert came_of_it.by_relay[case.name] is case.verdict


@each_case()
def test_the_log_says_by_what_the_host_was_verified(case: Case, came_of_it: Outcome) -> None:
    status = came_of_it.events[case.name]["delivery-status"]
    assert status.get("verified-by") == case.verified_by
    assert bool(status.get("certificate-verified")) is (case.verdict is V)


@each_case(V, E, C)
def test_the_log_says_whether_the_name_of_the_host_was_signed(
    case: Case, came_of_it: Outcome
) -> None:
    status = came_of_it.events[case.name]["delivery-status"]
    assert status["mx-secure"] is (case.zone == SIGNED)


@each_case(E)
def test_the_log_says_of_tls_unverified_whether_records_were_of_no_use(
    case: Case, came_of_it: Outcome
) -> None:
    status = came_of_it.events[case.name]["delivery-status"]
    host = case.last
    signed = host.tlsa is Trust.SECURE and host.zone == SIGNED
    counts = host.records and signed and host.owner is not Owner.ALIAS_OUT
    said = (status["policy-type"], status["policy-mode"], status["policy-result"])
    if case.sts:
        assert said == ("sts", case.sts, "certificate-not-trusted")
    elif counts:
        assert said == ("tlsa", "enforce", "tlsa-invalid")
    else:
        assert said == ("no-policy-found", None, None)


@each_case(V, E)
def test_the_name_with_the_records_is_sent_as_sni(case: Case, came_of_it: Outcome) -> None:
    assert came_of_it.sni[case.name] == {case.base}
