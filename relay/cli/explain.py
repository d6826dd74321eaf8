"""`relay explain`: what would become of a message, without sending one."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from relay.cli.common import age_text, config_file, config_option, fail, load_config
from relay.cli.routing import floor_lines, host_text, lookups, no_route_text, policy_line
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.policy.fields import Wishes
    from relay.queue.api_state import DomainSettings
    from relay.queue.location import QueueLocation
    from relay.route.next_hop import Auth

_YES_NO = click.Choice(["yes", "no"])


@click.command()
@click.option(
    "--from", "sender", required=True, metavar="ADDRESS", help='The reverse-path; "<>" for null.'
)
@click.option("--to", "recipient", required=True, metavar="ADDRESS", help="The recipient.")
@click.option("--require-tls", type=_YES_NO, help="As if the message said X-Require-TLS.")
@click.option(
    "--skip-verification", type=_YES_NO, help="As if the message said X-Skip-Verification."
)
@click.option("--requiretls", is_flag=True, help="As if MAIL said REQUIRETLS (RFC 8689).")
@click.option("--tls-required-no", is_flag=True, help="As if the message said TLS-Required: No.")
@click.option("--user", metavar="NAME", help="As if this user of access.users had logged in.")
@click.option("--listener", metavar="ADDRESS", help="As if the client had come by this listener.")
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
    requiretls: bool,
    tls_required_no: bool,
    user: str | None,
    listener: str | None,
    as_json: bool,
) -> None:
    """Say what would become of a message, without delivering anything.

    Prints each setting and the rule it came from, the hosts that would be tried in order,
    what each of them must prove, and what happens if it does or does not. The command asks the
    DNS, and fetches the MTA-STS policy of the domain if necessary; it connects to no mail host.
    The exit status is 1 where there is no host to try.

    A setting comes from the message, the recipient's domain (destination), the sender's (domain,
    or api where it was set over HTTP) or the default. From message-refused: the message asked for
    less protection than a rule with allow_override: false permits. "a message may weaken this"
    says whether such a rule applies.

    "next hop" names the next hop of the configuration that the message takes, and the rule.

    The rules are those of the file. If a running relay uses other rules, stderr says so.
    """
    from relay.daemon.explaining import FloorPending
    from relay.policy.fields import Wishes

    config = load_config(config_file(ctx))
    reverse_path, _ = _address(sender, "--from")
    forward_path, domain = _address(recipient, "--to")
    if not domain:
        raise click.BadParameter("an address with a domain is needed", param_hint="--to")
    next_hop, by_client = _next_hop(config, user, listener)
    try:
        wishes = Wishes(_truth(require_tls), _truth(skip_verification))
        speaks = {"requiretls": requiretls, "tls_required_no": tls_required_no}
        answer = _explained(config, reverse_path, forward_path, wishes, speaks, next_hop)
    except FloorPending as error:
        fail(f"{error}; ask again when that has ended")
    except Exception as error:  # the user gets a sentence for every kind of failure
        fail(f"no route could be found: {error}")
    _name_client_and_login(answer, config, by_client)
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


def _next_hop(config: Config, user: str | None, listener: str | None) -> tuple[str, str]:
    """The next hop that a client is given, "" for none, and the key that gives it."""
    named = {one.address: one for one in config.listeners}
    if user is not None and user not in config.access.users:
        raise click.BadParameter(f"access.users has no {printable(user)}", param_hint="--user")
    if listener is not None and listener not in named:
        there = f"write one of {', '.join(named)}"
        raise click.BadParameter(f"no such listener; {there}", param_hint="--listener")
    by_user = config.access.users[user].next_hop if user is not None else None
    by_listener = named[listener].next_hop if listener is not None else None
    if by_user:
        return by_user, f"next_hop of the user {user}"
    return by_listener or "", f"next_hop of the listener {listener}"


def _name_client_and_login(answer: JsonDocument, config: Config, by_client: str) -> None:
    """Say of a next hop that the client names whose it is, and of a login whose and how."""
    from relay.config.parts import routes_of

    route = answer["route"]
    if route["rule"] == "client":
        route["text"] = by_client
    hop = routes_of(config).every_next_hop().get(route["next-hop"] or "")
    login = _login(hop.auth) if hop is not None and hop.auth is not None else None
    for host in answer["hosts"]:
        host["login-text"] = login


def _login(auth: Auth) -> str:
    """`as relay@example.com by PLAIN or LOGIN`, without a secret."""
    from relay.route.next_hop import AuthMechanism

    mechanism = auth.mechanism.value.upper()
    if auth.mechanism is AuthMechanism.AUTO:
        by_token, by_password = auth.oauth2 is not None, auth.password_file is not None
        names = ["OAUTHBEARER or XOAUTH2"] if by_token else []
        names += ["PLAIN or LOGIN"] if by_password and not by_token else []
        mechanism = names[0] if names else "EXTERNAL"
    return f"as {auth.username} by {mechanism}" if auth.username is not None else f"by {mechanism}"


def _explained(
    config: Config,
    reverse_path: str,
    recipient: str,
    wishes: Wishes,
    speaks: Mapping[str, bool],
    next_hop: str,
) -> JsonDocument:
    """The answer under the file's rules and the settings made over HTTP.

    `speaks`: the message uses REQUIRETLS, or TLS-Required: No (RFC 8689). `next_hop`: the client's.
    """
    from relay.admin.domain_settings import overlay_of
    from relay.daemon.explaining import explain as explain_message
    from relay.deliver.options import security_options
    from relay.policy.rules import with_overlay

    settings = _set_over_http(config)

    async def explained() -> JsonDocument:
        async with lookups(config) as asked:
            return await explain_message(
                reverse_path=reverse_path,
                recipient=recipient,
                wishes=wishes,
                rules=with_overlay(config.policy, overlay_of(settings)),
                route=partial(asked.route, next_hop=next_hop),
                options=security_options(config.delivery, config.tls),
                floors=asked.floors,
                patience=config.delivery.timeouts.policy_fetch,
                lifetime=config.queue.lifetime,
                **speaks,
            )

    return asyncio.run(explained())


def _set_over_http(config: Config) -> Mapping[str, DomainSettings]:
    """The settings of the running relay; of its queue if no relay is running."""
    from relay.admin.client import NotRunning, RelayError, ask
    from relay.admin.control import settings_of
    from relay.queue.store import SpoolError

    try:
        lines = list(ask(Path(config.admin.socket), {"verb": "settings"}, seconds=10))
        _compare(config, lines[-1]["done"].get("in-force", {}))
        return settings_of(lines)
    except NotRunning:
        pass
    except RelayError as error:
        click.echo(f"settings made over HTTP are not looked at: {printable(str(error))}", err=True)
        return {}
    try:
        return asyncio.run(_stopped(config.queue.location))
    except SpoolError:
        return {}  # there is no queue yet, so no setting was made


def _compare(config: Config, in_force: Mapping[str, str]) -> None:
    """Warn where the running relay has not taken over this file."""
    from relay.config.document import fingerprints

    others = [
        name
        for name, digest in fingerprints(config).items()
        if in_force.get(name, digest) != digest
    ]
    if others:
        click.echo(
            "this is by the file: the running relay has not taken over what it says of"
            f" {', '.join(others)} (SIGHUP takes over policy and routes, a restart the rest)",
            err=True,
        )


async def _stopped(location: QueueLocation) -> Mapping[str, DomainSettings]:
    from relay.queue.engine import open_to_read

    async with AsyncExitStack() as stack:
        first, *_ = await open_to_read(location, stack)
        return await first.domain_settings()


def _print(answer: JsonDocument) -> None:
    click.echo(f"from {printable(answer['sender']) or '<>'} to {printable(answer['recipient'])}")
    click.echo()
    for name, setting in answer["policy"].items():
        rule = (
            f" ({printable(setting['rule'])})"
            if setting["rule"] not in ("", setting["source"])
            else ""
        )
        value = click.style("yes" if setting["value"] else "no", bold=True)
        click.echo(f"  {name + ':':<19}{value}  from: {setting['source']}{rule}")
    if answer["requiretls"]:
        click.echo(f"  {'requiretls:':<19}{click.style('yes', bold=True)}  from: message")
    if answer["tls-required-no-refused"] is not None:
        click.echo(
            f"  {'tls-required-no:':<19}{click.style('no', bold=True)}"
            f"  refused: {answer['tls-required-no-refused']}"
        )
    elif answer["tls-required-no"]:
        click.echo(f"  {'tls-required-no:':<19}{click.style('yes', bold=True)}  from: message")
    may = "yes" if answer["message-may-weaken"] else "no  (a rule has allow_override: false)"
    click.echo(f"  a message may weaken this: {may}")
    route = answer["route"]
    next_hop = click.style(printable(route["next-hop"] or "MX"), bold=True)
    click.echo(f"  {'next hop:':<19}{next_hop}  from: {printable(route['text'])}")
    click.echo()
    if answer["no-route"] is not None:
        click.echo(no_route_text(answer["no-route"]))
    else:
        click.echo(policy_line(answer))
    _print_hosts(answer)
    for line in answer["rejected"]:
        click.echo(f"not connected to: {printable(line)}")
    for line in answer["trouble"]:
        click.echo(f"trouble: {printable(line)}")
    if answer["result"] is not None:
        click.echo(f"result: {_result_text(answer['result'])}")


def _result_text(result: JsonDocument) -> str:
    """What becomes of a message for which no host may be used."""
    after = timedelta(seconds=result["bounced-after-seconds"])
    end = f"bounced after {age_text(after)}" if after else "at once"
    return f"{result['outcome']} {result['status']}, {end}"


def _print_hosts(answer: JsonDocument) -> None:
    """Print the hosts in order; hosts with the same rules share one list of them."""
    for rules, group in itertools.groupby(
        enumerate(answer["hosts"], 1), key=lambda numbered: numbered[1]["rules"]
    ):
        sharing = list(group)
        for number, host in sharing:
            click.echo(f"{number:>3}. {click.style(host_text(host), bold=True)}")
            for line in floor_lines(host, answer):
                click.echo(f"     {printable(line)}")
        them = "it" if len(sharing) == 1 else "each of them"
        click.echo(f"     what is asked of {them}, and what follows:")
        for rule in rules:
            click.echo(f"     - {rule}")
