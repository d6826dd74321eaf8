"""`relay log`: what became of each message, from the events the store keeps."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from relay.cli.common import (
    answer_text,
    answers,
    config_file,
    config_option,
    filled,
    load_config,
    printable,
)
from relay.mail.outcome import Code

__all__ = ["log"]

_COLOURS = {"accepted": "cyan", "delivered": "green", "temporary": "yellow", "permanent": "red"}


def _since(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """A time (2030-01-31, 2030-01-31T12:00) or an age (2h)."""
    from relay.config.words import parse_duration

    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return datetime.now(UTC) - parse_duration(value)
    try:
        return datetime.fromisoformat(value).astimezone()
    except ValueError:
        text = f"{value!r} is neither an age such as 2h nor a time such as 2030-01-31T12:00"
        raise click.BadParameter(text, ctx, param) from None


@click.command()
@click.option(
    "-f", "--follow", is_flag=True, help="Go on with new events as they come; end with Ctrl-C."
)
@click.option("--recipient", callback=filled, metavar="ADDRESS", help="About this recipient.")
@click.option(
    "--sender",
    callback=filled,
    metavar="ADDRESS",
    help='From this sender ("<>": the null reverse-path).',
)
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice(["accepted", "delivered", "failed"]),
    help="Only events of this name; may be given more than once.",
)
@click.option("--id", "queue_id", callback=filled, metavar="ID", help="About this message.")
@click.option(
    "--since", callback=_since, metavar="TIME", help="Not before this time, or this age (2h, 3d)."
)
@click.option(
    "-n", "--lines", type=click.IntRange(1, 100_000), help="The latest so many [default: 1000]."
)
@click.option("--json", "as_json", is_flag=True, help="The events whole, one JSON object a line.")
@config_option
@click.pass_context
def log(ctx: click.Context, /, **options: Any) -> None:
    """Show the delivery log: one line for each message accepted and for each attempt.

    Events are kept for log.keep_events; the file log.delivery has them all. Works while no
    relay is running, too, except for --follow.
    """
    config = load_config(config_file(ctx))
    as_json = options.pop("as_json")
    try:
        for line in _lines(answers(config, _request(**options), patient=options["follow"])):
            click.echo(line if as_json else _for_people(json.loads(line)))
    except KeyboardInterrupt:
        return


def _lines(found: Iterator[dict[str, Any]]) -> Iterator[str]:
    return (answer["line"] for answer in found if "line" in answer)


def _request(
    follow: bool,
    recipient: str | None,
    sender: str | None,
    events: tuple[str, ...],
    queue_id: str | None,
    since: datetime | None,
    lines: int | None,
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "follow": follow or None,
        "recipient": recipient,
        "sender": sender,
        "events": list(events) or None,
        "id": queue_id,
        "since": since.astimezone(UTC).isoformat() if since is not None else None,
        "limit": lines if lines is not None or since is not None else 1000,
    }
    return {"verb": "log", **{key: value for key, value in said.items() if value is not None}}


def _for_people(event: dict[str, Any]) -> str:
    """`2030-01-31 12:00:00  delivered  ID  a@… → b@…  TLS verified, mx1.example.net: 250 2.0.0 OK`."""
    at = datetime.fromtimestamp(event["timestamp"], UTC).astimezone()
    name = event["event"]
    shown = {"temporary": "deferred", "permanent": "failed"}.get(event.get("severity", ""), name)
    colour = _COLOURS.get(event.get("severity", name), "white")
    envelope = event["envelope"]
    text = (
        f"{at:%Y-%m-%d %H:%M:%S}  {click.style(f'{shown:<9}', fg=colour)}  {event['queue-id']}  "
        f"{printable(envelope['sender']) or '<>'} → {printable(envelope['targets'])}"
    )
    status = event.get("delivery-status")
    return f"{text}  {_status_text(status, _way_text(event))}" if status else text


def _status_text(status: dict[str, Any], way: str) -> str:
    text = answer_text(
        status["code"], status["enhanced-code"], status["message"] or status["description"]
    )
    if status.get("mx-host"):
        text = f"{way}, {printable(status['mx-host'])}: {text}"
    if status.get("retry-seconds"):
        text += f" (again in {timedelta(seconds=status['retry-seconds'])})"
    return text


def _way_text(event: dict[str, Any]) -> str:
    """How the message went, or that it did not: what is said of a session is not said of a message."""
    status = event["delivery-status"]
    if event["event"] == "failed":
        if _lacks_tls(event):
            return "not sent: TLS required"
        if status.get("last-code", status["code"]) == Code.NO_CONNECTION:
            return "not sent"
    if not status["tls"]:
        return "in clear"
    return "TLS verified" if status["certificate-verified"] else "TLS unverified"


def _lacks_tls(event: dict[str, Any]) -> bool:
    """Whether the host had not the TLS that the message needs: its 4.7.5 by a reply is the host's
    own.
    """
    status = event["delivery-status"]
    if event["policy"]["require-tls"] and not status["tls"]:
        return bool(status.get("last-code", status["code"]) != Code.NO_CONNECTION)
    detail = status["enhanced-code"].partition(".")[2]
    return bool(detail == "7.4" or (detail == "7.5" and status["code"] == Code.NONE))
