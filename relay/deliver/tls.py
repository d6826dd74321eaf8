"""TLS contexts for going out: what is trusted, what is spoken, what is looked at.

A verifying context holds RFC 9525's rules, which RFC 8461 §4.2 asks of mail hosts too: a chain to a
root of the system or of `tls.ca_file`, in date, and the host's name as a dNSName of the
subjectAltName; the common name is no identity. The flags are ours to decide and do not change
with the Python that runs us: the whole chain up to a root (no partial chains), and without
VERIFY_X509_STRICT, under which private authorities that work everywhere else would fail.

A context that does not verify looks at nothing. Contexts are built once and shared, since
loading the roots takes tens of milliseconds.

A session may be resumed (RFC 8446 §2.2): the host then shows no certificate, and nobody looks at
one, so the session carries the verdict of the handshake it comes from. `TlsSessions` keeps each
under the key it was made for, as the pool keeps connections, and lends it to no other.
"""

from __future__ import annotations

import ssl
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ipaddress import ip_address

from relay.route.security import STRONG, Requirement, TlsVersion

__all__ = ["Resumption", "TlsContexts", "TlsSessions", "carrying", "server_name"]

_VERSIONS = {
    TlsVersion.TLS_1_0: ssl.TLSVersion.TLSv1,
    TlsVersion.TLS_1_1: ssl.TLSVersion.TLSv1_1,
    TlsVersion.TLS_1_2: ssl.TLSVersion.TLSv1_2,
    TlsVersion.TLS_1_3: ssl.TLSVersion.TLSv1_3,
}


class Resumption:
    """The session that one connection's handshake is to resume, None for none."""

    __slots__ = ("session",)

    def __init__(self) -> None:
        self.session: ssl.SSLSession | None = None


_resumption: ContextVar[Resumption | None] = ContextVar("_resumption", default=None)


@contextmanager
def carrying(resumption: Resumption) -> Iterator[None]:
    """Connections made, and handshakes begun, in here are this resumption's.

    No event loop has a parameter for a session, but all make the TLS object in `wrap_bio`: asyncio
    in the context of the handshake's beginning, uvloop in that of the connection's.
    """
    token = _resumption.set(resumption)
    try:
        yield
    finally:
        _resumption.reset(token)


class _Context(ssl.SSLContext):
    """A context that resumes."""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        carried = _resumption.get()
        if carried is not None:
            session = carried.session
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


class TlsSessions:
    """Sessions that may be resumed, the latest for each key. Each is lent once (RFC 8446 §C.4)."""

    def __init__(self, *, most: int = 1000, age_seconds: float = 3600.0) -> None:
        self._most = most
        self._age_seconds = age_seconds
        self._kept: OrderedDict[Hashable, tuple[float, ssl.SSLSession]] = OrderedDict()

    def take(self, key: Hashable, *, now: float) -> ssl.SSLSession | None:
        """A session made under exactly this key, not long ago."""
        kept_at, session = self._kept.pop(key, (0.0, None))
        if session is None or now - kept_at > min(self._age_seconds, session.timeout):
            return None
        return session

    def keep(self, key: Hashable, session: ssl.SSLSession | None, *, now: float) -> None:
        """Keep a session for the next connection with this key; the oldest of all makes room."""
        if session is None or not session.has_ticket:
            return
        self._kept[key] = now, session
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


class TlsContexts:
    """The contexts of one configuration. `ca_file`: roots in addition to the system's."""

    def __init__(self, ca_file: str | None = None) -> None:
        self._ca_file = ca_file
        self._built: dict[tuple[bool, TlsVersion, int], ssl.SSLContext] = {}
        self.sessions = TlsSessions()

    def context(self, needed: Requirement) -> ssl.SSLContext:
        """The context for a session with this requirement."""
        return self._kept((needed.verify, needed.min_version, needed.security_level))

    def verifying(self, min_version: TlsVersion) -> ssl.SSLContext:
        """The context for a web server that has to prove who it is as a mail host has to."""
        return self._kept((True, min_version, STRONG))

    def _kept(self, key: tuple[bool, TlsVersion, int]) -> ssl.SSLContext:
        if key not in self._built:
            self._built[key] = self._build(*key)
        return self._built[key]

    def _build(self, verify: bool, version: TlsVersion, level: int) -> ssl.SSLContext:
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        # Anonymous and export ciphers are in no level of DEFAULT; PSK and SRP are nothing for
        # strangers.
        context.set_ciphers(f"DEFAULT:!PSK:!SRP:@SECLEVEL={level}")
        with warnings.catch_warnings():
            # TLS 1.0 and 1.1 are deprecated (RFC 8996), and still better than clear text.
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = _VERSIONS[version]
        if verify:
            self._look_at_certificates(context)
        else:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def _look_at_certificates(self, context: ssl.SSLContext) -> None:
        context.check_hostname = True
        context.verify_mode = ssl.CERT_REQUIRED
        context.hostname_checks_common_name = False
        context.verify_flags = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if self._ca_file is not None:
            context.load_verify_locations(cafile=self._ca_file)


def server_name(name: str) -> str | None:
    """A host's name as SNI says it and as its certificate has to; None where it has none that could
    be.

    An address is not a name: no certificate is looked up by it (RFC 6066 §3), and none vouches for
    it here.
    """
    name = name.removesuffix(".").lower()
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return name or None
    return None
