"""`relay log`: what became of each message, from the events the store keeps."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from relay.cli.common import asked, below, config_option, not_empty
from relay.cli.times import since as _since
from relay.cli.times import time_text
from relay.cli.times import until as _until
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable
from relay.report.words import operator_text, sentence_of, shown_name

_COLOURS = {"accepted": "cyan", "delivered": "green", "deferred": "yellow", "failed": "red"}


@click.command()
@click.option(
    "-f", "--follow", is_flag=True, help="Go on with new events as they come; end with Ctrl-C."
)
@click.option("--recipient", callback=not_empty, metavar="ADDRESS", help="About this recipient.")
@click.option(
    "--sender",
    callback=not_empty,
    metavar="ADDRESS",
    help='From this sender ("<>": the null reverse-path).',
)
@click.option(
    "--recipient-domain",
    callback=not_empty,
    metavar="DOMAIN",
    help="With a recipient in this domain.",
)
@click.option("--sender-domain", callback=not_empty, metavar="DOMAIN", help="From this domain.")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice(["accepted", "delivered", "failed", "operator"]),
    help="Only events of this name; may be given more than once.",
)
@click.option("--id", "queue_id", callback=not_empty, metavar="ID", help="About this message.")
@click.option(
    "--since", callback=_since, metavar="TIME", help="Not before this time, or this age (2h, 3d)."
)
@click.option(
    "--until", callback=_until, metavar="TIME", help="Not after this time, or this day's end."
)
@click.option(
    "-n", "--lines", type=click.IntRange(1, 100_000), help="The latest so many [default: 1000]."
)
@click.option("--json", "as_json", is_flag=True, help="The events whole, one JSON object a line.")
@config_option
@click.pass_context
def log(ctx: click.Context, /, **options: Any) -> None:
    """Show the delivery log: one line for each message accepted and for each attempt.

    Events are kept for log.keep_events; the file log.delivery has them all. The command also
    works while no relay is running, except for --follow. A search ignores the case of addresses
    and domains; times without a zone are local. For older mail use relay report.
    """
    as_json = options.pop("as_json")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    try:
        for line in _lines(asked(ctx, _request(**options), patient=options["follow"])):
            click.echo(line if as_json else _for_people(json.loads(line), width))
    except KeyboardInterrupt:
        return


def _lines(found: Iterator[JsonDocument]) -> Iterator[str]:
    return (answer["line"] for answer in found if "line" in answer)


def _request(
    follow: bool,
    recipient: str | None,
    sender: str | None,
    events: tuple[str, ...],
    queue_id: str | None,
    recipient_domain: str | None,
    sender_domain: str | None,
    since: datetime | None,
    until: datetime | None,
    lines: int | None,
) -> JsonDocument:
    said: JsonDocument = {
        "follow": follow or None,
        "recipient": recipient,
        "sender": sender,
        "events": list(events) or None,
        "id": queue_id,
        "recipient-domain": recipient_domain,
        "sender-domain": sender_domain,
        "until": until.astimezone(UTC).isoformat() if until is not None else None,
        "since": since.astimezone(UTC).isoformat() if since is not None else None,
        "limit": lines if lines is not None or since is not None else 1000,
    }
    return {"verb": "log", **{key: value for key, value in said.items() if value is not None}}


def _for_people(event: JsonDocument, width: int = 0) -> str:
    """`2030-01-31T12:00:00+01:00  delivered  ID  a@… → b@…  TLS verified, mx1…: 250 2.0.0 OK`.

    Of a queue that several nodes share, the node comes last. In a narrower terminal, addresses and
    sentence go to lines of their own, indented.
    """
    at = datetime.fromtimestamp(event["timestamp"], UTC)
    if event["event"] == "operator":
        where = f"  at {printable(event['node'])}" if event.get("node") else ""
        return f"{time_text(at)}  operator   {printable(operator_text(event))}{where}"
    shown = shown_name(event)
    envelope = event["envelope"]
    head = f"{time_text(at)}  {{}}  {event['queue-id']}"
    parts = [
        f"{printable(envelope['sender']) or '<>'} → {printable(envelope['targets'])}",
        printable(again_text(event)),
        f"at {printable(event['node'])}" if event.get("node") else "",
    ]
    parts = [part for part in parts if part]
    name = click.style(f"{shown:<9}", fg=_COLOURS.get(shown, "white"))
    line = "  ".join([head.format(f"{shown:<9}"), *parts])
    if not width or len(line) <= width:
        return "  ".join([head.format(name), *parts])
    return "\n".join([head.format(name), *(below(part, width) for part in parts)])


def again_text(event: JsonDocument) -> str:
    """The result of an attempt, and when the next one is due."""
    text = sentence_of(event)
    seconds = event.get("delivery-status", {}).get("retry-seconds")
    return f"{text}, again in {timedelta(seconds=seconds)}" if seconds else text
