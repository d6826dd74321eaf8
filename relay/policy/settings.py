"""The two settings that decide how secure a hop has to be, each with its source.

`require_tls`: nothing of the message is said in clear. `skip_verification`: nobody
looks at the certificate. They are resolved one by one when a message is accepted
(`relay.policy.rules`), stored with it for each recipient, and only ever tightened after.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["FloorUse", "Setting", "Source", "TlsSettings"]


class Source(StrEnum):
    """Who spoke for a setting, as the delivery log names it."""

    MESSAGE = "message"
    MESSAGE_REFUSED = "message-refused"
    """The message would have weakened a rule that says `allow_override: false`; the rule stood."""
    DESTINATION = "destination"
    DOMAIN = "domain"
    API = "api"
    """Set over HTTP for the sender domain."""
    DEFAULT = "default"


class FloorUse(StrEnum):
    """What is done with what a recipient's domain asks for by MTA-STS, or by DANE."""

    ENFORCE = "enforce"
    TESTING = "testing"
    """Looked up, logged and reported; mail is never held to it."""
    IGNORE = "ignore"
    """Not looked up."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and who spoke for it. `rule`: the name of the rule that spoke, "" where none did."""

    value: bool
    source: Source
    rule: str = ""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Both settings of one message for one recipient domain."""

    require_tls: Setting
    skip_verification: Setting
