"""Judges and rewrites a header section, and makes the message that the queue holds. Pure.

A message over SMTP and one over HTTP are treated alike: the relay reads the options and policy
fields (`relay.submit.options`) and removes them, resolves the settings of each recipient domain,
and adds its own Received field at the top. A message that it does not accept gives a `Refusal`:

    552 5.3.4   the header section is too large
    554 5.6.0   a field that the relay cannot obey: for example, a policy field whose value is
                neither yes nor no, whose name is misspelt, or that stands behind the end of the
                header section
    554 5.4.6   too many Received fields
    452, 451    trouble of the relay itself: `OUT_OF_ROOM`, `OUR_TROUBLE`, never a 5yz
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from relay.mail.envelope import Recipient
from relay.mail.record import record
from relay.mail.reply import Reply
from relay.mail.section import HeaderSection
from relay.policy.fields import asks_for_no_tls, refuse_fields_in_body, refuse_folded, tls_wishes
from relay.policy.rules import PolicyRules, resolve
from relay.policy.settings import TlsSettings
from relay.queue.entry import MessageSummary, QueuedRecipient, State, Terms
from relay.queue.summary import summarise
from relay.submit.options import NO_OPTIONS, Contradiction, Options, combined, read_options
from relay.submit.trace import Arrival

HEADER_SECTION_OCTETS = 1024 * 1024
"""The largest header section: the relay keeps it in memory while it judges it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """`reply` is for the client, `reason` for the relay's log; `closes` also ends the session."""

    reply: Reply
    reason: str
    closes: bool = False


def refuse(code: int, status: str, text: str, reason: str = "") -> Refusal:
    """A refusal whose reason is the reply's text, unless another reason is given."""
    return Refusal(Reply(code, status, text), reason or text)


OUT_OF_ROOM = refuse(
    452, "4.3.1", "No room for more mail now, try again later", "the queue is full"
)
OUR_TROUBLE = refuse(451, "4.3.0", "Trouble of our own, try again later", "the store failed")
HEADER_TOO_LARGE = refuse(552, "5.3.4", "The header section is too large")
_LOOP = refuse(554, "5.4.6", "Too many hops: this message is going round in circles")


@record(frozen=True, slots=True)
class JudgedHeader:
    """A message whose header section was judged: the new header section, and the decisions.

    `tls_required_no`: TLS-Required: No has an effect on this message (RFC 8689 §3).
    """

    queue_id: str
    header: bytes
    summary: MessageSummary
    settings: dict[str, TlsSettings]
    arrived: datetime
    due: datetime
    terms: Terms | None
    tls_required_no: bool = False


def judge_header(
    section: HeaderSection,
    arrival: Arrival,
    *,
    reverse_path: str,
    domains: Collection[str],
    rules: PolicyRules,
    received_hops: int,
    on_top: bytes,
    options: Options | None = None,
    displaced: bytes = b"",
    removed: Collection[bytes] = (),
    requiretls: bool = False,
) -> JudgedHeader | Refusal:
    """Judge a header section; remove the fields that the relay obeys, and add `on_top`.

    `options`: the parameters of the HTTP interface, which must not contradict the fields.
    `displaced`: the lines behind the header section, where no policy field may stand. `removed`:
    other fields to remove, in lower case. `requiretls`: the message came with
    REQUIRETLS, which decides before every field and setting (RFC 8689 §4.1).
    """
    if len(section.octets) > HEADER_SECTION_OCTETS:
        return HEADER_TOO_LARGE
    if section.count(b"received") >= received_hops:
        return _LOOP
    asked = _options_of(section, displaced, options, now=arrival.at)
    if isinstance(asked, Refusal):
        return asked
    wishes, tls_required_no = tls_wishes(
        asked.wishes, requiretls=requiretls, says_no=asks_for_no_tls(section)
    )
    settings = {
        domain: resolve(rules, reverse_path=reverse_path, recipient_domain=domain, wishes=wishes)
        for domain in domains
    }
    asks_for_terms = options is not None or (
        asked is not NO_OPTIONS and asked != Options(asked.wishes)
    )
    return JudgedHeader(
        arrival.queue_id,
        on_top + section.without(*removed),
        summarise(section),
        settings,
        arrival.at,
        asked.due(arrival.at),
        asked.terms(arrival.at) if asks_for_terms else None,
        tls_required_no,
    )


def _options_of(
    section: HeaderSection, displaced: bytes, options: Options | None, *, now: datetime
) -> Options | Refusal:
    """What the fields and `options` ask for; a refusal where the relay cannot obey."""
    try:
        asked = read_options(section, now)
        refuse_folded(section.octets)
        refuse_fields_in_body(displaced)
        return asked if options is None else combined(asked, options)
    except Contradiction as error:
        return refuse(554, "5.6.0", f"{error.name} contradicts a header field of the message")
    except ValueError as error:  # `BadField`, or too many tags
        return refuse(554, "5.6.0", str(error))


def queued_recipients(
    judged: JudgedHeader, recipients: Sequence[Recipient]
) -> tuple[QueuedRecipient, ...]:
    """The recipients as the queue holds them: due, or already finished for a test message."""
    is_test = judged.terms is not None and judged.terms.is_test
    return tuple(
        [
            QueuedRecipient(
                index=index,
                address=recipient.address,
                domain=recipient.domain,
                settings=judged.settings[recipient.domain],
                notify=recipient.notify,
                orcpt=recipient.orcpt,
                state=State.DELIVERED if is_test else State.QUEUED,
                next_attempt=None if is_test else judged.due,
            )
            for index, recipient in enumerate(recipients)
        ]
    )
