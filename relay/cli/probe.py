"""`relay probe`: connects to the mail hosts of a domain and shows their TLS."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from relay.cli.common import age, config_file, config_option, domain_name, fail, load_config
from relay.cli.routing import floor_lines, host_text, lookups, no_route_text, policy_line
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config


@click.command()
@click.argument("domain", metavar="DOMAIN", callback=domain_name)
@click.option(
    "--timeout",
    "patience",
    callback=age,
    metavar="TIME",
    help="The longest wait at a host [default: 30s].",
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def probe(ctx: click.Context, /, domain: str, patience: timedelta | None, as_json: bool) -> None:
    """Connect to each mail host of DOMAIN and show its TLS.

    Is STARTTLS offered, with which version and cipher? Whose certificate is shown, and does
    it verify? And what would become of a message under each of the four settings? The session
    consists of greeting, EHLO, STARTTLS and QUIT. The exit status is 1 where no host answered.
    """
    config = load_config(config_file(ctx))
    try:
        answer = asyncio.run(_probe(config, domain, patience or timedelta(seconds=30)))
    except OSError as error:
        fail(str(error))
    click.echo(json.dumps(answer, indent=2)) if as_json else _print(answer)
    ctx.exit(0 if any(not host["trouble"] for host in answer["hosts"]) else 1)


async def _probe(config: Config, domain: str, patience: timedelta) -> JsonDocument:
    from relay.daemon.explaining import FloorPending
    from relay.daemon.probing import probe_domain
    from relay.mail.address import normalise_domain
    from relay.queue.store import SpoolError
    from relay.route.name_servers import ResolverError

    try:
        async with lookups(config) as asked:
            return await probe_domain(
                normalise_domain(domain),
                route=asked.route,
                floors=asked.floors,
                hostname=config.hostname,
                delivery=config.delivery,
                tls=config.tls,
                patience=patience,
            )
    except FloorPending as error:
        fail(f"{error}; ask again when that has ended, or with a longer --timeout")
    except (ResolverError, SpoolError) as error:
        fail(str(error))


def _print(answer: JsonDocument) -> None:
    if answer["no-route"] is not None:
        click.echo(no_route_text(answer["no-route"]))
    else:
        click.echo(policy_line(answer))
    for number, host in enumerate(answer["hosts"], 1):
        click.echo(f"{number:>3}. {click.style(host_text(host), bold=True)}")
        for line in _host_lines(host, answer):
            click.echo(f"     {line}")
    for line in answer["rejected"]:
        click.echo(f"not connected to: {printable(line)}")


def _host_lines(host: JsonDocument, answer: JsonDocument) -> list[str]:
    """The lines about one host."""
    if host["trouble"]:
        return [click.style(printable(host["trouble"]), fg="red")]
    lines = [_tls_line(host)]
    if host["certificate"] is not None:
        lines += _certificate_lines(host["certificate"])
    if host["tls-offered"] and host["why-not-verified"]:
        lines.append(printable(host["why-not-verified"]))
    if host["certificate-faults"]:
        lines.append(f"does not match: {printable('; '.join(host['certificate-faults']))}")
    lines += map(printable, floor_lines(host, answer))
    for name, key in (("its TLSA records", "meets-dane"), ("the MTA-STS policy", "meets-mta-sts")):
        if host[key] is not None:
            lines.append(f"meets {name}: {'yes' if host[key] else 'no'}")
    if host["not-used"]:
        lines.append(f"not connected to for mail: it {printable(host['not-used'])}")
    lines.append("a message here, under each of the four settings:")
    lines.append("  require-tls  skip-verification")
    return lines + [_rule_line(rule, host["why-not-verified"]) for rule in host["rules"]]


def _tls_line(host: JsonDocument) -> str:
    if not host["tls-offered"]:
        return "no TLS offered"
    if host["tls-version"] is None:
        return "TLS offered, and none came about"
    pinned = f", its key is pinned ({host['pin']})" if host["pin"] is not None else ""
    verified = f"verified{pinned}" if host["verified"] else "not verified"
    return f"{host['tls-version']} {host['tls-cipher']}, {verified}"


def _certificate_lines(certificate: JsonDocument) -> list[str]:
    names = ", ".join(certificate["names"][:10]) or "no name at all"
    begins, ends = (datetime.fromisoformat(certificate[key]) for key in ("not-before", "not-after"))
    return [
        f"certificate for {printable(names)}",
        f"  from {printable(certificate['issuer'])}, valid {begins:%Y-%m-%d} to {ends:%Y-%m-%d}",
    ]


def _rule_line(rule: JsonDocument, told: str) -> str:
    """`  yes          no                 not sent here; deferred 4.7.5 if …`.

    The error follows unless it is `told`, which the output already has.
    """
    require, skip = (("no", "yes")[rule[key]] for key in ("require-tls", "skip-verification"))
    colour = "red" if not rule["would-send"] else "green" if rule["tls"] else "yellow"
    error = f" ({printable(rule['error'])})" if rule["error"] not in ("", told) else ""
    return f"  {require:<11}  {skip:<17}  {click.style(printable(rule['text']), fg=colour)}{error}"
