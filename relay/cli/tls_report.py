"""`relay tls-report`: what recipients' domains are told about TLS with their hosts."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime

import click

from relay.cli.common import asked, config_option, domain_name, fail, items_of
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

_COLOURS = {"sent": "green", "due": "yellow", "given-up": "red"}


def _day(ctx: click.Context, param: click.Parameter, value: str | None) -> date | None:
    """The day of UTC that an option names."""
    if value is None:
        return None
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is no day; write it as 2030-01-31", ctx, param
        ) from None


@click.group("tls-report")
@config_option
def tls_report() -> None:
    """Look at the reports on TLS for recipients' domains, and send them.

    With `tls_reports: {send: true}` the relay counts, for each day of UTC, how TLS with the hosts
    of a domain went, and tells the domain once a day if it asks for that (RFC 8460). All these
    commands ask the running relay through its control socket (admin.socket).
    """


@tls_report.command("list")
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def list_(ctx: click.Context, /, as_json: bool) -> None:
    """List domains and days with sessions, and where the report of each stands.

    so-far: the day is not over. due: it is not sent yet. sent: it is with the domain, or queued.
    given-up: it could not be sent within 24 hours. not-wanted: the domain asks for no reports.
    """
    items = list(items_of(asked(ctx, {"verb": "tls-report-list"})))
    if as_json:
        click.echo(json.dumps(items, indent=2))
        return
    if not items:
        click.echo("No session is counted.")
    _print_listed(items)


def _print_listed(items: list[JsonDocument]) -> None:
    for one in items:
        state = click.style(f"{one['state']:<10}", fg=_COLOURS.get(one["state"]))
        counts = f"{one['successful']} successful, {one['failed']} failed"
        due = f"  from {_at(one['due'])}" if one["due"] else ""
        click.echo(f"{one['day']} {state} {one['domain']}  {counts}{due}")


@tls_report.command()
@click.argument("domain", metavar="DOMAIN", callback=domain_name)
@click.option(
    "--day", metavar="YYYY-MM-DD", callback=_day, help="Of this day of UTC instead of today."
)
@config_option
@click.pass_context
def show(ctx: click.Context, /, domain: str, day: date | None) -> None:
    """Print the report of a domain as it is so far, in JSON (RFC 8460 §4.4).

    The exit status is 1 where there was no session with a host of the domain.
    """
    lines = _ask(ctx, "tls-report-show", domain, day)
    document = next((line["item"] for line in lines if "item" in line), None)
    if document is None:
        when = day if day is not None else "today"
        fail(f"{domain}: no session was counted ({when}, UTC)")
    click.echo(json.dumps(document, indent=2))


@tls_report.command()
@click.argument("domain", metavar="[DOMAIN]", required=False, callback=domain_name)
@click.option(
    "--day",
    metavar="YYYY-MM-DD",
    callback=_day,
    help="Of this day of UTC instead of all that are over.",
)
@click.option("--dry-run", is_flag=True, help="List the reports that are meant, send none.")
@config_option
@click.pass_context
def send(ctx: click.Context, /, domain: str | None, day: date | None, dry_run: bool) -> None:
    """Send now what was not sent: of all days that are over, to all domains, or to one.

    A report that was sent is never sent again; of one that is named, the command says so. The exit
    status is 1 where one could not be sent.
    """
    if dry_run:
        _print_listed(_due(ctx, domain, day))
        click.echo("Nothing was sent.")
        return
    lines = _ask(ctx, "tls-report-send", domain, day)
    failed = False
    items = [line["item"] for line in lines if "item" in line]
    for one in items:
        state = click.style(f"{one['state']:<10}", fg=_COLOURS.get(one["state"]))
        reason = f"  {printable(one['reason'])}" if one["reason"] else ""
        if one["was-settled"]:
            reason = "  (so before; nothing was sent now)"
        click.echo(f"{one['day']} {state} {one['domain']}{reason}")
        failed |= bool(one["reason"])
    if lines[-1]["done"]["unknown"]:
        fail(f"{domain}: no session was counted ({day or 'on any day that is over'})")
    if not items:
        click.echo("No report was left to send.")
    if failed:
        ctx.exit(1)


def _due(ctx: click.Context, domain: str | None, day: date | None) -> list[JsonDocument]:
    """The reports that `send` would send."""
    from relay.mail.address import normalise_domain

    named = normalise_domain(domain) if domain is not None else None
    return [
        item
        for item in items_of(_ask(ctx, "tls-report-list", None, None))
        if item["state"] == "due"
        and named in (None, item["domain"])
        and (day is None or item["day"] == day.isoformat())
    ]


def _ask(ctx: click.Context, verb: str, domain: str | None, day: date | None) -> list[JsonDocument]:
    request = {"verb": verb}
    if domain is not None:
        request["domain"] = domain
    if day is not None:
        request["day"] = day.isoformat()
    return list(asked(ctx, request, patient=True))


def _at(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
