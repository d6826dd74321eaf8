"""The settings of a sender domain in the forms of Mailgun's interface. Pure.

Older and newer documents of Mailgun differ in the form of an answer. The relay's answer has the
fields in each place where a client may look.
"""

from __future__ import annotations

from relay.api.mailgun_form import ApiError, Form, shown
from relay.policy.fields import yes_or_no
from relay.policy.settings import TlsSettings
from relay.queue.api_state import DomainSettings

_SETTINGS = frozenset({"require_tls", "skip_verification", "require-tls", "skip-verification"})
_IGNORED = frozenset({"spam_action", "web_prefix", "web_scheme", "wildcard"})
"""Settings of Mailgun for tracking links and incoming mail, which have no effect here."""

_UPDATED = "Domain connection settings have been updated, may take 10 minutes to fully propagate"


def read_settings(form: Form, *, needed: bool) -> DomainSettings:
    """The settings in a form. `needed`: at least one, and no other parameter."""
    for name, _ in form.fields:
        if name not in _SETTINGS and (needed or name not in _IGNORED):
            raise ApiError(400, f"{shown(name)} parameter is not supported by this relay")
    settings = DomainSettings(_truth(form, "require_tls"), _truth(form, "skip_verification"))
    if needed and settings == DomainSettings():
        raise ApiError(400, "require_tls or skip_verification parameter is missing")
    return settings


def as_connection(settings: TlsSettings) -> dict[str, object]:
    """The answer to GET …/connection."""
    return {"connection": _pair(settings), **_pair(settings)}


def as_updated(settings: TlsSettings) -> dict[str, object]:
    """The answer to PUT …/connection."""
    pair = _pair(settings)
    dashed = {name.replace("_", "-"): value for name, value in pair.items()}
    return {"message": _UPDATED, **dashed, **pair}


def as_domain(name: str, settings: TlsSettings) -> dict[str, object]:
    """A domain in Mailgun's form, with constants for what a relay does not have."""
    return {
        "id": name,
        "name": name,
        **_pair(settings),
        "state": "active",
        "type": "custom",
        "wildcard": False,
        "spam_action": "disabled",
        "is_disabled": False,
        "smtp_login": f"postmaster@{name}",
        "web_prefix": "email",
        "web_scheme": "http",
        "created_at": "Thu, 01 Jan 1970 00:00:00 GMT",
    }


def _pair(settings: TlsSettings) -> dict[str, bool]:
    return {
        "require_tls": settings.require_tls.value,
        "skip_verification": settings.skip_verification.value,
    }


def _truth(form: Form, name: str) -> bool | None:
    values = form.all(name) or form.all(name.replace("_", "-"))
    if not values:
        return None
    truths = {yes_or_no(value.encode()) for value in values}
    if None in truths or len(truths) > 1:
        raise ApiError(400, f"{name} parameter is neither true nor false")
    return truths.pop()
