"""`relay route test`: connects to the hosts of a next hop and logs in."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from relay.cli.common import config_file, config_option, load_config, not_empty
from relay.cli.route import named_next_hop
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.hop_trial import TrialStep
    from relay.route.next_hop import NextHop


@click.command()
@click.argument("name", metavar="NAME", callback=not_empty)
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def test(ctx: click.Context, /, name: str, as_json: bool) -> None:
    """Connect to each host of a next hop, begin TLS, log in, and quit; say how each step ended.

    NAME is a name from next_hops; for a next hop that stands in `routes` itself, the pattern it
    stands under. No message is sent. The command reads the files with the secrets, so it has to run
    as a user who may read them, and asks for an access token of its own where the login needs one.
    The login is tried once at each host. The exit status is 0 where all steps succeeded at one host
    at least, and every host of the list was found.
    """
    config = load_config(config_file(ctx))
    hop = named_next_hop(config, name)
    steps = asyncio.run(_try(config, hop, quiet=as_json))
    if as_json:
        click.echo(json.dumps([_as_json(step) for step in steps], indent=2))
    is_whole = all(step.is_good for step in steps if step.name == "hosts")
    ctx.exit(0 if is_whole and any(step.name == "QUIT" for step in steps) else 1)


async def _try(config: Config, hop: NextHop, *, quiet: bool) -> list[TrialStep]:
    from relay.cli.routing import make_router
    from relay.cli.token_server import asking
    from relay.deliver.hop_trial import try_next_hop
    from relay.deliver.negotiate import SessionOptions
    from relay.deliver.options import security_options
    from relay.deliver.tokens import Tokens
    from relay.route.credentials import RouteCredentials

    async with asking(config) as asked:
        tokens = Tokens(lambda: config.oauth2, asked.client.post, clock=lambda: datetime.now(UTC))
        logins = RouteCredentials(tokens)
        router = make_router(config, asked.resolver, logins)
        using = SessionOptions(
            config.hostname, config.delivery.timeouts, asked.contexts, logins=logins
        )
        options = security_options(config.delivery, config.tls)
        steps: list[TrialStep] = []
        async for step in try_next_hop(hop, router=router, using=using, options=options):
            if not quiet:
                _print(step, is_new=not steps or steps[-1].host != step.host)
            steps.append(step)
        await tokens.close()
        return steps


def _print(step: TrialStep, *, is_new: bool) -> None:
    if is_new and step.host:
        click.echo(click.style(printable(step.host), bold=True))
    colour = "green" if step.is_good else "red"
    click.echo(f"  {step.name:<8} {click.style(printable(step.text), fg=colour)}")


def _as_json(step: TrialStep) -> JsonDocument:
    return {"host": step.host, "step": step.name, "good": step.is_good, "text": step.text}
