"""The facts of a session, and of the transaction in it.

Session: connect … QUIT. Transaction: MAIL … end of data (RFC 5321 §3). The connection
fills the facts in during the dialogue; `relay.receive.submission` decides by them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from relay.mail.envelope import Body, Recipient, Ret
from relay.receive.access import User
from relay.receive.spec import ListenerAuth, ListenerSpec, ListenerTls

_NAME_OCTETS = 255


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """The TLS of a session."""

    version: str
    cipher: str


@dataclass(slots=True)
class Session:
    """`client`: its address; "" through a UNIX socket; None where a proxy did not give it.

    `helo`: the name in EHLO or HELO, "" before that; `extended`: the client sent EHLO.
    """

    listener: ListenerSpec
    client: str | None = ""
    helo: str = ""
    extended: bool = False
    tls: TlsFacts | None = None
    user: User | None = None
    in_networks: bool = False
    messages: int = 0

    @property
    def offers_starttls(self) -> bool:
        """Whether STARTTLS is offered: not inside TLS (RFC 3207 §4.2)."""
        wanted = self.listener.tls in (ListenerTls.STARTTLS, ListenerTls.STARTTLS_REQUIRED)
        return wanted and self.tls is None

    @property
    def must_start_tls(self) -> bool:
        return self.listener.tls is ListenerTls.STARTTLS_REQUIRED and self.tls is None

    @property
    def takes_auth(self) -> bool:
        """Whether this listener has AUTH at all."""
        return self.listener.auth is not ListenerAuth.NONE

    @property
    def offers_auth(self) -> bool:
        """Whether AUTH may be used now: in clear only if the operator allows it (RFC 4954 §9)."""
        may_be_clear = self.listener.auth_without_tls or self.client == ""
        return self.takes_auth and (self.tls is not None or may_be_clear)

    @property
    def next_hop(self) -> str:
        """The next hop of this client's mail: the user's, or the listener's; "" for none."""
        return (self.user and self.user.next_hop) or self.listener.next_hop or ""

    @property
    def must_authenticate(self) -> bool:
        return self.listener.auth is ListenerAuth.REQUIRED and self.user is None

    @property
    def may_relay(self) -> bool:
        """Whether the client may relay: as a user, or by network if the listener permits that."""
        return self.user is not None or (self.in_networks and not self.must_authenticate)

    def start_over(self) -> None:
        """Forget all facts from before TLS: the session begins anew (RFC 3207 §4.2)."""
        self.helo = ""
        self.extended = False
        self.user = None


@dataclass(slots=True)
class Transaction:
    """MAIL and the accepted recipients by address: a repeated address is one recipient."""

    reverse_path: str
    body: Body = Body.SEVEN_BIT
    smtputf8: bool = False
    ret: Ret | None = None
    envid: str = ""
    requiretls: bool = False
    size_bytes: int = 0
    recipients: dict[str, Recipient] = field(default_factory=dict)


def name_of(arg: bytes) -> str:
    """The name that a client gives itself, cut, and with unprintable characters escaped."""
    text = arg[:_NAME_OCTETS].decode("utf-8", "backslashreplace")
    return text if text.isprintable() else ascii(text)[1:-1]
