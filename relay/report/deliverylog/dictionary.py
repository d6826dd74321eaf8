"""The dictionary of the delivery log: one function for each thing it tells.

    accepted    we answered 250: one line a message
    settled     one attempt for one recipient: `delivered`, or `failed` with severity
                temporary (it will be tried again) or permanent
    removed     the operator took a recipient out: `failed`, permanent
    tested      a message in test mode, taken in and not sent: `delivered`, code 650
    operated    what an operator did on the page: `operator`, with name, verb, filter and count

Names and values follow Mailgun's event schema, so that what reads theirs reads ours.
Where no session took place, `tls`, `certificate-verified` and `mx-host` are null and the
other facts of a session are absent. Each line is one JSON object in printable ASCII, of
bounded length: control characters and all beyond ASCII are escaped, and what is no
character at all (a lone surrogate) is written as `\\udc..` text, since strict parsers
refuse it otherwise.

With each event comes what it adds to the statistics (`Event.counted`); a message in test mode is
not counted.

An event's id is made of what makes the event one: its time, its message, recipient and
attempt. It sorts by time, and the same event told twice has the same id.

Pure; `relay.report.deliverylog.file` writes the lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, assert_never

from relay.mail.address import AddressError, domain_of
from relay.mail.event import Counted, Event, Protection, Result
from relay.mail.jsontext import to_json
from relay.mail.memory import DowngradeAlarm
from relay.mail.outcome import (
    Bounced,
    CertificateFacts,
    Code,
    Deferred,
    Delivered,
    HopPolicy,
    HopSession,
    Routing,
)
from relay.policy.settings import TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient, State
from relay.queue.settle import Change
from relay.report.words import policy_text, protection_of, reason_of, sentence_of

__all__ = ["accepted", "operated", "removed", "settled", "taken_in"]

_MAX_TEXT = 1000
"""Characters of a peer's text, an address or a sentence in a line."""

_MAX_TARGETS = 4000
"""Characters of the list of recipients of an accepted message."""

_MAX_DOMAINS = 50
"""Recipient domains whose policies an accepted line tells, where they differ."""

_MAX_HOSTS = 10
_MAX_HOST_TEXT = 300

_MAX_CERTIFICATE_TEXT = 200
_MAX_NAMES = 5

_MAX_SENTENCE = 300
"""Characters of what is kept about an exception."""

_MAX_VARIABLE = 16 * 1024
"""Characters of a sender's own variable: all of what the HTTP interface takes."""

Fields = dict[str, Any]  # what JSON can say


def taken_in(message: QueuedMessage, recipients: Sequence[QueuedRecipient]) -> tuple[Event, ...]:
    """The events of a message that is accepted; in test mode `tested` for each recipient, too."""
    events = [accepted(message, recipients)]
    if message.terms is not None and message.terms.is_test:
        events += [_tested(message, one, now=message.arrived) for one in recipients]
    return tuple(events)


def accepted(
    message: QueuedMessage, recipients: Sequence[QueuedRecipient], *, about: str = ""
) -> Event:
    """We are responsible for a message. One line, whatever the number of its recipients.

    `about`: the queue id of the message that this one reports on.
    """
    only = recipients[0] if len(recipients) == 1 else None
    targets = ",".join(recipient.address for recipient in recipients[: _MAX_TARGETS // 2])
    fields = _head(
        "accepted", "info", message, _event_id(message.arrived, message, "a"), message.arrived
    )
    fields["method"] = message.origin
    fields["envelope"] = _envelope(message, targets, _MAX_TARGETS)
    fields["message"] = _message(message)
    if only is not None:
        fields["recipient"] = _text(only.address)
        fields["recipient-domain"] = _text(only.domain)
    fields["recipients"] = len(recipients)
    fields |= _policies(message, recipients)
    if message.client:
        fields["client"] = _text(message.client)
    if message.client_tls:
        fields["client-tls"] = _text(message.client_tls)
    if message.client_user:
        fields["client-user"] = _text(message.client_user)
    if about:
        fields["about"] = about
    _terms(fields, message)
    return _event(
        fields,
        message,
        message.arrived,
        only.address if only is not None else "",
        _counted_in(message, recipients),
    )


def settled(entry: Entry, change: Change, *, now: datetime) -> Event:
    """What one attempt came to for one recipient."""
    message, recipient = entry.message, change.recipient
    event_id = _event_id(now, message, f"{recipient.index}.{recipient.attempts}")
    match recipient.state:
        case State.DELIVERED:
            fields = _head("delivered", "info", message, event_id, now)
        case State.DEFERRED:
            fields = _head("failed", "warn", message, event_id, now)
            fields["severity"] = "temporary"
            fields["reason"] = change.reason
        case _:
            fields = _head("failed", "error", message, event_id, now)
            fields["severity"] = "permanent"
            fields["reason"] = change.reason
    _about_recipient(fields, message, recipient)
    fields["delivery-status"] = _delivery_status(message, change, now)
    counted = _counted_out(fields, message, recipient)
    return _event(fields, message, now, recipient.address, (counted,))


def removed(message: QueuedMessage, recipient: QueuedRecipient, *, now: datetime) -> Event:
    """The operator took a recipient out of the queue: it ends here, and the sender is not told."""
    event_id = _event_id(now, message, f"{recipient.index}.removed")
    fields = _head("failed", "error", message, event_id, now)
    fields["severity"] = "permanent"
    fields["reason"] = "removed"
    _about_recipient(fields, message, recipient)
    status: Fields = {
        "tls": None,
        "certificate-verified": None,
        "mx-host": None,
        "code": 0,
        "description": "removed from the queue by the operator",
        "message": "",
        "attempt-no": recipient.attempts,
        "enhanced-code": "5.0.0",
    }
    if recipient.last is not None:
        status["last-code"] = recipient.last.code
        status["last-message"] = _text(recipient.last.message)
    fields["delivery-status"] = status
    counted = _counted_out(fields, message, recipient)
    return _event(fields, message, now, recipient.address, (counted,))


def _tested(message: QueuedMessage, recipient: QueuedRecipient, *, now: datetime) -> Event:
    """A message in test mode goes nowhere, and is told as delivered (as Mailgun does)."""
    fields = _head(
        "delivered", "info", message, _event_id(now, message, f"{recipient.index}.test"), now
    )
    _about_recipient(fields, message, recipient)
    fields["delivery-status"] = {
        "tls": None,
        "certificate-verified": None,
        "mx-host": None,
        "code": Code.TEST_MODE,
        "description": "test mode: taken in and not sent",
        "message": "",
        "attempt-no": 0,
        "enhanced-code": "",
    }
    return _event(fields, message, now, recipient.address)


def operated(
    name: str, verb: str, wanted: Mapping[str, Any], *, count: int, now: datetime
) -> Event:
    """An operator did something to the queue, or asked for a connection to be made."""
    fields: Fields = {
        "event": "operator",
        "id": f"{int(now.timestamp() * 1_000_000):014x}-operator",
        "timestamp": round(now.timestamp(), 6),
        "log-level": "info",
        "operator": _text(name),
        "verb": _text(verb),
        "filter": {_text(key): _text(str(value)) for key, value in wanted.items()},
        "count": count,
    }
    return Event(fields["id"], now, "operator", "", "", "", to_json(fields))


def _delivery_status(message: QueuedMessage, change: Change, now: datetime) -> Fields:
    outcome, recipient = change.outcome, change.recipient
    session = outcome.session
    fields: Fields = {
        "tls": session.tls if session is not None else None,
        "certificate-verified": session.certificate_verified if session is not None else None,
        "mx-host": _text(session.mx_host) if session is not None else None,
        "code": change.code,
        "description": _text(outcome.description),
        "message": _text(outcome.message),
        "attempt-no": recipient.attempts,
        "enhanced-code": change.status,
    }
    if session is not None:
        _session_facts(fields, session)
    if outcome.routing is not None:
        fields["routing"] = _routing(outcome.routing)
        if outcome.routing.next_hop:
            fields["route"] = _text(outcome.routing.next_hop)
    if outcome.earlier:
        fields["earlier"] = [_earlier(one) for one in outcome.earlier[:_MAX_HOSTS]]
    policy = session.policy if session is not None else outcome.policy
    if policy is not None:
        _policy_facts(fields, policy)
    if recipient.first_attempt is not None:
        waited = (recipient.first_attempt - message.begins).total_seconds()
        fields["first-delivery-attempt-seconds"] = max(round(waited, 3), 0.0)
    match outcome:
        case Delivered():
            return fields
        case Deferred():
            fields["bounce-type"] = "soft"
            if change.retry_in is not None:
                fields["retry-seconds"] = round(change.retry_in.total_seconds())
            else:
                _given_up(fields, outcome, now - message.begins)
            if outcome.in_doubt:
                fields["in-doubt"] = True
        case Bounced():
            fields["bounce-type"] = "hard"
        case _:
            assert_never(outcome)
    if outcome.hosts:
        fields["hosts"] = [_text(host) for host in outcome.hosts[:_MAX_HOSTS]]
    return fields


@lru_cache(maxsize=256)
def _routing(routing: Routing) -> Fields:
    """Where the attempt could go; the same for many messages to a domain."""
    return {
        "named-by": routing.named_by.value,
        "authentic": routing.is_authentic,
        "hosts": [_text(host, _MAX_HOST_TEXT) for host in routing.hosts[:_MAX_HOSTS]],
    }


def _earlier(session: HopSession) -> Fields:
    """What a host that was tried before showed of itself."""
    fields: Fields = {
        "mx-host": _text(session.mx_host),
        "mx-ip": _text(session.mx_ip),
        "tls": session.tls,
        "tls-version": session.tls_version,
        "tls-cipher": session.tls_cipher,
    }
    if session.certificate is not None:
        fields["certificate"] = _certificate(session.certificate)
    return fields


def _session_facts(fields: Fields, session: HopSession) -> None:
    fields["session-seconds"] = round(session.seconds, 3)
    fields["utf8"] = session.utf8
    fields["requiretls"] = session.requiretls
    fields["mx-ip"] = _text(session.mx_ip)
    fields["tls-version"] = session.tls_version
    fields["tls-cipher"] = session.tls_cipher
    fields["verified-by"] = session.verified_by
    if session.certificate is not None:
        fields["certificate"] = _certificate(session.certificate)
    if session.unsigned:
        fields["dkim-unsigned"] = _text(session.unsigned)
    downgrade = session.downgrade
    fields["downgrade"] = (
        None
        if downgrade is None
        else {
            "from": downgrade.wanted,
            "reason": downgrade.reason,
            "error": _text(downgrade.error),
        }
    )


@lru_cache(maxsize=256)
def _certificate(facts: CertificateFacts) -> Fields:
    """What the host showed; the same for each message of many."""
    return {
        "subject": _text(facts.subject, _MAX_CERTIFICATE_TEXT),
        "issuer": _text(facts.issuer, _MAX_CERTIFICATE_TEXT),
        "names": [_text(name, _MAX_CERTIFICATE_TEXT) for name in facts.names[:_MAX_NAMES]],
        "not-before": facts.not_before.isoformat(),
        "not-after": facts.not_after.isoformat(),
        "sha256": facts.sha256,
    }


def _policy_facts(fields: Fields, policy: HopPolicy) -> None:
    """What the recipient's domain asked of the host (RFC 8460 §4.3, §4.4)."""
    fields["policy-type"] = policy.type
    fields["policy-mode"] = policy.mode
    fields["policy-result"] = policy.result
    fields["mx-secure"] = policy.mx_secure
    fields["waived"] = policy.waived
    fields["memory"] = _memory(policy.memory)


def _memory(alarm: DowngradeAlarm | None) -> Fields | None:
    """What the host, or every known host of the domain, has shown before, where this is less."""
    if alarm is None:
        return None
    return {
        "before": alarm.before.value,
        "now": alarm.now.value,
        "host": _text(alarm.host),
        "since": alarm.since.isoformat(timespec="seconds"),
    }


def _given_up(fields: Fields, outcome: Deferred, age: timedelta) -> None:
    """The end of the lifetime: the code says so, and the last answer is told beside it."""
    fields["message"] = "Too old"
    fields["description"] = _text(
        f"given up after {_span(age)}: {outcome.description or outcome.message}"
    )
    fields["last-code"] = outcome.code
    fields["last-message"] = _text(outcome.message or outcome.description)


def _span(age: timedelta) -> str:
    """A duration as people say it: 5 days, 3 hours, 20 minutes."""
    minutes = max(int(age.total_seconds() // 60), 0)
    for size, name in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size:
            count = round(minutes / size)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return f"{max(int(age.total_seconds()), 0)} seconds"


def _about_recipient(fields: Fields, message: QueuedMessage, recipient: QueuedRecipient) -> None:
    """Envelope, message, recipient and policy, as every line about one recipient has them."""
    fields["envelope"] = _envelope(message, recipient.address, _MAX_TEXT)
    fields["message"] = _message(message)
    fields["recipient"] = _text(recipient.address)
    fields["recipient-domain"] = _text(recipient.domain)
    fields["policy"] = _policy(message, recipient.settings)
    fields |= _rules(recipient.settings)
    _terms(fields, message)


def _terms(fields: Fields, message: QueuedMessage) -> None:
    """What the sender wants to find again in each event."""
    terms = message.terms
    if terms is None:
        return
    fields["tags"] = [_text(tag) for tag in terms.tags]
    fields["user-variables"] = {
        _text(name): _text(value, _MAX_VARIABLE) for name, value in terms.variables
    }
    fields["flags"] = {"is-test-mode": terms.is_test}


def _head(name: str, level: str, message: QueuedMessage, event_id: str, at: datetime) -> Fields:
    return {
        "event": name,
        "id": event_id,
        "timestamp": round(at.timestamp(), 6),
        "log-level": level,
        "queue-id": message.queue_id,
    }


def _envelope(message: QueuedMessage, targets: str, limit: int) -> Fields:
    return {
        "transport": "smtp",
        "sender": _text(message.reverse_path),
        "targets": _text(targets, limit),
    }


def _message(message: QueuedMessage) -> Fields:
    summary: MessageSummary = message.summary
    return {
        "headers": {
            "message-id": _text(summary.message_id),
            "from": _text(summary.from_),
            "to": _text(summary.to),
            "subject": _text(summary.subject),
        },
        "size": message.size_bytes,
    }


def _policy(message: QueuedMessage, settings: TlsSettings) -> Fields:
    require, skip = settings.require_tls, settings.skip_verification
    return {
        "require-tls": require.value,
        "skip-verification": skip.value,
        "require-tls-source": require.source,
        "skip-verification-source": skip.source,
        "requiretls": message.requiretls,
        "tls-required-no": message.tls_required_no,
    }


def _rules(settings: TlsSettings) -> Fields:
    """`policy-rules`: the rule of the configuration that each setting comes from, if it has one."""
    by_name = {
        "require-tls-rule": settings.require_tls,
        "skip-verification-rule": settings.skip_verification,
    }
    rules = {
        name: _text(setting.rule)
        for name, setting in by_name.items()
        if setting.rule not in ("", setting.source)
    }
    return {"policy-rules": rules} if rules else {}


def _policies(message: QueuedMessage, recipients: Sequence[QueuedRecipient]) -> Fields:
    """`policy` where it is one for all recipients, else `policies` by recipient domain."""
    by_domain = {recipient.domain: recipient.settings for recipient in recipients}
    policies = [_policy(message, settings) for settings in by_domain.values()]
    if all(policy == policies[0] for policy in policies):
        return {"policy": policies[0]} | _rules(recipients[0].settings) if policies else {}
    return {
        "policies": {
            _text(domain): policy
            for domain, policy in list(zip(by_domain, policies, strict=True))[:_MAX_DOMAINS]
        }
    }


def _text(text: str, limit: int = _MAX_TEXT) -> str:
    """Text that any JSON parser takes and that cannot fill the disk."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    elif text.isascii() and "\x7f" not in text:
        return text  # what nearly all texts are
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x7f", "\\x7f")


def _event_id(at: datetime, message: QueuedMessage, what: str) -> str:
    return f"{int(at.timestamp() * 1000):011x}-{message.queue_id}-{what}"


def _counted_in(
    message: QueuedMessage, recipients: Sequence[QueuedRecipient]
) -> tuple[Counted, ...]:
    """Accepted recipients by domain. A message in test mode is not counted."""
    if message.terms is not None and message.terms.is_test:
        return ()
    sender = _sender_domain(message)
    numbers: dict[str, int] = {}
    settings: dict[str, TlsSettings] = {}
    for one in recipients:
        numbers[one.domain] = numbers.get(one.domain, 0) + 1
        settings[one.domain] = one.settings
    return tuple(
        Counted(sender, domain, Result.ACCEPTED, "", policy_text(settings[domain]), number=number)
        for domain, number in numbers.items()
    )


def _counted_out(fields: Fields, message: QueuedMessage, recipient: QueuedRecipient) -> Counted:
    """What an attempt came to. An exception: whatever ended otherwise than in verified TLS, and
    each attempt that was stopped for want of TLS.
    """
    if fields["event"] == "delivered":
        result = Result.DELIVERED
    else:
        result = Result.DEFERRED if fields["severity"] == "temporary" else Result.FAILED
    protection, reason = protection_of(fields), reason_of(fields)
    is_exception = protection is not Protection.VERIFIED and (
        result is not Result.DEFERRED or reason == "tls-required"
    )
    return Counted(
        _sender_domain(message),
        recipient.domain,
        result,
        protection or "",
        policy_text(recipient.settings),
        reason,
        exception=_text(sentence_of(fields), _MAX_SENTENCE) if is_exception else "",
    )


def _sender_domain(message: QueuedMessage) -> str:
    """The normalised domain; "<>" of the null reverse-path."""
    try:
        return domain_of(message.reverse_path) or "<>"
    except AddressError:
        return message.reverse_path.rpartition("@")[2].lower() or "<>"


def _event(
    fields: Fields,
    message: QueuedMessage,
    at: datetime,
    recipient: str,
    counted: tuple[Counted, ...] = (),
) -> Event:
    return Event(
        id=fields["id"],
        at=at,
        name=fields["event"],
        queue_id=message.queue_id,
        sender=message.reverse_path,
        recipient=recipient,
        line=to_json(fields),
        counted=counted,
    )
