"""`relay health`: whether the running relay works, for supervisors and containers."""

from __future__ import annotations

from pathlib import Path

import click

from relay.cli.common import config_file, config_option, fail, load_config


@click.command()
@click.option(
    "--ready", is_flag=True, help="Whether mail should be handed to it, too: not while it drains."
)
@config_option
@click.pass_context
def health(ctx: click.Context, /, ready: bool) -> None:
    """Ask the running relay whether it does its work; exit 0 if so, else 1 and what is wrong.

    It does if its parts run and its queue answers. For HEALTHCHECK of a container, and for
    load balancers that can run a command.
    """
    from relay.admin.client import NotRunning, RelayError, ask

    config = load_config(config_file(ctx), only_to_ask=True)
    try:
        [answer] = ask(Path(config.admin.socket), {"verb": "health"}, seconds=20.0)
    except (NotRunning, RelayError) as error:
        fail(str(error))
    wrong = answer["done"]["readiness" if ready else "liveness"]
    if wrong:
        fail("\n".join(wrong))
    click.echo("ready" if ready else "healthy")
