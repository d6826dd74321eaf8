"""What the queue holds: a message, and each of its recipients with a state of its own.

A `QueuedMessage` is taken in whole and leaves when its last recipient is done. An
`Entry` is the unit of delivery: one message and those of its recipients that share
a domain, and so a next hop and TLS settings. Times are aware datetimes in UTC.
"""

from __future__ import annotations

from dataclasses import field
from datetime import datetime, timedelta
from enum import StrEnum

from relay.mail.envelope import Body, Notify, Ret
from relay.mail.record import record
from relay.policy.settings import TlsSettings

TLS_REPORT = "tls-report"
"""`QueuedMessage.origin` of a mail that carries a report on TLS (RFC 8460)."""


class State(StrEnum):
    """The state of one recipient. Each recipient is in exactly one."""

    QUEUED = "queued"
    """Never tried yet."""
    DEFERRED = "deferred"
    """Tried; to be tried again."""
    HELD = "held"
    """Set aside by the operator."""
    DELIVERED = "delivered"
    BOUNCED = "bounced"
    EXPIRED = "expired"
    REMOVED = "removed"
    """Taken out by the operator."""

    @property
    def is_final(self) -> bool:
        """Whether nothing more will be tried."""
        return self in _FINAL


_FINAL = frozenset({State.DELIVERED, State.BOUNCED, State.EXPIRED, State.REMOVED})


@record(frozen=True, slots=True)
class MessageSummary:
    """Header fields the delivery log shows, decoded and cut; "" where the message has none."""

    message_id: str = ""
    from_: str = ""
    to: str = ""
    subject: str = ""
    auto_submitted: bool = False
    """The message says it was made by a program (RFC 3834 §5)."""


@record(frozen=True, slots=True)
class Terms:
    """What holds for a message beyond its envelope, most of it as its sender asked.

    `not_before`: when it is to go out; its age counts from then. `lifetime`: of this message, if
    it is to be shorter than others'. `tags` and `variables` (name and value) are the sender's own
    and told with each event. `is_test`: taken in and not delivered. `is_signed`: false where the
    sender wants no DKIM-Signature of ours. `next_hop`: the name of the next hop that the user or
    the listener is configured to use.
    """

    not_before: datetime | None = None
    lifetime: timedelta | None = None
    tags: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    is_test: bool = False
    is_signed: bool = True
    next_hop: str = ""


@record(frozen=True, slots=True)
class QueuedMessage:
    """A message we are responsible for.

    `size_bytes` counts the stored content, our Received field included. `eight_bit`
    says whether any octet of it is above 127. `origin` is how it came: "smtp", "http", "dsn" or
    `TLS_REPORT`. For people: `client`, address and name of who gave it to us; `client_tls`, version
    and cipher of its TLS; `client_user`, who logged in, each "" for none. Most mail has no `terms`.
    `requiretls`: it came with REQUIRETLS; `tls_required_no`: with the field TLS-Required: No, and
    nothing that beats it (RFC 8689). `is_dotless`: no line of the content begins with a dot,
    and its last line has an end, so that it can be sent as it is stored; False where nobody looked.
    """

    queue_id: str
    reverse_path: str
    arrived: datetime
    size_bytes: int
    summary: MessageSummary
    body: Body = Body.SEVEN_BIT
    eight_bit: bool = False
    smtputf8: bool = False
    ret: Ret | None = None
    envid: str = ""
    origin: str = "smtp"
    client: str = ""
    client_tls: str = ""
    client_user: str = ""
    terms: Terms | None = None
    requiretls: bool = False
    tls_required_no: bool = False
    is_dotless: bool = False

    @property
    def next_hop(self) -> str:
        """The next hop that its client is configured to use, "" for none."""
        return self.terms.next_hop if self.terms is not None else ""

    @property
    def begins(self) -> datetime:
        """From when its age counts: its arrival, or when its sender wants it to go out."""
        if self.terms is None or self.terms.not_before is None:
            return self.arrived
        return max(self.terms.not_before, self.arrived)


@record(frozen=True, slots=True)
class LastAttempt:
    """What the last attempt for a recipient came to, for the operator and for the end of the
    lifetime.
    """

    at: datetime
    code: int
    status: str
    message: str
    host: str = ""
    tls_unmet: bool = False


@record(frozen=True, slots=True)
class QueuedRecipient:
    """One recipient of a queued message. `index` is its place in the envelope, from 0.

    `next_attempt` is None in a final state and while held. `delay_notified`: the
    sender was told once that delivery takes longer.
    """

    index: int
    address: str
    domain: str
    settings: TlsSettings
    notify: frozenset[Notify] = frozenset()
    orcpt: str = ""
    state: State = State.QUEUED
    attempts: int = 0
    next_attempt: datetime | None = None
    last: LastAttempt | None = None
    first_attempt: datetime | None = None
    delay_notified: bool = False


@record(frozen=True, slots=True)
class Entry:
    """One message and its recipients in one domain: what an attempt works on.

    `content` is the whole content where it is small and still at hand from its
    arrival; otherwise None, and `Store.read_content` gives it in pieces. `total` is how
    many recipients the message has in all, done ones included; 0 where nobody counted. `token` is
    the lease that the claim was made under, 0 where the engine has none.
    """

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...]
    content: bytes | None = None
    total: int = 0
    token: int = 0
    domain: str = field(init=False, repr=False, compare=False)
    key: tuple[str, str] = field(init=False, repr=False, compare=False)
    """Queue id and domain, which no two entries share."""

    def __post_init__(self) -> None:
        domain = self.recipients[0].domain
        object.__setattr__(self, "domain", domain)
        object.__setattr__(self, "key", (self.message.queue_id, domain))

    @property
    def settings(self) -> TlsSettings:
        return self.recipients[0].settings
