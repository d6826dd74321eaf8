"""`relay completion`: scripts with which a shell completes the commands of `relay`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands and options.

    \b
      bash: relay completion bash > /etc/bash_completion.d/relay
      zsh:  relay completion zsh > "${fpath[1]}/_relay"
      fish: relay completion fish > ~/.config/fish/completions/relay.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "relay", "_RELAY_COMPLETE").source())
