"""`relay mta-sts`: the MTA-STS policies that the running relay keeps."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click

from relay.cli.common import age_text, asked, config_option, domain_name, fail, items_of
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

_COLOURS = {"enforce": "green", "testing": "yellow", "none": "cyan"}


@click.group("mta-sts")
@config_option
def mta_sts() -> None:
    """Look at the MTA-STS policies of recipients' domains, and decide about them.

    A domain publishes which hosts take its mail, over verified TLS (RFC 8461). The relay keeps a
    policy until its age is over, and fetches it again each day. All these commands ask the running
    relay through its control socket (admin.socket).
    """


@mta_sts.command("list")
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def list_(ctx: click.Context, /, as_json: bool) -> None:
    """List the policies that are kept, by domain."""
    policies = list(items_of(asked(ctx, {"verb": "mta-sts-list"})))
    if as_json:
        click.echo(json.dumps(policies, indent=2))
        return
    if not policies:
        click.echo("No policy is kept.")
    for one in policies:
        hosts = ", ".join(one["mx"]) or "no hosts"
        mode = click.style(f"{one['mode']:<8}", fg=_COLOURS.get(one["mode"]))
        click.echo(f"{mode} {one['domain']}  {printable(hosts)}  {_expiry(one['expires'])}")


@mta_sts.command()
@click.argument("domain", metavar="DOMAIN", callback=domain_name)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def show(ctx: click.Context, /, domain: str, as_json: bool) -> None:
    """Show the policy of a domain, as it was fetched and for how long it holds."""
    _show(ctx, domain, as_json=as_json)


def _show(ctx: click.Context, domain: str, *, as_json: bool) -> None:
    policy, reason = _asked(ctx, "mta-sts-show", domain)
    if policy is None:
        failed = f"; the domain announces one, and the last fetch failed: {printable(reason)}"
        fail(f"{domain}: no policy is kept{failed if reason else ''}")
    _print(policy, as_json=as_json)


@mta_sts.command()
@click.argument("domain", metavar="DOMAIN", callback=domain_name)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def refresh(ctx: click.Context, /, domain: str, as_json: bool) -> None:
    """Fetch the policy of a domain now, also within five minutes of a failure.

    The exit status is 1 where it could not be fetched. A policy that is in force stays in force
    then.
    """
    policy, reason = _asked(ctx, "mta-sts-refresh", domain)
    if policy is not None:
        _print(policy, as_json=as_json)
    if reason:
        fail(f"not fetched: {reason}")


@mta_sts.command()
@click.argument("domain", metavar="DOMAIN", callback=domain_name)
@click.option("--dry-run", is_flag=True, help="Show the policy that is meant, forget nothing.")
@config_option
@click.pass_context
def forget(ctx: click.Context, /, domain: str, dry_run: bool) -> None:
    """Forget the policy of a domain.

    If the domain still publishes a policy, it is fetched with the next message. To deliver to a
    domain whose policy is broken, write `mta_sts: ignore` for it under policy.destinations.
    """
    if dry_run:
        _show(ctx, domain, as_json=False)
        click.echo("Nothing was forgotten.")
        return
    *_, last = asked(ctx, {"verb": "mta-sts-forget", "domain": domain})
    if last["done"]["unknown"]:
        fail(f"{domain}: no policy is kept")
    click.echo(f"forgotten: the policy of {domain}")


def _asked(ctx: click.Context, verb: str, domain: str) -> tuple[JsonDocument | None, str]:
    """The policy in an answer, and the reason why it is not a new one."""
    lines = list(asked(ctx, {"verb": verb, "domain": domain}, patient=True))
    policy = next((line["item"] for line in lines if "item" in line), None)
    return policy, lines[-1]["done"]["reason"]


def _print(policy: JsonDocument, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(policy, indent=2))
        return
    click.echo(f"domain:   {policy['domain']}")
    click.echo(f"mode:     {click.style(policy['mode'], fg=_COLOURS.get(policy['mode']))}")
    for pattern in policy["mx"]:
        click.echo(f"mx:       {pattern}")
    click.echo(f"id:       {policy['id']}")
    click.echo(f"fetched:  {policy['fetched']}")
    click.echo(f"expires:  {policy['expires']}  ({_expiry(policy['expires'])})")
    click.echo(f"refetch:  {policy['refresh-at']}")


def _expiry(text: str) -> str:
    left = datetime.fromisoformat(text) - datetime.now(UTC)
    return f"expires in {age_text(left)}" if left.total_seconds() > 0 else "expired"
