"""`relay queue export` and `import`: all messages of a queue to a directory, and into another."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from relay.cli.common import config_file, config_option, fail, load_config, size_text
from relay.mail.jsontext import to_json
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.queue.move import MoveResult, MovingQueue

_directory = click.argument(
    "directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path)
)
_json = click.option(
    "--json", "as_json", is_flag=True, help='As JSON, for programs: {"moved": n, "left": n}.'
)
_dry_run = click.option(
    "--dry-run", is_flag=True, help="List the messages that are meant, move none."
)


@click.command()
@_directory
@_json
@_dry_run
@config_option
@click.pass_context
def export(ctx: click.Context, /, directory: Path, as_json: bool, dry_run: bool) -> None:
    """Move all messages out of the queue, each to a file in DIR.

    A message keeps its id, its recipients' states, attempts and settings, the reports that are
    pending, and the calls that webhooks wait for. Events, statistics, webhooks and settings stay.

    A relay with a queue in a directory has to be stopped. Nodes with a queue on a server may run:
    what they are trying stays in the queue, and the exit status is 1; run it again.

    It may be cut short at any moment: run again, it goes on.
    """
    config = load_config(config_file(ctx), only_to_ask=True)
    if dry_run:
        _list_queue(config, as_json=as_json)
        return
    result = _run(config, directory, partial(_export, directory), make=False)
    _tell(result, as_json, f"to {directory}", "in the queue")


@click.command("import")
@_directory
@_json
@_dry_run
@config_option
@click.pass_context
def import_(ctx: click.Context, /, directory: Path, as_json: bool, dry_run: bool) -> None:
    """Bring the messages that an export has left in DIR into the queue.

    A relay with a queue in a directory has to be stopped. Nodes with a queue on a server may run,
    and deliver what has come at once. A file that is damaged, or whose id another message of the
    queue has, stays where it is; it is named, and the exit status is 1.

    It may be cut short at any moment: run again, it goes on, and no message comes twice.
    """
    config = load_config(config_file(ctx), only_to_ask=True)
    if dry_run:
        _list_files(directory, as_json=as_json)
        return
    result = _run(config, directory, partial(_import, directory), make=True)
    _tell(result, as_json, "into the queue", f"in {directory}")


async def _export(
    directory: Path, queue: MovingQueue, progress: Callable[[int], None]
) -> MoveResult:
    from relay.admin.webhook_calls import calls_about
    from relay.queue.move import export_queue

    about = partial(calls_about, now=datetime.now(UTC))
    return await export_queue(queue, directory, about=about, progress=progress)


async def _import(
    directory: Path, queue: MovingQueue, progress: Callable[[int], None]
) -> MoveResult:
    from relay.queue.move import import_queue

    return await import_queue(queue, directory, progress=progress)


_Work = Callable[["MovingQueue", Callable[[int], None]], Awaitable["MoveResult"]]


def _run(config: Config, directory: Path, work: _Work, *, make: bool) -> MoveResult:
    """Do it. A person at a terminal sees the progress."""
    from rich.console import Console

    from relay.queue.engine import open_to_move
    from relay.queue.store import SpoolError

    console = Console(stderr=True)

    async def run() -> MoveResult:
        queue = await open_to_move(config.queue.location, make=make)
        try:
            with console.status("moving messages") as status:
                return await work(queue, lambda count: status.update(f"moved {count} messages"))
        finally:
            await queue.close()

    try:
        return asyncio.run(run())
    except SpoolError as error:
        fail(f"{error}{_cure(config)}")
    except OSError as error:
        fail(f"{error.filename or directory}: {error.strerror or error}")


def _cure(config: Config) -> str:
    """What to do about a queue that a relay is using."""
    from relay.queue.engine import holder

    location = config.queue.location
    if location.is_shared or not holder(Path(location.path)):
        return ""
    return ": stop the relay first, and start it again afterwards"


def _list_queue(config: Config, *, as_json: bool) -> None:
    from relay.cli.common import answers
    from relay.cli.queue import pages, print_list

    found = pages(answers(config, {"verb": "list"}))
    if as_json:
        click.echo(to_json({"moved": 0, "left": sum(map(len, found))}))
        return
    print_list(found)
    click.echo("Nothing was moved.")


def _list_files(directory: Path, *, as_json: bool) -> None:
    from relay.queue.move_directory import read_files

    if not directory.is_dir():
        fail(f"{directory}: there is no such directory")
    count, damaged = 0, []
    try:
        for one in read_files(directory):
            count += 1
            if isinstance(one, str):
                damaged.append(one)
            elif not as_json:
                message = one.message
                sender = printable(message.reverse_path) or "<>"
                recipients = f"{len(message.recipients)} recipients"
                size = size_text(message.size_bytes)
                click.echo(f"{message.queue_id}  {size}  from {sender}  {recipients}")
    except OSError as error:
        fail(f"{error.filename or directory}: {error.strerror or error}")
    if as_json:
        click.echo(to_json({"moved": 0, "left": count}))
    else:
        click.echo(f"{count} message{'' if count == 1 else 's'}. Nothing was moved.")
    if damaged:
        fail("\n".join(damaged))


def _tell(result: MoveResult, as_json: bool, where: str, at: str) -> None:
    if as_json:
        click.echo(to_json({"moved": result.moved, "left": result.left}))
    else:
        text = f"{_messages(result.moved)} moved {where}"
        left = f"; {result.left} left {at}" if result.left else ""
        click.echo(printable(f"{text}{left}"))
    for reason in result.reasons:
        click.echo(printable(reason), err=True)
    if result.left or result.reasons:
        sys.exit(1)


def _messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"
