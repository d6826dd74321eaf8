"""What a message asks for besides security: when to send it, tags, signature, test mode. Pure.

Over HTTP these are parameters (`relay.api.mailgun`). Over HTTP and SMTP they are header fields with
Mailgun's names, which the relay removes before the message goes on:

    X-Mailgun-Deliver-By      o:deliverytime      a date of RFC 5322, at most seven days ahead
    X-Mailgun-Deliver-Within  o:deliver-within    a duration such as 1h30m, from 5m to 24h
    X-Mailgun-Drop-Message    o:testmode          yes: accepted, reported as delivered, not sent
    X-Mailgun-Dkim            o:dkim              no: without a DKIM signature by the relay
    X-Mailgun-Tag             o:tag               may repeat
    X-Mailgun-Variables       v:                  a JSON object, included in each event

`relay.mail.section` lists these names. It also lists the fields that ask for something the relay
does not support: the relay refuses such a message, as it refuses a value that it does not
understand. The fields in `IGNORED` have no effect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import TypeVar

from relay.mail.dates import read_date
from relay.mail.record import record
from relay.mail.section import NOT_SUPPORTED, FoundField, HeaderSection
from relay.policy.fields import NO_WISHES, BadField, Wishes, read_wishes, yes_or_no
from relay.queue.entry import Terms
from relay.queue.summary import decoded, readable

MAX_OPTIONS_OCTETS = 16 * 1024
"""The limit for all options of a message together."""

_MAX_TAGS = 10
_MAX_TAG_CHARS = 128
_LATEST = timedelta(days=7)
_SHORTEST, _LONGEST = timedelta(minutes=5), timedelta(hours=24)
_WITHIN = re.compile(r"(?:([0-9]{1,3})h)?(?:([0-9]{1,5})m)?(?:([0-9]{1,6})s)?")

T = TypeVar("T")


@record(frozen=True, slots=True)
class Options:
    """What a message asks for; None or empty where it does not ask."""

    wishes: Wishes = NO_WISHES
    deliver_at: datetime | None = None
    deliver_within: timedelta | None = None
    is_test: bool | None = None
    is_signed: bool | None = None
    tags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()

    def due(self, now: datetime) -> datetime:
        """When to send the message: never in the past."""
        return now if self.deliver_at is None else max(self.deliver_at, now)

    def terms(self, now: datetime) -> Terms:
        """The options in the form that the queue keeps."""
        due = self.due(now)
        return Terms(
            not_before=due if due > now else None,
            lifetime=self.deliver_within,
            tags=self.tags,
            variables=self.variables,
            is_test=self.is_test or False,
            is_signed=self.is_signed is not False,
        )


NO_OPTIONS = Options()


class Contradiction(ValueError):
    """Two options with the same name have different values. `name`: of the HTTP parameter."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} contradicts itself")
        self.name = name


def read_options(section: HeaderSection, now: datetime) -> Options:
    """What the fields of a header section ask for. `BadField` where the relay cannot obey one."""
    if not section.asking:
        return NO_OPTIONS
    asked = Options(read_wishes(section))
    octets = 0
    for found in section.asking:
        read = _READERS.get(found.meant)
        if read is None and found.meant not in NOT_SUPPORTED:
            continue  # a policy field
        octets += len(found.value)
        try:
            if octets > MAX_OPTIONS_OCTETS:
                raise ValueError("makes more than 16 KB of options")
            if decoded(found.value).strip() and read is None:
                raise ValueError("is not supported by this relay")
            asked = combined(asked, read(found, now)) if read is not None else asked
        except Contradiction:
            complaint = "contradicts an earlier field"
            raise BadField(found.name, found.value, complaint) from None
        except ValueError as error:
            raise BadField(found.name, found.value, str(error)) from None
    return asked


def combined(first: Options, second: Options) -> Options:
    """Two sets of options joined; `Contradiction` where they have different values."""
    return Options(
        Wishes(
            _one_value(first.wishes.require_tls, second.wishes.require_tls, "o:require-tls"),
            _one_value(
                first.wishes.skip_verification,
                second.wishes.skip_verification,
                "o:skip-verification",
            ),
        ),
        _one_value(first.deliver_at, second.deliver_at, "o:deliverytime"),
        _one_value(first.deliver_within, second.deliver_within, "o:deliver-within"),
        _one_value(first.is_test, second.is_test, "o:testmode"),
        _one_value(first.is_signed, second.is_signed, "o:dkim"),
        unique_tags((*first.tags, *second.tags)),
        _joined(first.variables, second.variables),
    )


# --- values -------------------------------------------------------------------------------------


def delivery_time(text: str, now: datetime) -> datetime | None:
    """The date in a text, None for an empty text; ValueError says what is wrong."""
    if not text.strip():
        return None
    try:
        at = read_date(text)
    except ValueError:
        raise ValueError("is not an RFC 5322 date") from None
    if at > now + _LATEST:
        raise ValueError("is more than 7 days in the future")
    return at


def deliver_within(text: str) -> timedelta | None:
    """The duration in a text, None for an empty text; ValueError says what is wrong."""
    if not text.strip():
        return None
    match = _WITHIN.fullmatch(text.strip())
    hours, minutes, seconds = (
        int(part or 0) for part in (match.groups() if match else ()) or (0, 0, 0)
    )
    within = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if match is None or not _SHORTEST <= within <= _LONGEST:
        raise ValueError("is not a duration from 5m to 24h")
    return within


def unique_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Each tag once; ValueError where there are too many, or one is too long."""
    unique = tuple(dict.fromkeys(tag for tag in tags if tag))
    if len(unique) > _MAX_TAGS or any(len(tag) > _MAX_TAG_CHARS for tag in unique):
        raise ValueError(f"at most {_MAX_TAGS} tags of {_MAX_TAG_CHARS} characters")
    return unique


def _one_value(first: T | None, second: T | None, name: str) -> T | None:
    if first is not None and second is not None and first != second:
        raise Contradiction(name)
    return second if first is None else first


def _joined(
    first: tuple[tuple[str, str], ...], second: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    if not (first and second):
        return first or second
    values = dict(first)
    for name, value in second:
        if values.setdefault(name, value) != value:
            raise Contradiction(f"v:{name}")
    return tuple(values.items())


# --- fields -------------------------------------------------------------------------------------


def _yes_or_no(found: FoundField) -> bool:
    truth = yes_or_no(found.value.replace(b"\r\n", b""))
    if truth is None:
        raise ValueError("is neither yes nor no")
    return truth


def _variables(found: FoundField) -> tuple[tuple[str, str], ...]:
    text = decoded(found.value).strip()
    if not text:
        return ()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    variables = tuple((name, _as_text(one)) for name, one in value.items())
    if not all(_is_text(part) for pair in variables for part in pair):
        raise ValueError("has half of a surrogate pair in it")
    return variables


def _is_text(text: str) -> bool:
    """Whether the text contains no lone surrogate."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _as_text(value: object) -> str:
    """The value of a variable as text: a JSON value that is no string keeps its JSON form."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


_READERS: Mapping[bytes, Callable[[FoundField, datetime], Options]] = {
    b"X-Mailgun-Deliver-By": lambda found, now: Options(
        deliver_at=delivery_time(decoded(found.value), now)
    ),
    b"X-Mailgun-Deliver-Within": lambda found, _: Options(
        deliver_within=deliver_within(decoded(found.value))
    ),
    b"X-Mailgun-Drop-Message": lambda found, _: Options(is_test=_yes_or_no(found)),
    b"X-Mailgun-Dkim": lambda found, _: Options(is_signed=_yes_or_no(found)),
    b"X-Mailgun-Tag": lambda found, _: Options(tags=unique_tags([readable(found.value)])),
    b"X-Mailgun-Variables": lambda found, _: Options(variables=_variables(found)),
}
