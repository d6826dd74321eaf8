"""Signed zones of Knot DNS behind an unbound that validates them, up to a root of a test's own.

    Zone("signed.example", "www A 127.0.0.2")               signed, with a DS record above
    Zone("unsigned.example", "…", Trust.INSECURE)           not signed, and the zone above says so
    Zone("_tcp.mx.signed.example", "…", Trust.BOGUS)        signed by a key without a DS record
    Zone("_tcp.mx2.signed.example", "", Trust.REFUSED)      the resolver refuses to say

unbound listens on port 53, since the C library can be told of no other, at an address of 127/8 of
its own.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import dns.exception
import dns.flags
import dns.message
import dns.query

from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, open_directory, wait_until

_KNOT = "127.0.0.1"
_DNS_PORT = 53

_KNOT_CONFIG = """\
server:
    listen: {address}@{port}
    rundir: {dir}
    user: knot:knot
log:
  - target: {dir}/knot.log
    any: info
database:
    storage: {dir}/db
policy:
  - id: test
    manual: on
    algorithm: ecdsap256sha256
template:
  - id: default
    storage: {dir}
zone:
"""

_ZONE_HEAD = """\
$ORIGIN {origin}
$TTL 60
@ SOA ns hostmaster 1 3600 600 86400 60
@ NS ns
ns A {address}
"""

_UNBOUND_CONFIG = """\
server:
    interface: {address}@{port}
    access-control: 127.0.0.0/8 allow
    do-ip6: no
    do-daemonize: no
    do-not-query-localhost: no
    chroot: ""
    username: ""
    pidfile: ""
    directory: "{dir}"
    logfile: "{dir}/unbound.log"
    use-syslog: no
    val-log-level: 2
    num-threads: 1
    module-config: "{modules}"
    trust-anchor-file: "{dir}/root.ds"
remote-control:
    control-enable: no
"""


class Trust(StrEnum):
    """What a validating resolver comes to think of a zone."""

    SECURE = "secure"
    INSECURE = "insecure"
    BOGUS = "bogus"
    REFUSED = "refused"


@dataclass(frozen=True)
class Zone:
    """A zone: its name without the final dot, and records in master file format."""

    name: str
    records: str
    trust: Trust = Trust.SECURE

    @property
    def origin(self) -> str:
        return f"{self.name}." if self.name else "."

    @property
    def is_signed(self) -> bool:
        return self.trust in (Trust.SECURE, Trust.BOGUS)

    def is_below(self, other: Zone) -> bool:
        return self != other and (not other.name or self.name.endswith(f".{other.name}"))


@dataclass
class ValidatingDns:
    """A running resolver. `address`: where it listens, port 53."""

    address: str
    directory: Path
    served: Sequence[Zone]
    knot_port: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def resolv_conf(self) -> Path:
        """A file that sends the C library here and has it trust the AD bit."""
        path = self.directory / "resolv.conf"
        path.write_text(f"nameserver {self.address}\noptions trust-ad edns0 timeout:5\n")
        return path

    def start(self, *, validates: bool = True) -> None:
        """Start, or start again: with an empty cache."""
        self.stop()
        text = _UNBOUND_CONFIG.format(
            address=self.address,
            port=_DNS_PORT,
            dir=self.directory,
            modules="validator iterator" if validates else "iterator",
        )
        for zone in self.served:
            if zone.trust is Trust.REFUSED:
                text += f'server:\n    local-zone: "{zone.origin}" always_refuse\n'
                continue
            stub = f'name: "{zone.origin}"\n    stub-addr: {_KNOT}@{self.knot_port}'
            text += f"stub-zone:\n    {stub}\n"
        (self.directory / "unbound.conf").write_text(text)
        self.process = subprocess.Popen(
            ["/usr/sbin/unbound", "-c", f"{self.directory}/unbound.conf"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: self._answers(authentic=validates), what="a resolver that answers")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=patient(30))
            self.process = None

    def _answers(self, *, authentic: bool) -> bool:
        query = dns.message.make_query(".", "SOA", flags=dns.flags.RD | dns.flags.AD)
        try:
            answer = dns.query.udp(query, self.address, timeout=2)
        except (OSError, dns.exception.DNSException):
            return False
        return bool(answer.answer) and bool(answer.flags & dns.flags.AD) is authentic


@contextlib.contextmanager
def validating_dns(*zones: Zone) -> Iterator[ValidatingDns]:
    """Serves `zones` below a signed root; each is delegated by the zone next above it."""
    port = free_port(_KNOT)
    with open_directory("relay-test-dnssec-") as directory:
        (directory / "db").mkdir()
        for path in (directory, directory / "db"):
            path.chmod(0o777)  # knotd and keymgr write here under a user of their own
        every = [*zones, Zone("", "")]
        _write_zones(directory, port, every)
        server = subprocess.Popen(
            ["/usr/sbin/knotd", "-c", f"{directory}/knot.conf"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        resolver = ValidatingDns(_free_address(), directory, every, port)
        try:
            resolver.start()
            yield resolver
        finally:
            resolver.stop()
            server.terminate()
            server.wait(timeout=patient(30))


def _write_zones(directory: Path, port: int, zones: Sequence[Zone]) -> None:
    text = _KNOT_CONFIG.format(address=_KNOT, port=port, dir=directory)
    for zone in zones:
        if zone.trust is not Trust.REFUSED:
            text += f'  - domain: "{zone.origin}"\n    file: {_file(zone)}\n'
        if zone.is_signed:
            text += "    dnssec-signing: on\n    dnssec-policy: test\n"
    (directory / "knot.conf").write_text(text)
    keys = {zone.name: _make_keys(directory, zone) for zone in zones if zone.is_signed}
    (directory / "root.ds").write_text(keys[""])
    delegations = {zone.name: "" for zone in zones}
    for zone in zones:
        if zone.name:
            above = max(filter(zone.is_below, zones), key=lambda other: len(other.name))
            delegations[above.name] += _delegation(zone, keys.get(zone.name, ""))
    for zone in zones:
        head = _ZONE_HEAD.format(origin=zone.origin, address=_KNOT)
        path = directory / _file(zone)
        path.write_text(f"{head}{zone.records}\n{delegations[zone.name]}")
        path.chmod(0o644)


def _file(zone: Zone) -> str:
    return f"{zone.name or 'root'}.zone"


def _make_keys(directory: Path, zone: Zone) -> str:
    """Keys to sign a zone with, and the DS record for the zone above."""
    keymgr = ["/usr/sbin/keymgr", "-c", f"{directory}/knot.conf", zone.origin]
    for use in (["ksk=yes", "zsk=no"], ["ksk=no", "zsk=yes"]):
        subprocess.run(
            [*keymgr, "generate", "algorithm=ecdsap256sha256", *use],
            check=True,
            capture_output=True,
            timeout=patient(60),
        )
    done = subprocess.run([*keymgr, "ds"], check=True, capture_output=True, text=True, timeout=60)
    (record,) = re.findall(r"^.* DS \d+ 13 2 [0-9a-fA-F]{64}$", done.stdout, re.MULTILINE)
    return f"{record}\n"


def _delegation(zone: Zone, ds: str) -> str:
    if zone.trust is Trust.BOGUS:  # the digest of a key that is not there
        ds = ds[:-2] + ("0" if ds[-2] != "0" else "1") + ds[-1:]
    return f"{zone.origin} NS ns.{zone.origin}\nns.{zone.origin} A {_KNOT}\n{ds}"


def _free_address() -> str:
    """An address of this machine whose port 53 nobody has."""
    for _ in range(50):
        address = f"127.53.{random.randrange(256)}.{random.randrange(1, 255)}"
        with contextlib.suppress(OSError):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                with socket.socket(type=kind) as probe:
                    probe.bind((address, _DNS_PORT))
            return address
    raise OSError("port 53 is taken at every address of this machine")
