"""`relay demo`: every outcome of the TLS rules, in a sandbox on loopback, in a few seconds.

This process runs a DNS server, mail hosts, and a real relay with a queue of its own, which is
removed at the end. Four hosts differ in their TLS (a good certificate, one for another name, an
expired one, no STARTTLS). Five hosts differ in what their domain publishes or the operator pins. A
client sends the relay one message for each host and each pair of settings. The table shows the
relay's delivery log, compared with the rules (`HOSTS`) and with what the hosts received.

The exit code is 0 where all messages went as the rules say.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiosmtplib
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relay.config import load
from relay.daemon.files import FileBudget
from relay.daemon.running import Relay
from relay.mail.jsontext import JsonDocument, JsonFields
from relay.queue.engine import open_policies
from relay.queue.location import QueueLocation
from relay.queue.policies import StoredPolicy
from relay.route.local_address import is_local_address
from relay.sandbox.certificates import Authority
from relay.sandbox.demo_rules import HOSTS, SETTINGS, WAYS, Cell, Published, Result
from relay.sandbox.dns import DnsServer
from relay.sandbox.mx import MxServer
from relay.workers.systemd import Systemd

PATIENCE_SECONDS = 12.0


_COLOURS = {
    Result.VERIFIED: "bold green",
    Result.UNVERIFIED: "cyan",
    Result.IN_CLEAR: "yellow",
    Result.DEFERRED: "magenta",
    Result.BOUNCED: "bold red",
    Result.LOST: "bold red",
}


def main(*, as_json: bool = False) -> int:
    """Run the demo and show its table. The exit code: 0 where all went as the rules say, else 1."""
    began = time.monotonic()
    with _quiet_logs():
        cells = asyncio.run(run())
    seconds = time.monotonic() - began
    if as_json:
        json.dump([cell.as_json() for cell in cells], sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _show(cells, seconds, Console())
    return 0 if all(cell.is_as_ruled for cell in cells) else 1


async def run() -> list[Cell]:
    """Start the sandbox, send the messages, wait for the log line of each, stop the sandbox."""
    with tempfile.TemporaryDirectory(prefix="relay-demo-") as directory:
        async with AsyncExitStack() as opened:
            return await _run(Path(directory), opened)


async def _run(directory: Path, opened: AsyncExitStack) -> list[Cell]:
    authority = Authority("Relay demo CA")
    ca_file = directory / "ca.pem"
    ca_file.write_bytes(authority.ca_pem)
    dns = await opened.enter_async_context(DnsServer())
    hosts = await _start_hosts(opened, dns, authority)
    config_file, port = _write_config(directory, ca_file, dns, hosts)
    config = load(config_file, {})
    await _publish(dns, hosts, Path(config.queue.path))
    files = FileBudget(clients=50, deliveries=50, queries=50, is_short=False)
    relay = await Relay.start(
        config, path=config_file, environ={}, files=files, systemd=Systemd({})
    )
    opened.push_async_callback(relay.stop)
    await _submit(port)
    events = await _follow(Path(config.log.delivery))
    return [
        _cell(require, skip, host, hosts[host], events)
        for require, skip in SETTINGS
        for host in _hosts_here()
    ]


def _hosts_here() -> list[str]:
    """The hosts that can run on this machine. Where loopback has one address, the relay uses
    routes, for which a domain's policy and records do not matter: such domains are left out.
    """
    return [
        host
        for host, kind in HOSTS.items()
        if kind.published is Published.NOTHING or _has_many_addresses()
    ]


async def _publish(dns: DnsServer, hosts: Mapping[str, MxServer], spool: Path) -> None:
    """Publish TLSA records in signed zones, and store policies as if the relay had fetched them."""
    policies = await open_policies(QueueLocation(str(spool)))
    for host in _hosts_here():
        name, mx = _domain(host), hosts[host]
        match HOSTS[host].published:
            case Published.TLSA | Published.OTHER_TLSA as published:
                digest = mx.certificate_sha256 if published is Published.TLSA else "00" * 32
                dns.sign(name)
                dns.tlsa(mx.name, f"3 0 1 {digest}", port=mx.port)
            case Published.POLICY | Published.OTHER_POLICY as published:
                named = mx.name if published is Published.POLICY else f"other.{name}"
                text = f"version: STSv1\nmode: enforce\nmx: {named}\nmax_age: 86400\n"
                now = datetime.now(UTC)
                await policies.keep(
                    StoredPolicy(name, "1", text.encode(), now, now + timedelta(days=1))
                )
                dns.txt(f"_mta-sts.{name}", "v=STSv1; id=1;")
    await policies.close()


async def _start_hosts(
    opened: AsyncExitStack, dns: DnsServer, authority: Authority
) -> dict[str, MxServer]:
    """Start the mail hosts and put their names into the DNS.

    Mail goes to one port at every host, so each host needs an address of its own. Where loopback
    has only one address (macOS), each host has a port of its own instead, and `_write_config`
    writes a route to it.
    """
    hosts: dict[str, MxServer] = {}
    port = 0
    for n, host in enumerate(_hosts_here(), start=2):
        script = HOSTS[host].script
        name = f"mx.{_domain(host)}"
        address = f"127.0.0.{n}" if _has_many_addresses() else "127.0.0.1"
        mx = MxServer(script, name=name, address=address, port=port, authority=authority)
        hosts[host] = await opened.enter_async_context(mx)
        if _has_many_addresses():
            port = mx.port
        dns.mx(_domain(host), (10, name))
        dns.a(name, address)
    return hosts


def _write_config(
    directory: Path, ca_file: Path, dns: DnsServer, hosts: Mapping[str, MxServer]
) -> tuple[Path, int]:
    port = _free_port()
    document: JsonDocument = {
        "hostname": "relay.sandbox.test",
        "listeners": [{"address": f"127.0.0.1:{port}"}],
        "resolver": {"nameservers": [dns.nameserver]},
        "tls": {"ca_file": str(ca_file)},
        "delivery": {"port": hosts["good"].port, "allow_networks": ["127.0.0.0/8"]},
        "queue": {"path": str(directory / "spool"), "retry": ["1h"]},
        "log": {"delivery": str(directory / "delivery.log")},
        "admin": {"socket": str(directory / "relay.sock")},
        "policy": {
            "destinations": {
                _domain(host): {"mx": [f"other.{_domain(host)}"]}
                for host, kind in HOSTS.items()
                if kind.published is Published.PINNED
            }
        },
    }
    if not _has_many_addresses():
        document["routes"] = {
            _domain(host): {"host": mx.name, "port": mx.port} for host, mx in hosts.items()
        }
    (directory / "spool").mkdir(mode=0o700)
    path = directory / "relay.yaml"
    path.write_text(yaml.safe_dump(document))
    return path, port


async def _submit(port: int) -> None:
    """Send one message for each host and each pair of settings, as any SMTP client would."""
    async with aiosmtplib.SMTP(
        hostname="127.0.0.1", port=port, start_tls=False, timeout=10
    ) as client:
        for require, skip in SETTINGS:
            for host in _hosts_here():
                recipient = _recipient(require, skip, host)
                content = (
                    f"From: alice@sender.test\r\nTo: {recipient}\r\nSubject: demo\r\n"
                    f"X-Require-TLS: {_word(require)}\r\nX-Skip-Verification: {_word(skip)}\r\n\r\n"
                    "Hello.\r\n"
                )
                await client.sendmail("alice@sender.test", recipient, content)


async def _follow(log: Path) -> dict[str, JsonDocument]:
    """The delivery log's line about the attempt for each recipient; waits for all of them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        events = _attempts_in(log)
        if len(events) == len(SETTINGS) * len(_hosts_here()) or time.monotonic() > deadline:
            return events
        await asyncio.sleep(0.05)


def _attempts_in(log: Path) -> dict[str, JsonDocument]:
    lines = log.read_text(encoding="ascii").splitlines() if log.exists() else []
    events = (json.loads(line) for line in lines)
    return {event["recipient"]: event for event in events if event["event"] != "accepted"}


def _cell(
    require: bool, skip: bool, host: str, mx: MxServer, events: Mapping[str, JsonFields]
) -> Cell:
    recipient = _recipient(require, skip, host)
    event = events.get(recipient, {})
    result = _result(event)
    return Cell(
        require_tls=require,
        skip_verification=skip,
        host=host,
        expected=HOSTS[host].expected[SETTINGS.index((require, skip))],
        result=result,
        seen_by_host=_ways_at(mx, recipient) == WAYS[result],
        why=_why(event, result),
        event=event,
    )


def _ways_at(mx: MxServer, recipient: str) -> list[str]:
    """How each copy of this message reached the host. A RCPT in clear counts as a copy, too."""
    copies = [message for message in mx.messages if recipient in message.forward_paths]
    ways = ["tls" if message.in_tls else "clear" for message in copies]
    was_in_clear = any(recipient.encode() in connection.clear for connection in mx.connections)
    return [*ways, "clear"] if was_in_clear and "clear" not in ways else ways


def _result(event: JsonFields) -> Result:
    match event.get("event"), event.get("severity"):
        case "delivered", _:
            status = event["delivery-status"]
            if not status["tls"]:
                return Result.IN_CLEAR
            return Result.VERIFIED if status["certificate-verified"] else Result.UNVERIFIED
        case "failed", "temporary":
            return Result.DEFERRED
        case "failed", _:
            return Result.BOUNCED
        case _:
            return Result.LOST


def _why(event: JsonFields, result: Result) -> str:
    """The reason, in the words of the delivery log's line."""
    if not event:
        return f"the delivery log says nothing within {PATIENCE_SECONDS:.0f} s"
    status = event["delivery-status"]
    match result:
        case Result.VERIFIED:
            return f"{status['tls-version']}, verified by {status['verified-by']}"
        case Result.UNVERIFIED:
            return f"{status['tls-version']}, certificate not looked at"
        case Result.IN_CLEAR:
            reason, error = status["downgrade"]["reason"], status["downgrade"]["error"]
            # "starttls-not-offered: STARTTLS not offered" says one thing twice.
            return (
                reason if error.lower() == reason.replace("-", " ") else f"{reason}: {_last(error)}"
            )
        case _:
            return f"{status['enhanced-code']}: {_last(status['description'] or status['message'])}"


def _last(text: str) -> str:
    """The last and most precise part of `host [address]: what failed: why`."""
    if "not connected to: " in text:
        return text.partition("]: ")[2]
    return text.rpartition(": ")[2]


def _show(cells: list[Cell], seconds: float, console: Console) -> None:
    for (require, skip), group in itertools.groupby(
        cells, lambda cell: (cell.require_tls, cell.skip_verification)
    ):
        console.print(
            f"[bold]X-Require-TLS: {_word(require)}   X-Skip-Verification: {_word(skip)}[/bold]"
        )
        console.print(_table(group))
    wrong = [cell for cell in cells if not cell.is_as_ruled]
    for cell in wrong:
        settings = f"{_word(cell.require_tls)} / {_word(cell.skip_verification)}"
        text = f"not as ruled: {settings} at {cell.host}: expected: {cell.expected}"
        console.print(Text(text, style="bold red"))
    console.print("[bold]The mail hosts[/bold] (docs/tls.md has the rules)")
    console.print(_legend())
    if not _has_many_addresses():
        console.print(
            "Loopback has one address here: the hosts were found by routes instead of MX."
        )
    right = len(cells) - len(wrong)
    console.print(
        f"{right} of {len(cells)} messages went as the rules say, in {seconds:.1f} s."
        " Nothing left this machine."
    )


def _table(cells: Iterable[Cell]) -> Table:
    """The mail host, the result for the message, and the reason, as the delivery log has it."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for width in (1, max(map(len, HOSTS)), max(map(len, Result))):
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for cell in cells:
        table.add_row(
            Text("✓", style="green") if cell.is_as_ruled else Text("✗", style="bold red"),
            cell.host,
            Text(cell.result, style=_COLOURS[cell.result]),
            Text(cell.why),
        )
    table.add_row()
    return table


def _legend() -> Table:
    """What each kind of mail host is, and what the marks mean."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=max(map(len, HOSTS)), no_wrap=True)
    table.add_column(overflow="fold")
    for host in _hosts_here():
        table.add_row(host, Text(HOSTS[host].meaning))
    table.add_row("✓ ✗", Text("the message went as the rules say, or otherwise"))
    table.add_row()
    return table


def _domain(host: str) -> str:
    return f"{host}.test"


def _recipient(require: bool, skip: bool, host: str) -> str:
    return f"require-{_word(require)}-skip-{_word(skip)}@{_domain(host)}"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _has_many_addresses() -> bool:
    """Whether this machine has every address of 127.0.0.0/8, as Linux does."""
    return is_local_address("127.0.0.2")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Show only errors of the relay's own log, so that its lines do not break the table."""
    root = logging.getLogger()
    before, handlers = root.level, root.handlers[:]
    logging.basicConfig(level=logging.ERROR, format="relay: %(message)s")
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
        root.handlers[:] = handlers
