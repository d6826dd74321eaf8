"""A listener, as the operator describes it.

A `ListenerSpec` says where a listener listens, when TLS begins, whether it offers AUTH,
and how it treats what is almost SMTP. `parse_address` reads the three forms of an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from relay.mail.option import Path, TextForm
from relay.route.security import TlsVersion


class ListenerTls(StrEnum):
    """When TLS begins at a listener."""

    NONE = "none"
    STARTTLS = "starttls"
    STARTTLS_REQUIRED = "starttls-required"
    IMPLICIT = "implicit"


class ListenerAuth(StrEnum):
    """Whether a listener offers AUTH, and whether it requires it."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class BareNewline(StrEnum):
    """What happens to a CR or LF that stands alone in a message (RFC 5321 §2.3.8 forbids it)."""

    REFUSE = "refuse"
    NORMALISE = "normalise"
    """It becomes a space and never a line end, so no second message and no header field begins
    there.
    """
    LINE_END = "line-end"
    """A LF ends a line as CRLF does; a CR becomes a space. For clients that never send CRLF."""


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """`address`: host:port, [v6]:port, or unix:/path. `certificate`, `key`: PEM files.

    `auth_without_tls`: passwords may be sent in clear. `add_missing_headers`: the relay adds the
    fields that a simple client left out: Date, Message-ID, From (RFC 6409 §8). `helo_required`:
    MAIL is refused before EHLO or HELO (RFC 5321 §4.1.4). `socket_mode`: who may connect to a UNIX
    socket, as octal digits; `socket_group`: the group of its file. `next_hop`: where the mail of
    its clients goes, by name; see `relay.route.choice`.
    """

    address: Annotated[str, TextForm.LISTEN_ADDRESS]
    tls: ListenerTls = ListenerTls.NONE
    auth: ListenerAuth = ListenerAuth.NONE
    certificate: Path | None = None
    key: Path | None = None
    proxy_protocol: bool = False
    bare_newline: BareNewline = BareNewline.REFUSE
    auth_without_tls: bool = False
    add_missing_headers: bool = False
    helo_required: bool = True
    min_tls: TlsVersion = TlsVersion.TLS_1_2
    socket_mode: Annotated[str, TextForm.FILE_MODE] = "0600"
    socket_group: Annotated[str, TextForm.GROUP] | None = None
    next_hop: Annotated[str, TextForm.NAME] | None = None


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """An address and port to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A UNIX socket to listen on; the mode of its file decides who may connect."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


def parse_address(text: str) -> TcpAddress | UnixAddress:
    """`127.0.0.1:25`, `[::1]:25` or `unix:/path`; ValueError for anything else."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path:
            raise ValueError(f"{text!r} names no path")
        return UnixAddress(path)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port, [address]:port or unix:/path")
    return TcpAddress(host, int(port))
