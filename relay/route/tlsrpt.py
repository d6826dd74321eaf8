"""Where a domain wants reports on TLS to be sent: the TXT record of RFC 8460 §3. Pure.

    v=TLSRPTv1; rua=mailto:tls@example.com, https://reports.example.com/tls

A target is a `mailto:` or an `https:` URI; others are passed over, and so is what is written wrong.
A domain names whom it likes, so no more than `MOST_TARGETS` are written to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from relay.mail.address import AddressError, normalise_domain, parse_path

MOST_TARGETS = 10

_RECORD_BEGINS = b"v=TLSRPTv1;"
_MAILTO = "mailto:"
_HTTPS = "https:"
_HTTPS_PORT = 443


@dataclass(frozen=True, slots=True)
class ReportTarget:
    """A target that reports are sent to.

    `uri`: as the record has it. `address`: for a report by mail; "" for a URL to post to.
    """

    uri: str
    address: str = ""

    @property
    def transport(self) -> str:
        """`mail` or `https`."""
        return "mail" if self.address else "https"


def tlsrpt_name(domain: str) -> str:
    """Where the record is (RFC 8460 §3)."""
    return f"_smtp._tls.{domain}"


def report_targets(texts: Iterable[bytes]) -> tuple[ReportTarget, ...]:
    """The targets in the TXT records of `tlsrpt_name`, each once; none where there is no record.

    `texts`: each record with its strings joined. Records of others are passed over; of our own kind
    there has to be exactly one (RFC 8460 §3). Of a field that is there twice, the first counts.
    """
    records = [text for text in texts if text.startswith(_RECORD_BEGINS)]
    if len(records) != 1:
        return ()
    for field in records[0].split(b";")[1:]:
        name, equals, value = field.strip(b" \t").partition(b"=")
        if equals and name == b"rua":
            uris = dict.fromkeys(uri.strip(b" \t") for uri in value.split(b","))
            targets = (_target(uri) for uri in uris)
            return tuple(one for one in targets if one is not None)[:MOST_TARGETS]
    return ()


def _target(octets: bytes) -> ReportTarget | None:
    """The target a URI means; None where it is none of ours to write to."""
    if not octets.isascii() or not octets.decode("ascii").isprintable() or b" " in octets:
        return None
    uri = octets.decode("ascii")
    scheme = uri[: uri.find(":") + 1].lower()
    if scheme == _MAILTO:
        address = _mail_address(uri[len(_MAILTO) :])
        return ReportTarget(uri, address) if address else None
    return ReportTarget(uri) if scheme == _HTTPS and _is_url(uri) else None


def _mail_address(text: str) -> str:
    """The address of a `mailto:` URI (RFC 6068 §2); fields behind it are passed over. "": none."""
    try:
        address = unquote(text.partition("?")[0], errors="strict")
        found, _ = parse_path(f"<{address}>".encode(), smtputf8=False)
        return "" if normalise_domain(found.rpartition("@")[2]).startswith("[") else found
    except (AddressError, UnicodeError):
        return ""


def _is_url(uri: str) -> bool:
    """Whether a URL has a host and nothing that we do not do: another port, a user's name."""
    try:
        parts = urlsplit(uri)
        port = parts.port
        domain = normalise_domain(parts.hostname or "")
    except (AddressError, ValueError):
        return False
    has_user = "@" in parts.netloc
    return port in (None, _HTTPS_PORT) and not has_user and not domain.startswith("[")
