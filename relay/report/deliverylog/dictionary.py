"""The dictionary of the delivery log: one function for each thing that it records. Pure.

    accepted    the relay answered 250: one line for each message
    settled     the result of one attempt for one recipient: `delivered`, or `failed` with severity
                temporary (the relay will try again) or permanent
    removed     the operator removed a recipient from the queue: `failed`, permanent
    tested      a message in test mode, accepted and not sent: `delivered`, code 650
    operated    what an operator did on the page: `operator`, with name, verb, filter and number

Names and values follow Mailgun's event schema, so that programs that read Mailgun's events read
these. Where no session took place, `tls`, `certificate-verified` and `mx-host` are null, and the
other facts of a session are absent. A line is one JSON object of bounded length, in printable
ASCII: control characters and characters beyond ASCII are escaped. A lone surrogate, which strict
parsers refuse, becomes the text `\\udc..`.

Each event has what it adds to the statistics (`Event.counted`); a message in test mode adds
nothing. The id of an event is made of its time, message, recipient and attempt. So ids sort by
time, and the same event written twice has the same id.

`message_fields` has the fields that tell of the message, `counting` the statistics;
`relay.report.deliverylog.file` writes the lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import assert_never

from relay.mail.duration import duration_text
from relay.mail.event import Counted, Event
from relay.mail.jsontext import JsonObject
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
from relay.queue.entry import Entry, QueuedMessage, QueuedRecipient, State
from relay.queue.settle import Change
from relay.report.deliverylog.counting import counted_in, counted_out, counted_removed
from relay.report.deliverylog.message_fields import (
    MAX_TARGETS,
    about_recipient,
    add_terms,
    envelope_fields,
    head,
    line_of,
    log_text,
    message_fields,
    new_event_id,
    policy_fields,
)

_MAX_HOSTS = 10
_MAX_HOST_TEXT = 300
_MAX_CERTIFICATE_TEXT = 200
_MAX_NAMES = 5
_REMOVED = "removed from the queue by the operator"
_SEVERITIES = {State.DELIVERED: "", State.DEFERRED: "temporary"}
_LEVELS = {"": "info", "temporary": "warn", "permanent": "error"}


def accepted_events(
    message: QueuedMessage, recipients: Sequence[QueuedRecipient]
) -> tuple[Event, ...]:
    """The events of a message that is accepted; in test mode also one for each recipient."""
    events = [accepted(message, recipients)]
    if message.terms is not None and message.terms.is_test:
        events += [_tested(message, one, now=message.arrived) for one in recipients]
    return tuple(events)


def accepted(
    message: QueuedMessage, recipients: Sequence[QueuedRecipient], *, about: str = ""
) -> Event:
    """The relay is responsible for a message. One line, for any number of recipients.

    `about`: the queue id of the message that this one reports on.
    """
    only = recipients[0] if len(recipients) == 1 else None
    at = message.arrived
    targets = ",".join([recipient.address for recipient in recipients[: MAX_TARGETS // 2]])
    fields = head("accepted", "info", message, new_event_id(at, message, "a"), at)
    fields["method"] = message.origin
    fields["envelope"] = envelope_fields(message, targets)
    fields["message"] = message_fields(message)
    if only is not None:
        fields["recipient"] = only.address
        fields["recipient-domain"] = only.domain
    fields["recipients"] = len(recipients)
    fields |= policy_fields(message, recipients)
    if message.client:
        fields["client"] = message.client
    if message.client_tls:
        fields["client-tls"] = message.client_tls
    if message.client_user:
        fields["client-user"] = message.client_user
    if about:
        fields["about"] = about
    add_terms(fields, message)
    address = only.address if only is not None else ""
    return _event(fields, message, at, address, counted_in(message, recipients))


def settled(entry: Entry, change: Change, *, now: datetime) -> Event:
    """The result of one attempt for one recipient."""
    message, recipient = entry.message, change.recipient
    fields = _about_attempt(
        message,
        recipient,
        str(recipient.attempts),
        now,
        severity=_SEVERITIES.get(recipient.state, "permanent"),
        reason=change.reason,
    )
    fields["delivery-status"] = _delivery_status(message, change, now)
    counted = counted_out(fields, message, recipient)
    return _event(fields, message, now, recipient.address, (counted,))


def removed(message: QueuedMessage, recipient: QueuedRecipient, *, now: datetime) -> Event:
    """The operator removed a recipient from the queue. The sender gets no report of it."""
    fields = _about_attempt(
        message, recipient, "removed", now, severity="permanent", reason="removed"
    )
    status = _without_session(0, _REMOVED, "5.0.0", attempts=recipient.attempts)
    if recipient.last is not None:
        status["last-code"] = recipient.last.code
        status["last-message"] = recipient.last.message
    fields["delivery-status"] = status
    counted = counted_removed(message, recipient, _REMOVED)
    return _event(fields, message, now, recipient.address, counted)


def _tested(message: QueuedMessage, recipient: QueuedRecipient, *, now: datetime) -> Event:
    """A message in test mode is not sent, and is reported as delivered, as Mailgun does."""
    fields = _about_attempt(message, recipient, "test", now)
    fields["delivery-status"] = _without_session(
        Code.TEST_MODE, "test mode: taken in and not sent", "", attempts=0
    )
    return _event(fields, message, now, recipient.address)


def operated(
    name: str, verb: str, wanted: Mapping[str, object], *, count: int, now: datetime
) -> Event:
    """An operator changed the queue, or had the relay connect to a host."""
    event_id = f"{int(now.timestamp() * 1_000_000):014x}-operator"
    fields: JsonObject = {
        "event": "operator",
        "id": event_id,
        "timestamp": now.timestamp(),
        "log-level": "info",
        "operator": name,
        "verb": verb,
        "filter": {key: str(value) for key, value in wanted.items()},
        "count": count,
    }
    return Event(event_id, now, "operator", "", "", "", line_of(fields))


def _about_attempt(
    message: QueuedMessage,
    recipient: QueuedRecipient,
    what: str,
    now: datetime,
    *,
    severity: str = "",
    reason: str = "",
) -> JsonObject:
    """The fields of an event about one recipient. `severity` "": it is delivered."""
    event_id = new_event_id(now, message, f"{recipient.index}.{what}")
    name = "failed" if severity else "delivered"
    fields = head(name, _LEVELS[severity], message, event_id, now)
    if severity:
        fields["severity"], fields["reason"] = severity, reason
    about_recipient(fields, message, recipient)
    return fields


def _without_session(code: int, description: str, status: str, *, attempts: int) -> JsonObject:
    """The delivery status of an event that no session with a host decided."""
    return {
        "tls": None,
        "certificate-verified": None,
        "mx-host": None,
        "code": code,
        "description": description,
        "message": "",
        "attempt-no": attempts,
        "enhanced-code": status,
    }


def _delivery_status(message: QueuedMessage, change: Change, now: datetime) -> JsonObject:
    outcome, recipient = change.outcome, change.recipient
    session = outcome.session
    fields: JsonObject = {
        "tls": session.tls if session is not None else None,
        "certificate-verified": session.certificate_verified if session is not None else None,
        "mx-host": session.mx_host if session is not None else None,
        "code": change.code,
        "description": outcome.description,
        "message": outcome.message,
        "attempt-no": recipient.attempts,
        "enhanced-code": change.status,
    }
    if session is not None:
        _session_facts(fields, session)
    if outcome.routing is not None:
        fields["routing"] = _routing(outcome.routing)
        if outcome.routing.next_hop:
            fields["route"] = outcome.routing.next_hop
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
        fields["hosts"] = list(outcome.hosts[:_MAX_HOSTS])
    return fields


@lru_cache(maxsize=256)
def _routing(routing: Routing) -> JsonObject:
    """Where the attempt could go. Cached: it is the same for many messages to a domain."""
    return {
        "named-by": routing.named_by.value,
        "authentic": routing.is_authentic,
        "hosts": [log_text(host, _MAX_HOST_TEXT) for host in routing.hosts[:_MAX_HOSTS]],
    }


def _earlier(session: HopSession) -> JsonObject:
    """What a host that the attempt tried before has shown."""
    fields: JsonObject = {
        "mx-host": session.mx_host,
        "mx-ip": session.mx_ip,
        "tls": session.tls,
        "tls-version": session.tls_version,
        "tls-cipher": session.tls_cipher,
    }
    if session.certificate is not None:
        fields["certificate"] = _certificate(session.certificate)
    return fields


def _session_facts(fields: JsonObject, session: HopSession) -> None:
    fields["session-seconds"] = round(session.seconds, 3)
    fields["utf8"] = session.utf8
    fields["requiretls"] = session.requiretls
    fields["mx-ip"] = session.mx_ip
    fields["tls-version"] = session.tls_version
    fields["tls-cipher"] = session.tls_cipher
    fields["verified-by"] = session.verified_by
    if session.pin is not None:
        fields["pin"] = session.pin
    if session.certificate is not None:
        fields["certificate"] = _certificate(session.certificate)
    if session.unsigned:
        fields["dkim-unsigned"] = session.unsigned
    login = session.login
    fields["auth"] = None if login is None else {"mechanism": login.mechanism, "user": login.user}
    downgrade = session.downgrade
    fields["downgrade"] = (
        None
        if downgrade is None
        else {"from": downgrade.wanted, "reason": downgrade.reason, "error": downgrade.error}
    )


@lru_cache(maxsize=256)
def _certificate(facts: CertificateFacts) -> JsonObject:
    """The certificate of the host. Cached: it is the same for many messages."""
    return {
        "subject": log_text(facts.subject, _MAX_CERTIFICATE_TEXT),
        "issuer": log_text(facts.issuer, _MAX_CERTIFICATE_TEXT),
        "names": [log_text(name, _MAX_CERTIFICATE_TEXT) for name in facts.names[:_MAX_NAMES]],
        "not-before": facts.not_before.isoformat(),
        "not-after": facts.not_after.isoformat(),
        "sha256": facts.sha256,
    }


def _policy_facts(fields: JsonObject, policy: HopPolicy) -> None:
    """What the recipient's domain required of the host, and the result (RFC 8460 §4.3, §4.4)."""
    fields["policy-type"] = policy.type
    fields["policy-mode"] = policy.mode
    fields["policy-result"] = policy.result
    fields["mx-secure"] = policy.mx_secure
    fields["waived"] = policy.waived
    fields["memory"] = _memory(policy.memory)


def _memory(alarm: DowngradeAlarm | None) -> JsonObject | None:
    """The alarm, where the host showed less than it, or every known host, has shown before."""
    if alarm is None:
        return None
    return {
        "before": alarm.before.value,
        "now": alarm.now.value,
        "host": alarm.host,
        "since": alarm.since.isoformat(timespec="seconds"),
    }


def _given_up(fields: JsonObject, outcome: Deferred, age: timedelta) -> None:
    """The end of the lifetime: `code` says so, and `last-code` has the last reply."""
    waited = duration_text(age.total_seconds())
    fields["message"] = "Too old"
    fields["description"] = f"given up after {waited}: {outcome.description or outcome.message}"
    fields["last-code"] = outcome.code
    fields["last-message"] = outcome.message or outcome.description


def _event(
    fields: JsonObject,
    message: QueuedMessage,
    at: datetime,
    recipient: str,
    counted: tuple[Counted, ...] = (),
) -> Event:
    return Event(
        id=str(fields["id"]),
        at=at,
        name=str(fields["event"]),
        queue_id=message.queue_id,
        sender=message.reverse_path,
        recipient=recipient,
        line=line_of(fields),
        counted=counted,
    )
