"""The MAIL and RCPT lines of a message for a host, given the extensions that it offers. Pure.

The addresses are sent as the bytes that were accepted, without another parse. A last check makes
sure that no address can be two commands, or lead to a domain that was not authorised. The
extensions, and the status where a host without one cannot take the message:

    SIZE         RFC 1870   always sent; a message over the limit: 5.3.4
    8BITMIME     RFC 6152   BODY=8BITMIME where any octet is above 127; without it the content is
                            converted (`relay.deliver.sevenbit`); if that is not possible: 5.6.3
    SMTPUTF8     RFC 6531   where an address or the header needs it; without it: 5.6.7, 5.6.9
    DSN          RFC 3461   RET, ENVID, NOTIFY, ORCPT passed on unchanged
    REQUIRETLS   RFC 8689   sent for a message that came with it, in TLS
    PIPELINING   RFC 2920   the complete envelope in one write
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from relay.deliver.diagnosis import CannotBeSent
from relay.mail.address import AddressError, domain_of
from relay.mail.record import record
from relay.queue.entry import QueuedMessage, QueuedRecipient

MOST_RECIPIENTS = 100
"""In one transaction. Every host has to take as many (RFC 5321 §4.5.3.1.8)."""

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_PATH = re.compile(rb'(?:"[^"\\@]*+(?:\\[^@][^"\\@]*+)*"|[^<>"\\ @]++)(?:@[^<>"\\ @]++)?')
"""RFC 5321 §4.1.2, wide: brackets and spaces only within quotes, one @ in all."""
_XTEXT = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Extensions:
    """The extensions in a host's EHLO reply (RFC 5321 §4.1.1.1) that the relay uses.

    `size_bytes` 0: the host names no limit.
    """

    starttls: bool = False
    pipelining: bool = False
    size: bool = False
    size_bytes: int = 0
    eight_bit_mime: bool = False
    smtputf8: bool = False
    dsn: bool = False
    requiretls: bool = False
    auth: frozenset[str] = frozenset()

    @classmethod
    def offered(cls, keywords: Mapping[str, str], auth: Collection[str] = ()) -> Extensions:
        """From the lower-case keywords and their parameters."""
        limit = keywords.get("size", "").strip()
        return cls(
            starttls="starttls" in keywords,
            pipelining="pipelining" in keywords,
            size="size" in keywords,
            size_bytes=int(limit)
            if limit.isascii() and limit.isdigit() and len(limit) <= 20
            else 0,
            eight_bit_mime="8bitmime" in keywords,
            smtputf8="smtputf8" in keywords,
            dsn="dsn" in keywords,
            requiretls="requiretls" in keywords,
            auth=frozenset(mechanism.upper() for mechanism in auth),
        )


NO_EXTENSIONS = Extensions()


@record(frozen=True, slots=True)
class TransactionCommands:
    """The lines of one transaction. `rcpts`: by the recipient's index. `utf8`: said with SMTPUTF8,
    `requiretls` with REQUIRETLS.
    """

    mail: bytes
    rcpts: Mapping[int, bytes]
    utf8: bool = False
    requiretls: bool = False


def prepare(
    message: QueuedMessage,
    recipients: Sequence[QueuedRecipient],
    offers: Extensions,
    *,
    header_is_utf8: bool = False,
    not_convertible: str = "",
) -> tuple[TransactionCommands | None, dict[int, CannotBeSent]]:
    """The transaction for `recipients`, or None; and the recipients this host cannot take, and why.

    `message` is in the form that will be sent: `eight_bit` if it could not be converted for this
    host, for the reason `not_convertible`.
    """
    problem = _message_problem(message, offers, header_is_utf8, not_convertible)
    if problem is not None:
        # The recipient's own problem is the better reason: the relay's Received field has its
        # address in UTF-8, too.
        return None, {
            each.index: _recipient_problem(each, offers) or problem for each in recipients
        }
    unsendable: dict[int, CannotBeSent] = {}
    rcpts: dict[int, bytes] = {}
    utf8 = header_is_utf8 or not message.reverse_path.isascii()
    for recipient in recipients:
        wrong = _recipient_problem(recipient, offers)
        if wrong is None:
            rcpts[recipient.index] = _rcpt(recipient, offers)
            utf8 = utf8 or not recipient.address.isascii()
        else:
            unsendable[recipient.index] = wrong
    if not rcpts:
        return None, unsendable
    requiretls = message.requiretls and offers.requiretls
    return TransactionCommands(_mail(message, offers, utf8), rcpts, utf8, requiretls), unsendable


def is_clean(line: bytes) -> bool:
    """Whether a line is one command: no control character that could end it."""
    return _CONTROL.search(line) is None


def needs_conversion(message: QueuedMessage, offers: Extensions) -> bool:
    """Whether this host can take the message only in 7 bits (RFC 6152 §3)."""
    return message.eight_bit and not offers.eight_bit_mime


def _message_problem(
    message: QueuedMessage, offers: Extensions, header_is_utf8: bool, not_convertible: str
) -> CannotBeSent | None:
    if offers.size_bytes and message.size_bytes > offers.size_bytes:
        text = f"takes {offers.size_bytes} octets and no more; the message has {message.size_bytes}"
        return CannotBeSent("5.3.4", text)
    if not message.reverse_path.isascii() and not offers.smtputf8:
        return CannotBeSent("5.6.7", "does not take addresses in UTF-8, as the sender's is")
    if header_is_utf8 and not offers.smtputf8:
        return CannotBeSent("5.6.9", "does not take header fields in UTF-8")
    if needs_conversion(message, offers):
        why = f", which cannot be converted: {not_convertible}" if not_convertible else ""
        return CannotBeSent(
            "5.6.3", f"takes no 8-bit content (8BITMIME), and the message has some{why}"
        )
    if message.reverse_path and not _is_safe_path(message.reverse_path):
        return CannotBeSent("5.1.7", "was not asked: the sender's address cannot be said safely")
    return None


def _recipient_problem(recipient: QueuedRecipient, offers: Extensions) -> CannotBeSent | None:
    if not recipient.address.isascii() and not offers.smtputf8:
        return CannotBeSent("5.6.7", "does not take addresses in UTF-8, as the recipient's is")
    if not _is_safe_path(recipient.address) or not _is_in(recipient.address, recipient.domain):
        return CannotBeSent("5.1.3", "was not asked: the recipient's address cannot be said safely")
    return None


@lru_cache(maxsize=4096)
def _is_safe_path(address: str) -> bool:
    """Whether every reader takes `<address>` for one path. A second guard after the listener's."""
    path = address.encode("utf-8", "surrogateescape")
    return is_clean(path) and _PATH.fullmatch(path) is not None


def _is_in(address: str, domain: str) -> bool:
    """Whether an address is in the domain that was authorised and routed."""
    if address.rpartition("@")[2].lower() == domain:
        return True
    try:
        return domain_of(address) == domain
    except AddressError:
        return False


def _mail(message: QueuedMessage, offers: Extensions, utf8: bool) -> bytes:
    parts = [f"MAIL FROM:<{message.reverse_path}>"]
    if offers.size:
        parts.append(f"SIZE={message.size_bytes}")
    if message.eight_bit and offers.eight_bit_mime:
        parts.append("BODY=8BITMIME")
    if utf8:
        parts.append("SMTPUTF8")
    if offers.dsn and message.ret is not None:
        parts.append(f"RET={message.ret}")
    if offers.dsn and _XTEXT.fullmatch(message.envid):
        parts.append(f"ENVID={message.envid}")
    if message.requiretls and offers.requiretls:
        parts.append("REQUIRETLS")
    return " ".join(parts).encode()


def _rcpt(recipient: QueuedRecipient, offers: Extensions) -> bytes:
    parts = [f"RCPT TO:<{recipient.address}>"]
    if offers.dsn and recipient.notify:
        parts.append("NOTIFY=" + ",".join(sorted(recipient.notify)))
    if offers.dsn and _XTEXT.fullmatch(recipient.orcpt):
        parts.append(f"ORCPT={recipient.orcpt}")
    return " ".join(parts).encode()
