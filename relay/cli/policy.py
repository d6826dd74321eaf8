"""`relay policy`: rules made from what other programs know, and from what the relay has seen."""

from __future__ import annotations

import click

from relay.cli.common import LazyGroup, config_option

_COMMANDS = {
    "import": "relay.cli.policy_import:import_",
    "suggest": "relay.cli.policy_suggest:suggest",
}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
@config_option
def policy() -> None:
    """Make rules for the configuration (policy), as YAML to paste."""
