"""TLS contexts for outgoing connections: roots, versions, and the check of certificates.

A verifying context follows RFC 9525, which RFC 8461 §4.2 requires for mail hosts too: a valid chain
to a root of the system or of `tls.ca_file`, and the host's name as a dNSName of the subjectAltName;
the common name is no identity. The relay sets the flags itself, so that they do not change with the
version of Python: the complete chain up to a root (no partial chains), and no VERIFY_X509_STRICT,
which would refuse private authorities that other programs accept.

A context that does not verify accepts any certificate. Contexts are built once and shared, because
loading the roots takes tens of milliseconds.

If a host has TLSA records, they judge its certificate, and OpenSSL does not (RFC 7672 §3.1): the
handshake accepts any certificate, and `Handshake.judge` checks it before the next command.

A next hop of the operator's may have roots of its own (`ca_file`, in place of all others), another
name to check (`verify_name`), keys that it must have (`pin_sha256`), and a certificate that the
relay shows it. The files are read again when they have changed; while they cannot be used, what was
read before stays in use. `verify_name` is also the name in SNI: a host with several names shows the
certificate of the name that it is asked for.

A session may be resumed (RFC 8446 §2.2). The host then shows no certificate, so the session keeps
the verdict of its first handshake. `TlsSessions` keeps each session under its key, as the pool
keeps connections, and lends it for no other key.
"""

from __future__ import annotations

import _ssl
import logging
import os
import ssl
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address

from cryptography.x509.verification import Store

from relay.deliver.protocol import error_text
from relay.mail.outcome import PolicyResult, VerifiedBy
from relay.route.chain import fault_of, pin_of, store_of
from relay.route.dane import matched
from relay.route.floor import Proof
from relay.route.next_hop import NO_CHAIN, Host, NextHop
from relay.route.secret_files import SecretFileError, place_of
from relay.route.security import STRONG, Requirement, TlsVersion

log = logging.getLogger(__name__)

_VERSIONS = {
    TlsVersion.TLS_1_0: ssl.TLSVersion.TLSv1,
    TlsVersion.TLS_1_1: ssl.TLSVersion.TLSv1_1,
    TlsVersion.TLS_1_2: ssl.TLSVersion.TLSv1_2,
    TlsVersion.TLS_1_3: ssl.TLSVersion.TLSv1_3,
}


@dataclass(frozen=True, slots=True)
class CertificateVerdict:
    """The judgement of a host's certificate.

    `verified_by`: what verified it; None where it was not checked, or is not valid. `fault`: its
    fault under a policy of the recipient's domain, also in testing mode. `error`: why it is not
    good enough for the message, "" where it is. `pin`: the pin of the next hop that it matches.
    """

    verified_by: VerifiedBy | None = None
    fault: PolicyResult | None = None
    error: str = ""
    pin: str | None = None


@dataclass(frozen=True, slots=True)
class KeptSession:
    """A TLS session, and the verdict on the certificate of its first handshake."""

    session: ssl.SSLSession
    verdict: CertificateVerdict


class Resumption:
    """The handshake of one connection.

    It has the session to resume (None for none), and the TLS object that the event loop made, which
    is still needed after a handshake that failed.
    """

    __slots__ = ("kept_session", "made")

    def __init__(self) -> None:
        self.kept_session: KeptSession | None = None
        self.made: ssl.SSLObject | None = None


_resumption: ContextVar[Resumption | None] = ContextVar("_resumption", default=None)


@contextmanager
def carrying(resumption: Resumption) -> Iterator[None]:
    """Connections and handshakes that begin inside this context use this resumption.

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
        if carried is not None and carried.kept_session is not None:
            session = carried.kept_session.session
        made = super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        if carried is not None:
            carried.made = made
        return made


class TlsSessions:
    """Sessions that may be resumed, the latest for each key. Each is lent once (RFC 8446 §C.4)."""

    def __init__(self, *, most: int = 1000, age_seconds: float = 3600.0) -> None:
        self._most = most
        self._age_seconds = age_seconds
        self._kept: OrderedDict[Hashable, tuple[float, KeptSession]] = OrderedDict()

    def take(self, key: Hashable, *, now: float) -> KeptSession | None:
        """A session made under exactly this key, not long ago."""
        kept_at, kept = self._kept.pop(key, (0.0, None))
        if kept is None or now - kept_at > min(self._age_seconds, kept.session.timeout):
            return None
        return kept

    def keep(self, key: Hashable, kept_session: KeptSession | None, *, now: float) -> None:
        """Keep a session for the next connection with this key; the oldest of all makes room."""
        if kept_session is None or not kept_session.session.has_ticket:
            return
        self._kept[key] = now, kept_session
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


_FAULTS = {10: PolicyResult.EXPIRED, 62: PolicyResult.HOST_MISMATCH}
"""By OpenSSL's X509_V_ERR codes (RFC 8460 §4.3); all others are NOT_TRUSTED."""


@dataclass(frozen=True, slots=True)
class Handshake:
    """How a session with a host begins TLS, and how its certificate is judged.

    `server_name`: the name in SNI; None: the host has no name. `roots`: the trusted roots. `stamp`:
    of the files of its next hop; a session that was made with other files is not resumed.
    """

    context: ssl.SSLContext
    server_name: str | None
    needed: Requirement
    roots: Callable[[], Store | None]
    stamp: Hashable = ()

    @property
    def verifies(self) -> bool:
        """Whether OpenSSL checks the certificate."""
        return self.context.check_hostname

    def judge(self, session: ssl.SSLObject) -> CertificateVerdict:
        """The verdict on the certificate of a handshake that succeeded."""
        verdict = self._judge(session)
        if verdict.error or not self.needed.pins:
            return verdict
        pin = pin_of(next(iter(sent_chain(session)), b""))
        if pin in self.needed.pins:
            return replace(verdict, verified_by=verdict.verified_by or VerifiedBy.PIN, pin=pin)
        error = f"the key of the certificate is not pinned; its pin is {pin or 'not to be read'}"
        return CertificateVerdict(None, verdict.fault, error)

    def _judge(self, session: ssl.SSLObject) -> CertificateVerdict:
        """The verdict without the pins of the next hop."""
        asks = self.needed.floor.asks
        if self.needed.proof is Proof.DANE:
            dane = self.needed.floor.dane
            by = matched(dane, sent_chain(session), now=_now())
            if by is not None:
                return CertificateVerdict(by)
            error = f"the certificate matches no TLSA record of {dane.base}"
            return CertificateVerdict(None, PolicyResult.VALIDATION_FAILURE, error)
        by = VerifiedBy.PKIX if self.verifies else None
        if asks is not Proof.NOTHING and self._is_too_old(session):
            return CertificateVerdict(by, PolicyResult.VALIDATION_FAILURE)
        if asks is Proof.DANE or (asks is Proof.PKIX and not self.verifies):
            return CertificateVerdict(by, self._fault(session))
        return CertificateVerdict(by)

    def _is_too_old(self, session: ssl.SSLObject) -> bool:
        """Whether the version of TLS is older than the floor allows."""
        least = _VERSIONS[self.needed.floor_version]
        return session.version() in {name for name, each in _VERSIONS.items() if each < least}

    def judge_refused(
        self, error: ssl.SSLCertVerificationError, session: ssl.SSLObject | None
    ) -> CertificateVerdict:
        """The verdict on a certificate that OpenSSL refused."""
        text = f"certificate not verified: {error.verify_message}"
        match self.needed.floor.asks:
            case Proof.PKIX | Proof.NOTHING:
                fault = _FAULTS.get(error.verify_code, PolicyResult.NOT_TRUSTED)
                return CertificateVerdict(None, fault, text)
            case Proof.DANE if session is not None:
                return CertificateVerdict(None, self._fault(session), text)
        return CertificateVerdict(None, None, text)

    def _fault(self, session: ssl.SSLObject) -> PolicyResult | None:
        """The fault of a certificate under a policy in testing mode."""
        floor, chain = self.needed.floor, sent_chain(session)
        if floor.asks is Proof.DANE:
            is_met = matched(floor.dane, chain, now=_now()) is not None
            return None if is_met else PolicyResult.VALIDATION_FAILURE
        return fault_of(chain, self.roots(), self.server_name, now=_now())


def _now() -> datetime:
    return datetime.now(UTC)


def sent_chain(session: ssl.SSLObject) -> tuple[bytes, ...]:
    """The certificates that a host sent, in DER, its own first, valid or not.

    They are also known after a handshake that failed.
    """
    if hasattr(session, "get_unverified_chain"):  # Python 3.13
        return tuple(session.get_unverified_chain())
    sent = session._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
    return tuple(certificate.public_bytes(_ssl.ENCODING_DER) for certificate in sent or ())


class HopFilesError(Exception):
    """A file of a next hop cannot be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class _HopFiles:
    """The files that a next hop adds to a context. `name`: its own."""

    name: str = ""
    ca_file: str | None = None
    certificate: str | None = None
    key: str | None = None

    @classmethod
    def of(cls, hop: NextHop | None, *, verifies: bool) -> _HopFiles:
        if hop is None:
            return _NO_FILES
        ca_file = hop.ca_file if verifies and hop.ca_file != NO_CHAIN else None
        if ca_file is None and hop.certificate is None:
            return _NO_FILES
        return cls(hop.name, ca_file, _placed(hop, hop.certificate), _placed(hop, hop.key))

    @property
    def stamp(self) -> Hashable:
        """It differs when a file has changed."""
        paths = (self.ca_file, self.certificate, self.key)
        return tuple(_stamp(path) for path in paths if path is not None)


def _placed(hop: NextHop, path: str | None) -> str | None:
    """The file that a key names, which systemd may give to the service."""
    try:
        return None if path is None else str(place_of(path))
    except SecretFileError as error:
        raise HopFilesError(f"next hop {hop.name}: {error}") from error


_NO_FILES = _HopFiles()


def _stamp(path: str) -> Hashable:
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno
    return status.st_mtime_ns, status.st_size, status.st_ino


_Kind = tuple[bool, TlsVersion, int, _HopFiles]


class _Built:
    """A context, and the stamp of the files that it was made of."""

    def __init__(self, context: ssl.SSLContext, stamp: Hashable) -> None:
        self.context = context
        self.stamp = stamp
        self._roots: tuple[Store | None] | None = None

    def roots(self) -> Store | None:
        """Its roots, to check a chain without a handshake; read once."""
        if self._roots is None:
            self._roots = (store_of(self.context.get_ca_certs(binary_form=True)),)
        return self._roots[0]


class TlsContexts:
    """The contexts of one configuration. `ca_file`: roots in addition to the system's."""

    def __init__(self, ca_file: str | None = None) -> None:
        self._ca_file = ca_file
        self._built: dict[_Kind, _Built] = {}
        self.sessions = TlsSessions()

    def handshake(self, host: Host, needed: Requirement) -> Handshake:
        """How a session with a host, under this requirement, goes into TLS.

        Under DANE the name that is sent is the TLSA base domain (RFC 7672 §8.1). Raises
        `HopFilesError` where a file of the next hop cannot be used.
        """
        hop, is_dane = host.hop, needed.proof is Proof.DANE
        verifies = needed.looks and needed.proof not in (Proof.DANE, Proof.PIN)
        files = _HopFiles.of(hop, verifies=verifies)
        built = self._kept((verifies, needed.min_version, needed.security_level, files))
        name = (hop.verify_name if hop is not None else None) or host.name
        if is_dane:
            name = needed.floor.dane.base
        roots = partial(self._roots, _HopFiles.of(hop, verifies=True))
        return Handshake(built.context, server_name(name), needed, roots, built.stamp)

    def _roots(self, files: _HopFiles) -> Store | None:
        return self._kept((True, TlsVersion.TLS_1_2, STRONG, files)).roots()

    def verifying(self, min_version: TlsVersion) -> ssl.SSLContext:
        """The context for a web server that has to prove who it is as a mail host has to."""
        return self._kept((True, min_version, STRONG, _NO_FILES)).context

    def _kept(self, kind: _Kind) -> _Built:
        """The context of a kind, made again where a file of the next hop has changed."""
        built, files = self._built.get(kind), kind[3]
        if built is not None and (files is _NO_FILES or built.stamp == files.stamp):
            return built
        stamp = files.stamp  # before the files are read: they may change meanwhile
        try:
            made = _Built(self._build(*kind), stamp)
        except HopFilesError as error:
            if built is None:
                raise
            log.error("%s; what was read before stays in use", error)
            built.stamp = stamp
            return built
        self._built[kind] = made
        return made

    def _build(
        self, verify: bool, version: TlsVersion, level: int, files: _HopFiles
    ) -> ssl.SSLContext:
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)
        # Anonymous and export ciphers are in no level of DEFAULT; PSK and SRP need a secret that
        # both sides know.
        context.set_ciphers(f"DEFAULT:!PSK:!SRP:@SECLEVEL={level}")
        with warnings.catch_warnings():
            # TLS 1.0 and 1.1 are deprecated (RFC 8996), and still better than clear text.
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = _VERSIONS[version]
        if verify:
            self._look_at_certificates(context, files)
        else:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if files.certificate is not None:
            _show(context, files)
        return context

    def _look_at_certificates(self, context: ssl.SSLContext, files: _HopFiles) -> None:
        context.check_hostname = True
        context.verify_mode = ssl.CERT_REQUIRED
        context.hostname_checks_common_name = False
        context.verify_flags = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST
        if files.ca_file is not None:
            _trust(context, files)
            return
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if self._ca_file is not None:
            context.load_verify_locations(cafile=self._ca_file)


def _trust(context: ssl.SSLContext, files: _HopFiles) -> None:
    """The roots of a next hop, and no others."""
    try:
        context.load_verify_locations(cafile=files.ca_file)
    except (OSError, ValueError) as error:
        text = f"next hop {files.name}: the roots in {files.ca_file} cannot be used"
        raise HopFilesError(f"{text}: {error_text(error)}") from error


def _show(context: ssl.SSLContext, files: _HopFiles) -> None:
    """The certificate that the relay shows a next hop, which asks for one."""
    assert files.certificate is not None
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        text = f"next hop {files.name}: the certificate in {files.certificate}"
        text += f" with the key in {files.key}" if files.key else ""
        raise HopFilesError(f"{text} cannot be used: {error_text(error)}") from error


def _no_passphrase() -> str:
    # Without this function OpenSSL would ask for a passphrase on the terminal, and wait.
    raise ValueError("the private key is encrypted")


def server_name(name: str) -> str | None:
    """A host's name for SNI and for the check of its certificate; None where it has no valid name.

    An address is no name: SNI does not allow it (RFC 6066 §3), and no certificate is valid for it
    here.
    """
    name = name.removesuffix(".").lower()
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return name or None
    return None
