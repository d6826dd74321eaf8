"""The certificate that the relay shows to clients, over SMTP and HTTP, and how it is replaced.

`ServerTls` holds the context that the next handshake uses. `reload` reads the files again; the old
context stays while they are broken. The lowest version is TLS 1.2 (RFC 8996, RFC 9325 §3.1.1). An
operator with older clients may allow older versions: weak encryption is better than none.
Renegotiation is off, and OpenSSL handles session tickets.
"""

from __future__ import annotations

import ssl
import warnings

from relay.route.security import TlsVersion


class CertificateError(Exception):
    """The relay cannot use a certificate or its key; the text says why."""


class ServerTls:
    """The TLS context of one listener."""

    def __init__(
        self, certificate: str, key: str | None, min_version: TlsVersion = TlsVersion.TLS_1_2
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._min_version = min_version
        self.context = self._load()

    def reload(self) -> None:
        """Read the files, for the next handshakes. After `CertificateError` nothing has changed."""
        self.context = self._load()

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = _VERSIONS[self._min_version]
        if self._min_version in (TlsVersion.TLS_1_0, TlsVersion.TLS_1_1):
            context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL has no older TLS above that level
        else:
            context.set_ciphers(_FORWARD_SECRET)
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_passphrase)
        except (ssl.SSLError, OSError, ValueError) as exc:
            raise CertificateError(f"{self._certificate} cannot be used: {exc}") from exc
        return context


_FORWARD_SECRET = "ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:DHE+CHACHA20"
"""TLS 1.2 with forward secrecy and authenticated encryption only, no CBC (RFC 9325 §4.2)."""

_VERSIONS = {
    TlsVersion.TLS_1_0: ssl.TLSVersion.TLSv1,
    TlsVersion.TLS_1_1: ssl.TLSVersion.TLSv1_1,
    TlsVersion.TLS_1_2: ssl.TLSVersion.TLSv1_2,
    TlsVersion.TLS_1_3: ssl.TLSVersion.TLSv1_3,
}


def _no_passphrase() -> str:
    # Without this function OpenSSL would ask for a passphrase on the terminal, and wait.
    raise ValueError("the private key is encrypted")
