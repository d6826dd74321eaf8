"""A message as Mailgun's HTTP interface asks for one: its form read into an `Order`. Pure.

What the form has to hold, what its options mean, and the words in which a mistake is refused
are Mailgun's (its public API, v3), so that clients written for it need not be changed:

    from, to, cc, bcc, subject, text, html, amp-html        the message
    attachment, inline                                      files
    h:Name                                                  a header field
    v:name                                                  a variable, told with each event
    o:require-tls, o:skip-verification                      what the message says of its security
    o:deliverytime, o:deliver-within, o:testmode, o:tag     how it is to be sent

What would send something else than its author meant is refused (`template`,
`recipient-variables`); options about tracking and the like have nothing to act on and are
passed over.

The envelope. The reverse-path is the From address where that is in the domain the message is
sent under, since its owner wants to hear of failures. Otherwise it is that domain's postmaster
(RFC 5321 §4.5.1): policy and SPF go by the reverse-path, and the caller was authorised for this
domain and no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from relay.mail.address import AddressError, domain_of, normalise_domain, parse_path
from relay.mail.envelope import Recipient
from relay.policy.fields import Wishes, truth_of
from relay.queue.entry import Terms

__all__ = [
    "MAX_OPTIONS_OCTETS",
    "ApiError",
    "File",
    "Form",
    "Mailbox",
    "Order",
    "header_fields",
    "mailboxes",
    "read_order",
    "sending_domain",
]

MAX_OPTIONS_OCTETS = 16 * 1024
"""Of options, header fields and variables together."""

_MAX_TAGS = 10
_MAX_TAG_CHARS = 128
_LATEST = timedelta(days=7)
_SHORTEST, _LONGEST = timedelta(minutes=5), timedelta(hours=24)

_WITHIN = re.compile(r"(?:(\d{1,3})h)?(?:(\d{1,5})m)?(?:(\d{1,6})s)?")
_FIELD_NAME = re.compile(r"[!-9;-~]{1,76}")
_NOT_YOURS = frozenset({"from", "bcc", "mime-version", "received", "return-path"})
_UNSUPPORTED = ("template", "recipient-variables")


class ApiError(Exception):
    """What the client is told: an HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class File:
    """A part of a form that came as a file. `name`: attachment, inline or message."""

    name: str
    filename: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Form:
    """A form as it came: its fields in order, a name maybe more than once, and its files."""

    fields: tuple[tuple[str, str], ...]
    files: tuple[File, ...] = ()

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return [value for field, value in self.fields if field == name]

    def first(self, name: str) -> str | None:
        """The first value of a field, None where there is no such field."""
        return next(iter(self.all(name)), None)

    def after(self, prefix: str) -> list[tuple[str, str]]:
        """Name (without the prefix) and value of every field whose name begins with it."""
        return [
            (field[len(prefix) :], value)
            for field, value in self.fields
            if field.startswith(prefix)
        ]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox of an address field (RFC 5322 §3.4). `name` may be ""."""

    name: str
    address: str
    domain: str


@dataclass(frozen=True, slots=True)
class Order:
    """What a form asks to be sent, apart from the content."""

    reverse_path: str
    recipients: tuple[Recipient, ...]
    wishes: Wishes
    terms: Terms
    due: datetime

    @property
    def smtputf8(self) -> bool:
        """Whether an address of the envelope is beyond ASCII (RFC 6531 §3.3)."""
        return not (
            self.reverse_path.isascii() and all(one.address.isascii() for one in self.recipients)
        )


def sending_domain(text: str, allowed: Sequence[str] = (), *, named: bool = False) -> str:
    """The domain of a path, normalised; `allowed` empty: any that is one. 404 otherwise, `named` or not."""
    try:
        domain = normalise_domain(text)
    except AddressError:
        domain = ""
    if (
        not domain
        or domain.startswith("[")
        or "." not in domain
        or (allowed and domain not in allowed)
    ):
        raise ApiError(404, f"Domain not found: {_shown(text)}" if named else "Domain not found")
    return domain


def read_order(
    form: Form,
    *,
    domain: str,
    now: datetime,
    max_recipients: int,
    recipient_fields: Iterable[str] = ("to", "cc", "bcc"),
    sender: str | None = None,
) -> Order:
    """Envelope and options of a form. `sender`: the From address where the form need not name one."""
    author = form.first("from") or sender
    if not author:
        raise ApiError(400, "from parameter is missing")
    if not any(value.strip() for value in form.all("to")):
        raise ApiError(400, "to parameter is missing")
    for name in _UNSUPPORTED:
        if form.first(name):
            raise ApiError(400, f"{name} parameter is not supported by this relay")
    _check_size(form)
    recipients = _recipients(form, recipient_fields, max_recipients)
    due = _delivery_time(form.first("o:deliverytime"), now)
    return Order(
        reverse_path=_reverse_path(author, domain),
        recipients=recipients,
        wishes=Wishes(_agreed(form, "o:require-tls"), _agreed(form, "o:skip-verification")),
        terms=Terms(
            not_before=due if due > now else None,
            lifetime=_deliver_within(form.first("o:deliver-within")),
            tags=_tags(form.all("o:tag")),
            variables=tuple(form.after("v:")),
            is_test=_agreed(form, "o:testmode") or False,
        ),
        due=due,
    )


def header_fields(form: Form) -> list[tuple[str, str]]:
    """The header fields a form asks for, in order; what would break the message is refused."""
    fields = form.after("h:")
    for name, value in fields:
        lower = name.lower()
        if not _FIELD_NAME.fullmatch(name) or lower in _NOT_YOURS or lower.startswith("content-"):
            raise ApiError(400, f"h:{_shown(name)} is not a header field that can be set")
        if any(c in value for c in "\r\n\0"):
            raise ApiError(400, f"h:{_shown(name)} has a line break in it")
    return fields


def mailboxes(text: str, parameter: str) -> list[Mailbox]:
    """The mailboxes of a comma list; 400 naming the parameter where one cannot be read."""
    found = []
    for piece in _pieces(text):
        if piece.strip():
            found.append(_mailbox(piece.strip(), parameter))
    return found


def _check_size(form: Form) -> None:
    prefixed = [pair for prefix in ("o:", "h:", "v:", "t:") for pair in form.after(prefix)]
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in prefixed)
    if size > MAX_OPTIONS_OCTETS:
        raise ApiError(400, "o:, h: and v: parameters are larger than 16 KB together")


def _recipients(form: Form, names: Iterable[str], most: int) -> tuple[Recipient, ...]:
    """Everybody named, each once, however often."""
    found: dict[str, Recipient] = {}
    for name in names:
        for value in form.all(name):
            for mailbox in mailboxes(value, name):
                found.setdefault(mailbox.address, Recipient(mailbox.address, mailbox.domain))
                if len(found) > most:
                    raise ApiError(400, f"Too many recipients, max is {most}")
    if not found:
        raise ApiError(400, "to parameter is missing")
    return tuple(found.values())


def _reverse_path(author: str, domain: str) -> str:
    boxes = mailboxes(author, "from")
    if len(boxes) != 1:
        raise _not_an_address("from")
    return boxes[0].address if boxes[0].domain == domain else f"postmaster@{domain}"


def _agreed(form: Form, name: str) -> bool | None:
    """A yes or no; said twice it has to be the same."""
    agreed: bool | None = None
    for value in form.all(name):
        truth = truth_of(value.encode())
        if truth is None:
            raise ApiError(400, f"{name} is neither yes nor no: {_shown(value)}")
        if agreed not in (None, truth):
            raise ApiError(400, f"{name} contradicts itself")
        agreed = truth
    return agreed


def _delivery_time(text: str | None, now: datetime) -> datetime:
    """When the message is due: at once, or at a date of RFC 5322 at most seven days ahead."""
    if text is None or not text.strip():
        return now
    try:
        at = parsedate_to_datetime(text.strip())
        at = (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        raise ApiError(400, f"o:deliverytime is not an RFC 5322 date: {_shown(text)}") from None
    if at > now + _LATEST:
        raise ApiError(400, "o:deliverytime is more than 7 days in the future")
    return max(at, now)


def _deliver_within(text: str | None) -> timedelta | None:
    if text is None or not text.strip():
        return None
    match = _WITHIN.fullmatch(text.strip())
    hours, minutes, seconds = (
        int(part or 0) for part in (match.groups() if match else ()) or (0, 0, 0)
    )
    within = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    if match is None or not _SHORTEST <= within <= _LONGEST:
        raise ApiError(400, f"o:deliver-within is not a duration from 5m to 24h: {_shown(text)}")
    return within


def _tags(tags: Sequence[str]) -> tuple[str, ...]:
    unique = tuple(dict.fromkeys(tag for tag in tags if tag))
    if len(unique) > _MAX_TAGS or any(len(tag) > _MAX_TAG_CHARS for tag in unique):
        raise ApiError(400, f"o:tag: at most {_MAX_TAGS} tags of {_MAX_TAG_CHARS} characters")
    return unique


def _pieces(text: str) -> Iterable[str]:
    """The text divided at the commas that are in no quotes, comment or angle brackets. One pass."""
    begun, quoted, angle, comment = 0, False, False, 0
    escaped = False
    for position, char in enumerate(text):
        if escaped:
            escaped = False
        elif char == "\\" and (quoted or comment):
            escaped = True
        elif char == '"' and not comment:
            quoted = not quoted
        elif quoted:
            continue
        elif char == "(":
            comment += 1
        elif char == ")":
            comment = max(comment - 1, 0)
        elif comment:
            continue
        elif char in "<>":
            angle = char == "<"
        elif char == "," and not angle:
            yield text[begun:position]
            begun = position + 1
    yield text[begun:]


def _mailbox(piece: str, parameter: str) -> Mailbox:
    name, path = "", piece
    if piece.endswith(">"):
        name, _, path = piece[:-1].rpartition("<")
    # Nobody decodes, completes or guesses: what is no address in RFC 5321's own grammar is refused.
    try:
        address, rest = parse_path(f"<{path.strip()}>".encode(), smtputf8=True)
        domain = domain_of(address)
    except (AddressError, UnicodeEncodeError):
        raise _not_an_address(parameter) from None
    if rest or not domain or domain.startswith("["):
        raise _not_an_address(parameter)
    local = address.rpartition("@")[0]
    if local.isascii() and not address.isascii():
        address = (
            f"{local}@{domain}"  # a domain in another script has a spelling that needs no SMTPUTF8
        )
    return Mailbox(_display_name(name.strip(), parameter), address, domain)


def _display_name(text: str, parameter: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
    if any(c in text for c in "\r\n\0") or "<" in text:
        raise _not_an_address(parameter)
    return text


def _not_an_address(parameter: str) -> ApiError:
    return ApiError(
        400, f"'{parameter}' parameter is not a valid address. please check documentation"
    )


def _shown(text: str) -> str:
    """A stranger's text in an answer: cut, and nothing in it that is not to be seen."""
    cut = text[:80].encode("ascii", "backslashreplace").decode("ascii")
    return "".join(c if c.isprintable() else "?" for c in cut)
