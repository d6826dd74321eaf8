"""`relay check`: what is wrong with a configuration, and with the machine it is for."""

from __future__ import annotations

import json
import os

import click

from relay.cli.common import config_file, config_option, fail

__all__ = ["check"]


@click.command()
@click.option(
    "--file-only",
    is_flag=True,
    help="Judge the file alone: try no port, no directory, no name server.",
)
@click.option(
    "--schema", is_flag=True, help="Print a JSON Schema of the file, for editors, and nothing else."
)
@click.option(
    "-q", "--quiet", is_flag=True, help="Say what is wrong, and nothing where all is well."
)
@config_option
@click.pass_context
def check(ctx: click.Context, /, file_only: bool, schema: bool, quiet: bool) -> None:
    """Say what is wrong with the configuration, or print all of it as it is in effect.

    Every mistake is named at once, with file, line, key and cure; the exit status is 1
    then. What only a start would find is tried, too: ports that are taken, certificates and
    keys that cannot be used, directories that cannot be written. A correct configuration is
    printed as YAML, every key with the value it has by file, environment or default, secrets
    masked. Warnings go to stderr.

    \b
    For an editor with YAML support:
      relay check --schema > relay.schema.json
      # yaml-language-server: $schema=relay.schema.json     (first line of relay.yaml)
    """
    if schema:
        from relay.config.schema import json_schema

        click.echo(json.dumps(json_schema(), indent=2))
        return
    import yaml

    from relay.config import ConfigError, as_document, load
    from relay.config.trial import try_out

    path = config_file(ctx)
    try:
        config = load(path, os.environ) if file_only else load(path, os.environ, look=try_out)
    except ConfigError as error:
        fail(str(error))
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)
    if quiet:
        return
    click.echo(yaml.safe_dump(as_document(config), sort_keys=False, allow_unicode=True), nl=False)
