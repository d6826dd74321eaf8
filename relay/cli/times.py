"""Reads and shows times of the command line: ISO 8601, with the zone."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime, timedelta

import click

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


def since(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """A time (2030-01-31, 2030-01-31T12:00, …+01:00) or an age (2h). Without a zone: local."""
    from relay.config.quantities import parse_duration

    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return datetime.now(UTC) - parse_duration(value)
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError):
        text = f"{value!r} is neither an age such as 2h nor a time such as 2030-01-31T12:00"
        raise click.BadParameter(text, ctx, param) from None


def until(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """The same; a day without a time means the end of that day."""
    found = since(ctx, param, value)
    if found is None or value is None or not _DATE.fullmatch(value):
        return found
    next_day = datetime.fromisoformat(value) + timedelta(days=1)
    return next_day.astimezone() - timedelta(microseconds=1)


def time_text(at: datetime) -> str:
    """`2030-01-31T12:00:00+01:00`."""
    return at.astimezone().isoformat(timespec="seconds")
