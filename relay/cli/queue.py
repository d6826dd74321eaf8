"""`relay queue`: look at the messages the relay is responsible for, and decide about them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click

from relay.cli.common import (
    LazyGroup,
    age,
    age_text,
    answer_text,
    asked,
    config_option,
    fail,
    items_of,
    not_empty,
    size_text,
)
from relay.mail.jsontext import JsonDocument, to_json
from relay.mail.printable import printable

F = TypeVar("F", bound=Callable[..., object])

_STATES = ("queued", "deferred", "held")
_COLOURS = {"queued": "cyan", "deferred": "yellow", "held": "magenta", "delivered": "green"}


def _filters(command: F) -> F:
    """The options that select messages; a message has to match all of them."""
    for option in (
        click.option("--state", type=click.Choice(_STATES), help="With a recipient in this state."),
        click.option(
            "--older-than",
            callback=age,
            metavar="AGE",
            help="Arrived longer ago than this (30m, 4h, 2d).",
        ),
        click.option(
            "--sender",
            callback=not_empty,
            metavar="ADDRESS",
            help='From this sender ("<>": the null reverse-path).',
        ),
        click.option(
            "--domain",
            callback=not_empty,
            metavar="DOMAIN",
            help="With a recipient in this domain.",
        ),
    ):
        command = option(command)
    return command


def _request(
    verb: str,
    ids: tuple[str, ...],
    domain: str | None,
    sender: str | None,
    older_than: timedelta | None,
    state: str | None,
) -> JsonDocument:
    """A request for the control socket, with the given options only."""
    from relay.admin.requests import queue_request
    from relay.queue.entry import State
    from relay.queue.store import QueueFilter

    wanted = QueueFilter(
        queue_ids=frozenset(ids),
        domain=_normal_domain(domain),
        sender=sender or "",
        older_than=older_than,
        state=State(state) if state else None,
    )
    return {"verb": verb, **queue_request(wanted)}


def _normal_domain(domain: str | None) -> str:
    from relay.mail.address import AddressError, normalise_domain

    try:
        return normalise_domain(domain) if domain is not None else ""
    except AddressError as error:
        raise click.BadParameter(f"{domain}: {error}", param_hint="--domain") from None


@click.group(
    cls=LazyGroup,
    lazy={"export": "relay.cli.queue_move:export", "import": "relay.cli.queue_move:import_"},
)
@config_option
def queue() -> None:
    """Look at the queue, and decide about what is in it.

    `list` and `show` also work while no relay is running; the others talk to the running
    one through its control socket (admin.socket). `export` and `import` open the queue
    themselves, and want the relay stopped where its queue is in a directory.
    """


@queue.command("list")
@_filters
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def list_(ctx: click.Context, /, as_json: bool, **filters: Any) -> None:
    """List messages, oldest first, each with its recipients and the result of the last attempt."""
    found = pages(asked(ctx, _request("list", (), **filters)))
    if as_json:
        _print_array(found)
    else:
        print_list(found)


@queue.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def nodes(ctx: click.Context, as_json: bool) -> None:
    """List the nodes that share the queue (queue.url), alive or not."""
    lines = list(asked(ctx, {"verb": "nodes"}))
    found = list(items_of(lines))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found:
        click.echo("the queue is this machine's alone: there are no nodes")
    for node in () if as_json else found:
        expires = node["expires-in"]
        left = "" if expires is None else f"  lease ends in {expires:.0f} s"
        facts = (node["name"], node["state"], node["version"], f"{node['claims']} claims")
        click.echo(printable("  ".join(fact for fact in facts if fact) + left))
    differing: list[str] = next((line["done"]["differing"] for line in lines if "done" in line), [])
    if differing:
        names = printable(", ".join(differing))
        click.echo(f"warning: these nodes decide by different policies: {names}", err=True)


@queue.command()
@click.argument("queue_id", metavar="ID", callback=not_empty)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def show(ctx: click.Context, queue_id: str, as_json: bool) -> None:
    """Show one message: envelope, settings and where each came from, attempts, header section."""
    page = next(pages(asked(ctx, {"verb": "show", "id": queue_id})), None)
    if page is None:
        fail(f"{queue_id}: no such message in the queue")
    [found] = page
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print_message(found)


def _verb(name: str, help_text: str) -> None:
    """Add one of the operator's verbs to the group."""

    @queue.command(name, help=help_text)
    @click.argument("ids", metavar="[ID]...", nargs=-1, callback=not_empty)
    @_filters
    @click.option("--all", "everything", is_flag=True, help="The whole queue.")
    @click.option("--dry-run", is_flag=True, help="List the messages that are meant, change none.")
    @config_option
    @click.pass_context
    def command(
        ctx: click.Context,
        /,
        ids: tuple[str, ...],
        everything: bool,
        dry_run: bool,
        yes: bool = False,
        **filters: Any,
    ) -> None:
        request = _request(name, ids, **filters)
        if everything == (len(request) > 1):
            raise click.UsageError("name queue ids or a filter, or else say --all")
        if everything:
            request["all"] = True
        if dry_run:
            print_list(pages(asked(ctx, {**request, "verb": "list"})))
            click.echo("Nothing was changed.")
            return
        if everything and name == "remove" and not yes:
            _ask_before_removing_all()
        done = _watched(name, asked(ctx, request))
        count = done["changed"]
        click.echo(f"{name}: {count} recipient{'' if count == 1 else 's'}")
        if done["unknown"]:
            fail("\n".join(f"{one}: no such message in the queue" for one in done["unknown"]))

    if name == "remove":
        help_yes = "Do not ask before --all."
        command.params.append(click.Option(["-y", "--yes"], is_flag=True, help=help_yes))


_verb("retry", "Try messages again now, instead of when they are due.")
_verb("hold", "Set messages aside: nothing is tried until they are released.")
_verb("release", "Let held messages go on: they are due at once.")
_verb("remove", "Take messages out for good. The sender is not told; the delivery log is.")


def _ask_before_removing_all() -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("remove --all asks first; where nobody can answer, say --yes")
    question = "Remove every message of the queue for good? No sender will be told"
    click.confirm(question, abort=True, err=True)


def _watched(verb: str, lines: Iterator[JsonDocument]) -> JsonDocument:
    """The result of a verb. A person at a terminal sees the progress."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(f"{verb}:"),
        BarColumn(),
        TextColumn("{task.completed} recipients"),
        TimeElapsedColumn(),
    )
    done: JsonDocument = {}
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(verb, total=None)
        for line in lines:
            done = line.get("so-far") or line["done"]
            progress.update(bar, completed=done["changed"])
    return done


def pages(lines: Iterator[JsonDocument]) -> Iterator[list[JsonDocument]]:
    """Messages in pages; a running relay of an older version sends each message separately."""
    return (
        line.get("items") or [line["item"]] for line in lines if "items" in line or "item" in line
    )


def _print_array(found: Iterator[list[JsonDocument]]) -> None:
    """Print a JSON array page by page: a queue may be larger than memory."""
    separator = "["
    for page in found:
        sys.stdout.write(separator + ",\n ".join(map(to_json, page)))
        separator = ",\n "
    sys.stdout.write("[]\n" if separator == "[" else "]\n")


def print_list(found: Iterator[list[JsonDocument]]) -> None:
    """Print two lines or more for each message, page by page."""
    now = datetime.now(UTC)
    count = 0
    for page in found:
        count += len(page)
        click.echo("\n".join(line for item in page for line in _list_lines(item, now)))
    if count:
        click.echo(f"{count} message{'' if count == 1 else 's'}")
    else:
        click.echo("The queue is empty, or nothing in it matches.")


def _list_lines(item: JsonDocument, now: datetime) -> Iterator[str]:
    yield _message_line(item, now)
    for recipient in item["recipients"]:
        yield f"    {_recipient_line(recipient, now)}"


def _message_line(item: JsonDocument, now: datetime) -> str:
    since = age_text(now - datetime.fromisoformat(item["arrived"]))
    queue_id = click.style(item["queue-id"], bold=True)
    sender = printable(item["sender"]) or "<>"
    return (
        f"{queue_id}  {_coloured(item['state'])}  {since}  {size_text(item['size'])}  from {sender}"
    )


def _coloured(state: str) -> str:
    return click.style(state, fg=_COLOURS.get(state, "red"))


def _recipient_line(recipient: JsonDocument, now: datetime) -> str:
    """`to bob@example.net  deferred, attempt 3, next in 4m: 450 4.2.1 busy (mx1.example.net)`."""
    text = f"to {printable(recipient['address'])}  {_coloured(recipient['state'])}"
    if recipient["attempts"]:
        text += f", attempt {recipient['attempts']}"
    if recipient["next-attempt"] is not None:
        wait = datetime.fromisoformat(recipient["next-attempt"]) - now
        text += f", next in {age_text(wait)}" if wait > timedelta(0) else ", due now"
    last = recipient["last"]
    if last is not None:
        text += f": {answer_text(last['code'], last['status'], last['message'])}"
        text += f" ({printable(last['host'])})" if last["host"] else ""
    return text


def _print_message(item: JsonDocument) -> None:
    now = datetime.now(UTC)
    for name, value in (
        ("queue id", item["queue-id"]),
        ("state", item["state"]),
        ("sender", item["sender"] or "<>"),
        (
            "arrived",
            f"{item['arrived']} ({age_text(now - datetime.fromisoformat(item['arrived']))} ago)",
        ),
        ("came by", f"{item['origin']} {item['client']}".strip()),
        ("size", size_text(item["size"])),
        *([("next hop", item["next-hop"])] if item["next-hop"] else []),
    ):
        click.echo(f"{name:<10}{printable(str(value))}")
    for recipient, settings in zip(item["recipients"], item["settings"], strict=True):
        click.echo(_recipient_line(recipient, now))
        for key in ("require-tls", "skip-verification"):
            rule = f" {settings[f'{key}-rule']}" if settings[f"{key}-rule"] else ""
            by = f"{settings[f'{key}-source']}{printable(rule)}"
            click.echo(f"    {key}: {str(settings[key]).lower()}, by {by}")
    click.echo()
    for line in item["header"].replace("\r\n", "\n").rstrip("\n").split("\n"):
        click.echo(printable(line, keep="\t"))
