"""A header section judged and rewritten, and the message as the queue will hold it. Pure.

Whichever door a message comes in by, this is what becomes of it: policy fields are read and
taken off, the settings of each recipient domain are resolved and fixed, our Received field goes
on top. What speaks against a message is a `Refusal`:

    552 5.3.4   the header section is too large
    554 5.6.0   a policy field that says neither yes nor no, is not written as it has to be, or
                stands behind the end of the header section
    554 5.4.6   too many Received fields
    452, 451    trouble of our own: `OUT_OF_ROOM`, `OUR_TROUBLE`, never a 5yz
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from relay.mail.envelope import Recipient
from relay.mail.reply import Reply
from relay.mail.section import HeaderSection
from relay.policy.fields import NO_WISHES, BadField, Wishes, read_wishes, refuse_displaced
from relay.policy.rules import PolicyRules, resolve
from relay.policy.settings import TlsSettings
from relay.queue.entry import MessageSummary, QueuedRecipient
from relay.queue.summary import summarise

__all__ = [
    "AT_ONCE_OCTETS",
    "HEADER_SECTION_OCTETS",
    "HEADER_TOO_LARGE",
    "OUR_TROUBLE",
    "OUT_OF_ROOM",
    "Refusal",
    "Screened",
    "open_header",
    "queued_recipients",
    "refuse",
]

HEADER_SECTION_OCTETS = 1024 * 1024
"""A header section is kept in memory whole while it is judged."""

AT_ONCE_OCTETS = 64 * 1024
"""What is larger is judged, or composed, in a thread, where it keeps nobody else waiting."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """No. `reply` is for the client, `reason` for our log; with `closes` the session ends too."""

    reply: Reply
    reason: str
    closes: bool = False


def refuse(code: int, status: str, text: str, reason: str = "") -> Refusal:
    """A refusal whose reason is what the client is told, unless another is given."""
    return Refusal(Reply(code, status, text), reason or text)


OUT_OF_ROOM = refuse(
    452, "4.3.1", "No room for more mail now, try again later", "the queue is full"
)
OUR_TROUBLE = refuse(451, "4.3.0", "Trouble of our own, try again later", "the store failed")
HEADER_TOO_LARGE = refuse(552, "5.3.4", "The header section is too large")
_LOOP = refuse(554, "5.4.6", "Too many hops: this message is going round in circles")


@dataclass(frozen=True, slots=True)
class Screened:
    """A message whose header section was judged: what goes before its body, and what was decided."""

    queue_id: str
    header: bytes
    summary: MessageSummary
    settings: dict[str, TlsSettings]
    arrived: datetime


def open_header(
    section: HeaderSection,
    *,
    reverse_path: str,
    domains: Collection[str],
    rules: PolicyRules,
    received_hops: int,
    on_top: bytes,
    queue_id: str,
    now: datetime,
    options: Wishes = NO_WISHES,
    displaced: bytes = b"",
    removed: Collection[bytes] = (),
) -> Screened | Refusal:
    """Judge a header section and rewrite it: policy fields off, `on_top` on top.

    `options` are wishes that came beside the message; they may not contradict its fields.
    `removed`: other fields that are taken out, in lower case.
    """
    if len(section.octets) > HEADER_SECTION_OCTETS:
        return HEADER_TOO_LARGE
    if section.count(b"received") >= received_hops:
        return _LOOP
    try:
        wishes = read_wishes(section)
        refuse_displaced(displaced)
        if options is not NO_WISHES:
            wishes = _both(wishes, options)
    except (BadField, _Contradiction) as error:
        return refuse(554, "5.6.0", str(error))
    settings = {
        domain: resolve(rules, reverse_path=reverse_path, recipient_domain=domain, wishes=wishes)
        for domain in domains
    }
    return Screened(queue_id, on_top + section.without(*removed), summarise(section), settings, now)


class _Contradiction(ValueError):
    """An option and a header field that say the opposite."""


def _both(fields: Wishes, options: Wishes) -> Wishes:
    return Wishes(
        require_tls=_agreed(fields.require_tls, options.require_tls, "require-tls"),
        skip_verification=_agreed(
            fields.skip_verification, options.skip_verification, "skip-verification"
        ),
    )


def _agreed(field: bool | None, option: bool | None, name: str) -> bool | None:
    if None not in (field, option) and field != option:
        raise _Contradiction(f"o:{name} contradicts a header field of the message")
    return field if option is None else option


def queued_recipients(
    opened: Screened, recipients: Sequence[Recipient]
) -> tuple[QueuedRecipient, ...]:
    """The recipients as the queue will hold them, due at once."""
    return tuple(
        QueuedRecipient(
            index=index,
            address=recipient.address,
            domain=recipient.domain,
            settings=opened.settings[recipient.domain],
            notify=recipient.notify,
            orcpt=recipient.orcpt,
            next_attempt=opened.arrived,
        )
        for index, recipient in enumerate(recipients)
    )
