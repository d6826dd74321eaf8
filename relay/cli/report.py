"""`relay report`: how the mail of a period was protected, for an auditor."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain

import click

from relay.admin.report import Summary, count_of_json, csv_lines, summary_of
from relay.cli.common import answers, below, config_file, config_option, load_config, not_empty
from relay.cli.times import since, time_text, until
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable
from relay.queue.statistics import CountedMail

_DEFAULT_PERIOD = timedelta(days=30)


@click.command()
@click.option(
    "--sender-domain",
    callback=not_empty,
    metavar="DOMAIN",
    help='Mail from this domain ("<>": none).',
)
@click.option(
    "--recipient-domain", callback=not_empty, metavar="DOMAIN", help="Mail to this domain."
)
@click.option(
    "--since",
    "--from",
    callback=since,
    metavar="TIME",
    help="From this time or day on, or this age (2h, 90d) [default: 30d].",
)
@click.option(
    "--until", "--to", callback=until, metavar="TIME", help="Up to this time, or this day's end."
)
@click.option("--csv", "as_csv", is_flag=True, help="One table: counts, then exceptions.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@config_option
@click.pass_context
def report(
    ctx: click.Context,
    /,
    sender_domain: str | None,
    recipient_domain: str | None,
    since: datetime | None,
    until: datetime | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Say how the mail of a period was protected: how much, under which rules, every exception.

    The numbers come from hourly counts, which are kept for log.keep_statistics: longer than the
    events and the log's files. They count recipients, and for "deferred" they count attempts. A
    period is extended to whole hours of UTC. The command also works while no relay is running.
    """
    if as_csv and as_json:
        raise click.UsageError("--csv or --json, not both")
    now = datetime.now(UTC)
    request = {
        "verb": "report",
        "since": (since or now - _DEFAULT_PERIOD).astimezone(UTC).isoformat(),
        "until": (until or now).astimezone(UTC).isoformat(),
    }
    if sender_domain is not None:
        request["sender-domain"] = sender_domain
    if recipient_domain is not None:
        request["recipient-domain"] = recipient_domain
    lines = answers(load_config(config_file(ctx)), request)
    head = next(lines)["report"]
    found = [count_of_json(one) for one in head["counts"]]
    listed = chain.from_iterable(line["items"] for line in lines if "items" in line)
    if as_csv:
        sys.stdout.write(csv_lines("count", head["counts"], with_head=True))
        for one in listed:
            sys.stdout.write(csv_lines("exception", [one]))
    elif as_json:
        json.dump({**head, "exceptions": list(listed)}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _show(head, summary_of(found), found, listed)


def _show(
    head: JsonDocument,
    summary: Summary,
    found: Sequence[CountedMail],
    listed: Iterator[JsonDocument],
) -> None:
    begin, end = (datetime.fromisoformat(head[key]) for key in ("begin", "end"))
    click.echo(
        f"Mail from {printable(head['sender-domain'] or 'all domains')}"
        f" to {printable(head['recipient-domain'] or 'all domains')}"
    )
    click.echo(f"{time_text(begin)} to {time_text(end)}\n")
    if not found:
        click.echo("No mail in this period. Counts are kept for log.keep_statistics.")
        return
    for text, number, share in (
        ("Accepted", summary.accepted, None),
        ("Delivered", summary.delivered, None),
        ("  over verified TLS", summary.verified, summary.share(summary.verified)),
        ("  over TLS, not verified", summary.encrypted, summary.share(summary.encrypted)),
        ("  in clear", summary.clear, summary.share(summary.clear)),
        ("Failed for good", summary.failed, None),
        ("Attempts deferred", summary.deferred, None),
        ("  for want of the TLS required", summary.stopped, None),
    ):
        click.echo(f"{text:<32}{number:>12,}" + (f"{share:>10.1%}" if share is not None else ""))
    click.echo("\nRules in force (with the hours in which mail met them)")
    for policy, number, first, last in summary.rules:
        for part in policy.split(", "):
            click.echo(f"  {printable(part)}")
        last_end = last + timedelta(hours=1)
        click.echo(f"    {time_text(first)} to {time_text(last_end)}: {number:,} done")
    click.echo(f"\nExceptions: {summary.exceptions:,}")
    shown = 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for one in listed:
        shown += 1
        at = time_text(datetime.fromisoformat(one["at"]))
        domains = f"{printable(one['sender-domain'])} → {printable(one['recipient-domain'])}"
        click.echo(f"  {at}  {one['result']}  {domains}")
        click.echo(below(printable(one["description"]), width))
        click.echo(f"    log id {one['id']}")
    if shown < summary.exceptions:
        click.echo(
            f"  {summary.exceptions - shown:,} more were counted and not listed one by one"
            " (1,000 an hour are)"
        )
