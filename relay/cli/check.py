"""`relay check`: what is wrong with a configuration, and with the machine it is for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pwd import struct_passwd

    from relay.config import Config
    from relay.config.remark import Remark

from relay.cli.common import config_file, config_option, fail

SERVICE_USER = "relay"
"""The user of the systemd unit."""


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
    "--connect",
    is_flag=True,
    help="Also connect to the server of the queue (queue.url), and say what it is like.",
)
@click.option(
    "-q", "--quiet", is_flag=True, help="Say what is wrong, and nothing where all is well."
)
@click.option(
    "--user",
    metavar="NAME",
    help="As root: judge with this user's rights "
    "[default: relay, the service's, for /etc/relay/relay.yaml].",
)
@config_option
@click.pass_context
def check(
    ctx: click.Context,
    /,
    file_only: bool,
    schema: bool,
    connect: bool,
    quiet: bool,
    user: str | None,
) -> None:
    """Say what is wrong with the configuration, or print all of it as it is in effect.

    Every mistake is named at once, with file, line, key and cure; the exit status is 1
    then. The check also finds what only a start would show: ports in use, certificates and
    keys that cannot be used or have expired, directories and files that the relay may not
    write (for root, also those that the unit relay.service keeps from it), a queue that
    another relay uses. A correct configuration is printed as YAML: every key with its value
    from file, environment or default; secrets are masked. Warnings go to stderr.

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

    from relay.config import ConfigError, as_document, consider, load
    from relay.config.trial import acting_as, try_start
    from relay.config.unit import beyond_unit

    path = config_file(ctx)
    judge = _judge(path, user)
    unit = _unit_settings() if judge and user is None and not file_only else {}

    def look(config: Config) -> Iterator[Remark]:
        yield from (consider if file_only else try_start)(config)
        yield from beyond_unit(config, unit)

    try:
        with acting_as(judge) if judge else contextlib.nullcontext():
            config = load(path, os.environ, look=look)
    except ConfigError as error:
        fail(str(error))
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)
    if connect:
        _connect(config)
    if quiet:
        return
    click.echo(yaml.safe_dump(as_document(config), sort_keys=False, allow_unicode=True), nl=False)


def _connect(config: Config) -> None:
    """What the server of the queue says of itself, on stderr: stdout is the configuration."""
    import asyncio

    from relay.queue.engine import describe_server
    from relay.queue.store import SpoolError

    if not config.queue.location.is_shared:
        fail("queue.url: there is none; the queue is in a directory")
    try:
        found = asyncio.run(describe_server(config.queue.location))
    except (SpoolError, OSError) as error:
        fail(f"queue.url: {error}")
    for name, value in found.items():
        click.echo(f"{name}: {value}", err=True)


def _unit_settings() -> dict[str, str]:
    """What the unit of the service says of the file system; nothing where no systemd answers."""
    from relay.config.unit import UNIT, UNIT_SETTINGS, read_settings

    command = ["systemctl", "show", f"--property={','.join(UNIT_SETTINGS)}", UNIT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return read_settings(done.stdout)


def _judge(path: Path, named: str | None) -> struct_passwd | None:
    """The user whose rights are checked; None: the user who runs the command."""
    import pwd

    from relay.config import MACHINE_FILE

    name = named or (SERVICE_USER if os.geteuid() == 0 and path == MACHINE_FILE else None)
    try:
        found = pwd.getpwnam(name) if name is not None else None
    except KeyError:
        if named is None:
            return None
        raise click.BadParameter(f"no user {named}", param_hint="--user") from None
    if found is None or found.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise click.UsageError("only root can judge as another user")
    return found
