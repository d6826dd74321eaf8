"""`relay explain`: what would become of a message, without sending one."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import click

from relay.cli.common import config_file, config_option, fail, load_config, printable
from relay.cli.routing import host_as_json, host_text, no_route_as_json, no_route_text, route_of

if TYPE_CHECKING:
    from relay.config import Config
    from relay.policy.settings import Setting, TlsSettings
    from relay.route.next_hop import Host, Route
    from relay.route.security import Requirement

__all__ = ["explain"]

_YES_NO = click.Choice(["yes", "no"])


@click.command()
@click.option("--from", "sender", required=True, metavar="ADDRESS", help='The reverse-path; "<>" for null.')
@click.option("--to", "recipient", required=True, metavar="ADDRESS", help="The recipient.")
@click.option("--require-tls", type=_YES_NO, help="As if the message said X-Require-TLS.")
@click.option("--skip-verification", type=_YES_NO, help="As if the message said X-Skip-Verification.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    sender: str,
    recipient: str,
    require_tls: str | None,
    skip_verification: str | None,
    as_json: bool,
) -> None:
    """Say what would become of a message, without delivering anything.

    Prints each setting and the rule it came from, the hosts that would be tried in order,
    what each of them must prove, and what follows if it does not. The DNS is asked;
    no mail host is connected to. The exit status is 1 where there is no host to try.
    """
    from relay.policy.fields import Wishes
    from relay.policy.rules import resolve

    config = load_config(config_file(ctx))
    reverse_path, _ = _address(sender, "--from")
    forward_path, domain = _address(recipient, "--to")
    if not domain:
        raise click.BadParameter("an address with a domain is needed", param_hint="--to")
    wishes = Wishes(require_tls=_truth(require_tls), skip_verification=_truth(skip_verification))
    settings = resolve(config.policy, reverse_path=reverse_path, recipient_domain=domain, wishes=wishes)
    try:
        route = asyncio.run(route_of(config, domain))
    except Exception as error:  # whatever the way to an answer fails by, a sentence is what is wanted
        fail(f"no route could be found: {error}")
    answer = {
        "sender": reverse_path,
        "recipient": forward_path,
        "recipient-domain": domain,
        "policy": {
            "require-tls": _setting(settings.require_tls),
            "skip-verification": _setting(settings.skip_verification),
        },
        **_where(route, settings, config),
    }
    click.echo(json.dumps(answer, indent=2)) if as_json else _print(answer)
    ctx.exit(0 if answer["hosts"] else 1)


def _truth(word: str | None) -> bool | None:
    return None if word is None else word == "yes"


def _address(text: str, option: str) -> tuple[str, str]:
    """An address as MAIL or RCPT would take it, and its domain."""
    from relay.mail.address import AddressError, domain_of, parse_path

    bare = text.removeprefix("<").removesuffix(">")
    try:
        address, _ = parse_path(f"<{bare}>".encode(), smtputf8=True)
        return address, domain_of(address)
    except (AddressError, UnicodeError) as error:
        raise click.BadParameter(f"{printable(text)}: {error}", param_hint=option) from None


def _setting(setting: Setting) -> dict[str, Any]:
    return {"value": setting.value, "source": setting.source.value, "rule": setting.rule}


def _where(route: Route, settings: TlsSettings, config: Config) -> dict[str, Any]:
    """The hosts in order, or why there is none."""
    from relay.deliver.options import security_options
    from relay.route.next_hop import NoRoute
    from relay.route.security import at_host, requirement

    if isinstance(route, NoRoute):
        rejected = list(route.outcome.hosts)
        return {"hosts": [], "rejected": rejected, "trouble": [], "no-route": no_route_as_json(route)}
    options = security_options(config.delivery, config.tls)
    needed = requirement(settings, options)
    return {
        "hosts": [_host(host, at_host(needed, host, options)) for host in route.hosts],
        "rejected": list(route.rejected),
        "trouble": list(route.trouble),
        "no-route": None,
    }


def _host(host: Host, needed: Requirement) -> dict[str, Any]:
    from relay.route.security import describe

    return {**host_as_json(host), "rules": list(describe(needed))}


def _print(answer: dict[str, Any]) -> None:
    click.echo(f"from {printable(answer['sender']) or '<>'} to {printable(answer['recipient'])}")
    click.echo()
    for name, setting in answer["policy"].items():
        rule = f" ({printable(setting['rule'])})" if setting["rule"] not in ("", setting["source"]) else ""
        value = click.style("yes" if setting["value"] else "no", bold=True)
        click.echo(f"  {name + ':':<19}{value}  from: {setting['source']}{rule}")
    click.echo()
    if answer["no-route"] is not None:
        click.echo(no_route_text(answer["no-route"]))
    _print_hosts(answer["hosts"])
    for line in answer["rejected"]:
        click.echo(f"not connected to: {printable(line)}")
    for line in answer["trouble"]:
        click.echo(f"trouble: {printable(line)}")


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    """The hosts in order, and the rules once for those that share them."""
    told: list[str] | None = None
    for number, host in enumerate(hosts, 1):
        if host["rules"] != told:
            told = host["rules"]
            click.echo("at these hosts:" if number == 1 else "and at these:")
            for rule in told:
                click.echo(f"  - {rule}")
        click.echo(f"{number:>4}. {host_text(host)}")
