"""What an event adds to the statistics (`Event.counted`). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from relay.mail.address import AddressError, domain_of
from relay.mail.event import Counted, EventResult, Protection
from relay.mail.jsontext import JsonObject
from relay.policy.settings import TlsSettings
from relay.queue.entry import QueuedMessage, QueuedRecipient
from relay.report.deliverylog.message_fields import log_text
from relay.report.words import policy_text, protection_of, reason_of, sentence_of

_MAX_SENTENCE = 300
"""Characters of the sentence that is kept about an exception."""


def counted_in(
    message: QueuedMessage, recipients: Sequence[QueuedRecipient]
) -> tuple[Counted, ...]:
    """Accepted recipients by domain. A message in test mode is not counted."""
    if message.terms is not None and message.terms.is_test:
        return ()
    sender = _sender_domain(message.reverse_path)
    if len(recipients) == 1:
        (one,) = recipients
        return (Counted(sender, one.domain, EventResult.ACCEPTED, "", policy_text(one.settings)),)
    numbers: dict[str, int] = {}
    settings: dict[str, TlsSettings] = {}
    for one in recipients:
        numbers[one.domain] = numbers.get(one.domain, 0) + 1
        settings[one.domain] = one.settings
    return tuple(
        Counted(
            sender, domain, EventResult.ACCEPTED, "", policy_text(settings[domain]), number=number
        )
        for domain, number in numbers.items()
    )


def counted_out(fields: JsonObject, message: QueuedMessage, recipient: QueuedRecipient) -> Counted:
    """One result of a recipient. It is an exception if it is final and was not a delivery over
    verified TLS, or if an attempt ended because the host lacked the TLS that was required.
    """
    if fields["event"] == "delivered":
        result = EventResult.DELIVERED
    else:
        result = EventResult.DEFERRED if fields["severity"] == "temporary" else EventResult.FAILED
    protection = protection_of(fields)
    reason = reason_of(fields, protection)
    is_exception = protection is not Protection.VERIFIED and (
        result is not EventResult.DEFERRED or reason == "tls-required"
    )
    return Counted(
        _sender_domain(message.reverse_path),
        recipient.domain,
        result,
        protection or "",
        policy_text(recipient.settings),
        reason,
        exception=log_text(sentence_of(fields), _MAX_SENTENCE) if is_exception else "",
    )


def counted_removed(
    message: QueuedMessage, recipient: QueuedRecipient, sentence: str
) -> tuple[Counted, ...]:
    """A recipient that an operator removed, as `counted_out` counts it."""
    return _counted_removed(message.reverse_path, recipient.domain, recipient.settings, sentence)


@lru_cache(maxsize=1024)
def _counted_removed(
    reverse_path: str, domain: str, settings: TlsSettings, sentence: str
) -> tuple[Counted, ...]:
    """Cached: of the many recipients that are removed together, most are counted as one thing."""
    return (
        Counted(
            _sender_domain(reverse_path),
            domain,
            EventResult.FAILED,
            Protection.NOT_SENT,
            policy_text(settings),
            "removed",
            exception=sentence,
        ),
    )


def _sender_domain(reverse_path: str) -> str:
    """The normalised domain of the sender; "<>" for the null reverse-path."""
    try:
        return domain_of(reverse_path) or "<>"
    except AddressError:
        return reverse_path.rpartition("@")[2].lower() or "<>"
