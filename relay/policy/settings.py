"""The two settings that decide how secure a hop has to be, each with its source.

`require_tls`: the message is never sent without TLS. `skip_verification`: the certificate
is not verified. Each is resolved when a message is accepted (`relay.policy.rules`) and stored
with the message for each recipient. After that it can only become stricter.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from relay.mail.record import record


class Source(StrEnum):
    """Where a setting came from, as the delivery log names it."""

    MESSAGE = "message"
    MESSAGE_REFUSED = "message-refused"
    """The message asked for less than a rule with `allow_override: false`; the rule decided."""
    DESTINATION = "destination"
    DOMAIN = "domain"
    API = "api"
    """Set over HTTP for the sender domain."""
    DEFAULT = "default"


class FloorUse(StrEnum):
    """How the relay uses what a recipient's domain publishes by MTA-STS or DANE."""

    ENFORCE = "enforce"
    TESTING = "testing"
    """Looked up, logged and reported; it stops no mail."""
    IGNORE = "ignore"
    """Not looked up."""


class MemoryAction(StrEnum):
    """What is done where a host shows less TLS than it has shown before."""

    IGNORE = "ignore"
    """Nothing is remembered."""
    LOG = "log"
    """An alarm, and the mail goes."""
    DEFER = "defer"
    """An alarm, and the mail waits for a day."""


@record(frozen=True, slots=True)
class Setting:
    """A value and its source. `rule`: the name of the rule that gave it, "" without a rule."""

    value: bool
    source: Source
    rule: str = ""


@record(frozen=True, slots=True)
class TlsSettings:
    """Both settings of one message for one recipient domain."""

    require_tls: Setting
    skip_verification: Setting
    _hash: int = field(init=False, repr=False, compare=False)
    """The hash, computed once: texts and rows are kept by settings, which are few."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.require_tls, self.skip_verification)))

    def __hash__(self) -> int:
        return self._hash
