"""`relay memory`: what mail hosts have shown of TLS before, as the relay remembers it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click

from relay.cli.common import age_text, asked, config_option, domain_name, fail, items_of
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

_COLOURS = {"verified": "green", "encrypted": "yellow", "none": "red"}
_LEVELS = click.Choice(["none", "encrypted", "verified"])

F = TypeVar("F", bound=Callable[..., object])


def _filters(command: F) -> F:
    """The options that say which hosts are meant."""
    for option in (
        click.option("--alarm", is_flag=True, help="Hosts that show less than before, now."),
        click.option("--level", type=_LEVELS, help="Hosts that have shown this much."),
        click.option("--host", metavar="HOST", callback=domain_name, help="This mail host."),
    ):
        command = option(command)
    return command


@click.group()
@config_option
def memory() -> None:
    """Look at what mail hosts have shown of TLS before, and have it forgotten.

    The relay remembers for each recipient domain and mail host the most that the host has shown in
    a session that carried mail: none, encrypted or verified. Less than that is an alarm, or holds
    the mail (downgrade_memory).
    """


@memory.command("list")
@click.argument("domain", metavar="[DOMAIN]", required=False, callback=domain_name)
@_filters
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def list_(ctx: click.Context, /, domain: str | None, as_json: bool, **filters: Any) -> None:
    """List what is remembered, by domain. Also works while no relay is running."""
    found = items_of(asked(ctx, {"verb": "memory-list", **_request(domain, **filters)}))
    if as_json:
        click.echo(json.dumps(list(found), indent=2))
    else:
        _print(found)


@memory.command()
@click.argument("domains", metavar="[DOMAIN]...", nargs=-1, callback=domain_name)
@_filters
@click.option("--all", "everything", is_flag=True, help="All that is remembered.")
@click.option("--dry-run", is_flag=True, help="List what is meant, forget nothing.")
@config_option
@click.pass_context
def forget(
    ctx: click.Context, /, domains: tuple[str, ...], everything: bool, dry_run: bool, **filters: Any
) -> None:
    """Forget what hosts have shown: all hosts of a domain, or those that a filter means.

    What they show from now on is learned anew. Mail that waits because of it goes with its next
    attempt, or now with `relay queue retry --domain DOMAIN`. Also where an alarm was right: the
    domain has less TLS now, and that is meant.
    """
    requests = [_request(domain, **filters) for domain in domains or (None,)]
    if everything and requests != [{}]:
        raise click.UsageError("--all stands alone: leave it out, or the domains and filters")
    if not everything and requests == [{}]:
        raise click.UsageError("name a domain or a filter, or else say --all")
    if dry_run:
        for one in requests:
            _print(items_of(asked(ctx, {"verb": "memory-list", **one})))
        click.echo("Nothing was forgotten.")
        return
    also = {"all": True} if everything else {}
    counts = [
        list(asked(ctx, {"verb": "memory-forget", **one, **also}))[-1]["done"]["domains"]
        for one in requests
    ]
    click.echo(f"forgotten: {sum(counts)} domain{'' if sum(counts) == 1 else 's'}")
    unknown = [domain for domain, count in zip(domains, counts, strict=False) if not count]
    if unknown:
        fail("\n".join(f"{domain}: nothing is remembered of it" for domain in unknown))


def _request(domain: str | None, host: str | None, level: str | None, alarm: bool) -> JsonDocument:
    """A request for the control socket, with the given options only."""
    said = {"domain": domain, "host": host, "level": level, "alarm": alarm or None}
    return {key: value for key, value in said.items() if value is not None}


def _print(found: Iterable[JsonDocument]) -> None:
    now, has_some = datetime.now(UTC), False
    for one in found:
        has_some = True
        messages = one["in-full"]["messages"]
        since = _ago(one["in-full"]["since"], now)
        plural = "" if messages == 1 else "s"
        click.echo(
            f"{click.style(printable(one['domain']), bold=True)}  {messages} message{plural} "
            f"without exception since {since}"
        )
        for host in one["hosts"]:
            click.echo(f"    {_host_text(host, now)}")
        for alarm in one["alarms"]:
            click.echo(f"    {click.style(_alarm_text(alarm, now), fg='red')}")
    if not has_some:
        click.echo("Nothing is remembered, or nothing of it matches.")


def _host_text(host: JsonDocument, now: datetime) -> str:
    level = click.style(f"{host['level']:<9}", fg=_COLOURS[host["level"]])
    text = f"{level} {printable(host['host'])}  seen {_ago(host['seen'], now)}"
    if host["less"] is not None:
        text += f", only {host['less']} since {_ago(host['less-since'], now)}"
    return text


def _alarm_text(alarm: JsonDocument, now: datetime) -> str:
    who = "a new host" if alarm["by"] == "new-host" else printable(alarm["host"])
    return (
        f"alarm: {who} shows {alarm['now']}, before it was {alarm['before']}; "
        f"first {_ago(alarm['first'], now)}"
    )


def _ago(text: str, now: datetime) -> str:
    return f"{age_text(now - datetime.fromisoformat(text))} ago"
