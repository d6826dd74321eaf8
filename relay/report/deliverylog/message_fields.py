"""The fields of an event that tell of the message: envelope, header fields, settings. Pure.

Each text in a line is bounded, so that no message can fill the disk with its events.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from relay.mail.jsontext import JsonObject, JsonValue, ascii_json, to_json
from relay.policy.settings import TlsSettings
from relay.queue.entry import QueuedMessage, QueuedRecipient

_MAX_TEXT = 1000
"""Characters of a peer's text, an address or a sentence in a line."""

MAX_TARGETS = 4000
"""Characters of the list of recipients of an accepted message."""

_MAX_DOMAINS = 50
"""The most recipient domains whose policies an accepted line has, where they differ."""

_MAX_VARIABLE = 16 * 1024
"""Characters of a sender's own variable: all that the HTTP interface accepts."""


_LIMITS = {"targets": MAX_TARGETS, "user-variables": _MAX_VARIABLE}
"""Characters of a text under these names; of any other, `_MAX_TEXT`."""

_SHORT_LINE = 2000
"""Characters of a line in which no text is cut: it is short as it is."""


def head(name: str, level: str, message: QueuedMessage, event_id: str, at: datetime) -> JsonObject:
    """The fields with which each line about a message begins."""
    return {
        "event": name,
        "id": event_id,
        "timestamp": at.timestamp(),
        "log-level": level,
        "queue-id": message.queue_id,
    }


def envelope_fields(message: QueuedMessage, targets: str) -> JsonObject:
    """Sender and recipients."""
    return {"transport": "smtp", "sender": message.reverse_path, "targets": targets}


def message_fields(message: QueuedMessage) -> JsonObject:
    """The header fields by which a person recognises the message, and its size."""
    summary = message.summary
    return {
        "headers": {
            "message-id": summary.message_id,
            "from": summary.from_,
            "to": summary.to,
            "subject": summary.subject,
        },
        "size": message.size_bytes,
    }


def _policy(message: QueuedMessage, settings: TlsSettings) -> JsonObject:
    return _policy_of(settings, message.requiretls, message.tls_required_no)


@lru_cache(maxsize=256)
def _policy_of(settings: TlsSettings, requiretls: bool, tls_required_no: bool) -> JsonObject:
    """Cached: it is the same for most mail. Nobody changes it."""
    require, skip = settings.require_tls, settings.skip_verification
    return {
        "require-tls": require.value,
        "skip-verification": skip.value,
        "require-tls-source": require.source,
        "skip-verification-source": skip.source,
        "requiretls": requiretls,
        "tls-required-no": tls_required_no,
    }


@lru_cache(maxsize=256)
def _rules(settings: TlsSettings) -> JsonObject:
    """`policy-rules`: the rule of the configuration that each setting comes from, if it has one."""
    by_name = {
        "require-tls-rule": settings.require_tls,
        "skip-verification-rule": settings.skip_verification,
    }
    rules = {
        name: setting.rule
        for name, setting in by_name.items()
        if setting.rule not in ("", setting.source)
    }
    return {"policy-rules": rules} if rules else {}


def policy_fields(message: QueuedMessage, recipients: Sequence[QueuedRecipient]) -> JsonObject:
    """`policy` where it is one for all recipients, else `policies` by recipient domain."""
    if len(recipients) == 1:
        settings = recipients[0].settings
        return {"policy": _policy(message, settings), **_rules(settings)}
    by_domain = {recipient.domain: recipient.settings for recipient in recipients}
    found = [_policy(message, settings) for settings in by_domain.values()]
    if all(policy == found[0] for policy in found):
        return {"policy": found[0]} | _rules(recipients[0].settings) if found else {}
    first = list(zip(by_domain, found, strict=True))[:_MAX_DOMAINS]
    return {"policies": dict(first)}


def about_recipient(fields: JsonObject, message: QueuedMessage, recipient: QueuedRecipient) -> None:
    """Add what every line about one recipient has: envelope, message, recipient, policy."""
    fields["envelope"] = envelope_fields(message, recipient.address)
    fields["message"] = message_fields(message)
    fields["recipient"] = recipient.address
    fields["recipient-domain"] = recipient.domain
    fields["policy"] = _policy(message, recipient.settings)
    fields |= _rules(recipient.settings)
    add_terms(fields, message)


def add_terms(fields: JsonObject, message: QueuedMessage) -> None:
    """Add the tags and variables that the sender wants in each event."""
    asked = message.terms
    if asked is None:
        return
    fields["tags"] = list(asked.tags)
    fields["user-variables"] = dict(asked.variables)
    fields["flags"] = {"is-test-mode": asked.is_test}


def line_of(fields: JsonObject) -> str:
    """The line of an event.

    Nearly all lines are short and ASCII: nothing in them has to be cut or escaped. In the others
    each text is looked at.
    """
    line = ascii_json(fields)
    if line is None or len(line) > _SHORT_LINE or "\x7f" in line:
        return to_json(_readable(fields))
    return line


def _readable(value: JsonValue, limit: int = _MAX_TEXT) -> JsonValue:
    """A value with every text in it as `log_text` makes it."""
    if isinstance(value, str):
        return log_text(value, limit)
    if isinstance(value, dict):
        return {
            log_text(key): _readable(part, _LIMITS.get(key, limit)) for key, part in value.items()
        }
    return [_readable(part, limit) for part in value] if isinstance(value, list) else value


def log_text(text: str, limit: int = _MAX_TEXT) -> str:
    """A text of bounded length, in which every JSON parser can read each character."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    elif text.isascii() and "\x7f" not in text:
        return text  # as nearly all texts are
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x7f", "\\x7f")


def new_event_id(at: datetime, message: QueuedMessage, what: str) -> str:
    """An id that sorts by time. The same event written twice has the same id."""
    return f"{int(at.timestamp() * 1000):011x}-{message.queue_id}-{what}"
