"""Reads the form of a message in Mailgun's HTTP interface into a `SendRequest`. Pure.

The parameters, the meaning of the options and the words of refusals are Mailgun's (its public API,
v3), so that clients written for it work without a change:

    from, to, cc, bcc, subject, text, html, amp-html        the message
    attachment, inline                                      files
    h:Name                                                  a header field
    v:name                                                  a variable, which each event has
    o:require-tls, o:skip-verification                      the settings of the message
    o:deliverytime, o:deliver-within, o:testmode, o:tag,
    o:dkim                                                  how it is sent

`mailgun_parameters` has the list of all parameters, and what the relay does with each.

The reverse-path is the From address if that is in the domain of the request's path, so that its
owner gets reports. Otherwise it is the postmaster of that domain (RFC 5321 §4.5.1): policy and SPF
depend on the reverse-path, and the key was checked for this domain and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TypeVar

from relay.api.mailgun_addresses import Mailbox, authors, mailboxes
from relay.api.mailgun_form import ApiError, Form, shown
from relay.mail.address import AddressError, normalise_domain
from relay.mail.envelope import Recipient
from relay.policy.fields import Wishes, yes_or_no
from relay.submit.message import HEADER_SECTION_OCTETS
from relay.submit.options import (
    MAX_OPTIONS_OCTETS,
    Options,
    deliver_within,
    delivery_time,
    unique_tags,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Envelope and options of the message that a form asks for."""

    reverse_path: str
    recipients: tuple[Recipient, ...]
    options: Options

    @property
    def smtputf8(self) -> bool:
        """Whether an address of the envelope is not ASCII (RFC 6531 §3.3)."""
        return not (
            self.reverse_path.isascii() and all(one.address.isascii() for one in self.recipients)
        )


def sending_domain(text: str, allowed: Sequence[str] = (), *, named: bool = False) -> str:
    """The domain of a path, normalised. 404 where it is none, or is not `allowed` (empty: all are).

    `named`: the answer repeats the domain.
    """
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
        raise ApiError(404, f"Domain not found: {shown(text)}" if named else "Domain not found")
    return domain


def read_send_request(
    form: Form, *, domain: str, now: datetime, max_recipients: int, sender: str | None = None
) -> SendRequest:
    """Envelope and options of a form. `sender`: the From address of a form without `from`."""
    named = [value for value in form.all("from") if value.strip()] or ([sender] if sender else [])
    if not named:
        raise ApiError(400, "from parameter is missing")
    if not any(value.strip() for value in form.all("to")):
        raise ApiError(400, "to parameter is missing")
    _check_size(form)
    return SendRequest(
        recipients=_recipients(form, ("to", "cc", "bcc"), max_recipients),
        reverse_path=_reverse_path(authors(named), domain),
        options=Options(
            wishes=Wishes(_agreed(form, "o:require-tls"), _agreed(form, "o:skip-verification")),
            deliver_at=_option(form, "o:deliverytime", partial(delivery_time, now=now)),
            deliver_within=_option(form, "o:deliver-within", deliver_within),
            is_test=_agreed(form, "o:testmode"),
            is_signed=_agreed(form, "o:dkim"),
            tags=_tags(form.all("o:tag")),
            variables=tuple(form.after("v:")),
        ),
    )


def _check_size(form: Form) -> None:
    """Check the size of all fields that go into the header section, before one is read."""
    for names in (("from", "to", "cc", "subject"), ("bcc",)):
        if sum(len(value) for name in names for value in form.all(name)) > HEADER_SECTION_OCTETS:
            raise ApiError(413, f"{' and '.join(names)}: more than 1 MiB together")
    prefixed = [pair for prefix in ("o:", "h:", "v:", "t:") for pair in form.after(prefix)]
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in prefixed)
    if size > MAX_OPTIONS_OCTETS:
        raise ApiError(400, "o:, h: and v: parameters are larger than 16 KB together")


def _recipients(form: Form, names: Iterable[str], most: int) -> tuple[Recipient, ...]:
    """All recipients, each once."""
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


def _reverse_path(boxes: Sequence[Mailbox], domain: str) -> str:
    own = [box.address for box in boxes if box.domain == domain]
    return own[0] if own else f"postmaster@{domain}"


def _agreed(form: Form, name: str) -> bool | None:
    """Yes, no, or None without the parameter. Two values have to be the same."""
    agreed: bool | None = None
    for value in form.all(name):
        truth = yes_or_no(value.encode())
        if truth is None:
            raise ApiError(400, f"{name} is neither yes nor no: {shown(value)}")
        if agreed not in (None, truth):
            raise ApiError(400, f"{name} contradicts itself")
        agreed = truth
    return agreed


def _option(form: Form, name: str, read: Callable[[str], T | None]) -> T | None:
    """The value of an option, None without one."""
    text = form.first(name)
    if text is None:
        return None
    try:
        return read(text)
    except ValueError as error:
        raise ApiError(400, f"{name} {error}: {shown(text)}") from None


def _tags(tags: Sequence[str]) -> tuple[str, ...]:
    try:
        return unique_tags(tags)
    except ValueError as error:
        raise ApiError(400, f"o:tag: {error}") from None
